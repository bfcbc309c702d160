"""A model in a folder that learns task after task without gradients, and keeps each (seed 001).

    FOLDER/model.safetensors      the model as it was given: its shape, its buffers
    FOLDER/weights/               its weights, locks and progress (model.sgm.storage)
    FOLDER/protected/000001...    what each task has read at the layers that learn (model.sgm.directions)

A task is learned by mutation, then what matters to it is locked, then what it read is protected. A process may be
killed at any instruction of it: what has been locked stays, and a task that was not finished is learned on.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

from model.agiformer import AGIFormer
from model.config import AGIFormerConfig
from model.files import write_atomically
from model.sgm.directions import Directions
from model.sgm.learner import Learned, Learner, LearnerOptions, scales
from model.sgm.locking import LockOptions, anchors, find_important
from model.sgm.population import Population, Selection, byte_losses
from model.sgm.storage import WeightStore
from model.sgm.tasks import Task, ordinary, stack
from model.training.checkpoint import load_checkpoint, save_checkpoint

ORDINARY_LENGTH = 48
ANCHORED = "coordinates"  # the name of the first lock


@dataclass(frozen=True)
class LifelongOptions:
    """What of the system is used.

    Args:
        learns: weights of linear layers that learn within directions of their own; without directions, these alone
            move all the same. Empty: every weight that is not locked moves, and nothing is protected.
        directions: protect what earlier tasks read.
        locks: lock what matters to a task.
        guard: largest growth of an earlier task's loss, as a share; a mutation that exceeds it is turned down.
            None for no guard.
        energy: share of ordinary text's inputs that is protected before the first task, from 0 to below 1.
        dtype: of the stored weights, float32 or float16.
    """

    learns: tuple[str, ...] = ("head.output.weight",)
    directions: bool = True
    locks: bool = True
    guard: float | None = None
    energy: float = 0.9
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.energy < 1:
            raise ValueError(f"energy={self.energy!r}: accepted is a number from 0 to below 1")
        if self.guard is not None and self.guard < 0:
            raise ValueError(f"guard={self.guard!r}: accepted is a number ≥ 0, or None")
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype={self.dtype!r}: accepted is float32 or float16")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r}: accepted is an integer from 0 to 2⁶³ − 1")


@dataclass(frozen=True)
class Record:
    """A task that has been learned: its losses in nats per byte that counts, and what it took."""

    task: Task
    before: float
    after: float
    evaluations: int
    locked: int  # weights that it locked
    important: int
    credited: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Record":
        task = values["task"]
        pairs = tuple((prompt, answer) for prompt, answer in task["pairs"])
        return cls(**(values | {"task": Task(task["name"], task["kind"], pairs)}))


class LifelongLearner:
    """Made by `create` or `open`; a context manager that holds the folder.

    Attributes:
        model: carries the weights of the last task's end.
        records: of the tasks so far.
    """

    def __init__(self, path: Path, model: AGIFormer, store: WeightStore):
        self.path, self.model, self.store = path, model.eval(), store
        meta = store.meta
        options = meta["options"]
        self.options = LifelongOptions(**(options | {"learns": tuple(options["learns"])}))
        self.lock_options = LockOptions(**meta["lock_options"])
        self.population = Population(model, byte_losses)
        self.device = self.population.device
        keep = (lambda values: values.half().float()) if self.options.dtype == "float16" else (lambda values: values)
        store.load_into(model)
        self.learner = Learner(
            self.population,
            LearnerOptions(**meta["learner"]["options"]),
            locked=store.locked.to(self.device),
            keep=keep,
        )
        self.learner.load_state(meta["learner"])
        self.records = [Record.from_json(record) for record in meta["records"]]
        protects = self.options.directions and self.options.learns
        self.directions = Directions(self.population, list(self.options.learns)) if protects else None
        for i in range(meta["protected"]):
            for name, basis in _bases(self._protected(i)).items():
                self.directions.protected[name] = torch.cat([self.directions.protected[name], basis.to(self.device)])

    @classmethod
    def create(
        cls,
        path: str | Path,
        model: AGIFormer,
        options: LifelongOptions | None = None,
        *,
        learner: LearnerOptions | None = None,
        lock: LockOptions | None = None,
    ) -> "LifelongLearner":
        """Begin with a model in a new folder: its embeddings and norms are locked. A killed `create` leaves no folder.

        Raises:
            ValueError: when the folder is not empty, or a name in `options.learns` is none of a linear layer's weights.
        """
        path, options = Path(path), options or LifelongOptions()
        if path.exists() and any(path.iterdir()):
            raise ValueError(f"path={str(path)!r}: accepted is a new or empty folder")
        population = Population(model, byte_losses)
        start = Learner(population, learner, seed=options.seed)
        if options.directions:
            Directions(population, list(options.learns))  # says what is wrong with them before anything is written
        elif unknown := [name for name in options.learns if name not in population.spans]:
            raise ValueError(f"learns={unknown[0]!r}: accepted are names of the model's parameters")
        meta = {
            "options": asdict(options),
            "lock_options": asdict(lock or LockOptions()),
            "learner": start.state(),
            "records": [],
            "protected": 0,
        }
        place = path.resolve()
        making = place.parent / f".{place.name}.{os.getpid()}.creating"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        try:
            save_checkpoint(model, making / "model.safetensors")
            store = WeightStore.from_module(making / "weights", model, dtype=options.dtype, meta=meta)
            with cls(making, model, store) as begun:
                if (mask := anchors(model, population)).any():
                    store.lock(ANCHORED, mask.cpu())
                if begun.directions is not None and options.energy:
                    x = ordinary(ORDINARY_LENGTH).to(begun.device)
                    before = begun._spans()
                    begun.directions.anchor(begun.directions.inputs(begun.learner.values, x), options.energy)
                    begun._save_protected(before)
            os.rename(making, place)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
        return cls(path, model, WeightStore.open(path / "weights"))

    @classmethod
    def open(
        cls, path: str | Path, *, read_only: bool = False, device: str | torch.device = "cpu"
    ) -> "LifelongLearner":
        """Go on with a folder; `read_only` beside a process that learns.

        Raises:
            ValueError: when there is none, or another process works on it.
        """
        path = Path(path)
        if not (path / "model.safetensors").exists():
            raise ValueError(f"path={str(path)!r}: accepted is a folder that was made by `create`")
        model = load_checkpoint(path / "model.safetensors", device)
        store = WeightStore.open(path / "weights", read_only=read_only)
        try:
            return cls(path, model, store)
        except BaseException:
            store.close()
            raise

    def __enter__(self) -> "LifelongLearner":
        return self

    def __exit__(self, *_) -> None:
        self.store.close()

    # ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────

    def learn(self, task: Task, *, evaluations: int = 500, target: float = 0.3, length: int | None = None) -> Record:
        """Learn a task, lock what matters to it, protect what it read. Every accepted change is committed."""
        x, counts = (each.to(self.device) for each in task.batch(length))
        learner, before = self.learner, self.learner.values.clone()
        within = read = None
        if self.directions is not None:
            read = self.directions.inputs(learner.values, x, counts)
            within = self.directions.within(read, learner.locked)
        free = self.free()
        learned = learner.learn(
            x, counts, evaluations=evaluations, target=target, free=free, within=within,
            guard=self._guard(length), on_accept=lambda: self.commit(),
        )  # fmt: skip
        found = None
        if self.options.locks:
            generator = torch.Generator(self.device).manual_seed(len(self.records))
            found = find_important(
                self.population, learner.values, x, counts, locked=learner.locked | ~free, reference=before,
                scale=scales(self.population), options=self.lock_options, generator=generator,
            )  # fmt: skip
            learner.evaluations += found.evaluations
            if found.weights.any():
                learner.locked |= found.weights
                self.store.lock(task.name, found.weights.cpu())
        spans = self._spans()
        if read is not None:
            self.directions.protect(read)
        self.records.append(_record(task, learned, found))
        self._save_protected(spans)
        self.population.load(learner.values)
        return self.records[-1]

    def free(self) -> Tensor:
        """[N] bool: the weights that learn, locked or not."""
        if not self.options.learns:
            return torch.ones(self.population.size, dtype=torch.bool, device=self.device)
        free = torch.zeros(self.population.size, dtype=torch.bool, device=self.device)
        for name in self.options.learns:
            free[self.population.spans[name]] = True
        return free

    def losses(self, tasks: list[Task], length: int | None = None) -> Tensor:
        """Losses [n] of tasks now, in nats per byte that counts; the mean of a task's pairs."""
        x, counts = (each.to(self.device) for each in stack(tasks, length))
        rows = self.population.losses(self.learner.values.unsqueeze(0), x, counts)[0]
        return torch.stack([part.mean() for part in rows.split([len(task.pairs) for task in tasks])])

    def _guard(self, length: int | None) -> Callable[[Tensor, Selection], Tensor] | None:
        if self.options.guard is None or not self.records:
            return None
        tasks = [record.task for record in self.records]
        x, counts = (each.to(self.device) for each in stack(tasks, length))
        allowed = (
            torch.tensor([record.after for record in self.records], device=self.device) * (1 + self.options.guard)
            + 1e-4
        )
        of_row = torch.repeat_interleave(allowed, torch.tensor([len(task.pairs) for task in tasks], device=self.device))

        def passes(versions: Tensor, of: Selection) -> Tensor:
            losses = self.population.losses(versions, x, counts, of=of, base=self.learner.values)
            return (losses <= of_row).all(1)

        return passes

    # ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────

    def commit(self, **changes: Any) -> None:
        """Write the weights and the progress, in one step."""
        meta = self.store.meta | {"learner": self.learner.state()} | changes
        self.store.commit(self.learner.values.cpu(), meta=meta)

    def _protected(self, number: int) -> Path:
        return self.path / "protected" / f"{number + 1:06d}.safetensors"

    def _spans(self) -> dict[str, int]:
        return {} if self.directions is None else {k: len(v) for k, v in self.directions.protected.items()}

    def _save_protected(self, before: dict[str, int]) -> None:
        """Write what has been protected since `before`, and then say that it counts, with the records."""
        number = self.store.meta["protected"]
        if self.directions is not None:
            new = {name: basis[before[name] :].cpu().contiguous() for name, basis in self.directions.protected.items()}
            write_atomically(self._protected(number), serialise(new))
            number += 1
        self.commit(records=[record.to_json() for record in self.records], protected=number)


