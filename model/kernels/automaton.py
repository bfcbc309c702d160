"""Running a byte automaton over a batch: one decoder of UTF-8, and the registers of F automata over its symbols.

    o = outcome[node, byte];  node ← next_node[node, byte]              which symbols the byte completes
    for each symbol c of o:   v = table[register_f + columns[f, c]]     v < 0 says that a match is complete
                              register_f ← v if v ≥ 0 else ~v           ~v = −1 − v

A register is the place in `table` where its state's row begins, so that automata of different widths lie in one table.

Notable: every step depends on the one before it, so the kernel runs one program a row and waits for memory; what it
costs is latency, the same whatever the size of the tables. The other forms take all rows of a batch a byte at a time;
on the CPU NumPy's, whose calls cost a third of PyTorch's for a few rows.
"""

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from model.kernels.transforms import on_device_of

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch form does everywhere
    triton = None


@dataclass(frozen=True)
class AutomatonTables:
    """All int32, on one device.

    next_node, outcome [U, 256]: the decoder; node 0 is between characters.
    sequences [K, M], lengths [K]: classes of the symbols of an outcome, none of which is past its length.
    columns [F, C]: where in a row of automaton f a class has its transition.
    table [entries]: the rows of all automata.
    start [F]: registers before a text.
    """

    next_node: Tensor
    outcome: Tensor
    sequences: Tensor
    lengths: Tensor
    columns: Tensor
    table: Tensor
    start: Tensor

    def to(self, device: torch.device | str) -> "AutomatonTables":
        """The same tables on another device."""
        return AutomatonTables(*(getattr(self, field.name).to(device) for field in fields(self)))

    @cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """On the CPU: next_node, outcome, sequences, lengths, columns [C, F] and table as NumPy sees them."""
        tables = (self.next_node, self.outcome, self.sequences, self.lengths, self.columns.T, self.table)
        return tuple(each.numpy() for each in tables)

    def begin(self, rows: int) -> tuple[Tensor, Tensor]:
        """(node [rows], registers [rows, F]) before a text."""
        return torch.zeros(rows, dtype=torch.int32, device=self.start.device), self.start.repeat(rows, 1)


def blocked_targets(tables: AutomatonTables, x: Tensor, impl: str = "auto") -> Tensor:
    """Which bytes of a batch of texts complete a match, [B, L] bool.

    Args:
        tables: on the device of x.
        x: bytes [B, L], uint8; every row is the beginning of a text.
        impl: see `run`.
    """
    return run(tables, x, *tables.begin(len(x)), impl=impl)[0]


def run(
    tables: AutomatonTables, x: Tensor, node: Tensor, registers: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Read bytes, without synchronisation on CUDA.

    Args:
        tables: on the device of x.
        x: bytes [B, L], uint8, L ≥ 0.
        node, registers: [B] and [B, F] int32, where the rows are; see `AutomatonTables.begin`. They are not changed.
        impl: "numpy" (CPU), "torch" (any device), "triton" (CUDA, or Triton's interpreter); "auto" picks.

    Returns:
        hits [B, L] bool, and node and registers after the bytes.

    Raises:
        ValueError: x of another type or shape, or an impl that there is not.
    """
    if x.dim() != 2 or x.dtype != torch.uint8:
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}: accepted are uint8 bytes [B, L]")
    if impl not in ("auto", "numpy", "torch", "triton"):
        raise ValueError(f"impl={impl!r}: accepted are auto, numpy, torch, triton")
    if impl == "triton" and triton is None:
        raise ValueError("impl='triton': needs the package triton; accepted here are auto, numpy and torch")
    if impl == "auto":
        impl = "numpy" if not x.is_cuda else "triton" if triton is not None else "torch"
    if not x.numel() or not len(tables.start):
        return torch.zeros(x.shape, dtype=torch.bool, device=x.device), node, registers
    return {"numpy": _run_numpy, "torch": _run_torch, "triton": _run_triton}[impl](tables, x, node, registers)


def _run_numpy(tables: AutomatonTables, x: Tensor, node: Tensor, registers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    next_node, outcome, sequences, lengths, columns, table = tables.arrays
    node, registers = node.numpy(), registers.numpy()
    hits = np.zeros(x.shape, dtype=bool)
    for t, byte in enumerate(x.numpy().T):
        o = outcome[node, byte]
        node = next_node[node, byte]
        length = lengths[o]
        for i in range(length.max()):
            reads = length > i
            value = table[registers + columns[sequences[o, i]]]
            matched = value < 0
            hits[:, t] |= reads & matched.any(1)
            registers = np.where(reads[:, None], np.where(matched, ~value, value), registers)
    return torch.from_numpy(hits), torch.from_numpy(node), torch.from_numpy(registers)


def _run_torch(tables: AutomatonTables, x: Tensor, node: Tensor, registers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hits = []
    for byte in x.int().unbind(1):
        o = tables.outcome[node, byte]
        node = tables.next_node[node, byte]
        length = tables.lengths[o]
        hit = torch.zeros_like(length, dtype=torch.bool)
        for i in range(tables.sequences.shape[1]):  # to the longest that there is: which comes, the device knows
            reads = length > i
            value = tables.table[registers + tables.columns[:, tables.sequences[o, i]].T]
            matched = value < 0
            hit = hit | (reads & matched.any(1))
            registers = torch.where(reads.unsqueeze(1), torch.where(matched, ~value, value), registers)
        hits.append(hit)
    return torch.stack(hits, 1), node, registers


def _run_triton(tables: AutomatonTables, x: Tensor, node: Tensor, registers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, L = x.shape
    F, C = tables.columns.shape
    hits = torch.empty(B, L, dtype=torch.bool, device=x.device)
    node, registers = node.clone(), registers.contiguous().clone()
    with on_device_of(x):
        _run[(B,)](
            x.contiguous(), node, registers, hits, tables.next_node, tables.outcome, tables.sequences, tables.lengths,
            tables.columns, tables.table, L, F, C, tables.sequences.shape[1], triton.next_power_of_2(F), num_warps=1,
        )  # fmt: skip
    return hits, node, registers


if triton is not None:

    @triton.jit
    def _run(
        x,
        nodes,
        registers,
        hits,
        next_node,
        outcome,
        sequences,
        lengths,
        columns,
        table,
        L,
        F,
        C,
        M,
        LANES: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        f = tl.arange(0, LANES)
        inside = f < F
        node = tl.load(nodes + row)
        register = tl.load(registers + row * F + f, inside, other=0)
        for t in range(L):
            at = node * 256 + tl.load(x + row * L + t).to(tl.int32)
            o = tl.load(outcome + at)
            node = tl.load(next_node + at)
            length = tl.load(lengths + o)
            hit = length * 0
            for i in range(length):
                column = tl.load(columns + f * C + tl.load(sequences + o * M + i), inside, other=0)
                value = tl.load(table + register + column, inside, other=0)
                hit = tl.maximum(hit, tl.max((value < 0).to(tl.int32), 0))
                register = tl.where(value < 0, ~value, value)
            tl.store(hits + row * L + t, hit > 0)
        tl.store(nodes + row, node)
        tl.store(registers + row * F + f, register, inside)
