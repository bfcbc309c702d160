"""One run for each change to plain training: what a part of the model or of the training is worth.

    python benchmarks/ablations.py --preset small --curriculum local --out runs/ablations
    python benchmarks/ablations.py --only plain,adamw-1e-3,no-thinking

Every variant trains on the same bytes with the same seed. The table at the end has the BPC of every stage's validation
split, whole, after the last stage; what the earlier stages' splits lost since their own stage; size, speed, and seconds
of training, evaluations left out. Each run's own files lie in a folder of its name in --out.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.agiformer import AGIFormer
from model.cli import Parser, guarded
from model.config import AGIFormerConfig
from model.data import Curriculum, load_curriculum
from model.evaluation.report import number, text_table
from model.layers.norm import rms_norm_heads
from model.training.distributed import join_workers
from model.training.options import TrainingOptions
from model.training.run import prepare_folder
from model.training.trainer import Trainer


def same_plasticity(curriculum: Curriculum) -> Curriculum:
    """α 0.99 in every stage."""
    return replace(curriculum, stages=tuple(replace(stage, plasticity=0.99) for stage in curriculum.stages))


def attention_only(model: AGIFormer) -> None:
    """The fast weights' heads are left out of the fusion."""
    for block in model.blocks:
        block.fuse = lambda x, attended, recalled, heads=block.n_heads: rms_norm_heads(attended, heads)


def memory_only(model: AGIFormer) -> None:
    """Attention's heads are left out of the fusion."""
    for block in model.blocks:
        block.fuse = lambda x, attended, recalled, heads=block.n_heads: rms_norm_heads(
            recalled.to(attended.dtype), heads
        )


@torch.no_grad()
def random_outputs(model: AGIFormer) -> None:
    """Residual branches and output start random instead of zero."""
    layers = [model.reasoning.mlp.down, model.head.output]
    layers += [block.output for block in model.blocks]
    for layer in layers:
        layer.weight.normal_(std=layer.in_features**-0.5)
    for block in model.blocks:
        block.hull.groups[0].down.normal_(std=model.config.ffn_dim**-0.5)


def last_stage_alone(trainer: Trainer) -> None:
    """No curriculum: every step reads the last stage's text."""
    last = trainer.samplers[-1]
    trainer.samplers = [last] * len(trainer.samplers)


FISHER_BATCHES, FISHER_LARGEST = 32, 50.0  # the largest in units of the mean: a pull must not overshoot


def elastic_weights(trainer: Trainer, strength: float = 1.0) -> None:
    """Elastic weight consolidation (Kirkpatrick et al. 2017), online (Schwarz et al. 2018), for comparison.

    When a stage ends, the squared gradients of some of its batches are added to a diagonal of importance, and the
    weights become the reference. The pull is decoupled, as that of GENESIS's persistence.
    """
    optimizer, model = trainer.training_step.optimizer, trainer.model
    fisher, reference = torch.zeros_like(optimizer.values), optimizer.values.detach().clone()
    pull = torch.zeros_like(fisher)
    optimizer.modifiers.append(lambda updates: updates.addcmul_(pull, optimizer.values.detach() - reference))
    evaluate = trainer._evaluate

    def evaluate_and_consolidate(stage_ended: bool) -> None:
        evaluate(stage_ended)
        if not stage_ended or trainer.step == trainer.options.steps:
            return
        sampler = trainer.samplers[trainer.boundaries.index(trainer.step)]
        for i in range(FISHER_BATCHES):
            optimizer.zero_grad()
            batch = sampler.batch(max(0, sampler.index - 1 - i)).to(trainer.device)
            with torch.autocast(trainer.device.type, trainer.amp_dtype, enabled=trainer.amp_dtype is not None):
                loss = model.loss(batch)
            loss.backward()
            fisher.addcmul_(optimizer.grads, optimizer.grads)
        reference.copy_(optimizer.values.detach())
        pull.copy_((fisher / fisher.mean()).clamp_(max=FISHER_LARGEST).mul_(strength))

    trainer._evaluate = evaluate_and_consolidate


@dataclass(frozen=True)
class Variant:
    """A change to plain training."""

    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    growth: Callable[[int], tuple[str, ...]] = lambda n_layers: ()  # of the model at the start, by its blocks
    curriculum: Callable[[Curriculum], Curriculum] = lambda curriculum: curriculum
    model: Callable[[AGIFormer], None] = lambda model: None
    trainer: Callable[[Trainer], None] = lambda trainer: None


# Switches of GENESIS, off where a variant does not say otherwise.
MECHANISMS = ("replay", "amplifier", "persistence", "learning_curve", "balance")

