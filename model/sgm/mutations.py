"""Mutations: random directions on the free weights, and what their losses say of the gradient (model.sgm.learner)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.sgm.population import Population

VECTOR_SCALE = 0.1  # of mutations of biases and other vectors; of a matrix 1/√(inputs)
PLACE_SCALE = 6.0  # of mutations by place: of the layer's outputs there, in nats where they are logits
PLACE_RELATIVE = 1e-3  # of the longest input; places that differ by less from others are not told apart
PERTURBATIONS = ("low-rank", "dense")


@dataclass(frozen=True)
class LearnerOptions:
    """How mutations are made and kept.

    Args:
        population: evaluations of a generation, ≥ 8.
        perturbation: "low-rank" or "dense".
        rank: outer products of a matrix's low-rank mutation.
        antithetic: mutations in pairs of opposite signs; half as many directions.
        recombine: steps along the population's estimate; without, the best mutation alone counts.
        momentum: β of the estimate, in [0, 1).
        sigma: first size of mutations, in units of each weight's scale.
        sigma_min, sigma_max: its range.

    Raises:
        ValueError: for an argument out of range.
    """

    population: int = 32
    perturbation: str = "low-rank"
    rank: int = 1
    antithetic: bool = False
    recombine: bool = True
    momentum: float = 0.8
    sigma: float = 0.05
    sigma_min: float = 0.005
    sigma_max: float = 0.1

    def __post_init__(self) -> None:
        for name, accepts, accepted in (
            ("population", lambda v: isinstance(v, int) and v >= 8, "an integer ≥ 8"),
            ("perturbation", lambda v: v in PERTURBATIONS, " or ".join(PERTURBATIONS)),
            ("rank", lambda v: isinstance(v, int) and v >= 1, "an integer ≥ 1"),
            ("momentum", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
            ("sigma_min", lambda v: v > 0, "a number over 0"),
            ("sigma_max", lambda v: v >= self.sigma_min, "a number not below sigma_min"),
            ("sigma", lambda v: self.sigma_min <= v <= self.sigma_max, "a number from sigma_min to sigma_max"),
        ):
            if not accepts(value := getattr(self, name)):
                raise ValueError(f"{name}={value!r}: accepted is {accepted}")


class Places(NamedTuple):
    """Where a layer reads, and the losses that tell of it.

    inputs: [n, in], what the layer reads at each place; losses: [n] int64, which loss of a version, all of them flat,
    hears what the layer writes there.
    """

    inputs: Tensor
    losses: Tensor


class Mutations:
    """Random directions [K, M] on the free weights of some parameters.

    Args:
        free: [N] bool.
        within: by name of a matrix, pieces (rows, basis [k, inputs]): the rows move within the span of the basis alone.
            See `model.sgm.directions`.
        places: by name of a matrix of `within`, for credit by place. Its mutations are then of equal size in the
            layer's outputs at each place, however little of an input lies within the basis.
    """

    def __init__(
        self,
        population: Population,
        options: LearnerOptions,
        generator: torch.Generator,
        free: Tensor,
        within: dict[str, list[tuple[slice, Tensor]]] | None = None,
        places: dict[str, Places] | None = None,
    ):
        self.population, self.options, self.generator = population, options, generator
        self.within, self.places = within or {}, places or {}
        self.selection = population.select(free)
        self.free = self.selection.take(free)
        self.scale = self.selection.take(scales(population))
        self._duals = {name: self._dual(name) for name in self.places if name in self.selection.spans}
        # Σ of the squares of a mutation's weights, each in units of its scale: how large a step for η = 1 is.
        self.square = float(self.free.sum())
        for name, duals in self._duals.items():
            self.square -= float(self.free[self.selection.spans[name]].sum())
            for part, dual in duals:
                self.square += (part.stop - part.start) * dual.square().sum().item()

    def _dual(self, name: str) -> list[tuple[slice, Tensor]]:
        """Pieces (rows, dual [n, inputs]): what changes a row's output at one place alone, by PLACE_SCALE · scale⁻¹."""
        inputs, found, known = self.places[name].inputs.double(), [], {}
        size = PLACE_SCALE * self.population.matrices[name].inputs ** 0.5
        for part, basis in self.within[name]:
            if id(basis) not in known:
                seen = inputs @ basis.double().T  # [n, k]
                u, values, v = torch.linalg.svd(seen, full_matrices=False)
                kept = values > PLACE_RELATIVE * inputs.norm(dim=1).max()
                inverse = torch.where(kept, 1 / values, 0.0)
                known[id(basis)] = ((u * inverse) @ v @ basis.double() * size).float()
            found.append((part, known[id(basis)]))
        return found

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.population.device)

    def draw(self, count: int) -> Tensor:
        """count directions of scale 1 a weight [count, M]; 0 where a weight is not free."""
        drawn = torch.empty(count, self.selection.size, device=self.population.device)
        for name, span in self.selection.spans.items():
            n, rows, columns = self.population.matrices[name].shape
            rank = self.options.rank
            if name in self._duals:
                noise = torch.zeros(count, rows, columns, device=drawn.device)
                for part, dual in self._duals[name]:
                    noise[:, part] = self._normal(count, part.stop - part.start, len(dual)) @ dual
            elif name in self.within:
                noise = torch.zeros(count, rows, columns, device=drawn.device)
                for part, basis in self.within[name]:
                    if len(basis):
                        inputs = self._normal(count, rank, len(basis)) @ (basis * (columns / len(basis)) ** 0.5)
                        noise[:, part] = self._normal(count, part.stop - part.start, rank) @ inputs * rank**-0.5
            elif self.options.perturbation == "dense" or min(rows, columns) <= rank:
                noise = self._normal(count, n, rows, columns)
            else:
                noise = self._normal(count, n, rows, rank) @ self._normal(count, n, rank, columns) * rank**-0.5
            drawn[:, span] = noise.flatten(1)
        return drawn.mul_(self.scale * self.free)

    def said(self, noise: Tensor, weights: Tensor, of_places: Tensor | None) -> Tensor:
        """Σ d_k ε_k [M] of directions [K, M] by the weights d [K]; where credit goes by place, by d [K, losses]."""
        found = weights @ noise
        for name, duals in self._duals.items():
            span = self.selection.spans[name]
            _, rows, columns = self.population.matrices[name].shape
            inputs, losses = self.places[name]
            total = torch.zeros(rows, columns, device=noise.device)
            for part, dual in duals:
                written = noise[:, span].view(-1, rows, columns)[:, part] @ inputs.T  # [K, rows, n]
                total[part] = torch.einsum("kn,krn->rn", of_places[:, losses], written) @ dual
            found[span] = total.flatten() * (self.scale * self.free)[span] / (PLACE_SCALE * of_places.shape[1])
        return found


def scales(population: Population) -> Tensor:
    """[N], what a mutation of size 1 is for each weight: 1/√(inputs) of a matrix, a tenth of a vector."""
    found = torch.empty(population.size, device=population.device)
    for name, span in population.spans.items():
        each = population.matrices[name]
        found[span] = VECTOR_SCALE if each.vector else max(1, each.inputs) ** -0.5
    return found
