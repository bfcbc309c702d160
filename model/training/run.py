"""A whole run of train_curriculum.py: from its arguments to the report and the sample at its end."""

import statistics
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model.agiformer import AGIFormer
from model.config import AGIFormerConfig
from model.data import BUILTIN_CURRICULA, load_curriculum
from model.evaluation.report import number
from model.files import write_atomically
from model.inference.generate import generate
from model.inference.text import Utf8Emitter
from model.training.checkpoint import CheckpointError, load_training_values
from model.training.distributed import Workers, join_workers
from model.training.options import TrainingOptions
from model.training.trainer import FILES, LAST, Trainer, changeable


def run_curriculum(arguments: Namespace, install_signal_handlers: Callable[[Callable[[], None]], None]) -> int:
    """Train as the arguments say; 0 when done or stopped cleanly. ValueError for what a user can mend."""
    workers, device = join_workers(arguments.device)
    code = _run(arguments, install_signal_handlers, workers, device)
    # Not after an error: leaving would wait for the others, who wait in the step that this worker did not reach.
    workers.leave()
    return code


def _run(arguments: Namespace, install_signal_handlers, workers: Workers, device: torch.device) -> int:
    resume = _resume_path(arguments, workers)
    saved = _saved_run(resume) if resume else None
    if arguments.locks:
        arguments.locks = str(Path(arguments.locks).resolve())  # a run is resumed from another folder, too
    start, locked = _locked_start(arguments.locks) if arguments.locks and saved is None else (None, None)
    options, config = _options(arguments, device, saved, start)
    curriculum = load_curriculum(options.curriculum)
    trainer = Trainer(
        config,
        options,
        curriculum,
        out=arguments.out,
        device=device,
        workers=workers,
        cache_dir=arguments.cache_dir,
        graph=not arguments.no_graph,
        quiet=arguments.quiet,
        start=start,
        locked=locked,
    )
    if workers.is_main:
        prepare_folder(trainer.out, resume)
    if resume:
        trainer.resume(resume)
    if workers.is_main:
        _announce(trainer, resume)

    def request_stop() -> None:
        trainer.stop_requested = True

    restore_signal_handlers = install_signal_handlers(request_stop)
    complete = trainer.train()
    restore_signal_handlers()
    if not workers.is_main:
        return 0
    trainer.plot()
    if not complete:
        print(f"stopped at step {trainer.step} of {options.steps}, saved; go on with --resume --out {arguments.out}")
        return 0
    _report(trainer, arguments.sample_bytes)
    return 0


