"""Generation that the classifier guards, against generation alone: patch by patch, and through generate()."""

import copy
import math
import random
import re

import pytest
import torch
from matcher import fold, phrase_regex

from model import AGIFormer, AGIFormerConfig
from model.genesis.gate.automaton import compile_policy
from model.genesis.gate.byte_gate import ByteGate, GateLog
from model.genesis.gate.classifier import HiddenStateGate, peak_risks, train_gate
from model.genesis.gate.guarded import GuardedStream, PatchWriter
from model.genesis.gate.interventions import read_log
from model.genesis.gate.policy import Policy, Rule, load_policy
from model.inference.generate import generate
from model.inference.sampling import sample
from model.inference.stream import ByteStream
from model.inference.text import Utf8Constraint, unfinished
from tests.conftest import TINY, make_random_model

SAFE = [word.encode() for word in ("sun", "tea", "leaf", "çay", "göl", "🌱")]
UNSAFE = [word.encode() for word in ("war", "kan", "stab", "ölü", "blood", "🔪")]


def as_bytes(*texts):
    return torch.tensor([list(text) for text in texts], dtype=torch.long)


def words(rng, count, unsafe=None):
    """Words of one kind; for None the kind changes every seventh word or so."""
    kind = rng.random() < 0.5 if unsafe is None else unsafe
    chosen = []
    for _ in range(count):
        chosen.append(rng.choice(UNSAFE if kind else SAFE))
        kind ^= unsafe is None and rng.random() < 0.15
    return b" ".join(chosen) + b" "


def labelled_texts(seed, count, share):
    rng, texts = random.Random(seed), {}
    while len(texts) < count:
        unsafe = len(texts) < share * count
        texts.setdefault(words(rng, rng.randrange(4, 20), unsafe), unsafe)
    return list(texts), list(texts.values())


@pytest.fixture(scope="module")
def writer_model():
    """A tiny model that has learned to write both kinds of words, in runs; without the parts that take long."""
    torch.manual_seed(0)
    model = AGIFormer(AGIFormerConfig(**TINY | {"recall_heads": 0, "thinking_steps": 1}))
    steps, length = 100, 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    text = as_bytes(words(random.Random(1), 20_000))[0]
    for _ in range(steps):
        batch = torch.stack([text[i : i + length] for i in torch.randint(len(text) - length, (16,)).tolist()])
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def word_gate(writer_model):
    texts, labels = labelled_texts(2, 300, 0.3)
    return train_gate(writer_model, texts, labels, false_positive_rate=0.05, window=3)[0]


def make_writer(model, gate, prompts, *, tries, temperature=0.8):
    stream = GuardedStream(model, gate, len(prompts))
    stream.feed(as_bytes(*prompts))
    draws = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        draws.append(lambda logits, generator=generator: sample(logits, temperature, generator=generator))
    return PatchWriter(stream, *draws, constraints=[Utf8Constraint(prompts)], tries=tries)


def write_patches(writer, count):
    patches = [writer.write() for _ in range(count)]
    return patches, [bytes(row) for row in torch.cat([patch.data for patch in patches], 1).tolist()]


def with_threshold(gate, threshold):
    return HiddenStateGate(gate.weight, gate.bias, threshold, gate.window)


def unsafe_share(texts):
    unsafe, safe = (sum(text.count(word) for text in texts for word in kind) for kind in (UNSAFE, SAFE))
    assert unsafe + safe > 300
    return unsafe / (unsafe + safe)


def test_guarded_generation_says_less_that_is_unsafe(writer_model, word_gate):
    prompts = [b"sun tea "] * 64
    alone = write_patches(make_writer(writer_model, word_gate, prompts, tries=0), 24)
    guarded = write_patches(make_writer(writer_model, word_gate, prompts, tries=4), 24)
    assert unsafe_share(alone[1]) > 0.35
    assert unsafe_share(guarded[1]) < 0.8 * unsafe_share(alone[1])
    rejected = [torch.stack([patch.rejected for patch in patches]).float().mean() for patches, _ in (alone, guarded)]
    assert rejected[1] < 0.2 * rejected[0]
    for text in guarded[1]:
        text[: len(text) - len(unfinished(text)[0])].decode()  # the constraint holds through all tries


