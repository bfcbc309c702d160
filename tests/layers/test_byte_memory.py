"""The byte memory against its formula in float64, along a stream, and what its gates let it keep."""

import pytest
import torch
import torch.nn.functional as F

from model.agiformer import initialise
from model.layers.byte_memory import LONGEST, SHORTEST, ByteMemory
from model.layers.head import BEGIN
from tests.conftest import make_random_model

WIDTH, HEADS, DIM, PATCH = 24, 3, 8, 4


def make(rule: str = "delta", seed: int = 0, gates: float = 2.0) -> ByteMemory:
    torch.manual_seed(seed)
    memory = ByteMemory(WIDTH, HEADS, DIM, rule, PATCH)
    initialise(memory)
    with torch.no_grad():
        memory.keys.weight.normal_(std=WIDTH**-0.5)
        memory.output.weight.normal_()
        memory.gates.weight.normal_(std=gates * WIDTH**-0.5)
    return memory


def stream(length: int, seed: int = 1, rows: int = 2):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, WIDTH, generator=generator)
    previous = torch.randint(0, 256, (rows, length), generator=generator)
    previous[:, 0] = BEGIN
    return hidden, previous


def reference(memory: ByteMemory, hidden, previous, alpha: float):
    """The formula, byte by byte, in float64."""
    w = {name: p.detach().double() for name, p in memory.named_parameters()}
    rows, length, _ = hidden.shape
    logits = torch.zeros(rows, length, 256, dtype=torch.float64)
    for row in range(rows):
        for h in range(HEADS):
            part = slice(h * DIM, (h + 1) * DIM)
            M, z = torch.zeros(DIM, DIM, dtype=torch.float64), torch.zeros(DIM, dtype=torch.float64)
            key = None
            for t in range(length):
                u = hidden[row, t].double()
                u = u / (u.square().mean() + 1e-6).sqrt()
                q, k = w["queries.weight"][part] @ u, w["keys.weight"][part] @ u
                gates = w["gates.weight"] @ u + w["gates.bias"]
                decay, write, read = gates[h], gates[HEADS + h], gates[2 * HEADS + h]
                decay = alpha ** (1 / PATCH) * torch.sigmoid(decay)
                s = memory.STRETCH
                beta = ((1 + 2 * s) * torch.sigmoid(write) - s).clamp(0, 1)
                v = w["values.weight"][previous[row, t], part]
                if memory.rule == "delta":
                    q, k = q / q.norm(), k / k.norm()
                else:
                    q, k = F.elu(q) + 1, F.elu(k) + 1
                M, z = decay * M, decay * z
                if key is not None and memory.rule == "delta":
                    M = M + beta * torch.outer(key, v - key @ M)
                elif key is not None:
                    M, z = M + beta * torch.outer(key, v), z + beta * key
                out = q @ M if memory.rule == "delta" else q @ M / (q @ z + 1e-6)
                logits[row, t] += w["output.weight"][:, part] @ (2 * torch.sigmoid(read) * out)
                key = k
    return logits


@pytest.mark.parametrize("rule", ["delta", "hebbian"])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_it_is_the_formula_in_float64(rule, alpha):
    memory = make(rule)
    hidden, previous = stream(90)
    found, _ = memory(hidden, previous, torch.tensor(alpha))
    expected = reference(memory, hidden, previous, alpha)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert expected[:, 1:].abs().max() > 0.5


