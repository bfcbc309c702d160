"""Running a byte automaton: a definition in plain Python, the NumPy and PyTorch forms, and the Triton kernel."""

import os
import random

import pytest
import torch

from model.genesis.gate.automaton import compile_policy
from model.genesis.gate.policy import Policy, Rule, load_policy
from model.kernels import automaton
from model.kernels.automaton import AutomatonTables, blocked_targets, run

CUDA = torch.cuda.is_available()
interpreter = pytest.mark.skipif(
    automaton.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the package triton, and TRITON_INTERPRET=1, which conftest sets where there is no CUDA device",
)
card = pytest.mark.skipif(not CUDA or automaton.triton is None, reason="needs a CUDA device and the package triton")


def random_tables(seed: int, U=5, K=6, M=4, F=3, C=7) -> AutomatonTables:
    """Of no language: every entry is drawn, so that each matters."""
    g = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=g, dtype=torch.int32)

    widths, states, base, parts, start = [9, 8, 11][:F], [4, 6, 1][:F], 0, [], []
    columns = torch.stack([1 + draw(width - 1, C) for width in widths])
    for width, count in zip(widths, states):
        place = base + width * draw(count, count, width)
        parts.append(torch.where(torch.rand(count, width, generator=g) < 0.3, ~place, place).flatten())
        start.append(base)
        base += width * count
    return AutomatonTables(
        draw(U, U, 256), draw(K, U, 256), draw(C, K, M), torch.arange(K, dtype=torch.int32) % (M + 1), columns,
        torch.cat(parts), torch.tensor(start, dtype=torch.int32),
    )  # fmt: skip


def definition(tables: AutomatonTables, x: torch.Tensor, node: torch.Tensor, registers: torch.Tensor) -> tuple:
    """One byte and one symbol after the other."""
    hits = torch.zeros(x.shape, dtype=torch.bool)
    node, registers = node.clone(), registers.clone()
    for b, row in enumerate(x.tolist()):
        for t, byte in enumerate(row):
            outcome = tables.outcome[node[b], byte]
            node[b] = tables.next_node[node[b], byte]
            for symbol in tables.sequences[outcome, : tables.lengths[outcome]]:
                for f in range(len(tables.start)):
                    value = tables.table[registers[b, f] + tables.columns[f, symbol]]
                    hits[b, t] |= bool(value < 0)
                    registers[b, f] = value if value >= 0 else -1 - value
    return hits, node, registers


def check(tables: AutomatonTables, x: torch.Tensor, impl: str, device: str = "cpu") -> None:
    """Whole, in two parts, and byte by byte, from the start."""
    expected = definition(tables, x, *tables.begin(len(x)))
    there = tables.to(device)
    on = x.to(device)
    begin = there.begin(len(x))
    kept = [each.clone() for each in begin]
    for cuts in ([], [x.shape[1] // 3], range(1, x.shape[1])):
        state, hits = begin, []
        for piece in on.tensor_split(list(cuts), dim=1):
            hit, *state = run(there, piece, *state, impl=impl)
            hits.append(hit)
        assert torch.equal(torch.cat(hits, 1).cpu(), expected[0])
        assert all(torch.equal(a.cpu(), b) and a.dtype == torch.int32 for a, b in zip(state, expected[1:]))
    assert all(torch.equal(a, b) for a, b in zip(begin, kept))  # what is given is not changed
    assert torch.equal(blocked_targets(there, on, impl).cpu(), expected[0]) and expected[0].any()


def bytes_of(seed: int, B: int, L: int) -> torch.Tensor:
    return torch.randint(256, (B, L), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


SHAPES = [(1, 1, 40), (2, 3, 25), (3, 5, 13), (3, 1, 7)]  # F, B, L


@pytest.mark.parametrize("impl", ["numpy", "torch"])
@pytest.mark.parametrize(("F", "B", "L"), SHAPES)
def test_definition_on_the_cpu(impl, F, B, L):
    check(random_tables(F, F=F), bytes_of(B, B, L), impl)


@interpreter
@pytest.mark.parametrize(("F", "B", "L"), SHAPES)
def test_kernel_in_the_interpreter_is_the_definition(F, B, L):
    check(random_tables(F, F=F), bytes_of(B, B, L), "triton")


@card
@pytest.mark.parametrize(("F", "B", "L"), SHAPES)
@pytest.mark.parametrize("impl", ["triton", "torch", "auto"])
def test_on_the_card_is_the_definition(F, B, L, impl):
    check(random_tables(F, F=F), bytes_of(B, B, L), impl, "cuda")


def real_texts() -> tuple[AutomatonTables, torch.Tensor]:
    """A policy with matches in most rows: Turkish, emoji, look-alikes, binary."""
    rules = [
        Rule("c", f"{i}", "phrase", text, bool(i % 2)) for i, text in enumerate(["sig", "kus", "fi", "😀a", "ab cd"])
    ]
    tables = compile_policy(Policy((*rules, *load_policy().rules))).tables()
    rng = random.Random(1)
    pieces = [
        "sığ",
        "KUŞ ",
        "kuşlar",
        "ﬁ",
        "😀",
        "a",
        "ab\n",
        "CD.",
        "漢",
        "4111 1111 1111 1111",
        b"\xff",
        b"\xe2\x80",
        "\u200b",
    ]
    rows = [
        b"".join(p if isinstance(p, bytes) else p.encode() for p in rng.choices(pieces, k=40))[:90] for _ in range(8)
    ]
    return tables, torch.tensor([list(row) for row in rows], dtype=torch.uint8)


@pytest.mark.parametrize("impl", ["numpy", "torch", pytest.param("triton", marks=interpreter)])
def test_a_policy_on_texts(impl):
    tables, x = real_texts()
    expected = definition(tables, x, *tables.begin(len(x)))
    assert expected[0].any(1).all()
    found = run(tables, x, *tables.begin(len(x)), impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@card
def test_a_large_batch_on_the_card_without_waiting():
    tables, x = real_texts()
    x = x.repeat(40, 12)
    expected = blocked_targets(tables, x)
    there, on = tables.to("cuda"), x.cuda()
    blocked_targets(there, on)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = blocked_targets(there, on)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("impl", ["auto", "numpy", "torch", pytest.param("triton", marks=interpreter)])
def test_nothing_to_read_and_nothing_to_find(impl):
    tables = random_tables(0)
    node, registers = tables.begin(3)
    hits, *state = run(tables, torch.empty(3, 0, dtype=torch.uint8), node, registers, impl)
    assert hits.shape == (3, 0) and torch.equal(state[0], node) and torch.equal(state[1], registers)
    assert blocked_targets(tables, torch.empty(0, 5, dtype=torch.uint8), impl).shape == (0, 5)
    empty = compile_policy(Policy()).tables()
    assert not blocked_targets(empty, bytes_of(0, 2, 9), impl).any()


def test_bad_arguments_are_named(monkeypatch):
    tables = random_tables(0)
    for x in (torch.zeros(3, dtype=torch.uint8), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"^x is .*accepted are uint8 bytes \[B, L\]"):
            blocked_targets(tables, x)
    with pytest.raises(ValueError, match="impl='magic': accepted are auto, numpy, torch, triton"):
        blocked_targets(tables, bytes_of(0, 1, 1), "magic")
    monkeypatch.setattr(automaton, "triton", None)
    with pytest.raises(ValueError, match="impl='triton': needs the package triton; accepted here are"):
        blocked_targets(tables, bytes_of(0, 1, 1), "triton")
