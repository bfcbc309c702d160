"""Dispatch and argument checks of the Hebbian fast-weight operator (DESIGN: HebbianMemory)."""

import torch
from torch import Tensor

from model.kernels.chunked import chunked_delta, chunked_hebbian
from model.kernels.recurrent import EPSILON, recurrent_delta, recurrent_hebbian
from model.kernels.transforms import batched
from model.kernels.triton_delta import triton_delta
from model.kernels.triton_hebbian import CHUNK, accepts, triton_hebbian

State = tuple[Tensor, Tensor]

# (Hebbian rule, delta rule) by name; "auto" is the recurrence for one step, and else the kernels where they run.
RULES = {
    "recurrent": (recurrent_hebbian, recurrent_delta),
    "chunked": (chunked_hebbian, chunked_delta),
    "triton": (triton_hebbian, triton_delta),
}
IMPLEMENTATIONS = ("auto", *RULES)

__all__ = ["EPSILON", "IMPLEMENTATIONS", "hebbian"]


def hebbian(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    beta: Tensor | None = None,
    state: State | None = None,
    impl: str = "auto",
) -> tuple[Tensor, State]:
    """Write and read a fast-weight matrix at every step of a sequence.

    Without `beta`, the Hebbian rule with a normaliser (Katharopoulos et al. 2020, with decay)::

        M_t = λ_t M_{t-1} + k_t v_tᵀ       z_t = λ_t z_{t-1} + k_t
        o_t = M_tᵀ q_t / (q_t · z_t + ε)

    With `beta`, the gated delta rule (Yang et al. 2025), which reads without a normaliser and leaves z as
    it was given::

        M_t = λ_t (I − β_t k_t k_tᵀ) M_{t-1} + β_t k_t v_tᵀ       o_t = M_tᵀ q_t

    Args:
        q, k: [B, H, T, E] with the feature map already applied; for the delta rule the caller normalises k.
        v: [B, H, T, V], V = E or of its own.
        log_decay: [B, H, T], log λ_t ≤ 0; −inf erases the state.
        beta: [B, H, T] writing strength in [0, 1] of the delta rule, or None for the Hebbian rule.
        state: (M [B, H, E, V], z [B, H, E]) carried from earlier steps; zeros when None.
        impl: "recurrent" (the reference), "chunked" (parallel inside chunks), "triton" (the same as kernels, on a CUDA
            device, float32 and V = E ≤ 128 only), or "auto".

    Returns:
        out [B, H, T, V] and the state after step T. Both are float32, or float64 when q is.

    Raises:
        ValueError: naming the argument, what it was and what is accepted.
    """
    _check(q, k, v, log_decay, beta, state, impl)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    # Autocast would turn the products below into half precision: the state must stay exact.
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, log_decay = (tensor.to(dtype) for tensor in (q, k, v, log_decay))
        if state is None:
            B, H, _, E = q.shape
            state = (q.new_zeros(B, H, E, v.shape[-1]), q.new_zeros(B, H, E))
        else:
            state = (state[0].to(dtype), state[1].to(dtype))
        if impl == "auto":
            impl = _fastest(q, k, v)
        hebbian_rule, delta_rule = RULES[impl]
        if beta is None:
            return hebbian_rule(q, k, v, log_decay, state)
        return delta_rule(q, k, v, log_decay, beta.to(dtype), state)


def _fastest(q: Tensor, k: Tensor, v: Tensor) -> str:
    T = q.shape[2]
    if T == 1:
        return "recurrent"
    # Fewer steps than a chunk come in many lengths, and every one would wait for a compiler.
    if q.is_cuda and T >= CHUNK and accepts(q, v) and not batched(q, k, v):
        return "triton"
    return "chunked"


def _check(q, k, v, log_decay, beta, state, impl) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: accepted are {', '.join(IMPLEMENTATIONS)}")
    if q.dim() != 4 or q.shape[2] < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}: accepted is [B, H, T, E] with T ≥ 1")
    expected = {"k": (k, q.shape), "v": (v, (*q.shape[:3], v.shape[-1])), "log_decay": (log_decay, q.shape[:3])}
    if beta is not None:
        expected["beta"] = (beta, q.shape[:3])
    if state is not None:
        B, H, _, E = q.shape
        expected["state[0]"] = (state[0], (B, H, E, v.shape[-1]))
        expected["state[1]"] = (state[1], (B, H, E))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: with this q, accepted is {tuple(shape)}")
