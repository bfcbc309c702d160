"""Learning beside what is known: changes of a linear layer that no input of an earlier task can see.

    y = W x;   ΔW = Σ a bᵀ with b in the span of the new task's inputs, orthogonal to all inputs of earlier tasks
    so that ΔW x = 0 for every x that an earlier task has read there: its outputs stay, while ΔW x ≠ 0 for new ones

Gradient projection (Saha et al. 2021; orthogonal weight modification, Zeng et al. 2019) without gradients: a mutation's
right factor is drawn from the inputs that the layer reads, which is where a gradient would lie too. Fewer directions to
search are worth as much as the protection (docs/sgm.md).

That holds for any number of layers together, and for a layer that is called again and again: while no layer's outputs
change where an earlier task goes through it, no layer's inputs do. So what is protected has to be what the task reads
once it has been learned, and at every place that its outputs depend on. A layer whose outputs are mixed over places
later on, by attention or a memory, is read everywhere for that.

A locked weight does not move, so each row is projected within its free inputs: orthogonality and locks hold together.
Locks are blocks of 64 outputs of one input (`model.sgm.locking`), so that rows share their free inputs, and a basis.

When the inputs of earlier tasks span all free inputs, the layer is full and cannot change.
"""

import itertools
from collections.abc import Collection

import torch
from torch import Tensor, nn

from model.sgm.population import Population, evaluating

RELATIVE = 1e-3  # of the largest; smaller parts of a new input, outside what is protected, are not learned from
DEPENDENT = 1e-9  # a locked input that is nearer than that to the span of what is protected is in it
ROUNDING = 1e-5  # of the largest; smaller parts of an input are rounding, and not protected
Within = dict[str, list[tuple[slice, Tensor]]]


class Directions:
    """What earlier tasks have read at some linear layers.

    Args:
        population: of the module.
        names: of the weights; each of an `nn.Linear` that the module calls, and of nothing else in it.
        everywhere: those of them whose outputs reach other places: all that they read counts.

    Attributes:
        protected: by name, an orthonormal basis [n, in] float32 of what earlier tasks have read.

    Raises:
        ValueError: naming a weight that is not of an `nn.Linear`, or is another parameter's too.
    """

    def __init__(self, population: Population, names: list[str], everywhere: Collection[str] = ()):
        self.population, self.everywhere = population, frozenset(everywhere)
        modules = dict(population.module.named_modules())
        self.layers: dict[str, nn.Linear] = {}
        for name in names:
            prefix, _, kind = name.rpartition(".")
            layer = modules.get(prefix)
            if kind != "weight" or not isinstance(layer, nn.Linear):
                raise ValueError(f"names={name!r}: accepted are weights of nn.Linear layers")
            users = [each for each in modules.values() if any(p is layer.weight for p in each._parameters.values())]
            if len(users) > 1:  # the other would read what is not protected
                raise ValueError(f"names={name!r}: accepted are weights of one layer alone, this one is tied")
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
            counts: [B, L] bool, the places whose outputs count; a layer that is not of those `everywhere`, and reads
                one input a place or one for several places (a patch), is looked at there alone. All when None.

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
        return {
            name: torch.cat([_at(each, None if name in self.everywhere else counts) for each in inputs]).float()
            for name, inputs in read.items()
        }

    def protect(self, inputs: dict[str, Tensor]) -> None:
        """From now on no change may be seen by these inputs, nor by what they span with those before."""
        for name, read in inputs.items():
            new = orthogonal_part(read, self.protected[name], ROUNDING)
            self.protected[name] = torch.cat([self.protected[name], new])

    def forget(self) -> None:
        """Protect nothing any more."""
        for name, basis in self.protected.items():
            self.protected[name] = basis[:0]

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
        """Where changes for new inputs may lie: by name, for rows that follow each other and have the same free inputs,
        a basis [k, in], k = 0 where there is no room.

        Args:
            locked: [N] bool.
        """
        found: Within = {}
        for name, read in inputs.items():
            layer = self.layers[name]
            mask = locked[self.population.spans[name]].view(layer.out_features, layer.in_features)
            known_inputs = _orthonormal(self.protected[name].double())
            rest, longest = _outside(read.double(), known_inputs), read.double().norm(dim=1).amax(0)
            ends = (mask[1:] != mask[:-1]).any(1).nonzero().flatten().add(1).tolist()
            found[name], known = [], {}
            for first, stop in itertools.pairwise([0, *ends, layer.out_features]):
                held = mask[first].nonzero().flatten()
                key = tuple(held.tolist())
                if key not in known:
                    known[key] = _principal(_without(rest, held, known_inputs), RELATIVE * longest)
                found[name].append((slice(first, stop), known[key]))
        return found

    def used(self, name: str) -> float:
        """Share of a layer's inputs that is spanned by what is protected: 1 is full."""
        return len(self.protected[name]) / self.layers[name].in_features


def orthogonal_part(new: Tensor, old: Tensor, relative: float = RELATIVE) -> Tensor:
    """An orthonormal basis [k, D], k ≥ 0, of what the rows new [n, D] have outside the span of the rows old [m, D].

    Parts smaller than `relative` of the longest new row are left out.
    """
    new = new.double()
    if not len(new):
        return new.float()
    return _principal(_outside(new, _orthonormal(old.double())), relative * new.norm(dim=1).max())


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows that span rows [m, D]; where those are dependent, and more: costs room, and is never wrong."""
    return torch.linalg.qr(rows.T).Q.T


def _outside(rows: Tensor, basis: Tensor) -> Tensor:
    """What rows [n, D] have outside the span of orthonormal rows."""
    for _ in range(2):  # once more, for what rounding left
        rows = rows - rows @ basis.T @ basis
    return rows


def _principal(rows: Tensor, least: Tensor) -> Tensor:
    """Orthonormal float32 rows that span rows [n, D], but for directions in which they are no longer than `least`."""
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    return directions[values > least].float()


def _without(rest: Tensor, held: Tensor, basis: Tensor) -> Tensor:
    """The part of rows, which lie outside the span of a basis, that has no share of the inputs `held` and lies there.

    As if the basis held those inputs too, at the price of so many rows alone.
    """
    if not len(held):
        return rest
    axes = torch.zeros(len(held), rest.shape[1], dtype=rest.dtype, device=rest.device)
    axes[torch.arange(len(held), device=held.device), held] = 1
    axes = _outside(axes, basis)
    _, values, directions = torch.linalg.svd(axes, full_matrices=False)
    directions = _outside(directions[values > DEPENDENT], basis)
    return _outside(rest, _orthonormal(directions))


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
