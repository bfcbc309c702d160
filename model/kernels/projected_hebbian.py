"""`packed_hebbian` together with the projection that it reads: y = x Wᵀ and then the rule, as one operation.

Notable: autograd hands gradients over in the type of the tensor that they belong to, here float32, which the
projection's own gradients begin by rounding to bfloat16 (`float32_linear`). As one operation the rule's gradient is
written so: of the widest tensor of a block half the bytes, and no pass that rounds it.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels import packed_hebbian as rule
from model.kernels.float32_linear import split_backward, split_forward, splits
from model.kernels.transforms import apply


def joins(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer of which `packed_hebbian.suits` takes `projected_hebbian`: `float32_linear` would split as well,
    and there is a gradient to gain by."""
    return splits(x, weight) and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def projected_hebbian(
    x: Tensor, weight: Tensor, bias: Tensor, plasticity: Tensor, n_heads: int, *, state: rule.State | None = None
) -> tuple[Tensor, rule.State]:
    """`packed_hebbian(float32_linear(x, weight), bias, plasticity, n_heads)` by its kernels; CUDA or the interpreter.

    Args:
        x: [B, T, D] bfloat16.
        weight: [3 · H · E + H, D] of queries, keys, values and gates, float32, as bias and state are.

    Returns:
        As `packed_hebbian`, which the other arguments are of.
    """
    M, z = (None, None) if state is None else (tensor.contiguous() for tensor in state)
    alpha, bias = plasticity.detach().float(), bias.contiguous()
    out, M, z = apply(_Projected, x.contiguous(), weight.contiguous(), bias, alpha, n_heads, M, z)
    return out, (M, z)


class _Rule:
    """What the rule's own Function keeps in its context; its tensors are kept by ours."""

    gradient_type = torch.bfloat16
    saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, alpha, H, M, z):
        inner, heads = _Rule(), split_forward(x.flatten(0, 1), weight)
        found = rule._PackedHebbian.forward(inner, heads.view(*x.shape[:2], -1), bias, alpha, H, M, z)
        ctx.save_for_backward(x, weight, *inner.saved_tensors)
        inner.saved_tensors, ctx.inner = (), inner
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, weight, *kept = ctx.saved_tensors
        inner = _Rule()
        vars(inner).update(vars(ctx.inner), saved_tensors=kept)
        of_heads, of_bias, *_, of_M, of_z = rule._PackedHebbian.backward(inner, *grads)
        of_x, of_weight = split_backward(x.flatten(0, 1), weight, of_heads.flatten(0, 1), *ctx.needs_input_grad[:2])
        return None if of_x is None else of_x.view(x.shape), of_weight, of_bias.to(weight.dtype), None, None, of_M, of_z
