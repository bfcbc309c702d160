"""The learning curve (seed 000, section 4): a slow start, and a boom once the foundation is there.

    novelty   N_t = EMA of the loss                     in the loss's unit
    progress  P_t = (slow EMA − N_t) / slow EMA         how much faster the loss falls than it did; 0 on a plateau
    the boom  comes when N < drop · N_start, or P > spike · its usual value, for `patience` steps on end
    maturity  0 before the boom, then rising to 1 over `ramp` steps
    learning rate factor = slow + (boost − slow) · maturity

All state is device tensors, and nothing here reads one on the host. Sequence length and diversity of the data are the
trainer's, which looks at `boomed` where it reads the loss anyway.

Notable: EMAs are corrected for their start as in Adam (Kingma and Ba 2015): the sum of the weights so far is averaged
in the same way, and divides. So novelty is the mean of the first losses, not pulled towards 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LearningCurveOptions:
    """How the boom is found and what it changes.

    Args:
        slow, boost: factors on the learning rate before the boom and after its ramp, > 0.
        ramp: steps from one to the other.
        drop: share of the starting novelty under which the foundation is laid, in (0, 1).
        spike: progress over its usual value that counts as a spike, > 1.
        least_progress: progress that a spike has at least; keeps the noise of a plateau from being one.
        patience: steps for which a sign has to hold.
        settle: steps after which the starting novelty is read; no boom before.
        novelty_decay, slow_decay: what the two EMAs keep a step, in [0, 1), the second more.
        shortest: share of the full sequence length before the boom, in (0, 1].
        narrowest: share of the text to draw from before the boom, in (0, 1].

    Raises:
        ValueError: for an argument out of range.
    """

    slow: float = 0.5
    boost: float = 1.5
    ramp: int = 500
    drop: float = 0.5
    spike: float = 3.0
    least_progress: float = 0.01
    patience: int = 50
    settle: int = 20
    novelty_decay: float = 0.99
    slow_decay: float = 0.999
    shortest: float = 0.25
    narrowest: float = 0.25

    def __post_init__(self) -> None:
        for name, accepts, accepted in _RANGES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not accepts(value):
                raise ValueError(f"{name}={value!r}: accepted is {accepted}")
        if self.novelty_decay >= self.slow_decay:
            raise ValueError(f"novelty_decay={self.novelty_decay!r}: accepted is under slow_decay = {self.slow_decay}")


_STEPS = (lambda x: isinstance(x, int) and x >= 1, "an integer ≥ 1")
_RANGES = (
    *((name, lambda x: 0 < x < math.inf, "a number > 0") for name in ("slow", "boost")),
    *((name, *_STEPS) for name in ("ramp", "patience", "settle")),
    ("drop", lambda x: 0 < x < 1, "a number between 0 and 1"),
    ("spike", lambda x: 1 < x < math.inf, "a number > 1"),
    ("least_progress", lambda x: 0 <= x < 1, "a number from 0 to under 1"),
    *((name, lambda x: 0 <= x < 1, "a number from 0 to under 1") for name in ("novelty_decay", "slow_decay")),
    *((name, lambda x: 0 < x <= 1, "a number over 0 and up to 1") for name in ("shortest", "narrowest")),
)


class LearningCurve(nn.Module):
    """Follows the loss of a run, finds its boom, and says how fast to learn.

    Attributes:
        steps: int64 scalar, calls of `update`.
        boomed: bool scalar; once true it stays.
        boom_step: int64 scalar, `steps` at the boom; −1 before.
        averages: float32 [3, 2], of the loss, fast and slow, and of the progress: sums and the sums of their weights.
        start: float32 scalar, the starting novelty; 0 until it is read.
        sustained: int64 scalar, steps on end with a sign of the boom.
    """

    def __init__(self, options: LearningCurveOptions | None = None, device: torch.device | str | None = None):
        super().__init__()
        self.options = options or LearningCurveOptions()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("boomed", torch.zeros((), dtype=torch.bool, device=device))
        self.register_buffer("boom_step", torch.full((), -1, dtype=torch.int64, device=device))
        self.register_buffer("averages", torch.zeros(3, 2, device=device))
        self.register_buffer("start", torch.zeros((), device=device))
        self.register_buffer("sustained", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def update(self, loss: Tensor) -> None:
        """Take in the loss of one step, a device scalar > 0. One that is not finite only counts as a step."""
        options, loss = self.options, loss.detach().float()
        finite = loss.isfinite()
        self.steps.add_(1)
        self._average_(0, loss, options.novelty_decay, finite)
        self._average_(1, loss, options.slow_decay, finite)
        novelty, progress, usual = self.novelty(), self.progress(), self._read(2)
        self._average_(2, progress.clamp_min(0), options.slow_decay, finite)

        settled = self.steps >= options.settle
        self.start.copy_(torch.where(settled & (self.start == 0), novelty, self.start))
        dropped = novelty < options.drop * self.start
        spiked = progress > (options.spike * usual).clamp_min(options.least_progress)
        sign = settled & finite & (dropped | spiked)
        self.sustained.copy_(torch.where(finite, (self.sustained + 1) * sign, self.sustained))
        booms = (self.sustained >= options.patience) & ~self.boomed
        self.boom_step.copy_(torch.where(booms, self.steps, self.boom_step))
        self.boomed.logical_or_(booms)

    def novelty(self) -> Tensor:
        """N, a float32 scalar; 0 before the first loss."""
        return self._read(0)

    def progress(self) -> Tensor:
        """P, a float32 scalar up to 1; above 0 while the loss falls, below while it rises."""
        slow = self._read(1)
        return (slow - self._read(0)) / slow.clamp_min(torch.finfo(torch.float32).tiny)

    def maturity(self) -> Tensor:
        """0 before the boom to 1 at the end of its ramp, a float32 scalar."""
        since = (self.steps - self.boom_step).float() / self.options.ramp
        return torch.where(self.boomed, since.clamp(0, 1), 0)

    def rate_factor(self) -> Tensor:
        """What to multiply the learning rate by, a float32 scalar on the device."""
        return self.options.slow + (self.options.boost - self.options.slow) * self.maturity()

    def _average_(self, row: int, value: Tensor, decay: float, finite: Tensor) -> None:
        sums = self.averages[row]
        new = decay * sums + (1 - decay) * torch.stack((value, torch.ones_like(value)))
        sums.copy_(torch.where(finite, new, sums))

    def _read(self, row: int) -> Tensor:
        total, weight = self.averages[row].unbind()
        return total / weight.clamp_min(torch.finfo(torch.float32).tiny)
