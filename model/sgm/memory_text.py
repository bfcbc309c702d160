"""The texts of a memory: the words they are found by, when two are the same, and how they are shown.

Notable: what is searched is folded text (`model.genesis.gate.folding`: case, accents, ı and i are one), so that Turkish
typed without its letters finds what was typed with them. What is the same is told apart more finely: Sıla and Sila are
two names.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

from model.genesis.gate.folding import fold

STEM = 4  # characters; chosen by hit rates, docs/memory.md
# An ending makes no other word of a word of so many characters, if it is none longer.
INFLECTED, ENDING = 5, 4

# Characters that are words by themselves: pictographs, and scripts that write no spaces.
_TOKEN = re.compile(r"[\u2600-\u27bf\u2e80-\u9fff\U0001f000-\U0003ffff]|[^\W\u2e80-\u9fff\U0001f000-\U0003ffff]+")
_APOSTROPHE = re.compile(r"(?<=\w\w)['’ʼ]\w+")
# Folded. Turkish: plural, possessive or person, case; English: plural.
_ENDING = re.compile(r"(?:l[ae]r)?(?:[iu]?[mn](?:[iu]z)?|s?[iu])?(?:[yn]?[aeiu]|n?[iu]n|n?[dt][ae]n?|y?l[ae])?|e?s")
_TURKISH = re.compile("[ğışĞİŞ]")  # letters that hardly another language has
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def search_words(text: str) -> list[str]:
    """The folded words of a text, in order: "Ayşe'nin arabası" → ["ayse", "arabasi"].

    What follows an apostrophe is an ending, in Turkish names as in English, and is left out.
    """
    return _TOKEN.findall(_APOSTROPHE.sub("", fold(text)))


def stem(word: str) -> str:
    """What a word is found by besides itself: its first STEM characters."""
    return word[:STEM]


def same_word(a: str, b: str) -> bool:
    """Whether two folded words are one, but for a grammatical ending: "arabam" and "arabami", not "car" and "career".

    Only a word of at least INFLECTED characters may have one, of at most ENDING characters.
    """
    short, long = sorted((a, b), key=len)
    if a == b:
        return True
    ending = len(short) >= INFLECTED and len(long) <= len(short) + ENDING and long.startswith(short)
    return ending and _ENDING.fullmatch(long, len(short)) is not None


def contains_all(words: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether each of the wanted words is among the words."""
    there = set(words)
    return all(word in there or any(same_word(word, other) for other in there) for word in wanted)


def identity(text: str) -> bytes:
    """The same for texts that differ in case, spaces, normalisation and a full stop only: a SHA-256.

    Case is that of Turkish (İ is i, I is ı) where a letter says that the text is, so that no two letters become one.
    """
    text = unicodedata.normalize("NFC", text)
    if _TURKISH.search(text):
        text = text.replace("İ", "i").replace("I", "ı")
    same = " ".join(text.lower().split())
    return hashlib.sha256((same.rstrip(".!… ") or same).encode()).digest()


def printable(text: str) -> str:
    """Surrogates, as which a line holds bytes that are not UTF-8, become U+FFFD."""
    return _SURROGATES.sub("\ufffd", text)


def one_line(text: str) -> str:
    """Without surrogates, white space and line ends as single spaces."""
    return " ".join(printable(text).split())


def shown(line: str) -> str:
    """What a terminal may be given of a line: control characters, which it would obey, are written out (\\x1b)."""
    return _CONTROLS.sub(lambda control: f"\\x{ord(control[0]):02x}", printable(line))
