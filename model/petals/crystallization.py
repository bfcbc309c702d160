"""Crystallization: a petal whose weights hardly move any more becomes solid (DESIGN: Petals; seed 003).

    pressure   a weight is crystallized when lr / peak_lr · mobility < threshold; a petal is solid when at least
               1 − 1/e of its weights are
    kl         a petal is solid when no weight of it moves between snapshots, by the KL divergence of Gaussians around
               the weights (o3's comment)

Works on any module with petal groups in it (the protocol is `PetalGroup`'s) and knows nothing of the trainer. A petal
is named "PATH:INDEX": the group's path in the module, and the petal's index in the group.

Notable: what is remembered of a group hangs on its parameters, not on their names, because growth renames them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from model.layers.hull import CHRYSALIS, CRYOGENIC, FLUID, PetalGroup

STATUSES = {"fluid": FLUID, "cryogenic": CRYOGENIC, "chrysalis": CHRYSALIS}
MODES = ("off", "cryogenic", "chrysalis")
RULES = ("pressure", "kl")
ESTABLISHED = 1 - 1 / math.e  # the share of crystallized weights that makes a petal solid
NOT_YET = -1.0  # the share of a petal that was never observed
GROUPS_LISTED = 6  # in the error for a pattern that matches nothing

# The optimizer's training tensors that hold a weight back, and what they are once it is warm. Coldness is 1 − T, the
# averages are the resistances of o3's variant; a run has some of them.
WARM = {"temperature": 1, "coldness": 0, "r_up": 0, "r_down": 0, "e_pos": 0, "e_neg": 0}

Petals = Mapping[str, list[int]]
Mobility = Callable[[nn.Parameter], Tensor]


@dataclass(frozen=True)
class CrystallizationOptions:
    """When petals set and what becomes of them.

    Args:
        mode: "off"; "cryogenic": the optimizer divides a solid petal's steps; "chrysalis": it gets no gradient.
        rule: "pressure" or "kl".
        threshold: of "pressure": the share of the peak learning rate under which a weight's pace is crystallized.
        share: of "pressure": the share of crystallized weights, in (0, 1], that makes a petal solid.
        divider: the cryogenic constant, ≥ 1; for the optimizer.
        kl_tau: of "kl", in nats. 0.01 is a move of 14% of the petal's RMS weight from one snapshot to the next.
        kl_decay: what the moving average over snapshots keeps, in [0, 1).
        warmup: observations of a petal before it may set. At the start of a run the pressure is low because the
            learning rate still rises; they should outlast that.

    Raises:
        ValueError: for an argument out of range.
    """

    mode: str = "off"
    rule: str = "pressure"
    threshold: float = 0.1
    share: float = ESTABLISHED
    divider: float = 1000.0
    kl_tau: float = 0.01
    kl_decay: float = 0.5
    warmup: int = 10

    def __post_init__(self) -> None:
        for name, accepted in (("mode", MODES), ("rule", RULES)):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted are {', '.join(accepted)}")
        for name, accepts, accepted in _RANGES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not accepts(value):
                raise ValueError(f"{name}={value!r}: accepted is {accepted}")
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 0:
            raise ValueError(f"warmup={self.warmup!r}: accepted is an integer ≥ 0")


_RANGES = (
    ("threshold", lambda x: 0 < x < math.inf, "a number > 0"),
    ("share", lambda x: 0 < x <= 1, "a number over 0 and up to 1"),
    ("divider", lambda x: 1 <= x < math.inf, "a number ≥ 1"),
    ("kl_tau", lambda x: 0 < x < math.inf, "a number > 0"),
    ("kl_decay", lambda x: 0 <= x < 1, "a number from 0 to under 1"),
)


# ── petals by name ───────────────────────────────────────────────────────────────────────────────────────────────────


def petal_groups(module: nn.Module) -> dict[str, PetalGroup]:
    """The modules in `module` that follow the petal protocol, by path."""
    return {path: each for path, each in module.named_modules() if _is_group(each)}


def _is_group(module: nn.Module) -> bool:
    named = all(hasattr(module, name) for name in ("petals", "status", "set_status", "petal_parameters"))
    return named and isinstance(module.status, Tensor)


def learning_groups(module: nn.Module) -> dict[str, PetalGroup]:
    """Those of `petal_groups` that learn: frozen subtrees are neither observed nor counted."""
    return {path: group for path, group in petal_groups(module).items() if learning_weights(group)}


def learning_weights(group: PetalGroup) -> dict[str, nn.Parameter]:
    """A group's petal parameters [n, ...] that are not frozen, by name."""
    return {name: weight for name, weight in group.petal_parameters().items() if weight.requires_grad}


