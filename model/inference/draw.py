"""Drawing: bytes of several rows at once, each given out as soon as it is certain.

What `generate` and the chat are made of: rows (`Row`) whose prompts have been read by streams (`RowStream`), steps that
draw a byte of every row (`draw_bytes`, or `draw_guarded` with a classifier), and pieces (`give_out`). On a card
`model.inference.write` goes on from them without waiting for each byte.

Notable: sampling, the UTF-8 automaton and the gate act on all rows at once. With a classifier each stream is drawn a
patch ahead, and what was accepted goes through the same loop byte by byte.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from model.agiformer import AGIFormer
from model.genesis.gate.byte_gate import CONTEXT, ByteGate, GateLog, Removal
from model.genesis.gate.classifier import HiddenStateGate
from model.genesis.gate.guarded import PatchWriter
from model.inference.stream import ByteStream
from model.inference.text import unfinished

LARGEST_SEED = 2**63 - 1
NOT_FINITE = "the model's logits are not finite: its weights are damaged or it diverged"
MODES = ("lower", "block")
Reason = Literal["stop", "length", "gate"]
CATEGORY, RULE = "classifier", "hidden-state"  # of patches that the classifier rejected, in the log
Draw = Callable[[Tensor], Tensor]  # logits [B, 256] → bytes [B]


@dataclass(frozen=True)
class Piece:
    """Bytes of one row. The last piece of a row, which may be empty, says why it finished."""

    row: int
    data: bytes
    finished: Reason | None = None


@dataclass
class RowStream:
    """The rows whose prompts have one length, and the stream that reads them."""

    stream: ByteStream
    rows: list["Row"]
    index: Tensor  # [number of rows] their places in the batch


class Row:
    """What one row has generated and not yet given out."""

    def __init__(self, index: int, prompt: bytes, max_bytes: int, stops: tuple[bytes, ...], whole_characters: bool):
        self.index = index
        self.generated = 0
        self.max_bytes = max_bytes
        self.stops = stops
        self.whole_characters = whole_characters
        self.finished: Reason | None = None
        self.held = bytearray()
        self.may_end = bytearray()  # after each byte of `held`
        self.before = prompt[-CONTEXT:]  # the bytes before `held`, as many as anything looks back

    def push(self, byte: int, may_end: bool = True) -> Piece | None:
        """Take one more byte, and whether a text may end after it; the piece that it makes certain, or None."""
        self.held.append(byte)
        self.may_end.append(may_end)
        self.generated += 1
        met = max((len(stop) for stop in self.stops if self.held.endswith(stop)), default=0)
        if met:
            self.finished = "stop"
            return self._give(len(self.held) - met)
        if self.generated == self.max_bytes:
            return self.end("length")
        return self._give(len(self.held) - self._possible_stop())

    def push_all(self, data: bytes, may_end: bytes) -> Piece | None:
        """As `push` of one byte after the other, until the row is finished; their pieces in one."""
        data = data[: self.max_bytes - self.generated]
        known = bytes(self.held) + data
        if any(stop in known for stop in self.stops):
            given = b""
            for byte, may in zip(data, may_end):
                if piece := self.push(byte, bool(may)):
                    given += piece.data
                if self.finished:
                    break
            return Piece(self.index, given, self.finished)
        self.held += data
        self.may_end += may_end[: len(data)]
        self.generated += len(data)
        if self.generated == self.max_bytes:
            return self.end("length")
        return self._give(len(self.held) - self._possible_stop())

    def end(self, reason: Reason) -> Piece:
        """Finish before the next byte; the last piece."""
        self.finished = reason
        return self._give(len(self.held))

    def _possible_stop(self) -> int:
        """How many bytes at the end of `held` begin a stop string."""
        return max(
            (n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])),
            default=0,
        )

    def _give(self, end: int) -> Piece | None:
        """Give out the first `end` bytes of those held, less what must not be the last of the text."""
        while end:
            # When the prompt holds the beginning of the character, fewer of its bytes are here than are unfinished.
            cut = len(unfinished(self.before[-3:] + bytes(self.held[:end]))[0]) if self.whole_characters else 0
            if not cut and self.may_end[end - 1]:
                break
            end = max(0, end - max(cut, 1))
        data = bytes(self.held[:end])
        del self.held[:end], self.may_end[:end]
        self.before = (self.before + data)[-CONTEXT:]
        return Piece(self.index, data, self.finished) if data or self.finished else None


def draw_bytes(
    streams: list[RowStream],
    constraints: list,
    draw: Draw,
    device: torch.device,
    total: int,
    most: int | None = None,
) -> Iterator[tuple[Tensor, list[Piece]]]:
    """Draw a byte of every row again and again; no row ends by itself.

    Args:
        streams: that have read the rows' prompts; they are fed what is drawn until their rows are finished.
        constraints: over all rows, in the order in which they mask logits; they are told what is drawn.
        draw: how.
        total: rows of all streams.
        most: bytes of a row; without end when None. The last of them are fed to the streams, too.

    Yields:
        The bytes [total], −1 where no logit is finite, and last pieces of rows that ended before them: none here.
    """
    for _ in count() if most is None else range(most):
        # Rows of a finished stream keep their place in the batch, so that the others' random numbers stay theirs.
        logits = torch.zeros(total, 256, device=device)
        for part in streams:
            logits[part.index] = part.stream.logits()
        # As `model.kernels.choose`: NaN counts as masked, and where nothing finite is left byte 0 is read.
        logits = logits.masked_fill(logits.isnan(), -torch.inf)
        for constraint in constraints:
            logits = constraint.mask(logits)
        broken = logits.amax(-1).isinf()
        chosen = draw(logits).masked_fill(broken, 0)
        for constraint in constraints:
            constraint.advance(chosen)
        yield chosen.masked_fill(broken, -1), []
        streams = [part for part in streams if not all(row.finished for row in part.rows)]
        for part in streams:
            part.stream.feed(chosen[part.index].unsqueeze(1))


class AheadStream:
    """A stream that is drawn a patch ahead, so that the classifier has judged a byte before it is given out.

    Args:
        part: the stream, a GuardedStream, fed with the prompts.
        constraints: over its rows.
        drawer: seed → how bytes are drawn, and the generator that it draws from.
        total: rows of all streams.
    """

    def __init__(
        self,
        part: RowStream,
        constraints: list,
        drawer: Callable[[int], tuple[Draw, torch.Generator]],
        seed: int,
        total: int,
    ):
        self.rows, self.index = part.rows, part.index
        self.queue: deque[tuple[Tensor, Tensor]] = deque()  # logits [B, 256] and bytes [B]
        first, _ = drawer(seed)
        again, self._redraws = drawer(seed)
        self._seeds = random.Random(seed)

        def of_rows(draw: Draw) -> Draw:
            # Numbers for all rows are drawn, of which each takes those that it would have without a classifier.
            def drawn(logits: Tensor) -> Tensor:
                return draw(logits.new_zeros(total, 256).index_copy(0, part.index, logits))[part.index]

            return drawn

        self._writer = PatchWriter(part.stream, of_rows(first), of_rows(again), constraints=constraints)

    def write(self, block: bool, log: GateLog | None) -> list[Piece]:
        """Queue one more patch, logging what was rejected → last pieces of the rows that are blocked before it."""
        # What is drawn again for a row must not depend on how often others were drawn again.
        self._redraws.manual_seed(self._seeds.getrandbits(63))
        going_on = torch.tensor([not row.finished for row in self.rows], device=self.index.device)
        patch = self._writer.write(going_on)
        self.queue.extend(zip(patch.logits.unbind(1), patch.data.unbind(1)))
        fired = patch.banned.any(1).tolist()
        if not any(fired):
            return []
        likeliest = patch.logits[:, 0].masked_fill(~patch.banned, -torch.inf).argmax(1)
        read = zip(self.rows, fired, likeliest.tolist(), patch.mass.tolist(), patch.rejected.tolist())
        ended = []
        for row, again, byte, mass, rejected in read:
            if again and log is not None:
                removal = Removal(row.index, CATEGORY, RULE, 0, byte, mass)
                log.add(removal, row.generated, row.before + bytes(row.held))
            if rejected and block:
                ended.append(row.end("gate"))
        return ended


def draw_guarded(
    streams: list[AheadStream], constraints: list, device: torch.device, total: int, block: bool, log: GateLog | None
) -> Iterator[tuple[Tensor, list[Piece]]]:
    """As `draw_bytes`, but with bytes that the classifier has accepted.

    Args:
        block: whether a row ends, as "gate", where all tries are rejected; its last piece is among those yielded.
        log: is told what was rejected.
    """
    while True:
        logits, ended = torch.zeros(total, 256, device=device), []
        for part in streams:
            if not part.queue:
                ended += part.write(block, log)
            logits[part.index] = part.queue[0][0]
        # Rejected tries are gone: the constraints over all rows see what is given out, and the log what they take away.
        for constraint in constraints:
            logits = constraint.mask(logits)
        chosen = logits.argmax(-1)  # rows of a finished stream: any allowed byte
        for part in streams:
            chosen[part.index] = part.queue.popleft()[1]
        for constraint in constraints:
            constraint.advance(chosen)
        yield chosen, ended
        streams = [part for part in streams if not all(row.finished for row in part.rows)]


def give_out(
    rows: list[Row], steps: Iterator[tuple[Tensor, list[Piece]]], gate: ByteGate, log: GateLog | None
) -> Iterator[Piece]:
    """The pieces that the steps make certain, until they end or every row is finished; `log` is told what the gate took
    away. Raises FloatingPointError at a byte < 0 of a row that goes on."""
    for chosen, ended in steps:
        yield from ended
        # The device is waited for once.
        ends = gate.must_not_end()
        read = torch.stack([chosen, ends, ends if log is None else gate.flagged()]).tolist()
        if log is not None and (flagged := [i for i, row in enumerate(rows) if read[2][i] and not row.finished]):
            for removal in gate.removals(flagged):
                row = rows[removal.row]
                log.add(removal, row.generated, row.before + bytes(row.held))
        for row, byte, must_not_end in zip(rows, *read[:2]):
            if byte < 0 and not row.finished:
                raise FloatingPointError(NOT_FINITE)
            if not row.finished and (piece := row.push(byte, not must_not_end)):
                yield piece
        if all(row.finished for row in rows):
            return


def check_request(prompts: list[bytes], max_bytes: int, seed: int | None, stop: Sequence[bytes], batch: int) -> None:
    """Raise ValueError, naming the argument, its value and what is accepted, where one is not."""
    if not prompts or not all(isinstance(prompt, bytes) for prompt in prompts):
        wrong = next((type(prompt).__name__ for prompt in prompts if not isinstance(prompt, bytes)), "empty list")
        raise ValueError(f"prompt holds {wrong}: accepted is bytes, or a list of at least one bytes")
    for name, value in (("max_bytes", max_bytes), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: accepted is an integer ≥ 1")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED):
        raise ValueError(f"seed={seed!r}: accepted is an integer from 0 to {LARGEST_SEED}, or None")
    if isinstance(stop, bytes | str):
        raise ValueError(f"stop={stop!r}: accepted is a list of bytes")
    for text in stop:
        if not isinstance(text, bytes) or not text:
            raise ValueError(f"stop={text!r}: accepted are bytes, at least one")


def check_classifier(model: AGIFormer, classifier: HiddenStateGate | None, mode: str) -> None:
    """Raise ValueError where the mode is unknown, or the classifier is of a model of another width."""
    if mode not in MODES:
        raise ValueError(f"classifier_mode={mode!r}: accepted are {' and '.join(MODES)}")
    if classifier is not None and classifier.weight.shape != (model.width,):
        width = tuple(classifier.weight.shape)
        raise ValueError(
            f"classifier has weights {width}: accepted is one that was trained on this model, [{model.width}]"
        )
