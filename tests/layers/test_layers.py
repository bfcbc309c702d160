"""The layers against independent references written from their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.layers.attention import AttentionState, WindowAttention, window_attention
from model.layers.encoder import ByteLatentEncoder
from model.layers.head import BEGIN, LocalAutoregressiveHead
from model.layers.memory import HebbianMemory
from model.layers.reasoning import RecurrentReasoningBlock
from model.layers.rotary import Rotary, rotate


def naive_window_attention(q, k, v, window, cached):
    """Every query on its own, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    for t in range(q.shape[1]):
        last = cached + t
        keys = slice(max(0, last - window + 1), last + 1)
        scores = torch.einsum("bhe,bshe->bhs", q[:, t], k[:, keys]) / math.sqrt(q.shape[-1])
        out[:, t] = torch.einsum("bhs,bshe->bhe", scores.softmax(-1), v[:, keys])
    return out


@pytest.mark.parametrize("cached", [0, 1, 5, 7])
@pytest.mark.parametrize("T", [1, 3, 8, 9, 16, 17, 24, 61])
def test_window_attention(T, cached):
    g = torch.Generator().manual_seed(T)
    q = torch.randn(2, T, 2, 8, generator=g)
    k, v = (torch.randn(2, cached + T, 2, 8, generator=g) for _ in range(2))
    found = window_attention(q, k, v, 8, cached)
    torch.testing.assert_close(found.double(), naive_window_attention(q, k, v, 8, cached), rtol=1e-5, atol=1e-6)


def test_no_quadratic_tensor_in_attention():
    """Peak memory of a long sequence grows with its length, not with the square: no mask or score of L × L."""
    layer = WindowAttention(16, 2, 8)
    rotary = Rotary(8, 10_000.0)
    sizes = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    sizes[-1] = max(sizes[-1], x.numel())
            return out

    for T in (512, 1024, 2048):
        sizes.append(0)
        x = torch.randn(1, T, 16, requires_grad=True)
        with Largest():
            layer(x, rotary(T, 0, x.device))[0].sum().backward()
    assert sizes[1] / sizes[0] < 2.2
    assert sizes[2] / sizes[1] < 2.2


@pytest.mark.parametrize("T", [5, 13, 40])
def test_gradients_reach_the_fused_attention_in_its_own_layout(T, monkeypatch):
    layouts = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(*inputs, **options):
        out = fused(*inputs, **options)
        stride = out.stride()
        out.register_hook(lambda grad: layouts.append((grad.stride(), stride)))
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, k, v = (torch.randn(2, T, 3, 8, requires_grad=True) for _ in range(3))
    heads = window_attention(q, k, v, 8)
    torch.cat([heads, torch.ones_like(heads)], -1).cos().sum().backward()  # its gradient is a slice
    assert layouts
    assert all(found == expected for found, expected in layouts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_any_layout_on_the_card(dtype):
    torch.manual_seed(0)
    inputs = torch.randn(3, 4, 96, 8, 64, device="cuda")
    grad = torch.randn(4, 96, 8, 128, device="cuda")

    def gradients(kind, joined):
        q, k, v = (x.to(kind).requires_grad_() for x in inputs)
        heads = window_attention(q, k, v, 64)
        outer = torch.cat([heads, heads.detach()], -1) if joined else heads
        outer.backward(grad[..., : outer.shape[-1]].to(kind))
        return torch.stack([x.grad.double() for x in (q, k, v)])

    exact = gradients(torch.float64, False)
    for joined in (True, False, True):  # the first call of a shape makes the plan that the later ones use
        torch.testing.assert_close(gradients(dtype, joined), exact, rtol=0.05, atol=0.05)


def test_attention_in_pieces_is_the_whole():
    torch.manual_seed(0)
    layer = WindowAttention(16, 2, 8)
    rotary = Rotary(8, 10_000.0)
    x = torch.randn(2, 40, 16)
    whole, _ = layer(x, rotary(40, 0, x.device))
    state, outs, start = None, [], 0
    for n in (1, 3, 9, 1, 20, 6):
        out, state = layer(x[:, start : start + n], rotary(n, start, x.device), state)
        outs.append(out)
        start += n
        assert isinstance(state, AttentionState)
        assert state.k.shape[1] <= 7
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-5, atol=1e-6)


