"""Many versions of one module, evaluated at once: `torch.func.vmap` over their weights, no forward one by one.

A version is one row of a matrix [P, N]: all parameters of the module, flat, in the order of `named_parameters`.

Notable: versions are float32, and each parameter is evaluated in its own dtype: under a half-precision module a
version's loss is that of the weights that `load` would give it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvTransposeNd

from model.layers.hull import PetalGroup, VectorHull

# Called with the model (any version of it, to be called as the module is) and a batch → loss of each row [B], or of
# each place of each row [B, L]; what is lowered is their mean.
RowLoss = Callable[..., Tensor]
AT_ONCE = 16_000_000  # weights of the versions that are evaluated at once


def byte_losses(model: Callable[[Tensor], Tensor], x: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean nats per byte of every row of x [B, L] bytes, over those that count [B, L] bool (all when None) → [B]."""
    return place_losses(model, x, counts).mean(1)


def place_losses(model: Callable[[Tensor], Tensor], x: Tensor, counts: Tensor | None = None) -> Tensor:
    """Byte by byte [B, L], so that the mean of a row is that of `byte_losses`: 0 for bytes that do not count."""
    losses = F.cross_entropy(model(x).flatten(0, 1), x.flatten().long(), reduction="none").view(x.shape)
    if counts is None:
        return losses
    return losses.masked_fill(~counts, 0) * (x.shape[1] / counts.sum(1, keepdim=True).clamp_min(1))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """The module in eval mode; every part of it is in its own mode again afterwards."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield module.eval()
    finally:
        for part, mode in modes.items():
            part.training = mode


@dataclass(frozen=True)
class Matrices:
    """A parameter as `count` matrices that act on vectors: its weights in order are [count, rows, columns].

    A vector (a bias; of petals one a petal) is a matrix with one input, which is always 1.
    """

    count: int
    outputs: int
    inputs: int
    inputs_first: bool  # rows are inputs and columns outputs; otherwise the other way round
    vector: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(count, rows, columns)."""
        rows, columns = (self.inputs, self.outputs) if self.inputs_first else (self.outputs, self.inputs)
        return self.count, rows, columns


def matrices(module: nn.Module) -> dict[str, Matrices]:
    """How each parameter of a module is cut into matrices, by the name that `named_parameters` gives it.

    [outputs, inputs] of a linear layer; [outputs, inputs · kernel] of a convolution, [inputs, outputs · kernel] of a
    transposed one; of petals (model.layers.hull) one matrix a petal, in which `down` and `raw` have their inputs first.
    Any other parameter of more than one dimension is [first, all others]; what is left, and all that is called a bias,
    is a vector.
    """
    names = {p: name for name, p in module.named_parameters()}
    found: dict[str, Matrices] = {}
    for part in module.modules():
        petals = isinstance(part, (PetalGroup, VectorHull))
        for own, p in part.named_parameters(recurse=False):
            if names[p] in found:  # tied: the first that has it
                continue
            count, rest = (p.shape[0], p.shape[1:]) if petals and p.dim() > 1 else (1, p.shape)
            if len(rest) < 2 or own.endswith("bias"):
                found[names[p]] = Matrices(count, rest.numel(), 1, True, vector=True)
                continue
            inputs_first = isinstance(part, _ConvTransposeNd) or (petals and own in ("down", "raw"))
            ends = rest[0], rest[1:].numel()
            found[names[p]] = Matrices(count, *(ends[::-1] if inputs_first else ends), inputs_first)
    return {name: found[name] for name in names.values()}


class Population:
    """A module's weights as one vector, and the losses of many such vectors.

    Args:
        module: any; it is evaluated in eval mode, and its own weights are neither read nor changed by `losses`.
        loss: see `RowLoss`; must go through `torch.func.vmap`: no look at values, no writes to what it is given.

    Attributes:
        spans: of each parameter in the vector, by name.
        shapes: of each parameter, by name.
        matrices: of each parameter, by name.
        size: N.
    """

    def __init__(self, module: nn.Module, loss: RowLoss = byte_losses):
        self.module, self.loss = module, loss
        self.shapes = {name: p.shape for name, p in module.named_parameters()}
        if not self.shapes:
            raise ValueError("module has no parameters: accepted is one with at least one")
        self.matrices = matrices(module)
        self._dtypes = {name: p.dtype for name, p in module.named_parameters()}
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

    def cast(self, name: str, values: Tensor) -> Tensor:
        """Weights of a parameter in the dtype that it has in the module."""
        return values.to(self._dtypes[name])

    def select(self, free: Tensor) -> "Selection":
        """The parameters that have a weight with free [N] bool."""
        return Selection(self, [name for name, span in self.spans.items() if free[span].any()])

    @torch.no_grad()
    def losses(
        self, versions: Tensor, *batch: Any, of: "Selection | None" = None, base: Tensor | None = None
    ) -> Tensor:
        """What the loss gives under every version: [P, N] → [P, B], or [P, B, L], float32; ∞ where one is not finite.

        Args:
            of: versions are [P, M] of the selected parameters alone, the others as in base [N]. What does not depend
                on the selected ones is computed once for all versions.
        """
        of = of or Selection(self, list(self.spans))
        if versions.dim() != 2 or versions.shape[1] != of.size:
            raise ValueError(f"versions have shape {tuple(versions.shape)}: accepted is [P, {of.size}]")
        module, rest = self.module, dict(self.module.named_buffers())
        if base is not None:
            for name in self.spans.keys() - of.spans.keys():
                rest[name] = self.cast(name, base[self.spans[name]]).view(self.shapes[name])

        def one(parameters: dict[str, Tensor]) -> Tensor:
            return self.loss(lambda *args, **kw: functional_call(module, (parameters, rest), args, kw), *batch)

        found = []
        # PyTorch's fused attention on the CPU has no rule for many models at once, and would loop over them.
        with evaluating(module), sdpa_kernel(SDPBackend.MATH):
            for part in versions.split(max(1, AT_ONCE // of.size)):
                found.append(vmap(one, randomness="same")(of.parameters(part)).float())
        losses = torch.cat(found)
        return torch.where(losses.isfinite(), losses, torch.inf)


class Selection:
    """Some of a population's parameters, as one shorter vector [M].

    Attributes:
        spans: of each selected parameter in the short vector, by name.
        matrices: of each selected parameter, by name.
        size: M.
    """

    def __init__(self, population: Population, names: list[str]):
        self.population, self.device = population, population.device
        self.matrices = {name: population.matrices[name] for name in names}
        self.spans: dict[str, slice] = {}
        position = 0
        for name in names:
            length = population.shapes[name].numel()
            self.spans[name] = slice(position, position + length)
            position += length
        self.size = position

    def take(self, values: Tensor) -> Tensor:
        """[..., N] → [..., M]."""
        return torch.cat([values[..., self.population.spans[name]] for name in self.spans], -1)

    def put(self, part: Tensor, values: Tensor) -> Tensor:
        """values [N] with the selected ones from part [M]; a copy."""
        values = values.clone()
        for name, span in self.spans.items():
            values[self.population.spans[name]] = part[span]
        return values

    def parameters(self, versions: Tensor) -> dict[str, Tensor]:
        """[P, M] → [P, *shape] by name."""
        return {
            name: self.population.cast(name, versions[:, span]).view(len(versions), *self.population.shapes[name])
            for name, span in self.spans.items()
        }
