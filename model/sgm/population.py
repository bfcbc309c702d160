"""Many versions of one module, evaluated at once: `torch.func.vmap` over their weights, no forward one by one.

A version is one row of a matrix [P, N]: all parameters of the module, flat, in the order of `named_parameters`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

# Called with the model (any version of it, to be called as the module is) and a batch → loss of each row [B].
RowLoss = Callable[..., Tensor]
AT_ONCE = 16_000_000  # weights of the versions that are evaluated at once


def byte_losses(model: Callable[[Tensor], Tensor], x: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean nats per byte of every row of x [B, L] bytes, over those that count [B, L] bool (all when None) → [B]."""
    losses = F.cross_entropy(model(x).flatten(0, 1), x.flatten().long(), reduction="none").view(x.shape)
    if counts is None:
        return losses.mean(1)
    return (losses * counts).sum(1) / counts.sum(1).clamp_min(1)


class Population:
    """A module's weights as one vector, and the losses of many such vectors.

    Args:
        module: any; it is evaluated in eval mode, and its own weights are neither read nor changed by `losses`.
        loss: see `RowLoss`; must go through `torch.func.vmap`: no look at values, no writes to what it is given.

    Attributes:
        spans: of each parameter in the vector, by name.
        shapes: of each parameter, by name.
        size: N.
    """

    def __init__(self, module: nn.Module, loss: RowLoss = byte_losses):
        self.module, self.loss = module, loss
        self.shapes = {name: p.shape for name, p in module.named_parameters()}
        if not self.shapes:
            raise ValueError("module has no parameters: accepted is one with at least one")
        self.spans: dict[str, slice] = {}
        position = 0
        for name, shape in self.shapes.items():
            self.spans[name] = slice(position, position + shape.numel())
            position += shape.numel()
        self.size = position
        self.device = next(module.parameters()).device

    @torch.no_grad()
    def values(self) -> Tensor:
        """The module's weights now, [N] float32."""
        return torch.cat([p.detach().flatten().float() for p in self.module.parameters()])

    @torch.no_grad()
    def load(self, values: Tensor) -> None:
        """Give the module the weights `values` [N]."""
        if values.shape != (self.size,):
            raise ValueError(f"values have shape {tuple(values.shape)}: accepted is ({self.size},)")
        for name, p in self.module.named_parameters():
            p.copy_(values[self.spans[name]].view(p.shape))

    def _parameters(self, versions: Tensor) -> dict[str, Tensor]:
        return {name: versions[:, span].view(len(versions), *self.shapes[name]) for name, span in self.spans.items()}

    @torch.no_grad()
    def losses(self, versions: Tensor, *batch: Any) -> Tensor:
        """Losses of every row of a batch under every version: [P, N] → [P, B] float32; ∞ where one is not finite."""
        if versions.dim() != 2 or versions.shape[1] != self.size:
            raise ValueError(f"versions have shape {tuple(versions.shape)}: accepted is [P, {self.size}]")
        module, buffers = self.module, dict(self.module.named_buffers())
        training = module.training
        module.eval()

        def one(parameters: dict[str, Tensor]) -> Tensor:
            return self.loss(lambda *args, **kw: functional_call(module, (parameters, buffers), args, kw), *batch)

        found = []
        # PyTorch's fused attention on the CPU has no rule for many models at once, and would loop over them.
        with sdpa_kernel(SDPBackend.MATH):
            for part in versions.split(max(1, AT_ONCE // self.size)):
                found.append(vmap(one, randomness="same")(self._parameters(part)).float())
        module.train(training)
        losses = torch.cat(found)
        return torch.where(losses.isfinite(), losses, torch.inf)
