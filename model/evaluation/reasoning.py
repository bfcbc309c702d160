"""What each thinking step really does: its size, its direction, its halting, and what it is worth in bits.

The loop z ← z + Δz is run step by step on the latents of a text, and decoded after every one of them, also past the
number of steps that the model was configured with. The verdict's thresholds are the constants below; those of what the
loop does in the long run are in `dynamics`.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.agiformer import AGIFormer
from model.evaluation.bpc import (
    Text,
    as_bytes,
    batches,
    byte_nats,
    cut_windows,
    evaluation_mode,
    window_rule,
)
from model.evaluation.distribution import QUANTILES, UnitHistogram
from model.evaluation.dynamics import Dynamics, LoopRuns, run_length
from model.evaluation.gains import Gains, byte_gains
from model.evaluation.report import check_count, number, text_table
from model.layers.norm import rms_norm
from model.layers.reasoning import Read

DORMANT_SIZE = 0.01  # every step is smaller than this share of the latent that it changes …
DORMANT_GAIN = 0.01  # … and all of them together move BPC by less than this: dormant
UNSTABLE_SIZE = 2.0  # a step this many times the size of its latent replaces it: unstable
UNSTABLE_LOSS = 0.5  # bits per byte: a loop that makes it worse by more is unstable
CLOSED, OPEN = 0.1, 0.9  # a gate below the one, and from the other on
HALT_BINS = 10  # of the histogram of p_halt

DEFAULT_TEXT = (
    "The river rises in the hills and reaches the sea after a hundred miles. In spring, when the snow melts, it floods "
    "the meadows on both banks; by August a child can wade across it.\n\n"
    "Nehir tepelerden doğar ve yüz mil sonra denize ulaşır. İlkbaharda karlar eriyince iki yakadaki çayırları su "
    "basar; ağustosta bir çocuk onu yürüyerek geçebilir.\n\n"
    "Der Fluss entspringt in den Hügeln. Le fleuve naît dans les collines. El río nace en las colinas.\n"
    "Река берёт начало в холмах. 这条河发源于群山之中。\n\n"
    "def mean(values):\n    return sum(values) / len(values)\n"
).encode()


@dataclass
class ThinkingStep:
    """The loop after step k: z [B, T, D], logits [B, L, 256], read as in `RecurrentReasoningBlock.step`; and of step k
    itself (None for k = 0) delta [B, T, D], p_halt [B, T, 1], gate [B, T, D]."""

    z: Tensor
    logits: Tensor
    read: Read | None = None
    delta: Tensor | None = None
    p_halt: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class StepReport:
    """One line of the report: the state after step k, and what step k did (None for k = 0).

    Attributes:
        bpc: bits per byte when decoded after step k.
        z_rms, delta_rms: root mean square over all positions and channels of z after the step, and of Δz.
        relative: mean over positions of ‖Δz‖ / ‖z before the step‖.
        cosine, angle: means over positions of the cosine between Δz and the step before's, and of the angle between
            them in degrees; None for k < 2.
        cosine_z: mean over positions of the cosine between Δz and z before the step.
        halt_mean, halt_quantiles: of p_halt over positions; quantiles at 5, 50 and 95%.
        halt_histogram: shares of the positions whose p_halt is in each tenth of [0, 1].
        gate_mean, gate_quantiles: of the gate over positions and channels; the quantiles to 1/1000.
        gate_closed, gate_open: shares of them below 0.1, and from 0.9 on.
    """

    step: int
    bpc: float
    z_rms: float
    delta_rms: float | None = None
    relative: float | None = None
    cosine: float | None = None
    angle: float | None = None
    cosine_z: float | None = None
    halt_mean: float | None = None
    halt_quantiles: tuple[float, ...] | None = None
    halt_histogram: tuple[float, ...] | None = None
    gate_mean: float | None = None
    gate_quantiles: tuple[float, ...] | None = None
    gate_closed: float | None = None
    gate_open: float | None = None


@dataclass(frozen=True)
class ReasoningReport:
    """All steps; `thinking_steps` is the configured K, `verdict` is "dormant", "active" or "unstable".

    `dynamics` is what the loop does far beyond K, `gains` what K steps are worth byte by byte.
    """

    steps: list[StepReport]
    thinking_steps: int
    bytes: int
    context: str
    verdict: str
    reason: str
    dynamics: Dynamics
    gains: Gains

    def table(self) -> str:
        """Where each step goes and what decoding after it costs, one line a step; the configured K is marked."""
        header = ["step", "BPC", "rms z", "rms Δz", "|Δz|/|z|", "cos", "angle", "cos z", "p_halt", "gate"]
        rows = []
        for step in self.steps:
            values = (step.bpc, step.z_rms, step.delta_rms, step.relative, step.cosine)
            rest = (step.cosine_z, step.halt_mean, step.gate_mean)
            mark = "  ← K" if step.step == self.thinking_steps else ""
            cells = [*(number(value, 4) for value in values), number(step.angle, 1), *(number(v, 4) for v in rest)]
            rows.append([f"{step.step}{mark}", *cells])
        return text_table(header, rows)

    def halting_table(self) -> str:
        """p_halt of each step: mean, quantiles, and the share of positions in each tenth of [0, 1] in percent."""
        edges = [f"{'<' if i < HALT_BINS else '≤'}{i / HALT_BINS:.1f}" for i in range(1, HALT_BINS + 1)]
        header = ["p_halt, step", "mean", *(f"{100 * level:g}%" for level in QUANTILES), *edges]
        rows = [
            [
                str(step.step),
                *(number(value, 4) for value in (step.halt_mean, *_cells(step.halt_quantiles, len(QUANTILES)))),
                *(number(None if x is None else 100 * x, 1) for x in _cells(step.halt_histogram, HALT_BINS)),
            ]
            for step in self.steps[1:]
        ]
        return text_table(header, rows)

    def gate_table(self) -> str:
        """The channel gate of each step: mean, quantiles, and the shares closed and open in percent."""
        header = ["gate, step", "mean", *(f"{100 * level:g}%" for level in QUANTILES), f"<{CLOSED} %", f"≥{OPEN} %"]
        rows = [
            [
                str(step.step),
                *(number(value) for value in (step.gate_mean, *_cells(step.gate_quantiles, len(QUANTILES)))),
                *(number(None if x is None else 100 * x, 1) for x in (step.gate_closed, step.gate_open)),
            ]
            for step in self.steps[1:]
        ]
        return text_table(header, rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)


def measure_reasoning(
    model: AGIFormer,
    data: Text = DEFAULT_TEXT,
    *,
    steps: int | None = None,
    context: int = 1024,
    batch_size: int = 16,
    max_bytes: int | None = 65536,
    top: int = 10,
) -> ReasoningReport:
    """Run the thinking loop on a text step by step and judge it.

    Args:
        model: an AGIFormer with K configured thinking steps.
        data: uint8 [n] or bytes, n ≥ 1.
        steps: thinking steps to look at; 2·K (at least 2) when None.
        context, batch_size, max_bytes: windows of the text, as in `bits_per_byte`.
        top: how many bytes to show that gain most from K steps, and that lose most.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    text = as_bytes(data)
    K = model.config.thinking_steps
    steps = max(2 * K, 2) if steps is None else steps
    check_count("steps", steps, least=0)
    check_count("context", context)
    check_count("batch_size", batch_size)
    check_count("top", top, least=0)
    if max_bytes is not None:
        check_count("max_bytes", max_bytes)
    # Windows begin with a patch, so that the bytes of a window know their place in one.
    windows = cut_windows(len(text), context, max_bytes)
    count = sum(stop - start for start, stop in windows)
    totals = [_Totals() for _ in range(steps + 1)]
    runs = LoopRuns(model.reasoning.step, run_length(K))
    nats: dict[int, list[np.ndarray]] = {0: [], K: []}
    with evaluation_mode(model):
        for x in batches(text, windows, batch_size, model.start.device):
            z = delta = None
            for k, thought in enumerate(thinking_trace(model, x, max(steps, K))):
                lost = byte_nats(thought.logits, x)
                if k in nats:
                    nats[k].append(lost.flatten().cpu().numpy())
                if k <= steps:
                    totals[k].add(lost, thought, z, delta)
                if k == 0:
                    runs.add(thought.z, thought.read)
                z, delta = thought.z, thought.delta
    reports = [total.report(k, count) for k, total in enumerate(totals)]
    before, after = (np.concatenate(nats[k]) / math.log(2) for k in (0, K))
    return ReasoningReport(
        reports,
        K,
        count,
        window_rule(context, max_bytes, count, len(text)),
        *judge(reports, K),
        dynamics=runs.report(),
        gains=byte_gains(text, windows, before, after, steps=K, patch_size=model.config.patch_size, top=top),
    )


