"""AGIFormer: bytes in, logits of the same bytes out; its loss; and the state that carries it along a stream.

    Bytes → ByteLatentEncoder → HybridBlock × n → RecurrentReasoningBlock → LocalAutoregressiveHead → logits
            (patches)           (window attention   (thinking steps)         (GRU over a patch)
                                 + fast weights)

Notable: the sequence of latents begins with a learned start latent, so that position i of the trunk has read
exactly the patches before patch i and predicts it. Nothing is padded or shifted inside the trunk.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import AGIFormerConfig
from model.layers.block import BlockState, HybridBlock
from model.layers.encoder import ByteLatentEncoder
from model.layers.head import BEGIN, LocalAutoregressiveHead
from model.layers.reasoning import RecurrentReasoningBlock


@dataclass
class TrunkState:
    """What the blocks carry from patch to patch: one BlockState a block, and the number of positions read."""

    blocks: list[BlockState]
    position: int

    def clone(self) -> "TrunkState":
        return TrunkState([block.clone() for block in self.blocks], self.position)


class AGIFormer(nn.Module):
    """The byte-level language model. `AGIFormer(AGIFormerConfig.preset("small"))`."""

    def __init__(self, config: AGIFormerConfig):
        super().__init__()
        self.config = config
        D = config.d_model
        self.encoder = ByteLatentEncoder(
            D, config.byte_dim, config.patch_size, config.patch_overlap, D // config.n_heads, config.rope_base
        )
        self.start = nn.Parameter(torch.empty(D))
        self.blocks = nn.ModuleList(
            HybridBlock(D, config.n_heads, config.window, config.ffn_dim, config.memory_rule)
            for _ in range(config.n_layers)
        )
        self.reasoning = RecurrentReasoningBlock(D, config.reasoning_dim, config.thinking_steps)
        self.head = LocalAutoregressiveHead(D, config.head_dim)
        self.plasticity: Tensor
        self.register_buffer("plasticity", torch.tensor(float(config.plasticity)))
        initialise(self)

    def set_plasticity(self, alpha: float) -> None:
        """Set α, the multiplier on every memory's decay, in [0, 1]; kept in checkpoints. No synchronisation."""
        if not 0 <= alpha <= 1:
            raise ValueError(f"plasticity={alpha!r}: accepted is a number from 0 to 1")
        self.plasticity.fill_(alpha)

    def forward(self, x: Tensor, *, thinking_steps: int | None = None, halt_threshold: float | None = None) -> Tensor:
        """Logits aligned with their input: `logits[:, t]` predicts `x[:, t]` from `x[:, :t]`.

        Args:
            x: [B, L] bytes as any integer type, L ≥ 1.
            thinking_steps: K for this call; the configured number when None.
            halt_threshold: see RecurrentReasoningBlock; None in training.

        Returns:
            [B, L, 256] float32.
        """
        self._check_bytes(x)
        L, P = x.shape[1], self.config.patch_size
        T = -(-L // P)  # patches to predict; the last one may be partial and is never read
        start = self.start.expand(x.shape[0], 1, -1)
        if T > 1:
            # Under autocast the encoder's output, and with it the residual stream, is half precision.
            rest = self.encoder(x[:, : (T - 1) * P])
            start = torch.cat([start.to(rest.dtype), rest], 1)
        z, _ = self.trunk(start)
        z = self.reasoning(z, thinking_steps, halt_threshold)
        return self.head(z, self.previous_bytes(x)).flatten(1, 2)[:, :L]

    def loss(self, x: Tensor, *, thinking_steps: int | None = None) -> Tensor:
        """Mean cross-entropy of x [B, L] in nats per byte, a scalar; BPC is this over ln 2."""
        logits = self(x, thinking_steps=thinking_steps)
        return F.cross_entropy(logits.flatten(0, 1), x.flatten().long())

    def trunk(self, latents: Tensor, state: TrunkState | None = None) -> tuple[Tensor, TrunkState]:
        """Run the blocks over latents [B, T, D] that follow `state` → [B, T, D] and the state after them."""
        offset = 0 if state is None else state.position
        phases = self.encoder.phases(latents.shape[1], offset, latents.device)
        states = []
        for i, block in enumerate(self.blocks):
            latents, block_state = block(latents, phases, self.plasticity, None if state is None else state.blocks[i])
            states.append(block_state)
        return latents, TrunkState(states, offset + latents.shape[1])

    def previous_bytes(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """The byte before each byte, by patch: x [B, L] → [B, ceil(L/P), P] int64.

        `before` [B, 1] is the byte before x, or None at the start of a text. What fills up a partial last patch only
        reaches logits that the caller cuts off.
        """
        P = self.config.patch_size
        before = torch.full_like(x[:, :1], BEGIN, dtype=torch.long) if before is None else before.long()
        shifted = torch.cat([before, x[:, :-1].long()], 1)
        return F.pad(shifted, (0, -x.shape[1] % P)).unflatten(1, (-1, P))

    @staticmethod
    def _check_bytes(x: Tensor) -> None:
        if x.dim() != 2 or x.numel() < 1 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}: accepted are integer bytes [B, L], both ≥ 1")
        # On a GPU looking at the values would wait for it; there the embedding's own assertion has to do.
        if x.device.type == "cpu" and x.dtype != torch.uint8 and (x.min() < 0 or x.max() > 255):
            raise ValueError(f"x has values from {x.min()} to {x.max()}: accepted are bytes from 0 to 255")

    def parameter_count(self) -> int:
        """Number of trainable values."""
        return sum(parameter.numel() for parameter in self.parameters())


@torch.no_grad()
def initialise(model: AGIFormer) -> None:
    """Unit-variance features, and every residual branch and the output start at zero (docs/results.md says why)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    nn.init.normal_(model.start)
    for block in model.blocks:
        block.output.weight.zero_()
        block.feedforward.down.weight.zero_()
        block.gate.weight.zero_()
        block.memory.reset_gates()
    model.reasoning.mlp.down.weight.zero_()
    model.reasoning.gate.weight.zero_()
    model.reasoning.halt.weight.zero_()
    model.reasoning.halt.bias.fill_(model.reasoning.HALT_BIAS)
    model.head.output.weight.zero_()
    model.head.bytes.weight.mul_(0.5)