def petal_id(path: str, index: int) -> str:
    """ "PATH:INDEX"."""
    return f"{path}:{index}"


def match_petals(module: nn.Module, patterns: str | Iterable[str]) -> dict[str, list[int]]:
    """The petals whose ids match any of the patterns, as indices by path of their group.

    Args:
        patterns: as in a shell: `*`, `?` and `[...]`, over ids such as `blocks.0.hull.groups.0:3`; "all" is all.

    Raises:
        ValueError: for a pattern that matches nothing, and for a module without petals.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    groups = petal_groups(module)
    found: dict[str, set[int]] = {}
    for pattern in patterns:
        matches = [
            (path, i)
            for path, group in groups.items()
            for i in range(group.petals)
            if pattern == "all" or fnmatchcase(petal_id(path, i), pattern)
        ]
        if not matches:
            raise ValueError(f"petal {pattern}: matches nothing; {_accepted(groups)}")
        for path, i in matches:
            found.setdefault(path, set()).add(i)
    return {path: sorted(found[path]) for path in groups if path in found}


def _accepted(groups: dict[str, PetalGroup]) -> str:
    if not groups:
        return "the model has no petals"
    ids = [petal_id(path, 0) + (f"–{group.petals - 1}" if group.petals > 1 else "") for path, group in groups.items()]
    more = f" and {len(ids) - GROUPS_LISTED} more groups" if len(ids) > GROUPS_LISTED else ""
    return f"accepted are all, ids and patterns over them: {', '.join(ids[:GROUPS_LISTED])}{more}"


# ── freezing and unfreezing by hand ──────────────────────────────────────────────────────────────────────────────────


def freeze(module: nn.Module, petals: Petals, mode: str) -> dict[str, list[int]]:
    """Give petals (as `match_petals` returns them) the status "cryogenic" or "chrysalis"; returns those it changed."""
    if mode not in STATUSES or STATUSES[mode] == FLUID:
        raise ValueError(f"mode={mode!r}: accepted are cryogenic, chrysalis")
    return _change_status(module, petals, STATUSES[mode])


def unfreeze(module: nn.Module, petals: Petals) -> dict[str, list[int]]:
    """Make petals (as `match_petals` returns them) fluid; returns those that were not, which `warm` should have."""
    return _change_status(module, petals, FLUID)


def _change_status(module: nn.Module, petals: Petals, status: int) -> dict[str, list[int]]:
    groups = petal_groups(module)
    changed = {}
    for path, indices in petals.items():
        if path not in groups:
            raise ValueError(f"petal group {path}: the model has no such group")
        before = groups[path].status.tolist()
        if different := [i for i in indices if before[i] != status]:
            groups[path].set_status(different, status)
            changed[path] = different
    return changed


@torch.no_grad()
def warm(tensors: dict[str, Tensor], module: nn.Module, petals: Petals) -> int:
    """Warm petals (as `unfreeze` returns them) in a training state, in place: "must still be warmed" (seed 003).

    Temperature 1 and no resistance, where the optimizer is viscoelastic, so that they move freely; and what
    crystallization has observed of them is forgotten, so that they do not set again at once.

    Args:
        tensors: training tensors by name: `optimizer.KIND.NAME` with the kinds of WARM (shape of parameter NAME, any
            type), and `Crystallization.state_tensors`.

    Returns:
        The number of optimizer tensors warmed; 0 when the state is not of a viscoelastic run.

    Raises:
        ValueError: for a tensor of another shape than its parameter's; nothing is changed then.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = petal_groups(module)
    writes: list[tuple[Tensor, list[int], float | Tensor]] = []

    def note(name: str, shape: torch.Size, indices: list[int], value: float | Tensor) -> bool:
        if name not in tensors:
            return False
        if tensors[name].shape != shape:
            found = tuple(tensors[name].shape)
            raise ValueError(f"training state {name}: found {found}, accepted is shape {tuple(shape)}")
        writes.append((tensors[name], indices, value))
        return True

    warmed = 0
    for path, indices in petals.items():
        group = groups[path]
        for weight in group.petal_parameters().values():
            name = names[id(weight)]
            warmed += sum(
                note(f"optimizer.{kind}.{name}", weight.shape, indices, value) for kind, value in WARM.items()
            )
            note(f"crystallization.snapshot.{name}", weight.shape, indices, weight[indices])
        for kind, value in (("observations", 0.0), ("share", NOT_YET)):
            note(f"crystallization.{kind}.{path}", group.status.shape, indices, value)
    for tensor, indices, value in writes:
        tensor[indices] = value.to(tensor) if isinstance(value, Tensor) else value
    return warmed


