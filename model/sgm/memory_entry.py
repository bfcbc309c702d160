"""What a memory holds, and what it accepts."""

import math
from dataclasses import dataclass
from datetime import UTC, datetime

KINDS = ("fact", "episode", "skill")
MAX_TEXT = 10_000  # characters of an entry


@dataclass(frozen=True)
class Entry:
    """One memory. created, accessed: seconds since 1970; confidence: in [0, 1]; source: who said it."""

    id: int
    kind: str
    text: str
    confidence: float
    created: float
    accessed: float
    accesses: int
    source: str


@dataclass(frozen=True)
class Match:
    """A retrieved entry and its BM25 score, larger for better ones; scores of different queries do not compare."""

    entry: Entry
    score: float


def checked(text: str, kind: str, confidence: float, source: str) -> str:
    """The text without the spaces around it.

    Raises:
        ValueError: an argument is not accepted, naming it.
    """
    text = checked_text("text", text).strip()
    if not text or len(text) > MAX_TEXT:
        said = text if len(text) < 50 else f"{text[:50]}… ({len(text)} characters)"
        raise ValueError(f"text={said!r}: accepted is a text of 1 to {MAX_TEXT} characters")
    check_kind(kind)
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
        raise ValueError(f"confidence={confidence!r}: accepted is a number from 0 to 1")
    checked_text("source", source)
    return text


def checked_text(name: str, text: str) -> str:
    """The text, which is Unicode; ValueError, naming the argument, where it is not."""
    if not isinstance(text, str):
        raise ValueError(f"{name}={text!r}: accepted is a text (str)")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}={text[:50]!r}: half of a surrogate pair; accepted is Unicode text") from None
    return text


def check_kind(kind: str) -> None:
    """Raise ValueError unless it is one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: accepted are {', '.join(KINDS)}")


def check_integer(name: str, value: int, least: int, most: float = 2**63 - 1) -> None:
    """Raise ValueError, naming the argument, unless it is an integer from `least`; `most` is SQLite's largest."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}={value!r}: accepted is an integer ≥ {least}")


def calendar_day(seconds: float, name: str = "clock") -> str:
    """The calendar day, UTC, of a time; ValueError, naming the argument, where it is none."""
    try:
        if isinstance(seconds, bool) or not math.isfinite(seconds):
            raise ValueError
        return datetime.fromtimestamp(seconds, UTC).date().isoformat()
    except (TypeError, ValueError, OverflowError, OSError):
        raise ValueError(f"{name}={seconds!r}: accepted are seconds since 1970") from None
