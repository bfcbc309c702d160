"""A model in a folder that learns task after task without gradients, and keeps each (seed 001).

    FOLDER/start.safetensors      the model before the first task: its shape, its buffers. What it has learned since
                                  is in weights/; `export` writes both as one checkpoint
    FOLDER/weights/               its weights, locks, progress and last snapshot (model.sgm.storage)
    FOLDER/protected/000001...    what each task has read at the layers that learn (model.sgm.directions)

A task is learned by mutation, then what matters to it is locked, then what it read is protected. A process may be
killed at any instruction of it: what has been locked stays, and a task that was not finished is learned on, from the
evaluations that it has used, with the weights and the loss that it began with. Of the search itself the estimate g and
the step η begin anew then.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from model.agiformer import AGIFormer
from model.files import sync_folder, write_atomically
from model.sgm.directions import Directions
from model.sgm.learner import Learner
from model.sgm.lifelong_options import LifelongOptions, Record
from model.sgm.locking import LockOptions, anchors, find_important
from model.sgm.mutations import LearnerOptions, Places, scales
from model.sgm.population import Population, Selection, place_losses
from model.sgm.storage import StoreBusy, WeightStore
from model.sgm.store_files import newest_snapshot
from model.sgm.tasks import Task, ordinary, stack
from model.training.checkpoint import load_checkpoint, save_checkpoint

START = "start.safetensors"
ORDINARY_LENGTH = 48
ANCHORED = "coordinates"  # the name of the first lock
KEPT = "kept"  # the snapshot of the last task's end
LOGITS = "head.output.weight"  # what this layer writes at a byte is heard by the loss of that byte alone


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
        self.population = Population(model, place_losses)
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
        self.directions = _directions(self.population, self.options)
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
        """Begin with a copy of a model in a new folder: its embeddings are locked (and its norms, if it had any).

        A killed `create` leaves no folder, but one beside it that the next `create` takes over.

        Raises:
            ValueError: when the folder is not empty, or a name in `options.learns` is none of a linear layer's weights.
            StoreBusy: when another process is creating it.
        """
        path, options = Path(path), options or LifelongOptions()
        _check_new(path)
        population = Population(model, place_losses)
        start = Learner(population, learner, seed=options.seed)
        x = ordinary(ORDINARY_LENGTH).to(population.device)
        if directions := _directions(population, options):
            directions.inputs(start.values, x)  # says what is wrong with them before anything is written
        elif unknown := [name for name in options.learns if name not in population.spans]:
            raise ValueError(f"learns={unknown[0]!r}: accepted are names of the model's parameters")
        meta = {
            "options": asdict(options),
            "lock_options": asdict(lock or LockOptions()),
            "learner": start.state(),
            "records": [],
            "protected": 0,
            "begun": None,
            "kept": True,
        }
        place = path.resolve()
        with _making(place) as making:
            save_checkpoint(model, making / START)
            store = WeightStore.from_module(making / "weights", model, dtype=options.dtype, meta=meta)
            with cls(making, load_checkpoint(making / START, population.device), store) as begun:
                if (mask := anchors(begun.model, begun.population)).any():
                    store.lock(ANCHORED, mask.cpu())
                if begun.directions is not None and options.energy:
                    before = begun._spans()
                    begun.directions.anchor(begun.directions.inputs(begun.learner.values, x), options.energy)
                    begun.commit(protected=begun._save_protected(before))
                store.snapshot(KEPT)
            try:
                os.rename(making, place)
            except OSError:  # something has come there meanwhile
                _check_new(path)
                raise
            sync_folder(place.parent)
        return cls.open(path, device=population.device)

    @classmethod
    def open(
        cls, path: str | Path, *, read_only: bool = False, device: str | torch.device = "cpu"
    ) -> "LifelongLearner":
        """Go on with a folder; `read_only` beside a process that learns.

        Raises:
            ValueError: when there is none, or another process works on it.
        """
        path = _checked_folder(path)
        model = load_checkpoint(path / START, device)
        store = WeightStore.open(path / "weights", read_only=read_only)
        try:
            return cls(path, model, store)
        except BaseException:
            store.close()
            raise

    @classmethod
    def recover(cls, path: str | Path, *, device: str | torch.device = "cpu") -> tuple["LifelongLearner", str]:
        """Open a damaged folder at its newest snapshot that is whole, with all locked weights → it, and the snapshot.

        That is the end of the last task, or the best total of the improvement loop. Where what has been protected is
        damaged too, all tasks are read anew. `start.safetensors` cannot be put back.

        Raises:
            ValueError: when there is no such folder, no snapshot that is whole, or a lock that is damaged.
        """
        path = _checked_folder(path)
        model = load_checkpoint(path / START, device)
        name = newest_snapshot(path / "weights")
        store = WeightStore.recover(path / "weights", name)
        try:
            try:
                return cls(path, model, store), name
            except (ValueError, OSError):  # of the protected directions
                protected = store.meta["protected"]
                store.commit(meta=store.meta | {"protected": 0})
                learner = cls(path, model, store)
                if protected:
                    learner._protect_anew()
                return learner, name
        except BaseException:
            store.close()
            raise

    @staticmethod
    def is_at(path: str | Path) -> bool:
        """Whether there is a folder that was made by `create`."""
        return (Path(path) / START).is_file()

    def __enter__(self) -> "LifelongLearner":
        return self

    def __exit__(self, *_) -> None:
        self.store.close()

    # ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────

    def learn(self, task: Task, *, evaluations: int = 500, target: float = 0.3, length: int | None = None) -> Record:
        """Learn a task, lock what matters to it, protect what it reads then. Every accepted change is committed.

        When the task that was begun last and not finished is this one, it is gone on with: `evaluations` counts from
        its beginning, and what it has changed is what it has changed since then.

        Raises:
            ValueError: for a task that does not fit `length` or has no answer, or evaluations below 1.
        """
        if not isinstance(evaluations, int) or evaluations < 1:
            raise ValueError(f"evaluations={evaluations!r}: accepted is an integer ≥ 1")
        x, counts = (each.to(self.device) for each in task.batch(length))
        if not counts.any():
            raise ValueError(f"task {task.name!r} has no answer: accepted is one with a byte that counts")
        learner = self.learner
        begun, reference = self._begin(task, x, counts)
        if begun["after"] is None:
            left = evaluations - (learner.evaluations - begun["evaluations"])
            after = self._search(x, counts, left, target, length) if left > 0 else self.losses([task], length).item()
            begun = begun | {"after": after}
            self.store.commit(meta=self._meta(begun=begun))  # the weights are there already
        if begun["locks"] is None:
            begun = self._lock(task, x, counts, begun, reference)
        spans = self._spans()
        self._protect(x, counts)
        self.records.append(
            Record(task, begun["before"], begun["after"], learner.evaluations - begun["evaluations"], **begun["locks"])
        )
        protected = self._save_protected(spans)
        records = [record.to_json() for record in self.records]
        self.store.commit(meta=self._meta(records=records, protected=protected, begun=None, kept=False))
        self._keep()
        self.population.load(learner.values)
        return self.records[-1]

    def _begin(self, task: Task, x: Tensor, counts: Tensor) -> tuple[dict[str, Any], Tensor]:
        """What is known of the task's beginning, and the weights [N] then; from the folder, if it was begun before."""
        meta, described = self.store.meta, json.loads(json.dumps(asdict(task)))
        if meta["begun"] is not None and meta["begun"]["task"] == described:
            return meta["begun"], self.store.of_snapshot(KEPT).to(self.device)
        if meta["begun"] is not None or not meta["kept"]:  # another task has moved the weights, or a kill came between
            self.store.commit(meta=self._meta(begun=None))
            self._keep()
        before = self.population.losses(self.learner.values.unsqueeze(0), x, counts).mean().item()
        begun = {"task": described, "before": before, "evaluations": self.learner.evaluations}
        begun |= {"after": None, "locks": None}
        self.learner.evaluations += 1
        self.store.commit(meta=self._meta(begun=begun))
        return begun, self.learner.values.clone()

    def _search(self, x: Tensor, counts: Tensor, evaluations: int, target: float, length: int | None) -> float:
        """Learn → the loss that it came to."""
        learner, within, places = self.learner, None, None
        directions = self.directions
        if directions is None and LOGITS in self.options.learns:
            directions = Directions(self.population, [LOGITS])  # of which nothing is protected
        if directions is not None:
            read = self._inputs(directions, x, counts)
            within = directions.within(read, learner.locked)
            if LOGITS in read:
                places = {LOGITS: Places(read[LOGITS], counts.flatten().nonzero().flatten())}
        learned = learner.learn(
            x, counts, evaluations=evaluations, target=target, free=self.free(), within=within, places=places,
            guard=self._guard(length), on_accept=lambda: self.commit(),
        )  # fmt: skip
        return learned.after

    def _lock(self, task: Task, x: Tensor, counts: Tensor, begun: dict[str, Any], reference: Tensor) -> dict[str, Any]:
        """Lock what matters to the task, if it has learned anything → `begun` with what that was."""
        locks, found, learner = {"locked": 0, "important": 0, "credited": 0}, None, self.learner
        if self.options.locks and begun["after"] < begun["before"] * (1 - self.options.lock_from):
            found = find_important(
                self.population, learner.values, x, counts, locked=learner.locked | ~self.free(), reference=reference,
                scale=scales(self.population), options=self.lock_options,
                generator=torch.Generator(self.device).manual_seed(len(self.records)),
            )  # fmt: skip
            learner.evaluations += found.evaluations
            locks = {
                "locked": int(found.weights.sum()), "important": found.important, "credited": found.credited,
            }  # fmt: skip
        begun = begun | {"locks": locks}
        if locks["locked"]:
            self.store.lock(task.name, found.weights.cpu(), meta=self._meta(begun=begun))
            learner.locked |= found.weights
        return begun

    def _inputs(self, directions: Directions, x: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """What the layers that learn read, up to the last byte that counts: nothing depends on what comes behind."""
        last = int(counts.any(0).nonzero().max()) + 1
        return directions.inputs(self.learner.values, x[:, :last], counts[:, :last])

    def _protect(self, x: Tensor, counts: Tensor) -> None:
        """Keep what the rows read now: with several layers, or one that reads itself, that is not what they read."""
        if self.directions is not None:
            self.directions.protect(self._inputs(self.directions, x, counts))

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
        rows = self.population.losses(self.learner.values.unsqueeze(0), x, counts)[0].mean(1)
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
            losses = self.population.losses(versions, x, counts, of=of, base=self.learner.values).mean(2)
            return (losses <= of_row).all(1)

        return passes

    # ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────

    def export(self, file: str | Path) -> Path:
        """Write the model with all that it has learned as an ordinary checkpoint, atomically."""
        return save_checkpoint(self.model, file)

    def take(self, model: AGIFormer) -> None:
        """Go on with other weights of the same model, as gradient training with this folder's locks leaves them.

        What the tasks read has changed with them: their losses are taken anew, and what they read now is protected.

        Raises:
            ValueError: when it is a model of another shape, or a locked weight is another. Nothing is changed.
        """
        if model.config != self.model.config:
            raise ValueError(f"model of {model.config}: accepted is the folder's, {self.model.config}")
        values = self.learner.keep(Population(model).values().to(self.device))
        self.store.commit(values.cpu(), meta=self._meta(begun=None, kept=False))
        save_checkpoint(model, self.path / START)  # its buffers
        self.model.load_state_dict(model.state_dict())
        self.population.load(values)
        self.learner.values = values
        self.records = [replace(each, after=self.losses([each.task]).item()) for each in self.records]
        self._protect_anew()
        self.store.commit(meta=self._meta(records=[record.to_json() for record in self.records]))
        self._keep()

    def _protect_anew(self) -> None:
        """Protect what ordinary text and all tasks so far read now, instead of what they have read."""
        if self.directions is None:
            return
        self.directions.forget()
        if self.options.energy:
            x = ordinary(ORDINARY_LENGTH).to(self.device)
            self.directions.anchor(self.directions.inputs(self.learner.values, x), self.options.energy)
        for record in self.records:
            self._protect(*(each.to(self.device) for each in record.task.batch()))
        self.store.commit(meta=self._meta(protected=0))
        self.store.commit(meta=self._meta(protected=self._save_protected(dict.fromkeys(self.directions.protected, 0))))

    def commit(self, **changes: Any) -> None:
        """Write the weights and the progress, in one step."""
        self.store.commit(self.learner.values.cpu(), meta=self._meta(**changes))

    def _meta(self, **changes: Any) -> dict[str, Any]:
        return self.store.meta | {"learner": self.learner.state()} | changes

    def _keep(self) -> None:
        """Keep the folder as it is under `KEPT`: what the next task starts from, and what damage is undone from."""
        self.store.snapshot(KEPT)
        self.store.commit(meta=self._meta(kept=True))

    def _protected(self, number: int) -> Path:
        return self.path / "protected" / f"{number + 1:06d}.safetensors"

    def _spans(self) -> dict[str, int]:
        return {} if self.directions is None else {k: len(v) for k, v in self.directions.protected.items()}

    def _save_protected(self, before: dict[str, int]) -> int:
        """Write what has been protected since `before` → the number of files that count once that is committed."""
        number = self.store.meta["protected"]
        if self.directions is None:
            return number
        new = {name: basis[before[name] :].cpu().contiguous() for name, basis in self.directions.protected.items()}
        write_atomically(self._protected(number), serialise(new))
        return number + 1


def _directions(population: Population, options: LifelongOptions) -> Directions | None:
    """Of the layers that learn. What head and thinking loop write at a place is read at no other, but by a memory."""
    if not options.directions or not options.learns:
        return None
    last = ("head", "reasoning") if population.module.head.memory is None else ()
    mixed = [name for name in options.learns if name != LOGITS and name.split(".")[0] not in last]
    return Directions(population, list(options.learns), everywhere=mixed)


def _check_new(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"path={str(path)!r}: accepted is a new or empty folder")


def _checked_folder(path: str | Path) -> Path:
    if not LifelongLearner.is_at(path):
        raise ValueError(f"path={str(path)!r}: accepted is a folder that was made by `create`")
    return Path(path)


@contextlib.contextmanager
def _making(place: Path) -> Iterator[Path]:
    """A folder beside `place` in which to make it: one name, so that what a killed maker left is taken over."""
    making = place.parent / f".{place.name}.creating"
    while True:
        making.mkdir(parents=True, exist_ok=True)
        handle = os.open(making, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreBusy(f"path={str(place)!r}: another process is making it") from None
            if not making.exists() or not os.path.samestat(os.fstat(handle), making.stat()):
                continue  # its maker was quicker, and it has its name by now
            for left in making.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            try:
                yield making
            except BaseException:
                shutil.rmtree(making, ignore_errors=True)
                raise
            return
        finally:
            os.close(handle)


def _bases(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"protected {file}: damaged ({error})") from None
