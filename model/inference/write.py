"""Writing at the device's pace: a patch of bytes as one CUDA graph, the host some graphs ahead of what it gives out.

A graph is, for each byte of a patch, `model.kernels.choose` (masks, sampling, automata) and FusedStream's step. What
was chosen goes into a ring on the device and, behind every few graphs, to pinned memory: only that is waited for.

Notable: what is given out is what `draw_bytes` gives out. Random numbers are drawn ahead, by the same generator and in
the same calls; rows that have ended go on unseen; what the gate took away is told from what it saw, which is kept on
the device until then. Logits differ by rounding, and so may a byte at a tie.
"""

import gc
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from model.genesis.gate.byte_gate import ByteGate, GateLog, Removal
from model.inference.draw import NOT_FINITE, Piece, Row, RowStream, draw_bytes, give_out
from model.inference.fused import FusedStream, FusedWeights, refusal
from model.inference.sampling import MASS_ROUNDING, sample
from model.inference.text import NEXT
from model.kernels.choose import BROKEN, FLAGGED, MUST_NOT_END, Choice, Rules, Sampling, choose

FIRST = 32  # bytes of a row that come through `draw_bytes`: few are not worth compiling kernels and copying weights
MOST_ROWS = 256
AHEAD = 64  # bytes of a row, at most, that are begun at once; two such runs are under way
WIDE = 4096  # bytes of all rows, about, that are begun at once, where that is less


@dataclass(frozen=True)
class Draws:
    """How bytes are drawn: `sample` with these settings."""

    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator

    def __call__(self, logits: Tensor) -> Tensor:
        return sample(logits, self.temperature, self.top_k, self.top_p, self.generator)


def write(
    streams: list[RowStream], constraints: list, draws: Draws, rows: list[Row], log: GateLog | None
) -> Iterator[Piece]:
    """The pieces of rows that are drawn until all are finished; in graphs where that is possible, else byte by byte.

    Args:
        streams: that have read the rows' prompts.
        constraints: over all rows: [Utf8Constraint, ByteGate], or the gate alone.
        draws: how bytes are drawn.
        rows: of all streams.
        log: is told what the gate took away; in graphs the lines of different rows may come in another order.

    Raises:
        FloatingPointError: at a byte for which the model's logits are not finite.
    """
    model, total = streams[0].stream.model, len(rows)
    device, gate = model.start.device, constraints[-1]
    first = max(FIRST, model.config.patch_size)
    written = refused(streams) is None and max(row.max_bytes for row in rows) > first
    steps = draw_bytes(streams, constraints, draws, device, total, first if written else None)
    yield from give_out(rows, steps, gate, log)
    streams = [part for part in streams if not all(row.finished for row in part.rows)]
    if not streams:
        return
    writers = None
    # Written in place for as long as the caller goes on, be it outside the inference mode in which it began.
    with suppress(torch.OutOfMemoryError), on(device), torch.inference_mode(False), torch.no_grad():
        writers = Writers(streams, constraints, draws, total, log)
    if writers is None:  # there is no room for a copy of the weights
        yield from give_out(rows, draw_bytes(streams, constraints, draws, device, total), gate, log)
    else:
        yield from writers.run()


def refused(streams: list[RowStream]) -> str | None:
    """Why these streams cannot be written in graphs, in one line; None where they can be."""
    stream, total = streams[0].stream, sum(len(part.rows) for part in streams)
    if total > MOST_ROWS:
        return f"{total} rows: accepted are at most {MOST_ROWS}"
    if stream.halt_threshold is not None:
        return f"halt_threshold={stream.halt_threshold!r}: accepted is None"
    if not captures(stream.device):
        return f"model on {stream.device}: accepted is one on CUDA"
    return refusal(stream.model)


def captures(device: torch.device) -> bool:
    """Whether work on the device can be captured."""
    return device.type == "cuda"


class _Captures(threading.local):
    """Of a thread, for each stream that it replays on: the stream that it captures on, and its last graph."""

    def __init__(self):
        self.of: dict[torch.cuda.Stream, tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]] = {}


