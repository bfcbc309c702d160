"""The gate: what it masks against the flat automaton, texts that it writes against Python's re, and its log."""

import copy
import json
import random
import re
import threading
from datetime import datetime

import pytest
import torch
from matcher import fold, phrase_regex, settled

from model.genesis.gate.automaton import compile_policy
from model.genesis.gate.byte_gate import CONTEXT, ByteGate, GateLog, Removal
from model.genesis.gate.policy import Policy, Rule, load_policy
from model.inference.generate import generate
from model.inference.sampling import sample
from model.inference.stream import ByteStream
from model.inference.text import Utf8Constraint

PIECES = [
    *"abc is 12-", "ı", "İ", "ş", "S\u0327", "ﬁ", "ß", "\u200b", "\u200d", "\u0301", "😀", "👩\u200d🚀", "漢", "⑩", "𝐚",
    "ａ", b"\xff", b"\xe2\x80", b"\xc3", b"\xf0\x9f",
]  # fmt: skip
ALPHABET = "abcdefghijklmnopqrstuvwxyzçğışöü0123456789.,-漢字😀"


def phrases(*texts: str, bounded: bool = False, category: str = "c") -> tuple[Rule, ...]:
    return tuple(Rule(category, f"phrase:{text}", "phrase", " ".join(fold(text).split()), bounded) for text in texts)


def pattern(text: str, name: str = "p", category: str = "c") -> Rule:
    return Rule(category, name, "pattern", text)


def random_prompt(rng: random.Random, n: int = 8) -> bytes:
    return b"".join(p if isinstance(p, bytes) else p.encode() for p in rng.choices(PIECES, k=rng.randint(0, n)))


def gate_of(*rules: Rule, rows: int = 1) -> ByteGate:
    return ByteGate(compile_policy(Policy(rules)), rows)


# ── what is masked ───────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = [
    (*phrases("si", "as", "12"), pattern(r"a\W\w")),
    (*phrases("si", "as", "a b", "a", bounded=True), *phrases("😀c")),
    (pattern(r"b."), pattern("a[a-zæðøþ×÷]", "q"), *phrases("fi", "10")),
]


@pytest.mark.parametrize("rules", SMALL)
def test_masks_and_ends_are_those_of_the_flat_automaton(rules):
    """For rows in different states, read at once or byte by byte."""
    automaton = compile_policy(Policy(rules))
    flat, rng = automaton.flat(), random.Random(1)
    texts = [random_prompt(rng) for _ in range(120)]
    gate = ByteGate(automaton, len(texts))
    longest = max(map(len, texts))
    padded = torch.tensor([list(b"z" * (longest - len(text)) + text) for text in texts])
    for byte in padded.unbind(1):
        gate.advance(byte)
    states = []
    for text in texts:
        state = 0
        for byte in b"z" * (longest - len(text)) + text:
            state = flat.next[state, byte]
        states.append(state)
    expected = torch.from_numpy(flat.blocked[states])
    assert torch.equal(gate.blocked(), expected) and expected.any()
    assert gate.must_not_end().tolist() == flat.ends[states].tolist()
    logits = torch.randn(len(texts), 256)
    left = ~expected.all(1)  # not after a character begun against the gate's will
    assert torch.equal(gate.mask(logits)[left], logits.masked_fill(expected, -torch.inf)[left])

    read = ByteGate(automaton, len(texts)).read(texts)
    alone = torch.cat([ByteGate(automaton, 1).read([text]).blocked() for text in texts])
    assert torch.equal(read.blocked(), alone)
    whole = torch.tensor([settled(text) == text.decode("utf-8", "replace") for text in texts])
    assert not read.must_not_end()[whole].any() and whole.any()
    assert not (read.blocked() & ~gate.blocked())[[text[:1] != b"z" for text in texts]].any()


def test_a_branch_leaves_the_gate_as_it_was():
    gate = gate_of(*phrases("ab")).read([b"a"])
    branch, before = copy.copy(gate), gate.blocked()
    branch.advance(torch.tensor([ord("x")]))
    assert torch.equal(gate.blocked(), before) and before[0, ord("b")] and not branch.blocked().any()


