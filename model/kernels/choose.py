"""The next byte of every row as one kernel: masks of UTF-8 and the gate, sampling, and the automata one byte on.

What Utf8Constraint, ByteGate and `sample` (`model.inference.text`, `model.genesis.gate.byte_gate`,
`model.inference.sampling`) do one after another, on the same tables and random numbers: they are its reference, and its
only PyTorch form. `model.inference.write` captures it in a graph with the model's step.

Notable:

- One program a row, a lane for each byte. Sampling is in float64, as there; the order of sums differs, so that bytes
  are equal but for a rounding of 1e-16.
- Nothing is sorted: a byte's rank, and the mass before it, are counted against all 256 others.
- A logit that is NaN counts as masked. Where the largest that is left is not finite, byte 0 is chosen and marked
  BROKEN: no state leaves its table, and the host learns of it when it reads that byte.
- What was chosen goes into a ring of slots, by a step number on the device: the host reads many steps at once, late.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels import decode
from model.kernels.automaton import AutomatonTables

try:
    import triton
    import triton.language as tl
except ImportError:  # the eager path does everywhere
    triton = None

MUST_NOT_END, FLAGGED, BROKEN = 1 << 8, 1 << 9, 1 << 10  # of an entry of `Choice.out`; its low 8 bits are the byte
OTHERS = 16  # bytes that every byte is ranked against at once


@dataclass(frozen=True)
class Rules:
    """Which bytes may come, on one device.

    utf8 [8, 256] int32: the state after a byte, < 0 where it is not valid; None lets any byte come.
    automaton: of the gate; byte_sets [U, 256] int32, sets [N, W] and blocked [M, W] int64: its masks (see
    `model.genesis.gate.automaton.MaskTables`). replacement [F] int32: where in a row of each automaton the transition
    of U+FFFD is.
    """

    utf8: Tensor | None
    automaton: AutomatonTables
    byte_sets: Tensor
    sets: Tensor
    blocked: Tensor
    replacement: Tensor


@dataclass(frozen=True)
class Sampling:
    """How bytes are drawn, on one device.

    settings [3] float64: temperature, the number of most probable bytes that stay, and the mass of them that does.
    clocks [N, all rows, 256] float64: exponential random numbers of step t at t mod N; None takes the likeliest byte.
    index [B] int64: which of all rows these are.
    ranked: whether the last two settings take anything away.
    """

    settings: Tensor
    clocks: Tensor | None
    index: Tensor
    ranked: bool


@dataclass(frozen=True)
class Choice:
    """Where B rows stand, and what was chosen: all of it written in place. N slots, step t in slot t mod N.

    step [B] int64: the number of the next; utf8 [B] int32; node [B] and registers [B, F] int32; stuck [B] bool: rows
    in which the gate blocks nothing, and that must not end. chosen [B] int64. out [N, B] int16: the byte, and
    MUST_NOT_END after it, FLAGGED where the gate took `least_mass` of the probability, and BROKEN where there was none
    to choose.
    order [B, 256] float32 and mass [B, 256] float64: what lanes of a program tell each other.
    seen [N, B, 256] float32, seen_node [N, B], seen_registers [N, B, F] int32: what the gate masked, and where; None
    for none, and nothing is flagged.
    """

    step: Tensor
    utf8: Tensor
    node: Tensor
    registers: Tensor
    stuck: Tensor
    chosen: Tensor
    out: Tensor
    order: Tensor
    mass: Tensor
    seen: Tensor | None = None
    seen_node: Tensor | None = None
    seen_registers: Tensor | None = None
    least_mass: float = 0.0

    @staticmethod
    def begin(
        utf8: Tensor, node: Tensor, registers: Tensor, stuck: Tensor, slots: int, least_mass: float | None
    ) -> "Choice":
        """Of rows that stand there, at step 0, in tensors of its own; with `seen` where there is a least mass."""
        (B, F), device = registers.shape, registers.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        kept = ()
        if least_mass is not None:
            kept = zeros(slots, B, 256, dtype=torch.float32), zeros(slots, B), zeros(slots, B, F), least_mass
        states = (each.to(torch.int32, copy=True).contiguous() for each in (utf8, node, registers))
        chosen, out = zeros(B, dtype=torch.long), zeros(slots, B, dtype=torch.int16)
        shared = zeros(B, 256, dtype=torch.float32), zeros(B, 256, dtype=torch.float64)
        return Choice(zeros(B, dtype=torch.long), *states, stuck.clone(), chosen, out, *shared, *kept)


def choose(logits: Tensor, rules: Rules, sampling: Sampling, choice: Choice) -> None:
    """Choose a byte of every row, and go one step on, without synchronisation.

    Args:
        logits: [B, 256] float32, contiguous.
        rules, sampling, choice: see there.
    """
    (B, F), slots = choice.registers.shape, len(choice.out)
    automaton, clocks = rules.automaton, sampling.clocks
    ranked = clocks is not None and sampling.ranked
    _choose[(B,)](
        logits, rules.utf8, automaton.next_node, automaton.outcome, automaton.sequences, automaton.lengths,
        automaton.columns, automaton.table, rules.byte_sets, rules.sets, rules.blocked, rules.replacement,
        sampling.settings, clocks, sampling.index, choice.step, choice.utf8, choice.node, choice.registers,
        choice.stuck, choice.chosen, choice.out, choice.order, choice.mass, choice.seen, choice.seen_node,
        choice.seen_registers, choice.least_mass, B, 0 if clocks is None else clocks.shape[1], slots, F,
        automaton.columns.shape[1], automaton.sequences.shape[1], rules.sets.shape[1],
        rules.utf8 is not None, F > 0, triton.next_power_of_2(max(F, 1)), clocks is not None, ranked,
        F > 0 and choice.seen is not None, OTHERS, num_warps=8 if ranked else 4, **decode.launch(logits),
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _either(a, b):
        return a | b

    @triton.jit
    def _choose(
        logits_at, utf8_at, next_node_at, outcome_at, sequences_at, lengths_at, columns_at, table_at, byte_sets_at,
        sets_at, blocked_at, replacement_at, settings_at, clocks_at, index_at, steps_at, utf8_states_at, nodes_at,
        registers_at, stuck_at, chosen_at, out_at, order_at, mass_at, seen_at, seen_nodes_at, seen_registers_at,
        least_mass, B, TOTAL, SLOTS, F, C, M, W, UTF8: tl.constexpr, GATE: tl.constexpr, LANES: tl.constexpr,
        DRAW: tl.constexpr, RANKED: tl.constexpr, SEEN: tl.constexpr, OTHERS: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        if EARLY:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        row, lane, f = tl.program_id(0), tl.arange(0, 256), tl.arange(0, LANES)
        step = tl.load(steps_at + row)
        slot = (step % SLOTS) * B + row
        x = tl.load(logits_at + row * 256 + lane)
        x = tl.where(x == x, x, float("-inf"))
        if DRAW:
            number = (step % SLOTS) * TOTAL + tl.load(index_at + row)
            clock = tl.maximum(tl.load(clocks_at + number * 256 + lane), 2.2250738585072014e-308)
            temperature = tl.load(settings_at)
        if UTF8:
            utf8 = tl.load(utf8_states_at + row)
            x = tl.where(tl.load(utf8_at + utf8 * 256 + lane) < 0, float("-inf"), x)
        flags = 0
        if GATE:
            node = tl.load(nodes_at + row)
            register = tl.load(registers_at + row * F + f, f < F, other=0)
            stuck = tl.load(stuck_at + row).to(tl.int32)
            head = tl.load(table_at + register, f < F, other=0)
            can_become = tl.load(byte_sets_at + node * 256 + lane)
            left = tl.full([256], 0, tl.int64)
            for w in range(W):
                words = tl.load(blocked_at + head * W + w, f < F, other=0)
                left |= tl.load(sets_at + can_become * W + w) & ~tl.reduce(words, 0, _either)
            blocked = (left == 0) & (stuck == 0)
            if SEEN:
                peak = tl.max(x, 0)
                sound = tl.abs(peak) < float("inf")
                share = tl.exp(tl.where(sound, x, 0.0) - tl.where(sound, peak, 0.0))
                taken = tl.sum(tl.where(blocked, share, 0.0), 0) / tl.sum(share, 0)
                flags += (sound & (taken >= least_mass)).to(tl.int32) * 512
                tl.store(seen_at + slot * 256 + lane, x)
                tl.store(seen_nodes_at + slot, node)
                tl.store(seen_registers_at + slot * F + f, register, f < F)
            x = tl.where(blocked, float("-inf"), x)
        largest = tl.max(x, 0)
        broken = tl.abs(largest) == float("inf")
        x, largest = tl.where(broken, 0.0, x), tl.where(broken, 0.0, largest)
        if DRAW:
            rate = tl.exp((x.to(tl.float64) - largest.to(tl.float64)) / temperature)
            if RANKED:
                order, masses = order_at + row * 256, mass_at + row * 256
                tl.store(order + lane, x)
                tl.store(masses + lane, rate)
                tl.debug_barrier()
                ranks = tl.full([256, OTHERS], 0, tl.int32)
                before = tl.full([256, OTHERS], 0.0, tl.float64)
                for i in range(0, 256, OTHERS):
                    j = i + tl.arange(0, OTHERS)
                    other, mass = tl.load(order + j)[None, :], tl.load(masses + j)[None, :]
                    # Of equal ones the lower byte is first, as in a stable sort.
                    first = (other > x[:, None]) | ((other == x[:, None]) & (j[None, :] < lane[:, None]))
                    ranks += first.to(tl.int32)
                    before += tl.where(first, mass, 0.0)
                rank = tl.sum(ranks, 1)
                rate = tl.where(rank < tl.load(settings_at + 1), rate, 0.0)
                beyond = tl.sum(before, 1) >= tl.load(settings_at + 2) * tl.sum(rate, 0)
                rate = tl.where(beyond & (rank > 0), 0.0, rate)
            byte = tl.argmax(rate / clock, 0)
        else:
            byte = tl.argmax(x, 0)
        byte = tl.where(broken, 0, byte.to(tl.int32))
        flags += broken.to(tl.int32) * 1024
        tl.debug_barrier()  # what is written over below, all have read
        tl.store(chosen_at + row, byte.to(tl.int64))
        tl.store(steps_at + row, step + 1)
        if UTF8:
            tl.store(utf8_states_at + row, tl.maximum(tl.load(utf8_at + utf8 * 256 + byte), 0))
        if GATE:
            outcome = tl.load(outcome_at + node * 256 + byte)
            node = tl.load(next_node_at + node * 256 + byte)
            for i in range(tl.load(lengths_at + outcome)):
                symbol = tl.load(sequences_at + outcome * M + i)
                value = tl.load(table_at + register + tl.load(columns_at + f * C + symbol, f < F, other=0), f < F, 0)
                register = tl.where(value < 0, ~value, value)
            column = tl.where(node > 0, tl.load(replacement_at + f, f < F, other=0), 1)
            end = tl.load(table_at + register + column, f < F, other=0)
            flags += tl.maximum(tl.max((end < 0).to(tl.int32), 0), stuck) * 256
            tl.store(nodes_at + row, node)
            tl.store(registers_at + row * F + f, register, f < F)
        tl.store(out_at + slot, (byte + flags).to(tl.int16))
