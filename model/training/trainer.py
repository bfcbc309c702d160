"""The trainer: a curriculum run from its first step to its report, stoppable and resumable at any step."""

import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model.agiformer import AGIFormer
from model.config import AGIFormerConfig
from model.data import CropSampler, Curriculum, open_store
from model.evaluation.bpc import bits_per_byte
from model.evaluation.plots import plot_curriculum
from model.training.checkpoint import load_checkpoint, load_training_state, save_checkpoint
from model.training.distributed import Workers
from model.training.metrics import Metrics
from model.training.optimizer import MuonAdamW
from model.training.options import TrainingOptions
from model.training.schedule import learning_rate
from model.training.step import TrainingStep

LOG_EVERY = 10  # steps between readings of the loss: the only synchronisation along the way

BEST, LAST = "best_model_curriculum.safetensors", "last_model_curriculum.safetensors"


class Trainer:
    """Trains a model through a curriculum.

    Args:
        config, options, curriculum: the run.
        out: folder of checkpoints, metrics and plot.
        device, workers: where it runs.
        cache_dir: folder of encoded corpora, or None for the default.
        graph: capture the step as a CUDA graph (on CUDA).
        quiet: no progress bars.
    """

    def __init__(
        self,
        config: AGIFormerConfig,
        options: TrainingOptions,
        curriculum: Curriculum,
        *,
        out: str | Path,
        device: torch.device,
        workers: Workers | None = None,
        cache_dir: str | Path | None = None,
        graph: bool = True,
        quiet: bool = False,
    ):
        self.options, self.curriculum, self.device = options, curriculum, device
        self.workers = workers or Workers()
        self.out = Path(out)
        self.quiet = quiet or not self.workers.is_main
        self.step = 0
        self.stop_requested = False
        self.boundaries = curriculum.boundaries(options.steps)
        self._open_data(cache_dir)
        torch.manual_seed(options.seed)
        random.seed(options.seed)
        self.model = AGIFormer(config).to(device)
        optimizer = MuonAdamW(self.model, optimizer=options.optimizer, lr=options.lr, weight_decay=options.weight_decay)
        self.amp_dtype = amp_dtype(options.amp, device)
        self.training_step = TrainingStep(
            self.model,
            optimizer,
            amp_dtype=self.amp_dtype,
            clip_norm=options.clip,
            graph=graph,
            workers=self.workers,
        )
        # Losses since the last reading; on the device, and in the checkpoint, so that a resumed curve is the same.
        self.losses = torch.zeros(LOG_EVERY, device=device)
        self.metrics = Metrics(self.out, self._empty_metrics())

    def _open_data(self, cache_dir: str | Path | None) -> None:
        if not self.workers.is_main:
            self.workers.barrier()  # the main process encodes, the others find it done
        self.stores = [
            open_store(stage.source, cache_dir=cache_dir, progress=not self.quiet) for stage in self.curriculum.stages
        ]
        if self.workers.is_main:
            self.workers.barrier()
        self.samplers = [
            CropSampler(
                store,
                stage.seq_len or self.options.seq_len,
                self.options.batch_size,
                self.options.seed,
                rank=self.workers.rank,
                world_size=self.workers.size,
                crops=stage.crops,
                stream=i,
            )
            for i, (stage, store) in enumerate(zip(self.curriculum.stages, self.stores))
        ]

    def _empty_metrics(self) -> dict[str, Any]:
        stages = []
        for i, (stage, store) in enumerate(zip(self.curriculum.stages, self.stores)):
            stages.append(
                {
                    "name": stage.name,
                    "plasticity": stage.plasticity,
                    "start": self.boundaries[i - 1] if i else 0,
                    "end": self.boundaries[i],
                    "seq_len": stage.seq_len or self.options.seq_len,
                    "train_bytes": len(store.train),
                    "val_bytes": len(store.val),
                    "source": store.meta["sha256"],
                }
            )
        return {
            "run": {
                "options": self.options.to_dict(),
                "config": self.model.config.to_dict(),
                "parameters": self.model.parameter_count(),
                "workers": self.workers.size,
                "amp": str(self.amp_dtype).removeprefix("torch.") if self.amp_dtype else "off",
            },
            "stages": stages,
            "train": [],
            "evaluations": [],
            "retention": [],
            "best": None,
            "skipped_steps": 0,
        }

    # ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────

    def train(self) -> bool:
        """Run from the current step to the end, or until `stop_requested`; True when the run is complete."""
        if self.step == 0:
            self._save()  # so that a run killed at any moment leaves something to resume
        self._clock = (time.monotonic(), self.step)
        with tqdm(
            total=self.options.steps, initial=self.step, unit="step", disable=self.quiet, file=sys.stderr
        ) as self.bar:
            while self.step < self.options.steps:
                self._train_one()
                if self.step % LOG_EVERY == 0 or self.step in self.boundaries:
                    self._log()
                stage_ended = self.step in self.boundaries
                if stage_ended or self.step % self.options.eval_interval == 0:
                    self._evaluate(stage_ended)
                # On one worker the flag is read at every step; several must agree, so they ask when they log.
                asked = self.stop_requested if self.workers.size == 1 else False
                if self.workers.size > 1 and self.step % LOG_EVERY == 0:
                    asked = self.workers.any(self.stop_requested, self.device)
                if asked or self.step % self.options.save_interval == 0 or self.step == self.options.steps:
                    self._save()
                if asked and self.step < self.options.steps:
                    self.metrics.event("stopped", step=self.step)
                    return False
        return True

    def _train_one(self) -> None:
        stage_index = self.curriculum.stage_at(self.step, self.options.steps)
        stage = self.curriculum.stages[stage_index]
        first = self.boundaries[stage_index - 1] if stage_index else 0
        options = self.options
        self.training_step.optimizer.set_lr(
            learning_rate(self.step, options.steps, options.lr, options.warmup, options.decay)
        )
        self.model.set_plasticity(stage.plasticity)
        batch = self.samplers[stage_index].batch(self.step - first)
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        self.losses[self.step % LOG_EVERY] = self.training_step.run(batch)
        self.step += 1

    def _log(self) -> None:
        """Read the losses since the last reading; one synchronisation."""
        count = (self.step - 1) % LOG_EVERY + 1
        mean = float(self.losses[:count].double().mean().item()) / math.log(2)
        bpc = mean if math.isfinite(mean) else None  # NaN is not JSON
        stage_index = self.curriculum.stage_at(self.step - 1, self.options.steps)
        stage = self.curriculum.stages[stage_index]
        row = {"step": self.step, "stage": stage.name, "bpc": bpc}
        self.metrics.data["train"].append(row)
        now = time.monotonic()
        bytes_per_step = self.options.batch_size * self.samplers[stage_index].seq_len * self.workers.size
        speed = (self.step - self._clock[1]) * bytes_per_step / max(1e-9, now - self._clock[0])
        self._clock = (now, self.step)
        self.metrics.event("train", **row, bytes_per_second=round(speed))
        self.bar.update(self.step - self.bar.n)
        self.bar.set_postfix_str(
            f"{stage.name} α={stage.plasticity:g} bpc={mean:.3f} {speed / 1e6:.3g} MB/s", refresh=False
        )

    def _evaluate(self, stage_ended: bool) -> None:
        """BPC of every stage's validation split: an even sample of each, and all of each when a stage ends.

        The best model is chosen on the samples' mean over the stages: keeping what was learned counts.
        """
        if self.workers.is_main:
            stage = self.curriculum.stages[self.curriculum.stage_at(self.step - 1, self.options.steps)].name
            bpc = self._validation_bpc(self.options.eval_bytes)
            self.metrics.data["evaluations"].append({"step": self.step, "stage": stage, "bpc": bpc})
            mean = sum(bpc.values()) / len(bpc)
            best = self.metrics.data["best"]
            if best is None or mean < best["mean"]:
                self.metrics.data["best"] = {"step": self.step, "mean": mean, "bpc": bpc}
                save_checkpoint(self.model, self.out / BEST, values={"step": self.step, "bpc": bpc})
            self.metrics.event("evaluation", step=self.step, bpc=bpc)
            if stage_ended:
                bpc = self._validation_bpc(None)
                self.metrics.data["retention"].append({"after": stage, "bpc": bpc})
                self.metrics.event("stage_end", step=self.step, stage=stage, bpc=bpc)
            if not self.quiet:
                figures = "  ".join(f"{name} {value:.3f}" for name, value in bpc.items())
                tqdm.write(f"step {self.step}: validation BPC  {figures}", file=sys.stderr)
        self.workers.barrier()
        self._clock = (time.monotonic(), self.step)

    def _validation_bpc(self, max_bytes: int | None) -> dict[str, float]:
        pairs = zip(self.curriculum.stages, self.stores)
        return {stage.name: self.evaluate(store.val, max_bytes) for stage, store in pairs}

    def evaluate(self, data: np.ndarray, max_bytes: int | None = None) -> float:
        """BPC on `data` (uint8) in windows of `eval_context` bytes, at the model's present plasticity."""
        result = bits_per_byte(
            self.model,
            data,
            context=self.options.eval_context,
            batch_size=32 if self.device.type == "cpu" else 64,
            max_bytes=max_bytes,
            amp_dtype=self.amp_dtype,
        )
        return result.bpc

    # ── saving and resuming ──────────────────────────────────────────────────────────────────────────────────────

    def _save(self) -> None:
        if self.workers.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            self.metrics.data["skipped_steps"] = int(self.training_step.optimizer.skipped.item())
            save_checkpoint(
                self.model,
                self.out / LAST,
                tensors=self.training_step.state_tensors() | {"losses": self.losses},
                values={"step": self.step, "metrics": self.metrics.data},
            )
            self.metrics.write()
        self.workers.barrier()
        self._clock = (time.monotonic(), self.step)

    def resume(self, path: Path) -> None:
        """Go on from the checkpoint at `path`; a different run or different data is an error that says which."""
        tensors, values = load_training_state(path)
        if "step" not in values or "metrics" not in values or not tensors:
            raise ValueError(f"--resume {path}: holds weights without training state; accepted is a {LAST}")
        saved, now = values["metrics"], self.metrics.data
        for ours, theirs in zip(now["stages"], saved["stages"], strict=True):
            if ours["source"] != theirs["source"]:
                raise ValueError(f"--resume {path}: the data of stage {ours['name']!r} has changed since it was saved")
        self.model.load_state_dict(load_checkpoint(path).state_dict())
        self.training_step.load_state_tensors(tensors)
        self.losses.copy_(tensors["losses"])
        self.step = values["step"]
        self.metrics.data = saved | {"run": now["run"], "stages": now["stages"]}
        self.metrics.event("resumed", step=self.step)

    def plot(self) -> Path:
        """Write `curriculum.png`: BPC by step, with stages and α marked."""
        path = self.out / "curriculum.png"
        plot_curriculum(self.metrics.data, path)
        return path


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for `--amp`: on CUDA, auto is bf16 where the card has it, else fp16; on the CPU it is off."""
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
