"""ByteMemory: fast weights over bytes, from a context to the byte that followed it; always in float32.

The blocks' fast weights see patches, and a text repeats itself at any byte: what stood at one place of a patch comes
back at another. Here every byte's context is the state of the byte head before it, wherever in its patch it stands.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import hebbian
from model.layers.norm import rms_norm

SHORTEST, LONGEST = 256.0, 262_144.0  # bytes: the heads' memory lengths 1 / (1 − λ) at initialisation


@dataclass
class ByteMemoryState:
    """The fast weights M [B, H, E, E], their normaliser z [B, H, E], and the key [B, H, E] of the byte read last."""

    M: Tensor
    z: Tensor
    key: Tensor

    def clone(self) -> "ByteMemoryState":
        return ByteMemoryState(self.M.clone(), self.z.clone(), self.key.clone())

    def tensors(self) -> list[Tensor]:
        """All tensors of the state."""
        return [self.M, self.z, self.key]


class ByteMemory(nn.Module):
    """Associates each context with the byte that followed it, and votes for what followed the like of this one.

    With h_t the head's state that predicts byte t, and v its byte's embedding::

        write   key(h_{t−1}) → v(x_{t−1})      with strength β(h_t) in [0, 1], once byte t − 1 has been read
        read    query(h_t)                     → logits of byte t

    A cache of contexts and what followed them (Grave et al. 2017), of fixed size, as fast weights (Schlag et al. 2021)
    under the gated delta rule: the last value of a key counts. Keys and queries begin as the same projection, so that
    a context recalls its like before anything has been learned. β reaches exactly 0 and 1 (a stretched sigmoid, as in
    Louizos et al. 2018): what is not written cannot wear off what was, over any distance.

    Args:
        head_dim: width of h.
        heads, dim: H and E.
        rule: "delta" or "hebbian", as in `HebbianMemory`.
        patch_size: P; plasticity α is forgotten by per patch, as in the blocks: α^(1/P) a byte.
    """

    STRETCH = 0.05  # β = clip((1 + 2 s) sigmoid − s, 0, 1)

    def __init__(self, head_dim: int, heads: int, dim: int, rule: str, patch_size: int):
        super().__init__()
        self.heads, self.rule, self.patch_size = heads, rule, patch_size
        self.queries = nn.Linear(head_dim, heads * dim, bias=False)
        self.keys = nn.Linear(head_dim, heads * dim, bias=False)
        self.values = nn.Embedding(257, heads * dim)  # of the byte before; 256 is "none yet", whose key is 0
        self.gates = nn.Linear(head_dim, 3 * heads)  # decay, writing strength, reading strength
        self.output = nn.Linear(heads * dim, 256, bias=False)

    @torch.no_grad()
    def reset(self) -> None:
        """Keys are queries; nothing is said yet; memory lengths evenly in the logarithm; half strength."""
        self.keys.weight.copy_(self.queries.weight)
        self.output.weight.zero_()
        self.gates.weight.zero_()
        self.gates.bias.zero_()
        lengths = torch.logspace(0, 1, self.heads, base=LONGEST / SHORTEST) * SHORTEST
        self.gates.bias[: self.heads] = torch.log(lengths - 1)

    def forward(
        self,
        hidden: Tensor,
        previous: Tensor,
        plasticity: Tensor,
        state: ByteMemoryState | None = None,
        impl: str = "auto",
    ) -> tuple[Tensor, ByteMemoryState]:
        """One read for every byte, and the writes that lie before it.

        Args:
            hidden: [B, L, head_dim], states that predict each byte, of any float type.
            previous: [B, L] the byte before each, 256 for none.
            plasticity: α, a scalar tensor in [0, 1].

        Returns:
            What is added to the logits [B, L, 256], and the state; float32, or float64 for a float64 model.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            h = rms_norm(hidden.to(dtype))
            q, k = (self._heads(F.linear(h, linear.weight.to(dtype))) for linear in (self.queries, self.keys))
            v = self._heads(F.embedding(previous.long(), self.values.weight.to(dtype)))
            gates = F.linear(h, self.gates.weight.to(dtype), self.gates.bias.to(dtype)).transpose(1, 2)
            decay, write, read = gates.split(self.heads, 1)
            log_decay = plasticity.to(dtype).log() / self.patch_size + F.logsigmoid(decay)
            beta = ((1 + 2 * self.STRETCH) * write.sigmoid() - self.STRETCH).clamp(0, 1)
            if self.rule == "delta":
                q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            else:
                q, k = F.elu(q) + 1, F.elu(k) + 1
            # What is written at a byte is the context before the byte before it.
            last = k.new_zeros(k[:, :, 0].shape) if state is None else state.key.to(dtype)
            written = torch.cat([last.unsqueeze(2), k[:, :, :-1]], 2)
            carried = None if state is None else (state.M, state.z)
            if self.rule == "delta":
                out, (M, z) = hebbian(q, written, v, log_decay, beta=beta, state=carried, impl=impl)
            else:
                written = written * beta.unsqueeze(-1)
                out, (M, z) = hebbian(q, written, v, log_decay, state=carried, impl=impl)
            out = out * (2 * read.sigmoid()).unsqueeze(-1)
            logits = F.linear(out.transpose(1, 2).flatten(2), self.output.weight.to(dtype))
            return logits, ByteMemoryState(M, z, k[:, :, -1])

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, H · E] → [B, H, L, E]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
