"""Matrix products in half precision whose sums are kept as they were added up."""

from functools import lru_cache

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, K] × [K, N] or [S, M, K] × [S, K, N] of one type → `dtype`: float32 without a rounding in between where the
    device can write that."""
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    if dtype == torch.float32 and not a.is_cuda:
        return multiply(a.float(), b.float())
    if dtype == torch.float32 and a.dtype in HALF and a.is_cuda and keeps_sums():
        return multiply(a, b, out_dtype=dtype)
    return multiply(a, b).to(dtype)


@lru_cache
def keeps_sums() -> bool:
    """Whether this PyTorch's products on CUDA take `out_dtype` (2.8 and later, not on ROCm)."""
    known = all("dtype" in getattr(torch.ops.aten, name).overloads() for name in ("mm", "bmm"))
    return known and torch.version.hip is None
