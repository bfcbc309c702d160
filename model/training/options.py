"""Options of a training run, validated, with the defaults of each preset."""

from dataclasses import asdict, dataclass
from typing import Any

from model.petals.crystallization import CrystallizationOptions
from model.petals.viscoelastic import ViscoelasticOptions
from model.training.genesis import GenesisOptions
from model.training.growth import parse_growth
from model.training.optimizer import OPTIMIZERS

GENESIS = ("off", "on", "all")
REPLAY = ("auto", "off", "recomputed", "stored")
AMPLIFIER = ("auto", "off", "anchor", "rate", "both", "surprise", "all")
SWITCH = ("auto", "off", "on")
# What "auto" is under --genesis on, and under all: docs/results.md says what each earned.
GENESIS_DEFAULTS = {
    "on": {"replay": "recomputed", "amplifier": "off", "persistence": "off", "learning_curve": "off", "balance": "off"},
    "all": {"replay": "recomputed", "amplifier": "all", "persistence": "on", "learning_curve": "on", "balance": "on"},
}
AMP = ("auto", "bf16", "fp16", "off")
VISCOSITY = ("auto", "off", "resistance", "ema")
FREEZE = ("off", "cryogenic", "chrysalis")
FREEZE_RULES = ("pressure", "kl")
GROWTH_RULES = ("student-t", "phi")
PRESSURE_THRESHOLD, KL_THRESHOLD = 0.6, 0.01
LARGEST_SEED = 2**63 - 1

# What a run is when nothing else is said: enough steps that the result is worth looking at.
PRESET_DEFAULTS: dict[str, dict[str, Any]] = {
    "nano": {"steps": 500, "batch_size": 16, "seq_len": 512, "lr": 6e-3, "eval_bytes": 16384},
    "small": {"steps": 876, "batch_size": 32, "seq_len": 1024, "lr": 4e-3},
    "base": {"steps": 4000, "batch_size": 64, "seq_len": 1024, "lr": 2e-3},
    "large": {"steps": 8000, "batch_size": 128, "seq_len": 1024, "lr": 1e-3},
}


