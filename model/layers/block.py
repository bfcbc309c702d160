"""HybridBlock: window attention and fast weights read the same input, a learned gate fuses them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import AGIFormerConfig
from model.kernels import fusion
from model.layers.attention import AttentionState, WindowAttention
from model.layers.hull import HullLayer
from model.layers.memory import HebbianMemory, MemoryState
from model.layers.norm import NORM_EPS, READ_EPS, add_rms_norm
from model.layers.rotary import Phases


@dataclass
class BlockState:
    """Streaming state of a block: its window cache and its fast weights."""

    attention: AttentionState
    memory: MemoryState

    def clone(self) -> "BlockState":
        return BlockState(self.attention.clone(), self.memory.clone())

    def tensors(self) -> list[Tensor]:
        """All tensors of the state."""
        return [*self.attention.tensors(), *self.memory.tensors()]


class HybridBlock(nn.Module):
    """x + fuse(attention, memory), then + hull; pre-norm (DESIGN: HybridBlock).

    Both mixers' heads are normalised to the same size, gated per channel by γ = sigmoid(W norm(x) + b), and share one
    output projection: γ ⊙ attention + (1 − γ) ⊙ memory (parallel heads as in Dong et al. 2024, with a gate).
    """

    def __init__(self, d_model: int, n_heads: int, config: AGIFormerConfig):
        super().__init__()
        window, memory_rule = config.window, config.memory_rule
        self.n_heads = n_heads
        self.recall_eps = READ_EPS if memory_rule == "delta" else NORM_EPS
        self.attention = WindowAttention(d_model, n_heads, window)
        self.memory = HebbianMemory(d_model, n_heads, memory_rule)
        self.gate = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model, bias=False)
        # A narrower block of an added column has a narrower hull.
        budget = max(1, config.ffn_dim * d_model // config.d_model)
        self.hull = HullLayer(d_model, config.petals, budget, config.hull)

    @torch.no_grad()
    def reset(self) -> None:
        """Nothing is added to the residual stream yet; an even gate; the memory's range of lengths."""
        self.output.weight.zero_()
        self.gate.weight.zero_()
        self.memory.reset_gates()

    def forward(
        self, x: Tensor, phases: Phases, plasticity: Tensor, state: BlockState | None = None
    ) -> tuple[Tensor, BlockState]:
        """x [B, T, D], phases of its positions, α, and the state before x → [B, T, D], the state after it."""
        x, for_attention, for_memory, for_gate = add_rms_norm(x, readers=3)
        attended, attention_state = self.attention(for_attention, phases, None if state is None else state.attention)
        recalled, memory_state = self.memory(for_memory, plasticity, None if state is None else state.memory)
        x, normed = add_rms_norm(x, self.output(self.fuse(for_gate, attended, recalled)))
        x = x + self.hull(normed)
        return x, BlockState(attention_state, memory_state)

    def fuse(self, x: Tensor, attended: Tensor, recalled: Tensor) -> Tensor:
        """γ ⊙ norm(attended) + (1 − γ) ⊙ norm(recalled); all [B, T, D]."""
        return fusion.fuse(self.gate(x), attended, recalled, self.n_heads, NORM_EPS, self.recall_eps)
