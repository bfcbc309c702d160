"""Folding against Unicode's own operations on whole texts, and what makes it fit for a stream."""

import random
import unicodedata

import pytest

from model.genesis.gate.folding import CODE_POINTS, NOTHING, SEVERAL, fold, fold_table, space_symbols, word_symbols

EVERY = [code for code in range(CODE_POINTS) if not 0xD800 <= code < 0xE000]


def whole_text_fold(text: str) -> str:
    """By normalising the whole text: marks and format characters out, case folded, until nothing changes."""
    before = None
    while text != before:
        before = text
        text = unicodedata.normalize("NFKD", text)
        text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf") and not ignorable(c))
        text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold()).replace("ı", "i")
        text = "".join(str(unicodedata.decimal(c, c)) for c in text)
    return text


def ignorable(c: str) -> bool:
    """Combining characters that are not Mn, and Default_Ignorable_Code_Point that is neither Mn nor Cf."""
    return unicodedata.combining(c) > 0 or c in "\u115f\u1160\u3164\uffa0\u2065" or (
        "\ufff0" <= c <= "\ufff8" or "\U000e0000" <= c <= "\U000e0fff"
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_folds_as_the_whole_text_does(seed):
    rng = random.Random(seed)
    marks = [code for code in EVERY[:0x20000] if unicodedata.combining(chr(code))]
    pools = [EVERY[:0x250], marks, EVERY[0x1D400:0x1D800], EVERY[0xFB00:0xFF00], EVERY[:0x32000], EVERY]
    text = "".join(chr(rng.choice(rng.choice(pools))) for _ in range(2000))
    expected = whole_text_fold(text)
    assert fold(text) == expected
    assert "".join(map(fold, text)) == expected
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert fold(unicodedata.normalize(form, text)) == expected
    cut = rng.randrange(len(text))
    assert fold(text[:cut]) + fold(text[cut:]) == expected


def test_every_character_that_folding_could_change():
    """One at a time, and the table says what `fold` does."""
    codes = [*range(0xAC00), *range(0xD7A4, 0xD800), *range(0xE000, 0x20000), *range(0x2F800, 0x2FA20),
             *range(0xE0000, 0xE0200), *EVERY[::97]]  # fmt: skip
    text = "".join(map(chr, codes))
    alone = [fold(c) for c in text]
    separator = "\U0010ffff"
    assert separator.join(alone) == whole_text_fold(separator.join(text))
    table = fold_table()
    several = dict(zip(table.several.tolist(), table.lengths.tolist()))
    symbols = iter(table.symbols.tolist())
    expected = {code: "".join(chr(next(symbols)) for _ in range(length)) for code, length in several.items()}
    singles = table.single.tolist()
    for code, folded in zip(codes, alone):
        single = singles[code]
        assert folded == ("" if single == NOTHING else expected[code] if single == SEVERAL else chr(single))
    assert next(symbols, None) is None


def test_folding_twice_is_folding_once():
    everything = "".join(map(chr, EVERY))
    assert fold(fold(everything)) == fold(everything)


@pytest.mark.parametrize(
    ("variants", "folded"),
    [
        (["ı", "i", "I", "İ", "i̇", "𝚤", "ｉ", "ⅰ", "Ｉ"], "i"),
        (["Iğdır", "IĞDIR", "ığdır", "iğdir", "IGDIR", "I\u0307g\u0306dır"], "igdir"),
        (["ſtraße", "STRASSE", "STRAẞE", "straſse", "ＳＴＲＡẞＥ"], "strasse"),
        (["ﬁ", "FI", "ﬀ"[:0] + "fı"], "fi"),
        (["⑩", "１０", "10", "١٠", "१०", "𝟙𝟘"], "10"),
        (["a\u200bb\u200dc", "a\u0336b\u20ddc", "\ufeffabc\u00ad", "a\U000e0041bc\ufe0f", "ⓐⓑⓒ", "𝖆𝖇𝖈"], "abc"),
        (["각", "\u1100\u1161\u11a8"], "\u1100\u1161\u11a8"),
        (["👍🏽\ufe0f"], "👍🏽"),
        (["", "\u0301", "\u200b\u200d"], ""),
    ],
)
def test_variants_of_one_text(variants, folded):
    assert [fold(variant) for variant in variants] == [folded] * len(variants)


def test_word_and_space_symbols_are_those_of_re():
    everything = list(map(chr, range(CODE_POINTS)))
    assert word_symbols().tolist() == [c.isalnum() or c == "_" for c in everything]
    assert space_symbols().tolist() == [c.isspace() for c in everything]