@dataclass(frozen=True)
class TrainingOptions:
    """One run. All of it is in the checkpoint, so that `--resume` needs no other option."""

    preset: str
    curriculum: str
    steps: int
    batch_size: int  # sequences per step and worker
    seq_len: int  # bytes per sequence, where a stage does not say
    lr: float  # peak learning rate
    optimizer: str = "muon"
    weight_decay: float = 0.1
    warmup: float = 0.02  # share of the steps
    decay: float = 0.3  # share of the steps, linear to zero
    clip: float = 1.0  # largest gradient norm
    amp: str = "auto"
    seed: int = 0
    eval_every: int = 0  # steps; 0 is ten times a run
    save_every: int = 0  # steps; 0 is ten times a run
    eval_bytes: int = 65536  # of each validation split, in the evaluations along the way
    eval_context: int = 1024  # bytes of a validation window
    viscosity: str = "auto"  # damped updates (docs/petals.md): "auto" is "resistance" where petals set by pressure
    freeze: str = "off"  # what becomes of petals that have set
    freeze_rule: str = "pressure"  # how a petal is found to have set
    freeze_at: str = "evaluations"  # when petals may set: at every evaluation, or at STEP,STEP,... only
    # Of pressure: the share of the peak learning rate (0.6 when None). Of kl: nats (0.01 when None).
    freeze_threshold: float | None = None
    grow: str = "off"  # "auto", or a plan: model.training.growth
    grow_rule: str = "student-t"  # of "auto": when
    grow_by: str = "petals"  # of "auto": what, "petals" or "blocks"
    grow_left: str = "frozen"  # whether the tree that was there goes on learning: "frozen" or "thawed"
    recall: float | None = None  # share of rows that get recall tasks, in all stages; the curriculum's own when None
    write_price: float = 4.0  # nats a byte for writing all of it into a head for facts, times the tasks' difficulty
    ponder_cost: float = 0.0  # nats, times the mean of 1 − p_halt over all thinking steps
    genesis: str = "on"  # what "auto" means below: "off", "on" (what has earned its place) or "all"
    replay: str = "auto"  # rehearse earlier stages: "off", "recomputed" (from bytes) or "stored" (latents)
    replay_rows: int | None = None  # sequences that rehearse in a step; 1/16 of the batch when None
    replay_size: int = 8192  # sequences remembered in all, on each device
    replay_weight: float | None = None  # of the replay loss; as if its rows were the batch's when None
    replay_priority: str = "even"  # how entries of a stage are drawn: "even", or more often those of large "loss"
    replay_depth: int = 0  # blocks that the replay point has passed at the end; it moves with the stages
    replay_mixed: bool = False  # one memory of all stages, drawn from throughout: the usual experience replay
    amplifier: str = "auto"  # anchor units, raise the "rate" of what feeds them; recurring "surprise"s
    persistence: str = "auto"  # pull what feeds important units to its state at the end of the stage before
    persistence_strength: float = 0.5  # λ of that pull, in units of the learning rate
    learning_curve: str = "auto"  # slow start, then a boom when the novelty has dropped
    balance: str = "auto"  # GradNorm between main and replay loss
    locks: str | None = None  # folder of model.sgm whose model is trained, and whose locked weights stay as they are

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_bytes", "eval_context"):
            self._accept(name, "an integer ≥ 1", lambda v: _is_int(v) and v >= 1)
        self._accept("seq_len", "an integer ≥ 2", lambda v: _is_int(v) and v >= 2)
        for name in ("eval_every", "save_every"):
            self._accept(name, "an integer ≥ 0", lambda v: _is_int(v) and v >= 0)
        self._accept("seed", f"an integer from 0 to {LARGEST_SEED}", lambda v: _is_int(v) and 0 <= v <= LARGEST_SEED)
        for name in ("lr", "clip"):
            self._accept(name, "a number > 0", lambda v: 0 < v < float("inf"))
        for name in ("weight_decay", "warmup", "decay"):
            self._accept(name, "a number from 0 to 1", lambda v: 0 <= v <= 1)
        self._accept("optimizer", f"one of {', '.join(OPTIMIZERS)}", lambda v: v in OPTIMIZERS)
        for name, accepted in (
            ("amp", AMP),
            ("viscosity", VISCOSITY),
            ("freeze", FREEZE),
            ("freeze_rule", FREEZE_RULES),
            ("grow_rule", GROWTH_RULES),
            ("grow_by", ("petals", "blocks")),
            ("grow_left", ("frozen", "thawed")),
            ("genesis", GENESIS),
            ("replay", REPLAY),
            ("replay_priority", ("even", "loss")),
            ("amplifier", AMPLIFIER),
            *((name, SWITCH) for name in ("persistence", "learning_curve", "balance")),
        ):
            self._accept(name, f"one of {', '.join(accepted)}", lambda v, accepted=accepted: v in accepted)
        self._accept("recall", "a number from 0 to 1", lambda v: v is None or 0 <= v <= 1)
        self._accept("freeze_threshold", "a number > 0", lambda v: v is None or 0 < v < float("inf"))
        self._accept("replay_rows", "an integer ≥ 1", lambda v: v is None or (_is_int(v) and v >= 1))
        self._accept("replay_size", "an integer ≥ 1", lambda v: _is_int(v) and v >= 1)
        self._accept("replay_depth", "an integer ≥ 0", lambda v: _is_int(v) and v >= 0)
        for name in ("replay_weight", "persistence_strength", "write_price", "ponder_cost"):
            self._accept(name, "a number ≥ 0", lambda v: v is None or 0 <= v < float("inf"))
        for name in GENESIS_DEFAULTS["on"]:
            if self.genesis == "off" and getattr(self, name) not in ("auto", "off"):
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted with genesis='off' are auto, off")
        if self.balance == "on" and self._chosen("replay") == "off":
            raise ValueError("balance='on': accepted with replay='off' are auto, off, as it balances the replay loss")
        if self.freeze == "off" and self.freeze_at != "evaluations":
            raise ValueError(f"freeze_at={self.freeze_at!r}: accepted with freeze='off' is evaluations")
        if self.grow == "auto" and self.freeze == "off":
            raise ValueError(
                "freeze='off': accepted with grow='auto' are cryogenic, chrysalis, as it counts set petals"
            )
        for step in self.freeze_steps or ():
            if not 0 < step <= self.steps:
                raise ValueError(
                    f"freeze_at={self.freeze_at!r}: step {step}, accepted are steps from 1 to {self.steps}"
                )
        for step in parse_growth(self.grow):
            if step.step >= self.steps:
                raise ValueError(f"grow={self.grow!r}: step {step.step}, accepted are steps before {self.steps}")

    def _accept(self, name: str, accepted: str, test) -> None:
        value = getattr(self, name)
        if not test(value):
            raise ValueError(f"{name}={value!r}: accepted is {accepted}")

    @classmethod
    def build(cls, preset: str, curriculum: str, **given: Any) -> "TrainingOptions":
        """The preset's defaults changed by what was given (None means not given)."""
        if preset not in PRESET_DEFAULTS:
            raise ValueError(f"preset={preset!r}: accepted are {', '.join(PRESET_DEFAULTS)}")
        chosen = PRESET_DEFAULTS[preset] | {name: value for name, value in given.items() if value is not None}
        return cls(preset=preset, curriculum=curriculum, **chosen)

    @property
    def eval_interval(self) -> int:
        """Steps between evaluations."""
        return self.eval_every or max(1, self.steps // 10)

    @property
    def save_interval(self) -> int:
        """Steps between saves."""
        return self.save_every or max(1, self.steps // 10)

    @property
    def viscoelastic(self) -> ViscoelasticOptions | None:
        """Options of the damped updates, or None for plain ones."""
        variant = self.viscosity
        if variant == "auto":
            variant = "resistance" if self.freeze != "off" and self.freeze_rule == "pressure" else "off"
        return None if variant == "off" else ViscoelasticOptions(variant=variant)

    @property
    def crystallization(self) -> CrystallizationOptions:
        """When petals set, and what becomes of them."""
        # Of the evaluations the first comes when the learning rate has only just risen.
        warmup = 1 if self.freeze_steps is None else 0
        given = self.freeze_threshold
        return CrystallizationOptions(
            self.freeze,
            self.freeze_rule,
            threshold=(given if self.freeze_rule == "pressure" else None) or PRESSURE_THRESHOLD,
            kl_tau=(given if self.freeze_rule == "kl" else None) or KL_THRESHOLD,
            warmup=warmup,
        )

    @property
    def freeze_steps(self) -> tuple[int, ...] | None:
        """The steps at which petals may set, or None for all evaluations."""
        if self.freeze_at == "evaluations":
            return None
        parts = self.freeze_at.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"freeze_at={self.freeze_at!r}: accepted are evaluations, or steps as 131,350")
        return tuple(int(part) for part in parts)

    def _chosen(self, name: str) -> str:
        """A mechanism's setting, with what "auto" means."""
        value = getattr(self, name)
        if value != "auto":
            return value
        return "off" if self.genesis == "off" else GENESIS_DEFAULTS[self.genesis][name]

    @property
    def genesis_options(self) -> GenesisOptions:
        """The mechanisms of GENESIS that this run uses."""
        rows = self.replay_rows or max(1, self.batch_size // 16)
        return GenesisOptions(
            replay=self._chosen("replay"),
            replay_rows=rows,
            replay_size=self.replay_size,
            replay_weight=rows / self.batch_size if self.replay_weight is None else self.replay_weight,
            replay_priority=self.replay_priority,
            replay_depth=self.replay_depth,
            replay_mixed=self.replay_mixed,
            amplifier=self._chosen("amplifier"),
            persistence=self.persistence_strength if self._chosen("persistence") == "on" else 0.0,
            learning_curve=self._chosen("learning_curve") == "on",
            balance=self._chosen("balance") == "on",
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for checkpoints and metrics."""
        return asdict(self)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
