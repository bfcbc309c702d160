"""Sampling of the next byte: temperature, then exact top-k, then exact top-p; in float64.

The order is that of most samplers: top-p is a share of what top-k left, at the given temperature.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Masses come from float32 logits: a set that misses top_p by no more than their rounding has reached it.
MASS_ROUNDING = 1e-7


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError naming argument, value and what is accepted."""
    if not _is_number(temperature) or not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"temperature={temperature!r}: accepted is a finite number ≥ 0 (0 is greedy)")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= 256):
        raise ValueError(f"top_k={top_k!r}: accepted is an integer from 1 to 256, or None")
    if top_p is not None and (not _is_number(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"top_p={top_p!r}: accepted is a number above 0 and up to 1, or None")


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution that `sample` draws from.

    Args:
        logits: [B, 256] of any float type; −inf masks a byte. Every row needs one finite value.
        temperature: 0 puts all mass on the largest logit.
        top_k: exactly this many bytes stay (fewer where fewer are unmasked); of equal logits the lower byte wins.
        top_p: the smallest set of most probable bytes whose mass is at least this stays, never fewer than one.

    Returns:
        [B, 256] float64, rows summing to 1.

    Raises:
        ValueError: an argument out of range, naming it, its value and what is accepted.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    scaled = logits.double()
    # The largest becomes 0 before the division, so that no temperature, however small, overflows.
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / temperature
    if top_k is None and (top_p is None or top_p == 1):
        return scaled.softmax(-1)
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    kept = ordered.softmax(-1)
    if top_p is not None and top_p < 1:
        mass_before = F.pad(kept.cumsum(-1)[:, :-1], (1, 0))
        beyond = mass_before >= top_p - MASS_ROUNDING
        beyond[:, 0] = False
        kept = kept.masked_fill(beyond, 0)
        kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One byte a row, drawn from `probabilities(logits, ...)`, without synchronisation.

    Args:
        logits, temperature, top_k, top_p: see `probabilities`. A masked byte is never drawn.
        generator: on the device of the logits; PyTorch's own when None. Each call draws one [B, 256] block from it, at
            any temperature but 0.

    Returns:
        [B] int64.
    """
    if temperature == 0:
        check_sampling(temperature, top_k, top_p)
        return logits.argmax(-1)
    weights = probabilities(logits, temperature, top_k, top_p)
    # The first of independent exponential clocks with these rates to ring: an exact draw. A rate of 0 never rings.
    clocks = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / clocks.clamp_min(torch.finfo(clocks.dtype).tiny)).argmax(-1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
