"""The trainer: a curriculum run from its first step to its report, stoppable and resumable at any step."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model.agiformer import AGIFormer
from model.config import AGIFormerConfig
from model.data import CropSampler, Curriculum, open_store
from model.data.recall import RecallOptions, mix
from model.evaluation.bpc import bits_per_byte
from model.evaluation.convexity import hull_radii
from model.evaluation.plots import plot_curriculum
from model.evaluation.report import number
from model.files import write_atomically
from model.genesis.gate.automaton import compile_policy
from model.genesis.gate.policy import load_policy
from model.kernels.automaton import blocked_targets
from model.layers.pyramid import Node, learning_leaves
from model.petals.crystallization import Crystallization
from model.petals.growth import FreezingProcess, GrowthPolicy
from model.training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_training_state,
    load_training_values,
    save_checkpoint,
)
from model.training.distributed import Workers
from model.training.genesis import Genesis
from model.training.growth import GrowthStep, carry_out, parse_growth
from model.training.metrics import LOG, METRICS, Metrics, finite
from model.training.optimizer import MuonAdamW
from model.training.options import TrainingOptions
from model.training.schedule import learning_rate
from model.training.step import TrainingStep

DIFFICULT_FROM = 0.4  # share of the steps with recall tasks after which these are as hard as they get
LOG_EVERY = 10  # steps between readings of the loss: the only synchronisation along the way


def changeable(options: dict[str, Any]) -> tuple[str, ...]:
    """Options that may differ when a run is resumed: they change what is reported, not what is learned."""
    sets_at_evaluations = options.get("freeze", "off") != "off" and options.get("freeze_at") == "evaluations"
    return ("save_every",) if sets_at_evaluations else ("eval_every", "save_every")


BEST, LAST = "best_model_curriculum.safetensors", "last_model_curriculum.safetensors"
PLOT = "curriculum.png"
FILES = (BEST, LAST, METRICS, LOG, PLOT)


class Trainer:
    """Trains a model through a curriculum.

    Args:
        config, options, curriculum: the run.
        out: folder of checkpoints, metrics and plot.
        device, workers: where it runs.
        cache_dir: folder of encoded corpora, or None for the default.
        graph: capture the step as a CUDA graph (on CUDA).
        quiet: no progress bars.
        start: the model whose weights are trained; new ones when None. `config` is its own.
        locked: by name of a parameter, [its shape] bool, what never moves.
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
        start: AGIFormer | None = None,
        locked: dict[str, torch.Tensor] | None = None,
    ):
        self.options, self.curriculum, self.device = options, curriculum, device
        self.workers = workers or Workers()
        self.out = Path(out)
        self.quiet = quiet or not self.workers.is_main
        self.step = 0
        self.stop_requested = False
        self._paused = False  # within `_off_the_clock`
        self._petals_text = ""
        self._saved_step: int | None = None
        self.training_seconds = 0.0  # of this process, without evaluations and saves
        self.speeds: list[float] = []  # bytes/s of every reading of this process, without evaluations and saves
        if options.steps < len(curriculum.stages):
            raise ValueError(
                f"steps={options.steps}: accepted is at least one for each of {len(curriculum.stages)} stages"
            )
        self.boundaries = curriculum.boundaries(options.steps)
        self.recall = [
            stage.recall if options.recall is None else replace(stage.recall, share=options.recall)
            for stage in curriculum.stages
        ]
        self._open_data(cache_dir)
        torch.manual_seed(options.seed)
        anchored = options.genesis_options.anchors
        if options.locks:  # a model that has learned before may have some of its own
            anchored = anchored or config.anchors
        self.model = AGIFormer(replace(config, anchors=anchored)).to(device)
        if start is not None:
            self.model.load_state_dict(self.model.state_dict() | start.state_dict())
        self.amp_dtype = amp_dtype(options.amp, device)
        self.graph = graph
        self._make_step()
        if locked:
            self.training_step.optimizer.lock(locked)  # in checkpoints from now on
        curved = self.genesis is not None and self.genesis.curve is not None
        self.slow_samplers = self._slow_start_samplers() if curved else []
        self.plan = self._checked_plan(config)
        self.policy = GrowthPolicy(options.grow_rule)
        self.freezing = FreezingProcess()
        # Losses since the last reading; on the device, and in the checkpoint, so that a resumed curve is the same.
        self.losses = torch.zeros(LOG_EVERY, device=device)
        self.norms = torch.zeros(LOG_EVERY, device=device)  # of gradients
        self.metrics = Metrics(self.out, self._empty_metrics(), writes=self.workers.is_main)

    def _checked_plan(self, config: AGIFormerConfig) -> tuple[GrowthStep, ...]:
        """The planned growth, tried on a model without memory: a mistake in it is better found now than at its step."""
        plan = parse_growth(self.options.grow)
        if not plan:
            return plan
        with torch.device("meta"):
            shape = AGIFormer(config)
            for step in plan:
                carry_out(shape, step)
        return plan

    def _make_step(self) -> None:
        options = self.options
        optimizer = MuonAdamW(
            self.model,
            optimizer=options.optimizer,
            lr=options.lr,
            weight_decay=options.weight_decay,
            viscosity=options.viscoelastic,
            # Also without freezing: petals of a loaded model may have been frozen by hand.
            divider=options.crystallization.divider,
        )
        self.genesis: Genesis | None = None
        if options.genesis_options.any:
            self.genesis = Genesis(
                self.model,
                optimizer,
                options.genesis_options,
                batch_size=options.batch_size,
                entry=min(stage.seq_len or options.seq_len for stage in self.curriculum.stages),
                stages=len(self.curriculum.stages),
                steps=options.steps,
                workers=self.workers,
                blocked=self._blocked_targets() if options.genesis_options.gated else None,
            )
        self.training_step = TrainingStep(
            self.model,
            optimizer,
            amp_dtype=self.amp_dtype,
            clip_norm=options.clip,
            graph=self.graph,
            workers=self.workers,
            genesis=self.genesis,
            ponder_cost=options.ponder_cost,
            priced=options.write_price > 0 and any(recall.share for recall in self.recall),
        )
        self.crystallization = Crystallization(self.model, options.crystallization)

    def _blocked_targets(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Which targets of a batch the gate's default policy blocks: what generation must not say is not amplified."""
        tables = compile_policy(load_policy()).tables(self.device)
        return lambda x: blocked_targets(tables, x)

    def _open_data(self, cache_dir: str | Path | None) -> None:
        # With several workers the store's own lock lets one encode and the others find it done.
        self.stores = [
            open_store(stage.source, cache_dir=cache_dir, progress=not self.quiet) for stage in self.curriculum.stages
        ]
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

    def _slow_start_samplers(self) -> list[CropSampler]:
        """What the stages show before the boom: as many bytes a step, in short crops, of the beginning of each text."""
        samplers = []
        patch = self.model.config.patch_size
        for i, (full, store) in enumerate(zip(self.samplers, self.stores)):
            # Whole patches, so that the latents of crops that follow each other in memory are those of its bytes.
            length = min(full.seq_len, math.ceil(full.seq_len * self.genesis.curve.options.shortest / patch) * patch)
            region = np.asarray(store.train)
            part = max(min(length, len(region)), int(len(region) * self.genesis.curve.options.narrowest))
            offsets = np.asarray(store.offsets)
            samplers.append(
                CropSampler(
                    region[:part],
                    length,
                    full.batch_size * -(-full.seq_len // length),
                    self.options.seed,
                    rank=self.workers.rank,
                    world_size=self.workers.size,
                    crops=full.crops,
                    stream=len(self.samplers) + i,
                    offsets=offsets[offsets < part] if full.crops == "document" else None,
                )
            )
        return samplers

    def _sampler(self, index: int) -> CropSampler:
        """Where a stage's next batch comes from."""
        slow = self.slow_samplers and self.metrics.data["boom"] is None
        return self.slow_samplers[index] if slow else self.samplers[index]

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
                    "recall": self.recall[i].to_dict(),
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
            "growth": [],
            "hulls": [],
            "genesis": [],
            "boom": None,
            "best": None,
            "skipped_steps": 0,
        }

    # ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────

    def train(self) -> bool:
        """Run from the current step to the end, or until `stop_requested`; True when the run is complete."""
        self.metrics.event("resumed" if self.step else "started", step=self.step, options=self.options.to_dict())
        self._save()  # so that a run killed at any moment leaves something to resume
        self._clock = (time.monotonic(), self.step)
        with tqdm(
            total=self.options.steps, initial=self.step, unit="step", disable=self.quiet, file=sys.stderr
        ) as self.bar:
            while not self._stop_agreed():
                if self._evaluation_due():
                    with self._off_the_clock():
                        self._evaluate(self.step in self.boundaries)
                if self._save_due():
                    with self._off_the_clock():
                        self._save()
                if self.step == self.options.steps:
                    return True
                self._grow_if_planned()
                self._train_one()
                if self.step % LOG_EVERY == 0 or self.step in self.boundaries:
                    self._log()
            self._save()
            self.metrics.event("stopped", step=self.step)
            return False

    def _stop_agreed(self) -> bool:
        """Whether to stop here. Several workers must agree, which synchronises: they ask when they log."""
        if self.workers.size == 1:
            return self.stop_requested
        return self.step % LOG_EVERY == 0 and self.workers.any(self.stop_requested, self.device)

    def _evaluation_due(self) -> bool:
        """Whether this step's evaluation is still to be made: a stop may have come between step and evaluation."""
        evaluations = self.metrics.data["evaluations"]
        done = evaluations[-1]["step"] if evaluations else 0
        wanted = {*self.boundaries, *(self.options.freeze_steps or ())}
        return self.step > done and (self.step in wanted or self.step % self.options.eval_interval == 0)

    def _save_due(self) -> bool:
        due = self.step % self.options.save_interval == 0 or self.step == self.options.steps
        return due and self._saved_step != self.step

    def _train_one(self) -> None:
        index = self.curriculum.stage_at(self.step, self.options.steps)
        self.training_step.optimizer.set_lr(self._learning_rate(self.step))
        if self.genesis is not None and index != int(self.genesis.stage):
            self.genesis.enter_stage(index)
            self.training_step.recapture()
        if self.device.type == "cpu":
            # Routers draw in training. On a CPU they draw a number of values that depends on the values: a state that
            # follows from the step keeps workers and resumed runs apart from such histories.
            self._seed_cpu(self.workers.rank)
        self.model.set_plasticity(self.curriculum.stages[index].plasticity)
        if self.training_step.priced:
            # A memory that costs before it is of use, or where nothing asks for it, would never be written into.
            asked = self.recall[index].share > 0
            self.training_step.write_price.fill_(self.options.write_price * self._difficulty() * asked)
        batch, weights = self._batch(index)
        if self.device.type == "cuda":
            batch, weights = (each if each is None else each.pin_memory() for each in (batch, weights))
        self.losses[self.step % LOG_EVERY] = self.training_step.run(batch, weights)
        self.norms[self.step % LOG_EVERY] = self.training_step.norm
        self.step += 1

    def _batch(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The next batch [B, L] of a stage, and how much its bytes count [B, L]: None in a stage without tasks."""
        batch, recall = self._sampler(index).next(), self.recall[index]
        if not recall.share:
            return batch, None
        seed, rank = self.options.seed, self.workers.rank
        return mix(batch, recall, difficulty=self._difficulty(), seed=seed, index=self.step, rank=rank)

    def _difficulty(self) -> float:
        """Of the tasks of this step: it rises from 0 to 1 over the first part, DIFFICULT_FROM, of all with tasks."""
        spans = zip([0, *self.boundaries], self.boundaries, self.recall)
        spans = [(start, end) for start, end, recall in spans if recall.share]
        done = sum(min(end, self.step) - start for start, end in spans if start < self.step)
        return min(1.0, done / max(1.0, DIFFICULT_FROM * sum(end - start for start, end in spans)))

    # ── petals and growth ────────────────────────────────────────────────────────────────────────────────────────

    def _grow_if_planned(self) -> None:
        done = {event["step"] for event in self.metrics.data["growth"] if event["why"] == "planned"}
        steps = [each for each in self.plan if each.step == self.step and self.step not in done]
        for each in steps:
            self._grow(each, "planned")

    def _grow(self, what: GrowthStep, why: str) -> None:
        with self._off_the_clock():
            # What grows is drawn from its own seed: the same on every worker, whatever was drawn before.
            self._seed_cpu(len(self.metrics.data["growth"]), 1)
            changes = carry_out(self.model, what, thawed=self.options.grow_left == "thawed")
            self.training_step.recapture()  # lets go of the old graph's memory first
            self.training_step.optimizer.rebuild(self.model)
            if self.genesis is not None:
                self.genesis.rebuild()
            self.crystallization.refresh()
            self.freezing.expanded(self.step)
        row = {
            "step": self.step,
            "why": why,
            "what": what.kind,
            "changes": changes,
            "parameters": self.model.parameter_count(),
            "trainable": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        }
        self.metrics.data["growth"].append(row)
        self.metrics.event("growth", **row)
        if not self.quiet:
            tqdm.write(
                f"step {self.step}: grown by {what.kind} ({why}) to {row['parameters'] / 1e6:.2f} M parameters, "
                f"{row['trainable'] / 1e6:.2f} M of them learning",
                file=sys.stderr,
            )

    def _observe_petals(self) -> None:
        """See which petals have set, and whether that is enough to grow. Looks at the device: at evaluations only."""
        options, optimizer = self.options, self.training_step.optimizer
        row: dict[str, Any] = {"step": self.step, "radius": self._hull_radii()}
        loads = {
            name: [finite(share) for share in module.router.load.tolist()]
            for name, module in self.model.named_modules()
            if _routes(module)
        }
        if loads:
            row["router_load"] = loads
        # While the learning rate rises the pressure is low for everything, and would set it all at once.
        risen = self.step > options.warmup * options.steps
        if options.freeze != "off" and (risen if options.freeze_steps is None else self.step in options.freeze_steps):
            events = self.crystallization.observe(
                self.step,
                self._learning_rate(self.step - 1),
                options.lr,
                optimizer.mobility if optimizer.viscosity else None,
            )
            if events:
                optimizer.set_petals()
                if options.freeze == "chrysalis":
                    self.training_step.recapture()
            for event in events:
                self.metrics.event("petal_set", **event)
            self.freezing.record(self.step, len(events))
        if options.freeze != "off":
            solid, total = self.crystallization.counts()
            row |= {"solid": solid, "total": total}
            self._petals_text = f" petals {solid}/{total} solid"
            if options.grow == "auto":
                row["steps_to_expansion"] = expected = self.freezing.steps_until(self.policy, solid, total)
                self._petals_text += "" if expected is None else f", grow in ~{expected:.0f} steps"
        self.metrics.data["hulls"].append(row)
        self.metrics.event("hulls", **row)
        # While the learning rate falls everything cools, and what is new would not have the time to learn.
        if options.grow == "auto" and self.step < options.steps * (1 - options.decay):
            solid, total = self.crystallization.counts()
            if self.policy.decide([0] * solid + [1] * (total - solid)):
                self._grow(GrowthStep(self.step, options.grow_by), "auto")

    def _hull_radii(self) -> dict[str, float]:
        length = min(self.options.eval_context, *(len(store.val) for store in self.stores))
        rows = [np.asarray(store.val[:length]) for store in self.stores]
        x = torch.from_numpy(np.stack(rows)).to(self.device)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return {name: finite(value) for name, value in hull_radii(self.model, x).items()}

    def _seed_cpu(self, *parts: int) -> None:
        """Make the CPU's generator follow from the run's seed, the step and `parts`; a GPU's is left alone."""
        seed = np.random.SeedSequence([self.options.seed, self.step, *parts]).generate_state(1, np.uint64)
        torch.default_generator.manual_seed(int(seed[0]) >> 1)

    def _learning_rate(self, step: int) -> float:
        options = self.options
        return learning_rate(step, options.steps, options.lr, options.warmup, options.decay)

    def _log(self) -> None:
        """Read the losses and the gradients' norms since the last reading; the host waits for the device."""
        index = self.curriculum.stage_at(self.step - 1, self.options.steps)
        stage = self.curriculum.stages[index]
        # Readings come at multiples of LOG_EVERY and at the ends of stages, so that no reading spans two stages.
        last = max((self.step - 1) // LOG_EVERY * LOG_EVERY, self.boundaries[index - 1] if index else 0)
        read = [step % LOG_EVERY for step in range(last, self.step)]
        losses, norms = self.losses[read].double().mean(), self.norms[read].double()
        self.workers.average_(losses)
        bpc = finite(losses.item() / math.log(2))
        skipped = int(self.training_step.optimizer.skipped.item())
        row = {"step": self.step, "stage": stage.name, "bpc": bpc}
        self.metrics.data["train"].append(row)
        now = time.monotonic()
        sampler = self._sampler(index)
        bytes_per_step = sampler.batch_size * sampler.seq_len * self.workers.size
        speed = (self.step - self._clock[1]) * bytes_per_step / max(1e-9, now - self._clock[0])
        self.speeds.append(speed)
        self.training_seconds += now - self._clock[0]
        self._clock = (now, self.step)
        self._find_boom()
        norms = norms[norms.isfinite()].tolist()  # of steps that were not skipped
        norms = {"gradient_norm": statistics.fmean(norms), "largest_gradient_norm": max(norms)} if norms else {}
        self.metrics.event("train", **row, **norms, bytes_per_second=round(speed), skipped_steps=skipped)
        self.bar.update(self.step - self.bar.n)
        self.bar.set_postfix_str(
            f"{stage.name} α={stage.plasticity:g} bpc={'not finite' if bpc is None else f'{bpc:.3f}'} "
            f"{speed / 1e6:.3g} MB/s" + (f" skipped {skipped}" if skipped else "") + self._petals_text,
            refresh=False,
        )

    def _find_boom(self) -> None:
        """Note the boom of the learning curve when it has come: from here on sequences are long and the text is all."""
        if not self.slow_samplers or self.metrics.data["boom"] is not None or not self.genesis.curve.boomed:
            return
        curve = self.genesis.curve
        self.metrics.data["boom"] = {"step": int(curve.boom_step), "novelty": finite(curve.novelty().item())}
        self.metrics.event("boom", **self.metrics.data["boom"])
        if not self.quiet:
            tqdm.write(f"step {self.step}: the boom came at step {int(curve.boom_step)}", file=sys.stderr)

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """What happens inside does not count as training time. May be nested: the outermost counts."""
        if self._paused:
            yield
            return
        self._paused = True
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the steps still under way do
        began = time.monotonic()
        yield
        self._paused = False
        self._clock = (self._clock[0] + time.monotonic() - began, self._clock[1])

    def _evaluate(self, stage_ended: bool) -> None:
        """BPC of every stage's validation split: an even sample of each, and all of each when a stage ends.

        The best model is chosen on the samples' mean over the stages: keeping what was learned counts.
        """
        if self.workers.is_main:
            stage = self.curriculum.stages[self.curriculum.stage_at(self.step - 1, self.options.steps)].name
            bpc = self._validation_bpc(self.options.eval_bytes)
            self.metrics.data["evaluations"].append({"step": self.step, "stage": stage, "bpc": bpc})
            # A model that has diverged has no BPC, and is not the best.
            mean = None if None in bpc.values() else sum(bpc.values()) / len(bpc)
            best = self.metrics.data["best"]
            if mean is not None and (best is None or mean < best["mean"]):
                self.metrics.data["best"] = {"step": self.step, "mean": mean, "bpc": bpc}
                save_checkpoint(self.model, self.out / BEST, values={"step": self.step, "bpc": bpc})
            self.metrics.event("evaluation", step=self.step, bpc=bpc)
            if stage_ended:
                bpc = self._validation_bpc(None)
                self.metrics.data["retention"].append({"after": stage, "bpc": bpc})
                self.metrics.event("stage_end", step=self.step, stage=stage, bpc=bpc)
            if not self.quiet:
                figures = "  ".join(f"{name} {number(value)}" for name, value in bpc.items())
                tqdm.write(f"step {self.step}: validation BPC  {figures}", file=sys.stderr)
        self._observe_petals()
        if self.genesis is not None:
            row = {"step": self.step, **self.genesis.report()}
            self.metrics.data["genesis"].append(row)
            self.metrics.event("genesis", **row)
        self.workers.barrier()
        self._saved_step = None  # the metrics have changed

    def _validation_bpc(self, max_bytes: int | None) -> dict[str, float | None]:
        pairs = zip(self.curriculum.stages, self.stores)
        return {stage.name: finite(self.evaluate(store.val, max_bytes)) for stage, store in pairs}

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
        tensors = self._state_tensors()  # on every worker: they send the main one theirs
        if self.workers.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            self.metrics.data["skipped_steps"] = int(self.training_step.optimizer.skipped.item())
            save_checkpoint(
                self.model,
                self.out / LAST,
                tensors=tensors,
                values={
                    "step": self.step,
                    "metrics": self.metrics.data,
                    "data": self._positions(),
                    "freezing": self.freezing.to_dict(),
                },
            )
            self.metrics.write()
        self._saved_step = self.step
        self.workers.barrier()

    def _state_tensors(self) -> dict[str, torch.Tensor]:
        state = self.training_step.state_tensors() | self.crystallization.state_tensors()
        # What differs between workers: all of it is saved, each takes its own back.
        own = {"losses": self.losses, "norms": self.norms}
        if self.device.type == "cuda":
            # Routers and replay draw from it inside the captured step. The CPU's follows from the seed and the step.
            own["random.cuda"] = torch.cuda.get_rng_state(self.device)
        if self.genesis is not None:
            state |= {f"genesis.{name}": tensor for name, tensor in self.genesis.shared_state().items()}
            own |= {f"genesis.{name}": tensor for name, tensor in self.genesis.own_state().items()}
        for name, tensor in own.items():
            for rank, part in enumerate(self.workers.gather(tensor, self.device)):
                state[f"worker.{rank}.{name}"] = part
        return state

    def _positions(self) -> list[dict[str, Any]]:
        return [sampler.state_dict() for sampler in (*self.samplers, *self.slow_samplers)]

    def resume(self, path: Path) -> None:
        """Go on from the checkpoint at `path`. Other options, another model or other data are errors that say which."""
        tensors, values = load_training_state(path)
        if "step" not in values or "metrics" not in values or not tensors:
            raise ValueError(f"--resume {path}: holds weights without training state; accepted is a {LAST}")
        self._check_same_run(path, values["metrics"])
        saved = load_checkpoint(path)
        if saved.config != self.model.config:  # it has grown since it began
            self.model = saved.to(self.device).train()
            self._make_step()
        else:
            self.model.load_state_dict(saved.state_dict())
        self.training_step.load_state_tensors(tensors)
        self.training_step.optimizer.set_petals()
        self.crystallization.load_state_tensors(tensors)
        self.freezing = FreezingProcess.from_dict(values["freezing"])
        mine = f"worker.{self.workers.rank}."
        own = {name.removeprefix(mine): tensor for name, tensor in tensors.items() if name.startswith(mine)}
        if self.device.type == "cuda" and "random.cuda" in own:
            torch.cuda.set_rng_state(own["random.cuda"].cpu(), self.device)
        if self.genesis is not None:
            self.genesis.load({name.removeprefix("genesis."): tensor for name, tensor in (tensors | own).items()})
        self.losses.copy_(own["losses"])
        self.norms.copy_(own.get("norms", torch.tensor(torch.nan)))  # not in checkpoints of before norms were read
        for sampler, position in zip((*self.samplers, *self.slow_samplers), values["data"]):
            sampler.load_state_dict(position)
        self.step = values["step"]
        ours = {name: self.metrics.data[name] for name in ("run", "stages")}
        self.metrics.data = values["metrics"] | ours
        self._bring_best(path.parent / BEST)

    def _bring_best(self, source: Path) -> None:
        """Have the best model that the metrics speak of in `out`; without it, the next evaluation chooses anew."""
        best = self.metrics.data["best"]
        try:
            values = load_training_values(source)
        except CheckpointError:
            values = {}
        if best is None or values.get("step") != best["step"]:
            self.metrics.data["best"] = None
        elif self.workers.is_main and self.out.resolve() != source.parent.resolve():
            write_atomically(self.out / BEST, source.read_bytes())

    def _check_same_run(self, path: Path, saved: dict[str, Any]) -> None:
        now = self.metrics.data
        ours = now["run"]["options"] | now["run"]["config"] | {name: now["run"][name] for name in ("workers", "amp")}
        run = saved["run"]
        theirs = run["options"] | run["config"] | {name: run[name] for name in ("workers", "amp")}
        # "auto" is compared by what it became on this device.
        # What an older run did not know is what it is by default.
        defaults = (*fields(TrainingOptions), *fields(AGIFormerConfig))
        theirs = {field.name: field.default for field in defaults} | theirs
        for name in ours.keys() - set(changeable(ours)):
            if ours[name] != theirs.get(name):
                raise ValueError(f"--resume {path}: {name} is {ours[name]!r} here, accepted is {theirs.get(name)!r}")
        if [stage["name"] for stage in now["stages"]] != [stage["name"] for stage in saved["stages"]]:
            raise ValueError(f"--resume {path}: the curriculum {self.curriculum.name!r} has other stages than it had")
        for stage, before in zip(now["stages"], saved["stages"]):
            recall = before.get("recall", {})
            if self.training_step.priced and stage["recall"]["share"] and "answer_limit" not in recall:
                raise ValueError(
                    f"--resume {path}: write_price was times the share of tasks when this run began, and is that of a "
                    "byte now; accepted is a run begun since then"
                )
            before = before | {"recall": RecallOptions(0.0).to_dict() | recall}
            if stage["source"] != before["source"]:
                raise ValueError(f"--resume {path}: the data of stage {stage['name']!r} has changed since it was saved")
            if stage != before:
                raise ValueError(f"--resume {path}: stage {stage['name']!r} is {stage}, accepted is {before}")

    def plot(self) -> Path:
        """Write `curriculum.png`: BPC by step, with stages and α marked."""
        path = self.out / PLOT
        plot_curriculum(self.metrics.data, path)
        return path


def _routes(module: torch.nn.Module) -> bool:
    """Whether a module is a node that learns: a frozen one's load no longer changes."""
    return isinstance(module, Node) and any(True for _ in learning_leaves(module)) and module.router.training


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for `--amp`: on CUDA, auto is bf16 where the card has it, else fp16; on the CPU it is off."""
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
