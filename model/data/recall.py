"""Tasks that need memory, written into a batch's own text: what a model has to have read long ago to write it now.

    needle    a fact in the text, and a question about it later: "The secret code of Anna is 4827. … "
    update    the same, told again with another value: the last one counts
    pairs     a list of keys and values in random order, and queries: "qf=731;ab=20;…?ab=20;" (Zoology's MQAR as bytes)
    lines     assignments among the text, some of them made again: "kod = 51" … "kod? 77"
    copy      a passage of the text, and the same passage again

Needles and lines stand in the row's own text, so the haystack is whatever the stage reads, with asides: passages of
made-up sentences, in all languages of the needles, that are not worth remembering. A corpus of one language would teach
that everything in another one is. Pure function of seed, step, rank and row, like `CropSampler`.

Every byte has a weight in the loss: 1 for text, `answer_weight` for the bytes of an answer, which what stands before
them decides, and 0 for the rest of a task, which nothing could predict. A row's answers together weigh at most
`answer_limit` of what a row of text weighs: many answers, most of them hard ones (256 pairs), would drown the text.
What a task tells and asks weighs `TOLD`, a zero that can be told from an aside's: writing it into memory has no price.

Notable: difficulty d in [0, 1] sets the longest distance between a fact and its question, SHORTEST · (L / SHORTEST)^d
bytes, and in the same way the number of pairs and the length of a copy. Distances are drawn evenly in the logarithm, so
near ones never go away.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import DataError
from .haystack import LANGUAGES

TASKS = ("needle", "update", "pairs", "lines", "copy")
SHORTEST = 96  # bytes: the longest distance at difficulty 0
MOST_ASIDES = 2  # passages in a row; the longest takes a third of it
TOLD = -0.0  # weight of statements and questions: 0 in every sum, product and comparison, and only the sign says so
SPACING = 192  # bytes of a row that a needle or an assignment has to itself, with its question
MAX_PAIRS = 256
ASKED = 8  # pairs are asked for in 1/8 of a row at most, or once
ROUNDS = 8  # how often a list's pairs are asked for at most
MIN_LENGTH = 128  # bytes of a row that a task needs
WORDS_FROM = 2048  # bytes of a row whose words may be keys
_WORD = re.compile(r"\b[^\W\d_]{3,8}\b")
_CONSONANTS, _VOWELS = "bcdfghjklmnprstvyz", "aeiou"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class RecallOptions:
    """What is mixed in.

    Args:
        share: of a batch's rows that get tasks, from 0 to 1.
        tasks: kinds that are drawn, evenly.
        languages: of needles, "en", "tr".
        answer_weight: of an answer's bytes in the loss, > 1: an answer is no text.
        answer_limit: what the answers of a row weigh together at most, in rows of text, > 0.
    """

    share: float
    tasks: tuple[str, ...] = TASKS
    languages: tuple[str, ...] = tuple(LANGUAGES)
    answer_weight: float = 8.0
    answer_limit: float = 0.125

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "languages", tuple(self.languages))
        if not (_is_number(self.share) and 0 <= self.share <= 1):
            raise DataError(f"recall share={self.share!r}: accepted is a number from 0 to 1")
        if not (_is_number(self.answer_weight) and 1 < self.answer_weight < math.inf):
            raise DataError(f"recall answer_weight={self.answer_weight!r}: accepted is a number above 1")
        if not (_is_number(self.answer_limit) and 0 < self.answer_limit < math.inf):
            raise DataError(f"recall answer_limit={self.answer_limit!r}: accepted is a number above 0")
        for name, values, known in (("tasks", self.tasks, TASKS), ("languages", self.languages, tuple(LANGUAGES))):
            if not values or any(value not in known for value in values):
                raise DataError(f"recall {name}={list(values)!r}: accepted are one or more of {', '.join(known)}")

    def to_dict(self) -> dict[str, object]:
        """Plain values, as JSON gives them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def mix(
    batch: Tensor, options: RecallOptions, *, difficulty: float, seed: int, index: int, rank: int = 0
) -> tuple[Tensor, Tensor]:
    """Write tasks into a share of a batch's rows.

    Args:
        batch: uint8 [B, L] on the CPU; it is not changed. Below L = 128 no row gets a task.
        difficulty: from 0 to 1.
        seed, index, rank: of the run, the step and the worker; with the row's number they decide everything.

    Returns:
        (batch uint8 [B, L], weights float32 [B, L] in the loss).
    """
    if not 0 <= difficulty <= 1:
        raise DataError(f"recall difficulty={difficulty!r}: accepted is a number from 0 to 1")
    B, L = batch.shape
    weights = torch.ones(B, L)
    wanted = options.share * B
    rng = random.Random(f"recall/{seed}/{index}/{rank}")
    rows = int(wanted) + (rng.random() < wanted % 1)
    if L < MIN_LENGTH or not rows:
        return batch, weights
    batch = batch.clone()
    for row in range(B - rows, B):
        rng = random.Random(f"recall/{seed}/{index}/{rank}/{row}")
        made = make_row(bytes(batch[row].numpy()), rng.choice(options.tasks), options, difficulty, rng)
        batch[row] = torch.from_numpy(np.frombuffer(made.data, np.uint8).copy())
        weights[row] = torch.from_numpy(made.weights(options.answer_weight, options.answer_limit))
    return batch, weights


