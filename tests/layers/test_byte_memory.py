"""The byte memory against its formula in float64, along a stream, and what its gates let it keep."""

import pytest
import torch
import torch.nn.functional as F

from model.agiformer import initialise
from model.layers.byte_memory import ByteMemory
from model.layers.head import BEGIN
from tests.conftest import make_random_model

WIDTH, HEADS, DIM, KEY_DIM = 24, 3, 8, 12


def make(
    rule: str = "delta", seed: int = 0, gates: float = 2.0, span: int = 4, dim: int = DIM, text: int = 0
) -> ByteMemory:
    torch.manual_seed(seed)
    memory = ByteMemory(WIDTH, HEADS - text, dim, KEY_DIM, rule, span, text)
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


def reference(memory: ByteMemory, hidden, previous, told=None):
    """The formula, byte by byte, in float64; x[t] is the byte that hidden[t] predicts. Of told bytes [B, L] the text
    heads write nothing."""
    w = {name: p.detach().double() for name, p in memory.named_parameters()}
    rows, length, _ = hidden.shape
    N, s = memory.span, memory.STRETCH
    logits = torch.zeros(rows, length, 256, dtype=torch.float64)
    for row in range(rows):
        x = previous[row, 1:].tolist()
        for h in range(HEADS):
            part, keyed = slice(h * DIM, (h + 1) * DIM), slice(h * KEY_DIM, (h + 1) * KEY_DIM)
            M, z = torch.zeros(KEY_DIM, DIM, dtype=torch.float64), torch.zeros(KEY_DIM, dtype=torch.float64)
            keys, reads = [], []
            for t in range(length):
                u = hidden[row, t].double()
                u = u / (u.square().mean() + 1e-6).sqrt()
                q, k = w["queries.weight"][keyed] @ u, w["keys.weight"][keyed] @ u
                gates = w["gates.weight"] @ u + w["gates.bias"]
                write, read = gates[h], gates[HEADS + h]
                beta = ((1 + 2 * s) * torch.sigmoid(write) - s).clamp(0, 1)
                if memory.rule == "delta":
                    q, k = q / q.norm(), k / k.norm()
                else:
                    q, k = F.elu(q) + 1, F.elu(k) + 1
                if told is not None and h >= memory.facts and told[row, max(0, t - N) : t].any():
                    beta = torch.zeros_like(beta)
                if t >= N:
                    value = sum(w["values.weight"][257 * j + x[t - N + j], part] for j in range(N)) / N**0.5
                    key = keys[t - N]
                    if memory.rule == "delta":
                        M = M + beta * torch.outer(key, value - key @ M)
                    else:
                        M, z = M + beta * torch.outer(key, value), z + beta * key
                out = q @ M if memory.rule == "delta" else q @ M / (q @ z + 1e-6)
                keys.append(k)
                reads.append(2 * torch.sigmoid(read) * out)
                for j in range(min(N, t + 1)):
                    # The first block of columns is of the read at the byte itself.
                    columns = slice(j * HEADS * DIM + h * DIM, j * HEADS * DIM + (h + 1) * DIM)
                    logits[row, t] += w["output.weight"][:, columns] @ reads[t - j]
    return logits


@pytest.mark.parametrize("rule", ["delta", "hebbian"])
@pytest.mark.parametrize(("span", "text"), [(1, 0), (2, 1), (4, 3), (7, 0)])
def test_it_is_the_formula_in_float64(rule, span, text):
    """Some bytes are told: neither what is written of them nor one span that only touches them reaches a text head."""
    memory = make(rule, span=span, text=text)
    hidden, previous = stream(90)
    told = torch.zeros(previous.shape, dtype=torch.bool)
    told[0, 20], told[0, 40:60], told[1, 0], told[1, 89] = True, True, True, True
    found, _ = memory(hidden, previous, told=told)
    expected = reference(memory, hidden, previous, told)
    assert memory(hidden[:0], previous[:0], told=told[:0])[0].shape == (0, 90, 256)
    if text:
        assert (expected - reference(memory, hidden, previous)).abs().max() > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert expected[:, span:].abs().max() > 0.5 and (expected[:, :span] == 0).all()


