"""When to add petals, and how long until then (DESIGN: Petals; seed 003). Numbers in and out: no model, no PyTorch.

    GrowthPolicy      are there too few fluid petals left?
    FreezingProcess   petals set as a Poisson process: the expected steps until the policy says yes

Notable: how many solid petals the policy waits for is asked of the policy itself, so that both can never disagree.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

RULES = ("student-t", "phi")
NOISE_SHARE = 1 / math.e  # the share of petals that should be fluid at least (seed 003)

BETA_ITERATIONS = 100_000  # of the continued fraction; it needs about √max(a, b)
SERIES_FROM = 1000.0  # where lgamma(a + ½) − lgamma(a) has cancelled to 1e-12, and its series is exact


@dataclass(frozen=True)
class GrowthPolicy:
    """Decides from the petals' statuses whether the model should have more of them.

    Args:
        rule: "student-t": the one-sided upper confidence bound of the mean fluid share is under 1/e; "phi": the solid
            share is over `phi` (o3's comment in seed 003).
        phi: φ, from 0 to under 1.
        confidence: of the bound, from 0.5 to under 1. Below 0.5 the bound would lie under the mean.

    Raises:
        ValueError: for an argument out of range.
    """

    rule: str = "student-t"
    phi: float = 0.8
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule={self.rule!r}: accepted are {', '.join(RULES)}")
        for name, low in (("phi", 0.0), ("confidence", 0.5)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < 1:
                raise ValueError(f"{name}={value!r}: accepted is a number from {low:g} to under 1")

    def decide(self, fluid: Sequence[int]) -> bool:
        """True to expand; `fluid` has a 1 for each fluid petal and a 0 for each solid one.

        One petal has no variance, so that "student-t" needs at least two and does not expand before; "phi" needs one.
        """
        if any(value not in (0, 1) for value in fluid):
            raise ValueError(f"fluid={list(fluid)!r}: accepted are 0 (solid) and 1 (fluid)")
        return self._expands(len(fluid) - int(sum(fluid)), len(fluid))

    def upper_bound(self, solid: int, total: int) -> float:
        """mean + t_{confidence, n−1} · s / √n of the fluid share, n = `total` ≥ 2: what "student-t" holds against 1/e.

        s² is the sample variance with n − 1; of n zeros and ones with mean m it is n m (1 − m) / (n − 1).
        """
        _check_petals(solid, total)
        if total < 2:
            raise ValueError(f"total={total!r}: accepted is an integer ≥ 2, fewer have no variance")
        mean = (total - solid) / total
        error = math.sqrt(mean * (1 - mean) / (total - 1))
        return mean + student_t_quantile(self.confidence, total - 1) * error

    def solid_needed(self, total: int) -> int | None:
        """The fewest solid of `total` petals at which `decide` says yes; None when it does with no number.

        Found by bisection on the decision. It is monotone: the bound rises with the fluid share up to ½ and is at
        least that share, hence over 1/e, beyond.
        """
        _check_petals(0, total)
        if not self._expands(total, total):
            return None
        low, high = -1, total  # never low, always high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._expands(middle, total) else (middle, high)
        return high

    def _expands(self, solid: int, total: int) -> bool:
        if self.rule == "phi":
            return total > 0 and solid / total > self.phi
        return total > 1 and self.upper_bound(solid, total) < NOISE_SHARE


def new_petals(total: int) -> int:
    """⌈total / 2⌉, the petals that one expansion adds to `total` ≥ 1 (o3's comment in seed 003)."""
    if isinstance(total, bool) or not isinstance(total, int) or total < 1:
        raise ValueError(f"total={total!r}: accepted is an integer ≥ 1")
    return (total + 1) // 2


@dataclass
class FreezingProcess:
    """Freezing events as a Poisson process (o3's comment in seed 003): petals that set since the last expansion.

    Attributes:
        start: step of the last expansion, or the first step.
        step: the last step recorded.
        events: petals that set from `start` to `step`.
    """

    start: int = 0
    step: int = 0
    events: int = 0

    def record(self, step: int, events: int) -> None:
        """`events` petals set between the step recorded last and `step`."""
        self._check("step", step, self.step)
        self._check("events", events, 0)
        self.step = step
        self.events += events

    def expanded(self, step: int) -> None:
        """The model grew at `step`: the count begins again."""
        self._check("step", step, self.step)
        self.start, self.step, self.events = step, step, 0

    @property
    def rate(self) -> float | None:
        """Petals a step; None before the first event."""
        elapsed = self.step - self.start
        return self.events / elapsed if elapsed and self.events else None

    def steps_until(self, policy: GrowthPolicy, solid: int, total: int) -> float | None:
        """Expected steps until `policy` expands, with `solid` of `total` petals solid: petals still needed / rate.

        0 when it would expand now; None when nothing has set yet, or when no number of solid petals would do.
        """
        needed = self._needed(policy, solid, total)
        if needed == 0:
            return 0.0
        return needed / self.rate if needed and self.rate else None

    def interval(
        self, policy: GrowthPolicy, solid: int, total: int, coverage: float = 0.9
    ) -> tuple[float, float] | None:
        """Central interval of the steps until `policy` expands; None where `steps_until` is.

        The m petals that are needed take a Gamma(m, rate) time, and the rate is only known from k events in S steps,
        as Gamma(k, S). Together the time is S · x / (1 − x) with x ~ Beta(m, k).
        """
        if not 0 < coverage < 1:
            raise ValueError(f"coverage={coverage!r}: accepted is a number between 0 and 1")
        needed = self._needed(policy, solid, total)
        if needed == 0:
            return 0.0, 0.0
        if not needed or not self.rate:
            return None
        elapsed = self.step - self.start
        return tuple(
            elapsed * _invert(lambda odds: regularised_beta(needed, self.events, odds / (1 + odds), 1 / (1 + odds)), p)
            for p in ((1 - coverage) / 2, (1 + coverage) / 2)
        )

    def to_dict(self) -> dict[str, int]:
        """The state as plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FreezingProcess":
        """The inverse of `to_dict`."""
        if set(values) != {"start", "step", "events"}:
            raise ValueError(f"freezing process {sorted(values)}: accepted are start, step and events")
        process = cls(values["start"])
        process._check("start", process.start, 0)
        process.step = process.start
        process.record(values["step"], values["events"])
        return process

    @staticmethod
    def _needed(policy: GrowthPolicy, solid: int, total: int) -> int | None:
        _check_petals(solid, total)
        needed = policy.solid_needed(total)
        return None if needed is None else max(0, needed - solid)

    @staticmethod
    def _check(name: str, value: Any, least: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: accepted is an integer ≥ {least}")


@lru_cache(256)  # a decision asks for one quantile, a search for the same one again and again
def student_t_quantile(p: float, degrees: float) -> float:
    """The value that Student's t with `degrees` > 0 degrees of freedom stays under with probability p in (0, 1).

    To about 1e-12 relative. `math.inf` degrees are the normal distribution.
    """
    if not 0 < p < 1:
        raise ValueError(f"p={p!r}: accepted is a number between 0 and 1")
    if not degrees > 0:
        raise ValueError(f"degrees={degrees!r}: accepted is a number > 0")
    if p == 0.5:
        return 0.0
    if math.isinf(degrees):
        return NormalDist().inv_cdf(p)

    def centre(t: float) -> float:
        """P(|T| ≤ t), by the two arguments of the beta function that each keep their digits."""
        return regularised_beta(0.5, degrees / 2, t * t / (degrees + t * t), degrees / (degrees + t * t))

    def outside(t: float) -> float:
        return regularised_beta(degrees / 2, 0.5, degrees / (degrees + t * t), t * t / (degrees + t * t))

    # 1 − 2p of a far tail has lost the digits of p.
    tail = min(p, 1 - p)
    t = _invert(lambda t: -outside(t), -2 * tail) if tail < 0.25 else _invert(centre, 1 - 2 * tail)
    return math.copysign(t, p - 0.5)


def regularised_beta(a: float, b: float, x: float, y: float) -> float:
    """I_x(a, b), the regularised incomplete beta function, for a, b > 0; y = 1 − x, given for its digits.

    By Lentz's evaluation of the continued fraction (Press et al. 1992, 6.4).
    """
    if x <= 0 or y <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # beyond, the fraction of the mirror image converges faster
        return 1 - regularised_beta(b, a, y, x)
    front = math.exp(a * _log(x, y) + b * _log(y, x) - _log_beta(a, b)) / a
    return front * _beta_fraction(a, b, x)


def _beta_fraction(a: float, b: float, x: float) -> float:
    """1/(1 + d₁/(1 + d₂/(1 + …))) from the front; a zero denominator is replaced by a tiny one."""
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    value = d
    for m in range(1, BETA_ITERATIONS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            c, d = (1 + term / c) or tiny, 1 / ((1 + term * d) or tiny)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            return value
    raise ArithmeticError(f"the continued fraction of I_{x}({a}, {b}) did not converge")


def _log(x: float, y: float) -> float:
    """ln x of x = 1 − y, with the digits of whichever is smaller."""
    return math.log1p(-y) if y < 0.5 else math.log(x)


def _log_beta(a: float, b: float) -> float:
    """ln B(a, b)."""
    small, large = min(a, b), max(a, b)
    if small == 0.5 and large > SERIES_FROM:  # what large degrees of freedom need
        ratio = 0.5 * math.log(large) - 1 / (8 * large) + 1 / (192 * large**3)
        return math.lgamma(0.5) - ratio
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _invert(function: Callable[[float], float], value: float) -> float:
    """x ≥ 0 with function(x) = value, for a function that rises; bisection down to neighbouring floats."""
    high = 1.0
    while function(high) < value and high < 1e300:
        high *= 2
    low = 0.0 if high == 1.0 else high / 2
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return high
        low, high = (middle, high) if function(middle) < value else (low, middle)


def _check_petals(solid: int, total: int) -> None:
    for name, count in (("total", total), ("solid", solid)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"{name}={count!r}: accepted is an integer ≥ 0")
    if solid > total:
        raise ValueError(f"solid={solid!r}: accepted is at most total = {total}")
