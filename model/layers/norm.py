"""Root-mean-square normalisation (Zhang and Sennrich 2019) without gains: the matrix that follows can learn them."""

import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6
# A read of fast weights may be nearly zero where nothing was found. Blown up to full size it would be rounding noise,
# which shows as a difference of 1e-4 between streaming and the full forward. (A Hebbian read is an average of values.)
READ_EPS = 1e-3


def rms_norm(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """[..., D] → [..., D] of unit mean square over the last dimension; float32 inside, x's type outside."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps).to(x.dtype)


def rms_norm_heads(x: Tensor, heads: int, eps: float = NORM_EPS) -> Tensor:
    """[..., D] → [..., D], each of its `heads` parts normalised for itself."""
    return rms_norm(x.unflatten(-1, (heads, -1)), eps).flatten(-2)
