"""Norms and what stands around them, each read and written once in each direction.

    normed = x / rms(x)                      `rms_norm`, over the last dimension, without gains
    sum = x + δ,  normed = sum / rms(sum)    `add_rms_norm`: a residual sum and the norm that the next layer reads
    sum = z + σ(−h) · σ(g) · f,  h', normed  `think`: the end of a thinking step, and the halting logit w · normed + b

Notable: it is one kernel forward and one backward, of which each function leaves parts out. Nothing is kept but the sum
and what was given: a row is short enough to find its size again. Under autocast PyTorch norms in float32, five times
the memory traffic, and every sum, product and sigmoid is one more pass in each direction. A residual stream that passes
through (δ None) has its two gradients added in the norm's kernel, and so have the layers that read one norm. Sums are
float32 inside and rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.transforms import apply, batched, check_impl

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch form does everywhere
    triton = None

TILE, WARPS = 2048, 4  # elements of a program, and its warps of 32 threads
TILES = 4  # of a program that also adds up the gradient of w: fewer partial sums
LARGEST = 2048  # channels that a row may have: it has to lie in one program


def pick(impl: str, width: int, *tensors: Tensor | None) -> str:
    """What computes rows of `width` channels, torch or triton; ValueError where `impl` is unknown or cannot be had."""
    check_impl(impl, triton)
    if impl == "auto":
        given = [x for x in tensors if x is not None]
        # float64 is for references: the kernels work in float32.
        fits = triton is not None and 0 < width <= LARGEST and not batched(*given)
        fits = fits and all(x.is_cuda and x.is_floating_point() and x.dtype != torch.float64 for x in given)
        return "triton" if fits else "torch"
    return impl


def rms_norm(x: Tensor, eps: float, impl: str = "auto") -> Tensor:
    """x / √(mean of x² over the last dimension + ε) [..., D]; float32 inside, x's type outside.

    impl: "torch" (any device), "triton" (CUDA, or Triton's interpreter; D ≤ 2048), "auto" picks.
    """
    if pick(impl, x.shape[-1], x) == "torch":
        return F.rms_norm(x, (x.shape[-1],), eps=eps).to(x.dtype)
    return apply(_NormedSum, x.contiguous(), None, None, None, None, None, eps, 1)[2]


def add_rms_norm(
    x: Tensor, delta: Tensor | None, eps: float, readers: int = 1, impl: str = "auto"
) -> tuple[Tensor, ...]:
    """x, δ [..., D] → (x + δ, its `rms_norm` once for each of 1 to 3 readers), all of the sum's type.

    With δ None the first is x: to be used in its place, as its gradient and those of the readers meet in the kernel.
    """
    same = delta is None or delta.shape == x.shape
    if not same or pick(impl, x.shape[-1], x, delta) == "torch":
        total = x if delta is None else x + delta
        return total, *[rms_norm(total, eps, "torch")] * readers
    delta = None if delta is None else delta.contiguous()
    total, _, *normed = apply(_NormedSum, x.contiguous(), delta, None, None, None, None, eps, readers)
    return total, *normed


def think(
    z: Tensor,
    step: tuple[Tensor, Tensor, Tensor] | None,
    halt: tuple[Tensor, Tensor] | None,
    eps: float,
    readers: int = 1,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """The end of one thinking step and the beginning of the next.

    Args:
        z: [..., D].
        step: (h [..., 1], g [..., D], f [..., D]) of the step that ends, or None before the first: its halting logit,
            gate's logits and thought. h = ∞ changes nothing.
        halt: (w [1, D], b [1]) of the step that begins, or None after the last.
        readers: 1 to 3 layers that read the norm.

    Returns:
        (z + σ(−h) · σ(g) · f,), and before another step also h' = w · normed + b [..., 1], and the sum's `rms_norm`
        once for each reader. h' is float32, but of the product's type in the PyTorch form.
    """
    tensors = [z, *(step or ()), *(halt or ())]
    same = step is None or (step[0].shape == (*z.shape[:-1], 1) and step[1].shape == step[2].shape == z.shape)
    if not same or pick(impl, z.shape[-1], *tensors) == "torch":
        if step is not None:
            h, gate, thought = step
            z = z + (1 - h.sigmoid()) * gate.sigmoid() * thought
        if halt is None:
            return (z,)
        normed = rms_norm(z, eps, "torch")
        return z, F.linear(normed, *halt), *[normed] * readers
    h, gate, thought = (None,) * 3 if step is None else (x.contiguous() for x in step)
    if halt is None:
        return (z,) if step is None else apply(_NormedSum, z.contiguous(), thought, h, gate, None, None, eps, 0)[:1]
    return apply(_NormedSum, z.contiguous(), thought, h, gate, *(x.contiguous() for x in halt), eps, readers)


class _NormedSum(torch.autograd.Function):
    """(sum, w · normed + b, normed …): without δ the sum is x, without w there is no product, without readers no norm.

    Readers get tensors of their own over one memory, so that autograd does not add up their gradients.
    """

    @staticmethod
    def forward(ctx, x, delta, halt, gate, weight, bias, eps, readers):
        D = x.shape[-1]
        total, normed, dot = x, None, None
        if delta is not None:
            dtype = torch.promote_types(x.dtype, delta.dtype)
            dtype = dtype if gate is None else torch.promote_types(dtype, gate.dtype)
            total = torch.empty_like(x, dtype=dtype)
        if readers:
            normed = torch.empty_like(total)
        if weight is not None:
            dot = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
        if x.numel():
            rows, (block, tile) = x.numel() // D, tile_of(D)
            sum_at = None if delta is None else total
            _forward[(triton.cdiv(rows, tile),)](
                x, delta, halt, gate, weight, bias, sum_at, normed, dot, rows, eps, D, tile, block, num_warps=WARPS
            )
        # Plain attributes: `apply` runs this without autograd's context too.
        ctx.materialize_grads = False
        ctx.eps, ctx.types = eps, (x.dtype, None if delta is None else delta.dtype)
        ctx.save_for_backward(total, *((None,) * 3 if gate is None else (delta, halt, gate)), weight, bias)
        return total, dot, *(normed.view_as(normed) for _ in range(readers))

    @staticmethod
    @once_differentiable
    def backward(ctx, of_total, of_dot, *of_normed):
        total, thought, halt, gate, weight, bias = ctx.saved_tensors
        of_total, of_dot, *of_normed = (None if x is None else x.contiguous() for x in (of_total, of_dot, *of_normed))
        of_normed = [grad for grad in of_normed if grad is not None]
        if of_total is None and of_dot is None and not of_normed:
            return (None,) * 8
        if of_dot is not None and not of_normed:
            of_normed = [torch.zeros_like(total)]
        rows, D, like = total[..., 0].numel(), total.shape[-1], torch.empty_like
        block, tile = tile_of(D)
        tiles = 1 if of_dot is None else TILES
        programs = triton.cdiv(rows, tile * tiles)
        # Where only the sum was used, its gradient is that of x.
        of_x = like(total) if of_normed else of_total
        of_thought, of_halt, of_gate = (None if gate is None else like(x) for x in (thought, halt, gate))
        of_weight = of_bias = None
        if of_dot is not None:
            # One partial sum a program, added up in a fixed order: the same bits every time.
            of_weight = torch.empty(programs, D, dtype=torch.float32, device=total.device)
        if total.numel() and (of_normed or gate is not None):
            first, second, third = (of_normed + [None] * 3)[:3]
            out = of_x if of_normed else None
            _backward[(programs,)](
                total, of_total, first, second, third, of_dot, halt, gate, thought, weight, out, of_halt, of_gate,
                of_thought, of_weight, rows, ctx.eps, D, tile, block, tiles, num_warps=WARPS,
            )  # fmt: skip
        if of_dot is not None:
            of_weight = of_weight.sum(0).view(weight.shape).to(weight.dtype)
            of_bias = of_dot.sum().view(bias.shape).to(bias.dtype)
        x_type, delta_type = ctx.types
        # One tensor for both, where they are of one type.
        of_delta = of_thought if gate is not None or delta_type is None else of_x.to(delta_type)
        return of_x.to(x_type), of_delta, of_halt, of_gate, of_weight, of_bias, None, None


def tile_of(width: int) -> tuple[int, int]:
    """(channels, rows) of a program's tile for rows of `width` channels."""
    block = triton.next_power_of_2(width)
    return block, max(1, TILE // block)


if triton is not None:

    @triton.jit
    def load(at, where, inside):
        return tl.load(at + where, inside, other=0.0).to(tl.float32)

    @triton.jit
    def inverse_size(x, eps, D: tl.constexpr):
        """1 / rms of the rows of x, [ROWS, 1]."""
        return tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]

    @triton.jit
    def norm_gradient(grad, normed, inverse, D: tl.constexpr):
        """Gradient of what was normed, from that of `normed`."""
        return inverse * (grad - normed * (tl.sum(grad * normed, 1) / D)[:, None])

    @triton.jit
    def _forward(
        x_at, delta_at, halt_at, gate_at, weight_at, bias_at, sum_at, normed_at, dot_at, N, eps,
        D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)
        inside = (row < N)[:, None] & (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        x = load(x_at, at, inside)
        if delta_at is not None:
            delta = load(delta_at, at, inside)
            if gate_at is not None:
                going_on = tl.sigmoid(-load(halt_at, row, row < N))
                delta *= going_on[:, None] * tl.sigmoid(load(gate_at, at, inside))
            total = (x + delta).to(sum_at.dtype.element_ty)
            tl.store(sum_at + at, total, inside)
            x = total.to(tl.float32)  # as the next layers will read it
        if normed_at is not None:
            normed = x * inverse_size(x, eps, D)
            tl.store(normed_at + at, normed.to(normed_at.dtype.element_ty), inside)
            if dot_at is not None:
                weight = load(weight_at, column, column < D)
                dot = tl.sum(normed * weight[None, :], 1) + tl.load(bias_at).to(tl.float32)
                tl.store(dot_at + row, dot, row < N)

    @triton.jit
    def _backward(
        total_at, of_total_at, of_normed_at, second_at, third_at, of_dot_at, halt_at, gate_at, thought_at, weight_at,
        of_x_at, of_halt_at, of_gate_at, of_thought_at, of_weight_at, N, eps,
        D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    ):  # fmt: skip
        column = tl.arange(0, BLOCK)
        if of_dot_at is not None:
            weight = load(weight_at, column, column < D)[None, :]
        of_weight = tl.zeros((ROWS, BLOCK), tl.float32)
        for tile in range(TILES):
            row = (tl.program_id(0).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
            inside = (row < N)[:, None] & (column < D)[None, :]
            at = row[:, None] * D + column[None, :]
            grad = tl.zeros((ROWS, BLOCK), tl.float32)
            if of_total_at is not None:
                grad = load(of_total_at, at, inside)
            if of_normed_at is not None:
                x = load(total_at, at, inside)
                inverse = inverse_size(x, eps, D)
                normed = x * inverse
                of_normed = load(of_normed_at, at, inside)
                if second_at is not None:
                    of_normed += load(second_at, at, inside)
                if third_at is not None:
                    of_normed += load(third_at, at, inside)
                if of_dot_at is not None:
                    of_dot = load(of_dot_at, row, row < N)[:, None]
                    of_normed += of_dot * weight
                    of_weight += of_dot * normed
                grad += norm_gradient(of_normed, normed, inverse, D)
                tl.store(of_x_at + at, grad.to(of_x_at.dtype.element_ty), inside)
            if gate_at is not None:
                going_on = tl.sigmoid(-load(halt_at, row, row < N))
                gate = tl.sigmoid(load(gate_at, at, inside))
                thought = load(thought_at, at, inside)
                grad *= gate
                of_halt = -tl.sum(grad * thought, 1) * going_on * (1.0 - going_on)
                tl.store(of_halt_at + row, of_halt.to(of_halt_at.dtype.element_ty), row < N)
                grad *= going_on[:, None]
                tl.store(of_thought_at + at, grad.to(of_thought_at.dtype.element_ty), inside)
                of_gate = grad * thought * (1.0 - gate)
                tl.store(of_gate_at + at, of_gate.to(of_gate_at.dtype.element_ty), inside)
        if of_dot_at is not None:
            tl.store(of_weight_at + tl.program_id(0) * D + column, tl.sum(of_weight, 0), column < D)
