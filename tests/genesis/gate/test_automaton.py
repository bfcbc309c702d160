"""The automaton against Python's re on folded whole texts, its flat form, and numbers with checksums."""

import random
import unicodedata

import numpy as np
import pytest
import torch
from matcher import completions, decoded, fold, phrase_regex

from model.genesis.gate.automaton import ByteAutomaton, FlatAutomaton, compile_policy
from model.genesis.gate.patterns import parse
from model.genesis.gate.policy import Policy, Rule, load_policy
from model.kernels.automaton import blocked_targets

PHRASES = ["ass", "as s", "a", "sas", "ığ", "straße", "fi", "x-y", "-a", "a-", "😀", "a 😀 b", "가", "10", "漢字", "#a"]
PATTERNS = {  # (the same for Python's re on folded text, texts that match)
    r"ab+c": ("ab+c", ["abc", "ABBC", "ａbｂc"]),
    r"\bs(a|sa)*s\b": (r"\bs(a|sa)*s\b", ["sas", "ssaas", "ſs", "ß"]),
    r"a.b": ("a[^\n]b", ["axb", "a b", "a😀b", "a漢b"]),
    r"[^a\W]x": (r"[^a\W]x", ["bx", "çX", "_x"]),
    r"-\b": (r"-\b", ["-a", "--a", "-漢"]),
    r"\d{2,3}-\d\b": (r"\d{2,3}-\d\b", ["12-3", "1234-5", "⑩-1 ", "٣٣-٣"]),
    r"(?:ab|ba){2}": ("(?:ab|ba){2}", ["abba", "baba", "ab\u200bba"]),
    r"s\s+s": (r"s\s+s", ["s s", "s \n\u00a0s", "ß ß"]),
    r"\ba\b.\bb\b": (r"\ba\b[^\n]\bb\b", ["a b", "a-b!", "a.b"]),
    r"x\W?\w": (r"x\W?\w", ["x-y", "xy", "x ğ"]),
    r"[a-c]{3}\b": (r"[a-c]{3}\b", ["abc", "ÇAB", "ccccc"]),
    r"\w@([\w-]+\.)+[a-z]{2}": (r"\w@([\w-]+\.)+[a-z]{2}", ["a@b.co", "ş@ş.ş.şş", "a@b-.c.de"]),
    r"(a|\bb)s": (r"(a|\bb)s", ["as", "bs", "xbs"]),
    r"[à-ë]b": ("[ace]b", ["ab", "çB", "eb"]),
    r"ßa+": ("ssa+", ["ssa", "ẞaa", "ſSa"]),
    r"\x61\u011f\.": (r"ag\.", ["ağ.", "AĞ\u0307."]),
    r"a{0,2}b{2}(cd?|)e": (r"a{0,2}b{2}(cd?|)e", ["aabbcde", "bbe", "abbce", "bbde"]),
}
PIECES = [
    *"aassbx sas-", "as", "ass", "S", "ſ", "ß", "ẞ", "ı", "İ", "ğ", "G\u0306", "ﬁ", "f", "i", "ﬃ", " ", "\n", "\u00a0",
    "\u200b", "\u200d", "\u0301", "\u00ad", "\ufe0f", "😀", "가", "\u1100\u1161", "각", "⑩", "1", "０", "٣", "2", "漢",
    "字", "𝐚", "ａ", "ⓐ", "㎏", "_", "@", ".", "c", "#", "�", b"\xff", b"\xe2", b"\xe2\x80", b"\xc4", b"\xf0\x9f\x98",
    b"\x9f", b"\xed\xa0\x80", b"\xc0",
]  # fmt: skip


def policy(phrases=(), patterns=(), bounded=True) -> Policy:
    rules = [Rule("words", f"phrase:{i}", "phrase", " ".join(fold(p).split()), bounded) for i, p in enumerate(phrases)]
    rules += [Rule("shapes", f"pattern:{i}", "pattern", pattern) for i, pattern in enumerate(patterns)]
    return Policy(tuple(rules))