def thinking_trace(model: AGIFormer, x: Tensor, steps: int) -> Iterator[ThinkingStep]:
    """The loop on bytes x [B, L] after 0, 1, … `steps` steps; `logits` of step k are `model(x, thinking_steps=k)`."""
    entered: list[tuple] = []
    # What enters the loop is caught at its door, so that this stays right however the trunk before it changes; and
    # what enters the head at that door, for the channels that pass the loop by.
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: entered.append(inputs))
        for module in (model.reasoning, model.head)
    ]
    try:
        logits = model(x, thinking_steps=0)
    finally:
        for hook in hooks:
            hook.remove()
    (z, _, _, read, *_), (joined, *_) = entered
    rest = joined[..., z.shape[-1] :]
    yield ThinkingStep(z, logits, read)
    for _ in range(steps):
        gate = model.reasoning.gate(rms_norm(z)).sigmoid()
        delta, p_halt = model.reasoning.step(z, read)
        z = z + delta
        yield ThinkingStep(z, model.read_out(torch.cat([z, rest], -1), x), read, delta, p_halt, gate)


def judge(steps: list[StepReport], thinking_steps: int) -> tuple[str, str]:
    """(verdict, reason in one line) over the first `thinking_steps` steps of those measured; docs/diagnostics.md."""
    used = steps[: thinking_steps + 1]
    sizes = [step.relative for step in used[1:]]
    gain = used[0].bpc - used[-1].bpc
    if not all(math.isfinite(value) for value in [*sizes, *(step.bpc for step in used)]):
        return "unstable", "a size or a BPC is not finite"
    if not sizes:
        return "dormant", "no thinking step is configured or measured"
    largest = max(sizes)
    effect = f"{'save' if gain >= 0 else 'cost'} {abs(gain):.4f} bits per byte"
    measured = f"largest step {100 * largest:.2f}% of its latent; steps 1 to {len(sizes)} {effect}"
    if largest >= UNSTABLE_SIZE or gain < -UNSTABLE_LOSS:
        return "unstable", measured
    if largest < DORMANT_SIZE and abs(gain) < DORMANT_GAIN:
        return "dormant", measured
    return "active", measured


