"""Generation: a prompt in, bytes out as soon as they are certain.

    for piece in generate(model, b"Once upon a time", max_bytes=200, stop=[b"\\n\\n"], batch=2, seed=1):
        print(piece.row, piece.data, piece.finished)

Notable: prompts are read in parallel and never padded, so rows whose prompts differ in length run as several streams.
There is always a gate; a policy says what it does. On a card all but the first bytes are written in CUDA graphs
(`model.inference.write`), with the weights that the model has then, and come in pieces of several bytes.
"""

import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import torch

from model.agiformer import AGIFormer
from model.genesis.gate.automaton import compile_policy
from model.genesis.gate.byte_gate import ByteGate, GateLog
from model.genesis.gate.classifier import HiddenStateGate
from model.genesis.gate.guarded import GuardedStream
from model.genesis.gate.policy import Policy, load_policy
from model.inference.draw import (
    NOT_FINITE,
    AheadStream,
    Piece,
    Row,
    RowStream,
    check_classifier,
    check_request,
    draw_guarded,
    give_out,
)
from model.inference.sampling import check_sampling
from model.inference.stream import ByteStream
from model.inference.text import Utf8Constraint
from model.inference.write import Draws, write


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
    check_request(prompts, max_bytes, seed, stop, batch)
    check_sampling(temperature, top_k, top_p)
    check_classifier(model, classifier, classifier_mode)
    automaton = compile_policy(load_policy() if policy is None else policy)
    prompts = [text for text in prompts for _ in range(batch)]
    rows = [Row(i, text, max_bytes, tuple(stop), not any_bytes) for i, text in enumerate(prompts)]
    streams = _read_prompts(model, rows, prompts, thinking_steps, halt_threshold, classifier)
    device = model.start.device

    def constraints(texts: list[bytes]) -> list:
        gate = ByteGate(automaton, len(texts), device).read(texts)
        return [gate] if any_bytes else [Utf8Constraint(texts, device), gate]

    def drawer(seed: int) -> tuple[Draws, torch.Generator]:
        generator = torch.Generator(device).manual_seed(seed)
        return Draws(temperature, top_k, top_p, generator), generator

    if seed is None:
        seed = secrets.randbits(63)
    over_all = constraints(prompts)
    if classifier is None:
        return write(streams, over_all, drawer(seed)[0], rows, log)
    ahead = []
    for part in streams:
        part_constraints = constraints([prompts[row.index] for row in part.rows])
        ahead.append(AheadStream(part, part_constraints, drawer, seed, len(rows)))
    steps = draw_guarded(ahead, over_all, device, len(rows), classifier_mode == "block", log)
    return give_out(rows, steps, over_all[-1], log)


def _read_prompts(
    model: AGIFormer,
    rows: list[Row],
    prompts: list[bytes],
    thinking_steps: int | None,
    halt_threshold: float | None,
    classifier: HiddenStateGate | None,
) -> list[RowStream]:
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
            raise FloatingPointError(NOT_FINITE)
        index = torch.tensor([row.index for row in members], device=stream.device)
        streams.append(RowStream(stream, members, index))
    return streams
