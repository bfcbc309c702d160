"""The prompts of the needle test: sentences, one needle ("The secret code of Anna is 4827."), and a question.

Languages take turns, and in each of them phrasings and kinds of key, on through all depths of a length, so that none
of them falls together with another or with a depth.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model.data.haystack import DIGIT_KEYS, KEY_BYTES, LANGUAGES, Language
from model.evaluation.report import check_count

LENGTHS = (1024, 4096, 16384, 65536, 262144)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 10


@dataclass(frozen=True)
class Needle:
    """One prompt and its answer.

    Attributes:
        prompt: sentences, needle, sentences, question; exactly the length that was asked for.
        answer: the key, KEY_BYTES bytes.
        depth: place of the needle in the sentences, 0 first, 1 last.
        start: byte of the prompt where the needle begins: round(depth · bytes of sentences).
        key: byte of the prompt where the key stands.
        question: byte of the prompt where the question begins.
        held_out: whether the phrasing is one that model.data.recall does not teach.
        chance: log₂ probability of the answer for one who knows the kind of key but has not read it.
    """

    prompt: bytes
    answer: bytes
    depth: float
    start: int
    key: int
    question: int
    language: str
    held_out: bool
    chance: float

    @property
    def distance(self) -> int:
        """Bytes from each byte of the key to where it has to be predicted."""
        return len(self.prompt) - self.key


def check_needles(lengths: Sequence[int], samples: int, depths: Sequence[float], languages: Sequence[str]) -> None:
    """Raise ValueError, naming the argument, its value and what is accepted, unless all prompts can be made."""
    check_count("samples", samples)
    if not lengths:
        raise ValueError(f"lengths={lengths!r}: accepted are one or more lengths in bytes")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths={depths!r}: accepted are one or more numbers from 0 to 1")
    if not languages or any(name not in LANGUAGES for name in languages):
        raise ValueError(f"languages={languages!r}: accepted are one or more of {', '.join(LANGUAGES)}")
    least = max(_shortest(LANGUAGES[name]) for name in languages)
    for length in lengths:
        check_count("length", length)
        if length < least:
            raise ValueError(f"length={length}: accepted is at least {least} bytes, for needle and question")


def make_needles(
    length: int,
    samples: int = SAMPLES,
    seed: int = 0,
    depths: Sequence[float] = DEPTHS,
    languages: Sequence[str] = tuple(LANGUAGES),
) -> Iterator[Needle]:
    """The prompts of one length, depth by depth, each made when it is asked for: the same for the same arguments.

    Args:
        length: bytes of a prompt.
        samples: prompts a depth.
        seed: of all random choices; a prompt depends on seed, length, depth and its number alone.
        depths: places of the needle in the sentences, from 0 to 1.
        languages: "en", "tr".

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    check_needles([length], samples, depths, languages)
    return (
        _make_needle(length, depth, languages[number % len(languages)], number // len(languages), rng)
        for number, depth in enumerate(depth for depth in depths for _ in range(samples))
        for rng in [random.Random(f"{seed}/{length}/{number}")]
    )


def _make_needle(length: int, depth: float, name: str, turn: int, rng: random.Random) -> Needle:
    language = LANGUAGES[name]
    phrasings = _phrasings(language)
    statement, question, held_out = phrasings[turn % len(phrasings)]
    who = rng.choice(language.who)
    if (turn + turn // len(phrasings)) % 2:
        key, chance = rng.choice(language.keys), -math.log2(len(language.keys))
    else:
        key, chance = f"{rng.randrange(DIGIT_KEYS):0{KEY_BYTES}}", -math.log2(DIGIT_KEYS)
    before, after = (part.format(who=who).encode() for part in statement.split("{key}"))
    needle, asked = before + key.encode() + after + b" ", question.format(who=who).encode()
    room = length - len(needle) - len(asked)
    start = round(depth * room)
    sentences = language.haystack.draw(rng)
    prompt = _fill(sentences, start) + needle + _fill(sentences, room - start) + asked
    at = start + len(before)
    return Needle(prompt, key.encode(), depth, start, at, length - len(asked), name, held_out, chance)


def _phrasings(language: Language) -> list[tuple[str, str, bool]]:
    """(needle, question, held out), the held-out ones spread evenly among the others, which begin."""
    learned, held_out = language.needles, language.held_out
    places = [((i + 0.5) / len(learned), (*texts, False)) for i, texts in enumerate(learned)]
    places += [((i + 1) / len(held_out), (*texts, True)) for i, texts in enumerate(held_out)]
    return [phrasing for _, phrasing in sorted(places)]


def _shortest(language: Language) -> int:
    """Bytes of the longest needle and question together: every longer prompt can be made."""
    texts = [
        statement.format(who=who, key="0" * KEY_BYTES) + " " + question.format(who=who)
        for statement, question, _ in _phrasings(language)
        for who in language.who
    ]
    return max(len(text.encode()) for text in texts)


def _fill(sentences: Iterator[str], size: int) -> bytes:
    """Exactly `size` bytes of whole characters: sentences, the last one cut and closed by a full stop and spaces."""
    if size < 4:
        return b" " * size
    parts, total = [], 0
    while total < size:
        parts.append(next(sentences).encode() + b" ")
        total += len(parts[-1])
    text = b"".join(parts)[: size - 2].decode(errors="ignore").rstrip(" .").encode()
    return (text + b".").ljust(size)
