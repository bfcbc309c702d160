"""Cross-entropy of bytes: logits read once forward, and once backward to write their gradient.

Notable: eager PyTorch writes the logarithms of all probabilities, fills a tensor as large with zeros for their
gradient, and reads both again. What is kept here is one number a byte, log Σ exp below the largest logit.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.kernels.transforms import apply, batched, check_impl

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch form does everywhere
    triton = None

CLASSES = 256
ROWS = 8  # of a program; 16 logits a thread


def byte_cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean", impl: str = "auto") -> Tensor:
    """−log softmax(logits)[target] in nats, float32 at least.

    Args:
        logits: [..., 256] of any float type.
        targets: [...] of any integer type, in 0…255.
        reduction: "mean" over all bytes, a scalar; or "none", of targets' shape.
        impl: "torch" (any device), "triton" (CUDA, or Triton's interpreter), "auto" picks.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r}: accepted are mean and none")
    check_impl(impl, triton)
    if logits.shape != (*targets.shape, CLASSES):
        accepted = f"[..., {CLASSES}] and [...]"
        raise ValueError(f"logits, targets: {[*logits.shape]}, {[*targets.shape]}; accepted are shapes {accepted}")
    if impl == "auto":
        # float64 is for references: the kernel works in float32.
        fits = logits.is_cuda and not batched(logits, targets) and logits.dtype != torch.float64 and targets.numel()
        impl = "triton" if fits and triton is not None else "torch"
    if impl == "torch":
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        each = F.cross_entropy(exact.reshape(-1, CLASSES), targets.flatten().long(), reduction=reduction)
    else:
        each = apply(_CrossEntropy, logits.reshape(-1, CLASSES).contiguous(), targets.flatten().contiguous())
        each = each.mean() if reduction == "mean" else each
    return each if reduction == "mean" else each.view(targets.shape)


class _CrossEntropy(torch.autograd.Function):
    """logits [N, 256], targets [N] → [N] float32."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        loss, logs = (torch.empty(len(targets), dtype=torch.float32, device=logits.device) for _ in range(2))
        if len(targets):
            _cross_entropy_kernel[(triton.cdiv(len(targets), ROWS),)](
                logits, targets, loss, logs, len(targets), ROWS, CLASSES
            )
        ctx.save_for_backward(logits, targets, logs)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, logs = ctx.saved_tensors
        of_logits = torch.empty_like(logits)
        if len(targets):
            _cross_entropy_backward_kernel[(triton.cdiv(len(targets), ROWS),)](
                logits, targets, logs, grad.contiguous(), of_logits, len(targets), ROWS, CLASSES
            )
        return of_logits, None


if triton is not None:

    @triton.jit
    def _rows(logits, targets, N, ROWS: tl.constexpr, CLASSES: tl.constexpr):
        """→ row [ROWS], which are there, where their logits are, those logits, and which of them is the target."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, CLASSES)[None, :]
        at = row[:, None] * CLASSES + column
        x = tl.load(logits + at, (row < N)[:, None], other=0.0).to(tl.float32)
        target = tl.load(targets + row, row < N, other=0).to(tl.int32)
        return row, row < N, at, x, column == target[:, None]

    @triton.jit
    def _cross_entropy_kernel(logits, targets, loss, logs, N, ROWS: tl.constexpr, CLASSES: tl.constexpr):
        row, inside, _, x, chosen = _rows(logits, targets, N, ROWS, CLASSES)
        largest = tl.max(x, 1)
        log = tl.log(tl.sum(tl.exp(x - largest[:, None]), 1))
        # Relative to the largest, so that large logits do not round the loss.
        below = tl.sum(tl.where(chosen, x - largest[:, None], 0.0), 1)
        tl.store(logs + row, log, inside)
        tl.store(loss + row, log - below, inside)

    @triton.jit
    def _cross_entropy_backward_kernel(
        logits, targets, logs, grad, of_logits, N, ROWS: tl.constexpr, CLASSES: tl.constexpr
    ):
        row, inside, at, x, chosen = _rows(logits, targets, N, ROWS, CLASSES)
        log = tl.load(logs + row, inside, other=0.0)
        share = tl.exp(x - tl.max(x, 1)[:, None] - log[:, None])
        scale = tl.load(grad + row, inside, other=0.0)[:, None]
        of_x = scale * tl.where(chosen, share - 1.0, share)
        tl.store(of_logits + at, of_x.to(of_logits.dtype.element_ty), inside[:, None])
