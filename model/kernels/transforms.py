"""What lets `torch.func.vmap` run many models at once through operations of ours (model.sgm's populations)."""

from typing import Any

import torch
from torch import Tensor


class _NoContext:
    """Takes what a Function would keep for its backward pass, and forgets it."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, or its forward alone where no gradient is wanted: transforms see plain operations then."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NoContext(), *arguments)


def batched(*tensors: Tensor) -> bool:
    """Whether vmap is at work on any of them, whose memory a kernel of ours could not read."""
    return any(_is_batched(tensor) for tensor in tensors)


# PyTorch has no public name for it; without that one, no tensor is taken for one of vmap's.
_is_batched = getattr(getattr(torch._C, "_functorch", None), "is_batchedtensor", lambda tensor: False)