def _bases(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"protected {file}: damaged ({error})") from None


def _record(task: Task, learned: Learned, found) -> Record:
    locked, important, credited = (0, 0, 0) if found is None else (
        int(found.weights.sum()), found.important, found.credited,
    )  # fmt: skip
    evaluations = learned.evaluations + (0 if found is None else found.evaluations)
    return Record(task, learned.before, learned.after, evaluations, locked, important, credited)


def demonstration_model(head_dim: int = 512, seed: int = 0) -> AGIFormer:
    """A small AGIFormer that has learned nothing, whose blocks mix what they read at random (a reservoir).

    As they are made, the blocks of a new model pass everything on unchanged, and what its head reads would tell
    nothing of a prompt but its last bytes.
    """
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AGIFormer(
            AGIFormerConfig(
                d_model=64,
                n_layers=2,
                n_heads=2,
                ffn_dim=128,
                petals=2,
                byte_dim=32,
                reasoning_dim=64,
                thinking_steps=1,
                head_dim=head_dim,
            )
        )
        with torch.no_grad():
            for block in model.blocks:
                nn.init.normal_(block.output.weight, std=block.output.in_features**-0.5)
                nn.init.normal_(block.hull.groups[0].down, std=model.config.ffn_dim**-0.5)
    finally:
        torch.set_rng_state(state)
    return model.eval()
