"""HebbianMemory: fast weights written and read in the forward pass, always in float32."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import hebbian
from model.kernels.float32_linear import float32_linear
from model.kernels.packed_hebbian import log_decays, packed_hebbian, suits, unpacked
from model.kernels.projected_hebbian import joins, projected_hebbian

SHORTEST, LONGEST = 4.0, 512.0  # patches: the heads' memory lengths 1 / (1 − λ) at initialisation


@dataclass
class MemoryState:
    """The fast weights M [B, H, E, E] and their normaliser z [B, H, E], float32.

    read: of a `readable` memory, what its positions would have read with other queries: [B, T, D] → [B, T, D]. It
    belongs to the call that made it, and is no part of the state that is carried: `clone` leaves it out.
    """

    M: Tensor
    z: Tensor
    read: Callable[[Tensor], Tensor] | None = None

    def clone(self) -> "MemoryState":
        return MemoryState(self.M.clone(), self.z.clone())

    def tensors(self) -> list[Tensor]:
        """All tensors of the state."""
        return [self.M, self.z]


class HebbianMemory(nn.Module):
    """Per-head fast weights with a learned decay, scaled by the curriculum's plasticity α (DESIGN: HebbianMemory).

    Runs in float32 with autocast off, projections nearly so (`float32_linear`): half precision overflows in the
    normaliser (seed 002, "AMP stability"). `rule="delta"` writes by the delta rule with normalised keys instead.

    Attributes:
        readable: whether the state that a call returns can be read with other queries.
    """

    def __init__(self, d_model: int, n_heads: int, rule: str = "hebbian"):
        super().__init__()
        self.n_heads = n_heads
        self.rule = rule
        self.readable = False
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        # One row per head for the decay, and for the delta rule one more for the writing strength β.
        self.gates = nn.Linear(d_model, n_heads * (2 if rule == "delta" else 1))
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        """Heads start with memory lengths from 4 to 512 patches, evenly in the logarithm, and β = 1/2."""
        lengths = torch.logspace(0, 1, self.n_heads, base=LONGEST / SHORTEST) * SHORTEST
        self.gates.weight.zero_()
        self.gates.bias.zero_()
        self.gates.bias[: self.n_heads] = torch.log(lengths - 1)

    def log_decay(self, x: Tensor, plasticity: Tensor) -> Tensor:
        """log λ_t = log α + log λ(x_t): x [B, T, D] → [B, H, T] ≤ 0; −inf at α = 0."""
        return log_decays(self._gates(x)[..., : self.n_heads], plasticity)

    def _gates(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, T, rows of the gates]."""
        return float32_linear(x, self.gates.weight, self.gates.bias)

    def forward(
        self, x: Tensor, plasticity: Tensor, state: MemoryState | None = None, impl: str = "auto"
    ) -> tuple[Tensor, MemoryState]:
        """x [B, T, D] of any float type, plasticity α a scalar tensor in [0, 1] → heads [B, T, D], state;
        both float32, or float64 for a float64 model."""
        with torch.autocast(x.device.type, enabled=False):
            carried = None if state is None else (state.M, state.z)
            if impl == "auto" and self._packs(x, plasticity, carried):
                weight = torch.cat([self.qkv.weight, self.gates.weight])
                rest = self.gates.bias, plasticity, self.n_heads
                if joins(x, weight):
                    out, (M, z) = projected_hebbian(x, weight, *rest, state=carried)
                else:
                    out, (M, z) = packed_hebbian(float32_linear(x, weight), *rest, state=carried)
                return out, MemoryState(M, z)
            queries_keys, v = unpacked(float32_linear(x, self.qkv.weight), self.n_heads).split((2, 1))
            v = v[0]  # [B, H, T, E]
            gates = self._gates(x)
            log_decay, beta = log_decays(gates[..., : self.n_heads], plasticity), None
            if self.rule == "delta":
                beta = gates[..., self.n_heads :].transpose(1, 2).sigmoid()
            q, k = self._features(queries_keys)
            out, (M, z) = hebbian(q, k, v, log_decay, beta=beta, state=carried, impl=impl)

        def read(queries: Tensor) -> Tensor:
            # The writes come again with it: cheaper than the state at every position.
            with torch.autocast(queries.device.type, enabled=False):
                q = self._features(queries.to(k.dtype).unflatten(-1, (self.n_heads, -1)).transpose(1, 2))
                return hebbian(q, k, v, log_decay, beta=beta, state=carried, impl=impl)[0].transpose(1, 2).flatten(2)

        return out.transpose(1, 2).flatten(2), MemoryState(M, z, read if self.readable else None)

    def _packs(self, x: Tensor, plasticity: Tensor, carried: tuple[Tensor, Tensor] | None) -> bool:
        """Whether the operator reads the projection as it lies; who reads a state later needs its keys and values."""
        weights = self.qkv.weight, self.gates.weight, self.gates.bias
        fits = suits(x, self.n_heads, x.shape[-1] // self.n_heads, *weights, plasticity, *(carried or ()))
        return fits and self.rule == "hebbian" and not self.readable

    def _features(self, heads: Tensor) -> Tensor:
        """Of queries or keys [..., E]."""
        return F.normalize(heads, dim=-1) if self.rule == "delta" else F.elu(heads) + 1
