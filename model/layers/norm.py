"""Root-mean-square normalisation (Zhang and Sennrich 2019) without gains: the matrix that follows can learn them."""

from torch import Tensor

from model.kernels import norms

NORM_EPS = 1e-6
# A read of fast weights may be nearly zero where nothing was found. Blown up to full size it would be rounding noise,
# which shows as a difference of 1e-4 between streaming and the full forward. (A Hebbian read is an average of values.)
READ_EPS = 1e-3


def rms_norm(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """[..., D] → [..., D] of unit mean square over the last dimension; float32 inside, x's type outside."""
    return norms.rms_norm(x, eps)


def add_rms_norm(x: Tensor, delta: Tensor | None = None, readers: int = 1) -> tuple[Tensor, ...]:
    """x + δ (x where δ is None), and its `rms_norm` for each layer that reads it: see `model.kernels.norms`."""
    return norms.add_rms_norm(x, delta, NORM_EPS, readers)


def rms_norm_heads(x: Tensor, heads: int, eps: float = NORM_EPS) -> Tensor:
    """[..., D] → [..., D], each of its `heads` parts normalised for itself."""
    return rms_norm(x.unflatten(-1, (heads, -1)), eps).flatten(-2)
