"""LocalAutoregressiveHead: a GRU that writes the bytes of a patch from its latent, and a memory of what it has read."""

import torch
from torch import Tensor, nn

from model.kernels import byte_head
from model.kernels.gru import gru_cell, gru_patch
from model.layers.byte_memory import BEGIN, ByteMemory
from model.layers.norm import NORM_EPS, rms_norm

__all__ = ["BEGIN", "LocalAutoregressiveHead"]


class LocalAutoregressiveHead(nn.Module):
    """GRU over the bytes of a patch (Cho et al. 2014); first state and inputs conditioned on the latent.

    Byte j of a patch is predicted after the byte before it, so that byte 0 also sees the last byte of the patch before.
    The input weights act on a byte only through an embedding, and on the latent once per patch: neither costs a
    matrix product per byte.

    Attributes:
        memory: votes beside the GRU by what it has read (`ByteMemory`), or None.
        joined: whether states and logits may be one operation (`byte_head`). Its backward pass is all of it, so not
            where the gradient of `output` is asked for by itself.
    """

    def __init__(self, d_model: int, head_dim: int, memory: ByteMemory | None = None):
        super().__init__()
        self.initial = nn.Linear(d_model, head_dim)
        self.condition = nn.Linear(d_model, 3 * head_dim)  # latent → input of reset, update and candidate gates
        self.bytes = nn.Embedding(257, 3 * head_dim)  # previous byte → the same inputs
        self.recurrent = nn.Linear(head_dim, 3 * head_dim)
        self.output = nn.Linear(head_dim, 256)
        self.d_model = d_model
        self.columns = nn.ModuleList()  # what reads the channels of added columns: `add_column`
        self.memory = memory
        self.joined = True

    @torch.no_grad()
    def reset(self) -> None:
        """Uniform predictions."""
        self.output.weight.zero_()
        self.bytes.weight.mul_(0.5)

    def add_column(self, width: int) -> None:
        """Read `width` more channels of the latent, through weights that start at exactly 0."""
        column = nn.Linear(width, self.initial.out_features + self.condition.out_features, bias=False)
        column.weight.data.zero_()
        self.columns.append(column)

    def begin(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """latent [..., D] → (hidden [..., head_dim], inputs from the latent [..., 3·head_dim])."""
        widths = [self.d_model, *(column.in_features for column in self.columns)]
        latent, *added = (rms_norm(part.contiguous()) for part in latent.split(widths, -1))
        initial, conditioned = self.initial(latent), self.condition(latent)
        for column, part in zip(self.columns, added):
            more = column(part).split((initial.shape[-1], conditioned.shape[-1]), -1)
            initial, conditioned = initial + more[0], conditioned + more[1]
        return initial.tanh(), conditioned

    def step(self, previous: Tensor, hidden: Tensor, conditioned: Tensor) -> Tensor:
        """Read one byte: previous [...] in 0…256, hidden [..., head_dim] → the next hidden."""
        return gru_cell(self.bytes(previous.long()) + conditioned, self.recurrent(hidden), hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., head_dim] → logits of the next byte [..., 256], float32 at least."""
        logits = self.output(rms_norm(hidden))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def states(self, latents: Tensor, previous: Tensor) -> Tensor:
        """latents [B, T, D], previous [B, T, P] the byte before each byte → hidden [B, T, P, head_dim]."""
        hidden, conditioned = self.begin(latents)
        return gru_patch(hidden, conditioned, self.bytes.weight, previous, self.recurrent)

    def forward(
        self,
        latents: Tensor,
        previous: Tensor,
        writes: list[Tensor] | None = None,
        told: Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced, from the start of a text: latents [B, T, D], previous [B, T, P] the byte before each byte →
        logits [B, T, P, 256]. To `writes`, if given, the memory's writing strengths [B, H, T · P] are appended;
        `told` [B, T · P] bool marks bytes of which its text heads write nothing down."""
        layers = self.initial, self.condition, self.recurrent, self.output
        if self.joined and not self.columns and byte_head.fits(latents, previous, self.bytes.weight, layers):
            normed, remember = rms_norm(latents.contiguous()), self.memory is not None
            logits, hidden = byte_head.byte_head(normed, previous, self.bytes.weight, layers, NORM_EPS, states=remember)
        else:
            hidden = self.states(latents, previous)
            logits = self.logits(hidden)
        if self.memory is not None:
            recalled, _ = self.memory(hidden.flatten(1, 2), previous.flatten(1), writes=writes, told=told)
            logits = logits + recalled.view_as(logits)
        return logits
