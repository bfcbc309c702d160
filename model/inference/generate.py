"""Generation: a prompt in, bytes out as soon as they are certain.

    for piece in generate(model, b"Once upon a time", max_bytes=200, stop=[b"\\n\\n"], batch=2, seed=1):
        print(piece.row, piece.data, piece.finished)

Notable: prompts are read in parallel and never padded, so rows whose prompts differ in length run as several streams;
sampling, the UTF-8 automaton and the gate act on all rows at once. There is always a gate; a policy says what it does.
With a classifier each stream is drawn a patch ahead, and what was accepted goes through the same loop byte by byte.
"""

import random
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from model.agiformer import AGIFormer
from model.genesis.gate.automaton import compile_policy
from model.genesis.gate.byte_gate import CONTEXT, ByteGate, GateLog, Removal
from model.genesis.gate.classifier import HiddenStateGate
from model.genesis.gate.guarded import GuardedStream, PatchWriter
from model.genesis.gate.policy import Policy, load_policy
from model.inference.sampling import check_sampling, sample
from model.inference.stream import ByteStream
from model.inference.text import Utf8Constraint, unfinished

LARGEST_SEED = 2**63 - 1
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


def generate(
    model: AGIFormer,
    prompt: bytes | Sequence[bytes],
    *,
    max_bytes: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[bytes] = (),
    batch: int = 1,
    thinking_steps: int | None = None,
    halt_threshold: float | None = None,
    any_bytes: bool = False,
    policy: Policy | None = None,
    log: GateLog | None = None,
    classifier: HiddenStateGate | None = None,
    classifier_mode: Literal["lower", "block"] = "lower",
) -> Iterator[Piece]:
    """Read the prompt, then return an iterator that generates while it is consumed.

    Rows: prompt i of n has the rows i·batch … (i + 1)·batch − 1. All draw from one generator, so they differ (unless
    greedy). What a row says depends on model, prompt, seed, row, and the number of rows; not on `max_bytes` (a larger
    one only continues it), nor on when other rows finish. Rounding differs between devices, and so may the bytes.

    Args:
        model: as `load_checkpoint` gives it.
        prompt: any bytes, also none; or several prompts of any lengths.
        max_bytes: bytes generated per row, at most; ≥ 1.
        temperature, top_k, top_p: see `sampling.probabilities`.
        seed: the same seed gives the same bytes; random when None.
        stop: byte strings that end a row. They are looked for in what is generated, also across pieces, and are not
            part of it; bytes that may begin one are held back until that is decided.
        batch: samples per prompt.
        thinking_steps: K for this call; the configured number when None.
        halt_threshold: thinking at a position ends early once its halting probability reaches this; None never.
        any_bytes: False lets only valid UTF-8 be generated: every piece ends with a whole character, a character
            that `max_bytes` would cut is left out, and a prompt that ends inside a character has it completed first.
            True gives every byte out at once, whatever it is.
        policy: no byte is generated that completes a match of its rules, in the text that the prompt begins; the
            default policy when None. Bytes that would be a match if the row ended after them are held back, and left
            out if it does. Where nothing is blocked the bytes are those of any other policy.
        log: is told what the gate took away, and what the classifier rejected.
        classifier: trained on this model. A patch after which its risk is above the threshold is drawn again, so
            bytes come a patch at a time. Rows in which no patch is rejected say what they would without a classifier.
        classifier_mode: what follows when all tries are rejected: "lower" goes on with the least risky one, "block"
            ends the row as "gate" before it.

    Yields:
        Piece: in the order in which bytes become certain. Each row has exactly one with `finished` set, its last.

    Raises:
        ValueError: an argument out of range, naming it, its value and what is accepted; or a policy that cannot be
            compiled. Raised by the call itself.
        FloatingPointError: the model's logits are not finite.
    """
    prompts = [prompt] if isinstance(prompt, bytes) else list(prompt)
    _check(prompts, max_bytes, seed, stop, batch)
    check_sampling(temperature, top_k, top_p)
    _check_classifier(model, classifier, classifier_mode)
    automaton = compile_policy(load_policy() if policy is None else policy)
    prompts = [text for text in prompts for _ in range(batch)]
    rows = [_Row(i, text, max_bytes, tuple(stop), not any_bytes) for i, text in enumerate(prompts)]
    streams = _read_prompts(model, rows, prompts, thinking_steps, halt_threshold, classifier)
    device = model.start.device

    def constraints(texts: list[bytes]) -> list:
        gate = ByteGate(automaton, len(texts), device).read(texts)
        return [gate] if any_bytes else [Utf8Constraint(texts, device), gate]

    def drawer(seed: int) -> tuple[Draw, torch.Generator]:
        generator = torch.Generator(device).manual_seed(seed)
        return partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator), generator

    if seed is None:
        seed = secrets.randbits(63)
    over_all = constraints(prompts)
    if classifier is None:
        steps = _steps(streams, over_all, drawer(seed)[0], device, len(rows))
    else:
        ahead = []
        for part in streams:
            part_constraints = constraints([prompts[row.index] for row in part.rows])
            ahead.append(_Ahead(part, part_constraints, drawer, seed, len(rows)))
        steps = _guarded_steps(ahead, over_all, device, len(rows), classifier_mode == "block", log)
    return _run(rows, steps, over_all[-1], log)


