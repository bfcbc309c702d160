"""Root-mean-square normalisation (Zhang and Sennrich 2019) without gains: the matrix that follows can learn them."""

import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6


def rms_norm(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """[..., D] → [..., D] of unit mean square over the last dimension; float32 inside, x's type outside."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps).to(x.dtype)
