"""The persistence layer (seed 000, section 6): what the amplifier found important moves less.

    L_reg = λ Σ_i importance_i · (w_i − w_ref,i)²       a pull towards reference weights
    mobility_i = 1 / (1 + s · importance_i / max importance)    a factor on the learning rate of what feeds unit i

Importance is counted by unit: it grows by the amplifier's mask, `importance.add_(mask)`. It belongs to whole rows of a
weight, so its shape [D] is the beginning of the weight's shape [D, ...]; it may also have all of it.

Static shapes and no host synchronisation.
"""

import torch
from torch import Tensor


def consolidation_penalty(weight: Tensor, reference: Tensor, importance: Tensor) -> Tensor:
    """Σ importance · (w − w_ref)², a scalar that can be differentiated by the weight; λ is the caller's.

    Args:
        weight, reference: [D, ...]. No gradient flows to the reference or the importance.
        importance: [D], or more of the weight's shape; ≥ 0.
    """
    return (rowwise(importance, weight).detach() * (weight - reference.detach()).square()).sum()


@torch.no_grad()
def add_consolidation_gradient_(
    gradient: Tensor, weight: Tensor, reference: Tensor, importance: Tensor, strength: float | Tensor
) -> None:
    """∂L/∂w ← ∂L/∂w + 2 λ · importance · (w − w_ref), in place: the gradient of λ times the penalty, written out.

    Args:
        gradient, weight, reference: [D, ...].
        importance: [D], or more of the weight's shape.
        strength: λ; a number or a device scalar.
    """
    gradient.addcmul_(2 * strength * rowwise(importance, weight), weight - reference)


def mobility(importance: Tensor, strength: float | Tensor) -> Tensor:
    """1 / (1 + s · importance / max importance): 1 where nothing is important, 1 / (1 + s) where it is most."""
    return 1 / (1 + strength * importance / importance.max().clamp_min(torch.finfo(importance.dtype).tiny))


@torch.no_grad()
def refresh_reference_(reference: Tensor, weight: Tensor, mask: Tensor) -> None:
    """w_ref ← w in place where mask, [D] or a scalar, is not 0: an important unit keeps what it has just learned."""
    reference.copy_(torch.where(rowwise(mask, weight) > 0, weight, reference))


def rowwise(values: Tensor, weight: Tensor) -> Tensor:
    """`values`, shaped as the beginning of the weight's shape, so that it broadcasts over the rest.

    Raises:
        ValueError: naming both shapes.
    """
    if values.shape != weight.shape[: values.dim()]:
        raise ValueError(
            f"values have shape {tuple(values.shape)}: accepted is a beginning of the weight's, {tuple(weight.shape)}"
        )
    return values.reshape(values.shape + (1,) * (weight.dim() - values.dim()))
