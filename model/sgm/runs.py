"""What `python -m model.sgm` runs: a hundred tasks, the stress test, and the loop that improves itself."""

import copy
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from model.agiformer import AGIFormer
from model.sgm.demonstration import demonstration_model
from model.sgm.lifelong import LifelongLearner
from model.sgm.lifelong_options import LifelongOptions
from model.sgm.locking import BLOCK, LockOptions, find_important
from model.sgm.mutations import LearnerOptions, scales
from model.sgm.tasks import CATEGORIES, category_tasks, micro_tasks

LENGTH = 48  # bytes of a task's row
QUICK, FULL = 25, 100
HEAD = {QUICK: 512, FULL: 1536}  # width of the demonstration's head: it has to hold what all tasks read
LOCKS = LockOptions(candidates=64, groups=16)
LOCKED_BLOCKS = 1, 4  # that a task locks at least and at most; each takes an input from 64 outputs
LATENCY_AFTER = (1, 10, 100)
REPEATS = 40  # of a forward pass whose time is taken
SNAPSHOT = "best"
TARGETS = {  # which modules an iteration on a category changes
    "reasoning": ("reasoning",),
    "coding": ("attention", "head"),
    "memory": ("memory", "head"),
    "style": ("head",),
    "knowledge": ("hulls", "head"),
}


def modules(model: AGIFormer) -> dict[str, list[str]]:
    """Ranges of an AGIFormer's parameters, by the module that they belong to: names of parameters."""
    found: dict[str, list[str]] = {
        "embedding": [],
        "attention": [],
        "memory": [],
        "hulls": [],
        "reasoning": [],
        "head": [],
    }
    for name, _ in model.named_parameters():
        parts = name.split(".")
        if "attention" in parts:
            found["attention"].append(name)
        elif "memory" in parts:
            found["memory"].append(name)
        elif parts[0] in ("blocks", "columns"):
            found["hulls"].append(name)  # with the blocks' gates and outputs
        elif parts[0] in ("reasoning", "head"):
            found[parts[0]].append(name)
        else:
            found["embedding"].append(name)
    return found


