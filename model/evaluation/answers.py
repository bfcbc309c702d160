"""Asking a stream for what it has read, with the memory and without it; and what that costs.

A greedy answer equals the expected one exactly when each of its bytes is the most probable one after those before it,
so one reading gives both the exact match and the probability of the answer.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.evaluation.ablation import without_memory
from model.evaluation.report import number, text_table

# What memory adds to the exact answers where attention cannot reach: from CARRIES on it carries them, below NOTHING it
# contributes nothing, and between the two a part.
CARRIES, NOTHING = 0.5, 0.05
PIECE = 4096  # bytes of every row fed between two moves of the progress bar


@dataclass(frozen=True)
class Answer:
    """How one question was answered, and how with the memory ablated (None where that was not asked).

    Attributes:
        distance: bytes from each byte of what is asked for to where it has to be predicted.
        exact: whether the greedy answer is right, byte for byte.
        bits: log₂ probability of the whole answer.
    """

    distance: int
    exact: bool
    bits: float
    exact_without: bool | None
    bits_without: float | None


@dataclass(frozen=True)
class Cost:
    """Of one line of a table.

    Attributes:
        seconds: reading and answering with the memory; making the prompts is not counted.
        bytes_per_second: of all rows together.
        state_bytes: of one row, after its text.
        peak_bytes: the most memory so far: of the device where that is a GPU, else of the whole process; None where
            the system does not tell.
    """

    seconds: float
    bytes_per_second: float
    state_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Contribution:
    """What memory adds where attention cannot reach (`attention_reach`).

    Attributes:
        answers: asked for from beyond that reach.
        accuracy, without_memory: share of exact matches among them, with and without; None without answers.
    """

    answers: int
    accuracy: float | None
    without_memory: float | None

    @property
    def verdict(self) -> str:
        """ "memory carries it", "memory carries part of it", "memory contributes nothing" or "not measured"."""
        if not self.answers:
            return "not measured"
        gain = self.accuracy - self.without_memory
        if gain < NOTHING:
            return "memory contributes nothing"
        return "memory carries it" if gain >= CARRIES else "memory carries part of it"

    def line(self, reach: int) -> str:
        """The verdict with its figures."""
        if not self.answers:
            return f"{self.verdict}: nothing was asked from beyond {reach} bytes, where attention cannot reach"
        return (
            f"{self.verdict}: beyond {reach} bytes, where attention cannot reach, {percent(self.accuracy)}% of "
            f"{self.answers} answers are exact with it and {percent(self.without_memory)}% without "
            f"(carries: at least {percent(CARRIES)} points more; nothing: less than {percent(NOTHING)})"
        )


def contribution(answers: Sequence[Answer], reach: int) -> Contribution | None:
    """Of the answers from beyond `reach` bytes; None where the memory was not ablated."""
    if any(answer.exact_without is None for answer in answers):
        return None
    beyond = [answer for answer in answers if answer.distance > reach]
    return Contribution(
        len(beyond), mean([answer.exact for answer in beyond]), mean([answer.exact_without for answer in beyond])
    )


class Asking:
    """Asks the same with and without the memory, and adds up what it costs with it.

    Args:
        model: whose memory is ablated.
        ablation: whether to ask without it too.
    """

    def __init__(self, model: nn.Module, ablation: bool):
        self.model, self.ablation = model, ablation
        self.device = next(model.parameters()).device
        self._seconds, self._bytes, self._state = 0.0, 0, 0

    def __call__(self, ask: Callable[[], tuple[Tensor, Tensor, int]], size: int, rows: int) -> list[tuple]:
        """(exact, bits, exact without, bits without) of every answer.

        Args:
            ask: reads and answers with a new stream: exact and bits, both [n], and the bytes of the stream's state.
            size: bytes that it reads, all rows together.
            rows: of the stream.
        """
        started = time.perf_counter()
        exact, bits, state = ask()
        exact, bits = exact.tolist(), bits.tolist()  # waits for the device
        self._seconds += time.perf_counter() - started
        self._bytes += size
        self._state = max(self._state, state // rows)
        without = [None] * len(exact), [None] * len(exact)
        if self.ablation:
            with without_memory(self.model):
                exact_without, bits_without, _ = ask()
                without = exact_without.tolist(), bits_without.tolist()
        return list(zip(exact, bits, *without))

    def cost(self) -> Cost:
        """Of all that was asked so far."""
        return Cost(self._seconds, self._bytes / self._seconds, self._state, peak_memory(self.device))


def read(reader: Any, text: Tensor, device: torch.device, progress: Callable[[int], None] | None) -> None:
    """Feed text [B, n] uint8, on the CPU, to a stream: the device holds a piece of it at a time."""
    for piece in text.split(PIECE, 1):
        reader.feed(piece.to(device))
        if progress:
            progress(piece.numel())


def answer(reader: Any, expected: Tensor) -> tuple[Tensor, Tensor]:
    """(exact match [B] bool, log₂ p of the whole answer [B] float64) of expected bytes [B, n], which are then read."""
    exact = torch.ones(len(expected), dtype=torch.bool, device=expected.device)
    bits = torch.zeros(len(expected), dtype=torch.float64, device=expected.device)
    for byte in expected.long().unbind(1):
        log_p = reader.logits().double().log_softmax(-1) / math.log(2)
        exact &= log_p.argmax(-1) == byte
        bits += log_p.gather(1, byte.unsqueeze(1)).squeeze(1)
        reader.feed(byte.unsqueeze(1))
    return exact, bits


def byte_rows(texts: Sequence[bytes]) -> Tensor:
    """Texts of one length as uint8 [B, n], on the CPU."""
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8).view(len(texts), -1)


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that PyTorch has had on the GPU, or this process in all; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def mean(values: Sequence[float | None]) -> float | None:
    """None for no values, and for values that were not measured."""
    return None if not values or None in values else sum(values) / len(values)


def percent(share: float | None) -> str:
    """A table's cell."""
    return number(None if share is None else 100 * share, 1)


def cost_table(name: str, costs: Sequence[tuple[int, Cost]]) -> str:
    """One line a length or number: time, speed, and memory of the stream and in all."""
    rows = [
        [
            f"{size}",
            number(cost.seconds, 2),
            number(cost.bytes_per_second, 0),
            f"{cost.state_bytes}",
            number(None if cost.peak_bytes is None else cost.peak_bytes / 2**20, 1),
        ]
        for size, cost in costs
    ]
    return text_table([name, "seconds", "bytes/s", "state, bytes a row", "peak so far, MiB"], rows)
