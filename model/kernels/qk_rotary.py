"""What attention is given, in one kernel each: normalised and rotated queries and keys, and the mask of a window.

    q[b, t, h] = R_t · x / √(mean x² + ε),   x = packed[b, t, 0, h], and k of packed[b, t, 1, h] in the same way;
    R_t turns the channel pair (e, e + E/2) by the phase of position t (Su et al. 2021)

Notable: to PyTorch a head's norm by itself is a CUDA block for each 64 channels, the rotation five passes, and the
gradient of the projection two tensors of zeros, two copies into slices and a sum. Here the projection is read once, in
float32 until q and k are rounded; its gradient is written once, where it belongs, from norms that are computed again.
q and k lie as [B, T, H, E], and v stays where it is: fused attention takes them as they are and answers in the order of
q, so that joining the heads copies nothing, and its gradients come in the same order.
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

TILE = 1024  # channel pairs of a program: 8 for each of its 128 threads, 16 bytes of bfloat16
BLOCK = 256  # keys of a program that makes a mask
# PyTorch's own stand-in for −∞, which not every cuDNN takes; float16 has it, and e to its power is exactly 0.
MASKED = -65504.0
Phases = tuple[Tensor, Tensor]


def qk_rotary(
    packed: Tensor, phases: Phases, n_heads: int, eps: float, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a projection into normalised, rotated queries and keys, and values.

    Args:
        packed: [B, T, 3 · H · E]: queries, keys and values of all heads, of any float type.
        phases: (cos, sin) of the T positions, [T, 1, E / 2] each, float32; constants, without a gradient.
        eps: added to the mean square of a head's channels.
        impl: "torch" (any device), "triton" (CUDA, or Triton's interpreter), "auto" picks.

    Returns:
        q, k, v, each [B, T, H, E] in the type of packed; v is a view of it. The PyTorch form rounds normalised
        channels, phases and products to that type, the kernel only the result.

    Raises:
        ValueError: for another impl, a width that is not 3 · H · E with an even E, or phases of another shape.
    """
    T, width = packed.shape[1:]
    if width % (6 * n_heads):
        raise ValueError(f"packed has width {width}: accepted are multiples of 6 · n_heads = {6 * n_heads}")
    cos, sin = phases
    expected = T, 1, width // n_heads // 6
    if cos.shape != expected or sin.shape != expected:
        raise ValueError(f"phases of shape {tuple(cos.shape)}, {tuple(sin.shape)}: accepted are two of {expected}")
    if _pick(impl, packed.is_cuda, packed.dtype, packed, cos, sin) == "triton":
        return apply(_QKRotary, packed.contiguous(), cos.float().contiguous(), sin.float().contiguous(), n_heads, eps)
    queries_keys, v = packed.unflatten(-1, (3, n_heads, -1)).movedim(2, 0).split((2, 1))
    normalised = F.rms_norm(queries_keys, queries_keys.shape[-1:], eps=eps).to(packed.dtype)
    q, k = rotate(normalised, phases)
    return q, k, v[0]


def rotate(x: Tensor, phases: Phases) -> Tensor:
    """Turn the channel pairs (e, e + E/2) of x [..., T, H, E] by their phases, in x's type."""
    cos, sin = (phase.to(x.dtype) for phase in phases)
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def window_mask(
    T: int, S: int, window: int, cached: int, dtype: torch.dtype, device: torch.device, impl: str = "auto"
) -> Tensor:
    """`attn_mask` of F.scaled_dot_product_attention for T queries, of which t sees the `window` keys up to cached + t.

    Args:
        S: keys, of which the first `cached` lie before the first query.
        dtype: of the queries.
        impl: as of `qk_rotary`.

    Returns:
        [T, S]: bool, true where a key is seen; or, from the kernel, what PyTorch would make of that by three more: 0
        where a key is seen and a large negative number elsewhere, in `dtype`.
    """
    if _pick(impl, device.type == "cuda", dtype) == "triton":
        mask = torch.empty(T, S, dtype=dtype, device=device)
        if mask.numel():
            _mask_kernel[(T, triton.cdiv(S, BLOCK))](mask, S, window, cached, MASKED, BLOCK)
        return mask
    distance = torch.arange(cached, cached + T, device=device)[:, None] - torch.arange(S, device=device)
    return (distance >= 0) & (distance < window)


def _pick(impl: str, cuda: bool, dtype: torch.dtype, *tensors: Tensor) -> str:
    check_impl(impl, triton)
    if impl == "auto":
        # float64 is for references: the kernels work in float32.
        fits = cuda and dtype != torch.float64 and not batched(*tensors)
        return "triton" if fits and triton is not None else "torch"
    return impl