def parameters_of(model: AGIFormer, parts: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the parameters of some of its `modules`; ValueError for one that there is not."""
    found = modules(model)
    if unknown := [part for part in parts if part not in found]:
        raise ValueError(f"modules={unknown[0]!r}: accepted are {', '.join(found)}")
    return tuple(name for part in found if part in parts for name in found[part])


def task_locks(model: AGIFormer, unit: str = "block") -> LockOptions:
    """Locks of a task: as much as a few blocks, whatever the model's size, since a task is as small in any."""
    minimum, budget = (blocks * BLOCK / model.parameter_count() for blocks in LOCKED_BLOCKS)
    return replace(LOCKS, unit=unit, minimum=min(1.0, minimum), budget=min(1.0, budget))


def latencies(models: dict[int, AGIFormer]) -> dict[int, float]:
    """Median milliseconds of one forward pass of 1 × LENGTH bytes by each model.

    They take turns, so that whatever else the machine does falls on all of them alike.
    """
    x = torch.zeros(1, LENGTH, dtype=torch.uint8, device=next(iter(models.values())).start.device)

    def wait() -> None:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    times: dict[int, list[float]] = {count: [] for count in models}
    with torch.inference_mode():
        for _ in range(REPEATS + 3):  # the first warm up
            for count, model in models.items():
                wait()
                start = time.perf_counter()
                model(x)
                wait()
                times[count].append(time.perf_counter() - start)
    return {count: 1000 * statistics.median(each[3:]) for count, each in times.items()}


@dataclass(frozen=True)
class Retention:
    """Of a run through tasks. Ratios are losses at the end over those when each task had been learned."""

    tasks: int
    first_ratio: float  # of task 1
    worst_ratio: float
    after: float  # mean loss when a task had been learned
    at_end: float  # mean loss of all tasks at the end
    learned: int  # tasks that came to the target
    locked: float  # share of the weights
    full: float  # share of the layer's inputs that are protected
    evaluations: int
    seconds: float
    latency: dict[int, float]  # milliseconds of a forward pass before any task, and after so many
    changed: list[str]  # locks whose weights are not what they were: none

    def row(self) -> list[str]:
        """For a table under `RETENTION`."""
        return [
            f"{self.first_ratio:.4f}x", f"{self.worst_ratio:.4f}x", f"{self.after:.3f}", f"{self.at_end:.3f}",
            f"{self.learned}/{self.tasks}", f"{self.locked:.1%}", f"{self.full:.1%}", str(self.evaluations),
            f"{self.seconds:.0f}",
        ]  # fmt: skip


RETENTION = ["task 1", "worst", "learned to", "at the end", "learned", "locked", "full", "evaluations", "seconds"]
VARIANTS = {
    "nothing": {"directions": False, "locks": False},
    "locks": {"directions": False, "locks": True},
    "directions": {"directions": True, "locks": False},
    "both": {"directions": True, "locks": True},
}


def run_tasks(
    count: int,
    *,
    folder: str | Path | None = None,
    model: AGIFormer | None = None,
    options: LifelongOptions | None = None,
    parts: tuple[str, ...] = (),
    unit: str = "block",
    evaluations: int = 500,
    target: float = 0.3,
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] = lambda line: None,
) -> Retention:
    """Learn `count` micro-tasks one after the other, and see what is left of the first.

    Args:
        folder: kept, and gone on with if it is there; a temporary one when None.
        model: the demonstration's when None; of a new folder alone.
        parts: of the model's `modules`, those that learn, instead of `options.learns`; without directions alone.
        unit: what is locked as one, see `LockOptions`.

    Raises:
        ValueError: for a folder that is of other options, tasks or model.
    """
    tasks = micro_tasks(count)
    if parts and (options is None or options.directions):
        raise ValueError(f"modules={','.join(parts)!r}: accepted without directions, by strategy nothing or locks")
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "sgm"
        if LifelongLearner.is_at(folder):
            _refuse_model(folder, model)
            learner = stack.enter_context(LifelongLearner.open(folder, device=device))
            if parts:
                options = replace(options, learns=parameters_of(learner.model, parts))
            if options is not None and options != learner.options:
                raise ValueError(f"folder={str(folder)!r}: accepted are its own options, {learner.options}")
            for i, (record, task) in enumerate(zip(learner.records, tasks), start=1):
                if record.task != task:
                    raise ValueError(
                        f"folder={str(folder)!r}: its task {i} is {record.task.name!r}, accepted is {task.name!r}"
                    )
        else:
            model = model or demonstration_model(HEAD[QUICK if count <= QUICK else FULL])
            if parts:
                options = replace(options, learns=parameters_of(model, parts))
            learner = LifelongLearner.create(folder, model.to(device), options, lock=task_locks(model, unit))
            stack.enter_context(learner)
        start, versions = time.perf_counter(), {}
        first = len(learner.records)
        if not first:
            versions[0] = copy.deepcopy(learner.model)
        for i, task in enumerate(tasks[first:], start=first + 1):
            record = learner.learn(task, evaluations=evaluations, target=target, length=LENGTH)
            progress(
                f"{i}/{count} {task.name}: {record.before:.2f} -> {record.after:.3f}, {record.evaluations} evaluations,"
                f" {record.locked} weights locked"
            )
            if i in LATENCY_AFTER or i == count:
                versions[i] = copy.deepcopy(learner.model)
        records = learner.records[:count]
        now = learner.losses([record.task for record in records], LENGTH)
        ratios = now / torch.tensor([max(record.after, 1e-6) for record in records], device=now.device)
        full = [learner.directions.used(name) for name in learner.options.learns] if learner.directions else [0.0]
        return Retention(
            tasks=len(records),
            first_ratio=ratios[0].item(),
            worst_ratio=ratios.max().item(),
            after=statistics.mean(record.after for record in records),
            at_end=now.mean().item(),
            learned=sum(record.after <= target for record in records),
            locked=learner.learner.locked.float().mean().item(),
            full=max(full),
            evaluations=learner.learner.evaluations,
            seconds=time.perf_counter() - start,
            latency=latencies(versions) if versions else {},
            changed=learner.store.verify(),
        )


def _refuse_model(folder: str | Path, model: AGIFormer | None) -> None:
    if model is not None:
        raise ValueError(f"folder={str(folder)!r}: holds a model already; accepted is a new one, or no other model")


@dataclass(frozen=True)
class Iteration:
    """One round of the improvement loop; `total` is the sum of the categories' losses after it."""

    number: int
    category: str
    before: float
    after: float
    total: float
    best: float
    locked: int
    rolled_back: bool