def test_rows_that_pass_say_what_they_would_say_alone(writer_model, word_gate):
    prompts = [b"sun tea "] * 24
    gate = with_threshold(word_gate, 2.0)
    patches, guarded = write_patches(make_writer(writer_model, gate, prompts, tries=3), 8)
    alone = write_patches(make_writer(writer_model, gate, prompts, tries=0), 8)[1]
    passed = ~torch.stack([patch.banned.any(1) for patch in patches]).any(0)
    assert 2 <= passed.sum() <= 22
    assert all(guarded[row] == alone[row] for row in passed.nonzero().flatten().tolist())
    assert guarded != alone


@pytest.mark.parametrize(
    "prompt, drawn", [(b"sun tea ", False), (b"sun tea \xc3", False), (b"sun t", False), (b"sun t", True), (b"", False)]
)
def test_the_state_after_a_patch_is_that_of_its_bytes(writer_model, word_gate, prompt, drawn):
    """Also for a prompt that ends inside a patch, and inside a character; and for a model with all its parts."""
    model, gate = make_random_model() if drawn else writer_model, with_threshold(word_gate, -1.0)
    writer = make_writer(model, gate, [prompt] * 8, tries=3, temperature=1.5)
    patches, texts = write_patches(writer, 5)
    assert any(patch.banned.any() for patch in patches)
    assert {patch.data.shape[1] for patch in patches[1:]} == {4} and patches[0].data.shape[1] == 4 - len(prompt) % 4
    whole = [prompt + text for text in texts]
    fresh = GuardedStream(model, gate, 8)
    fresh.feed(as_bytes(*whole))
    assert torch.allclose(writer.stream.logits(), fresh.logits(), atol=1e-4)
    scored = GuardedStream(model, gate, 8).score(as_bytes(*whole))[:, len(prompt) :]
    assert torch.allclose(torch.cat([patch.logits for patch in patches], 1), scored, atol=1e-4)
    assert torch.allclose(patches[-1].risk, fresh.risk, atol=1e-4) and torch.equal(patches[-1].risk, writer.stream.risk)
    assert torch.equal(patches[-1].rejected, patches[-1].risk > gate.threshold)
    zeros = torch.zeros(8, 256)
    assert torch.equal(writer.constraints[0].mask(zeros), Utf8Constraint(whole).mask(zeros))


def test_of_rejected_tries_the_least_risky_stays(writer_model, word_gate):
    gate = with_threshold(word_gate, -math.inf)
    tried = []

    class Watched(PatchWriter):
        def _patch(self, *arguments):
            written = super()._patch(*arguments)
            tried.append((written[0], self.stream.risk))
            return written

    stream = GuardedStream(writer_model, gate, 6)
    generator = torch.Generator().manual_seed(3)
    patch = Watched(stream, lambda logits: sample(logits, 1.5, generator=generator), tries=5).write()
    risks = torch.stack([risk for _, risk in tried])
    replayed, _ = tried.pop()
    risks = risks[:-1]
    assert len(tried) == 6 and patch.rejected.all() and torch.equal(replayed, patch.data)
    assert torch.equal(patch.risk, risks.amin(0))
    for row, best in enumerate(risks.argmin(0).tolist()):
        assert torch.equal(patch.data[row], tried[best][0][row])
    firsts = torch.stack([data[:, 0] for data, _ in tried])
    for row in range(6):  # no first byte twice, and all but the last are reported
        assert len(set(firsts[:, row].tolist())) == 6
        assert set(patch.banned[row].nonzero().flatten().tolist()) == set(firsts[:-1, row].tolist())
    probability = GuardedStream(writer_model, gate, 6).logits().softmax(-1)
    assert torch.allclose(patch.mass, (probability * patch.banned).sum(1))


