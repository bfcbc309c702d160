"""One run for each change to the default recipe: what a part of the model or of the training is worth.

    python benchmarks/ablations.py --preset small --curriculum local --out runs/ablations
    python benchmarks/ablations.py --only default,adamw-1e-3,no-thinking

Every variant trains on the same bytes with the same seed. The table at the end has the BPC of every stage's validation
split, whole, after the last stage, and the training speed. Each run's own files lie in a folder of its name in --out.
"""

import argparse
import statistics
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
        block.fuse = lambda x, attended, recalled, block=block: block._normalise_heads(attended)


def memory_only(model: AGIFormer) -> None:
    """Attention's heads are left out of the fusion."""
    for block in model.blocks:
        block.fuse = lambda x, attended, recalled, block=block: block._normalise_heads(recalled.to(attended.dtype))


@torch.no_grad()
def random_outputs(model: AGIFormer) -> None:
    """Residual branches and output start random instead of zero."""
    layers = [model.reasoning.mlp.down, model.head.output]
    layers += [layer for block in model.blocks for layer in (block.output, block.feedforward.down)]
    for layer in layers:
        layer.weight.normal_(std=layer.in_features**-0.5)


def last_stage_alone(trainer: Trainer) -> None:
    """No curriculum: every step reads the last stage's text."""
    last = trainer.samplers[-1]
    trainer.samplers = [last] * len(trainer.samplers)


@dataclass(frozen=True)
class Variant:
    """A change to the default recipe."""

    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    curriculum: Callable[[Curriculum], Curriculum] = lambda curriculum: curriculum
    model: Callable[[AGIFormer], None] = lambda model: None
    trainer: Callable[[Trainer], None] = lambda trainer: None


VARIANTS = {
    "default": Variant(),
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
}


def run(name: str, arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """Train one variant → its row of the table."""
    variant = VARIANTS[name]
    options = TrainingOptions.build(
        arguments.preset, arguments.curriculum, steps=arguments.steps, batch_size=arguments.batch_size
    )
    # Another batch size means as many more steps on the same bytes.
    steps = options.steps * options.batch_size // variant.options.get("batch_size", options.batch_size)
    options = replace(options, steps=steps, eval_every=steps, save_every=steps)
    prepare_folder(Path(arguments.out) / name)
    trainer = Trainer(
        replace(AGIFormerConfig.preset(arguments.preset).with_settings(arguments.set), **variant.config),
        replace(options, **variant.options),
        variant.curriculum(load_curriculum(arguments.curriculum)),
        out=Path(arguments.out) / name,
        device=device,
        quiet=True,
    )
    variant.model(trainer.model)
    variant.trainer(trainer)
    trainer.train()
    bpc = trainer.metrics.data["retention"][-1]["bpc"]
    speed = statistics.median(trainer.speeds) / 1e6
    return [name, *(number(value) for value in bpc.values()), f"{speed:.3g}"]


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--preset", default="small", help="nano, small, base or large (default: small)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the model")
    parser.add_argument("--curriculum", default="local", help="as for train_curriculum.py (default: local)")
    parser.add_argument("--steps", type=int, help="steps of each run (default: the preset's)")
    parser.add_argument("--batch-size", type=int, help="sequences per step (default: the preset's)")
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
    print(text_table(["variant", *stages, "MB/s"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
