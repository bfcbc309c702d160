"""The fusion of a block's two mixers, read and written once in each direction.

    y = γ ⊙ norm(attended) + (1 − γ) ⊙ norm(recalled),   γ = σ(gate),   each head normed for itself

Notable: the fast weights' float32 is read as it is; PyTorch's form rounds at every operation under autocast, in some
twelve passes forward. Backward finds γ and the norms again from the three inputs, which are there anyway.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels import norms
from model.kernels.norms import pick, rms_norm
from model.kernels.transforms import apply

try:
    import triton
    import triton.language as tl

    from model.kernels.norms import inverse_size, load, norm_gradient
except ImportError:  # the PyTorch form does everywhere
    triton = None


def fuse(
    gate: Tensor,
    attended: Tensor,
    recalled: Tensor,
    heads: int,
    eps: float,
    recall_eps: float,
    impl: str = "auto",
) -> Tensor:
    """γ ⊙ norm(attended) + (1 − γ) ⊙ norm(recalled), γ = sigmoid(gate): all [..., D], the result of gate's type.

    Args:
        gate: logits.
        heads: parts of D; ε of their norms are `eps` for `attended` and `recall_eps` for `recalled`.
        impl: "torch" (any device), "triton" (CUDA, or Triton's interpreter; heads ≤ 2048 wide), "auto" picks.
    """
    E = gate.shape[-1] // heads
    same = gate.shape == attended.shape == recalled.shape
    if not same or pick(impl, E, gate, attended, recalled) == "torch":
        gate = gate.sigmoid()
        attended, recalled = (
            rms_norm(x.to(gate.dtype).unflatten(-1, (heads, -1)), each, "torch").flatten(-2)
            for x, each in ((attended, eps), (recalled, recall_eps))
        )
        return torch.lerp(recalled, attended, gate)
    return apply(_Fuse, gate.contiguous(), attended.contiguous(), recalled.contiguous(), E, eps, recall_eps)


class _Fuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, attended, recalled, width, eps, recall_eps):
        y = torch.empty_like(gate)
        inputs, sizes = (gate, attended, recalled), (width, eps, recall_eps)
        _launch(_forward, *inputs, y, *sizes)
        ctx.save_for_backward(*inputs)
        ctx.sizes = sizes
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in inputs]
        _launch(_backward, *inputs, grad.contiguous(), *gradients, *ctx.sizes)
        return *gradients, None, None, None


def _launch(kernel, *arguments) -> None:
    """Run a kernel over rows of one head each."""
    (gate, *tensors), (E, eps, recall_eps) = arguments[:-3], arguments[-3:]
    if not gate.numel():
        return
    rows, (block, tile) = gate.numel() // E, norms.tile_of(E)
    grid = (triton.cdiv(rows, tile),)
    kernel[grid](gate, *tensors, rows, eps, recall_eps, E, tile, block, num_warps=norms.WARPS)


if triton is not None:

    @triton.jit
    def _forward(
        gate_at, attended_at, recalled_at, y_at, N, eps, recall_eps,
        E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)
        inside = (row < N)[:, None] & (column < E)[None, :]
        at = row[:, None] * E + column[None, :]
        attended, recalled = load(attended_at, at, inside), load(recalled_at, at, inside)
        attended *= inverse_size(attended, eps, E)
        recalled *= inverse_size(recalled, recall_eps, E)
        y = recalled + tl.sigmoid(load(gate_at, at, inside)) * (attended - recalled)
        tl.store(y_at + at, y.to(y_at.dtype.element_ty), inside)

    @triton.jit
    def _backward(
        gate_at, attended_at, recalled_at, grad_at, of_gate_at, of_attended_at, of_recalled_at, N, eps, recall_eps,
        E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)
        inside = (row < N)[:, None] & (column < E)[None, :]
        at = row[:, None] * E + column[None, :]
        attended, recalled = load(attended_at, at, inside), load(recalled_at, at, inside)
        gate, grad = tl.sigmoid(load(gate_at, at, inside)), load(grad_at, at, inside)
        inverse, recall_inverse = inverse_size(attended, eps, E), inverse_size(recalled, recall_eps, E)
        attended *= inverse
        recalled *= recall_inverse
        share = gate * grad
        of_gate = share * (1.0 - gate) * (attended - recalled)
        tl.store(of_gate_at + at, of_gate.to(of_gate_at.dtype.element_ty), inside)
        of_attended = norm_gradient(share, attended, inverse, E)
        tl.store(of_attended_at + at, of_attended.to(of_attended_at.dtype.element_ty), inside)
        of_recalled = norm_gradient(grad - share, recalled, recall_inverse, E)
        tl.store(of_recalled_at + at, of_recalled.to(of_recalled_at.dtype.element_ty), inside)