def test_a_greedy_choice_is_drawn_otherwise(writer_model, word_gate):
    prompts, gate = [b"war kan "] * 4, with_threshold(word_gate, -math.inf)
    alone = write_patches(make_writer(writer_model, gate, prompts, tries=0, temperature=0), 15)[1]
    guarded = write_patches(make_writer(writer_model, gate, prompts, tries=4, temperature=0), 15)[1]
    assert len(set(alone)) == len(set(guarded)) == 1 and alone != guarded


def test_no_try_completes_what_the_byte_gate_blocks(writer_model, word_gate, tmp_path):
    (tmp_path / "policy.toml").write_text('[words]\nword_boundaries = false\nphrases = ["kan", "çay"]\n', "utf-8")
    automaton = compile_policy(load_policy(tmp_path / "policy.toml", default=False))
    writer = make_writer(writer_model, word_gate, [b"sun k", b"war \xc3"] * 12, tries=4)
    writer.constraints.append(ByteGate(automaton, 24).read([b"sun k", b"war \xc3"] * 12))
    patches, texts = write_patches(writer, 20)
    assert any(patch.banned.any() for patch in patches)
    for text, beginning in zip(texts, (b"sun k", b"war \xc3") * 12):
        folded = fold((beginning + text).decode("utf-8", "replace"))
        assert "kan" not in folded and fold("çay") not in folded


def test_where_the_constraint_leaves_one_byte_the_ban_gives_way(writer_model, word_gate):
    class OnlyX:
        def mask(self, logits):
            return logits.masked_fill(torch.arange(256) != 120, -torch.inf)

        def advance(self, chosen):
            pass

    gate = with_threshold(word_gate, -math.inf)
    writer = PatchWriter(GuardedStream(writer_model, gate, 2), lambda logits: sample(logits), constraints=[OnlyX()])
    patch = writer.write()
    assert (patch.data == 120).all() and patch.rejected.all()


def test_a_risk_that_is_no_number_is_rejected(writer_model, word_gate):
    gate = HiddenStateGate(word_gate.weight * math.nan, word_gate.bias, 1e9, 3)
    patch = PatchWriter(GuardedStream(writer_model, gate), sample, tries=1).write()
    assert patch.rejected.all() and patch.banned.any()


def test_patch_writer_refuses(writer_model, word_gate):
    for tries in (-1, 1.5, True):
        with pytest.raises(ValueError, match="tries="):
            PatchWriter(GuardedStream(writer_model, word_gate), sample, tries=tries)


def test_rows_that_are_not_watched_keep_what_is_drawn_first(writer_model, word_gate):
    prompts = [b"war kan "] * 12
    alone = make_writer(writer_model, word_gate, prompts, tries=0).write()
    watched = torch.arange(12) < 6
    patch = make_writer(writer_model, with_threshold(word_gate, -math.inf), prompts, tries=2).write(watched)
    assert torch.equal(patch.banned.any(1), watched) and torch.equal(patch.rejected, watched)
    assert torch.equal(patch.data[6:], alone.data[6:]) and not torch.equal(patch.data, alone.data)


# ── generate() ───────────────────────────────────────────────────────────────────────────────────────────────────────

PROMPTS = [b"sun tea ", b"", b"war \xc3"]  # at a boundary, nothing, inside a patch and a character
BATCH = 4
ROWS = BATCH * len(PROMPTS)


def written(model, gate=None, prompts=PROMPTS, batch=BATCH, max_bytes=24, seed=1, **arguments):
    """(bytes, why it finished) of each row."""
    data, finished = [b""] * (len(prompts) * batch), [None] * (len(prompts) * batch)
    for piece in generate(model, prompts, batch=batch, max_bytes=max_bytes, seed=seed, classifier=gate, **arguments):
        assert finished[piece.row] is None and (piece.data or piece.finished)
        data[piece.row] += piece.data
        finished[piece.row] = piece.finished
    return list(zip(data, finished))


def fired_rows(path):
    return {each.row for each in read_log(path) if each.rule_id == "classifier/hidden-state"}


def test_generate_says_less_that_is_unsafe(writer_model, word_gate):
    arguments = {"prompts": [b"sun tea ", b"leaf sun tea "], "batch": 26, "max_bytes": 60}
    alone = written(writer_model, **arguments)
    guarded = written(writer_model, word_gate, **arguments)
    share = unsafe_share([data for data, _ in alone])
    assert share > 0.35 and unsafe_share([data for data, _ in guarded]) < 0.8 * share
    assert {why for _, why in guarded} == {"length"}
    for data, _ in guarded:
        data.decode("utf-8")