@pytest.mark.parametrize("rule", ["delta", "hebbian"])
@pytest.mark.parametrize("cuts", [(1,), (2, 3, 40), (64,), (65, 66)])
def test_a_state_carries_it_across_any_split(rule, cuts):
    memory = make(rule)
    hidden, previous = stream(100)
    whole, end = memory(hidden, previous, torch.tensor(0.9))
    state, parts = None, []
    for start, stop in zip((0, *cuts), (*cuts, 100)):
        before = None if state is None else state.clone()
        part, after = memory(hidden[:, start:stop], previous[:, start:stop], torch.tensor(0.9), state)
        if before is not None:  # a state is replaced, not written into
            assert all(torch.equal(a, b) for a, b in zip(before.tensors(), state.tensors()))
        state = after
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    for a, b in zip(state.tensors(), end.tensors()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_before_anything_is_learned_a_context_recalls_what_followed_it():
    """As it is made, only its votes are zero: given an output, the same state gives the byte that followed."""
    memory = make()
    initialise(memory)
    assert torch.equal(memory.keys.weight, memory.queries.weight)
    hidden, previous = stream(12)
    assert (memory(hidden, previous, torch.tensor(1.0))[0] == 0).all()
    with torch.no_grad():
        memory.output.weight.copy_(memory.values.weight[:256] / DIM)
        memory.gates.bias[:HEADS] = 20.0  # forgets nothing
        memory.gates.bias[HEADS : 2 * HEADS] = 20.0  # writes everything, fully
    hidden[:, 10] = hidden[:, 6]  # a context comes again, that byte previous[:, 7] followed
    found, _ = memory(hidden, previous, torch.tensor(1.0))
    assert torch.equal(found[:, 10].argmax(-1), previous[:, 7])


def test_what_is_not_written_wears_nothing_off():
    """A gate that is shut is exactly 0: after 2000 bytes of other text the memory is what it was, to the bit."""
    memory = make(gates=0.0)
    with torch.no_grad():
        memory.gates.bias[:HEADS] = 200.0
    hidden, previous = stream(50)
    _, state = memory(hidden, previous, torch.tensor(1.0))
    with torch.no_grad():
        memory.gates.bias[HEADS : 2 * HEADS] = -5.0  # where the stretched sigmoid is below 0
    hidden, previous = stream(2000, seed=2)
    _, later = memory(hidden, previous, torch.tensor(1.0), state)
    assert torch.equal(later.M, state.M)
    assert not torch.equal(later.key, state.key)


def test_memory_lengths_and_plasticity():
    memory = ByteMemory(WIDTH, HEADS, DIM, "delta", PATCH)
    initialise(memory)
    lengths = 1 / (1 - memory.gates.bias[:HEADS].sigmoid().double())
    expected = torch.tensor([SHORTEST, (SHORTEST * LONGEST) ** 0.5, LONGEST]).double()
    torch.testing.assert_close(lengths, expected, rtol=0.05, atol=0)
    # At α = 0 a byte is voted for by the one before it alone.
    memory = make()
    hidden, previous = stream(20)
    changed, other = hidden.clone(), previous.clone()
    changed[:, :18], other[:, :19] = torch.randn(2, 18, WIDTH), 7
    last = memory(hidden, previous, torch.tensor(0.0))[0][:, -1]
    assert torch.equal(last, memory(changed, other, torch.tensor(0.0))[0][:, -1])
    assert not torch.allclose(
        memory(hidden, previous, torch.tensor(1.0))[0][:, -1], memory(changed, other, torch.tensor(1.0))[0][:, -1]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_float32_under_autocast(dtype):
    memory = make()
    hidden, previous = stream(70)
    hidden = hidden.to(dtype)
    with torch.autocast("cpu", dtype):
        found, state = memory(hidden, previous, torch.tensor(0.9))
    expected, _ = memory(hidden.float(), previous, torch.tensor(0.9))
    assert found.dtype == state.M.dtype == torch.float32
    assert torch.equal(found, expected)


def test_the_model_without_it_is_the_model_whose_votes_are_zero():
    with_memory, without = make_random_model(recall_heads=2, recall_dim=8), make_random_model(recall_heads=0)
    weights = with_memory.state_dict()
    names = [name for name in weights if name.startswith("head.memory.")]
    assert names and without.head.memory is None
    without.load_state_dict({name: tensor for name, tensor in weights.items() if name not in names})
    x = torch.randint(0, 256, (2, 75))
    expected = without(x)
    assert (with_memory(x) - expected).abs().max() > 0.1
    with torch.no_grad():
        with_memory.head.memory.output.weight.zero_()
    assert torch.equal(with_memory(x), expected)
