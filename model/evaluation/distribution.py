"""How values in [0, 1] (gates, probabilities) are spread: counted in one pass, in constant memory."""

import numpy as np
from torch import Tensor

BINS = 1000
QUANTILES = (0.05, 0.5, 0.95)


class UnitHistogram:
    """Counts of values in [0, 1] in 1000 equal bins. What is not finite is left out of all but the mean.

    Notable: quantiles are values that occur, to half a bin (0.0005); the mean is exact, and so are the shares beyond
    multiples of 1/1000.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(BINS, np.int64)
        self._sum = 0.0
        self._seen = 0

    def add(self, values: Tensor) -> None:
        """Count values of any shape."""
        values = values.detach().flatten()
        self._sum += float(values.double().sum())
        self._seen += values.numel()
        bins = (values[values.isfinite()].double() * BINS).long().clamp(0, BINS - 1)
        self._counts += bins.bincount(minlength=BINS).cpu().numpy()

    @property
    def mean(self) -> float | None:
        """None before anything was counted."""
        return self._sum / self._seen if self._seen else None

    def quantiles(self, levels: tuple[float, ...] = QUANTILES) -> tuple[float, ...] | None:
        """The smallest values that these shares of all do not exceed; None where nothing was counted."""
        reached = np.cumsum(self._counts)
        if not reached[-1]:
            return None
        filled = np.flatnonzero(self._counts)
        places = [filled[np.searchsorted(reached[filled], level * reached[-1])] for level in levels]
        return tuple(float((place + 0.5) / BINS) for place in places)

    def below(self, edge: float) -> float | None:
        """The share of values under `edge`, a multiple of 1/1000; None where nothing was counted."""
        total = self._counts.sum()
        return float(self._counts[: round(edge * BINS)].sum() / total) if total else None

    def above(self, edge: float) -> float | None:
        """The share of values from `edge` on."""
        below = self.below(edge)
        return None if below is None else 1 - below
