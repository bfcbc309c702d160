"""What of the system a folder uses, and what it knows of each task (model.sgm.lifelong)."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from model.sgm.tasks import Task


@dataclass(frozen=True)
class LifelongOptions:
    """What of the system is used.

    Args:
        learns: weights of linear layers that learn within directions of their own; without directions, any parameters.
            Empty: every weight that is not locked moves, and nothing is protected.
        directions: protect what earlier tasks read. Without, the last layer is searched in the same way.
        locks: lock what matters to a task.
        lock_from: share by which a task's loss has to fall for its weights to be locked, from 0 to below 1.
        guard: largest growth of an earlier task's loss, as a share; a mutation that exceeds it is turned down.
            None for no guard.
        energy: share of ordinary text's inputs that is protected before the first task, from 0 to below 1.
        dtype: of the stored weights, float32 or float16.
        seed: of the mutations, from 0 to 2⁶³ − 1.

    Raises:
        ValueError: for an argument out of range.
    """

    learns: tuple[str, ...] = ("head.output.weight",)
    directions: bool = True
    locks: bool = True
    lock_from: float = 0.02
    guard: float | None = None
    energy: float = 0.9
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, accepts, accepted in (
            (
                "learns",
                lambda v: isinstance(v, tuple) and all(isinstance(each, str) for each in v),
                "a tuple of parameters' names",
            ),
            ("directions", lambda v: isinstance(v, bool), "True or False"),
            ("locks", lambda v: isinstance(v, bool), "True or False"),
            ("lock_from", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
            ("guard", lambda v: v is None or 0 <= v < math.inf, "a number ≥ 0, or None"),
            ("energy", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
            ("dtype", lambda v: v in ("float32", "float16"), "float32 or float16"),
            ("seed", lambda v: isinstance(v, int) and 0 <= v < 2**63, "an integer from 0 to 2⁶³ − 1"),
        ):
            if not accepts(value := getattr(self, name)):
                raise ValueError(f"{name}={value!r}: accepted is {accepted}")


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