# Plans of growth: at the ends of the first two stages of the default curriculum's 15 / 25 / 60%.
FIRST, SECOND = 0.15, 0.40
HALF_AND_HALF = "{first}:{lower},{second}:{upper}"
TWICE_PETALS = "{first}:petals,{second}:petals"


def petals_twice(n_layers: int) -> tuple[str, ...]:
    """What TWICE_PETALS comes to, from the start."""
    return tuple(f"petals {bob} {n}" for n in (2, 3) for bob in range(n_layers))


def blocks_thawed(n_layers: int) -> tuple[str, ...]:
    """What HALF_AND_HALF comes to, from the start, all of it learning."""
    return tuple(f"{change} {bob}" for change in ("grow", "thaw") for bob in range(n_layers))


# Petals may set when the first stage ends, and never after: those that have by pressure, or all of them.
SET_ONCE = {"freeze": "chrysalis", "freeze_at": "{first}", "freeze_threshold": 0.85}
ALL_ONCE = {"freeze": "chrysalis", "freeze_at": "{first}", "freeze_threshold": 2.0, "viscosity": "off"}

# Replay from memory of about 1 MiB with `small`'s sequences of 1 KiB: 1024 in bytes, 4 as latents.
MEBIBYTE = {"replay_size": 1024}

VARIANTS = {
    "plain": Variant({"genesis": "off"}),
    "batch-8": Variant({"batch_size": 8, "lr": 3e-3}),
    "batch-16": Variant({"batch_size": 16}),
    "batch-24": Variant({"batch_size": 24}),
    "lr-2e-3": Variant({"lr": 2e-3}),
    "lr-8e-3": Variant({"lr": 8e-3}),
    "adamw-1e-3": Variant({"optimizer": "adamw", "lr": 1e-3}),
    "adamw-2e-3": Variant({"optimizer": "adamw", "lr": 2e-3}),
    "decay-0.6": Variant({"decay": 0.6}),
    "decay-1.0": Variant({"decay": 1.0}),
    "no-weight-decay": Variant({"weight_decay": 0.0}),
    "alpha-0.99": Variant(curriculum=same_plasticity),
    "no-thinking": Variant(config={"thinking_steps": 0}),
    "delta-rule": Variant(config={"memory_rule": "delta"}),
    "random-outputs": Variant(model=random_outputs),
    "attention-only": Variant(model=attention_only),
    "memory-only": Variant(model=memory_only),
    "last-stage-alone": Variant(trainer=last_stage_alone),
    # hulls
    "swiglu": Variant(config={"hull": "swiglu"}),
    "8-petals": Variant(config={"petals": 8}),
    # growth: twice, where the stages end, against the final size from the start
    "petals-twice": Variant({"grow": TWICE_PETALS}),
    "petals-from-the-start": Variant(growth=petals_twice),
    "blocks-twice": Variant({"grow": HALF_AND_HALF}),
    "blocks-twice-thawed": Variant({"grow": HALF_AND_HALF, "grow_left": "thawed"}),
    "blocks-from-the-start": Variant(growth=blocks_thawed),
    # freezing
    "viscous": Variant({"viscosity": "resistance", "lr": 5e-3}),
    "viscous-ema": Variant({"viscosity": "ema", "lr": 5e-3}),
    "cryogenic": Variant({"freeze": "cryogenic", "lr": 5e-3}),
    "chrysalis": Variant({"freeze": "chrysalis", "lr": 5e-3}),
    "petals-8": Variant({"grow": "{first}:petals=8"}),
    "petals-8-all-set": Variant({"grow": "{first}:petals=8"} | ALL_ONCE),
    "petals-8-set": Variant({"grow": "{first}:petals=8", "lr": 5e-3} | SET_ONCE),
    "adamw-petals-8": Variant({"optimizer": "adamw", "lr": 1e-3, "grow": "{first}:petals=8"}),
    "adamw-petals-8-set": Variant({"optimizer": "adamw", "lr": 1.25e-3, "grow": "{first}:petals=8"} | SET_ONCE),
    "auto": Variant({"grow": "auto", "freeze": "cryogenic", "lr": 5e-3}),
    # GENESIS: what is on by default, each mechanism alone, all of them, and what the field would do
    "default": Variant({"genesis": "on"}),
    "replay": Variant({"replay": "recomputed"}),
    "replay-1-row": Variant({"replay": "recomputed", "replay_rows": 1}),
    "replay-loss": Variant({"replay": "recomputed", "replay_priority": "loss"}),
    "replay-depth-2": Variant({"replay": "recomputed", "replay_depth": 2}),
    "replay-1-MiB": Variant({"replay": "recomputed"} | MEBIBYTE),
    "replay-stored": Variant({"replay": "stored", "replay_size": 1024}),
    "replay-stored-depth-2": Variant({"replay": "stored", "replay_size": 1024, "replay_depth": 2}),
    "experience-replay": Variant({"replay": "recomputed", "replay_mixed": True}),
    "experience-replay-1-MiB": Variant({"replay": "recomputed", "replay_mixed": True} | MEBIBYTE),
    "amplifier-rate": Variant({"amplifier": "rate"}),
    "amplifier-anchor": Variant({"amplifier": "anchor"}),
    "amplifier": Variant({"amplifier": "both"}),
    "amplifier-surprise": Variant({"amplifier": "surprise"}),
    "persistence": Variant({"persistence": "on"}),
    "learning-curve": Variant({"learning_curve": "on"}),
    "replay-balance": Variant({"replay": "recomputed", "balance": "on"}),
    "all": Variant({"genesis": "all"}),
    "all-1-row": Variant({"genesis": "all", "replay_rows": 1}),
    "elastic-weights": Variant(trainer=elastic_weights),
}