# ── setting by itself ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Record:
    """What is remembered of a group of n petals from one observation to the next."""

    observations: Tensor  # [n] int64: how often each petal was observed since it began to learn
    share: Tensor  # [n] float64: crystallized share when it was last observed; NOT_YET before
    kl: Tensor  # [n] float64, nats: moving average of the largest KL among a petal's weights
    snapshots: dict[str, Tensor] = field(default_factory=dict)  # of the weights, by name in the group; rule "kl" only


class Crystallization:
    """Watches the petals of a module that learn and makes those solid that have set.

    The state is two values a petal, and for rule "kl" a third and a snapshot of every weight: the moving average is of
    each petal's largest KL. It is never less than the largest moving average of a weight, so that a petal under kl_tau
    has all of its weights under it.
    """

    def __init__(self, module: nn.Module, options: CrystallizationOptions):
        self.module = module
        self.options = options
        self._groups: dict[str, PetalGroup] = {}
        self._records: dict[nn.Parameter, _Record] = {}
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Look again at what the module holds, after it grew: groups that began to learn, groups that were frozen.

        A group that goes on learning keeps its record, whatever it is called now; a frozen one loses it.
        """
        self._groups = learning_groups(self.module) if self.options.mode != "off" else {}
        records = {}
        for group in self._groups.values():
            record = self._records.get(_key(group))
            if record is None:
                n = group.petals
                record = _Record(
                    torch.zeros(n, dtype=torch.int64),
                    torch.full((n,), NOT_YET, dtype=torch.float64),
                    torch.zeros(n, dtype=torch.float64),
                )
            if self.options.rule == "kl":
                before = record.snapshots
                record.snapshots = {
                    name: before[name] if name in before else weight.detach().clone()
                    for name, weight in learning_weights(group).items()
                }
            records[_key(group)] = record
        self._records = records

    @torch.no_grad()
    def observe(self, step: int, lr: float, peak_lr: float, mobility: Mobility | None = None) -> list[dict[str, Any]]:
        """Observe every fluid petal and make those solid that have set. Waits for the device once.

        Args:
            step: for the events.
            lr, peak_lr: today's learning rate and the run's highest; their ratio is the pressure.
            mobility: gives T / (1 + R), in the parameter's shape, for a petal parameter; None is 1 everywhere. C does
                not matter: it is 1 for the fluid petals, and no others are decided on.

        Returns:
            One {"petal": id, "step": step, "crystallized": share of its weights} for each petal that has set.
        """
        lr, peak_lr = float(lr), float(peak_lr)
        if not (0 <= lr < math.inf and 0 < peak_lr < math.inf):
            raise ValueError(f"lr={lr!r}, peak_lr={peak_lr!r}: accepted are numbers ≥ 0 and > 0")
        self.refresh()
        if not self._groups:
            return []
        readings = [self._read(group, lr / peak_lr, mobility) for group in self._groups.values()]
        sizes = [reading.shape[1] for reading in readings]
        on_host = torch.cat(readings, 1).cpu().split(sizes, 1)
        events = []
        for (path, group), reading in zip(self._groups.items(), on_host):
            record = self._records[_key(group)]
            solid = self._newly_solid(record, *reading)
            if solid:
                group.set_status(solid, STATUSES[self.options.mode])
            events += [
                {"petal": petal_id(path, i), "step": step, "crystallized": record.share[i].item()} for i in solid
            ]
        return events

    def _read(self, group: PetalGroup, pressure: float, mobility: Mobility | None) -> Tensor:
        """On the device, float64 [3, n]: status, share of crystallized weights, largest KL."""
        n = group.petals
        crystallized = torch.zeros(n, dtype=torch.float64, device=group.status.device)
        largest = torch.zeros_like(crystallized)
        weights = 0
        for name, weight in learning_weights(group).items():
            weights += weight[0].numel()
            if self.options.rule == "kl":
                snapshot = self._records[_key(group)].snapshots[name]
                kl = _gaussian_kl(snapshot.reshape(n, -1), weight.reshape(n, -1))
                snapshot.copy_(weight)
                largest = torch.maximum(largest, kl.amax(1).double())
                set_weights = kl < self.options.kl_tau
            else:
                pace = torch.ones_like(weight) if mobility is None else mobility(weight)
                if pace.shape != weight.shape:
                    raise ValueError(
                        f"mobility of {name}: found {tuple(pace.shape)}, accepted is shape {tuple(weight.shape)}"
                    )
                set_weights = pressure * pace.reshape(n, -1) < self.options.threshold
            crystallized += set_weights.sum(1)
        return torch.stack([group.status.double(), crystallized / weights, largest])

    def _newly_solid(self, record: _Record, status: Tensor, share: Tensor, kl: Tensor) -> list[int]:
        """Bring the record up to date with a reading [n] each; the indices of the petals that have set."""
        fluid = status == FLUID
        record.observations += fluid
        # A solid petal keeps the share that it set with.
        record.share = torch.where(fluid, share, record.share)
        has_set = record.share >= self.options.share
        if self.options.rule == "kl":
            average = torch.lerp(kl, record.kl, self.options.kl_decay)
            record.kl = torch.where(record.observations == 1, kl, average)  # begins with its first value
            has_set = record.kl < self.options.kl_tau
        has_set &= fluid & (record.observations > self.options.warmup)
        return has_set.nonzero().flatten().tolist()

    @property
    def shares(self) -> dict[str, float]:
        """Crystallized share of its weights, by petal id, when each petal was last observed fluid.

        For "kl", the share of weights whose KL from the last snapshot is under kl_tau.
        """
        return {
            petal_id(path, i): share
            for path, group in self._groups.items()
            for i, share in enumerate(self._records[_key(group)].share.tolist())
            if share != NOT_YET
        }

    def fluid(self) -> list[int]:
        """1 for each fluid and 0 for each solid petal that learns, for `GrowthPolicy.decide`. Waits for the device."""
        statuses = [group.status for group in learning_groups(self.module).values()]
        return [int(status == FLUID) for status in torch.cat(statuses).tolist()] if statuses else []

    def counts(self) -> tuple[int, int]:
        """(solid, total) of the petals that learn. Waits for the device."""
        fluid = self.fluid()
        return len(fluid) - sum(fluid), len(fluid)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that changes in training besides the module, by name, for a checkpoint.

        `crystallization.` and: `observations.PATH`, `share.PATH`, and for rule "kl" `kl.PATH` (each [n]) and
        `snapshot.NAME` (shape of parameter NAME).
        """
        self.refresh()
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        state = {}
        for path, group in self._groups.items():
            record = self._records[_key(group)]
            state[f"crystallization.observations.{path}"] = record.observations
            state[f"crystallization.share.{path}"] = record.share
            if self.options.rule == "kl":
                state[f"crystallization.kl.{path}"] = record.kl
            for name, weight in learning_weights(group).items():
                if name in record.snapshots:
                    state[f"crystallization.snapshot.{names[id(weight)]}"] = record.snapshots[name]
        return state

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`; a missing or misshapen tensor is an error that names it."""
        expected = self.state_tensors()
        for name, tensor in expected.items():
            if name not in state or state[name].shape != tensor.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"training state {name}: found {found}, accepted is shape {tuple(tensor.shape)}")
        for name, tensor in expected.items():
            tensor.copy_(state[name])


def _key(group: PetalGroup) -> nn.Parameter:
    """What a group's record hangs on: growth moves and renames modules, but not their parameters."""
    return next(iter(group.petal_parameters().values()))


def _gaussian_kl(before: Tensor, now: Tensor) -> Tensor:
    """KL of N(before, σ²) and N(now, σ²), weight by weight, in nats: (before − now)² / 2σ². [n, m] → [n, m].

    σ is the RMS of a petal's weights in both, so that a petal that leaves or reaches zero has a finite KL; 0 where
    all of them are zero.
    """
    variance = (before.square().mean(1) + now.square().mean(1)) / 2
    return (before - now).square() / (2 * variance).clamp_min(torch.finfo(variance.dtype).tiny)[:, None]
