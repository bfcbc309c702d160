"""Learning beside what is known: changes of a linear layer that no input of an earlier task can see.

    y = W x;   ΔW = Σ a bᵀ with b in the span of the new task's inputs, orthogonal to all inputs of earlier tasks
    so that ΔW x = 0 for every x that an earlier task has read there: its outputs stay, while ΔW x ≠ 0 for new ones

Gradient projection (Saha et al. 2021; orthogonal weight modification, Zeng et al. 2019) without gradients: a mutation's
right factor is drawn from the inputs that the layer reads, which is where a gradient would lie too. Fewer directions to
search are worth as much as the protection (docs/sgm.md).

A locked weight does not move. Locks are blocks of 64 outputs of one input (`model.sgm.locking`), so rows of 64 share
their free inputs, and are projected within those: orthogonality and locks hold together.

When the inputs of earlier tasks span all free inputs, the layer is full and cannot change.
"""

import torch
from torch import Tensor, nn

from model.sgm.locking import BLOCK
from model.sgm.population import Population, evaluating

RELATIVE = 1e-3  # of the largest; smaller parts of a new input, outside what is protected, are not learned from
ROUNDING = 1e-5  # of the largest; smaller parts of an input are rounding, and not protected
Within = dict[str, list[tuple[slice, Tensor]]]


class Directions:
    """What earlier tasks have read at some linear layers.

    Args:
        population: of the module.
        names: of the weights; each of an `nn.Linear` that the module calls.

    Attributes:
        protected: by name, an orthonormal basis [n, in] float32 of what earlier tasks have read.

    Raises:
        ValueError: naming a weight that is not of an `nn.Linear`.
    """

    def __init__(self, population: Population, names: list[str]):
        self.population = population
        modules = dict(population.module.named_modules())
        self.layers: dict[str, nn.Linear] = {}
        for name in names:
            prefix, _, kind = name.rpartition(".")
            layer = modules.get(prefix)
            if kind != "weight" or not isinstance(layer, nn.Linear):
                raise ValueError(f"names={name!r}: accepted are weights of nn.Linear layers")
            self.layers[name] = layer
        self.protected = {
            name: torch.zeros(0, layer.in_features, device=population.device) for name, layer in self.layers.items()
        }

    @torch.no_grad()
    def inputs(self, values: Tensor, x: Tensor, counts: Tensor | None = None) -> dict[str, Tensor]:
        """What each layer reads of a batch under the weights values [N] → [n, in] by name.

        The module is left with these weights.

        Args:
            x: what the module is called with; for bytes [B, L].
            counts: [B, L] bool, the places whose outputs count; a layer that reads one input a place, or one for
                several places (a patch), is looked at there alone. All when None.

        Raises:
            ValueError: naming a layer that the module does not call.
        """
        self.population.load(values)
        read: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        handles = [
            layer.register_forward_pre_hook(lambda _, args, name=name: read[name].append(args[0].detach()))
            for name, layer in self.layers.items()
        ]
        try:
            with evaluating(self.population.module) as module:
                module(x)
        finally:
            for handle in handles:
                handle.remove()
        if missing := [name for name, inputs in read.items() if not inputs]:
            raise ValueError(f"names={missing[0]!r}: accepted are layers that the module calls")
        return {name: torch.cat([_at(each, counts) for each in inputs]).float() for name, inputs in read.items()}

    def protect(self, inputs: dict[str, Tensor]) -> None:
        """From now on no change may be seen by these inputs, nor by what they span with those before."""
        for name, read in inputs.items():
            new = orthogonal_part(read, self.protected[name], ROUNDING)
            self.protected[name] = torch.cat([self.protected[name], new])

    def anchor(self, inputs: dict[str, Tensor], energy: float = 0.9) -> None:
        """Protect what ordinary inputs have in common: the principal directions with `energy` of their squares.

        Without it, what is learned for one input says something about all others too, which later tasks have to undo
        in the little room that is left to them.
        """
        for name, read in inputs.items():
            _, values, directions = torch.linalg.svd(read.double(), full_matrices=False)
            share = values.square().cumsum(0) / values.square().sum()
            self.protect({name: directions[: int((share < energy).sum()) + 1].float()})

    @torch.no_grad()
    def within(self, inputs: dict[str, Tensor], locked: Tensor) -> Within:
        """Where changes for new inputs may lie: by name, for rows of 64 a basis [k, in], k = 0 where there is no room.

        Args:
            locked: [N] bool.
        """
        found: Within = {}
        for name, read in inputs.items():
            layer = self.layers[name]
            mask = locked[self.population.spans[name]].view(layer.out_features, layer.in_features)
            found[name], known = [], {}
            for first in range(0, layer.out_features, BLOCK):
                rows = slice(first, min(first + BLOCK, layer.out_features))
                free = ~mask[rows].any(0)
                # Rows with the same free inputs share a basis.
                key = free.cpu().numpy().tobytes()
                if key not in known:
                    known[key] = orthogonal_part(read * free, self.protected[name] * free)
                found[name].append((rows, known[key]))
        return found

    def used(self, name: str) -> float:
        """Share of a layer's inputs that is spanned by what is protected: 1 is full."""
        return len(self.protected[name]) / self.layers[name].in_features


def orthogonal_part(new: Tensor, old: Tensor, relative: float = RELATIVE) -> Tensor:
    """An orthonormal basis [k, D], k ≥ 0, of what the rows new [n, D] have outside the span of the rows old [m, D].

    Parts smaller than `relative` of the longest new row are left out.
    """
    if not len(new):
        return new.new_zeros(0, new.shape[1]).float()
    rest, size = new.double(), new.double().norm(dim=1).max()
    if len(old):
        # Where old rows are dependent, the basis has more than their span: that costs room, and is never wrong.
        span = torch.linalg.qr(old.double().T).Q
        for _ in range(2):  # once more, for what rounding left
            rest = rest - rest @ span @ span.T
    _, values, directions = torch.linalg.svd(rest, full_matrices=False)
    return directions[values > relative * size].float()


def _at(inputs: Tensor, counts: Tensor | None) -> Tensor:
    """inputs [..., in] of a layer at the places that count → [n, in]."""
    flat = inputs.flatten(0, -2)
    if counts is None:
        return flat
    B, L = counts.shape
    places = inputs.shape[0] and len(flat) // B
    if len(flat) != B * places or places == 0:
        return flat
    if places >= L:  # perhaps filled up to whole patches
        return flat.view(B, places, -1)[:, :L][counts]
    # Patches of a size that L does not tell for certain: what counts in patches of any size that would be so many.
    found = torch.zeros(B, places, dtype=torch.bool, device=counts.device)
    for each in (each for each in range(2, L + 1) if -(-L // each) == places):
        padded = nn.functional.pad(counts, (0, places * each - L))
        found |= padded.view(B, places, each).any(-1)
    return flat.view(B, places, -1)[found] if found.any() else flat