@dataclass(frozen=True)
class ImproveOptions:
    """How the loop goes on.

    Args:
        evaluations: of an iteration.
        random_share: of iterations whose category is drawn; the others go round.
        lock_from: share by which a category has to improve in an iteration for its weights to be locked.
        tolerance: how far the total may rise over its best, as a share, before everything is rolled back.

    Raises:
        ValueError: for an argument out of range.
    """

    evaluations: int = 64
    random_share: float = 0.3
    lock_from: float = 0.02
    tolerance: float = 0.02
    lock: LockOptions = field(default_factory=lambda: LockOptions(candidates=64, groups=16, minimum=0.0, budget=0.0005))

    def __post_init__(self) -> None:
        for name, accepts, accepted in (
            ("evaluations", lambda v: isinstance(v, int) and v >= 1, "an integer ≥ 1"),
            ("random_share", lambda v: 0 <= v <= 1, "a number from 0 to 1"),
            ("lock_from", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
            ("tolerance", lambda v: 0 <= v < math.inf, "a number ≥ 0"),
        ):
            if not accepts(value := getattr(self, name)):
                raise ValueError(f"{name}={value!r}: accepted is {accepted}")


def improve(
    folder: str | Path,
    iterations: int,
    *,
    model: AGIFormer | None = None,
    options: ImproveOptions | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[Iteration], None] = lambda iteration: None,
) -> list[Iteration]:
    """The self-improvement loop: a category, a population on its modules, locks, and the best total kept as a snapshot.

    Goes on with a folder that is there. A category that improves at the cost of the others is rolled back.

    Args:
        iterations: ≥ 1.
        model: of a new folder alone; a small one that knows nothing when None.

    Raises:
        ValueError: for a folder that learns tasks, or one that is there and a model.
    """
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations={iterations!r}: accepted is an integer ≥ 1")
    options, folder = options or ImproveOptions(), Path(folder)
    tasks = category_tasks()
    if LifelongLearner.is_at(folder):
        _refuse_model(folder, model)
        learner = LifelongLearner.open(folder, device=device)
        if learner.options.learns:
            learner.store.close()
            raise ValueError(f"folder={str(folder)!r}: accepted is one of `improve`; this one learns tasks")
    else:
        settings = LifelongOptions(learns=(), directions=False)
        model = (model or demonstration_model(128)).to(device)
        learner = LifelongLearner.create(folder, model, settings, learner=LearnerOptions(), lock=options.lock)
    done = []
    with learner:
        parts = {name: torch.zeros_like(learner.learner.locked) for name in modules(learner.model)}
        for name, names in modules(learner.model).items():
            for parameter in names:
                parts[name][learner.population.spans[parameter]] = True
        meta = learner.store.meta.get("improve") or {"iteration": 0, "best": None}
        if meta["best"] is None:
            meta["best"] = learner.losses(list(tasks.values())).sum().item()
            learner.store.snapshot(SNAPSHOT)
            learner.commit(improve=meta)
        for number in range(meta["iteration"] + 1, meta["iteration"] + iterations + 1):
            done.append(_improve_once(learner, tasks, parts, number, meta, options))
            progress(done[-1])
        learner.population.load(learner.learner.values)
    return done


def _improve_once(
    learner: LifelongLearner,
    tasks: dict[str, Any],
    parts: dict[str, torch.Tensor],
    number: int,
    meta: dict,
    options: ImproveOptions,
) -> Iteration:
    rng = random.Random(number)
    drawn = rng.random() < options.random_share
    category = rng.choice(CATEGORIES) if drawn else CATEGORIES[number % len(CATEGORIES)]
    x, counts = (each.to(learner.device) for each in tasks[category].batch())
    free = torch.stack([parts[name] for name in TARGETS[category]]).any(0)
    reference = learner.learner.values.clone()
    learned = learner.learner.learn(x, counts, evaluations=options.evaluations, free=free)
    locked = 0
    total = learner.losses(list(tasks.values())).sum().item()
    rolled_back = total > meta["best"] * (1 + options.tolerance)
    if rolled_back:
        # What has been locked since the snapshot stays.
        meta["iteration"] = number
        progress = {"learner": learner.learner.state(), "improve": meta}
        restored = learner.store.restore(SNAPSHOT, meta=learner.store.meta | progress)
        learner.learner.values = learner.store.values.to(learner.device)
        if restored.locked_differing:  # the best may be out of reach now, and nothing would ever come near it
            meta["best"] = max(meta["best"], learner.losses(list(tasks.values())).sum().item())
            learner.commit(improve=meta)
        return Iteration(number, category, learned.before, learned.after, total, meta["best"], 0, True)
    if learned.after < learned.before * (1 - options.lock_from):
        found = find_important(
            learner.population, learner.learner.values, x, counts, locked=learner.learner.locked | ~free,
            reference=reference, scale=scales(learner.population), options=options.lock,
            generator=torch.Generator(learner.device).manual_seed(number),
        )  # fmt: skip
        learner.learner.evaluations += found.evaluations
        locked = int(found.weights.sum())
    meta["iteration"] = number
    learner.commit(improve=meta)  # killed before its locks, an iteration has none
    if locked:
        learner.learner.locked |= found.weights
        learner.store.lock(f"{category} {number}", found.weights.cpu())
    if total < meta["best"]:
        meta["best"] = total
        learner.store.snapshot(SNAPSHOT)  # before `best` says that it is there
    learner.commit(improve=meta)
    return Iteration(number, category, learned.before, learned.after, total, meta["best"], locked, False)


@dataclass(frozen=True)
class Stress:
    """One strategy's row of the stress test."""

    name: str
    retention: Retention
    store_bytes: int


def stress(
    count: int,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] = lambda line: None,
) -> list[Stress]:
    """Train, retention, storage and timing of every strategy, unit and storage type on the first `count` tasks."""
    rows = []
    both = VARIANTS["both"]
    strategies = [(name, VARIANTS[name], "block", "float32") for name in VARIANTS]
    strategies += [("both, single weights", both, "weight", "float32"), ("both, float16", both, "block", "float16")]
    for label, changes, unit, dtype in strategies:
        with tempfile.TemporaryDirectory() as folder:
            options = replace(LifelongOptions(), dtype=dtype, **changes)
            retention = run_tasks(count, folder=Path(folder) / "sgm", options=options, unit=unit, device=device)
            size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        rows.append(Stress(label, retention, size))
        progress(f"{label}: task 1 at {retention.first_ratio:.4f}x")
    return rows