@pytest.mark.parametrize("rule", ["delta", "hebbian"])
@pytest.mark.parametrize("span", [1, 4])
@pytest.mark.parametrize("cuts", [(1,), (2, 3, 40), (64,), (65, 66, 67, 68, 69, 70)])
def test_a_state_carries_it_across_any_split(rule, span, cuts):
    memory = make(rule, span=span)
    hidden, previous = stream(100)
    whole, end = memory(hidden, previous)
    state, parts = None, []
    for start, stop in zip((0, *cuts), (*cuts, 100)):
        before = None if state is None else state.clone()
        part, after = memory(hidden[:, start:stop], previous[:, start:stop], state)
        if before is not None:  # a state is replaced, not written into
            assert all(torch.equal(a, b) for a, b in zip(before.tensors(), state.tensors()))
        state = after
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    for a, b in zip(state.tensors(), end.tensors()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("span", [1, 4])
def test_before_anything_is_learned_a_context_recalls_what_followed_it(span):
    """As it is made, only its votes are zero: given an output, the same state gives the bytes that followed."""
    memory = make(span=span, dim=48)
    initialise(memory)
    assert torch.equal(memory.keys.weight, memory.queries.weight)
    hidden, previous = stream(18)
    assert (memory(hidden, previous)[0] == 0).all()
    with torch.no_grad():
        for j in range(span):
            # The vote for place j of a span: from the read j bytes ago, by the embeddings of that place.
            columns = slice(j * memory.values.embedding_dim, (j + 1) * memory.values.embedding_dim)
            memory.output.weight[:, columns] = memory.values.weight[257 * j : 257 * j + 256]
        memory.gates.bias[:HEADS] = 20.0  # writes everything, fully
        memory.gates.bias[HEADS:] = -200.0  # and reads nothing but at byte 12
    hidden[:, 12] = hidden[:, 6]  # a context comes again, that bytes previous[:, 7:] followed
    h = torch.nn.functional.rms_norm(hidden[0, 12], (WIDTH,))
    with torch.no_grad():
        memory.gates.weight[HEADS:] = 400 * h / h.square().sum()
    found, _ = memory(hidden, previous)
    for j in range(span):
        assert found[0, 12 + j].argmax() == previous[0, 7 + j], j


def test_what_is_not_written_wears_nothing_off():
    """A gate that is shut is exactly 0: after 2000 bytes of other text the memory is what it was, to the bit."""
    memory = make(gates=0.0)
    hidden, previous = stream(50)
    _, state = memory(hidden, previous)
    with torch.no_grad():
        memory.gates.bias[:HEADS] = -2.0  # where the stretched sigmoid is below 0
    hidden, previous = stream(2000, seed=2)
    _, later = memory(hidden, previous, state)
    assert torch.equal(later.M, state.M)
    assert not torch.equal(later.keys, state.keys)


def test_plasticity_does_not_reach_it():
    model = make_random_model()
    x = torch.randint(0, 256, (1, 40))
    hidden = model.head.states(torch.randn(1, 10, 32), model.previous_bytes(x)).flatten(1, 2)
    votes = []
    for alpha in (0.0, 1.0):
        model.set_plasticity(alpha)
        votes.append(model.head.memory(hidden, x)[1].M)
    assert torch.equal(*votes) and votes[0].abs().max() > 0.01


def test_it_says_what_it_writes():
    memory = make()
    hidden, previous = stream(30)
    writes = []
    memory(hidden, previous, writes=writes)
    (beta,) = writes
    gates = F.linear(torch.nn.functional.rms_norm(hidden, (WIDTH,), eps=1e-6), memory.gates.weight, memory.gates.bias)
    expected = (1.5 * gates[..., :HEADS].sigmoid() - 0.25).clamp(0, 1)
    torch.testing.assert_close(beta, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert beta.requires_grad and beta.min() == 0 and beta.max() == 1
    model, writes = make_random_model(recall_heads=3), []
    model(torch.randint(0, 256, (2, 41)), writes=writes)
    assert [each.shape for each in writes] == [(2, 3, 44)]  # whole patches
    without, writes = make_random_model(recall_heads=0), []
    without(torch.randint(0, 256, (2, 41)), writes=writes)
    assert not writes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_float32_under_autocast(dtype):
    memory = make()
    hidden, previous = stream(70)
    hidden = hidden.to(dtype)
    with torch.autocast("cpu", dtype):
        found, state = memory(hidden, previous)
    expected, _ = memory(hidden.float(), previous)
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


@torch.no_grad()
def test_what_text_heads_write_is_not_counted_and_nothing_fades():
    memory, (hidden, previous), writes = make(text=1), stream(60), []
    _, state = memory(hidden, previous, writes=writes)
    assert writes[0].shape == (2, HEADS - 1, 60)
    # What follows is not written by anybody.
    memory.gates.weight.zero_()
    memory.gates.bias[:HEADS] = -20.0
    _, after = memory(hidden, previous, state)
    assert torch.equal(after.M, state.M)
