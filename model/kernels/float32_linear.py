"""Products of a bfloat16 input with float32 weights on tensor cores, from 16 of the weights' 24 bits.

    y = x W₂ᵀ + x W₁ᵀ + b,   W = W₁ + W₂   (bfloat16 parts of 8 bits each, the nearest first: W but for 2⁻¹⁷ of it)
    dx = g₁ W₁      dW = g₁ᵀx              (g₁ the result's gradient, rounded to bfloat16)

A norm's output under autocast is bfloat16, so that x has one part. A product of bfloat16 parts is exact in float32, and
so are the sums but for their rounding (as bf16x3, Henry et al. 2019, with a part less): twice the arithmetic, on units
that are fifteen times as fast. Of random numbers y is right to 2.5e-6 of its norm, and in each element to 2⁻¹⁷ of
|x| |W|ᵀ and float32's own rounding. The gradients are as exact as those of any layer under autocast: dW, whose sums
stay float32, to 1.7e-3 of its norm, and dx, which is bfloat16 again, to 2.9e-3.

Notable: the sum of two products is one product. Their parts lie side by side along the dimension that is summed, the
smaller ones first: tensor cores cut off where float32 units round, each time relative to the sum so far. For the same
reason dW is a sum of sums over CHUNK rows, added up in float32 in a fixed order. All results but dx leave cuBLAS as
float32, so that what it may reduce in the type of the result is float32 too.

A float32 x would have parts of its own and need more products each way: it is left to PyTorch.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.products import keeps_sums, product
from model.kernels.transforms import apply, batched

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch form does everywhere
    triton = None

MIN_ROWS = 1024  # below, a product takes no longer than the launches of its parts
CHUNK = 4096  # rows that a tensor core adds up for the gradient of the weights
LARGEST = torch.finfo(torch.bfloat16).max
BLOCK, WARPS = 2048, 4  # of the kernel that splits: elements of a program
PIECE = 512  # columns of one


def float32_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, impl: str = "auto") -> Tensor:
    """x [..., I], weight [O, I], bias [O] → x Wᵀ + b [..., O], float32, or float64 where x or weight is.

    The same under autocast. Gradients have the types of their inputs. Where an input or the result's gradient is
    infinite, the split form may have NaN where PyTorch's is infinite. Of weights below 1e-33 it may lose 5e-41 each:
    their second parts are subnormal.

    Args:
        impl: "torch" (any type and device), "split" (x bfloat16, the others float32; tensor cores if on CUDA), "auto":
            "split" where it is faster.

    Raises:
        ValueError: an unknown impl, or "split" with other types.
    """
    if impl not in ("auto", "torch", "split"):
        raise ValueError(f"impl={impl!r}: accepted are auto, torch, split")
    if impl == "split" and not _types_fit(x, weight, bias):
        dtypes = [None if tensor is None else tensor.dtype for tensor in (x, weight, bias)]
        raise ValueError(f"impl='split': needs bfloat16 x, float32 weight and bias, got {dtypes}; accepted is torch")
    if impl == "auto":
        impl = "split" if splits(x, weight, bias) else "torch"
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return float32_linear(x, weight, bias, impl)
    if impl == "split":
        y = apply(_Split, x.reshape(-1, x.shape[-1]), weight.contiguous(), bias)
        return y.view(*x.shape[:-1], weight.shape[0])
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def splits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `float32_linear` takes these to tensor cores by itself: x is bfloat16, and there is enough of it."""
    O, I = weight.shape  # noqa: E741
    return (
        x.is_cuda
        and _types_fit(x, weight, bias)
        and O % 8 == 0 == I % 8  # what tensor cores are fed with: 16 bytes at a time
        and x.numel() >= MIN_ROWS * I > 0
        and triton is not None
        and _tensor_cores(x.device)
        and not batched(x, weight, *([] if bias is None else [bias]))
    )


def _types_fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    exact = weight.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
    return exact and x.dtype == torch.bfloat16