def test_rotary_scores_depend_on_distance_only():
    rotary = Rotary(16, 10_000.0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i, j):
        cpu = torch.device("cpu")
        return (rotate(q, rotary(1, i, cpu)) * rotate(k, rotary(1, j, cpu))).sum().item()

    assert score(9, 2) == pytest.approx(score(107, 100), abs=1e-5)
    # Exact far out, where float32 angles would be off by whole radians.
    assert score(9, 2) == pytest.approx(score(10_000_007, 10_000_000), abs=1e-5)
    assert score(9, 2) != pytest.approx(score(9, 3), abs=1e-3)


def test_rotation_keeps_lengths_and_matches_complex_multiplication():
    x = torch.randn(1, 5, 2, 8)
    cos, sin = Rotary(8, 100.0)(5, 3, torch.device("cpu"))
    turned = rotate(x, (cos, sin))
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], -1))


@pytest.mark.parametrize("overlap", [0, 2, 4])
def test_encoder_is_a_causal_strided_convolution(overlap):
    torch.manual_seed(0)
    encoder = ByteLatentEncoder(16, 8, 4, overlap, 8, 10_000.0)
    x = torch.randint(0, 256, (2, 20))
    embedded = F.pad(encoder.embedding(x).transpose(1, 2), (overlap, 0))
    kernel = encoder.projection.weight.view(16, 4 + overlap, 8).transpose(1, 2)
    expected = F.conv1d(embedded, kernel, stride=4).transpose(1, 2)
    torch.testing.assert_close(encoder(x), expected, rtol=1e-5, atol=1e-5)
    previous = x[:, 8 - overlap : 8]
    torch.testing.assert_close(encoder(x[:, 8:], previous), expected[:, 2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_encoder_gradients_reach_every_byte_that_a_patch_sees(half):
    """Those of the convolution; under autocast the products are the same, of inputs rounded to bfloat16."""
    torch.manual_seed(0)
    encoder = ByteLatentEncoder(16, 8, 4, 2, 8, 10_000.0)
    x, grad = torch.randint(0, 5, (2, 20)), torch.randn(2, 5, 16)
    embedding, weight = (w.detach().clone().requires_grad_() for w in encoder.parameters())
    rounded = [w.bfloat16().float() if half else w for w in (embedding, weight)]
    kernel = rounded[1].view(16, 6, 8).transpose(1, 2)
    embedded = F.pad(F.embedding(x, rounded[0]).transpose(1, 2), (2, 0))
    expected = F.conv1d(embedded, kernel, stride=4).transpose(1, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = encoder(x)
    assert found.dtype == (torch.bfloat16 if half else torch.float32)
    (found.float() * grad).sum().backward()
    (expected * grad).sum().backward()
    bound = 0.02 if half else 1e-5
    for y, z in ((found, expected), (encoder.embedding.weight.grad, embedding.grad),
                 (encoder.projection.weight.grad, weight.grad)):  # fmt: skip
        assert (y.float() - z).abs().max() <= bound * z.abs().max()


def test_an_encoder_with_columns_is_an_encoder_each():
    """Every column projects the same patches to its own channels, behind those that are there."""
    torch.manual_seed(0)
    encoder = ByteLatentEncoder(16, 8, 4, 2, 8, 10_000.0)
    x = torch.randint(0, 256, (2, 20))
    previous = torch.randint(0, 256, (2, 2))
    before = encoder(x), encoder(x, previous)
    for width in (8, 24):
        encoder.add_column(width)
    for found, first, earlier in ((encoder(x), before[0], None), (encoder(x, previous), before[1], previous)):
        assert found.shape == (2, 5, 48) and torch.equal(found[..., :16], first)
        embedded = F.pad(encoder.embedding(x).transpose(1, 2), (2, 0))
        if earlier is not None:
            embedded = encoder.embedding(torch.cat([earlier, x], 1)).transpose(1, 2)
        weight = torch.cat([column.weight for column in encoder.columns]).view(32, 6, 8).transpose(1, 2)
        expected = F.conv1d(embedded, weight, stride=4).transpose(1, 2)
        torch.testing.assert_close(found[..., 16:], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["hebbian", "delta"])
def test_memory_is_the_formula_in_float64(rule):
    torch.manual_seed(0)
    memory = HebbianMemory(16, 2, rule)
    with torch.no_grad():
        memory.gates.weight.normal_()
    x, alpha = torch.randn(1, 20, 16), 0.7
    found, _ = memory(x, torch.tensor(alpha))
    W = memory.qkv.weight.double()
    gates = x.double() @ memory.gates.weight.double().T + memory.gates.bias.double()
    q, k, v = ((x.double() @ w.T).view(20, 2, 8) for w in W.chunk(3))
    expected = torch.empty(20, 2, 8, dtype=torch.float64)
    for h in range(2):
        M, z = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
        for t in range(20):
            decay = alpha * torch.sigmoid(gates[0, t, h])
            qt, kt, vt = q[t, h], k[t, h], v[t, h]
            if rule == "hebbian":
                qt, kt = F.elu(qt) + 1, F.elu(kt) + 1
                M, z = decay * M + torch.outer(kt, vt), decay * z + kt
                expected[t, h] = M.T @ qt / (qt @ z + 1e-6)
            else:
                qt, kt = qt / qt.norm(), kt / kt.norm()
                beta = torch.sigmoid(gates[0, t, 2 + h])
                M = decay * (torch.eye(8) - beta * torch.outer(kt, kt)) @ M + beta * torch.outer(kt, vt)
                expected[t, h] = M.T @ qt
    torch.testing.assert_close(found[0].double(), expected.flatten(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_memory_is_float32_under_autocast(dtype):
    torch.manual_seed(0)
    memory = HebbianMemory(16, 2)
    x = torch.randn(2, 70, 16).to(dtype)
    with torch.autocast("cpu", dtype):
        out, state = memory(x, torch.tensor(0.1))
        assert torch.nn.functional.linear(x, memory.qkv.weight).dtype == dtype  # autocast is really on
    assert out.dtype == state.M.dtype == state.z.dtype == torch.float32
    expected, _ = memory(x.float(), torch.tensor(0.1))
    assert torch.equal(out, expected)  # not a bit of it ran in half precision


def test_memory_does_not_overflow_where_half_precision_would():
    memory = HebbianMemory(16, 2)
    with torch.no_grad():
        memory.qkv.weight.mul_(300)
    with torch.autocast("cpu", torch.float16):
        out, state = memory(torch.randn(1, 300, 16) * 30, torch.tensor(1.0))
    assert state.M.abs().max() > 65504  # beyond float16
    assert torch.isfinite(out).all()


def test_memory_lengths_at_initialisation():
    memory = HebbianMemory(16, 4)
    decay = memory.log_decay(torch.randn(1, 3, 16), torch.tensor(1.0)).exp()[0, :, 0]
    torch.testing.assert_close(
        1 / (1 - decay), torch.tensor([4.0, 4 * 128 ** (1 / 3), 4 * 128 ** (2 / 3), 512.0]), rtol=1e-3, atol=1e-3
    )


def test_plasticity_zero_forgets_everything_at_once():
    memory = HebbianMemory(16, 2)
    x = torch.randn(1, 10, 16)
    changed = x.clone()
    changed[:, :9] += 1
    last, _ = memory(x, torch.tensor(0.0))
    other, _ = memory(changed, torch.tensor(0.0))
    assert torch.equal(last[:, 9], other[:, 9])
    remembered, _ = memory(changed, torch.tensor(1.0))
    assert not torch.allclose(memory(x, torch.tensor(1.0))[0][:, 9], remembered[:, 9])


def reasoning_block(steps=3):
    torch.manual_seed(0)
    block = RecurrentReasoningBlock(16, 32, steps)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return block


def test_a_halting_layer_that_somebody_listens_to_is_called():
    """model.sgm's directions and GENESIS's plugins read and change what a layer gives by hooks."""
    torch.manual_seed(0)
    block = RecurrentReasoningBlock(16, 24, 3)
    torch.nn.init.normal_(block.mlp.down.weight)
    z, called = torch.randn(2, 5, 16), []
    expected = block(z)
    hook = block.halt.register_forward_hook(lambda *seen: called.append(seen))
    assert torch.equal(block(z), expected) and len(called) == 3
    hook.remove()
    with block.halt.register_forward_hook(lambda layer, given, found: found + 100):  # p_halt is 1: nothing changes
        assert torch.equal(block(z), z)


def test_reasoning_is_its_formula():
    block = reasoning_block()
    z = torch.randn(2, 5, 16, dtype=torch.float64)
    block.double()
    expected = z
    for _ in range(3):
        n = expected / (expected.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        p = torch.sigmoid(n @ block.halt.weight.T + block.halt.bias)
        g = torch.sigmoid(n @ block.gate.weight.T + block.gate.bias)
        expected = expected + (1 - p) * g * (torch.relu(n @ block.mlp.up.weight.T) ** 2 @ block.mlp.down.weight.T)
    torch.testing.assert_close(block(z), expected)
    assert torch.equal(block(z, 0), z)
    torch.testing.assert_close(block(block(z, 1), 2), expected)


def test_halted_positions_stop_and_others_go_on():
    block = reasoning_block()
    z = torch.randn(1, 64, 16)
    _, p_halt = block.step(z)
    threshold = p_halt.median().item()
    stopped = (p_halt >= threshold).squeeze(-1)
    out = block(z, 4, halt_threshold=threshold)
    assert torch.equal(out[stopped], z[stopped])
    assert (out[~stopped] != z[~stopped]).any(-1).all()
    assert torch.equal(block(z, 4, halt_threshold=1.1), block(z, 4))


@pytest.mark.parametrize("rule", ["hebbian", "delta"])
def test_a_step_reads_fast_weights_with_its_own_query(rule):
    """Against the recurrence: at every position the matrix that the memory had there, read with the step's query."""
    torch.manual_seed(1)
    memory = HebbianMemory(16, 2, rule).double()
    memory.readable = True
    block = RecurrentReasoningBlock(16, 24, 2, heads=2).double()
    with torch.no_grad():
        for parameter in (*memory.parameters(), *block.parameters()):
            parameter.normal_(std=0.3)
    x, z = torch.randn(2, 2, 7, 16, dtype=torch.float64)
    # Split, so that the second call reads what the first has written.
    alpha = torch.tensor(0.9, dtype=torch.float64)
    _, first = memory(x[:, :3], alpha)
    _, second = memory(x[:, 3:], alpha, first)
    out = torch.cat([block(z[:, :3], read=first.read), block(z[:, 3:], read=second.read)], 1)

    _, k, v = F.linear(x, memory.qkv.weight).unflatten(-1, (3, 2, 8)).unbind(2)
    k = F.normalize(k, dim=-1) if rule == "delta" else F.elu(k) + 1
    gates = torch.sigmoid(x @ memory.gates.weight.T + memory.gates.bias)
    for row in range(2):
        M, norm = torch.zeros(2, 8, 8).double(), torch.zeros(2, 8).double()
        for t in range(7):
            decay = alpha * gates[row, t, :2]
            M, norm = decay[:, None, None] * M, decay[:, None] * norm + k[row, t]
            for h in range(2):
                value = v[row, t, h]
                if rule == "delta":
                    value = gates[row, t, 2 + h] * (value - k[row, t, h] @ M[h])
                M[h] += torch.outer(k[row, t, h], value)
            expected = z[row, t]
            for _ in range(2):
                n = expected / (expected.square().mean() + 1e-6).sqrt()
                query = (block.query.weight @ n).view(2, 8)
                query = F.normalize(query, dim=-1) if rule == "delta" else F.elu(query) + 1
                found = torch.einsum("he,hef->hf", query, M)
                if rule == "hebbian":
                    found = found / ((query * norm).sum(-1, keepdim=True) + 1e-6)
                found = (found / (found.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten()
                thought = torch.relu(block.mlp.up.weight @ n) ** 2 @ block.mlp.down.weight.T
                p = torch.sigmoid(block.halt.weight @ n + block.halt.bias)
                g = torch.sigmoid(block.gate.weight @ n + block.gate.bias)
                expected = expected + (1 - p) * g * (thought + block.recall.weight @ found)
            torch.testing.assert_close(out[row, t], expected, rtol=1e-6, atol=1e-8)


def test_steps_that_are_skipped_in_training():
    block = reasoning_block()
    block.skip = 2
    z = torch.randn(400, 3, 16)
    torch.manual_seed(2)
    halts = []
    out = block.train()(z, halts=halts)
    assert [p.shape for p in halts] == [(400, 3, 1)] * 3
    after = [block.eval()(z, k) for k in (1, 2, 3)]
    taken = torch.stack([(out - each).abs().amax((1, 2)) < 1e-6 for each in after])
    assert (taken.sum(0) == 1).all()  # a row takes one number of steps, at all its positions
    assert all(100 < count < 170 for count in taken.sum(1).tolist())
    # What a row does not think costs it nothing.
    assert torch.equal(torch.cat(halts, -1).eq(1).all(1).sum(-1), 2 - taken.int().argmax(0))
    assert torch.equal(block(z), after[2])  # and all of them when it is not trained


def test_thinking_steps_are_validated():
    with pytest.raises(ValueError, match="thinking_steps=-1"):
        reasoning_block()(torch.zeros(1, 1, 16), -1)


def test_head_is_a_gru_cell_over_the_patch():
    """Against torch.nn.GRUCell with the same weights, byte by byte."""
    torch.manual_seed(0)
    head = LocalAutoregressiveHead(16, 8)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    cell = torch.nn.GRUCell(24, 8)
    with torch.no_grad():
        cell.weight_ih.copy_(torch.eye(24))
        cell.bias_ih.zero_()
        cell.weight_hh.copy_(head.recurrent.weight)
        cell.bias_hh.copy_(head.recurrent.bias)
    latents = torch.randn(2, 3, 16)
    previous = torch.randint(0, 256, (2, 3, 4))
    previous[:, 0, 0] = BEGIN
    normed = latents / (latents.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    hidden = torch.tanh(head.initial(normed)).flatten(0, 1)
    expected = []
    for j in range(4):
        hidden = cell((head.bytes(previous[..., j]) + head.condition(normed)).flatten(0, 1), hidden)
        size = (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        expected.append(head.output(hidden / size).view(2, 3, 256))
    torch.testing.assert_close(head(latents, previous), torch.stack(expected, 2), rtol=1e-5, atol=1e-5)


def test_a_head_with_columns_adds_what_they_say():
    """Nothing at first, to the bit; then W norm(part) to the GRU's first state and inputs, each part by itself."""
    torch.manual_seed(0)
    head = LocalAutoregressiveHead(16, 8)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    latents, previous = torch.randn(2, 3, 16), torch.randint(0, 256, (2, 3, 4))
    before = head(latents, previous)
    for width in (4, 12):
        head.add_column(width)
    latents = torch.cat([latents, 100 * torch.randn(2, 3, 16)], -1)
    assert torch.equal(head(latents, previous), before)
    with torch.no_grad():
        for column in head.columns:
            column.weight.normal_(std=0.3)
    parts = [part / (part.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() for part in latents.split((16, 4, 12), -1)]
    more = sum(part @ column.weight.T for part, column in zip(parts[1:], head.columns))
    hidden, conditioned = head.begin(latents)
    torch.testing.assert_close(hidden, torch.tanh(head.initial(parts[0]) + more[..., :8]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(conditioned, head.condition(parts[0]) + more[..., 8:], rtol=1e-5, atol=1e-5)
