"""The difference of two hulls over the same petals: the tempered log-mean-exp of each, in one pass over the petals.

    y[n, d] = P · ( lme_p o[p, n, d] − lme_p o[p, n, D + d] ),   lme_p o = τ⁻¹ · log( 1/P · Σ_p exp(τ · o_p) )

Notable: for a small τ the logarithm is that of nearly 1, and dividing by τ would blow up its rounding error. Everything
is taken relative to the largest petal and through log1p and expm1, which is accurate for every τ and cannot overflow.
Eager PyTorch makes seven float32 copies of `o`, P times as large as what the layer returns; the kernel reads it
once forward, and once backward to write its gradient. Both are bound by memory as long as a petal's output costs less
than some 20 instructions: exp − 1 is a polynomial near 0, and there is one logarithm for both hulls.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.transforms import apply, batched, check_impl

try:
    import triton
    import triton.language as tl

    from model.kernels.elementwise import halves
except ImportError:  # the PyTorch form does everywhere
    triton = None

TILE = 2048  # outputs of one hull, all petals together, that a program works on
WARPS = 2  # with 4 petals a thread has 8 outputs, 16 bytes of every petal


def signed_hull(o: Tensor, tau: Tensor, impl: str = "auto") -> Tensor:
    """o [P, N, 2D] of any float type, τ > 0 of one element → [N, D], float32 at least in between, o's type outside.

    impl: "torch" (any device), "triton" (CUDA, or Triton's interpreter), "auto" picks.
    """
    check_impl(impl, triton)
    if impl == "auto":
        # float64 is for references: the kernel works in float32.
        fits = o.is_cuda and not batched(o, tau) and o.dtype != torch.float64 and o.shape[1] * o.shape[2] > 2
        impl = "triton" if fits and triton is not None else "torch"
    return apply(_SignedHull if impl == "triton" else _SignedHullTorch, o.contiguous(), tau)


def log_mean_exp(o: Tensor, tau: Tensor) -> Tensor:
    """τ⁻¹ · log(mean over the first dimension of exp(τ · o)): [P, ...] → [...]. Between the mean and the maximum."""
    largest = o.detach().amax(0)  # the result does not depend on it: no gradient
    return largest + torch.log1p(torch.expm1((o - largest) * tau).mean(0)) / tau


class _SignedHullTorch(torch.autograd.Function):
    """By PyTorch's operations, with the gradient written out: half the passes over `o` of what autograd would take."""

    @staticmethod
    def forward(ctx, o: Tensor, tau: Tensor) -> Tensor:
        exact = torch.promote_types(o.dtype, torch.float32)
        scale = tau.to(exact)
        largest = o.amax(0).to(exact)
        below = o.to(exact) - largest
        less = (below * scale).expm1_()
        mean = less.mean(0)
        relative = mean.log1p() / scale
        rising, falling = (largest + relative).chunk(2, -1)
        ctx.save_for_backward(below, less, mean, relative, tau)
        ctx.dtype = o.dtype
        return (o.shape[0] * (rising - falling)).to(o.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        below, less, mean, relative, tau = ctx.saved_tensors
        grad = grad.to(below.dtype)
        grad = torch.cat([grad, -grad], -1)  # P of the sum and 1/P of the mean cancel
        grad_o = (less + 1).mul_(grad / (mean + 1))
        of_tau = torch.dot(grad_o.flatten(), below.flatten()) - below.shape[0] * torch.dot(
            grad.flatten(), relative.flatten()
        )
        return grad_o.to(ctx.dtype), (of_tau / tau.to(below.dtype)).view(tau.shape).to(tau.dtype)


class _SignedHull(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o: Tensor, tau: Tensor) -> Tensor:
        ctx.save_for_backward(o, tau)
        return hull_forward(o, tau)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return hull_backward(*ctx.saved_tensors, grad)


def hull_forward(o: Tensor, tau: Tensor, onto: Tensor | None = None) -> Tensor:
    """The kernel of `signed_hull`: contiguous o [P, N, 2D], τ → [N, D], rounded to o's type, and `onto`, contiguous,
    with it, if given."""
    P, N, width = o.shape
    dtype = o.dtype if onto is None else torch.promote_types(o.dtype, onto.dtype)
    y = torch.empty(N, width // 2, dtype=dtype, device=o.device)
    if y.numel():
        petals, block, grid = _tiles(P, y.numel())
        _forward[grid](o, tau, onto, y, y.numel(), width // 2, P, petals, block, num_warps=WARPS)
    return y


def hull_backward(o: Tensor, tau: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of o and of τ from that of the result [N, D]."""
    P, N, width = o.shape
    size = N * width // 2
    petals, block, grid = _tiles(P, size)
    grad_o = torch.empty_like(o)
    # One partial sum a program, added up in a fixed order: the same bits every time.
    partial = torch.empty(grid, dtype=torch.float32, device=o.device)
    if size:
        grad, D = grad.contiguous(), width // 2
        _backward[grid](o, tau, grad, grad_o, partial, size, D, P, petals, block, num_warps=WARPS)
    return grad_o, partial.sum().view(tau.shape).to(tau.dtype)


def _tiles(petals: int, size: int) -> tuple[int, int, tuple[int]]:
    """(petals of a tile, its outputs, the grid); both are powers of two."""
    rows = 1 << (petals - 1).bit_length()
    block = max(16, min(256 * WARPS, TILE // rows))
    return rows, block, (-(-size // block),)


if triton is not None:

    @triton.jit
    def _petals(at, inside, there, scale, P: tl.constexpr, PETALS: tl.constexpr):
        """A tile [PETALS, BLOCK], P of them there → the largest o, o − largest, its exp(τ ·), the mean of that − 1."""
        o = tl.load(at, inside, other=0.0).to(tl.float32)
        if P == PETALS:
            largest = tl.max(o, 0)
            below = o - largest[None, :]
        else:
            largest = tl.max(tl.where(there, o, float("-inf")), 0)
            below = tl.where(there, o - largest[None, :], 0.0)
        t = below * scale  # scale = τ / ln 2: the exponential is 2ᵗ
        w = tl.exp2(t)
        # Near 0 the difference of 2ᵗ and 1 would cancel: (2ᵗ − 1)/t on [−1, 0], interpolated, to 3e-8.
        far = t < -1.0
        near = tl.where(far, -1.0, t)  # not a maximum: a NaN stays one
        less = 1.29163684e-3 + near * 1.14919952e-4
        less = 9.59703512e-3 + near * less
        less = 5.54992296e-2 + near * less
        less = 2.4022609e-1 + near * less
        less = near * (6.93147182e-1 + near * less)
        w = tl.where(far, w, 1.0 + less)
        return largest, below, w, tl.sum(tl.where(far, w - 1.0, less), 0) / P

    @triton.jit
    def _log_ratio(rising, falling):
        """log((1 + rising) / (1 + falling)), of means in (−1, 0]: after Kahan, the errors of w cancel."""
        x = (rising - falling) / (1.0 + falling)
        w = 1.0 + x
        return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))

    @triton.jit
    def _places(size, D: tl.constexpr, P: tl.constexpr, PETALS: tl.constexpr, BLOCK: tl.constexpr):
        """This program's outputs, which there are; its tile in `o`, what of it is inside, which petals there are."""
        i, base = halves(D, BLOCK)
        p = tl.arange(0, PETALS)[:, None]
        there = p < P
        # The result has half the elements of one petal's outputs.
        at = p * (2 * size.to(tl.int64)) + base[None, :]
        return i, i < size, at, (i < size)[None, :] & there, there

    @triton.jit
    def _forward(o, tau_at, onto, y, size, D: tl.constexpr, P: tl.constexpr, PETALS: tl.constexpr, BLOCK: tl.constexpr):
        i, wanted, at, inside, there = _places(size, D, P, PETALS, BLOCK)
        tau = tl.load(tau_at).to(tl.float32)
        scale = tau * 1.4426950408889634
        top, _, _, rising = _petals(o + at, inside, there, scale, P, PETALS)
        bottom, _, _, falling = _petals(o + at + D, inside, there, scale, P, PETALS)
        result = (P * ((top - bottom) + _log_ratio(rising, falling) * (1.0 / tau))).to(o.dtype.element_ty)
        if onto is not None:
            result = result.to(tl.float32) + tl.load(onto + i, wanted, other=0.0).to(tl.float32)
        tl.store(y + i, result.to(y.dtype.element_ty), wanted)

    @triton.jit
    def _side(o, grad_o, at, inside, there, scale, grad, P: tl.constexpr, PETALS: tl.constexpr):
        """Write the gradients of one hull's petals → (mean of exp − 1, their average below the largest)."""
        _, below, w, mean = _petals(o + at, inside, there, scale, P, PETALS)
        part = 1.0 / (P * (1.0 + mean))
        tl.store(grad_o + at, (w * (grad * part)[None, :]).to(grad_o.dtype.element_ty), inside)
        return mean, tl.sum(w * below, 0) * part

    @triton.jit
    def _backward(
        o,
        tau_at,
        grad_at,
        grad_o,
        partial,
        size,
        D: tl.constexpr,
        P: tl.constexpr,
        PETALS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        i, wanted, at, inside, there = _places(size, D, P, PETALS, BLOCK)
        tau = tl.load(tau_at).to(tl.float32)
        scale = tau * 1.4426950408889634
        grad = P * tl.load(grad_at + i, wanted, other=0.0).to(tl.float32)
        rising, above = _side(o, grad_o, at, inside, there, scale, grad, P, PETALS)
        falling, under = _side(o, grad_o, at + D, inside, there, scale, -grad, P, PETALS)
        # Of τ: the averages less the means, both relative to the largest, as it is their difference that is small.
        of_tau = grad * ((above - under) - _log_ratio(rising, falling) * (1.0 / tau)) * (1.0 / tau)
        tl.store(partial + tl.program_id(0), tl.sum(of_tau, 0))
