"""Folding: what counts as the same character for a policy, whatever its case, width, font or marks.

    fold(c) = digits(casefold(strip(NFKD(c))))    repeated until nothing changes

`strip` removes combining marks (categories Mn and Me, and every character with a combining class), format characters
(Cf: zero-width space and joiners, soft hyphen, directions, tags) and all that Unicode calls default ignorable
(variation selectors, fillers). `digits` turns the decimal digits of every script into 0-9, and ı into i: so I, İ, ı and
i are one letter, whatever the language.

Notable: folding is a homomorphism, fold(a + b) = fold(a) + fold(b), so folding a stream character by character is
folding the whole text. Of NFKC, casefold and strip only normalisation looks at neighbours: it reorders characters
that have a combining class, and composes. All characters with a combining class are removed, so their order is
nothing; and composition is undone by NFKD. So texts that NFKC, casefold and strip make equal have one folding, but for
the iota subscript U+0345: it is a mark here, removed before casefold would make it a letter.
"""

import unicodedata
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

CODE_POINTS = 0x110000
REPLACEMENT = 0xFFFD  # what bytes that are not UTF-8 read as
NOTHING, SEVERAL = -1, -2
# Planes 4 to 13 are empty, 15 and 16 private: neither has letters, cases or decompositions. Plane 14 is ignorable.
_ASSIGNED = range(0x40000)
# Default_Ignorable_Code_Point of Unicode 15 (DerivedCoreProperties.txt).
_DEFAULT_IGNORABLE = (
    (0x00AD, 0x00AD), (0x034F, 0x034F), (0x061C, 0x061C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F),
    (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip


@dataclass(frozen=True)
class FoldTable:
    """What every code point folds to.

    single [0x110000] int32: the one symbol; NOTHING where it is removed, SEVERAL where it is in `several`.
    several: code points that fold to more than one symbol; symbols: theirs, in a row; lengths: how many each.
    changed: for str.translate, every code point that is not its own folding.
    """

    single: np.ndarray
    several: np.ndarray
    symbols: np.ndarray
    lengths: np.ndarray
    changed: dict[int, str]


@cache
def fold_table() -> FoldTable:
    """The table of this Python's Unicode version; made once."""
    characters = list(map(chr, _ASSIGNED))
    categories = map(unicodedata.category, characters)
    marked = map(unicodedata.combining, characters)
    removed = {c for c, category, mark in zip(characters, categories, marked) if mark or category in ("Mn", "Me", "Cf")}
    removed.update(chr(code) for first, last in _DEFAULT_IGNORABLE for code in range(first, last + 1))
    digits = {ord(c): str(unicodedata.decimal(c)) for c in characters if c.isdecimal()} | {ord("ı"): "i"}

    plain = map(str.casefold, map(partial(unicodedata.normalize, "NFKD"), characters))
    moved = [c for c, other in zip(characters, plain) if c != other or c in removed or ord(c) in digits]
    # All at once but apart from each other: a loop over them takes many times longer.
    separator = chr(CODE_POINTS - 1)
    drop = dict.fromkeys(map(ord, removed))
    folded, before = separator.join(moved), None
    while folded != before:
        before = folded
        folded = unicodedata.normalize("NFKD", folded).translate(drop).casefold().translate(digits)
    changed = {ord(c): other for c, other in zip(moved, folded.split(separator)) if c != other}
    changed.update((ord(c), "") for c in removed)

    single = np.arange(CODE_POINTS, dtype=np.int32)
    codes = np.fromiter(changed, np.int64, len(changed))
    lengths = np.fromiter(map(len, changed.values()), np.int64, len(changed))
    symbols = np.frombuffer("".join(changed.values()).encode("utf-32-le"), np.uint32).astype(np.int32)
    starts = np.cumsum(lengths) - lengths
    single[codes[lengths == 0]] = NOTHING
    single[codes[lengths == 1]] = symbols[starts[lengths == 1]]
    single[codes[lengths > 1]] = SEVERAL
    return FoldTable(
        single, codes[lengths > 1], symbols[np.repeat(lengths > 1, lengths)], lengths[lengths > 1], changed
    )


def fold(text: str) -> str:
    """The folding of a text: fold(a + b) = fold(a) + fold(b), and fold(fold(a)) = fold(a)."""
    return text.translate(fold_table().changed)


@cache
def word_symbols() -> np.ndarray:
    """[0x110000] bool: letters, digits and the underscore, as `\\w` of Python's re."""
    word = np.zeros(CODE_POINTS, dtype=bool)
    word[: _ASSIGNED.stop] = list(map(str.isalnum, map(chr, _ASSIGNED)))
    word[ord("_")] = True
    return word


@cache
def space_symbols() -> np.ndarray:
    """[0x110000] bool: white space, as `\\s` of Python's re."""
    space = np.zeros(CODE_POINTS, dtype=bool)
    space[: _ASSIGNED.stop] = list(map(str.isspace, map(chr, _ASSIGNED)))
    return space