def regexes(chosen: Policy) -> list[str]:
    """The rules as Python's re has them, over folded text."""
    return [
        phrase_regex(r.text, r.word_boundaries) if r.kind == "phrase" else PATTERNS[r.text][0] for r in chosen.rules
    ]


def random_text(rng: random.Random, n: int, pieces=PIECES) -> bytes:
    return b"".join(p if isinstance(p, bytes) else p.encode() for p in rng.choices(pieces, k=n))


def expected(chosen: Policy, data: bytes) -> tuple[list[bool], bool]:
    """(whether each byte completes a match, whether the end does) by the matcher."""
    folded, at = "", []
    for c, byte in decoded(data):
        at += [byte] * len(fold(c))
        folded += fold(c)
    symbol_hits, ends = completions(regexes(chosen), folded)
    hits = [False] * len(data)
    for byte, hit in zip(at, symbol_hits):
        hits[byte] |= hit
    return hits, ends


def found(automaton: ByteAutomaton, data: bytes) -> list[bool]:
    return blocked_targets(automaton.tables(), torch.frombuffer(bytearray(data), dtype=torch.uint8)[None])[0].tolist()


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize(
    "chosen",
    [
        ["ass", "as s", "a", "sas", "s a s s"],  # of which some end inside others
        ["x-y", "-a", "a-", "#a", "y -"],
        ["straße", "fi", "ığ", "10", "kg 1"],
        ["😀", "a 😀 b", "가", "漢字", "각 a"],
    ],
    ids=" ".join,
)
def test_phrases_complete_where_the_matcher_says(chosen, bounded):
    rng, matched = random.Random(1), 0
    pieces = [*PIECES, *" ".join(chosen), *chosen, " ", "  ", "\n \u00a0", "\u3000\u200b "]
    chosen = policy(chosen, bounded=bounded)
    automaton = compile_policy(chosen)
    for _ in range(30):
        data = random_text(rng, 12, pieces)
        hits, _ = expected(chosen, data)
        assert found(automaton, data) == hits, data
        matched += sum(hits)
    assert matched


def test_white_space_of_a_phrase_is_any_run_of_it():
    automaton = compile_policy(policy(["kötü  söz\n", "z a"], bounded=False))
    for space in (" ", "   ", "\n\t", "\u00a0\u200b \u2003", "\r\n"):
        assert found(automaton, f"kötü{space}söz{space}a".encode()).count(True) == 2
    assert not any(found(automaton, "kötüsöz kötü-söz kötü - söz".encode()))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_completes_where_re_says(pattern):
    rng, matched = random.Random(pattern), 0
    chosen = policy(patterns=[pattern])
    automaton = compile_policy(chosen)
    for _ in range(30):
        text = list(rng.choice(PATTERNS[pattern][1]))
        if rng.random() < 0.5:  # nearly a match
            text[rng.randrange(len(text))] = rng.choice(["", "a", "-", "\u0301"])
        data = random_text(rng, 5) + "".join(text).encode() + random_text(rng, 4)
        hits, _ = expected(chosen, data)
        assert found(automaton, data) == hits, data
        matched += sum(hits)
    assert matched


@pytest.mark.parametrize("seed", range(3))
def test_phrases_and_patterns_together(seed):
    rng = random.Random(seed)
    chosen = policy(rng.sample(PHRASES, 4), rng.sample(list(PATTERNS), 4), bounded=bool(seed % 2))
    automaton = compile_policy(chosen)
    for _ in range(20):
        data = random_text(rng, 12, [*PIECES, *(text for r in chosen.rules[4:] for text in PATTERNS[r.text][1])])
        assert found(automaton, data) == expected(chosen, data)[0], data


