"""Elementwise parts of the feed-forward layers, each read and written once in each direction.

Notable: eager PyTorch takes two passes forward and four back for a squared ReLU, and a dozen small kernels to split a
matrix by sign. Both are bound by memory, so that passes are time. The results are the same to the bit where input and
output have one type; a split into a narrower type subtracts its gradients before rounding, PyTorch's form after.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.transforms import apply, batched, check_impl

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch form does everywhere
    triton = None

BLOCK = 1024


def _pick(impl: str, x: Tensor) -> str:
    check_impl(impl, triton)
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


def square_(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The kernel of `squared_relu` on contiguous memory, in place, or into `out`."""
    out = x if out is None else out
    if x.numel():
        _square_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), BLOCK)
    return out


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return square_(x, torch.empty_like(x))

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
        ctx.save_for_backward(weight)
        return split_forward(weight, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return split_backward(*ctx.saved_tensors, grad), None


def split_forward(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernel of `split_signs`: contiguous [..., D] → [..., 2D]."""
    out = torch.empty(*weight.shape[:-1], 2 * weight.shape[-1], dtype=dtype, device=weight.device)
    if weight.numel():
        grid = (triton.cdiv(weight.numel(), BLOCK),)
        _split_kernel[grid](weight, out, weight.numel(), weight.shape[-1], BLOCK)
    return out


def split_backward(weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the contiguous weight from that of the split [..., 2D] of any float type."""
    out = torch.empty_like(weight)
    if weight.numel():
        grid = (triton.cdiv(weight.numel(), BLOCK),)
        _split_backward_kernel[grid](weight, grad.contiguous(), out, weight.numel(), weight.shape[-1], BLOCK)
    return out


if triton is not None:

    @triton.jit
    def halves(D: tl.constexpr, BLOCK: tl.constexpr):
        """This program's elements of a contiguous [..., D] → (where they are, where in the first half of [..., 2D])."""
        first = tl.program_id(0).to(tl.int64) * BLOCK
        row = first // D
        # One division of 64 bits a program; the others are of small numbers by a constant.
        rows = row + ((first - row * D).to(tl.int32) + tl.arange(0, BLOCK)) // D
        i = first + tl.arange(0, BLOCK)
        return i, i + rows * D

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
    def _split_kernel(weight_at, out_at, size, D: tl.constexpr, BLOCK: tl.constexpr):
        i, to = halves(D, BLOCK)
        inside = i < size
        weight = tl.load(weight_at + i, inside, other=0.0)
        tl.store(out_at + to, tl.where(weight < 0, 0.0, weight).to(out_at.dtype.element_ty), inside)
        tl.store(out_at + to + D, tl.where(weight > 0, 0.0, -weight).to(out_at.dtype.element_ty), inside)

    @triton.jit
    def _split_backward_kernel(weight_at, grad_at, out_at, size, D: tl.constexpr, BLOCK: tl.constexpr):
        i, source = halves(D, BLOCK)
        inside = i < size
        weight = tl.load(weight_at + i, inside, other=0.0)
        rising = tl.load(grad_at + source, inside, other=0.0).to(tl.float32)
        falling = tl.load(grad_at + source + D, inside, other=0.0).to(tl.float32)
        grad = tl.where(weight >= 0, rising, 0.0) - tl.where(weight <= 0, falling, 0.0)
        tl.store(out_at + i, grad.to(out_at.dtype.element_ty), inside)