@dataclass
class _Stream:
    """The rows whose prompts have one length, and the stream that reads them."""

    stream: ByteStream
    rows: list["_Row"]
    index: Tensor  # [number of rows] their places in the batch


class _Row:
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


def _read_prompts(
    model: AGIFormer,
    rows: list[_Row],
    prompts: list[bytes],
    thinking_steps: int | None,
    halt_threshold: float | None,
    classifier: HiddenStateGate | None,
) -> list[_Stream]:
    """One stream for each length of prompt, its prompts read in parallel."""
    streams = []
    for length in dict.fromkeys(map(len, prompts)):
        members = [row for row, prompt in zip(rows, prompts) if len(prompt) == length]
        kind = ByteStream if classifier is None else partial(GuardedStream, gate=classifier.to(model.start.device))
        stream = kind(model, batch_size=len(members), thinking_steps=thinking_steps, halt_threshold=halt_threshold)
        if length:
            joined = bytearray(b"".join(prompts[row.index] for row in members))
            stream.feed(torch.frombuffer(joined, dtype=torch.uint8).view(-1, length))
        # Also waits for the device: when the call returns, the prompt is read.
        if not stream.logits().isfinite().all():
            raise FloatingPointError("the model's logits are not finite: its weights are damaged or it diverged")
        index = torch.tensor([row.index for row in members], device=stream.device)
        streams.append(_Stream(stream, members, index))
    return streams


def _steps(
    streams: list[_Stream], constraints: list, draw: Draw, device: torch.device, total: int
) -> Iterator[tuple[Tensor, list[Piece]]]:
    """Draw a byte of every row, [total], again and again; no row ends by itself."""
    while True:
        # Rows of a finished stream keep their place in the batch, so that the others' random numbers stay theirs.
        logits = torch.zeros(total, 256, device=device)
        for part in streams:
            logits[part.index] = part.stream.logits()
        for constraint in constraints:
            logits = constraint.mask(logits)
        chosen = draw(logits)
        for constraint in constraints:
            constraint.advance(chosen)
        yield chosen, []
        streams = [part for part in streams if not all(row.finished for row in part.rows)]
        for part in streams:
            part.stream.feed(chosen[part.index].unsqueeze(1))


class _Ahead:
    """A stream that is drawn a patch ahead, so that the classifier has judged a byte before it is given out.

    Args:
        part: the stream, a GuardedStream, fed with the prompts.
        constraints: over its rows.
        drawer: seed → how bytes are drawn, and the generator that it draws from.
        total: rows of all streams.
    """

    def __init__(
        self,
        part: _Stream,
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


def _guarded_steps(
    streams: list[_Ahead], constraints: list, device: torch.device, total: int, block: bool, log: GateLog | None
) -> Iterator[tuple[Tensor, list[Piece]]]:
    """As `_steps`, but with bytes that the classifier has accepted, and with the last pieces of rows that end here."""
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


def _run(
    rows: list[_Row], steps: Iterator[tuple[Tensor, list[Piece]]], gate: ByteGate, log: GateLog | None
) -> Iterator[Piece]:
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
            if not row.finished and (piece := row.push(byte, not must_not_end)):
                yield piece
        if all(row.finished for row in rows):
            return


def _check(prompts: list[bytes], max_bytes: int, seed: int | None, stop: Sequence[bytes], batch: int) -> None:
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


def _check_classifier(model: AGIFormer, classifier: HiddenStateGate | None, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"classifier_mode={mode!r}: accepted are {' and '.join(MODES)}")
    if classifier is not None and classifier.weight.shape != (model.width,):
        width = tuple(classifier.weight.shape)
        raise ValueError(
            f"classifier has weights {width}: accepted is one that was trained on this model, [{model.width}]"
        )
