"""The same recurrences, parallel inside chunks of the sequence: plain PyTorch, any device.

Inside a chunk the decays appear as a lower-triangular matrix Γ_ij = λ_{j+1} ⋯ λ_i, between chunks as a
product over the chunk. Both are exponentials of sums of log λ ≤ 0 that are never formed as a difference of
two cumulative sums: nothing can overflow, nothing is clamped, and log λ = −inf is exact.

Time and memory are linear in T: O(T · CHUNK) inside chunks, O(T / CHUNK · E²) for the states between them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.recurrent import EPSILON
from model.kernels.transforms import apply

CHUNK = 64  # steps per chunk: the [CHUNK, CHUNK] and [E, E] products then cost the same at E = 64
SEGMENT = 16  # chunks whose states are combined in one product before one is carried on

State = tuple[Tensor, Tensor]


def decays(log_decay: Tensor) -> Tensor:
    """[..., C] → Γ [..., C, C]: Γ_ij = exp(Σ_{l=j+1..i} log λ_l) for j ≤ i, 0 above the diagonal.

    Each entry is the exponential of its own running sum, so that −inf and long sums lose no digit of the short
    ones (a difference of cumulative sums gives NaN for the first and cancels for the second).
    """
    C = log_decay.shape[-1]
    return log_decay.unsqueeze(-1).expand(*log_decay.shape, C).tril(-1).cumsum(-2).exp().tril()


def _chunks(x: Tensor, size: int) -> Tensor:
    """[B, H, T, ...] → [B, H, N, size, ...], zero-padded at the end: no key, no value, no decay."""
    missing = -x.shape[2] % size
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing))
    return x.unflatten(2, (-1, size))


def _chunk_size(T: int) -> int:
    return min(CHUNK, max(16, 1 << (T - 1).bit_length()))


def chunked_hebbian(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: State) -> tuple[Tensor, State]:
    """`recurrent_hebbian`, chunk by chunk. q, k [B, H, T, E], v [B, H, T, V]; log_decay [B, H, T]; state (M, z)."""
    T = q.shape[2]
    size = _chunk_size(T)
    # Contiguous once here: every product below would otherwise copy its operands again.
    q, k, v, log_decay = (_chunks(x, size).contiguous() for x in (q, k, v, log_decay))
    out, M, z = apply(_ChunkedHebbian, q, k, v, log_decay, *state)
    return out.flatten(2, 3)[:, :, :T], (M, z)


class _ChunkedHebbian(torch.autograd.Function):
    """The chunked Hebbian rule with its gradient written out: fewer kernels and saved tensors than autograd's.

    q, k [B, H, N, C, E], v [B, H, N, C, V], log_decay [B, H, N, C], M [B, H, E, V], z [B, H, E] → out [B, H, N, C, V],
    M, z.
    """

    @staticmethod
    def forward(ctx, q, k, v, log_decay, M, z):
        within = decays(log_decay)  # Γ_ij inside the chunk
        since_start = log_decay.cumsum(-1).exp().unsqueeze(-1)  # decay of the incoming state at each step
        totals = log_decay.sum(-1)
        keys_at_end = k * within[..., -1, :].unsqueeze(-1)
        writes = keys_at_end.transpose(-1, -2) @ v  # [B, H, N, E, V]: what each chunk adds to M
        M_in, z_in, M, z = _carry(writes, keys_at_end.sum(-2), totals, M, z)

        queries = q * since_start
        scores = (q @ k.transpose(-1, -2)).mul_(within)
        numerator = (scores @ v).add_(queries @ M_in)
        normaliser = scores.sum(-1, keepdim=True).add_(queries @ z_in.unsqueeze(-1)).add_(EPSILON)
        out = numerator.div_(normaliser)
        ctx.save_for_backward(q, k, v, within, since_start, totals, scores, normaliser, out, M_in, z_in)
        return out, M, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_M, d_z):
        q, k, v, within, since_start, totals, scores, normaliser, out, M_in, z_in = ctx.saved_tensors
        at_end = within[..., -1, :].unsqueeze(-1)
        keys_at_end, queries = k * at_end, q * since_start

        # out = numerator / normaliser
        d_numerator = d_out / normaliser
        d_normaliser = (d_numerator * out).sum(-1, keepdim=True).neg_()
        # both are sums over scores inside the chunk, and reads of the incoming state
        d_scores = (d_numerator @ v.transpose(-1, -2)).add_(d_normaliser)
        d_v = scores.transpose(-1, -2) @ d_numerator
        d_queries = (d_numerator @ M_in.transpose(-1, -2)).add_(d_normaliser * z_in.unsqueeze(-2))
        d_M_in = queries.transpose(-1, -2) @ d_numerator
        d_z_in = (queries.transpose(-1, -2) @ d_normaliser).squeeze(-1)
        # what chunk n wrote has the gradient of the state after chunk n
        d_writes, d_key_sums, d_M, d_z = _carry_back(d_M_in, d_z_in, totals, d_M, d_z)
        d_keys_at_end = (v @ d_writes.transpose(-1, -2)).add_(d_key_sums.unsqueeze(-2))
        d_v.add_(keys_at_end @ d_writes)

        # decays: d log Γ_ij spreads over steps j + 1 … i, the decay since the start over 0 … i, totals over all
        d_log_within = d_scores * scores
        d_log_within[..., -1, :] += (d_keys_at_end * keys_at_end).sum(-1)
        d_log_since = (d_queries * queries).sum(-1)
        d_totals = (d_writes * M_in).sum((-1, -2)).add_((d_key_sums * z_in).sum(-1)).mul_(totals.exp())
        C = q.shape[-2]
        later = torch.ones(C, C, dtype=q.dtype, device=q.device).triu()
        d_log_decay = (later @ d_log_within).tril_(-1).sum(-1)
        d_log_decay += (later @ d_log_since.unsqueeze(-1)).squeeze(-1) + d_totals.unsqueeze(-1)

        d_scores.mul_(within)
        d_q = (d_scores @ k).addcmul_(d_queries, since_start)
        d_k = (d_scores.transpose(-1, -2) @ q).addcmul_(d_keys_at_end, at_end)
        return d_q, d_k, d_v, d_log_decay, d_M, d_z


def _segment_weights(totals: Tensor) -> Tensor:
    """[..., n] log decays of n chunks → [..., n + 1, n + 1]: row i says how much of the carried state (column 0) and
    of each chunk's write (columns 1 …) is left when chunk i begins; the last row is the state handed on."""
    return decays(F.pad(totals, (1, 0)))


