"""UTF-8: whole characters out of any cuts of a byte stream, and sampling that can only write valid text."""

import contextlib
import itertools
import random

import pytest
import torch

from model.inference.text import NEXT, START, Utf8Constraint, Utf8Emitter, unfinished

ALPHABET = "aZ\n\0ğüşİıçö€漢\ud7ff\ue000\uffff😀\U0010ffff\u0301"
LIMITS = (0x41, 0x80, 0xBF, 0xC0, 0xC4, 0xE0, 0xA0, 0x9F, 0xED, 0xF0, 0x90, 0xF4, 0x8F, 0xF5, 0xFF)
PIECES = [bytes([byte]) for byte in LIMITS]


@pytest.mark.parametrize("seed", range(5))
def test_emitter_gives_whole_characters_as_soon_as_they_end(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices(ALPHABET, k=200))
    emitter, out = Utf8Emitter(), ""
    for i, byte in enumerate(text.encode()):
        out += emitter.feed(bytes([byte]))
        assert out == text.encode()[: i + 1].decode("utf-8", "ignore")
    assert out == text and emitter.close() == ""


@pytest.mark.parametrize("seed", range(20))
def test_emitter_replaces_as_python_does_for_any_cuts(seed):
    rng = random.Random(seed)
    data = b"".join(rng.choices(PIECES, k=400))
    emitter, out, start = Utf8Emitter(), "", 0
    while start < len(data):
        n = rng.randint(0, 5)
        out += emitter.feed(data[start : start + n])
        start += n
    assert out + emitter.close() == data.decode("utf-8", "replace")


def test_emitter_withholds_an_unfinished_end_and_completes_a_prompt():
    emitter = Utf8Emitter("dağ".encode()[:-1])
    assert emitter.feed(b"\x9f!") == "ğ!"
    assert emitter.feed("😀".encode()[:3]) == ""
    assert emitter.close() == "\ufffd"
    assert Utf8Emitter(b"\xff\xff").feed(b"a") == "a"


def test_unfinished_is_the_longest_real_beginning():
    rng = random.Random(1)
    # One character of every length and every special lead byte, so that each valid beginning is a prefix of one.
    samples = [chr(code).encode() for code in (0x80, 0x800, 0xD000, 0x2000, 0x10000, 0x40000, 0x100000)]
    beginnings = sorted({sample[:n] for sample in samples for n in range(1, len(sample))})
    for _ in range(3000):
        data = b"".join(rng.choices([*PIECES, *samples, *beginnings], k=rng.randint(0, 5)))
        expected = next((data[-n:] for n in (3, 2, 1) if len(data) >= n and begins_a_character(data[-n:])), b"")
        assert unfinished(data)[0] == expected
        assert (unfinished(data)[1] == START) == (not expected)


def begins_a_character(data: bytes) -> bool:
    """By trial: some continuation makes one whole character of it."""
    ends = [bytes(end) for n in (1, 2, 3) for end in itertools.product((0x80, 0xBF), repeat=n)]
    ends += [bytes([second]) + end for second in (0x90, 0x9F, 0xA0, 0x8F) for end in ends[:6]]
    ends += [bytes([second]) for second in (0x90, 0x9F, 0xA0, 0x8F)]
    for end in ends:
        with contextlib.suppress(UnicodeDecodeError):
            if len((data + end).decode("utf-8")) == 1:
                return True
    return False


def test_the_automaton_accepts_every_character_and_nothing_else():
    """It accepts as many strings of each length as there are characters, and all that it accepts in steps decode."""
    table = torch.tensor(NEXT)
    edges = torch.zeros(8, 8, dtype=torch.long)
    for state in range(8):
        for after in table[state][table[state] >= 0].tolist():
            edges[state, after] += 1
    path = edges[START].clone()
    counts = []
    for _ in range(4):
        counts.append(path[START].item())
        path[START] = 0
        path = path @ edges
    assert counts == [0x80, 0x800 - 0x80, 0x10000 - 0x800 - 0x800, 0x110000 - 0x10000] and not path.any()

    def accepts(data: bytes) -> bool:
        state = START
        for byte in data:
            state = table[state, byte].item()
            if state < 0:
                return False
        return state == START

    for code in [*range(0x900), *range(0x900, 0x110000, 997), 0xFFFF, 0x10FFFF]:
        if not 0xD800 <= code < 0xE000:
            assert accepts(chr(code).encode())


def sampled(prompts: list[bytes], length: int, seed: int = 0) -> list[bytes]:
    """Bytes drawn from random logits under the constraint, uncut."""
    generator = torch.Generator().manual_seed(seed)
    constraint = Utf8Constraint(prompts)
    rows = []
    for _ in range(length):
        # Lead and continuation bytes are favoured, so that every state is visited.
        logits = torch.randn(len(prompts), 256, generator=generator) + (torch.arange(256) > 0xBF) * 2.0
        chosen = constraint.mask(logits).softmax(-1).multinomial(1, generator=generator)[:, 0]
        constraint.advance(chosen)
        rows.append(chosen)
    return [bytes(row) for row in torch.stack(rows, 1).tolist()]


def test_six_thousand_constrained_bytes_decode_strictly():
    for row in sampled([b""] * 6, 1000):
        text = row[: len(row) - len(unfinished(row)[0])].decode("utf-8")
        assert {len(c.encode()) for c in text} == {1, 2, 3, 4}


@pytest.mark.parametrize("prompt", ["ğ".encode()[:1], "漢".encode()[:2], "😀".encode()[:1], "😀".encode()[:3], b"\xe0",
                                    b"\xed", b"\xf0", b"\xf4"])  # fmt: skip
def test_a_prompt_that_ends_inside_a_character_is_completed(prompt):
    for row in sampled([b"before " + prompt] * 20, 30, seed=3):
        data = prompt + row
        data[: len(data) - len(unfinished(data)[0])].decode("utf-8")


@pytest.mark.parametrize("prompt", [b"\xff", b"\x80", b"\xc3\xff", b"\xe0\x80", b"\xed\xa0", b"\xf5", b"\xc0"])
def test_a_prompt_with_an_invalid_tail_resets(prompt):
    for row in sampled([prompt] * 10, 20, seed=4):
        row[: len(row) - len(unfinished(row)[0])].decode("utf-8")


def test_rows_have_their_own_states():
    mask = Utf8Constraint([b"", b"\xc4", b"\xed"]).mask(torch.zeros(3, 256)).isfinite()
    assert mask[0].nonzero()[:, 0].tolist() == [*range(0x80), *range(0xC2, 0xF5)]
    assert mask[1].nonzero()[:, 0].tolist() == [*range(0x80, 0xC0)]
    assert mask[2].nonzero()[:, 0].tolist() == [*range(0x80, 0xA0)]