@pytest.mark.parametrize("seed", range(2))
def test_the_flat_automaton_is_its_factors_multiplied(seed):
    """Hits and ends against the matcher, and blocked bytes by trying what may follow them."""
    rng = random.Random(seed)
    chosen = policy(rng.sample(PHRASES, 2), rng.sample([r"ab+c", r"-\b", r"a.b", r"x\W?\w"], 1), bounded=seed == 0)
    automaton = compile_policy(chosen)
    flat = automaton.flat(2**15)
    for _ in range(15):
        data = random_text(rng, 12)
        hits, _ = expected(chosen, data)
        state = 0
        for byte, hit in zip(data, hits):
            assert flat.hits[state, byte] == hit
            state = flat.next[state, byte]
        if decoded(data) and decoded(data + b"A")[: len(decoded(data))] == decoded(data):
            whole = data.decode("utf-8", "replace").encode()  # the end of a character that is none reads as U+FFFD
            assert flat.ends[state] == (expected(chosen, whole)[1] or any(expected(chosen, whole)[0][len(data) :]))
    assert_never_stuck(flat)
    with pytest.raises(ValueError, match=r"limit=10: .*accepted"):
        automaton.flat(10)


def assert_never_stuck(flat: FlatAutomaton) -> None:
    """From no state that is reached by bytes that are not blocked are all bytes blocked, nor all that are UTF-8."""
    reached = np.zeros(len(flat.next), dtype=bool)
    new = np.zeros(1, dtype=np.int64)
    while len(new):
        reached[new] = True
        after = np.unique(flat.next[new][~flat.blocked[new]])
        new = after[~reached[after]]
    assert not flat.blocked[reached].all(1).any()
    # U+200B begins with E2, and every beginning of a character goes on with one of the others.
    assert not flat.blocked[reached][:, [0xE2, *range(0x80, 0xC0)]].all(1).any()


def test_a_byte_inside_a_character_is_blocked_when_all_that_it_can_become_is():
    flat = compile_policy(policy(patterns=["a[a-zæðøþ×÷]", r"b\w", "c[^!-~]"])).flat()
    after = {c: flat.next[0, ord(c)] for c in "abc"}
    assert flat.blocked[after["a"], 0xC3] and not flat.hits[after["a"], 0xC3]
    assert not flat.blocked[after["b"], 0xC3]  # × and ÷ are no letters
    assert flat.blocked[after["c"], [0xE4, 0xF1]].all() and not flat.hits[after["c"], [0xE4, 0xF1]].any()
    # Soft hyphen and zero-width space are C2 AD and E2 80 8B; E2 9C has symbols only.
    assert not flat.blocked[after["c"], [0xC2, 0xE2]].any()
    inside = flat.next[after["c"], 0xE2]
    assert flat.blocked[inside, 0x9C] and not flat.blocked[inside, 0x80]
    assert (~flat.blocked[flat.next[inside, 0x80]]).any()
    assert_never_stuck(flat)


def luhn(digits: str) -> bool:
    total = 0
    for i, digit in enumerate(map(int, reversed(digits))):
        total += digit if i % 2 == 0 else sum(divmod(2 * digit, 10))
    return total % 10 == 0


def is_tckn(digits: str) -> bool:
    d = list(map(int, digits))
    tenth = (sum(d[0:9:2]) * 7 - sum(d[1:8:2])) % 10
    return len(d) == 11 and d[0] != 0 and d[9] == tenth and d[10] == sum(d[:10]) % 10