def test_no_rule_and_nothing_to_block_change_nothing():
    logits = torch.randn(2, 256)
    for gate in (gate_of(rows=2), gate_of(*phrases("zzz"), rows=2)):
        assert gate.mask(logits) is logits and not gate.flagged().any() and not gate.must_not_end().any()
        gate.advance(torch.tensor([1, 200]))
        assert not gate.blocked().any()
    with pytest.raises(ValueError, match="prompts has 1 rows: accepted are 2"):
        gate.read([b"x"])


@pytest.mark.parametrize("sampling", [{}, {"top_k": 1}, {"top_k": 3, "top_p": 0.5}, {"top_p": 0.1}])
def test_masked_bytes_are_never_drawn_and_the_rest_keeps_its_order(sampling):
    gate = gate_of(pattern("a[b-y]")).read([b"a"])
    logits = torch.zeros(1, 256)
    logits[0, ord("c")], logits[0, ord("z")], logits[0, ord("q")] = 50.0, 20.0, 10.0
    drawn = {sample(gate.mask(logits), 1.0, **sampling).item() for _ in range(30)}
    assert drawn == {ord("z")}


@pytest.mark.parametrize("any_bytes", [True, False])
def test_there_is_always_a_byte_left(any_bytes):
    """Rules that leave next to nothing, and prompts that end inside characters."""
    rules = [pattern("[^!-~]"), pattern(r"\w\W", "q"), pattern(r"\W\W?\w", "r"), pattern("..", "s")]
    for seed, rule in enumerate(rules):
        gate, rng = gate_of(rule, rows=60), random.Random(seed)
        prompts = [random_prompt(rng) for _ in range(58)] + [b"a\xe6\xbc", b"- \xe6"]
        gate.read(prompts)
        constraint = Utf8Constraint(prompts)
        generator = torch.Generator().manual_seed(seed)
        for i in range(50):
            logits = torch.randn(60, 256, generator=generator) * 4
            allowed = logits if any_bytes else constraint.mask(logits)
            left = (allowed.isfinite() & ~gate.blocked()).any(1)
            if i == 0:  # rows whose prompt's last character can only be completed to a match, say nothing
                stuck = ~left
            assert torch.equal(left | stuck, torch.ones(60, dtype=torch.bool))
            masked = gate.mask(allowed)
            assert masked.isfinite().any(1).all()
            chosen = sample(masked, 1.0, top_k=2, generator=generator)
            gate.advance(chosen)
            assert gate.must_not_end()[stuck].all()
            constraint.advance(chosen)
        assert stuck.sum() < 20
        assert stuck[-2:].all() or seed in (1, 2)  # in these, letters may follow


def test_a_prompt_that_can_only_become_a_match_gets_no_text(light_model):
    prompts, policy = [b"a\xe6\xbc", b"a", b"b\xe6\xbc"], Policy((pattern(r"a[^!-~]"),))
    rows = [b""] * 3
    for piece in generate(light_model, prompts, max_bytes=9, seed=1, temperature=2.0, policy=policy):
        rows[piece.row] += piece.data
    assert not rows[0] and rows[1] and rows[2]


# ── what is written ──────────────────────────────────────────────────────────────────────────────────────────────────


def matches(regexes: list[str], prompt: bytes, data: bytes) -> list[str]:
    """Matches in the folded text that end after what the prompt settles."""
    whole = fold((prompt + data).decode("utf-8", "replace"))
    begin = len(fold(settled(prompt))) if data else len(whole)
    found = (match for regex in regexes for match in re.finditer(f"(?=({regex}))", whole))
    return [match[1] for match in found if match.end(1) > begin]


def random_rules(seed: int, bounded: bool) -> tuple[tuple[Rule, ...], list[str]]:
    """(rules that random bytes meet all the time, the same for re)."""
    rng = random.Random(seed)
    texts = {"".join(rng.choices(ALPHABET, k=rng.choice([1, 2, 2]))) for _ in range(120 if bounded else 60)}
    if not bounded:
        texts = {text for text in texts if len(text) > 1}
    texts |= {"fi", "10", "ss", "é x", "ａ.", "a \u0301 b"}
    rules = [*phrases(*sorted(texts), bounded=bounded), pattern(r"\d\W\d"), pattern("[a-f][.,]", "q")]
    return tuple(rules), [*(phrase_regex(text, bounded) for text in sorted(texts)), r"\d\W\d", "[a-f][.,]"]


