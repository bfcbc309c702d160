"""What thinking is worth by byte, against two plain forwards; and bytes shown in their text, read back."""

import random
import re

import numpy as np
import pytest
import torch

from model.evaluation.bpc import cut_windows
from model.evaluation.gains import AFTER, BEFORE, KIND_OF, byte_gains, in_its_text
from model.evaluation.reasoning import measure_reasoning

TURKISH = "İstanbul’da ışıklı ağaçların arasından geçen yağmurlu bir gün; kuşçu öğle üzeri şöyle dedi: “Çok güzel!”"
EMOJI = "a🙂b👩‍👩‍👧c🇹🇷d e🎉🎉 ve ğ"


@torch.no_grad()
def bits(model, text, steps, context):
    """Bits of every byte by plain forward passes, window by window."""
    parts = []
    for start in range(0, len(text), context):
        x = torch.tensor([list(text[start : start + context])])
        p = model(x, thinking_steps=steps).double().softmax(-1).gather(-1, x.unsqueeze(-1))
        parts.append(-p.log2().flatten())
    return torch.cat(parts).numpy()


TEXT = (TURKISH + " 12, 34\n\tx = y + 5;\0\x7f").encode() + bytes([0xFF, 0x80])


def test_gains_equal_two_plain_forwards(random_model):
    context = 53
    gains = measure_reasoning(random_model, TEXT, context=context, batch_size=2, top=7).gains
    before, after = (bits(random_model, TEXT, k, context) for k in (0, 3))
    gain = before - after
    assert gains.steps == 3 and gains.groups[0].bytes == len(TEXT)
    order = sorted(range(len(TEXT)), key=lambda i: -gain[i])
    for listed, expected in ((gains.best, order[:7]), (gains.worst, order[::-1][:7])):
        assert [each.position for each in listed] == expected
        for each in listed:
            i = each.position
            assert each.byte == TEXT[i] and each.text == in_its_text(TEXT, i)
            assert (each.before, each.after) == pytest.approx((before[i], after[i]), rel=1e-4)
            assert each.gain == pytest.approx(gain[i], abs=1e-4)
    kinds = {
        "all": range(len(TEXT)),
        "letter": [i for i, b in enumerate(TEXT) if chr(b).isascii() and chr(b).isalpha()],
        "digit": [i for i, b in enumerate(TEXT) if chr(b).isascii() and chr(b).isdigit()],
        "space": [i for i, b in enumerate(TEXT) if b in b" \n\t"],
        "punctuation": [i for i, b in enumerate(TEXT) if b in b";,=+:!"],
        "non-ASCII": [i for i, b in enumerate(TEXT) if b > 127],
        "control": [i for i, b in enumerate(TEXT) if b in b"\0\x7f"],
        "first of its patch": [i for i in range(len(TEXT)) if i % context % 4 == 0],
        "later in its patch": [i for i in range(len(TEXT)) if i % context % 4],
    }
    assert [group.name for group in gains.groups] == list(kinds)
    for group, where in zip(gains.groups, kinds.values()):
        where = list(where)
        assert group.bytes == len(where)
        means = [float(values[where].mean()) for values in (before, after, gain)]
        assert (group.before, group.after, group.gain) == pytest.approx(means, abs=1e-4)
        assert group.gaining == pytest.approx(np.mean(gain[where] > 0), abs=1e-9)
        assert group.losing == pytest.approx(np.mean(gain[where] < 0), abs=1e-9)
    assert len(gains.table().splitlines()) == 1 + len(kinds)


def test_the_mean_gain_is_the_difference_of_the_steps(random_model, text):
    report = measure_reasoning(random_model, text, context=100)
    assert report.gains.groups[0].gain == pytest.approx(report.steps[0].bpc - report.steps[3].bpc, abs=1e-6)


def test_bytes_of_a_part_know_their_place_in_the_text():
    text = np.arange(100, dtype=np.uint8)
    windows = cut_windows(100, 10, 30)
    before = np.zeros(30)
    before[[0, 13, 29]] = 3.0, 2.0, 1.0
    gains = byte_gains(text, windows, before, np.zeros(30), steps=1, patch_size=4, top=10)
    assert [each.position for each in gains.best] == [windows[0][0], windows[1][0] + 3, windows[2][0] + 9]
    assert [each.byte for each in gains.best] == [each.position for each in gains.best] and not gains.worst
    assert gains.groups[0].gaining == 0.1 and gains.groups[0].losing == 0
    by_name = {group.name: group.bytes for group in gains.groups}
    assert by_name["first of its patch"] == 9 and by_name["later in its patch"] == 21