@pytest.mark.parametrize("name", ["luhn", "luhn-grouped", "tckn"])
def test_checksummed_numbers(name):
    rng, seen = random.Random(name), 0
    automaton = compile_policy(policy(patterns=[f"builtin:{name}"]))
    texts = [
        "".join(rng.choices("0123456789" + 40 * "7", k=2))
        + "".join(rng.choices("0123456789 - ", [10] * 10 + [4, 2, 1], k=30))
        for _ in range(60)
    ]
    texts += ["".join(rng.choices("0123456789", k=25)) for _ in range(200)]
    for _ in range(50):
        d = rng.choices(range(10), k=9)
        d.append((sum(d[0::2]) * 7 - sum(d[1::2])) % 10)
        texts.append("".join(map(str, [*d, sum(d) % 10])) + "9")
    texts += [
        "4111111111111111",
        "٤١١١١١١١١١١١١١١١",
        "４１１１ 1111–1111 1111",
        "10000000146",
        "0000000000000000",
        "a5500005555555559",
    ]
    for text in texts:
        hits = []
        for end in range(1, len(text) + 1):
            run = ""
            for i in range(end - 1, -1, -1):  # back to the first digit of the run
                c = fold(text[i])
                if c.isdigit():
                    run = c + run
                elif not (name == "luhn-grouped" and c in " -‐–" and i and fold(text[i - 1]).isdigit() and i < end - 1):
                    break
            valid = (
                is_tckn(run)
                if name == "tckn" and len(run) == 11
                else name != "tckn" and 13 <= len(run) <= 19 and luhn(run)
            )
            hits += [False] * (len(text[end - 1].encode()) - 1)
            hits.append(fold(text[end - 1]).isdigit() and not run.startswith("0") and valid)
        assert found(automaton, text.encode()) == hits, text
        seen += sum(hits)
    assert seen > 5


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1111", "5500-0055-5555-5559", "378282246310005", "me@example.org", "Ali.Veli+x@posta.com.tr",
        "+90 532 123 45 67", "+44 20 7946 0958", "(212) 555-0123", "212.555.0123", "0532 123 45 67", "(0532) 123 45 67",
        "05321234567", "078-05-1120", "10000000146", "TR33 0006 1005 1978 6457 8413 26", "GB82 WEST 1234 5698 7654 32",
        "DE89370400440532013000", "me@exam\u200bple.org", "ｍｅ＠ｅｘａｍｐｌｅ．ｏｒｇ", "𝟺𝟷𝟷𝟷 1111 1111 1111",
    ],
)  # fmt: skip
def test_the_default_policy_finds(text):
    assert any(found(compile_policy(load_policy()), f"it is {text} ".encode()))


@pytest.mark.parametrize(
    "text",
    [
        "In 1923, on 29 October 2023-10-29 at 10:30:15", "3.14159265358979", "pages 123-456", "ISBN 978-0-13-110362",
        "a @ b.c", "x@y", "f(1, 2) + 12", "10.000.000 TL", "4111 1111 1111 1112", "10000000147", "v1.2.3-4",
        "0x7ffd1234", "ab12 cd",
    ],
)  # fmt: skip
def test_the_default_policy_leaves(text):
    assert not any(found(compile_policy(load_policy()), f"it is {text} ".encode()))


def test_explanations_name_the_rule_and_its_state():
    chosen = policy(["kötü", "kötü söz", "xfi"], [r"z\d{3}"], bounded=False)
    automaton = compile_policy(chosen)

    def why(prompt: str | bytes, byte: int):
        prompt = prompt.encode() if isinstance(prompt, str) else prompt
        rule, state = automaton.explain(*automaton.read(prompt), byte)
        return rule.name, state

    assert why("köt", ord("u"))[0] == why("köt", ord("U"))[0] == "phrase:0"
    assert why("kötü sö", ord("z"))[0] == "phrase:1"
    assert why("z12", ord("9"))[0] == "pattern:0"
    assert why(b"x\xef\xac", 0x81)[0] == "phrase:2"  # ﬁ
    assert why("kot", ord("u")) == why("a KOT", ord("u")) and why("kot", ord("u"))[1] > 0
    assert automaton.explain(*automaton.read(b"ko"), ord("t")) is None
    first = compile_policy(policy(["ab", "b"], bounded=False))
    assert first.explain(*first.read(b"a"), ord("b"))[0].name == "phrase:0"  # both: the policy's first


def test_what_a_prompt_completed_is_not_held_against_what_follows():
    automaton = compile_policy(policy(["ass", "ass hat"]))
    assert automaton.explain(*automaton.read(b"an ass"), ord(" ")) is None
    assert automaton.explain(*automaton.read("an ass\u200b".encode()), ord(" ")) is None
    assert automaton.explain(*automaton.read(b"an ass ha"), ord("t")) is None  # "ass hats" is none
    node, registers = automaton.read(b"an ass hat")
    assert automaton.explain(node, registers, ord(".")) is None
    several = compile_policy(policy(patterns=[r"ab\b", "ab-"]))
    assert several.explain(*several.read(b"x ab"), ord(" ")) is None
    assert several.explain(*several.read(b"x ab"), ord("-"))[0].name == "pattern:1"
    without = compile_policy(policy(["ass", "ass hat"], bounded=False))
    assert without.explain(*without.read(b"an as"), ord("s"))[0].name == "phrase:0"
    assert without.explain(*without.read(b"an ass ha"), ord("t"))[0].name == "phrase:1"