def is_text(weights: Tensor) -> Tensor:
    """Which bytes of weights [B, L] belong to text, as 1 and 0 of the weights' type."""
    return (weights == 1).to(weights.dtype)


def is_told(weights: Tensor) -> Tensor:
    """Which bytes of weights [B, L] tasks have put there, as 1 and 0: statements, questions, answers; no asides."""
    answers = (weights != 0) & (weights != 1)
    return (answers | weights.signbit()).to(weights.dtype)


def has_tasks(weights: Tensor) -> Tensor:
    """Which rows of weights [B, L] are not text alone: [B] bool."""
    return (weights != 1).any(1)


@dataclass
class Row:
    """A row with tasks: its bytes, and where they are not text.

    Attributes:
        task: the kind.
        inserted: (start, stop) of what a task tells and asks.
        answers: (start, stop, distance) of answers; distance in bytes from the end of what it repeats.
        asides: (start, stop) of made-up sentences in the place of text.
    """

    task: str
    data: bytes
    inserted: list[tuple[int, int]]
    answers: list[tuple[int, int, int]]
    asides: list[tuple[int, int]]

    def weights(self, answer_weight: float, answer_limit: float) -> np.ndarray:
        """float32 [L]."""
        weights = np.ones(len(self.data), np.float32)
        for start, stop in self.asides:
            weights[start:stop] = 0
        for start, stop in self.inserted:
            weights[start:stop] = TOLD
        answers = sum(stop - start for start, stop, _ in self.answers)
        weight = np.float32(min(answer_weight, answer_limit * len(weights) / max(1, answers)))
        # Exactly 1 is what text weighs.
        weight = np.nextafter(weight, np.float32(0)) if weight == 1 else weight
        for start, stop, _ in self.answers:
            weights[start:stop] = weight
        return weights


def make_row(text: bytes, task: str, options: RecallOptions, difficulty: float, rng: random.Random) -> Row:
    """One row of `task` in `text`, of the same number of bytes."""
    L = len(text)
    if task == "pairs":
        return _pairs(text, difficulty, rng)
    if task == "copy":
        return _copy(text, difficulty, rng)
    if task == "lines":
        events = _lines(L, difficulty, rng)
    else:
        events = _needles(L, task, _words(text), options.languages, difficulty, rng)
    text, asides = _with_asides(text, options.languages, rng)
    return _Writer(task, L).among(text, events, asides).row()


# ── what is told and asked ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Piece:
    """What a task inserts: a statement that tells `fact`, or a question and its answer to it; `after` closes it."""

    before: bytes
    answer: bytes = b""
    after: bytes = b""
    fact: object = None


def _longest(L: int, difficulty: float) -> float:
    return SHORTEST * max(1.0, L / SHORTEST) ** difficulty


def _placed(L: int, difficulty: float, rng: random.Random, tell, ask, count: int) -> list[tuple[float, _Piece]]:
    """`count` facts at random places, each with a question at a random distance: (byte of the row, what)."""
    events = []
    longest = _longest(L, difficulty)
    for i in range(count):
        distance = math.exp(rng.uniform(math.log(SHORTEST / 4), math.log(longest)))
        at = rng.uniform(0, max(1.0, L - distance))
        events += [(at, tell(i)), (at + distance, ask(i))]
    return events