@lru_cache
def _tensor_cores(device: torch.device) -> bool:
    """Whether a CUDA device multiplies bfloat16 on tensor cores, and this PyTorch keeps the float32 result."""
    return keeps_sums() and torch.cuda.get_device_capability(device) >= (8, 0)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [N, I] bfloat16, weight [O, I], bias [O] → [N, O]."""
        ctx.save_for_backward(x, weight)
        y = split_forward(x, weight)
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return *split_backward(*ctx.saved_tensors, grad, to_x, to_weight), grad.sum(0) if to_bias else None


def split_forward(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, I] bfloat16, weight [O, I] float32, both contiguous → x Wᵀ [N, O], float32."""
    O, I = weight.shape  # noqa: E741
    if 2 * O <= I:  # to add up two narrow results is less than to repeat a wide x
        return product(x, parts(weight, (1, 0), stacked=True).T, torch.float32).view(-1, 2, O).sum(1)
    return product(parts(x, (0, 0)), parts(weight, (1, 0)).T, torch.float32)


def split_backward(
    x: Tensor, weight: Tensor, grad: Tensor, to_x: bool = True, to_weight: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, None where not asked for, from that of the result [N, O], float32 or bfloat16."""
    (N, I), O = x.shape, weight.shape[0]  # noqa: E741
    of_x = of_weight = None
    with torch.autocast(x.device.type, enabled=False):
        if to_x or to_weight:
            grad = grad.to(torch.bfloat16).contiguous()
        if to_x:
            of_x = product(grad, weight.to(torch.bfloat16), x.dtype)
        if to_weight:
            sums = 1
            while N % (2 * sums) == 0 and N // (2 * sums) >= CHUNK:
                sums *= 2
            rows = grad.view(sums, N // sums, O).transpose(1, 2)
            of_weight = product(rows, x.view(sums, N // sums, I), torch.float32).sum(0)
    return of_x, of_weight


def parts(x: Tensor, slots: tuple[int, int], stacked: bool = False, impl: str = "auto") -> Tensor:
    """Two bfloat16 parts of a float32 or bfloat16 x [R, C]: the nearest to it, and the nearest to what that one leaves.

    They sum up to within 2⁻¹⁷ of x. An infinity or NaN is the first part, the second is 0.

    Args:
        slots: which part, 0 or 1, comes at each of the two places.
        stacked: the places are one below the other, [2R, C], not side by side, [R, 2C].
        impl: "torch", "triton" (CUDA, or Triton's interpreter), "auto" picks.
    """
    R, C = x.shape
    if impl == "auto":
        impl = "triton" if x.is_cuda and triton is not None else "torch"
    if impl == "torch":
        x, found = x.float(), []
        for _ in range(2):
            finite = x.isfinite()
            part = torch.where(finite, x.clamp(-LARGEST, LARGEST), x).to(torch.bfloat16)
            x = torch.where(finite, x - part.float(), 0.0)
            found.append(part)
        return torch.cat([found[slot] for slot in slots], 0 if stacked else 1)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty((2 * R, C) if stacked else (R, 2 * C), dtype=torch.bfloat16, device=x.device)
    if x.numel():
        step = R * C if stacked else C  # from a place to the next
        x_row, out_row = x.stride(0), out.stride(0)
        if stacked and x.is_contiguous() and x.numel() % PIECE == 0:
            # Rows may be cut anywhere, so they are where the compiler knows that they are aligned.
            R, C, x_row, out_row = x.numel() // PIECE, PIECE, PIECE, PIECE
        columns = min(triton.next_power_of_2(C), PIECE)
        rows = max(1, BLOCK // columns)
        grid = (triton.cdiv(R, rows), triton.cdiv(C, columns))
        _parts_kernel[grid](x, out, R, C, x_row, out_row, step, *slots, rows, columns, num_warps=WARPS)
    return out


if triton is not None:

    @triton.jit
    def _nearest(x):
        """The bfloat16 nearest to x, and what it leaves: nothing where x is not finite."""
        magnitude, largest = tl.abs(x), 3.3895313892515355e38
        # Next to float32's largest number the nearest one would be infinite.
        capped = tl.where(x > 0, largest, -largest)
        part = tl.where((magnitude > largest) & (magnitude < float("inf")), capped, x).to(tl.bfloat16)
        return part, tl.where(magnitude < float("inf"), x - part.to(tl.float32), 0.0)

    @triton.jit(do_not_specialize=["R"])
    def _parts_kernel(
        x_at, out_at, R, C, x_stride, out_stride, step,
        A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = (row < R) & (column < C)
        x = tl.load(x_at + row * x_stride + column, inside, other=0.0).to(tl.float32)
        first, rest = _nearest(x)
        second, _ = _nearest(rest)
        at = out_at + row * out_stride + column
        tl.store(at, first if A == 0 else second, inside)
        tl.store(at + tl.cast(step, tl.int64), first if B == 0 else second, inside)