def _cells(values: tuple[float, ...] | None, count: int) -> tuple[float | None, ...]:
    return (None,) * count if values is None else values


class _Totals:
    """Sums over the batches for one step, in float64 until the report."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.positions = 0
        self.width = 1
        self.halts: list[np.ndarray] = []
        self.gate = UnitHistogram()

    def add(self, nats: Tensor, now: ThinkingStep, z: Tensor | None, delta: Tensor | None) -> None:
        """Count one batch and its nats [B, L]; z and delta [B, T, D] are those of the step before, None for none."""
        self.positions += now.z.shape[0] * now.z.shape[1]
        self.width = now.z.shape[2]
        self._sum("nats", nats)
        self._sum("z", now.z.double().square())
        if now.delta is None:
            return
        step, start = now.delta.double(), z.double()
        size = step.norm(dim=-1)
        self._sum("delta", size.square())
        self._sum("relative", size / start.norm(dim=-1))
        self._sum("cosine_z", torch.cosine_similarity(step, start, dim=-1))
        self.halts.append(now.p_halt.double().flatten().cpu().numpy())
        self.gate.add(now.gate)
        if delta is not None:
            cosine = torch.cosine_similarity(step, delta.double(), dim=-1)
            self._sum("cosine", cosine)
            self._sum("angle", cosine.clamp(-1, 1).acos().rad2deg())

    def report(self, step: int, count: int) -> StepReport:
        """The means of this step, over `count` bytes."""
        sums = {name: float(value) for name, value in self.sums.items()}
        values = self.positions * self.width
        report = {"step": step, "bpc": sums["nats"] / math.log(2) / count, "z_rms": math.sqrt(sums["z"] / values)}
        if self.halts:
            halts = np.concatenate(self.halts)
            report |= {
                "delta_rms": math.sqrt(sums["delta"] / values),
                "relative": sums["relative"] / self.positions,
                "cosine_z": sums["cosine_z"] / self.positions,
                "halt_mean": float(halts.mean()),
                "halt_quantiles": tuple(np.quantile(halts, QUANTILES).tolist()),
                "halt_histogram": tuple((np.histogram(halts, HALT_BINS, (0, 1))[0] / len(halts)).tolist()),
                "gate_mean": self.gate.mean,
                "gate_quantiles": self.gate.quantiles(),
                "gate_closed": self.gate.below(CLOSED),
                "gate_open": self.gate.above(OPEN),
            }
        report |= {name: sums[name] / self.positions for name in ("cosine", "angle") if name in sums}
        return StepReport(**report)

    def _sum(self, name: str, values: Tensor) -> None:
        total = values.double().sum()
        self.sums[name] = self.sums[name] + total if name in self.sums else total