def _needles(
    L: int, task: str, own: tuple[str, ...], languages, difficulty: float, rng: random.Random
) -> list[tuple[float, _Piece]]:
    """`own` words of the text may be keys: what is to be remembered need not look like it."""
    count = rng.randint(1, max(1, L // SPACING))
    known, facts = set(), []  # what has been said of whom; (phrasing, who, value)
    for _ in range(count):
        language = LANGUAGES[rng.choice(languages)]
        phrasing = about = rng.choice(language.needles)
        if rng.random() < 0.5:
            about = rng.choice(language.things)
            phrasing = tuple(text.replace("{thing}", about) for text in rng.choice(language.taught))
        who = rng.choice(language.who) if rng.random() < 0.3 else name(rng)
        if (about, who) not in known:  # one value of one thing, in whatever words
            known.add((about, who))
            facts.append((phrasing, who, key(rng.choice((language.keys, own or language.keys)), rng)))

    def tell(i: int, told: str | None = None) -> _Piece:
        (statement, _), who, value = facts[i]
        return _Piece((" " + statement.format(who=who, key=told or value) + " ").encode(), fact=None if told else i)

    def ask(i: int) -> _Piece:
        (statement, question), who, value = facts[i]
        end = statement.split("{key}")[1].format(who=who)
        return _Piece((" " + question.format(who=who)).encode(), value.encode(), (end + " ").encode(), fact=i)

    events = _placed(L, difficulty, rng, tell, ask, len(facts))
    if task == "update":
        for i in range(len(facts)):
            told = events[2 * i][0]
            for _ in range(rng.randint(1, 2)):
                earlier = told - math.exp(rng.uniform(math.log(SHORTEST / 4), math.log(_longest(L, difficulty))))
                if earlier > 0:
                    events.append((earlier, tell(i, key(LANGUAGES["en"].keys, rng))))
    return events


def _with_asides(text: bytes, languages, rng: random.Random) -> tuple[bytes, list[tuple[int, int]]]:
    """Text with asides in the place of some of it, and where they are. Lengths are drawn evenly in the logarithm.

    An aside is whole sentences, and stands where words end if some do nearby, between characters in any case.
    """
    L, spans = len(text), []
    for _ in range(rng.randint(0, MOST_ASIDES) if L // 3 >= SHORTEST else 0):
        size = math.exp(rng.uniform(math.log(SHORTEST), math.log(L / 3)))
        sentences, passage = LANGUAGES[rng.choice(languages)].asides.draw(rng), b""
        while len(passage) + len(sentence := b" " + next(sentences).encode()) <= size:
            passage += sentence
        start = _word_end(text, rng.randrange(L))
        stop = _word_end(text, start + len(passage))
        # What gives way may be a little longer: spaces fill up the rest.
        passage = passage.ljust(stop - start)
        if passage.strip() and stop <= L and all(stop <= a or b <= start for a, b in spans):
            text = text[:start] + passage + text[stop:]
            spans.append((start, stop))
    return text, spans


def _word_end(text: bytes, at: int) -> int:
    """The first space from `at` on if there is one nearby, else the first byte that begins a character."""
    space = text.find(b" ", at, at + 24)
    if space >= 0:
        return space
    while at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1
    return at


def _lines(L: int, difficulty: float, rng: random.Random) -> list[tuple[float, _Piece]]:
    count = rng.randint(1, max(1, L // (SPACING // 2)))
    equals, asks = rng.choice(((" = ", "? "), (": ", ": "), (" -> ", " -> "), ("=", "=")))
    names = list(dict.fromkeys(word(rng, 1 + rng.randrange(3)) for _ in range(count)))
    values = [key((), rng) for _ in names]

    def tell(i: int) -> _Piece:
        return _Piece(f"\n{names[i]}{equals}{values[i]}\n".encode(), fact=i)

    def ask(i: int) -> _Piece:
        return _Piece(f"\n{names[i]}{asks}".encode(), values[i].encode(), b"\n", fact=i)

    events = _placed(L, difficulty, rng, tell, ask, len(names))
    for i in range(len(names)):
        told = events[2 * i][0]
        if rng.random() < 0.5 and told > 16:
            earlier = rng.uniform(0, told)
            events.append((earlier, _Piece(f"\n{names[i]}{equals}{key((), rng)}\n".encode())))
    return events


def _pairs(text: bytes, difficulty: float, rng: random.Random) -> Row:
    """Text, a list of pairs, text, and queries for all of them in random order, a few times if they are few; text."""
    L = len(text)
    key_bytes, value_bytes = rng.randint(2, 4), rng.randint(1, 4)
    letters = rng.choice((_LETTERS, "0123456789", _LETTERS.upper()))
    size = key_bytes + value_bytes + 2
    most = min(MAX_PAIRS, (L // size) // 3, 26**key_bytes // 2 if letters != "0123456789" else 10**key_bytes // 2)
    count = max(1, round(2 * max(1.0, most / 2) ** (difficulty * rng.random())))
    known: dict[str, str] = {}
    while len(known) < count:
        known["".join(rng.choices(_LETTERS, k=key_bytes))] = "".join(rng.choices(letters, k=value_bytes))
    told = [_Piece(f"{a}={b};".encode(), fact=a) for a, b in known.items()]
    asked = [
        _Piece(f"?{a}=".encode(), known[a].encode(), b";", fact=a)
        for _ in range(max(1, min(ROUNDS, L // ASKED // (count * size))))
        for a in rng.sample(list(known), count)
    ]
    inserted = len(told) * size + len(asked) * (size + 1) + 2
    distance = round(math.exp(rng.uniform(0, math.log(max(1.0, min(_longest(L, difficulty), L - inserted))))))
    start = _word_end(text, rng.randrange(max(1, L - inserted - distance)))
    again = _word_end(text, start + distance)
    writer = _Writer("pairs", L).text(text[:start]).insert(b"\n").write(told).text(text[start:again])
    return writer.insert(b"\n").write(asked).text(text[again:]).row()


def _copy(text: bytes, difficulty: float, rng: random.Random) -> Row:
    """Text, a passage of it, more text, and the passage again behind a mark that quotes its first bytes."""
    L, cue, mark = len(text), 12, b"\n>> "
    most = max(cue + 8, min((L - len(mark)) // 3, round(_longest(L, difficulty) / 2)))
    length = rng.randint(cue + 8, most)
    distance = round(math.exp(rng.uniform(0, math.log(_longest(L, difficulty)))))
    start = rng.randrange(max(1, L - 2 * length - len(mark) - distance))
    again = min(start + length + distance, L - length - len(mark))
    writer = _Writer("copy", L)
    writer.text(text[:again]).insert(mark).text(text[start : start + cue])
    at = writer.size
    writer.text(text[start + cue : start + length])
    writer.answers.append((at, writer.size, again - start - length))
    return writer.text(text[again:]).row()


class _Writer:
    """Puts a row together, and cuts it to L bytes."""

    def __init__(self, task: str, L: int):
        self.task, self.L, self.parts, self.size = task, L, [], 0
        self.inserted: list[tuple[int, int]] = []
        self.answers: list[tuple[int, int, int]] = []
        self.asides: list[tuple[int, int]] = []
        self._told: dict[object, int] = {}  # where the last statement of a fact ended

    def text(self, data: bytes) -> _Writer:
        self.parts.append(data)
        self.size += len(data)
        return self

    def insert(self, data: bytes) -> _Writer:
        self.inserted.append((self.size, self.size + len(data)))
        return self.text(data)

    def write(self, pieces: list[_Piece]) -> _Writer:
        for piece in pieces:
            self.insert(piece.before)
            if piece.answer:
                # What has not been told cannot be known: the question stands there, its answer counts as nothing.
                if piece.fact in self._told:
                    self.answers.append((self.size, self.size + len(piece.answer), self.size - self._told[piece.fact]))
                self.insert(piece.answer)
            elif piece.fact is not None:
                self._told[piece.fact] = self.size
            self.insert(piece.after)
        return self

    def among(self, text: bytes, events: list[tuple[float, _Piece]], asides: list[tuple[int, int]]) -> _Writer:
        """Pieces at their places in the row, where a word ends if one does nearby; text between them."""
        read = 0

        def upto(end: int) -> None:
            for start, stop in asides:
                if start < end and read < stop:
                    at = self.size - read
                    self.asides.append((at + max(start, read), at + min(stop, end)))
            self.text(text[read:end])

        for at, piece in sorted(events, key=lambda event: event[0]):
            if self.size >= self.L:
                break
            end = read + max(0, round(at) - self.size)
            end = min(_word_end(text, end), len(text))
            upto(end)
            self.write([piece])
            read = end
        upto(len(text))
        return self

    def row(self) -> Row:
        data, L = b"".join(self.parts)[: self.L], self.L
        return Row(
            self.task,
            data.ljust(L),
            [(start, min(stop, L)) for start, stop in self.inserted if start < L],
            # A cut answer is one nevertheless: its first bytes are decided by what stands before them.
            [(start, min(stop, L), distance) for start, stop, distance in self.answers if start < L],
            [(start, min(stop, L)) for start, stop in self.asides if start < L],
        )


# ── what is told ─────────────────────────────────────────────────────────────────────────────────────────────────


def word(rng: random.Random, syllables: int) -> str:
    """Letters that can be spoken and mean nothing."""
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables))


def _words(text: bytes) -> tuple[str, ...]:
    """Some of a text's words, of 3 to 8 letters."""
    return tuple(_WORD.findall(text[:WORDS_FROM].decode(errors="ignore")))


def name(rng: random.Random) -> str:
    """Somebody's: nobody's that is known."""
    made = word(rng, rng.randint(2, 3))
    return made.capitalize() + (rng.choice("nrslkm") if rng.random() < 0.5 else "")


def key(words: tuple[str, ...], rng: random.Random) -> str:
    """What is to be recalled: a number, a code, a word that is none, or one of `words`."""
    kind = rng.randrange(4 if words else 3)
    if kind == 0:
        return "".join(rng.choices("0123456789", k=rng.randint(2, 6)))
    if kind == 1:
        return "".join(rng.choices(_LETTERS.upper() + "0123456789", k=rng.randint(3, 6)))
    return word(rng, rng.randint(1, 3)) if kind == 2 else rng.choice(words)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