def _carry(writes, key_sums, totals, M, z) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States at the start of every chunk, from what each chunk writes and how much it decays.

    writes [B, H, N, E, V], key_sums [B, H, N, E], totals [B, H, N] (log decay over the chunk) →
    M_in [B, H, N, E, V], z_in [B, H, N, E] and M, z after the last chunk.
    """
    M_in, z_in = [], []
    for first in range(0, totals.shape[2], SEGMENT):
        part = slice(first, first + SEGMENT)
        weights = _segment_weights(totals[:, :, part])
        M_all = torch.cat([M.unsqueeze(2), writes[:, :, part]], 2)
        z_all = torch.cat([z.unsqueeze(2), key_sums[:, :, part]], 2)
        M_all = (weights @ M_all.flatten(3)).view_as(M_all)
        z_all = weights @ z_all
        M_in.append(M_all[:, :, :-1])
        z_in.append(z_all[:, :, :-1])
        M, z = M_all[:, :, -1], z_all[:, :, -1]
    # One segment, the usual case, needs no copy; a clone keeps the outputs apart from what is saved.
    M_in, z_in = (x[0].contiguous() if len(x) == 1 else torch.cat(x, 2) for x in (M_in, z_in))
    return M_in, z_in, M.clone(), z.clone()


def _carry_back(d_M_in, d_z_in, totals, d_M, d_z) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The transpose of `_carry`: gradients of the states → of writes, key_sums and the state before the first chunk."""
    d_writes, d_key_sums = [], []
    for first in reversed(range(0, totals.shape[2], SEGMENT)):
        part = slice(first, first + SEGMENT)
        weights = _segment_weights(totals[:, :, part]).transpose(-1, -2)
        M_all = torch.cat([d_M_in[:, :, part], d_M.unsqueeze(2)], 2)
        z_all = torch.cat([d_z_in[:, :, part], d_z.unsqueeze(2)], 2)
        M_all = (weights @ M_all.flatten(3)).view_as(M_all)
        z_all = weights @ z_all
        d_writes.append(M_all[:, :, 1:])
        d_key_sums.append(z_all[:, :, 1:])
        d_M, d_z = M_all[:, :, 0], z_all[:, :, 0]
    d_writes, d_key_sums = (x[0].contiguous() if len(x) == 1 else torch.cat(x[::-1], 2) for x in (d_writes, d_key_sums))
    return d_writes, d_key_sums, d_M, d_z


