"""The kernels of a decoding step against the layers that they stand for, in float64."""

import os

import pytest
import torch
import torch.nn.functional as F

from model.kernels import decode
from model.kernels.recurrent import recurrent_delta, recurrent_hebbian
from model.layers.attention import window_attention
from model.layers.encoder import ByteLatentEncoder
from model.layers.head import LocalAutoregressiveHead
from model.layers.hull import ConvexPetals
from model.layers.norm import NORM_EPS, READ_EPS, rms_norm, rms_norm_heads
from model.layers.rotary import Rotary, rotate

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = 2e-6  # of values of about 1, and of sums of some hundred of them
pytestmark = pytest.mark.skipif(
    decode.triton is None or (not CUDA and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs the package triton, and a CUDA device or TRITON_INTERPRET=1, which conftest sets where there is none",
)


@pytest.fixture(params=["as it is", "small tiles"])
def tiles(request, monkeypatch):
    """With small tiles every loop goes round, and every program has rows that there are not."""
    if request.param == "small tiles":
        monkeypatch.setattr(decode, "PROGRAMS", 3)
        monkeypatch.setattr(decode, "TILE", 256)
        monkeypatch.setattr(decode, "BATCH", 2)
        monkeypatch.setattr(decode, "ROWS", 32)
    elif not CUDA:  # a program for each row takes the interpreter long
        monkeypatch.setattr(decode, "PROGRAMS", 8)
        monkeypatch.setattr(decode, "ROWS", 64)


def draw(*shape, seed=0, std=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE) * std


def padded(x, width=3):
    """x [B, n] in rows that are farther apart than they are long, NaN between them."""
    return torch.cat([x, torch.full_like(x[:, :1], torch.nan).expand(-1, width)], 1)[:, : x.shape[1]]


def agree(found, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


LINEAR = {
    "plain": {},
    "norm and bias": {"norm": NORM_EPS, "bias": True},
    "norm, some tanh": {"norm": 0.1, "bias": True, "tanh": 5},
    "squared ReLU, gated, added": {"act": decode.SQUARED_RELU, "add": True, "gates": True},
    "gated units, added": {"act": decode.SWIGLU, "add": True},
}


@pytest.mark.parametrize(("B", "R", "D"), [(1, 13, 70), (3, 10, 16), (9, 12, 33)])
@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR)
def test_linear(options, B, R, D, tiles):
    options = dict(options)
    act = options.get("act", decode.NONE)
    x, weight = padded(draw(B, 2 * D if act == decode.SWIGLU else D)), draw(R, D, std=D**-0.5)
    bias = options["bias"] = draw(R) if "bias" in options else None
    gates = options["gates"] = padded(draw(B, R + 1)) if "gates" in options else None
    out = padded(draw(B, R, seed=1))
    seen = x.double()
    if "norm" in options:
        seen = rms_norm(seen, options["norm"])
    if act == decode.SQUARED_RELU:
        seen = seen.relu().square()
    elif act == decode.SWIGLU:
        seen = F.silu(seen[:, :D]) * seen[:, D:]
    expected = F.linear(seen, weight.double(), None if bias is None else bias.double())
    if gates is not None:
        open_gates = gates.double().sigmoid()
        expected *= open_gates[:, :R] * (1 - open_gates[:, R:])
    if "add" in options:
        expected += out.double()
    turned = options.get("tanh", 0)
    expected[:, :turned] = expected[:, :turned].tanh()
    decode.linear(x, weight, out, **options)
    agree(out, expected)


@pytest.mark.parametrize("tau", [1e-3, 0.1, 30.0])
@pytest.mark.parametrize(("B", "n", "width", "D"), [(1, 4, 16, 9), (3, 1, 5, 8), (2, 3, 21, 10)])
def test_hull_down(B, n, width, D, tau, tiles):
    petals = ConvexPetals(D, n, width).to(DEVICE)
    with torch.no_grad():
        petals.down.copy_(draw(n, width, D))
        petals.log_tau.fill_(tau).log_()
    hidden, out = padded(draw(B, n * width)), draw(B, D)
    exact = petals.double()
    outputs = torch.einsum(
        "bnw,nwd->nbd", hidden.double().relu().square().unflatten(1, (n, width)), exact.down.clamp(min=0)
    )
    falling = torch.einsum(
        "bnw,nwd->nbd", hidden.double().relu().square().unflatten(1, (n, width)), -exact.down.clamp(max=0)
    )
    scale = n * max(outputs.max().item(), falling.max().item())
    means = [torch.logsumexp(o * exact.log_tau.exp(), 0) - torch.tensor(n).log() for o in (outputs, falling)]
    expected = out + n * (means[0] - means[1]) / exact.log_tau.exp()
    down = petals.down.detach().float().permute(2, 0, 1).contiguous()
    decode.hull_down(hidden, down, torch.tensor([tau], device=DEVICE), out)
    assert ((out - expected).abs() <= 1e-6 * scale).all()


@pytest.mark.parametrize("rule", ["hebbian", "delta"])
@pytest.mark.parametrize(("B", "H", "E", "W", "alpha"), [(1, 2, 6, 4, 0.97), (2, 1, 16, 1, 0.0), (1, 1, 4, 5, 0.5)])
def test_mix(B, H, E, W, alpha, rule, monkeypatch):
    """Position after position, from nothing until long after the window is full, against all of them at once."""
    if W == 5:
        monkeypatch.setattr(decode, "KEYS", 8)  # 2 keys of 4 channels at once
    T, D, delta = 2 * W + 3, H * E, rule == "delta"
    heads = draw(B, T, 7 * D + (2 if delta else 1) * H)
    if not alpha:  # features of e⁻¹² leave a normaliser that is smaller than its ε
        heads[..., 3 * D : 5 * D] -= 12
    q, k, v, memory_q, memory_k, memory_v, gate = heads[..., : 7 * D].double().unflatten(-1, (7, H, E)).unbind(2)
    cos, sin = Rotary(E, 100.0)(T, 0, heads.device)
    phases = cos.double(), sin.double()
    attended = window_attention(rotate(rms_norm(q), phases), rotate(rms_norm(k), phases), v, W).flatten(2)
    rates = heads[..., 7 * D :].double().unflatten(-1, (-1, H)).permute(2, 0, 3, 1)
    log_decay = torch.tensor(alpha).log().double() + F.logsigmoid(rates[0])
    M, z = (draw(B, H, E, E), draw(B, H, E).abs())
    by_head = [x.transpose(1, 2) for x in (memory_q, memory_k, memory_v)]
    state = M.double(), z.double()
    if delta:
        by_head[:2] = [F.normalize(x, dim=-1) for x in by_head[:2]]
        recalled, last = recurrent_delta(*by_head, log_decay, rates[1].sigmoid(), state)
    else:
        by_head[:2] = [F.elu(x) + 1 for x in by_head[:2]]
        recalled, last = recurrent_hebbian(*by_head, log_decay, state)
    eps = NORM_EPS, READ_EPS if delta else NORM_EPS
    recalled = rms_norm_heads(recalled.transpose(1, 2).flatten(2), H, eps[1])
    expected = torch.lerp(recalled, rms_norm_heads(attended, H), gate.flatten(2).sigmoid())
    keys, values = torch.full((2, B, H, W, E), 3.0, device=DEVICE)  # what was there before is not looked at
    position, plasticity, out = torch.tensor(0, device=DEVICE), torch.tensor(alpha, device=DEVICE), draw(B, D)
    for t in range(T):
        position.add_(1)
        now = cos[t, 0], sin[t, 0]
        decode.mix(
            padded(heads[:, t]), now, position, plasticity, keys, values, M, z, out, delta=delta, eps=eps
        )  # fmt: skip
        agree(out, expected[:, t], 1e-5)
    for found, reference in zip((M, z), last):
        agree(found, reference, 1e-5)


@pytest.mark.parametrize(("P", "overlap", "B"), [(4, 2, 2), (1, 1, 1), (3, 0, 3), (2, 2, 1)])
def test_encode(P, overlap, B, tiles):
    D, byte_dim, E, T = 10, 6, 8, 4
    encoder = ByteLatentEncoder(D, byte_dim, P, overlap, E, 10_000.0).to(DEVICE).double()
    projections = encoder.projection.weight.unflatten(1, (P + overlap, byte_dim)).unbind(1)
    table = torch.stack([encoder.embedding.weight @ each.t() for each in projections]).float().detach()
    x = torch.randint(0, 256, (B, overlap + T * P), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        expected = encoder(x[:, overlap:], x[:, :overlap])
    known, out = torch.zeros(B, overlap + P, dtype=torch.long, device=DEVICE), draw(B, D)
    known[:, :overlap] = x[:, :overlap]
    phases = draw(E // 2), draw(E // 2)
    start = 12_345_678  # far beyond where float32 knows the angle
    position = torch.tensor(start, device=DEVICE)
    frequencies = encoder.rotary._frequencies.to(DEVICE)
    for t in range(T):
        patch = x[:, overlap + t * P : overlap + (t + 1) * P]
        known[:, overlap : overlap + P - 1] = patch[:, : P - 1]
        decode.encode(patch[:, -1], known, table, frequencies, position, out, phases, P)
        agree(out, expected[:, t], 1e-6)
        for found, reference in zip(phases, encoder.phases(1, start + t, position.device)):
            agree(found, reference.flatten(), 1e-6)
        assert position == start + t + 1
        assert torch.equal(known[:, :overlap], x[:, (t + 1) * P : (t + 1) * P + overlap])


@pytest.mark.parametrize(("B", "C"), [(1, 8), (3, 12)])
def test_read_byte(B, C, tiles):
    head = LocalAutoregressiveHead(10, C).to(DEVICE)
    x = torch.tensor([256, 0, 255][:B], device=DEVICE)
    hidden, conditioned = draw(B, C), padded(draw(B, 3 * C))
    weight = torch.cat([head.output.weight, head.recurrent.weight]).detach()
    bias = draw(256 + 3 * C)
    with torch.no_grad():
        head.output.bias.copy_(bias[:256])
        head.recurrent.bias.copy_(bias[256:])
        recurrent = head.recurrent(hidden)
        exact = head.double()
        expected = exact.step(x, hidden.double(), conditioned.double())
        logits, product = exact.logits(expected), exact.recurrent(expected)
    table = head.bytes.weight.float().detach()
    for products in (torch.full((B, 3 * C), 7.0, device=DEVICE), None):
        found, found_logits, kept = draw(B, C, seed=2), draw(B, 256), torch.zeros(B, 4, dtype=torch.long, device=DEVICE)
        decode.read_byte(
            x, table, conditioned, recurrent, hidden, weight, bias, NORM_EPS, found, found_logits, kept[:, 1], products
        )
        agree(found, expected)
        agree(found_logits, logits)
        assert torch.equal(kept[:, 1], x) and not kept[:, [0, 2, 3]].any()
        if products is not None:
            agree(products, product)
