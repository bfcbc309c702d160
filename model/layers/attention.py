"""Sliding-window attention in time and memory linear in the sequence, through PyTorch's fused attention."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.qk_rotary import qk_rotary, window_mask
from model.kernels.transforms import apply, batched
from model.layers.norm import NORM_EPS
from model.layers.rotary import Phases

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None


@dataclass
class AttentionState:
    """Rotated keys and values of the last patches: k, v [B, c, H, E] with c ≤ window − 1.

    filled: None, or [] int64: c = window − 1 always, of which the last `filled` are keys, and what stands before them
    is not looked at. One patch at a time is read with such a state.
    """

    k: Tensor
    v: Tensor
    filled: Tensor | None = None

    def clone(self) -> "AttentionState":
        return AttentionState(*(tensor.clone() for tensor in self.tensors()))

    def tensors(self) -> list[Tensor]:
        """All tensors of the state."""
        return [self.k, self.v] + ([] if self.filled is None else [self.filled])

    def padded(self, window: int) -> "AttentionState":
        """The same with `filled`, in tensors of its own."""
        c = self.k.shape[1]
        k, v = (F.pad(x, (0, 0, 0, 0, window - 1 - c, 0)) for x in (self.k, self.v))
        return AttentionState(k, v, torch.tensor(c, device=k.device)).clone()


class WindowAttention(nn.Module):
    """Causal attention over the last `window` patches, with rotary phases and normalised queries and keys.

    The output projection is the caller's (a block shares it with the fast weights): here [B, T, D] → [B, T, D] are the
    heads. `inputs` is the width of what is read where that is not D.
    """

    def __init__(self, d_model: int, n_heads: int, window: int, inputs: int | None = None):
        super().__init__()
        self.n_heads = n_heads
        self.window = window
        self.qkv = nn.Linear(inputs or d_model, 3 * d_model, bias=False)

    def forward(self, x: Tensor, phases: Phases, state: AttentionState | None = None) -> tuple[Tensor, AttentionState]:
        """x [B, T, inputs], phases of its T positions, the state before it → heads [B, T, D], the state after it."""
        # Normalised queries and keys keep the logits bounded at high learning rates (Henry et al. 2020).
        q, k, v = qk_rotary(self.qkv(x), phases, self.n_heads, NORM_EPS)
        cached, filled = 0, None
        if state is not None:
            cached, filled = state.k.shape[1], state.filled
            k = torch.cat([state.k.to(k.dtype), k], 1)
            v = torch.cat([state.v.to(v.dtype), v], 1)
        if filled is not None:
            out = _attend_one(q, k, v, filled)
            return out.flatten(2), AttentionState(k[:, 1:], v[:, 1:], (filled + 1).clamp_max(self.window - 1))
        out = window_attention(q, k, v, self.window, cached)
        keep = max(0, k.shape[1] - (self.window - 1))
        return out.flatten(2), AttentionState(k[:, keep:], v[:, keep:])


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, cached: int = 0) -> Tensor:
    """Each query attends to the `window` keys that end at its own position.

    Queries are cut into blocks of `window`; a block needs only its own keys and the block before. So the
    largest mask is [2·window, 2·window] whatever the length, and it is one broadcast tensor for all blocks.

    Args:
        q: [B, T, H, E].
        k, v: [B, cached + T, H, E]: the first `cached` ≤ window − 1 keys lie before the first query.

    Returns:
        [B, T, H, E].
    """
    T = q.shape[1]
    if cached + T <= 2 * window:
        return _attend(q, k, v, window, cached)
    if cached == 0 and _flash_has(q, k, v, window):
        return _flash(q, k, v, window)
    first = min(T, window)
    head = _attend(q[:, :first], k[:, : cached + first], v[:, : cached + first], window, cached)
    # Every later block has a whole block to its left: its own keys and that block's are all it sees.
    B, _, H, E = q.shape
    blocks = _whole_blocks(q[:, first:], window).reshape(-1, window, H, E)
    keys, values = (_with_left_neighbour(_whole_blocks(x[:, cached:], window), window) for x in (k, v))
    tail = _attend(blocks, keys, values, window, window)
    return torch.cat([head, tail.reshape(B, -1, H, E)[:, : T - first]], 1)


# Up to here a query sees two of flash attention's blocks of keys at most (128 keys for heads of up to 96 channels on
# every card). The gradients of queries are added up by whoever is first: of two addends that is the same to the bit, of
# three it is not.
FLASH_WINDOW, FLASH_WIDTH = 128, 96


def _flash_has(q: Tensor, k: Tensor, v: Tensor, window: int) -> bool:
    """Whether flash attention's own window (Dao 2024) can be used: no mask, no blocks, a third of the time."""
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype
    fits = window <= FLASH_WINDOW and q.shape[-1] % 8 == 0 and q.shape[-1] <= FLASH_WIDTH and len(q)
    return bool(half and fits and _flash_runs(q.device) and not batched(q, k, v))


@lru_cache
def _flash_runs(device: torch.device) -> bool:
    new_enough = varlen_attn is not None and torch.version.hip is None
    return new_enough and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    B, T = q.shape[:2]
    starts = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return varlen_attn(q, k, v, starts, starts, T, T, window_size=(window - 1, 0)).unflatten(0, (B, T))


def _attend_one(q: Tensor, k: Tensor, v: Tensor, filled: Tensor) -> Tensor:
    """One query [B, 1, H, E] over its own key and the last `filled` [] before it, of k, v [B, window, H, E]."""
    window = k.shape[1]
    seen = torch.arange(window, device=k.device) >= window - 1 - filled
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.expand(1, 1, 1, -1)).transpose(1, 2)


def _whole_blocks(x: Tensor, window: int) -> Tensor:
    """[B, T, H, E] with zeros up to a multiple of `window`; where none are missing, without the copy of `F.pad`."""
    missing = -x.shape[1] % window
    return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x


def _with_left_neighbour(x: Tensor, window: int) -> Tensor:
    """[B, n·window, H, E] → [B·(n − 1), 2·window, H, E]: every block but the first, after the block before it."""
    blocks = x.unflatten(1, (-1, window))
    return torch.cat([blocks[:, :-1], blocks[:, 1:]], 2).flatten(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int, cached: int) -> Tensor:
    """Attention of [B, T, H, E] over [B, cached + T, H, E] keys, inside the window, as one fused call."""
    T, S = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask, causal = None, cached == 0 and window >= T
    if not causal and (T > 1 or window < S):
        mask = window_mask(T, S, window, cached, q.dtype, q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return apply(_GradientOfSameLayout, out).transpose(1, 2)


class _GradientOfSameLayout(torch.autograd.Function):
    """The identity; its gradient is laid out in memory as its output is.

    PyTorch keeps a cuDNN plan for each shape and layout of an attention's inputs, and not for each layout of its
    output's gradient. A gradient that is a slice of a larger one, as a concatenation's is, would be read by the
    plan of another layout: wrong numbers, or memory that is not ours.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.layout = x.shape, x.stride()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        shape, stride = ctx.layout
        return grad if grad.stride() == stride else grad.new_empty_strided(shape, stride).copy_(grad)
