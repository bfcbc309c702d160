"""What matters to what has been learned is locked, and never moves again (seed 001).

    block ablation        importance of a block = L(its 64 weights at 10%) − L
    single ablation       importance of a weight = L(it is 0) − L
    coalitions            of weak weights, in random groups G:  synergistic when L(all of G 0) − L ≥ 1.5 · Σ importances

A weight is locked when it is important by itself, or in several synergistic coalitions; at least `minimum` of them and
at most `budget` a task. Ablations are evaluated together, as populations are.

Locked weights do not move under a gradient optimizer either: `lock_gradients` for any, `lock_updates` for MuonAdamW.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from model.sgm.population import AT_ONCE, Matrices, Population, Selection
from model.training.optimizer import MuonAdamW, checked_masks

BLOCK = 64
ATTENUATION = 0.1
SYNERGY = 1.5
# Normalising layers of others are known by their names: RMSNorm, MyLayerNorm, BatchNorm2d, but not Normal.
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_NORM_NAME = re.compile(r"Norm(\dd)?$")


@dataclass(frozen=True)
class LockOptions:
    """How much of what is locked.

    Args:
        unit: "block" of 64 weights of one parameter (the last of each may be smaller), or single "weight"s.
        candidates: units that are ablated, those with the largest |change| · scale⁻¹ first; weights that never moved
            since the reference are candidates too, after them.
        threshold: increase of the loss, as a share of the loss, from which a unit is important by itself.
        minimum, budget: shares of all weights that a task locks at least and at most, 0 ≤ minimum ≤ budget ≤ 1, in
            whole units: a budget over 0 is good for one. The budget goes before the minimum.
        groups: random coalitions that are tried; 0 for none.
        group_size: units in a coalition.
        memberships: synergistic coalitions that a unit has to be in.

    Raises:
        ValueError: for an argument out of range.
    """

    unit: str = "block"
    candidates: int = 256
    threshold: float = 0.01
    minimum: float = 0.001
    budget: float = 0.01
    groups: int = 32
    group_size: int = 8
    memberships: int = 2

    def __post_init__(self) -> None:
        for name, accepts, accepted in (
            ("unit", lambda v: v in ("block", "weight"), "block or weight"),
            ("candidates", lambda v: isinstance(v, int) and v >= 1, "an integer ≥ 1"),
            ("threshold", lambda v: v >= 0, "a number ≥ 0"),
            ("budget", lambda v: 0 <= v <= 1, "a number from 0 to 1"),
            ("minimum", lambda v: 0 <= v <= self.budget, "a number from 0 to the budget"),
            ("groups", lambda v: isinstance(v, int) and v >= 0, "an integer ≥ 0"),
            ("group_size", lambda v: isinstance(v, int) and v >= 2, "an integer ≥ 2"),
            ("memberships", lambda v: isinstance(v, int) and v >= 1, "an integer ≥ 1"),
        ):
            if not accepts(value := getattr(self, name)):
                raise ValueError(f"{name}={value!r}: accepted is {accepted}")


class Units:
    """Weights cut into what is locked as one: blocks of 64 inside each parameter, or single weights.

    A block is 64 outputs (the last block may be smaller) of one input of a matrix, see `model.sgm.directions`, and of
    a vector 64 weights in a row. Petals are matrices each.

    Args:
        of: all parameters (a population), M = N, or some of them.

    Attributes:
        of_weight: [M] int64, each weight's unit.
        sizes: [U] int64, their weights.
    """

    def __init__(self, of: Population | Selection, unit: str = "block"):
        found, count = [], 0
        for each in of.matrices.values():
            size = each.count * each.outputs * each.inputs
            units = torch.arange(size) if unit == "weight" else _blocks(each)
            found.append(units + count)
            count = int(found[-1].max()) + 1 if size else count
        self.of_weight = torch.cat(found).to(of.device)
        self.sizes = torch.bincount(self.of_weight, minlength=count)

    def __len__(self) -> int:
        return len(self.sizes)

    def mask(self, chosen: Tensor) -> Tensor:
        """Units chosen, by index → their weights [M] bool."""
        units = torch.zeros(len(self), dtype=torch.bool, device=self.of_weight.device)
        units[chosen] = True
        return units[self.of_weight]

    def largest(self, weights: Tensor) -> Tensor:
        """The largest value [U] of weights [M] in each unit."""
        found = torch.zeros(len(self), device=weights.device, dtype=weights.dtype)
        return found.scatter_reduce(0, self.of_weight, weights, "amax", include_self=False)


def _blocks(each: Matrices) -> Tensor:
    """The block of every weight of a parameter, in the order of its weights."""
    per_matrix = -(-each.outputs // BLOCK)
    rows = torch.arange(each.count).view(-1, 1, 1) * per_matrix + torch.arange(each.outputs).view(-1, 1) // BLOCK
    units = rows * each.inputs + torch.arange(each.inputs)  # [count, outputs, inputs]
    return (units.transpose(1, 2) if each.inputs_first else units).flatten()


def ablations(of: Selection, values: Tensor, units: Units, groups: Tensor, *batch, factor: float) -> Tensor:
    """Mean loss of a batch with each group of units multiplied by `factor`: groups [G, S] of unit indices → [G].

    Args:
        of: the parameters that the units are of.
        values: [N].
    """
    losses = []
    now = of.take(values)
    for part in groups.split(max(1, AT_ONCE // of.size)):
        # Numbered anew, since there may be as many units as weights; the last number is of those in no group.
        known, numbers = part.unique(return_inverse=True)
        number = torch.full((len(units),), len(known), device=values.device)
        number[known] = torch.arange(len(known), device=values.device)
        touched = torch.zeros(len(part), len(known) + 1, dtype=torch.bool, device=values.device)
        touched.scatter_(1, numbers, True)
        versions = torch.where(touched[:, number[units.of_weight]], now * factor, now)
        losses.append(of.population.losses(versions, *batch, of=of, base=values).flatten(1).mean(1))
    return torch.cat(losses)


@dataclass(frozen=True)
class Found:
    """What ablation found: the weights to lock, and why.

    weights: [N] bool; important, credited: units that matter by themselves, and by coalitions alone; filled: units
    added to come to the minimum; evaluations: of a version.
    """

    weights: Tensor
    important: int
    credited: int
    filled: int
    evaluations: int


def find_important(
    population: Population,
    values: Tensor,
    *batch,
    locked: Tensor,
    reference: Tensor | None = None,
    scale: Tensor | None = None,
    options: LockOptions | None = None,
    generator: torch.Generator | None = None,
) -> Found:
    """Which of the free weights matter to a batch.

    Args:
        values: [N], the weights after the batch has been learned.
        batch: for the population's loss.
        locked: [N] bool, what is locked already, or not looked at.
        reference: [N], the weights before; units that changed most are ablated first. Largest |values| first when None.
        scale: [N], what changes are measured in; 1 when None.
        generator: of random coalitions.
    """
    options = options or LockOptions()
    nothing = Found(torch.zeros_like(locked), 0, 0, 0, 0)
    of = population.select(~locked)
    if not of.size:
        return nothing
    units, held, change = Units(of, options.unit), of.take(locked), of.take(values)
    change = (change - of.take(reference) if reference is not None else change).abs()
    change = torch.where(held, -1.0, change if scale is None else change / of.take(scale))
    size = units.largest(change)
    candidates = size.argsort(descending=True, stable=True)[: options.candidates]
    candidates = candidates[size[candidates] >= 0]
    if not len(candidates):
        return nothing
    base = population.losses(of.take(values).unsqueeze(0), *batch, of=of, base=values).mean()
    factor = ATTENUATION if options.unit == "block" else 0.0
    impact = ablations(of, values, units, candidates.unsqueeze(1), *batch, factor=factor) - base
    evaluations = 1 + len(candidates)
    least = options.threshold * base.clamp_min(torch.finfo(torch.float32).tiny)
    important = impact > least

    credit = torch.zeros_like(impact)
    weak = (~important).nonzero().flatten()
    if options.groups and len(weak) >= options.group_size:
        members = _random_groups(len(weak), options.groups, options.group_size, generator, weak.device)
        together = ablations(of, values, units, candidates[weak][members], *batch, factor=factor) - base
        evaluations += len(members)
        alone = impact[weak][members].clamp_min(0).sum(1)
        # A group has to hurt by itself: of nothing, anything is one and a half times as much.
        synergistic = (together >= SYNERGY * alone) & (together > least)
        credit[weak] = torch.zeros(len(weak), device=weak.device).index_add(
            0, members[synergistic].flatten(), torch.ones(int(synergistic.sum()) * members.shape[1], device=weak.device)
        )
    credited = ~important & (credit >= options.memberships)

    # In the order of their worth: by themselves, by coalitions, and then as much as the minimum asks for.
    order = torch.arange(len(impact), device=impact.device)
    for worth in (impact, credit * credited, important * 2 + credited * 1):  # the last decides, then those before it
        order = order[worth[order].argsort(descending=True, stable=True)]
    free = torch.bincount(units.of_weight[~held], minlength=len(units))[candidates[order]]
    sizes = free.cumsum(0)
    wanted = (important | credited)[order] | (sizes - free < round(options.minimum * population.size))
    wanted &= sizes <= max(round(options.budget * population.size), int(sizes[0]) if options.budget else 0)
    chosen = candidates[order][wanted]
    kept = order[wanted]
    return Found(
        of.put(units.mask(chosen) & ~held, torch.zeros_like(locked)),
        int(important[kept].sum()),
        int(credited[kept].sum()),
        int((~(important | credited))[kept].sum()),
        evaluations,
    )


def _random_groups(count: int, groups: int, size: int, generator: torch.Generator | None, device) -> Tensor:
    """[groups, size] indices below count, different ones in each group."""
    noise = torch.rand(groups, count, generator=generator, device=generator.device if generator else device)
    return noise.argsort(1)[:, :size].to(device)


def anchors(module: nn.Module, population: Population) -> Tensor:
    """Coordinate anchoring: [N] bool, the weights of embeddings and norms, to be locked before the first task.

    AGIFormer's norms have no weights: of it, these are the two embeddings of bytes.
    """
    mask = torch.zeros(population.size, dtype=torch.bool, device=population.device)
    names = {p: name for name, p in module.named_parameters()}  # the first of each that is tied
    for part in module.modules():
        if isinstance(part, (nn.Embedding, *NORMS)) or _NORM_NAME.search(type(part).__name__):
            for p in part.parameters(recurse=False):
                mask[population.spans[names[p]]] = True
    return mask


def lock_gradients(module: nn.Module, locked: dict[str, Tensor]) -> Callable[[], None]:
    """Keep locked weights of a module from moving under any gradient optimizer → a function that unlocks them.

    Gradients of locked weights are 0, and after `optimizer.step()` they are put back to the bit, without waiting for
    the device: momentum and weight decay move a weight without a gradient. Works by hooks on the parameters and on
    `torch.optim.Optimizer`.

    Args:
        locked: [shape of the parameter] bool by name; see `by_parameter`.

    Raises:
        ValueError: for a name that the module has not, or a mask of another dtype or shape.
    """
    handles, kept = [], []
    parameters = dict(module.named_parameters())
    for name, mask in checked_masks(locked, parameters).items():
        p = parameters[name]
        kept.append((p, mask, p.detach().clone()))
        if p.requires_grad:
            handles.append(p.register_hook(lambda gradient, mask=mask: gradient.masked_fill(mask, 0)))

    def put_back(*_) -> None:
        with torch.no_grad():
            for p, mask, values in kept:
                p.copy_(torch.where(mask, values, p))

    handles.append(register_optimizer_step_post_hook(put_back))

    def unlock() -> None:
        for handle in handles:
            handle.remove()

    return unlock


def lock_updates(optimizer: MuonAdamW, locked: dict[str, Tensor]) -> Callable[[], None]:
    """Keep locked weights from moving under `MuonAdamW` → a function that unlocks them.

    Their updates are 0 whatever asks for them: gradient, weight decay, GENESIS, a modifier. The optimizer holds the
    locks by parameter: they stay where they are when the model grows and it is rebuilt.

    A step that has been captured as a CUDA graph knows nothing of a lock or an unlocking that came after it:
    `TrainingStep.recapture` has to follow.

    Petals that set (docs/petals.md) slow down or stop whole petals; a lock stops single weights, whatever their petal's
    status says.

    Args:
        locked: [shape of the parameter] bool by name; see `by_parameter`.

    Raises:
        ValueError: for a name that the model has not, or a mask of another dtype or shape.
    """
    return optimizer.lock(locked)


def by_parameter(population: Population, mask: Tensor) -> dict[str, Tensor]:
    """A mask [N] by parameter, in their shapes."""
    return {name: mask[span].view(population.shapes[name]) for name, span in population.spans.items()}