def test_equal_gains_are_listed_in_the_order_of_the_text():
    n = 5000
    before = np.tile([1.0, 2.0, 1.0, 1.0], n // 4)
    gains = byte_gains(np.zeros(n, np.uint8), [(0, n)], before, np.zeros(n), steps=1, patch_size=4, top=2000)
    twos = list(range(1, n, 4))
    ones = [i for i in range(n) if i % 4 != 1]
    assert [each.position for each in gains.best] == (twos + ones)[:2000]


def test_every_byte_value_has_the_kind_that_python_gives_it():
    names = ("letter", "digit", "space", "punctuation", "non-ASCII", "control")
    for value in range(256):
        character = chr(value)
        if value > 127:
            expected = "non-ASCII"
        elif character.isalpha():
            expected = "letter"
        elif character.isdigit():
            expected = "digit"
        elif character in " \t\n\r\v\f":
            expected = "space"
        else:
            expected = "punctuation" if character.isprintable() else "control"
        assert names[KIND_OF[value]] == expected, value


def test_the_table_aligns_what_it_marks(random_model):
    gains = measure_reasoning(random_model, TEXT, top=3).gains
    lines = gains.extremes_table().splitlines()
    assert lines[1] == "most gained:" and lines[5] == "most lost:" and len(lines) == 9
    marks = {line.index("⟦") for line in lines[2:5] + lines[6:]}
    assert len(marks) == 1
    assert all(line.split()[1] == f"{each.byte:02x}" for line, each in zip(lines[2:5], gains.best))


# ── shown in their text ──────────────────────────────────────────────────────────────────────────────────────────────

PIECES = re.compile(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})|\\U([0-9a-f]{8})|\\([ntr\\])|(.)", re.DOTALL)


def read_back(shown):
    """The bytes that a shown piece stands for."""
    data = b""
    for byte, four, eight, short, plain in PIECES.findall(shown):
        if byte:
            data += bytes([int(byte, 16)])
        elif four or eight:
            data += chr(int(four or eight, 16)).encode()
        else:
            data += ({"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}[short] if short else plain).encode()
    return data


def check(text, at):
    shown = in_its_text(text, at)
    assert shown.isprintable() and shown.count("⟦") == shown.count("⟧") == 1
    left, rest = shown.split("⟦")
    marked, right = rest.split("⟧")
    which = re.fullmatch(r"(.*) (\d)/(\d)", marked, re.DOTALL)
    character = read_back(which[1] if which else marked)
    before, offset = read_back(left), int(which[2]) - 1 if which else 0
    assert len(character) == (int(which[3]) if which else 1)
    data = before + character + read_back(right)
    begin = at - len(before) - offset
    assert text[begin : begin + len(data)] == data
    # What is asked for is there, and a character more at the most.
    assert max(0, at - BEFORE - 3) <= begin <= max(0, at - BEFORE)
    assert min(len(text), at + AFTER + 1) <= begin + len(data) <= min(len(text), at + AFTER + 4)
    return left, marked, right


@pytest.mark.parametrize("text", [TURKISH.encode(), EMOJI.encode(), TEXT, "中文字符" * 20, "\\⟦a⟧\\x41 \xa0\x9f"])
def test_every_byte_of_a_text_is_found_again(text):
    text = text.encode() if isinstance(text, str) else text
    for at in range(len(text)):
        check(text, at)


def test_texts_cut_at_any_byte():
    data = EMOJI.encode()
    for start in range(len(data)):
        for stop in range(start + 1, len(data) + 1):
            part = data[start:stop]
            check(part, len(part) - 1)
            check(part, 0)


def test_random_bytes_and_broken_characters():
    source = random.Random(0)
    pieces = [b"\xf0\x9f\x99\x82", "ğ".encode(), b"\xe4\xb8", b"\x80", b"\xff", b"\0", b"a", b"\\", b"\xed\xa0\x80"]
    for _ in range(100):
        text = b"".join(source.choice(pieces) for _ in range(40)) + source.randbytes(40)
        for at in source.sample(range(len(text)), 20):
            check(text, at)


@pytest.mark.parametrize(
    "text, at, expected",
    [
        ("doğar".encode(), 3, "do⟦ğ 2/2⟧ar"),
        ("doğar".encode(), 2, "do⟦ğ 1/2⟧ar"),
        ("a🙂b".encode(), 3, "a⟦🙂 3/4⟧b"),
        ("ı".encode(), 0, "⟦ı 1/2⟧"),
        (b"a\0b", 1, "a⟦\\x00⟧b"),
        (b"a\nb\t", 1, "a⟦\\n⟧b\\t"),
        (b"a\xffb", 1, "a⟦\\xff⟧b"),
        (b"a\xf0\x9f\x99", 2, "a\\xf0⟦\\x9f⟧\\x99"),
        ("\u200d\u0085".encode(), 4, "\\u200d⟦\\u0085 2/2⟧"),
        (b"\\n", 0, "⟦\\\\⟧n"),
        (b" ", 0, "⟦ ⟧"),
        ("a⟦b".encode(), 4, "a\\u27e6⟦b⟧"),
        ("\U000e0001".encode(), 0, "⟦\\U000e0001 1/4⟧"),
    ],
)
def test_what_is_shown(text, at, expected):
    assert in_its_text(text, at) == expected
    assert in_its_text(np.frombuffer(text, np.uint8), at) == expected


def test_a_large_text_is_not_read_whole():
    class Text(bytes):
        def __getitem__(self, where):
            assert isinstance(where, slice) and where.stop - where.start < 100
            return super().__getitem__(where)

    assert "⟦" in in_its_text(Text(b"x" * 10**7), 5 * 10**6)