@pytest.mark.parametrize("mode", ["lower", "block"])
def test_rows_that_never_fire_say_what_they_would_without_it(writer_model, word_gate, tmp_path, mode):
    log, arguments = GateLog(tmp_path / "log"), {"top_k": 100, "top_p": 0.99, "any_bytes": True}
    alone = written(writer_model, **arguments)
    peaks = peak_risks(word_gate, writer_model, [PROMPTS[row // BATCH] + data for row, (data, _) in enumerate(alone)])
    gate = with_threshold(word_gate, peaks.median().item())
    guarded = written(writer_model, gate, log=log, classifier_mode=mode, **arguments)
    fired = fired_rows(log.path)
    assert 2 <= len(fired) <= ROWS - 2
    assert set() != {row for row in range(ROWS) if guarded[row] != alone[row]} <= fired
    if mode == "lower":  # where bytes are drawn again
        assert written(writer_model, gate, classifier_mode=mode, **arguments) == guarded
        assert written(writer_model, gate, classifier_mode=mode, seed=2, **arguments) != guarded


@pytest.mark.parametrize("mode", ["lower", "block"])
def test_a_guarded_row_depends_on_neither_max_bytes_nor_other_rows_ends(writer_model, word_gate, mode):
    gate = with_threshold(word_gate, 0.7)
    arguments = {"any_bytes": True, "classifier_mode": mode}
    long = written(writer_model, gate, max_bytes=20, **arguments)
    short = written(writer_model, gate, max_bytes=10, **arguments)
    assert [data[:10] for data, _ in long] == [data for data, _ in short]
    assert written(writer_model, max_bytes=20, any_bytes=True) != long
    for row in [i for i, (data, _) in enumerate(long) if len(data) > 9][::6]:
        stop = long[row][0][4:9]
        stopped = written(writer_model, gate, max_bytes=20, stop=[stop], **arguments)
        assert stopped[row] == (long[row][0][:4], "stop")
        for one, other in zip(stopped, long):
            assert one == other or (one[1] == "stop" and one[0] == other[0][: other[0].index(stop)])


def test_blocked_rows_end_before_the_patch_that_was_rejected(writer_model, word_gate):
    gate = with_threshold(word_gate, 0.4)
    arguments = {"max_bytes": 32, "any_bytes": True}
    lowered = written(writer_model, gate, **arguments)
    blocked = written(writer_model, gate, classifier_mode="block", **arguments)
    ended = [row for row, (_, why) in enumerate(blocked) if why == "gate"]
    assert 2 <= len(ended) < ROWS and {why for _, why in lowered} == {"length"}
    given = [PROMPTS[row // BATCH] + data for row, (data, _) in enumerate(blocked)]
    for row, (data, why) in enumerate(blocked):
        prompt, (longer, _) = PROMPTS[row // BATCH], lowered[row]
        assert longer.startswith(data) and (why == "gate" or longer == data)
        if why == "gate":  # at a boundary; what would come next is above the threshold
            assert len(given[row]) % 4 == 0 or not data
            rest = 4 - len(given[row]) % 4
            assert peak_risks(gate, writer_model, [given[row] + longer[len(data) :][:rest]]) > gate.threshold
        if len(prompt) < 4:  # no patch of what was given out is
            whole = given[row][: len(given[row]) // 4 * 4]
            assert not whole or peak_risks(gate, writer_model, [whole]) <= gate.threshold
    held = {data[-3:] for data, why in blocked if why == "gate" and len(data) > 3}  # back, until it is no stop string
    stop = [each + b"never" for each in held]
    assert held and written(writer_model, gate, stop=stop, classifier_mode="block", **arguments) == blocked
    everything = written(writer_model, with_threshold(gate, -math.inf), classifier_mode="block", **arguments)
    assert everything == [(b"", "gate")] * ROWS


@pytest.mark.parametrize(("mode", "any_bytes"), [("lower", False), ("block", True)])
def test_the_policy_holds_with_the_classifier(writer_model, word_gate, mode, any_bytes):
    rules = [("kan", False), ("çay", False), ("sun tea", True), ("s", True), ("🌱", False)]
    policy = Policy(tuple(Rule("c", f"phrase:{text}", "phrase", fold(text), bounded) for text, bounded in rules))
    prompts = [b"sun k", b"war \xc3", b"tea s"]
    found, ends = 0, set()
    for given in (policy, Policy(())):
        texts = written(
            writer_model, with_threshold(word_gate, 0.7), prompts, 20, 32, policy=given, classifier_mode=mode,
            any_bytes=any_bytes, temperature=1.1,
        )  # fmt: skip
        ends |= {why for _, why in texts}
        for row, (data, _) in enumerate(texts):
            whole = prompts[row // 20] + data
            if not any_bytes:
                assert not data or not unfinished(whole)[0]
                (b"\xc3" * (row // 20 == 1) + data).decode("utf-8", "strict" if data else "ignore")
            text, begin = (fold(each.decode("utf-8", "replace")) for each in (whole, prompts[row // 20]))
            found_here = (match for each, bounded in rules for match in re.finditer(phrase_regex(each, bounded), text))
            matches = sum(match.end() > len(begin) for match in found_here)  # what the prompt completes is its own
            assert given is not policy or not data or not matches
            found += matches
    assert found > 10 and ("gate" in ends) == (mode == "block")


def test_the_log_tells_the_classifier_from_the_policy(writer_model, word_gate, tmp_path):
    """Each line is recomputed from the text that was given out: rejected tries leave none of the policy's."""
    policy = Policy((Rule("c", "phrase:an", "phrase", "an", False), Rule("c", "phrase:e", "phrase", "e", False)))
    log = GateLog(tmp_path / "log", with_text=True)
    guard = with_threshold(word_gate, 0.7)
    texts = written(writer_model, guard, max_bytes=32, policy=policy, log=log, any_bytes=True)
    lines = list(read_log(log.path))
    assert log.counts == {"classifier": sum(each.category == "classifier" for each in lines), "c": log.counts["c"]}
    assert 10 < log.counts["classifier"] < len(lines) - 10
    automaton, single = compile_policy(policy), 0
    for row, (data, _) in enumerate(texts):
        prompt = PROMPTS[row // BATCH]
        expected, stream, gate = {}, ByteStream(writer_model), ByteGate(automaton, 1).read([prompt])
        stream.feed(as_bytes(prompt))
        left = []
        for position, byte in enumerate(data):
            masked = gate.mask(stream.logits())
            left.append(masked.softmax(-1)[0])
            if gate.flagged():
                (removal,) = gate.removals([0])
                expected[position] = (removal.rule, removal.state, removal.byte, pytest.approx(removal.mass, abs=1e-4))
            gate.advance(torch.tensor([byte]))
            stream.feed(torch.tensor([[byte]]))
        mine = [each for each in lines if each.row == row]
        told = {each.position: (each.rule, each.state, each.byte, each.mass) for each in mine if each.category == "c"}
        assert told == expected
        for each in mine:
            assert each.text == (prompt + data[: each.position])[-200:].decode("utf-8", "replace")
            if each.category == "classifier":
                assert each.rule == "hidden-state" and each.state == 0
                assert each.position == 0 or (len(prompt) + each.position) % 4 == 0
                probability = left[each.position][each.byte].item()
                assert 0 < probability <= each.mass + 1e-4 <= 1.001
                single += probability == pytest.approx(each.mass, abs=1e-4)
    assert single > 3  # where one try was rejected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_repeats_itself(writer_model, word_gate):
    model, gate = copy.deepcopy(writer_model).cuda(), with_threshold(word_gate, 0.7).to("cuda")
    for mode in ("lower", "block"):
        first = written(model, gate, classifier_mode=mode)
        assert written(model, gate, classifier_mode=mode) == first != written(model)
    alone = written(model)
    assert written(model, with_threshold(gate, math.inf)) == alone
