"""The difference of two hulls over the same petals: the tempered log-mean-exp of each, in one pass over the petals.

    y[n, d] = P · ( lme_p o[p, n, d] − lme_p o[p, n, D + d] ),   lme_p o = τ⁻¹ · log( 1/P · Σ_p exp(τ · o_p) )

Notable: for a small τ the logarithm is that of nearly 1, and dividing by τ would blow up its rounding error. Everything
is taken relative to the largest petal and through log1p and expm1, which is accurate for every τ and cannot overflow.
Eager PyTorch makes seven float32 copies of `o`, P times as large as what the layer returns; the kernel reads it
once forward, and once backward to write its gradient. It is elementwise, so there is nothing to tune.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.transforms import apply, batched

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch form does everywhere
    triton = None

BLOCK = 1024
UNROLLED = 4  # petals up to which the loops are unrolled: 8 take 7 s to compile, 64 many minutes, a loop 2 s


def signed_hull(o: Tensor, tau: Tensor, impl: str = "auto") -> Tensor:
    """o [P, N, 2D] of any float type, τ > 0 of one element → [N, D], float32 at least in between, o's type outside.

    impl: "torch" (any device), "triton" (CUDA, or Triton's interpreter), "auto" picks.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl={impl!r}: accepted are auto, torch, triton")
    if impl == "triton" and triton is None:
        raise ValueError("impl='triton': needs the package triton; accepted here are auto and torch")
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
        P, N, width = o.shape
        y = torch.empty(N, width // 2, dtype=o.dtype, device=o.device)
        if y.numel():
            _forward[(triton.cdiv(y.numel(), BLOCK),)](o, tau, y, y.numel(), width // 2, P, P <= UNROLLED, BLOCK)
        ctx.save_for_backward(o, tau)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        o, tau = ctx.saved_tensors
        P, N, width = o.shape
        size = N * width // 2
        grad_o = torch.empty_like(o)
        # One partial sum a program, added up in a fixed order: the same bits every time.
        partial = torch.zeros(max(1, -(-size // BLOCK)), dtype=torch.float32, device=o.device)
        if size:
            grid, unroll = (partial.numel(),), P <= UNROLLED
            _backward[grid](o, tau, grad.contiguous(), grad_o, partial, size, width // 2, P, unroll, BLOCK)
        return grad_o, partial.sum().view(tau.shape).to(tau.dtype)


if triton is not None:

    @triton.jit
    def _expm1_below(o, at, largest, tau, inside):
        """exp(τ (o − largest)) − 1, after Kahan: the errors of w cancel."""
        t = tau * (tl.load(o + at, inside, other=0.0).to(tl.float32) - largest)
        w = tl.exp(t)
        kahan = (w - 1.0) * t / tl.where(w == 1.0, 1.0, tl.log(tl.maximum(w, 0.1)))
        return tl.where(w == 1.0, t, tl.where(t < -1.0, w - 1.0, kahan))

    @triton.jit
    def _log_mean_exp(o, base, petal_stride, tau, inside, P: tl.constexpr, UNROLL: tl.constexpr):
        largest = tl.load(o + base, inside, other=0.0).to(tl.float32)
        less = largest * 0.0  # mean of exp(...) − 1, in (−1, 0]
        if UNROLL:
            for p in tl.static_range(1, P):
                largest = tl.maximum(largest, tl.load(o + base + p * petal_stride, inside, other=0.0).to(tl.float32))
            for p in tl.static_range(0, P):
                less += _expm1_below(o, base + p * petal_stride, largest, tau, inside) / P
        else:
            for p in range(1, P):
                largest = tl.maximum(largest, tl.load(o + base + p * petal_stride, inside, other=0.0).to(tl.float32))
            for p in range(0, P):
                less += _expm1_below(o, base + p * petal_stride, largest, tau, inside) / P
        w = 1.0 + less
        log = tl.where(w == 1.0, less, tl.log(w) * less / tl.where(w == 1.0, 1.0, w - 1.0))
        # The mean relative to the largest: the gradient of τ is a difference of two of them.
        return log / tau, largest, w * P

    @triton.jit
    def _forward(o, tau_at, y, size, D, P: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        base = i // D * 2 * D + i % D
        tau = tl.load(tau_at)
        # The result has half the elements of one petal's outputs.
        stride = 2 * size.to(tl.int64)
        rising, top_rising, _ = _log_mean_exp(o, base, stride, tau, inside, P, UNROLL)
        falling, top_falling, _ = _log_mean_exp(o, base + D, stride, tau, inside, P, UNROLL)
        tl.store(y + i, (P * ((top_rising + rising) - (top_falling + falling))).to(y.dtype.element_ty), inside)

    @triton.jit
    def _petal(o, at, tau, grad, grad_o, largest, total, inside):
        """Write the gradient of one petal's output → its part of the mean below the largest."""
        below = tl.load(o + at, inside, other=0.0).to(tl.float32) - largest
        share = tl.exp(tau * below) / total
        tl.store(grad_o + at, (grad * share).to(grad_o.dtype.element_ty), inside)
        return share * below

    @triton.jit
    def _side(o, base, petal_stride, tau, grad, grad_o, inside, P: tl.constexpr, UNROLL: tl.constexpr):
        mean, largest, total = _log_mean_exp(o, base, petal_stride, tau, inside, P, UNROLL)
        average = mean * 0.0
        if UNROLL:
            for p in tl.static_range(0, P):
                average += _petal(o, base + p * petal_stride, tau, grad, grad_o, largest, total, inside)
        else:
            for p in range(0, P):
                average += _petal(o, base + p * petal_stride, tau, grad, grad_o, largest, total, inside)
        return grad * (average - mean) / tau  # its part of the gradient of τ

    @triton.jit
    def _backward(
        o, tau_at, grad_at, grad_o, partial, size, D, P: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr
    ):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        base = i // D * 2 * D + i % D
        tau = tl.load(tau_at)
        grad = P * tl.load(grad_at + i, inside, other=0.0).to(tl.float32)
        stride = 2 * size.to(tl.int64)
        of_tau = _side(o, base, stride, tau, grad, grad_o, inside, P, UNROLL)
        of_tau += _side(o, base + D, stride, tau, -grad, grad_o, inside, P, UNROLL)
        tl.store(partial + tl.program_id(0), tl.sum(of_tau, 0))
