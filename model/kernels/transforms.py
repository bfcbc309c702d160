"""What operations of ours share: their choice of a form, and what lets `torch.func.vmap` run many models at once
through them (model.sgm's populations)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class _NoContext:
    """Takes what a Function would keep for its backward pass, and forgets it."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def check_impl(impl: str, triton: Any) -> None:
    """ValueError where a kernel's `impl` is unknown, or needs the package `triton` and that is None."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl={impl!r}: accepted are auto, torch, triton")
    if impl == "triton" and triton is None:
        raise ValueError("impl='triton': needs the package triton; accepted here are auto and torch")


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, or its forward alone where no gradient is wanted: transforms see plain operations then."""
    with on_device_of(*arguments):
        if torch.is_grad_enabled():
            return function.apply(*arguments)
        return function.forward(_NoContext(), *arguments)


def on_device_of(*arguments: Any) -> AbstractContextManager:
    """Makes the device of the first CUDA tensor the current one: Triton launches there, PyTorch where tensors are."""
    for tensor in arguments:
        if isinstance(tensor, Tensor) and tensor.is_cuda:
            return nullcontext() if tensor.device.index == torch.cuda.current_device() else torch.cuda.device_of(tensor)
    return nullcontext()


def hooked(layer: nn.Module) -> bool:
    """Whether somebody wants to see the layer called (model.sgm's directions, GENESIS's plugins), or it is not just an
    nn.Linear: its weights alone are not what it does."""
    hooks = "_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"
    return type(layer) is not nn.Linear or any(getattr(layer, name) for name in hooks)


def batched(*tensors: Tensor) -> bool:
    """Whether vmap is at work on any of them, whose memory a kernel of ours could not read."""
    return any(_is_batched(tensor) for tensor in tensors)


# PyTorch has no public name for it; without that one, no tensor is taken for one of vmap's.
_is_batched = getattr(getattr(torch._C, "_functorch", None), "is_batchedtensor", lambda tensor: False)
