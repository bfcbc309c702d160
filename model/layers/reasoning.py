"""RecurrentReasoningBlock: the same small network applied to a latent several times (System 2)."""

import torch
from torch import Tensor, nn

from model.layers.feedforward import FeedForward
from model.layers.norm import rms_norm


class RecurrentReasoningBlock(nn.Module):
    """z ← z + (1 − p_halt) · g(z) ⊙ MLP(norm(z)), K times with the same weights (DESIGN: RecurrentReasoningBlock).

    p_halt = sigmoid(w · norm(z) + b) is one number per position and step, g = sigmoid(G norm(z) + c) one per channel.
    """

    HALT_BIAS = -3.0  # p_halt starts near 0.05: thinking begins switched on

    def __init__(self, d_model: int, hidden: int, steps: int):
        super().__init__()
        self.steps = steps
        self.gate = nn.Linear(d_model, d_model)
        self.halt = nn.Linear(d_model, 1)
        self.mlp = FeedForward(d_model, hidden)

    @torch.no_grad()
    def reset(self) -> None:
        """A step changes nothing yet; its gates are even; thinking is switched on."""
        self.mlp.down.weight.zero_()
        self.gate.weight.zero_()
        self.halt.weight.zero_()
        self.halt.bias.fill_(self.HALT_BIAS)

    def step(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """One thinking step: z [B, T, D] → Δz [B, T, D] and p_halt [B, T, 1]."""
        normed = rms_norm(z)
        p_halt = self.halt(normed).sigmoid()
        return (1 - p_halt) * self.gate(normed).sigmoid() * self.mlp(normed), p_halt

    def forward(self, z: Tensor, steps: int | None = None, halt_threshold: float | None = None) -> Tensor:
        """z [B, T, D] → [B, T, D].

        Args:
            steps: K for this call, 0 or more; the configured number when None.
            halt_threshold: a position stops changing once its p_halt reaches this, and the loop ends when all
                have (inference only: it looks at the values). None runs all K steps.
        """
        steps = self.steps if steps is None else steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"thinking_steps={steps!r}: accepted is an integer ≥ 0")
        active = None
        for _ in range(steps):
            delta, p_halt = self.step(z)
            if halt_threshold is not None:
                going_on = p_halt < halt_threshold
                active = going_on if active is None else active & going_on
                if not active.any():
                    break
                delta = delta * active
            z = z + delta
        return z
