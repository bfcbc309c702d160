"""Queries and keys against their formula in float64, in PyTorch and by the Triton kernels; the mask of a window."""

import os
from functools import partial

import pytest
import torch

from model.kernels import qk_rotary as kernels
from model.kernels.qk_rotary import MASKED, qk_rotary, window_mask
from model.layers import attention
from model.layers.rotary import Rotary

CUDA = torch.cuda.is_available()
EPS = 1e-3  # large enough to be seen
SHAPES = [  # B, T, H, E: one element each, less than a program, one exactly, several and a part, wide and odd heads
    (1, 1, 1, 2),
    (2, 3, 5, 6),
    (1, 8, 4, 64),
    (2, 13, 3, 64),
    (2, 3, 1, 200),
]
interpreter = pytest.mark.skipif(
    kernels.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the package triton, and TRITON_INTERPRET=1, which conftest sets where there is no CUDA device",
)
card = pytest.mark.skipif(not CUDA or kernels.triton is None, reason="needs a CUDA device and the package triton")


def formula(packed: torch.Tensor, phases, H: int) -> tuple[torch.Tensor, ...]:
    """Head by head as complex numbers, in float64."""
    T, width = packed.shape[1:]
    E = width // 3 // H
    turn = torch.complex(*(phase.double().view(T, E // 2) for phase in phases))

    def normalised_and_turned(x):
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        x = torch.complex(x[..., : E // 2], x[..., E // 2 :]) * turn
        return torch.cat([x.real, x.imag], -1)

    heads = [packed[..., i * E : (i + 1) * E] for i in range(3 * H)]
    heads = [normalised_and_turned(x) if i < 2 * H else x for i, x in enumerate(heads)]
    return tuple(torch.stack(heads[i * H : (i + 1) * H], 2) for i in range(3))


def inputs(B: int, T: int, H: int, E: int, dtype=torch.float32, device="cpu"):
    """packed, with a head of zeros and heads of very different size; phases; gradients of q, k, v."""
    g = torch.Generator().manual_seed(B + T + E)
    packed = torch.randn(B, T, 3, H, E, generator=g) * torch.logspace(-3, 2, 3 * H).view(3, H, 1)
    packed[0, 0, 0, 0] = 0
    phases = Rotary(E, 100.0)(T, 12345, torch.device(device))
    grads = [torch.randn(B, T, H, E, generator=g).to(device, dtype) for _ in range(3)]
    return packed.flatten(2).to(device, dtype), phases, grads


def run(function, packed, grads) -> list[torch.Tensor]:
    """q, k, v and the gradient of packed, float64 on the CPU."""
    packed = packed.detach().clone().requires_grad_()
    outputs = function(packed)
    for x, grad in zip(outputs, grads):
        assert x.dtype == packed.dtype and x.shape == grad.shape
    (grad,) = torch.autograd.grad(outputs, packed, grads)
    assert grad.dtype == packed.dtype
    return [x.detach().cpu().double() for x in (*outputs, grad)]


def check(impl: str, shape: tuple[int, ...], dtype=torch.float32, device="cpu") -> None:
    """Within float32's rounding and one of `dtype`; and, in half precision, no further off than PyTorch's form."""
    packed, phases, grads = inputs(*shape, dtype, device)
    _, _, H, _ = shape
    exact = run(lambda x: formula(x, phases, H), packed.double(), [grad.double() for grad in grads])
    found = run(lambda x: qk_rotary(x, phases, H, EPS, impl), packed, grads)
    assert torch.equal(found[2], exact[2])  # values are not touched
    # bfloat16 rounds to the nearest, but Triton's interpreter cuts off.
    ulp = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    ulp *= 2 if impl == "triton" and device == "cpu" else 1
    if impl == "triton":
        tiny = 2.0**-24 if dtype == torch.float16 else 0.0
        size = shape[3] ** 0.5  # of the largest q, and by how much sums of a head's channels round
        for x, y in zip(found[:2], exact[:2]):
            assert ((x - y).abs() <= ulp * y.abs() + 1e-6 * size + tiny).all()
        # The gradient is that of a head's own scale: up to ε^-1/2 times what comes in.
        x, y = (each.unflatten(-1, (3 * H, -1)) for each in (found[3], exact[3]))
        assert ((x - y).abs() <= ulp * y.abs() + 2e-6 * size * y.abs().amax(-1, keepdim=True) + tiny).all()
    reference = run(lambda x: qk_rotary(x, phases, H, EPS, "torch"), packed, grads)
    for x, y, z in zip(found, exact, reference):
        assert (x - y).norm() <= 1.01 * (z - y).norm() + max(ulp, 1e-6) * y.norm()
        assert (z - y).norm() <= (3e-6 if dtype == torch.float32 else 2.0**-6) * y.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_pytorch_form_is_the_formula(shape, dtype):
    check("torch", shape, dtype)


def test_gradients_agree_with_finite_differences():
    packed, phases, _ = inputs(1, 3, 2, 4)
    packed = (packed.double() + 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: qk_rotary(x, phases, 2, EPS, "torch"), (packed,), atol=1e-6)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_in_the_interpreter_is_the_formula(shape, dtype):
    check("triton", shape, dtype)


@interpreter
def test_kernel_takes_strided_inputs_and_none():
    packed, phases, grads = inputs(2, 9, 3, 8)
    exact = run(lambda x: formula(x, phases, 3), packed.double(), grads)

    def strided(x):
        return qk_rotary(x.transpose(0, 1).contiguous().transpose(0, 1), phases, 3, EPS, "triton")

    apart = [torch.stack([grad, grad + 1], -1)[..., 0] for grad in grads]
    for x, y in zip(run(strided, packed, apart), exact):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for B, T in ((0, 4), (2, 0)):
        packed, phases, grads = torch.empty(B, T, 24), Rotary(4, 100.0)(T, 0, packed.device), [torch.empty(B, T, 2, 4)]
        found = run(lambda x, phases=phases: qk_rotary(x, phases, 2, EPS, "triton"), packed, 3 * grads)
        assert [x.shape for x in found] == [(B, T, 2, 4)] * 3 + [(B, T, 24)]


@interpreter
def test_values_stay_where_they_are_and_any_output_may_be_used_alone():
    packed, phases, grads = inputs(2, 5, 2, 4)
    packed.requires_grad_()
    outputs = qk_rotary(packed, phases, 2, EPS, "triton")
    assert outputs[2].untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    with torch.no_grad():
        plain = qk_rotary(packed, phases, 2, EPS, "triton")
    for x, y in zip(outputs, plain):
        assert torch.equal(x, y) and x.requires_grad and not y.requires_grad
    whole = torch.autograd.grad(outputs, packed, grads, retain_graph=True)[0].chunk(3, -1)
    for i in range(3):
        alone = torch.autograd.grad(outputs[i], packed, grads[i], retain_graph=True)[0].chunk(3, -1)
        assert torch.equal(alone[i], whole[i]) and not any(alone[j].any() for j in range(3) if j != i)
    (gradient,) = torch.autograd.grad(outputs[0].square().sum(), packed, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@interpreter
@pytest.mark.parametrize("T", [1, 7, 16, 29])
def test_attention_with_the_kernels_is_the_attention_without(T, monkeypatch):
    """One call, a long one in blocks, one after a state, and one position after a state of fixed size."""
    torch.manual_seed(T)
    layer, rotary = attention.WindowAttention(16, 2, 8), Rotary(8, 100.0)
    x, one = torch.randn(2, T, 16), torch.randn(2, 1, 16)
    cpu = torch.device("cpu")

    def everything():
        here = x.clone().requires_grad_()
        first, state = layer(here, rotary(T, 0, cpu))
        second, _ = layer(here, rotary(T, T, cpu), state)
        third, after = layer(one, rotary(1, T, cpu), state.padded(8))
        (first.cos().sum() + second.sin().sum() + third.square().sum()).backward()
        gradients = here.grad, layer.qkv.weight.grad.clone()
        layer.zero_grad()
        return [first, second, third, *after.tensors(), *gradients]

    expected = everything()
    for name in ("qk_rotary", "window_mask"):
        monkeypatch.setattr(attention, name, partial(getattr(kernels, name), impl="triton"))
    for found, wanted in zip(everything(), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("T", "S", "window", "cached"), [(1, 1, 1, 0), (7, 7, 3, 0), (5, 8, 4, 3), (33, 64, 32, 31)])
def test_mask_is_a_band(T, S, window, cached):
    seen = torch.tensor([[cached + t - window < s <= cached + t for s in range(S)] for t in range(T)])
    cpu = torch.device("cpu")
    assert torch.equal(window_mask(T, S, window, cached, torch.float32, cpu, "torch"), seen)
    if kernels.triton is None or CUDA:
        return
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = window_mask(T, S, window, cached, dtype, cpu, "triton")
        assert found.dtype == dtype and found.isfinite().all()
        assert torch.equal(found == 0, seen) and (found[~seen] <= MASKED * 0.99).all()


@card
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (128, 256, 8, 64), (2, 16383, 8, 64), (4, 100, 20, 128)])
def test_kernel_on_the_card_is_the_formula(shape, dtype):
    check("triton", shape, dtype, "cuda")


@card
def test_auto_on_the_card_is_the_kernel_and_gives_the_same_bits_every_time():
    packed, phases, grads = inputs(16, 256, 8, 64, torch.bfloat16, "cuda")
    runs = [run(lambda x, impl=impl: qk_rotary(x, phases, 8, EPS, impl), packed, grads)
            for impl in ("auto", "triton", "triton")]  # fmt: skip
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other))
    assert window_mask(3, 4, 2, 1, torch.bfloat16, packed.device).dtype == torch.bfloat16
    assert window_mask(3, 4, 2, 1, torch.float64, packed.device).dtype == torch.bool


@card
@pytest.mark.parametrize(("T", "D"), [(17, 128), (64, 128), (128, 128), (200, 128), (300, 128), (300, 24), (300, 512)])
def test_attention_on_the_card_is_that_of_float64(T, D):
    """The whole layer under autocast, through the fused attention that PyTorch picks, with every gradient; long rows
    of heads of 64 channels through flash attention's window, of 12 and 256 through blocks."""
    torch.manual_seed(T)
    layer, rotary = attention.WindowAttention(D, 2, 64).cuda(), Rotary(D // 2, 1e4)
    x = torch.randn(3, T, D, device="cuda")

    def outputs(dtype):
        each = x.to(dtype).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
            heads, _ = layer.to(dtype)(each, rotary(T, 5, x.device))
        grads = torch.autograd.grad(heads.double().cos().sum(), (each, layer.qkv.weight))
        return [found.double() for found in (heads, *grads)]

    for found, exact in zip(outputs(torch.float32), outputs(torch.float64)):
        assert (found - exact).norm() <= 0.02 * exact.norm()


def test_bad_arguments_are_named(monkeypatch):
    packed, phases = torch.zeros(1, 2, 24), (torch.ones(2, 1, 2), torch.zeros(2, 1, 2))
    with pytest.raises(ValueError, match="impl='magic': accepted are auto, torch, triton"):
        qk_rotary(packed, phases, 2, EPS, "magic")
    with pytest.raises(ValueError, match="packed has width 24: accepted are multiples of 6 · n_heads = 18"):
        qk_rotary(packed, phases, 3, EPS)
    with pytest.raises(ValueError, match=r"phases of shape \(2, 1, 2\), .*: accepted are two of \(3, 1, 2\)"):
        qk_rotary(torch.zeros(1, 3, 24), phases, 2, EPS)
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(ValueError, match=r"impl='triton': needs the package triton; accepted here are auto and torch"):
        qk_rotary(packed, phases, 2, EPS, "triton")