def chunked_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: State
) -> tuple[Tensor, State]:
    """`recurrent_delta`, chunk by chunk. q, k [B, H, T, E], v [B, H, T, V]; log_decay, beta [B, H, T]; state (M, z).

    With u_t the correction that step t really writes, M_t = λ_t M_{t-1} + k_t u_tᵀ, the corrections of a chunk
    solve a unit lower-triangular system, (I + tril(β Γ ⊙ K Kᵀ, −1)) U = β (V − decay · K M_in), by forward
    substitution (inverting by powers cancels catastrophically when keys repeat; Yang et al. 2024, WY form).
    """
    T = q.shape[2]
    size = _chunk_size(T)
    q, k, v, log_decay, beta = (_chunks(x, size) for x in (q, k, v, log_decay, beta))
    within = decays(log_decay)
    since_start = log_decay.cumsum(-1).exp().unsqueeze(-1)
    total = since_start[..., -1:, :]
    keys_at_end = k * within[..., -1, :].unsqueeze(-1)
    scores = (q @ k.transpose(-1, -2)) * within
    beta = beta.unsqueeze(-1)
    system = (beta * within * (k @ k.transpose(-1, -2))).tril(-1)
    sides = torch.cat([beta * v, beta * since_start * k], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    targets, lookups = solved.split((v.shape[-1], k.shape[-1]), -1)

    # A chunk turns the state before it into A M + W: all chunks' A and W at once, and then one product a chunk.
    M, z = state
    keys_at_end = keys_at_end.transpose(-1, -2)
    writes = keys_at_end @ targets
    turns = total * torch.eye(M.shape[-2], dtype=M.dtype, device=M.device) - keys_at_end @ lookups
    M_in, M = apply(_ChainOfStates, turns, writes, M)
    out = scores @ (targets - lookups @ M_in) + (since_start * q) @ M_in
    return out.flatten(2, 3)[:, :, :T], (M, z)


class _ChainOfStates(torch.autograd.Function):
    """M_{n+1} = A_n M_n + W_n over chunks, A [B, H, N, E, E], W [B, H, N, E, V], M_0 [B, H, E, V] → M_0 … M_{N−1}, M_N.

    The only part of the delta rule that has to go chunk by chunk, forward and back.
    """

    @staticmethod
    def forward(ctx, A, W, M):
        shape = M.shape
        M, states = M.flatten(0, 1), []
        for turn, write in zip(A.flatten(0, 1).unbind(1), W.flatten(0, 1).unbind(1)):
            states.append(M)
            M = torch.baddbmm(write, turn, M)
        states = torch.stack(states, 1).unflatten(0, shape[:2])
        ctx.save_for_backward(A, states)
        return states, M.view(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_states, d_M):
        A, states = ctx.saved_tensors
        turned = A.transpose(-1, -2).flatten(0, 1).unbind(1)
        own = d_states.flatten(0, 1).unbind(1)
        d_M, after = d_M.flatten(0, 1), []
        for turn, d_state in zip(reversed(turned), reversed(own)):
            after.append(d_M)  # the gradient of what this chunk hands on
            d_M = torch.baddbmm(d_state, turn, d_M)
        d_W = torch.stack(after[::-1], 1).unflatten(0, A.shape[:2])
        return d_W @ states.transpose(-1, -2), d_W, d_M.view(A.shape[:2] + d_M.shape[1:])
