"""The difference of two hulls against its formula in float64: the PyTorch form, and the Triton kernel.

With P petals the result is P times a difference of means of `o`, so its rounding is measured against P · max|o|; the
gradient of o against P · max|grad|; that of log τ, a difference of differences, against P · Σ|grad| · spread of o.
"""

import itertools
import os

import pytest
import torch

from model.kernels import hull
from model.kernels.hull import log_mean_exp, signed_hull

CUDA = torch.cuda.is_available()
TAUS = (1e-4, 1e-2, 0.1, 1.0, 30.0)
OUTPUT, GRADIENT, TAU_GRADIENT = 1e-6, 3e-6, 2e-7  # float32's ε is 1.2e-7; sums and exponents of 64 petals cost a few


def formula(o: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """P · (τ⁻¹ log mean exp(τ o_rising) − τ⁻¹ log mean exp(τ o_falling)), term by term in float64."""
    P, _, width = o.shape
    largest = o.detach().amax(0)
    means = largest + ((tau * (o - largest)).exp().sum(0) / P).log() / tau
    return P * (means[:, : width // 2] - means[:, width // 2 :])


def inputs(P: int, N: int, D: int, scale: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, the gradient of the result), float32."""
    g = torch.Generator().manual_seed(P + N + D)
    return torch.randn(P, N, 2 * D, generator=g) * scale + offset, torch.randn(N, D, generator=g)


def run(function, o: torch.Tensor, tau: float, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(result, gradient of o, gradient of τ) on the CPU in float64; τ has float32's value."""
    o = o.detach().clone().requires_grad_()
    tau = torch.tensor([tau], dtype=torch.float32).to(o.device, torch.promote_types(o.dtype, torch.float32))
    tau.requires_grad_()
    y = function(o, tau)
    assert y.dtype == o.dtype and y.shape == grad.shape
    gradients = torch.autograd.grad(y, (o, tau), grad.to(y))
    assert gradients[0].dtype == o.dtype and gradients[1].shape == tau.shape
    return tuple(x.detach().cpu().double() for x in (y, *gradients))


def check(impl: str, P: int, N: int, D: int, tau: float, scale=1.0, offset=0.0, dtype=torch.float32, device="cpu"):
    """One implementation against the formula, within the bounds above."""
    o, grad = inputs(P, N, D, scale, offset)
    o, grad = o.to(dtype), grad.to(dtype)  # the formula gets the rounded values
    y, grad_o, grad_tau = run(formula, o.double(), tau, grad.double())
    found = run(lambda o, tau: signed_hull(o, tau, impl), o.to(device), tau, grad.to(device))
    unit = P * o.abs().max().item()
    spread = (o.amax(0) - o.amin(0)).max().item()
    # bfloat16 rounds to the nearest, but Triton's interpreter cuts off.
    half = 0.0 if dtype == torch.float32 else 2.0**-7 if impl == "triton" and device == "cpu" else 2.0**-8
    assert all(x.isfinite().all() for x in found)
    assert ((found[0] - y).abs() <= OUTPUT * unit + half * y.abs()).all()
    assert ((found[1] - grad_o).abs() <= GRADIENT * P * grad.abs().max() + half * grad_o.abs()).all()
    assert (found[2] - grad_tau).abs().item() <= TAU_GRADIENT * P * grad.abs().sum().item() * spread / tau


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e4, 0.0), (1.0, 1e3), (1e-3, 0.0), (1e30, 0.0)])
@pytest.mark.parametrize(("P", "N", "D"), [(1, 3, 5), (2, 1, 1), (4, 17, 33), (64, 5, 7)])
def test_pytorch_form_is_the_formula(P, N, D, tau, scale, offset):
    """No τ and no size of the petals overflows or cancels."""
    check("torch", P, N, D, tau, scale, offset)


def test_pytorch_form_in_half_precision_is_float32_inside():
    for tau in TAUS:
        check("torch", 4, 17, 33, tau, dtype=torch.bfloat16)


@pytest.mark.parametrize("tau", [1e-4, 1e-2])
def test_small_temperatures_do_not_cancel(tau):
    """log(1 + x)/τ computed as written loses 1/τ times ε; here the petals' spread is all that is left of it."""
    o, _ = inputs(4, 50, 8, 1.0, 0.0)
    tau = torch.tensor([tau])
    expected = formula(o.double(), tau.double())
    naive = 4 * torch.stack([(o[..., i : i + 8] * tau).logsumexp(0) / tau for i in (0, 8)])
    found = signed_hull(o, tau, "torch")
    assert (found - expected).abs().max() < 2e-6
    assert (naive[0] - naive[1] - expected).abs().max() > 10 * (found - expected).abs().max()