_captures = _Captures()


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of work that has run before, and that keeps none of its tensors: call it to replay it."""
    # Not torch.cuda.graph, which waits for the device and gives all cached memory back.
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    side, last = _captures.of.get(here) or (torch.cuda.Stream(), None)
    # One pool of memory for all graphs of a stream, which run one after another: each call would else reserve another.
    # A pool lives as long as one of its graphs, so the last is kept.
    pool = None if last is None else last.pool()
    side.wait_stream(here)
    begun, collects = False, gc.isenabled()
    gc.disable()  # what is collected may be a graph, and destroying one breaks a capture
    try:
        with torch.cuda.stream(side):
            try:
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                begun = True
                work()
            finally:
                if begun:
                    graph.capture_end()
    finally:
        if collects:
            gc.enable()
    here.wait_stream(side)
    _captures.of[here] = side, graph
    return graph.replay


class Clocks:
    """Random numbers of the steps to come, as `sample` would draw them step after step: `ring` [N, rows, 256]."""

    def __init__(self, generator: torch.Generator, rows: int, slots: int, device: torch.device):
        self.ring = torch.empty(slots, rows, 256, dtype=torch.float64, device=device)
        self._generator, self._drawn = generator, 0

    def draw(self, until: int) -> None:
        """Of the steps before `until`; those of N steps earlier are gone."""
        while self._drawn < until:
            self.ring[self._drawn % len(self.ring)].exponential_(generator=self._generator)
            self._drawn += 1


class Writer:
    """Draws the rows of one stream, some steps at a time.

    Args:
        part: the stream and its rows. The stream is not changed.
        weights: of its model.
        rules, sampling, choice: see `model.kernels.choose`; the choice is that of these rows.
    """

    def __init__(self, part: RowStream, weights: FusedWeights, rules: Rules, sampling: Sampling, choice: Choice):
        self.rows, self.choice = part.rows, choice
        self.stream = FusedStream(part.stream, weights)
        self.steps = 0  # begun
        # A copy of `choice.out`. It is copied again while it is read, but what is read is the same in both.
        self.found = torch.empty(choice.out.shape, dtype=torch.int16, device="cpu", pin_memory=choice.out.is_cuda)
        self._weights, self._rules, self._sampling = weights, rules, sampling
        self._patch_size = part.stream.model.config.patch_size
        self._patch: Callable[[], None] | None = None

    def step(self) -> None:
        """Choose a byte of every row, and read it."""
        choose(self.stream.logits(), self._rules, self._sampling, self.choice)
        self.stream.read(self.choice.chosen)

    def draw(self, until: int) -> None:
        """Begin steps until there are so many; some more, to the end of a patch."""
        P = self._patch_size
        # A patch and what is left of the open one run by themselves at first: kernels are compiled and loaded.
        while self.steps < until and (self.steps < P or self.stream.place):
            self.step()
            self.steps += 1
        while self.steps < until:
            self._weights.check()
            if self._patch is None:
                self._patch = captured(self._whole_patch)
            self._patch()
            self.stream.position += P
            self.steps += P
        self.found.copy_(self.choice.out, non_blocking=True)

    def _whole_patch(self) -> None:
        position = self.stream.position
        for _ in range(self._patch_size):
            self.step()
        self.stream.position = position  # a graph's replays are counted where they are called


@dataclass
class Run:
    """Steps that are under way, from `first` to before `last`, and the writers that will have `found` their bytes."""

    first: int
    last: int
    writers: list[Writer]
    ready: torch.cuda.Event | None

    def wait(self) -> None:
        if self.ready is not None:
            self.ready.synchronize()


class Writers:
    """All streams of a call, in step: runs of steps of all of them, one after the other.

    Args:
        streams, constraints, draws, log: see `write`.
        total: rows that the constraints are over.

    Attributes:
        ahead: steps of a run, at most.
    """

    def __init__(self, streams: list[RowStream], constraints: list, draws: Draws, total: int, log: GateLog | None):
        model = streams[0].stream.model
        self.gate, self.log, self.device = constraints[-1], log, model.start.device
        P = self.patch_size = model.config.patch_size
        self.ahead = max(1, min(AHEAD, WIDE // total) // P) * P
        # What two runs choose is kept, and what their last graph does beyond them.
        slots = 2 * self.ahead + P
        self.clocks = Clocks(draws.generator, total, slots, self.device) if draws.temperature else None
        top_k, top_p = draws.top_k or 256, 2.0 if draws.top_p in (None, 1) else draws.top_p - MASS_ROUNDING
        settings = torch.tensor([draws.temperature, top_k, top_p], dtype=torch.float64, device=self.device)
        least_mass = None if log is None else self.gate.least_mass
        ring = None if self.clocks is None else self.clocks.ring
        weights, rules = FusedWeights(model), _rules(constraints, self.device)
        self.writers = []
        for part in streams:
            sampling = Sampling(settings, ring, part.index, ranked=top_k < 256 or top_p < 2)
            choice = Choice.begin(*_standing(constraints, part.index), slots, least_mass)
            self.writers.append(Writer(part, weights, rules, sampling, choice))

    def run(self) -> Iterator[Piece]:
        """The pieces, until every row is finished."""
        rows = [row for writer in self.writers for row in writer.rows if not row.finished]
        most = max(row.max_bytes - row.generated for row in rows)
        under_way: deque[Run] = deque()
        begun, size = 0, self.patch_size
        try:
            while not all(row.finished for row in rows):
                while len(under_way) < 2 and begun < most:
                    last = min(begun + size, most)
                    under_way.append(self.begin(begun, last))
                    begun, size = last, min(2 * size, self.ahead)
                yield from self._tell(under_way.popleft())
        finally:
            # Nothing that a graph works with is let go of before.
            if under_way:
                under_way[-1].wait()

    def begin(self, first: int, last: int) -> Run:
        """Begin the steps from `first` to before `last`, of every stream with rows that go on."""
        writers = [writer for writer in self.writers if not all(row.finished for row in writer.rows)]
        with on(self.device):
            if self.clocks is not None:
                self.clocks.draw(last + self.patch_size - 1)
            for writer in writers:
                writer.draw(last)
            ready = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
        return Run(first, last, writers, ready)

    def _tell(self, run: Run) -> Iterator[Piece]:
        """Wait for a run, and give out what it has made certain."""
        run.wait()
        for writer in run.writers:
            slots = np.arange(run.first, run.last) % len(writer.found)
            codes = writer.found.numpy()[slots].T
            data, may_end, flagged = codes.astype(np.uint8), codes & MUST_NOT_END == 0, codes & (FLAGGED | BROKEN)
            for i, row in enumerate(writer.rows):
                if row.finished:
                    continue
                told = 0
                for at in flagged[i].nonzero()[0]:  # of sound logits none without a log
                    yield from _pushed(row, data[i, told:at], may_end[i, told:at])
                    if row.finished:
                        break
                    if flagged[i, at] & BROKEN:
                        raise FloatingPointError(NOT_FINITE)
                    for removal in self._removals(writer, slots[at], i):
                        self.log.add(removal, row.generated, row.before + bytes(row.held))
                    told = at
                yield from _pushed(row, data[i, told:], may_end[i, told:])

    def _removals(self, writer: Writer, slot: int, i: int) -> list[Removal]:
        """What the gate took from row i of a stream at a step that was flagged. Waits for the device."""
        choice = writer.choice
        gate = ByteGate(self.gate.automaton, 1)
        gate._move(choice.seen_node[slot, i : i + 1].cpu(), choice.seen_registers[slot, i : i + 1].cpu())
        gate.mask(choice.seen[slot, i : i + 1].cpu())
        return [replace(removal, row=writer.rows[i].index) for removal in gate.removals([0])]


def on(device: torch.device):
    """A context in which a CUDA device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _pushed(row: Row, data: np.ndarray, may_end: np.ndarray) -> Iterator[Piece]:
    if not row.finished and (piece := row.push_all(data.tobytes(), may_end.tobytes())):
        yield piece


def _rules(constraints: list, device: torch.device) -> Rules:
    automaton = constraints[-1].automaton
    masks = automaton.masks(device)
    utf8, replacement = (torch.tensor(each, dtype=torch.int32, device=device) for each in (NEXT, automaton.replacement))
    tables = automaton.tables(device), masks.byte_sets, masks.sets, masks.blocked, replacement
    return Rules(utf8 if len(constraints) == 2 else None, *tables)


def _standing(constraints: list, index: Tensor) -> tuple[Tensor, ...]:
    """Where some rows of the constraints stand: states of UTF-8, nodes, registers, and which rows are stuck."""
    gate = constraints[-1]
    utf8 = constraints[0]._states[index] if len(constraints) == 2 else torch.zeros_like(index)
    return utf8, *(torch.as_tensor(each)[index] for each in (gate._node, gate._registers, gate._stuck))
