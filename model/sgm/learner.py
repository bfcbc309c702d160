"""Learning without gradients: a population of mutations of the free weights, kept only when better (seed 001).

    ε_k = scale · noise on the free weights, θ + σ ε_k evaluated together
    d_k = L(θ + σ ε_k) − mean over k         or (L(θ + σ ε_k) − L(θ − σ ε_k)) / 2 of antithetic pairs
    g ← β g + (1 − β) Σ d_k ε_k / max |d|    what the whole population says
    θ − s η g / ‖g‖ evaluated together, s in 1/2, 1, 2, 4
    θ ← the best of all these, if it is better than θ; of those that come to the target, the one that moves least

The first and last line alone are the (1 + λ) evolution strategy; the two between take the others' losses too, as
evolution strategies do that estimate a gradient (Rechenberg 1973; Salimans et al. 2017; Mania et al. 2018), but no
step is taken that has not been seen to be better. Which is worth how much is in docs/sgm.md.

Credit by place: where what a layer writes at a place is heard by the loss of that place alone, as of a language model's
last layer, d_k is that place's, and says something about what mutation k did to the layer's output there. One
evaluation of n places is then worth n, and the parts of a mutation that had no effect stay out of the estimate.

Notable: low-rank noise (one outer product a matrix) is drawn in a thirtieth of the time of dense noise. Evaluation by
evaluation dense noise learns a little better (docs/sgm.md).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from model.sgm.mutations import LearnerOptions, Mutations, Places
from model.sgm.population import AT_ONCE, Population, Selection

STEPS = (0.5, 1.0, 2.0, 4.0)  # s, in units of η
_PACE = (0.6, 0.9, 1.3, 1.8)  # what η is multiplied by when each of them was the best


@dataclass(frozen=True)
class Learned:
    """What came of learning a batch: its loss before and after, and what it took."""

    before: float
    after: float
    evaluations: int
    generations: int
    accepted: int
    refused: int  # better for this batch, but not for what the guard keeps


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
        places: dict[str, Places] | None = None,
        guard: Callable[[Tensor, Selection], Tensor] | None = None,
        on_accept: Callable[[], None] = lambda: None,
    ) -> Learned:
        """Lower the mean loss of a batch.

        Args:
            batch: for the population's loss.
            evaluations: of a version, at most, ≥ 1; the generation that passes it is finished.
            target: stop at this loss. What comes to it by a smaller change is preferred to what falls below it by a
                larger one: a larger one says more about inputs that are not of this batch.
            free: [N] bool, weights that may move if they are not locked; all when None.
            within, places: see `Mutations`.
            guard: called with versions [k, M] of a selection that are better → [k] bool, which of them may be taken.
            on_accept: called after every change of `values`.

        Raises:
            ValueError: for evaluations below 1.
        """
        if not isinstance(evaluations, int) or evaluations < 1:
            raise ValueError(f"evaluations={evaluations!r}: accepted is an integer ≥ 1")
        free = ~self.locked if free is None else free & ~self.locked
        best = before = self.population.losses(self.values.unsqueeze(0), *batch).mean().item()
        self.evaluations += 1
        if not free.any():
            return Learned(before, before, 1, 0, 0, 0)
        mutations = Mutations(self.population, self.options, self.generator, free, within, places)
        search = _Search(self, mutations, batch, target, guard)
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

    def __init__(self, learner: Learner, mutations: Mutations, batch: tuple, target: float, guard: Callable | None):
        self.learner, self.mutations, self.batch, self.guard = learner, mutations, batch, guard
        self.target = target
        self.options, self.selection = learner.options, mutations.selection
        self.estimate = torch.zeros(self.selection.size, device=learner.values.device)  # g
        self.sigma = self.step = self.options.sigma  # σ and η

    def generation(self, best: float) -> tuple[Tensor | None, float, bool]:
        """One population → the weights [N] to be taken, or None; their loss; whether the guard turned one down."""
        options, now = self.options, self.selection.take(self.learner.values)
        mutated = options.population - (len(STEPS) if options.recombine else 0)
        parts, found, leading = [], [], _Leading(now, self.target)
        directions = mutated // 2 if options.antithetic else mutated
        at_once = max(1, AT_ONCE // self.selection.size)
        for first in range(0, directions, at_once):
            parts.append(_Part(self.mutations, min(at_once, directions - first)))
            noise = parts[-1].noise()
            candidates = self._kept(now + self.sigma * (torch.cat([noise, -noise]) if options.antithetic else noise))
            found.append(self._losses(candidates))
            leading.see(candidates, found[-1].mean(1), self.sigma)
            if directions > at_once:
                parts[-1].forget()
        improved = (torch.cat([each.mean(1) for each in found]) < best).float().mean().item()
        if options.recombine:
            self._take_in(parts, found)
            steps = self._kept(now - self.step * self._steps())
            leading.see(steps, self._losses(steps).mean(1), self.step * now.new_tensor(STEPS))
        chosen, refused = self._choose(leading, best)
        self._adapt(None if chosen is None else int(leading.numbers[chosen]), mutated, improved)
        if chosen is None:
            return None, best, refused
        return self.selection.put(leading.versions[chosen], self.learner.values), leading.losses[chosen].item(), refused

    def _losses(self, versions: Tensor) -> Tensor:
        """[K, losses]: of each row, or of each place."""
        learner = self.learner
        learner.evaluations += len(versions)
        return learner.population.losses(versions, *self.batch, of=self.selection, base=learner.values).flatten(1)

    def _kept(self, versions: Tensor) -> Tensor:
        """As they would be kept; what is not free is the same to the bit."""
        return torch.where(self.mutations.free, self.learner.keep(versions), self.selection.take(self.learner.values))

    def _take_in(self, parts: list["_Part"], found: list[Tensor]) -> None:
        """Take a generation's losses into the estimate of the gradient's direction."""
        sizes = [part.count for part in parts]
        weights = self._weights([each.mean(1, keepdim=True) for each in found]).squeeze(1)
        most = weights.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        weights = (weights / most).split(sizes)
        of_places = (self._weights(found) / most).split(sizes) if self.mutations.places else [None] * len(parts)
        said = sum(map(self.mutations.said, (part.noise() for part in parts), weights, of_places))
        self.estimate.lerp_(said, 1 - self.options.momentum)

    def _weights(self, found: list[Tensor]) -> Tensor:
        """d [directions, losses] of what a generation's parts came to."""
        losses = torch.cat(found)
        worst = torch.where(losses.isfinite(), losses, -torch.inf).amax(0)
        worst = torch.where(worst.isfinite(), worst, 0.0)
        found = [torch.where(each.isfinite(), each, worst) for each in found]
        if self.options.antithetic:
            return torch.cat([(plus - minus) / 2 for plus, minus in (each.chunk(2) for each in found)])
        losses = torch.cat(found)
        return losses - losses.mean(0)

    def _steps(self) -> Tensor:
        """The steps [4, M] along the estimate for η = 1: as large as a mutation of σ = 1 is."""
        size = (self.estimate / self.mutations.scale).norm() / self.mutations.square**0.5
        direction = self.estimate / size.clamp_min(torch.finfo(torch.float32).tiny)
        return direction * torch.tensor(STEPS, device=direction.device).unsqueeze(1)

    def _choose(self, leading: "_Leading", best: float) -> tuple[int | None, bool]:
        """The best candidate that the guard lets pass, of those better than now; whether it turned one down."""
        better = int((leading.losses < best).sum())
        if not better:
            return None, False
        if self.guard is None:
            return 0, False
        allowed = self.guard(leading.versions[:better], self.selection)
        return (int(allowed.nonzero()[0]) if allowed.any() else None), not bool(allowed[0])

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


