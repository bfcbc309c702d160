"""RecurrentReasoningBlock: the same small network applied to a latent several times (System 2)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.kernels.norms import think
from model.kernels.transforms import hooked
from model.layers.feedforward import FeedForward
from model.layers.norm import NORM_EPS, READ_EPS, rms_norm, rms_norm_heads

Read = Callable[[Tensor], Tensor]  # queries [B, T, D] → what fast weights hold for them, [B, T, D]


class RecurrentReasoningBlock(nn.Module):
    """z ← z + (1 − p_halt) · g(z) ⊙ f(norm(z)), K times with the same weights (DESIGN: RecurrentReasoningBlock).

    p_halt = sigmoid(w · norm(z) + b) is one number per position and step, g = sigmoid(G norm(z) + c) one per channel.
    f is an MLP; with `heads`, f(n) = MLP(n) + O norm(read(Q n)), a look into fast weights with a fresh query.

    Args:
        d_model: D.
        hidden: units of the MLP.
        steps: K.
        skip: in training a row takes K to K − skip steps, drawn evenly.
        heads: of the fast weights that are read, each read normalised for itself; 0 reads nothing.
    """

    HALT_BIAS = -3.0  # p_halt starts near 0.05: thinking begins switched on

    def __init__(self, d_model: int, hidden: int, steps: int, skip: int = 0, heads: int = 0):
        super().__init__()
        self.steps, self.skip, self.heads = steps, skip, heads
        self.gate = nn.Linear(d_model, d_model)
        self.halt = nn.Linear(d_model, 1)
        self.mlp = FeedForward(d_model, hidden)
        self.query = nn.Linear(d_model, d_model, bias=False) if heads else None
        self.recall = nn.Linear(d_model, d_model, bias=False) if heads else None

    @torch.no_grad()
    def reset(self) -> None:
        """A step changes nothing yet; its gates are even; thinking is switched on."""
        self.mlp.down.weight.zero_()
        self.gate.weight.zero_()
        self.halt.weight.zero_()
        self.halt.bias.fill_(self.HALT_BIAS)
        if self.recall is not None:
            self.recall.weight.zero_()

    def step(self, z: Tensor, read: Read | None = None) -> tuple[Tensor, Tensor]:
        """One thinking step by itself: z [B, T, D] → Δz [B, T, D] and p_halt [B, T, 1]."""
        normed = rms_norm(z)
        p_halt = self.halt(normed).sigmoid()
        return (1 - p_halt) * self.gate(normed).sigmoid() * self._thought(normed, normed, read), p_halt

    def _thought(self, normed: Tensor, asking: Tensor, read: Read | None) -> Tensor:
        """f(norm(z)), [B, T, D]; `asking` is norm(z) as well."""
        thought = self.mlp(normed)
        if self.recall is not None:
            found = rms_norm_heads(read(self.query(asking)), self.heads, READ_EPS)
            thought = thought + self.recall(found.to(asking.dtype))
        return thought

    def forward(
        self,
        z: Tensor,
        steps: int | None = None,
        halt_threshold: float | None = None,
        read: Read | None = None,
        halts: list[Tensor] | None = None,
    ) -> Tensor:
        """z [B, T, D] → [B, T, D].

        Args:
            steps: K for this call, 0 or more; the configured number when None.
            halt_threshold: a position stops changing once its p_halt reaches this, and the loop ends when all
                have (inference only: it looks at the values). None runs all K steps.
            read: of the fast weights, where `heads` is not 0.
            halts: if given, p_halt [B, T, 1] of every step is appended to it; 1 where a row skips the step.
        """
        steps = self.steps if steps is None else steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"thinking_steps={steps!r}: accepted is an integer ≥ 0")
        skipped = None
        if self.training and self.skip:
            skipped = torch.randint(0, self.skip + 1, (len(z), 1, 1), device=z.device)
        # What ends a step and begins the next is one pass over z.
        weights, readers = (self.halt.weight, self.halt.bias), 2 if self.recall is None else 3
        z, *begun = think(z, None, weights if steps else None, NORM_EPS, readers)
        active = None
        for k in range(steps):
            halt, for_gate, *normed = begun
            if hooked(self.halt):
                halt = self.halt(normed[0])
            # All steps are computed, so that shapes stay as they are: where p_halt is 1 a step changes nothing.
            if skipped is not None:
                halt = torch.where(k < steps - skipped, halt, math.inf)
            if halts is not None:
                halts.append(halt.sigmoid())
            if halt_threshold is not None:
                going_on = halt.sigmoid() < halt_threshold
                active = going_on if active is None else active & going_on
                if not active.any():
                    break
                halt = torch.where(active, halt, math.inf)
            step = halt, self.gate(for_gate), self._thought(normed[0], normed[-1], read)
            z, *begun = think(z, step, weights if k + 1 < steps else None, NORM_EPS, readers)
        return z