@pytest.mark.parametrize(("bounded", "any_bytes"), [(True, False), (False, True)])
def test_generated_texts_hold_no_match(light_model, bounded, any_bytes):
    """Some ten thousand bytes at temperature 2, whatever the prompt ends in; without the gate there are matches."""
    rng, model = random.Random(7), light_model
    rules, regexes = random_rules(3, bounded)
    prompts = [random_prompt(rng) for _ in range(9)]
    prompts += [b"", b"a", b"f", b"x\xef\xac", b"\xef\xac", b"1\xe2\x91", b"\xf0\x9f\x98"]

    def texts(policy: Policy, max_bytes: int) -> list[bytes]:
        data = [b""] * (8 * len(prompts))
        for piece in generate(model, prompts, max_bytes=max_bytes, temperature=2.0, seed=5, batch=8,
                              any_bytes=any_bytes, policy=policy, stop=[b"z", b"\xb6"]):  # fmt: skip
            data[piece.row] += piece.data
        return data

    written = texts(Policy(rules), 55)
    assert sum(map(len, written)) > 1500
    for i, data in enumerate(written):
        assert not matches(regexes, prompts[i // 8], data), (prompts[i // 8], data)
    free = texts(Policy(), 16)
    assert sum(bool(matches(regexes, prompts[i // 8], data)) for i, data in enumerate(free)) > 10


def test_a_policy_that_blocks_nothing_draws_the_same_bytes(light_model):
    def text(policy):
        arguments = {"max_bytes": 60, "seed": 3, "batch": 3, "temperature": 1.3}
        return [(p.row, p.data, p.finished) for p in generate(light_model, b"abc", policy=policy, **arguments)]

    assert text(None) == text(Policy()) == text(Policy(phrases("this never occurs", bounded=True)))
    assert text(Policy()) != text(Policy(phrases(*"abcdefghijklm")))


@pytest.mark.parametrize("bounded", [True, False])
def test_greedy_text_goes_around_what_it_wants_to_say(monkeypatch, light_model, bounded):
    """A model that repeats "kötü ": without boundaries ü does not come, with them the word goes on."""
    cycle = "kötü ".encode()

    def logits(self):
        wanted = torch.zeros(self.batch_size, 256)
        wanted[:, cycle[self.position % len(cycle)]] = 9.0
        wanted[:, ord("x")] = 5.0
        return wanted

    monkeypatch.setattr(ByteStream, "logits", logits)

    def text(*rules: Rule, n: int = 14) -> str:
        pieces = generate(light_model, b"", max_bytes=n, temperature=0, policy=Policy(rules))
        return b"".join(piece.data for piece in pieces).decode()

    assert text() == "kötü kötü "
    if bounded:
        assert text(*phrases("KÖTÜ", bounded=True)) == "kötüxkötü "
        assert text(*phrases("KÖTÜ", bounded=True), n=6) == "köt"
        assert text(*phrases("KÖTÜ", "kot", bounded=True), n=6) == "kö"
    else:
        assert text(*phrases("KÖTÜ")) == "kötÀ kötÀ "  # the lead byte could have become something else, and does


def test_what_would_end_a_word_is_held_back_and_left_out(light_model, monkeypatch):
    """A model that writes x only, and rules against x as a word; then one that writes anything."""
    policy = Policy(phrases(*"abcdefghijklmnopqrstuvwxyz0123456789", bounded=True))
    regexes = [phrase_regex(text, True) for text in "abcdefghijklmnopqrstuvwxyz0123456789"]
    for max_bytes in (2, 7, 20):
        rows = [b""] * 60
        for piece in generate(light_model, b"-", max_bytes=max_bytes, temperature=2.0, seed=1, batch=60, policy=policy):
            rows[piece.row] += piece.data
            assert not matches(regexes, b"-", rows[piece.row])

    wanted = torch.zeros(256)
    wanted[ord("x")] = 90.0
    monkeypatch.setattr(ByteStream, "logits", lambda self: wanted.expand(self.batch_size, -1))

    def pieces(n: int, prompt: bytes = b"-", **changes) -> list[tuple[bytes, str | None]]:
        found = generate(light_model, prompt, max_bytes=n, seed=1, policy=policy, **changes)
        return [(piece.data, piece.finished) for piece in found]

    assert pieces(1) == [(b"", "length")]
    assert pieces(3) == [(b"xx", None), (b"x", "length")]
    assert pieces(9, stop=[b"xx"]) == [(b"", "stop")]
    assert pieces(1, b"-x") == [(b"x", "length")]


def test_the_default_policy_is_on(light_model, monkeypatch):
    """A model that wants nothing but the last digit of a card number and the end of an address does not get them."""
    logits = torch.zeros(256)
    logits[[ord("1"), ord("m"), ord("!")]] = torch.tensor([90.0, 80.0, 70.0])
    monkeypatch.setattr(ByteStream, "logits", lambda self: logits.expand(self.batch_size, -1))
    prompts = [b"4111 1111 1111 111", b"me@example.o", b"4111 1111 1111 112"]
    written = [b""] * 3
    for piece in generate(light_model, prompts, max_bytes=1, seed=1):
        written[piece.row] += piece.data
    assert written == [b"m", b"1", b"1"]
    logits[ord("1")] = -1.0
    assert b"".join(piece.data for piece in generate(light_model, prompts[1], max_bytes=1, seed=1)) == b"!"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_masks_as_the_cpu_does_and_does_not_wait():
    automaton, rng = compile_policy(Policy((*random_rules(1, True)[0], *load_policy().rules))), random.Random(2)
    prompts = [random_prompt(rng) for _ in range(64)]
    cpu, cuda = ByteGate(automaton, 64).read(prompts), ByteGate(automaton, 64, "cuda").read(prompts)
    logits = torch.randn(64, 256)
    on = logits.cuda()
    chosen = [torch.randint(256, (64,)) for _ in range(30)]
    there = [each.cuda() for each in chosen]
    cuda.mask(on), copy.copy(cuda).advance(there[0])  # the kernel is compiled
    torch.cuda.synchronize()
    for here, other in zip(chosen, there):
        torch.cuda.set_sync_debug_mode("error")
        try:
            masked, ends, flagged = cuda.mask(on), cuda.must_not_end(), cuda.flagged()
            cuda.advance(other)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(masked.cpu(), cpu.mask(logits))
        assert torch.equal(ends.cpu(), cpu.must_not_end()) and torch.equal(flagged.cpu(), cpu.flagged())
        cpu.advance(here)


# ── what is logged ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_removals_tell_category_rule_byte_and_mass():
    rules = (*phrases("ax", "aY", "añ"), *phrases("az", category="d"), pattern(r"a\d", category="d"))
    gate = gate_of(*rules, rows=2).read([b"a", b"b"])
    logits = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    logits[0, ord("7")] = 4.0
    p = logits.softmax(-1)
    gate.mask(logits)
    gate.advance(torch.tensor([0, 0]))  # what the mask took is still known afterwards
    assert gate.flagged().tolist() == [True, False] and not gate.removals([1])
    first, second = sorted(gate.removals([0, 1]), key=lambda removal: removal.category)
    blocked = {c: p[0, [ord(x) for x in text]].sum().item() for c, text in (("c", "xXyYnN"), ("d", "zZ0123456789"))}
    assert (first.row, first.category, second.category) == (0, "c", "d")
    assert abs(first.mass - blocked["c"]) < 1e-6 and abs(second.mass - blocked["d"]) < 1e-6
    best = max("xXyYnN", key=lambda c: logits[0, ord(c)])
    names = {"x": "phrase:ax", "y": "phrase:aY", "n": "phrase:añ"}
    assert (first.byte, first.rule) == (ord(best), names[best.lower()]) and second.byte == ord("7")
    assert (
        second.rule == "p" and first.state == gate_of(*rules).automaton.explain(*gate.automaton.read(b"a"), ord("x"))[1]
    )


def test_masses_below_the_least_are_not_flagged():
    automaton = compile_policy(Policy(phrases("ab")))
    logits = torch.zeros(1, 256)
    removed = 2 / 256  # b and B
    for least, flagged in ((removed * 0.99, True), (removed * 1.01, False)):
        gate = ByteGate(automaton, 1, least_mass=least).read([b"a"])
        gate.mask(logits)
        assert gate.flagged().tolist() == [flagged]


def log_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


FIELDS = ["time", "run", "row", "position", "category", "rule", "state", "byte", "mass"]


def test_generation_logs_each_intervention_once_and_no_text(light_model, tmp_path):
    path, prompt = tmp_path / "gate_log.jsonl", "gizli ğ".encode()
    rules = (*phrases(*"aeiou"), *phrases(*"ıöü", category="d"), pattern(r"\d", category="e"))
    log = GateLog(path)
    arguments = {"max_bytes": 40, "temperature": 1.5, "seed": 2, "batch": 8, "stop": [b"s", b"t"]}
    pieces = list(generate(light_model, prompt, policy=Policy(rules), log=log, **arguments))
    lines = log_lines(path)
    assert lines and all(list(line) == FIELDS for line in lines) and "gizli" not in path.read_text("utf-8")
    assert sum(log.counts.values()) == len(lines) and set(log.counts) <= {"c", "d", "e"}
    for line in lines:
        assert line["time"].endswith("Z") and datetime.fromisoformat(line["time"]) and line["run"] == log.run
        assert 0 <= line["row"] < 8 and 0 <= line["position"] < 40 and 0 < line["mass"] <= 1 and line["state"] >= 0
    places = [(line["row"], line["position"], line["category"]) for line in lines]
    assert len(set(places)) == len(places)
    # Rows are logged until they finish and no further: one does early.
    assert {piece.finished for piece in pieces} == {None, "stop", "length"}
    generated = dict.fromkeys(range(8), 0)
    for piece in pieces:
        generated[piece.row] += len(piece.data)
    assert all(line["position"] <= generated[line["row"]] + 4 for line in lines if generated[line["row"]] < 36)
    again = GateLog(path)
    list(generate(light_model, b"", max_bytes=5, seed=1, policy=Policy(rules), log=again))
    assert log_lines(path)[: len(lines)] == lines and again.run != log.run


def test_text_is_logged_when_asked(light_model, tmp_path):
    path, prompt = tmp_path / "log.jsonl", "ığ".encode() * 200
    list(
        generate(
            light_model,
            prompt,
            max_bytes=30,
            seed=2,
            policy=Policy(phrases(*"aeiou")),
            log=GateLog(path, with_text=True),
        )
    )
    lines = log_lines(path)
    assert [list(line) for line in lines] == [[*FIELDS, "text"]] * len(lines) and lines
    for line in lines:
        assert len(line["text"].encode()) <= CONTEXT + 4 and line["text"].startswith(("ı", "ğ", "\ufffd"))
        if line["position"] == 0:
            assert line["text"].encode().endswith(prompt[-CONTEXT + 3 :])


def test_a_log_is_made_by_its_first_line_and_survives_what_cannot_be_written(tmp_path):
    removal = Removal(0, "c", "phrase:1", 5, 97, 0.25)
    log = GateLog(tmp_path / "log.jsonl")
    assert not log.path.exists()
    log.add(removal, 3)
    assert log_lines(log.path)[0]["position"] == 3 and log.failure is None
    nowhere = GateLog(tmp_path / "missing" / "log.jsonl")
    nowhere.add(removal, 3)
    assert isinstance(nowhere.failure, OSError) and nowhere.counts == {"c": 1}
    silent = GateLog()
    silent.add(removal, 3)
    assert silent.counts == {"c": 1} and silent.failure is None


def test_lines_of_several_writers_do_not_mix(tmp_path):
    path = tmp_path / "log.jsonl"
    logs = [GateLog(path, with_text=True) for _ in range(4)]

    def write(log: GateLog) -> None:
        for i in range(50):
            log.add(Removal(0, "c", "phrase:1", 5, 97, 0.25), i, b"text " * 30)

    threads = [threading.Thread(target=write, args=(log,)) for log in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = log_lines(path)
    assert len(lines) == 200
    for log in logs:
        assert [line["position"] for line in lines if line["run"] == log.run] == list(range(50))