class _Part:
    """Directions that are drawn and evaluated together: all of a generation, or as many as memory holds."""

    def __init__(self, mutations: Mutations, count: int):
        self.mutations, self.count = mutations, count
        self._before = mutations.generator.get_state()
        self._noise: Tensor | None = mutations.draw(count)

    def noise(self) -> Tensor:
        """[count, M]; drawn again, the same, when it has been forgotten."""
        if self._noise is not None:
            return self._noise
        generator = self.mutations.generator
        now = generator.get_state()
        generator.set_state(self._before)
        noise = self.mutations.draw(self.count)
        generator.set_state(now)
        return noise

    def forget(self) -> None:
        self._noise = None


class _Leading:
    """The best candidates seen so far, the best first: versions [k, M], their losses, their numbers.

    Below the target a lower loss is no better, and the smaller change comes first.
    """

    def __init__(self, now: Tensor, target: float):
        self.versions = now.new_empty(0, len(now))
        self.losses, self.sizes = now.new_empty(0), now.new_empty(0)
        self.numbers = torch.empty(0, dtype=torch.long, device=now.device)
        self._target, self._seen = target, 0

    def _order(self, losses: Tensor, sizes: Tensor) -> Tensor:
        order = sizes.argsort(stable=True)
        return order[losses[order].clamp_min(self._target).argsort(stable=True)][: len(STEPS)]

    def see(self, versions: Tensor, losses: Tensor, sizes: Tensor | float) -> None:
        sizes = torch.as_tensor(sizes, device=losses.device).expand_as(losses)
        best = self._order(losses, sizes)
        losses, sizes = torch.cat([self.losses, losses[best]]), torch.cat([self.sizes, sizes[best]])
        order = self._order(losses, sizes)
        self.losses, self.sizes = losses[order], sizes[order]
        self.versions = torch.cat([self.versions, versions[best]])[order]
        self.numbers = torch.cat([self.numbers, self._seen + best])[order]
        self._seen += len(versions)