def run(name: str, arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """Train one variant → its row of the table."""
    variant = VARIANTS[name]
    options = TrainingOptions.build(
        arguments.preset,
        arguments.curriculum,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
    )
    # Another batch size means as many more steps on the same bytes.
    steps = options.steps * options.batch_size // variant.options.get("batch_size", options.batch_size)
    changes = ({} if "genesis" in variant.options else dict.fromkeys(MECHANISMS, "off")) | variant.options
    config = replace(AGIFormerConfig.preset(arguments.preset).with_settings(arguments.set), **variant.config)
    config = replace(config, growth=variant.growth(config.n_layers))
    half = (config.n_layers + 1) // 2
    names = {"first": round(FIRST * steps), "second": round(SECOND * steps)}
    names["lower"] = "+".join(str(bob) for bob in range(half))
    names["upper"] = "+".join(str(bob) for bob in range(half, config.n_layers))
    for option in ("grow", "freeze_at"):
        if option in changes:
            changes[option] = changes[option].format(**names)
    every = max(1, steps // 10) if changes.get("freeze", "off") != "off" else steps
    options = replace(options, steps=steps, eval_every=every, save_every=steps)
    prepare_folder(Path(arguments.out) / name)
    trainer = Trainer(
        config,
        replace(options, **changes),
        variant.curriculum(load_curriculum(arguments.curriculum)),
        out=Path(arguments.out) / name,
        device=device,
        quiet=True,
    )
    variant.model(trainer.model)
    variant.trainer(trainer)
    trainer.train()
    retention = trainer.metrics.data["retention"]
    end = retention[-1]["bpc"]
    # What each stage but the last lost since its own end.
    forgotten = [end[row["after"]] - row["bpc"][row["after"]] for row in retention[:-1]]
    seconds = trainer.training_seconds
    bytes_seen = sum(
        (stage["end"] - stage["start"]) * stage["seq_len"] * options.batch_size
        for stage in trainer.metrics.data["stages"]
    )
    solid = trainer.metrics.data["hulls"][-1].get("solid")
    return [
        name,
        *(number(value) for value in end.values()),
        *(f"{value:+.3f}" for value in forgotten),
        f"{trainer.model.parameter_count() / 1e6:.1f}",
        f"{bytes_seen / seconds / 1e6:.3g}",
        f"{seconds:.1f}",
        "" if solid is None else f"{solid}/{trainer.metrics.data['hulls'][-1]['total']}",
    ]


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--preset", default="small", help="nano, small, base or large (default: small)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the model")
    parser.add_argument("--curriculum", default="local", help="as for train_curriculum.py (default: local)")
    parser.add_argument("--steps", type=int, help="steps of each run (default: the preset's)")
    parser.add_argument("--batch-size", type=int, help="sequences per step (default: the preset's)")
    parser.add_argument("--seq-len", type=int, help="bytes per sequence (default: the preset's)")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--out", default="runs/ablations", help="folder of the runs (default: runs/ablations)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"--only {unknown[0]}: accepted are {', '.join(VARIANTS)}")
    return guarded("ablations.py", lambda: run_all(names, arguments))


def run_all(names: list[str], arguments: argparse.Namespace) -> int:
    workers, device = join_workers(arguments.device)
    if workers.size > 1:
        raise ValueError(f"{workers.size} workers: accepted is one, without torchrun")
    rows = []
    for name in names:
        rows.append(run(name, arguments, device))
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    stages = [stage.name for stage in load_curriculum(arguments.curriculum).stages]
    forgotten = [f"{stage} lost" for stage in stages[:-1]]
    print(text_table(["variant", *stages, *forgotten, "M parameters", "MB/s", "seconds", "solid petals"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