def prepare_folder(out: Path, resume: Path | None = None) -> None:
    """Make the folder and see that it can be written; another run that lies in it is moved aside, not overwritten."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / ".probe", b"").unlink()
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror}); accepted is a folder") from None
    earlier = [name for name in FILES if (out / name).exists()]
    if not earlier or (resume and resume.resolve().parent == out.resolve()):
        return
    n = 1
    while (aside := out / f"previous-{n}").exists():
        n += 1
    aside.mkdir()
    for name in earlier:
        (out / name).rename(aside / name)
    print(f"{out}/ held another run: moved to {aside}/ (go on with it: --resume --out {aside})", file=sys.stderr)


def _resume_path(arguments: Namespace, workers: Workers) -> Path | None:
    if arguments.resume is None:
        return None
    if arguments.resume:
        if not Path(arguments.resume).is_file():
            raise CheckpointError(f"--resume {arguments.resume}: no such file")
        return Path(arguments.resume)
    path = Path(arguments.out) / LAST
    if path.is_file():
        return path
    if workers.is_main:
        print(f"--resume: no {LAST} in {arguments.out} yet, starting from the beginning", file=sys.stderr)
    return None


def _saved_run(path: Path) -> dict[str, Any]:
    values = load_training_values(path)
    if "metrics" not in values:
        raise CheckpointError(f"--resume {path}: holds weights without training state; accepted is a {LAST}")
    return values["metrics"]["run"]


def _locked_start(folder: str) -> tuple[AGIFormer, dict[str, torch.Tensor]]:
    """The model of a folder of model.sgm, and which of its weights are locked, by name."""
    from model.sgm.lifelong import LifelongLearner
    from model.sgm.locking import by_parameter

    if not LifelongLearner.is_at(folder):
        raise ValueError(f"--locks {folder}: accepted is a folder that python -m model.sgm has made")
    with LifelongLearner.open(folder, read_only=True) as learner:
        return learner.model, by_parameter(learner.population, learner.learner.locked)


def _options(
    arguments: Namespace, device: torch.device, saved: dict[str, Any] | None, start: AGIFormer | None
) -> tuple[TrainingOptions, AGIFormerConfig]:
    if arguments.curriculum and arguments.curriculum not in BUILTIN_CURRICULA and Path(arguments.curriculum).exists():
        # So that the run can be resumed from another folder.
        arguments.curriculum = str(Path(arguments.curriculum).resolve())
    names = ("steps", "batch_size", "seq_len", "lr", "optimizer", "weight_decay", "warmup", "decay", "clip", "amp")
    names += ("seed", "eval_every", "save_every", "viscosity", "freeze", "freeze_at", "freeze_rule", "freeze_threshold")
    names += ("grow", "grow_rule", "grow_by", "grow_left", "genesis", "replay", "replay_rows", "replay_size")
    names += (
        "replay_weight",
        "replay_priority",
        "replay_depth",
        "replay_mixed",
        "amplifier",
        "persistence",
        "persistence_strength",
    )
    names += ("learning_curve", "balance", "recall", "write_price", "ponder_cost", "locks")
    given = {name: getattr(arguments, name) for name in names}
    for name in ("hull", "petals"):
        if getattr(arguments, name) is not None:
            arguments.set = [*arguments.set, f"{name}={getattr(arguments, name)}"]
    if any(setting.startswith("plasticity=") for setting in arguments.set):
        raise ValueError("--set plasticity: accepted is a plasticity of each stage, in the curriculum's TOML file")
    if saved is None:
        preset = arguments.preset or ("small" if device.type == "cuda" else "nano")
        if start is None:
            config = AGIFormerConfig.preset(preset).with_settings(arguments.set)
        elif (config := start.config).with_settings(arguments.set) != config:
            raise ValueError(f"--set {' '.join(arguments.set)}: differs from the model of --locks; leave it out")
        return TrainingOptions.build(preset, arguments.curriculum or "pydoc", **given), config
    options, config = dict(saved["options"]), AGIFormerConfig.from_dict(saved["config"])
    given |= {"preset": arguments.preset, "curriculum": arguments.curriculum}
    for name, value in given.items():
        if value is not None and value != options.get(name) and name not in changeable(options):
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} {value}: the run being resumed has {options.get(name)}; accepted is that, or leaving it out"
            )
        if value is not None:
            options[name] = value
    if config.with_settings(arguments.set) != config:
        raise ValueError(f"--set {' '.join(arguments.set)}: differs from the model being resumed; leave it out")
    return TrainingOptions(**options), config


def _announce(trainer: Trainer, resume: Path | None) -> None:
    options, model = trainer.options, trainer.model
    amp = trainer.metrics.data["run"]["amp"]
    print(
        f"{options.preset}: {model.parameter_count() / 1e6:.2f} M parameters on {trainer.device}, amp {amp}; "
        f"curriculum {trainer.curriculum.name}, {options.steps} steps"
    )
    for stage in trainer.metrics.data["stages"]:
        print(
            f"  stage {stage['name']}: steps {stage['start']}–{stage['end']}, α {stage['plasticity']:g}, "
            f"{stage['train_bytes'] / 1e6:.2f} MB to train on, {stage['val_bytes'] / 1e3:.0f} kB held out"
        )
    if locked := trainer.training_step.optimizer.locked():
        count = sum(int(mask.sum()) for mask in locked.values())
        print(f"  {count} weights locked by {options.locks}")
    if any(recall.share for recall in trainer.recall) and not model.config.recall_heads:
        print(
            "  recall tasks, but no memory of bytes to learn them with: --set recall_heads=1 --set recall_text_heads=1"
        )
    if resume:
        print(f"  resumed from {resume} at step {trainer.step}")
    sys.stdout.flush()


def _report(trainer: Trainer, sample_bytes: int) -> None:
    """The end of a run on stdout: BPC of every stage's validation split, and a sample of text."""
    data = trainer.metrics.data
    print(f"\nvalidation BPC (bits per byte) after each stage, windows of {trainer.options.eval_context} bytes:")
    names = [stage["name"] for stage in data["stages"]]
    width = max(12, *(len(name) for name in names))
    print(" " * 18 + "".join(f"{name:>{width + 2}}" for name in names))
    for row in data["retention"]:
        print(f"after {row['after']:<12}" + "".join(f"{number(row['bpc'][name]):>{width + 2}}" for name in names))
    for name in names:
        print(f"BPC {name}: {number(data['retention'][-1]['bpc'][name])}")
    if trainer.speeds:
        speed = statistics.median(trainer.speeds)
        print(f"training speed {speed / 1e6:.3g} MB/s, evaluations and saves left out (median of the readings)")
        trainer.metrics.event("finished", bytes_per_second=round(speed))
    print(f"steps skipped for non-finite gradients: {data['skipped_steps']}")
    if data["best"] is None:
        print("no best model: its file was not beside the resumed one, or the run has diverged (try a smaller --lr)")
        return
    print(f"best model: step {data['best']['step']}, mean BPC {data['best']['mean']:.3f} on the samples along the way")
    if sample_bytes > 0 and None not in data["retention"][-1]["bpc"].values():
        print("\nsample, temperature 0.8:")
        print(sample_text(trainer, sample_bytes))
    print(f"\nwritten to {trainer.out}/: {', '.join(FILES)}")


def sample_text(trainer: Trainer, sample_bytes: int) -> str:
    """Text from the model as the run leaves it, from an empty prompt, with the run's seed."""
    emitter = Utf8Emitter()
    text = ""
    for piece in generate(trainer.model, b"", max_bytes=sample_bytes, temperature=0.8, seed=trainer.options.seed):
        text += emitter.feed(piece.data)
    return text + emitter.close()