class _QKRotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, packed: Tensor, cos: Tensor, sin: Tensor, n_heads: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, width = packed.shape
        E = width // n_heads // 3
        q, k = (torch.empty(B, T, n_heads, E, dtype=packed.dtype, device=packed.device) for _ in range(2))
        if q.numel():
            grid, sizes = _launch(B, T, n_heads, E)
            _forward_kernel[grid](packed, cos, sin, q, k, eps, *sizes)
        ctx.save_for_backward(packed, cos, sin)
        ctx.n_heads, ctx.eps = n_heads, eps
        return q, k, packed.unflatten(-1, (3, n_heads, E))[:, :, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        packed, cos, sin = ctx.saved_tensors
        B, T, width = packed.shape
        grad = torch.empty_like(packed)
        if grad.numel():
            grid, sizes = _launch(B, T, ctx.n_heads, width // ctx.n_heads // 3)
            _backward_kernel[grid](packed, cos, sin, *(g.contiguous() for g in grads), grad, ctx.eps, *sizes)
        return grad, None, None, None, None


def _launch(B: int, T: int, H: int, E: int) -> tuple[tuple[int], tuple[int, ...]]:
    """Grid and sizes: every program takes some heads of a row's positions, of queries and keys alike."""
    half = triton.next_power_of_2(E // 2)
    rows = max(1, TILE // half)
    blocks = triton.cdiv(T * H, rows)
    return (B * blocks,), (T, blocks, H, E, half, rows)


if triton is not None:

    @triton.jit
    def _places(cos_at, sin_at, T, blocks, H: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):
        """Where the left halves of a program's queries lie in packed and in q, which of them exist, their phases."""
        b = (tl.program_id(0) // blocks).to(tl.int64)
        row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)  # (t, h) of one row of the batch
        t = row // H
        e = tl.arange(0, HALF)[None, :]
        inside = (t < T)[:, None] & (e < E // 2)
        source = ((b * T + t) * (3 * H * E) + row % H * E)[:, None] + e
        to = ((b * T * H + row) * E)[:, None] + e
        phase = t[:, None] * (E // 2) + e
        cos, sin = tl.load(cos_at + phase, inside, other=0.0), tl.load(sin_at + phase, inside, other=0.0)
        return source, to, inside, cos, sin

    @triton.jit
    def _halves(x_at, at, inside, E: tl.constexpr):
        left = tl.load(x_at + at, inside, other=0.0).to(tl.float32)
        return left, tl.load(x_at + at + E // 2, inside, other=0.0).to(tl.float32)

    @triton.jit
    def _store(x_at, at, left, right, inside, E: tl.constexpr):
        tl.store(x_at + at, left.to(x_at.dtype.element_ty), inside)
        tl.store(x_at + at + E // 2, right.to(x_at.dtype.element_ty), inside)

    @triton.jit
    def _scale(left, right, eps, E: tl.constexpr):
        return tl.rsqrt(tl.sum(left * left + right * right, 1) / E + eps)[:, None]

    @triton.jit(do_not_specialize=["T", "blocks"])
    def _forward_kernel(
        packed, cos_at, sin_at, q_at, k_at, eps, T, blocks,
        H: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        at, to, inside, cos, sin = _places(cos_at, sin_at, T, blocks, H, E, HALF, ROWS)
        # All loads before the first store: the compiler may not move them over one.
        q_left, q_right = _halves(packed, at, inside, E)
        k_left, k_right = _halves(packed, at + H * E, inside, E)
        scale = _scale(q_left, q_right, eps, E)
        _store(q_at, to, (q_left * cos - q_right * sin) * scale, (q_right * cos + q_left * sin) * scale, inside, E)
        scale = _scale(k_left, k_right, eps, E)
        _store(k_at, to, (k_left * cos - k_right * sin) * scale, (k_right * cos + k_left * sin) * scale, inside, E)

    @triton.jit
    def _through(left, right, grad_left, grad_right, cos, sin, eps, E: tl.constexpr):
        """Gradients of both halves before norm and rotation: s (g − y mean(g y)) with y = s x and g turned back."""
        scale = _scale(left, right, eps, E)
        left, right = left * scale, right * scale
        of_left, of_right = grad_left * cos + grad_right * sin, grad_right * cos - grad_left * sin
        along = (tl.sum(of_left * left + of_right * right, 1) / E)[:, None]
        return scale * (of_left - left * along), scale * (of_right - right * along)

    @triton.jit(do_not_specialize=["T", "blocks"])
    def _backward_kernel(
        packed, cos_at, sin_at, of_q, of_k, of_v, grad, eps, T, blocks,
        H: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        at, to, inside, cos, sin = _places(cos_at, sin_at, T, blocks, H, E, HALF, ROWS)
        q_left, q_right = _halves(packed, at, inside, E)
        q_grad_left, q_grad_right = _halves(of_q, to, inside, E)
        k_left, k_right = _halves(packed, at + H * E, inside, E)
        k_grad_left, k_grad_right = _halves(of_k, to, inside, E)
        v_left, v_right = _halves(of_v, to, inside, E)
        left, right = _through(q_left, q_right, q_grad_left, q_grad_right, cos, sin, eps, E)
        _store(grad, at, left, right, inside, E)
        left, right = _through(k_left, k_right, k_grad_left, k_grad_right, cos, sin, eps, E)
        _store(grad, at + H * E, left, right, inside, E)
        _store(grad, at + 2 * H * E, v_left, v_right, inside, E)

    @triton.jit(do_not_specialize=["S", "window", "cached"])
    def _mask_kernel(mask, S, window, cached, MASKED: tl.constexpr, BLOCK: tl.constexpr):
        t, s = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        distance = cached + t - s
        value = tl.where((distance >= 0) & (distance < window), 0.0, MASKED)
        tl.store(mask + t.to(tl.int64) * S + s, value.to(mask.dtype.element_ty), s < S)
