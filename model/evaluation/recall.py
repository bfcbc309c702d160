"""Needle in a haystack: can the model still write a key that it read thousands of bytes ago?

A prompt is sentences with one needle ("The secret code of Anna is 4827.") at a stated depth, then a question that ends
just before the answer. Prompts of one length are read side by side through `ByteStream`, in constant memory. A greedy
answer equals the key exactly when each of its bytes is the most probable one after those before it, so one reading
gives both the exact match and the probability of the answer.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.data.haystack import DIGIT_KEYS, KEY_BYTES, LANGUAGES, Language
from model.evaluation.bpc import evaluation_mode
from model.evaluation.report import check_count, number, text_table
from model.inference.stream import ByteStream

PASS_ACCURACY = 0.5  # exact matches at every length that make a pass; guessing the kind of key gives below 0.02
LENGTHS = (200, 1000, 4000, 16000)
PIECE = 4096  # bytes of every prompt fed between two moves of the progress bar


@dataclass(frozen=True)
class Needle:
    """One prompt and its answer.

    Attributes:
        prompt: sentences, needle, sentences, question; exactly the length that was asked for.
        answer: the key, KEY_BYTES bytes.
        start: byte of the prompt where the needle begins: round(depth · bytes of sentences).
        question: byte of the prompt where the question begins.
        chance: log₂ probability of the answer for one who knows the kind of key but has not read it.
    """

    prompt: bytes
    answer: bytes
    start: int
    question: int
    chance: float
    language: str


@dataclass(frozen=True)
class RecallCell:
    """What was recalled at one length.

    Attributes:
        length: bytes of the prompt.
        samples: prompts read.
        accuracy: share of exact matches; by language in `languages`.
        log2_probability: mean log₂ p of the whole answer, in bits.
        chance: mean log₂ p of the whole answer for a guess among keys of its kind, in bits.
    """

    length: int
    samples: int
    accuracy: float
    log2_probability: float
    chance: float
    languages: dict[str, float]


@dataclass(frozen=True)
class RecallReport:
    """One cell a length, in the order asked for."""

    cells: list[RecallCell]

    @property
    def passed(self) -> bool:
        """Whether every length reaches PASS_ACCURACY."""
        return all(cell.accuracy >= PASS_ACCURACY for cell in self.cells)

    def table(self) -> str:
        """One line a length; accuracies in percent."""
        languages = list(self.cells[0].languages)
        header = ["bytes", "samples", "exact %", *(f"{name} %" for name in languages), "log2 p", "chance"]
        rows = [
            [
                f"{cell.length}",
                f"{cell.samples}",
                *(number(100 * share, 0) for share in (cell.accuracy, *cell.languages.values())),
                number(cell.log2_probability, 2),
                number(cell.chance, 2),
            ]
            for cell in self.cells
        ]
        return text_table(header, rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {
            "passed": self.passed,
            "pass_accuracy": PASS_ACCURACY,
            "cells": [asdict(cell) for cell in self.cells],
        }


def needle_accuracy(
    model: nn.Module,
    lengths: Sequence[int] = LENGTHS,
    samples: int = 20,
    seed: int = 0,
    depth: float | None = None,
    *,
    languages: Sequence[str] = tuple(LANGUAGES),
    batch_size: int = 16,
    stream: Callable[[nn.Module, int], Any] = ByteStream,
    progress: Callable[[int], None] | None = None,
) -> RecallReport:
    """Exact match and log₂ probability of needles' keys, by length of prompt.

    Args:
        model: an AGIFormer, or whatever `stream` reads; it has a device's parameters.
        lengths: bytes of the prompts, at least as many as needle and question take.
        samples: prompts a length; languages, kinds of key and phrasings take turns.
        seed: of all random choices; a prompt depends on seed, length and its number alone.
        depth: place of the needle in the sentences, 0 first, 1 last; None spreads the samples evenly over it.
        languages: "en", "tr".
        batch_size: prompts read side by side.
        stream: makes the reader of a batch, with `.feed(bytes [B, n])` and `.logits() -> [B, 256]`.
        progress: called with the number of bytes just read, all prompts together.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    check_count("samples", samples)
    check_count("batch_size", batch_size)
    if not lengths:
        raise ValueError(f"lengths={lengths!r}: accepted are one or more lengths in bytes")
    cells = []
    with evaluation_mode(model):
        device = next(model.parameters()).device
        for length in lengths:
            needles = make_needles(length, samples, seed, depth, languages)
            scored = []
            for i in range(0, samples, batch_size):
                group = needles[i : i + batch_size]
                scored.append(_score(stream(model, len(group)), group, device, progress))
            exact, bits = (torch.cat(parts).tolist() for parts in zip(*scored))
            cells.append(_cell(length, needles, exact, bits))
    return RecallReport(cells)


