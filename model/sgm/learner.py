"""Learning without gradients: a population of mutations of the free weights, kept only when better (seed 001).

    ε_k = scale · noise on the free weights, θ + σ ε_k evaluated together
    d_k = L(θ + σ ε_k) − mean over k         or (L(θ + σ ε_k) − L(θ − σ ε_k)) / 2 of antithetic pairs
    g ← β g + (1 − β) Σ d_k ε_k / max |d|    what the whole population says
    θ − s η g / ‖g‖ evaluated together, s in 1/2, 1, 2, 4
    θ ← the best of all these, if it is better than θ

The first and last line alone are the (1 + λ) evolution strategy; the two between take the others' losses too, as
evolution strategies do that estimate a gradient (Rechenberg 1973; Salimans et al. 2017; Mania et al. 2018), but no
step is taken that has not been seen to be better. Which is worth how much is in docs/sgm.md.

Notable: low-rank noise (one outer product a matrix) is drawn in a thirtieth of the time of dense noise, and as good.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from model.sgm.population import Population, Selection

STEPS = (0.5, 1.0, 2.0, 4.0)  # s, in units of η
_PACE = (0.6, 0.9, 1.3, 1.8)  # what η is multiplied by when each of them was the best
VECTOR_SCALE = 0.1  # of mutations of biases and other vectors; of a matrix 1/√(inputs)
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


@dataclass(frozen=True)
class Learned:
    """What came of learning a batch: its loss before and after, and what it took."""

    before: float
    after: float
    evaluations: int
    generations: int
    accepted: int
    refused: int  # better for this batch, but not for what the guard keeps


class Mutations:
    """Random directions [K, M] on the free weights of some parameters.

    Args:
        free: [N] bool.
        within: by name of a matrix, pieces (rows, basis [k, inputs]): the rows move within the span of the basis alone.
            See `model.sgm.directions`.
    """

    def __init__(
        self,
        population: Population,
        options: LearnerOptions,
        generator: torch.Generator,
        free: Tensor,
        within: dict[str, list[tuple[slice, Tensor]]] | None = None,
    ):
        self.population, self.options, self.generator = population, options, generator
        self.within = within or {}
        self.selection = population.select(free)
        self.free = self.selection.take(free)
        self.scale = self.selection.take(scales(population))

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.population.device)

    def draw(self, count: int) -> Tensor:
        """count directions of scale 1 a weight [count, M]; 0 where a weight is not free."""
        drawn = torch.empty(count, self.selection.size, device=self.population.device)
        for name, span in self.selection.spans.items():
            shape = self.population.shapes[name]
            rows, columns = (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape.numel())
            rank = self.options.rank
            if name in self.within:
                noise = torch.zeros(count, rows, columns, device=drawn.device)
                for part, basis in self.within[name]:
                    if len(basis):
                        inputs = self._normal(count, rank, len(basis)) @ (basis * (columns / len(basis)) ** 0.5)
                        noise[:, part] = self._normal(count, part.stop - part.start, rank) @ inputs * rank**-0.5
            elif self.options.perturbation == "dense" or min(rows, columns) <= rank:
                noise = self._normal(count, rows, columns)
            else:
                noise = self._normal(count, rows, rank) @ self._normal(count, rank, columns) * rank**-0.5
            drawn[:, span] = noise.flatten(1)
        return drawn.mul_(self.scale * self.free)


def scales(population: Population) -> Tensor:
    """[N], what a mutation of size 1 is for each weight: 1/√(inputs) of a matrix, a tenth of anything else."""
    found = torch.empty(population.size, device=population.device)
    for name, span in population.spans.items():
        shape = population.shapes[name]
        found[span] = shape[1:].numel() ** -0.5 if len(shape) > 1 else VECTOR_SCALE
    return found


class Learner:
    """Weights that learn by mutation.

    Args:
        population: the module and its loss.
        locked: [N] bool, weights that never move; none when None. May be changed between calls.
        keep: called with weights of any shape, returns each as it would be kept (a float16 store rounds).
        seed: of the mutations.

    Attributes:
        values: [N] float32, the weights now. `population.load(learner.values)` gives them to the module.
        locked: [N] bool.
    """

    def __init__(
        self,
        population: Population,
        options: LearnerOptions | None = None,
        *,
        locked: Tensor | None = None,
        keep: Callable[[Tensor], Tensor] = lambda versions: versions,
        seed: int = 0,
    ):
        self.population, self.options, self.keep = population, options or LearnerOptions(), keep
        self.generator = torch.Generator(population.device).manual_seed(seed)
        self.values = keep(population.values())
        self.locked = torch.zeros(population.size, dtype=torch.bool, device=population.device)
        if locked is not None:
            self.locked |= locked
        self.generations = self.evaluations = 0

    def learn(
        self,
        *batch: Any,
        evaluations: int,
        target: float = 0.0,
        free: Tensor | None = None,
        within: dict[str, list[tuple[slice, Tensor]]] | None = None,
        guard: Callable[[Tensor, Selection], Tensor] | None = None,
        on_accept: Callable[[], None] = lambda: None,
    ) -> Learned:
        """Lower the mean loss of a batch.

        Args:
            batch: for the population's loss.
            evaluations: of a version, at most; the generation that passes it is finished.
            target: stop at this loss.
            free: [N] bool, weights that may move if they are not locked; all when None.
            within: see `Mutations`.
            guard: called with versions [k, M] of a selection that are better → [k] bool, which of them may be taken.
            on_accept: called after every change of `values`.
        """
        free = ~self.locked if free is None else free & ~self.locked
        best = before = self.population.losses(self.values.unsqueeze(0), *batch).mean().item()
        self.evaluations += 1
        if not free.any():
            return Learned(before, before, 1, 0, 0, 0)
        search = _Search(self, Mutations(self.population, self.options, self.generator, free, within), batch, guard)
        first = self.evaluations - 1
        generations = accepted = refused = 0
        while best > target and self.evaluations - first < evaluations:
            generations += 1
            found, loss, turned_down = search.generation(best)
            self.generations += 1
            refused += turned_down
            if found is not None:
                self.values, best = found, loss
                accepted += 1
                on_accept()
        return Learned(before, best, self.evaluations - first, generations, accepted, refused)

    def state(self) -> dict[str, Any]:
        """Everything but the weights and the locks, as JSON knows it."""
        return {
            "options": asdict(self.options),
            "generations": self.generations,
            "evaluations": self.evaluations,
            "random": self.generator.get_state().tolist(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`; the options have to be the same.

        What was saved on another kind of device goes on with other random numbers: a card's generator is not a CPU's.
        """
        known = {field.name for field in fields(LearnerOptions)}
        if {k: v for k, v in state["options"].items() if k in known} != asdict(self.options):
            raise ValueError(
                f"options={asdict(self.options)}: accepted are those that learned so far, {state['options']}"
            )
        self.generations, self.evaluations = state["generations"], state["evaluations"]
        random = torch.tensor(state["random"], dtype=torch.uint8)
        if len(random) == len(self.generator.get_state()):
            self.generator.set_state(random)
        else:
            self.generator.manual_seed(self.evaluations)


