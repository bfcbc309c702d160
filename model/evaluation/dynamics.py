"""Where the thinking loop leads when it is run far beyond its configured steps: to rest, round in a cycle, or away.

Every position of a text is a run of its own, judged by itself over the last steps of N (docs/diagnostics.md):

    ratio ρ     how much a step shrinks from one to the next: (largest of the last 8 steps / of the 8 before)^(1/8)
    last step   largest of the last 8 steps, as a share of z at the end
    return      ‖z_N − z_{N−p}‖ for periods p = 2 … 8, in units of the largest of the last 8 steps
    growth      largest ‖z‖ of the last 8 steps / of the 8 steps up to the middle of the run

    converges   ρ ≤ 0.9, or the last step ≤ 0.001
    explodes    not finite, or ρ ≥ 1.05 and growth ≥ 1.5
    drifts      growth ≥ 1.5
    cycles      return ≤ 0.1 for some period
    wanders     otherwise

Notable: any 8 steps hold every step of a cycle of at most 8, so that their largest is the same from turn to turn, and a
cycle of unequal steps is not taken for a contraction. A straight drift makes z up to twice as large over the second
half of a run and a random walk up to √2 times. 1.5 lies between: a drift reaches it by tripling z within the run. Steps
made from normalised latents are bounded: such a loop cannot explode, but it drifts unless something turns it back.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.evaluation.report import number, text_table

RUN_FACTOR = 8  # N is this many times the configured K …
LEAST_RUN = 24  # … and at least this
MAX_PERIOD = 8  # steps: the longest cycle that is looked for
CONVERGING_RATIO = 0.9
RESTING_STEP = 1e-3
EXPLODING_RATIO = 1.05
DRIFTING_GROWTH = 1.5
CYCLE_RETURN = 0.1
KINDS = ("explodes", "drifts", "wanders", "cycles", "converges")  # of two equally frequent ones the first is named

Step = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Dynamics:
    """What the loop does over N steps. `kind` is the one of most positions.

    Attributes:
        shares: of the positions, by kind; they sum to 1.
        ratio, last_step, growth: medians over positions of the figures above; None where none is finite.
        one_back, two_back: medians of ‖z_N − z_{N−1}‖ / ‖z_N‖ and ‖z_N − z_{N−2}‖ / ‖z_N‖.
        period: the most frequent one of the positions that cycle, in steps; None without any.
        z_rms: root mean square of z over positions and channels after 0 … N steps.
        step_size: mean over positions of ‖Δz‖ / ‖z before the step‖, steps 1 … N.
        distance_two: mean over positions of ‖z_k − z_{k−2}‖ / ‖z_k‖, k = 2 … N.
    """

    steps: int
    kind: str
    reason: str
    shares: dict[str, float]
    ratio: float | None
    last_step: float | None
    growth: float | None
    one_back: float | None
    two_back: float | None
    period: int | None
    z_rms: list[float]
    step_size: list[float]
    distance_two: list[float]

    def table(self) -> str:
        """One line: shares by kind in percent, then the medians."""
        header = ["steps", *(f"{kind} %" for kind in reversed(KINDS)), "ratio", "last step", "growth"]
        header += ["to z₋₁", "to z₋₂", "period"]
        figures = (self.ratio, self.last_step, self.growth, self.one_back, self.two_back)
        shares = [f"{100 * self.shares[kind]:.1f}" for kind in reversed(KINDS)]
        period = "-" if self.period is None else str(self.period)
        return text_table(header, [[str(self.steps), *shares, *(number(value, 4) for value in figures), period]])


def run_length(thinking_steps: int) -> int:
    """N for a model with K configured steps."""
    return max(RUN_FACTOR * thinking_steps, LEAST_RUN)


class LoopRuns:
    """The loop run on the latents of one batch after another; `report` judges all their positions.

    Args:
        step: z [B, T, D] → Δz [B, T, D] and the halting probability, as `RecurrentReasoningBlock.step`.
        steps: N ≥ 24.
    """

    def __init__(self, step: Step, steps: int):
        self.step, self.steps = step, steps
        self._positions = 0
        self._squares = np.zeros(steps + 1)  # per channel
        self._sizes = np.zeros(steps)
        self._two_back = np.zeros(steps - 1)
        self._figures: list[np.ndarray] = []

    @torch.no_grad()
    def add(self, z: Tensor, *inputs: object) -> None:
        """Run the loop from z [B, T, D]; `inputs` are what else its step takes."""
        recent = deque([z], maxlen=MAX_PERIOD + 1)
        norms, sizes = [_norm(z)], []
        self._positions += norms[0].numel()
        for k in range(1, self.steps + 1):
            delta, _ = self.step(z, *inputs)
            z = z + delta
            recent.append(z)
            sizes.append(_norm(delta))
            norms.append(_norm(z))
            self._sizes[k - 1] += float(_share(sizes[-1], norms[-2]).sum())
            if k >= 2:
                self._two_back[k - 2] += float(_share(_norm(z - recent[-3]), norms[-1]).sum())
        self._squares += [float(norm.square().sum()) / z.shape[-1] for norm in norms]
        returns = torch.stack([_norm(z - recent[-1 - period]) for period in range(1, MAX_PERIOD + 1)])
        self._figures.append(self._judged(torch.stack(norms), torch.stack(sizes), returns).flatten(1).cpu().numpy())

    def _judged(self, norms: Tensor, sizes: Tensor, returns: Tensor) -> Tensor:
        """Figures [7, B, T]: finite, ratio, last step, growth, distances one and two back, period (0 for none)."""
        half, width = self.steps // 2, MAX_PERIOD
        last, before = sizes[-width:].amax(0), sizes[-2 * width : -width].amax(0)
        growth = norms[-width:].amax(0) / norms[half - width + 1 : half + 1].amax(0)
        # Of the shortest period that comes back; a point at rest comes back after any.
        back = returns[1:] <= CYCLE_RETURN * last
        period = torch.where(back.any(0), back.int().argmax(0) + 2, 0)
        figures = [
            norms.isfinite().all(0),
            _share(last, before).pow(1 / width),
            _share(last, norms[-1]),
            growth,
            _share(returns[0], norms[-1]),
            _share(returns[1], norms[-1]),
            period,
        ]
        return torch.stack([figure.double() for figure in figures])

    def report(self) -> Dynamics:
        """The judgement over all positions added so far, at least one."""
        finite, ratio, last_step, growth, one_back, two_back, period = np.concatenate(self._figures, 1)
        kinds = classify(finite > 0, ratio, last_step, growth, period > 0)
        shares = {kind: float(np.mean(kinds == kind)) for kind in KINDS}
        kind = max(KINDS, key=shares.__getitem__)
        turns = period[kinds == "cycles"].astype(int)
        figures = {
            "ratio": _median(ratio),
            "last_step": _median(last_step),
            "growth": _median(growth),
            "one_back": _median(one_back),
            "two_back": _median(two_back),
            "period": int(np.bincount(turns).argmax()) if len(turns) else None,
        }
        return Dynamics(
            steps=self.steps,
            kind=kind,
            reason=_reason(self.steps, shares[kind], figures, kind),
            shares=shares,
            z_rms=np.sqrt(self._squares / self._positions).tolist(),
            step_size=(self._sizes / self._positions).tolist(),
            distance_two=(self._two_back / self._positions).tolist(),
            **figures,
        )


def classify(
    finite: np.ndarray, ratio: np.ndarray, last_step: np.ndarray, growth: np.ndarray, returns: np.ndarray
) -> np.ndarray:
    """The kind of every position, [n] each: the first rule that holds, in the order of the module's text."""
    rules = [
        ~finite,
        (ratio <= CONVERGING_RATIO) | (last_step <= RESTING_STEP),
        (ratio >= EXPLODING_RATIO) & (growth >= DRIFTING_GROWTH),
        growth >= DRIFTING_GROWTH,
        returns,
    ]
    return np.select(rules, ["explodes", "converges", "explodes", "drifts", "cycles"], "wanders")


def _reason(steps: int, share: float, figures: dict, kind: str) -> str:
    text = (
        f"at {100 * share:.0f}% of positions over {steps} steps; steps change by a factor of {number(figures['ratio'])}"
        f" each, the last are {number(figures['last_step'], 4)} of z, z grows {number(figures['growth'])} times"
    )
    return f"{text}; period {figures['period']}" if kind == "cycles" else text


def _norm(z: Tensor) -> Tensor:
    """‖z‖ over channels: [B, T, D] → [B, T] float64."""
    return torch.linalg.vector_norm(z, dim=-1, dtype=torch.float64)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 for nothing of nothing."""
    return torch.where(part == 0, 0.0, part / whole)


def _median(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None
