"""Elementwise parts of the feed-forward layers, each read and written once in each direction.

Notable: eager PyTorch takes two passes forward and four back for a squared ReLU, and a dozen small kernels to split a
matrix by sign. Both are bound by memory, so that passes are time. The results are the same to the bit where input and
output have one type; a split into a narrower type subtracts its gradients before rounding, PyTorch's form after.
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
IMPLEMENTATIONS = ("auto", "torch", "triton")


def _pick(impl: str, x: Tensor) -> str:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: accepted are {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton" and triton is None:
        raise ValueError("impl='triton': needs the package triton; accepted here are auto and torch")
    if impl == "auto":
        # float64 is for references; one element would be a constant to the compiler.
        fits = x.is_cuda and not batched(x) and x.dtype != torch.float64 and x.numel() > 1
        return "triton" if fits and triton is not None else "torch"
    return impl


def squared_relu(x: Tensor, impl: str = "auto") -> Tensor:
    """max(x, 0)² of any shape and float type (So et al. 2021); convex, and once differentiable."""
    if _pick(impl, x) == "triton":
        return apply(_SquaredReLU, x.contiguous())
    positive = x.relu()
    # Not .square(): autocast runs powers in float32, four times the memory traffic of this product.
    return positive * positive


def split_signs(weight: Tensor, dtype: torch.dtype | None = None, impl: str = "auto") -> Tensor:
    """[..., D] → [..., 2D]: max(weight, 0) and max(−weight, 0) side by side, in `dtype` (the weight's when None).

    At 0 both sides pass their gradient on: a weight that starts there is not stuck.
    """
    dtype = dtype or weight.dtype
    if _pick(impl, weight) == "triton":
        return apply(_SplitSigns, weight.contiguous(), dtype)
    weight = weight.to(dtype)
    # clamp, not relu: its gradient at 0 is 1.
    return torch.cat([weight.clamp(min=0), (-weight).clamp(min=0)], -1)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        if x.numel():
            _square_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad = grad.contiguous()
        out = torch.empty_like(x)
        if x.numel():
            _square_backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, grad, out, x.numel(), BLOCK)
        return out


class _SplitSigns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty(*weight.shape[:-1], 2 * weight.shape[-1], dtype=dtype, device=weight.device)
        if weight.numel():
            grid = (triton.cdiv(weight.numel(), BLOCK),)
            _split_kernel[grid](weight, out, weight.numel(), weight.shape[-1], BLOCK)
        ctx.save_for_backward(weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        out = torch.empty_like(weight)
        if weight.numel():
            grid = (triton.cdiv(weight.numel(), BLOCK),)
            _split_backward_kernel[grid](weight, grad.contiguous(), out, weight.numel(), weight.shape[-1], BLOCK)
        return out, None


if triton is not None:

    @triton.jit
    def _square_kernel(x_at, y_at, size, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        x = tl.load(x_at + i, inside, other=0.0).to(tl.float32)
        positive = tl.where(x < 0.0, 0.0, x)  # a NaN stays one
        tl.store(y_at + i, (positive * positive).to(y_at.dtype.element_ty), inside)

    @triton.jit
    def _square_backward_kernel(x_at, grad_at, out_at, size, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        x = tl.load(x_at + i, inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_at + i, inside, other=0.0).to(tl.float32)
        # Rounded before it is doubled, as the two halves of a product's gradient are.
        half = (x * grad).to(out_at.dtype.element_ty).to(tl.float32)
        tl.store(out_at + i, tl.where(x <= 0.0, 0.0, half + half).to(out_at.dtype.element_ty), inside)

    @triton.jit
    def _split_kernel(weight_at, out_at, size, D, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        to = out_at + i // D * 2 * D + i % D
        weight = tl.load(weight_at + i, inside, other=0.0)
        tl.store(to, tl.where(weight < 0, 0.0, weight).to(out_at.dtype.element_ty), inside)
        tl.store(to + D, tl.where(weight > 0, 0.0, -weight).to(out_at.dtype.element_ty), inside)

    @triton.jit
    def _split_backward_kernel(weight_at, grad_at, out_at, size, D, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        source = grad_at + i // D * 2 * D + i % D
        weight = tl.load(weight_at + i, inside, other=0.0)
        rising = tl.load(source, inside, other=0.0).to(tl.float32)
        falling = tl.load(source + D, inside, other=0.0).to(tl.float32)
        grad = tl.where(weight >= 0, rising, 0.0) - tl.where(weight <= 0, falling, 0.0)
        tl.store(out_at + i, grad.to(out_at.dtype.element_ty), inside)
