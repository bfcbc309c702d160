"""The sticky amplifier (seed 000, section 3): units of large gradient are anchored, and what feeds them learns faster.

    m_i = 1 where mean |∂L/∂h_i| > mean + 2 · std over the units, or among the top share
    b ← clamp(decay · b + η · m · h̄, ±bias_max)        anchoring; b is added to h in the next forward pass
    ΔW_ij ← (1 + λ m_j) · ΔW_ij                        for the weights that feed unit j

Static shapes, no host synchronisation, and whatever is not finite flags nothing.

Notable: the seed's text anchors by η · m · sign(∂L/∂h) · h, its training step by η · m · h̄. The second is what its
purpose asks for ("fire in the same direction as it did"), and the default here: with the sign, a unit that is too high
would be pushed higher. `sign` gives the first.
"""

import torch
from torch import Tensor


@torch.no_grad()
def salient_units(
    gradient: Tensor, *, stds: float = 2.0, top_share: float | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which units of a hidden state carry an unusually large gradient.

    The threshold is relative: scaling the loss does not move it. The standard deviation is that of PyTorch's `.std()`,
    with D − 1; one unit alone can exceed 2 of them only when D ≥ 6.

    Args:
        gradient: ∂L/∂h [..., D].
        stds: standard deviations above the mean that flag a unit.
        top_share: in (0, 1], instead of `stds`: the share of units to flag, at least one; never one without gradient.
        weights: [...] ≥ 0, what each position counts; 0 for one whose target may not be learned from. All 1 when None.

    Returns:
        mask [D] float32 of 0 and 1, and magnitude [D] float32, the mean |∂L/∂h|. Both are 0 everywhere if a gradient is
        not finite.

    Raises:
        ValueError: top_share or the shape of weights.
    """
    if top_share is not None and not 0 < top_share <= 1:
        raise ValueError(f"top_share={top_share!r}: accepted is a number over 0 and up to 1, or None")
    magnitude = position_mean(gradient, weights, absolute=True)
    magnitude = torch.where(magnitude.isfinite().all(), magnitude, 0)
    return flagged(magnitude, stds=stds, top_share=top_share), magnitude


@torch.no_grad()
def flagged(magnitude: Tensor, *, stds: float = 2.0, top_share: float | None = None) -> Tensor:
    """The mask [..., D] float32 of `salient_units` from magnitudes [..., D], each row by itself."""
    magnitude = torch.where(magnitude.isfinite().all(-1, keepdim=True), magnitude, 0)
    if top_share is None:
        # Squares of gradients under an unscaled fp16 loss are out of float32's range.
        wide = magnitude.double()
        return (wide > wide.mean(-1, keepdim=True) + stds * wide.std(-1, keepdim=True)).float()
    top = magnitude.topk(max(1, round(top_share * magnitude.shape[-1]))).indices
    return torch.zeros_like(magnitude).scatter_(-1, top, 1.0) * (magnitude > 0)


@torch.no_grad()
def position_mean(values: Tensor, weights: Tensor | None = None, *, absolute: bool = False) -> Tensor:
    """Mean [D] float32 over all positions of values [..., D], or of |values| if `absolute`.

    Positions count as weights [...] ≥ 0 say (faster as bool), 0 where none counts; all alike when None. What a position
    that does not count holds does not matter.

    Raises:
        ValueError: when weights do not have one value a position.
    """
    rows = values.reshape(-1, values.shape[-1])
    if weights is None:
        return _column_sums(rows, absolute) / len(rows)
    if weights.shape != values.shape[:-1]:
        raise ValueError(f"weights have shape {tuple(weights.shape)}: accepted is {tuple(values.shape[:-1])}")
    weights = weights.reshape(-1, 1)
    rows = torch.where(weights > 0, rows, 0)
    if weights.dtype != torch.bool:
        rows = rows.float() * weights.float()  # no matrix product: autocast would round it
    return _column_sums(rows, absolute) / weights.sum().float().clamp_min(torch.finfo(torch.float32).tiny)


def _column_sums(rows: Tensor, absolute: bool) -> Tensor:
    """rows [N, D] → [D] float32, in one pass."""
    if absolute:
        return torch.linalg.vector_norm(rows, 1, 0, dtype=torch.float32)
    return rows.sum(0, dtype=torch.float32)


@torch.no_grad()
def anchor_(
    bias: Tensor,
    mask: Tensor,
    hidden: Tensor,
    *,
    rate: float,
    decay: float,
    bias_max: float,
    sign: Tensor | None = None,
) -> None:
    """b ← clamp(decay · b + rate · m · h̄, ±bias_max), in place.

    Args:
        bias: b [..., D].
        mask: m [..., D], of `salient_units`; all 0 leaves the decay alone.
        hidden: h̄ [..., D], of `position_mean`; values that are not finite add nothing.
        rate: η_amp.
        decay: what a call keeps of the bias, in [0, 1].
        bias_max: largest absolute value.
        sign: sign(∂L/∂h) [..., D], to be multiplied in (see the module's text).
    """
    step = hidden if sign is None else hidden * sign
    step = torch.where((mask > 0) & step.isfinite(), rate * mask * step, 0)
    bias.mul_(decay).add_(step).clamp_(-bias_max, bias_max)


@torch.no_grad()
def amplify_(gradient: Tensor, mask: Tensor, strength: float | Tensor, *, dim: int = 0) -> None:
    """∂L/∂W ← (1 + λ m) · ∂L/∂W in place, for the weights that feed each unit.

    Args:
        gradient: of a weight whose dimension `dim` counts the fed units: rows of a linear layer.
        mask: m [D].
        strength: λ ≥ 0; a number or a device scalar.
    """
    shape = [1] * gradient.dim()
    shape[dim] = -1
    gradient.mul_((1 + strength * mask).to(gradient.dtype).view(shape))