def test_size_does_not_grow_with_look_alikes_or_with_texts_read():
    rng = random.Random(0)
    letters = "abcçdefgğhıijklmnoöprsştuüvyz"
    words = ["".join(rng.choices(letters, k=8)) for _ in range(3000)]
    automaton = compile_policy(policy(words, bounded=False))
    assert len(automaton.automata) == 1
    assert len(automaton) <= 8 * 3000 + 2  # a state a letter, whatever the ways to write it
    for word in rng.sample(words, 20):
        upper = "".join(rng.choice([c, c.upper(), unicodedata.normalize("NFD", c) + "\u200d"]) for c in word)
        assert any(found(automaton, f"-{upper}".encode())[-6:])


def test_equal_policies_are_compiled_once():
    assert compile_policy(policy(["a b"])) is compile_policy(policy(["a b"]))
    assert compile_policy(Policy()).read(b"anything") == (compile_policy(Policy()).read(b"anything")[0], [])


def test_tables_name_only_places_that_there_are():
    """Whatever a device reads, it stays inside."""
    automaton = compile_policy(policy(PHRASES, list(PATTERNS)))
    tables, masks = automaton.tables(), automaton.masks()
    starts = set()
    for base, width, each in zip(tables.start.tolist(), automaton._widths, automaton.automata):
        starts.update(range(base, base + width * len(each), width))
        rows = tables.table[base : base + width * len(each)].view(-1, width)
        assert rows[:, 0].min() >= 0 and rows[:, 0].max() < len(masks.blocked)
        places = torch.where(rows[:, 2:] < 0, ~rows[:, 2:], rows[:, 2:])
        assert set(places.unique().tolist()) <= starts
        assert places.min() >= base
    assert tables.outcome.max() < len(tables.lengths) and tables.next_node.max() < automaton.nodes
    assert masks.byte_sets.max() < len(masks.sets)
    assert np.array_equal(
        tables.columns.amax(1).numpy() < np.array(automaton._widths), [True] * len(automaton.automata)
    )


@pytest.mark.parametrize(
    "pattern",
    ["", "a*", r"\b", "a|", "(a", "a)", "[a", "[]", "*a", "a**", "a{2", "a{3,2}", "a{1001}", "^a", "a$", r"\q",
     r"(?=a)", r"\1", "[z-a]", "[ß]", "(a{1000}){1000}", "builtin:nothing", "a\\", r"(a|b)*a(a|b){16}", r"[\d-z]x"],
)  # fmt: skip
def test_bad_patterns_are_named_with_their_place(pattern):
    rule = Rule("c", "x", "pattern", pattern, origin="policy p.toml: [c] patterns 1")
    with pytest.raises(ValueError, match=r"^policy p\.toml: \[c\] patterns 1 .*accepted") as caught:
        ByteAutomaton(Policy((rule,)))
    assert "\n" not in str(caught.value) and repr(pattern) in str(caught.value)


def test_policies_that_are_too_large_are_refused(monkeypatch):
    monkeypatch.setattr("model.genesis.gate.automaton.LARGEST", 20)
    rules = policy(["a long phrase", "another long phrase"]).rules
    with pytest.raises(ValueError, match=r"^policy .*phrases: accepted are"):
        ByteAutomaton(Policy(rules))
    monkeypatch.setattr("model.genesis.gate.automaton.MOST_AUTOMATA", 1)
    rules = policy(patterns=["builtin:luhn", "builtin:luhn-grouped"]).rules
    with pytest.raises(ValueError, match=r"^policy .*patterns: .*accepted are"):
        ByteAutomaton(Policy(rules))


def test_parsing_composes_before_it_repeats():
    assert parse("e\u0301{3}") == parse("\u00e9{3}")