class _Search:
    """One call of `learn`: the estimate and the sizes of its mutations."""

    def __init__(self, learner: Learner, mutations: Mutations, batch: tuple, guard: Callable | None):
        self.learner, self.mutations, self.batch, self.guard = learner, mutations, batch, guard
        self.options, self.selection = learner.options, mutations.selection
        self.estimate = torch.zeros(self.selection.size, device=learner.values.device)  # g
        self.sigma = self.step = self.options.sigma  # σ and η

    def generation(self, best: float) -> tuple[Tensor | None, float, bool]:
        """One population → the weights [N] to be taken, or None; their loss; whether the guard turned one down."""
        options, now = self.options, self.selection.take(self.learner.values)
        count = options.population - (len(STEPS) if options.recombine else 0)
        if options.antithetic:
            noise = self.mutations.draw(count // 2)
            noise = torch.cat([noise, -noise])
        else:
            noise = self.mutations.draw(count)
        candidates = self._kept(now + self.sigma * noise)
        losses = self._losses(candidates)
        mutated = len(candidates)
        if options.recombine:
            self._take_in(noise, losses)
            steps = self._kept(now - self.step * self._steps())
            candidates = torch.cat([candidates, steps])
            losses = torch.cat([losses, self._losses(steps)])
        chosen, refused = self._choose(candidates, losses, best)
        self._adapt(chosen, mutated, (losses[:mutated] < best).float().mean().item())
        if chosen is None:
            return None, best, refused
        return self.selection.put(candidates[chosen], self.learner.values), losses[chosen].item(), refused

    def _losses(self, versions: Tensor) -> Tensor:
        learner = self.learner
        learner.evaluations += len(versions)
        return learner.population.losses(versions, *self.batch, of=self.selection, base=learner.values).mean(1)

    def _kept(self, versions: Tensor) -> Tensor:
        """As they would be kept; what is not free is the same to the bit."""
        return torch.where(self.mutations.free, self.learner.keep(versions), self.selection.take(self.learner.values))

    def _take_in(self, noise: Tensor, losses: Tensor) -> None:
        """Take a generation's losses into the estimate of the gradient's direction."""
        finite = losses.isfinite()
        losses = torch.where(finite, losses, losses[finite].max() if finite.any() else 0.0)
        if self.options.antithetic:
            half = len(noise) // 2
            noise, weights = noise[:half], (losses[:half] - losses[half:]) / 2
        else:
            weights = losses - losses.mean()
        said = weights @ noise / weights.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        self.estimate.lerp_(said, 1 - self.options.momentum)

    def _steps(self) -> Tensor:
        """The steps [4, M] along the estimate for η = 1: as large as a mutation of σ = 1 is."""
        relative = self.estimate / self.mutations.scale
        size = relative.square().sum().div(self.mutations.free.sum()).sqrt()
        direction = self.estimate / size.clamp_min(torch.finfo(torch.float32).tiny)
        return direction * torch.tensor(STEPS, device=direction.device).unsqueeze(1)

    def _choose(self, candidates: Tensor, losses: Tensor, best: float) -> tuple[int | None, bool]:
        """The best candidate that the guard lets pass, of those better than now; whether it turned one down."""
        order = losses.argsort()[: len(STEPS)]
        order = order[losses[order] < best]
        if not len(order):
            return None, False
        if self.guard is None:
            return order[0].item(), False
        allowed = self.guard(candidates[order], self.selection)
        return (order[allowed][0].item() if allowed.any() else None), not bool(allowed[0])

    def _adapt(self, chosen: int | None, mutated: int, improved: float) -> None:
        """Sizes of the next generation. Without recombination by the share that improved, as the 1/5 rule has it."""
        options = self.options
        if not options.recombine:
            self.sigma *= 1.15 if improved > 0.2 else 0.95 if improved < 0.05 else 1.0
        else:
            if chosen is None:
                self.step *= 0.6
            elif chosen >= mutated:
                self.step *= _PACE[chosen - mutated]
            self.step = min(max(self.step, options.sigma_min / 5), 2 * options.sigma_max)
            self.sigma = self.step
        self.sigma = min(max(self.sigma, options.sigma_min), options.sigma_max)