def test_from_the_mean_to_the_maximum():
    o = torch.randn(5, 40, dtype=torch.float64)
    means = [log_mean_exp(o, torch.tensor(tau, dtype=torch.float64)) for tau in (1e-9, 0.1, 1.0, 10.0, 1e6)]
    torch.testing.assert_close(means[0], o.mean(0), rtol=0, atol=1e-8)
    torch.testing.assert_close(means[-1], o.amax(0), rtol=0, atol=1e-5)
    for lower, higher in itertools.pairwise(means):
        assert (lower < higher).all()


@pytest.mark.parametrize("tau", [1e-3, 0.3, 5.0])
@pytest.mark.parametrize("P", [1, 3])
def test_gradients_agree_with_finite_differences(P, tau):
    o = torch.randn(P, 4, 6, dtype=torch.float64, requires_grad=True)
    tau = torch.tensor([tau], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(signed_hull, (o, tau), atol=1e-6)


def test_equal_petals_are_one():
    """The gradient is shared evenly among petals that are equal, also where all of them are the largest."""
    o = torch.ones(3, 2, 4, requires_grad=True)
    y = signed_hull(o, torch.tensor([0.5]), "torch")
    y[:, 0].sum().backward()
    assert torch.equal(y, torch.zeros(2, 2))
    torch.testing.assert_close(o.grad[:, :, 0], torch.ones(3, 2))
    torch.testing.assert_close(o.grad[:, :, 2], -torch.ones(3, 2))
    assert not o.grad[:, :, [1, 3]].any()


KERNEL_SHAPES = [
    # P, N, D: one element, less than a block, one block exactly, several and a part, many petals.
    (1, 1, 2),
    (2, 3, 5),
    (4, 16, 64),
    (4, 31, 67),
    (3, 1, 2500),
    (64, 5, 7),
]
interpreter = pytest.mark.skipif(
    hull.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the package triton, and TRITON_INTERPRET=1, which conftest sets where there is no CUDA device",
)
card = pytest.mark.skipif(not CUDA or hull.triton is None, reason="needs a CUDA device and the package triton")


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("P", "N", "D"), KERNEL_SHAPES)
def test_kernel_in_the_interpreter_is_the_formula(P, N, D, dtype):
    check("triton", P, N, D, 0.1, dtype=dtype)


@interpreter
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e4, 0.0), (1.0, 1e3)])
def test_kernel_in_the_interpreter_at_any_temperature(tau, scale, offset):
    check("triton", 4, 17, 33, tau, scale, offset)


@interpreter
def test_kernel_takes_strided_inputs_and_none():
    o, grad = inputs(2, 6, 5, 1.0, 0.0)
    expected = run(formula, o.double(), 0.3, grad.double())
    # The rows of `o` and of the gradient lie apart in memory; a result of no element launches nothing.
    apart = torch.stack([o, o + 1], -1)[..., 0]
    found = run(lambda o, tau: signed_hull(o.transpose(0, 1).contiguous().transpose(0, 1), tau, "triton"), apart, 0.3,
                torch.stack([grad, grad], -1)[..., 0])  # fmt: skip
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    empty = torch.empty(2, 0, 10, requires_grad=True)
    y = signed_hull(empty, torch.tensor([1.0]), "triton")
    assert y.shape == (0, 5)
    y.sum().backward()
    assert empty.grad.shape == empty.shape


@interpreter
def test_kernel_is_once_differentiable():
    """A second derivative is an error, not a zero."""
    o = torch.randn(2, 3, 4, requires_grad=True)
    y = signed_hull(o, torch.tensor([1.0]), "triton")
    (gradient,) = torch.autograd.grad(y.square().sum(), o, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@card
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("P", "N", "D"), [*KERNEL_SHAPES, (8, 4096, 512)])
def test_kernel_on_the_card_is_the_formula(P, N, D, tau, dtype):
    check("triton", P, N, D, tau, dtype=dtype, device="cuda")


@card
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("scale", "offset"), [(1e4, 0.0), (1.0, 1e3)])
def test_kernel_on_the_card_with_large_values(tau, scale, offset):
    check("triton", 4, 257, 67, tau, scale, offset, device="cuda")


@card
def test_auto_is_the_kernel_on_the_card_and_gives_the_same_bits_every_time():
    o, grad = inputs(4, 999, 67, 1.0, 0.0)
    runs = [run(lambda o, tau, impl=impl: signed_hull(o, tau, impl), o.cuda(), 0.1, grad.cuda())
            for impl in ("auto", "triton", "triton")]  # fmt: skip
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other))
    assert signed_hull(o.cuda().double(), torch.ones(1).cuda().double()).dtype == torch.float64


def test_bad_implementations_are_named(monkeypatch):
    o, tau = torch.zeros(1, 1, 2), torch.ones(1)
    with pytest.raises(ValueError, match="impl='magic': accepted are auto, torch, triton"):
        signed_hull(o, tau, "magic")
    monkeypatch.setattr(hull, "triton", None)
    with pytest.raises(ValueError, match=r"impl='triton': needs the package triton; accepted here are auto and torch"):
        signed_hull(o, tau, "triton")