def make_needles(
    length: int,
    samples: int,
    seed: int = 0,
    depth: float | None = None,
    languages: Sequence[str] = tuple(LANGUAGES),
) -> list[Needle]:
    """The prompts of one length: the same for the same arguments. Arguments and errors as in `needle_accuracy`."""
    check_count("length", length)
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth={depth!r}: accepted is a number from 0 to 1, or None")
    if not languages or any(name not in LANGUAGES for name in languages):
        raise ValueError(f"languages={languages!r}: accepted are one or more of {', '.join(LANGUAGES)}")
    least = max(_shortest(LANGUAGES[name]) for name in languages)
    if length < least:
        raise ValueError(f"length={length}: accepted is at least {least} bytes, for needle and question")
    needles = []
    for i in range(samples):
        rng = random.Random(f"{seed}/{length}/{i}")
        place = (i + 0.5) / samples if depth is None else depth
        needles.append(_make_needle(length, place, languages[i % len(languages)], i // len(languages), rng))
    return needles


def _make_needle(length: int, depth: float, name: str, turn: int, rng: random.Random) -> Needle:
    language = LANGUAGES[name]
    statement, question = language.needles[turn // 2 % len(language.needles)]
    who = rng.choice(language.who)
    if turn % 2:
        key, chance = rng.choice(language.keys), -math.log2(len(language.keys))
    else:
        key, chance = f"{rng.randrange(DIGIT_KEYS):0{KEY_BYTES}}", -math.log2(DIGIT_KEYS)
    needle = (statement.format(who=who, key=key) + " ").encode()
    asked = question.format(who=who).encode()
    room = length - len(needle) - len(asked)
    start = round(depth * room)
    sentences = language.haystack(rng)
    prompt = _fill(sentences, start) + needle + _fill(sentences, room - start) + asked
    return Needle(prompt, key.encode(), start, length - len(asked), chance, name)


def _shortest(language: Language) -> int:
    """Bytes of the longest needle and question together: every longer prompt can be made."""
    texts = [
        statement.format(who=who, key="0" * KEY_BYTES) + " " + question.format(who=who)
        for statement, question in language.needles
        for who in language.who
    ]
    return max(len(text.encode()) for text in texts)


def _fill(sentences, size: int) -> bytes:
    """Exactly `size` bytes of whole characters: sentences, the last one cut and closed by a full stop and spaces."""
    if size < 4:
        return b" " * size
    parts, total = [], 0
    while total < size:
        parts.append(next(sentences).encode() + b" ")
        total += len(parts[-1])
    text = b"".join(parts)[: size - 2].decode(errors="ignore").rstrip(" .").encode()
    return (text + b".").ljust(size)


def _score(
    reader: Any, needles: list[Needle], device: torch.device, progress: Callable[[int], None] | None
) -> tuple[Tensor, Tensor]:
    """(exact match [B] bool, log₂ p of the answer [B] float64) of prompts of one length."""
    prompts, answers = (
        torch.from_numpy(np.stack([np.frombuffer(text, np.uint8) for text in texts])).to(device)
        for texts in ([needle.prompt for needle in needles], [needle.answer for needle in needles])
    )
    for piece in prompts.split(PIECE, 1):
        reader.feed(piece)
        if progress:
            progress(piece.numel())
    exact = torch.ones(len(needles), dtype=torch.bool, device=device)
    bits = torch.zeros(len(needles), dtype=torch.float64, device=device)
    for byte in answers.long().unbind(1):
        log_p = reader.logits().double().log_softmax(-1) / math.log(2)
        exact &= log_p.argmax(-1) == byte
        bits += log_p.gather(1, byte.unsqueeze(1)).squeeze(1)
        reader.feed(byte.unsqueeze(1))
    return exact, bits


def _cell(length: int, needles: list[Needle], exact: list[bool], bits: list[float]) -> RecallCell:
    by_language: dict[str, list[bool]] = {}
    for needle, hit in zip(needles, exact):
        by_language.setdefault(needle.language, []).append(hit)
    return RecallCell(
        length,
        len(needles),
        _mean(exact),
        _mean(bits),
        _mean([needle.chance for needle in needles]),
        {name: _mean(hits) for name, hits in by_language.items()},
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
