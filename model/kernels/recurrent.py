"""The recurrences, one step at a time: the reference that every other implementation is tested against.

Slow on purpose. Run in float64, this is the definition of the operator.
"""

import torch
from torch import Tensor

# Keeps an empty memory (nothing written yet, or all decayed) at output 0. With φ = elu + 1 the normaliser
# is about E, so that ε changes no digit of a written one.
EPSILON = 1e-6

State = tuple[Tensor, Tensor]


def recurrent_hebbian(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: State) -> tuple[Tensor, State]:
    """M_t = λ_t M_{t-1} + k_t v_tᵀ, z_t = λ_t z_{t-1} + k_t, o_t = M_tᵀ q_t / (q_t · z_t + ε).

    q, k [B, H, T, E], v [B, H, T, V]; log_decay [B, H, T]; state (M [B, H, E, V], z [B, H, E]).
    """
    M, z = state
    decay = log_decay.exp()
    outputs = []
    for t in range(q.shape[2]):
        M = decay[:, :, t, None, None] * M + k[:, :, t, :, None] * v[:, :, t, None, :]
        z = decay[:, :, t, None] * z + k[:, :, t]
        numerator = (q[:, :, t, None, :] @ M).squeeze(-2)
        normaliser = (q[:, :, t] * z).sum(-1, keepdim=True) + EPSILON
        outputs.append(numerator / normaliser)
    return torch.stack(outputs, 2), (M, z)


def recurrent_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: State
) -> tuple[Tensor, State]:
    """M_t = λ_t (I − β_t k_t k_tᵀ) M_{t-1} + β_t k_t v_tᵀ, o_t = M_tᵀ q_t; z is handed through.

    q, k [B, H, T, E], v [B, H, T, V]; log_decay, beta [B, H, T]; state (M [B, H, E, V], z [B, H, E]).
    """
    M, z = state
    decay = log_decay.exp()
    outputs = []
    for t in range(q.shape[2]):
        key = k[:, :, t, :, None]
        M = decay[:, :, t, None, None] * M
        recalled = key.transpose(-1, -2) @ M
        M = M + beta[:, :, t, None, None] * key * (v[:, :, t, None, :] - recalled)
        outputs.append((q[:, :, t, None, :] @ M).squeeze(-2))
    return torch.stack(outputs, 2), (M, z)
