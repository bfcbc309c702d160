"""ByteLatentEncoder: bytes in, one latent per patch out, and the rotary phases of their positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers.rotary import Phases, Rotary

NOTHING = 256  # what stands before the first byte, embedded as zero


class ByteLatentEncoder(nn.Module):
    """Byte embedding and a causal patch projection with left overlap (DESIGN: ByteLatentEncoder).

    A patch of P bytes is projected together with the last `overlap` bytes of the patch before it: a
    convolution of kernel P + overlap and stride P. Before the first byte the overlap is zero, not a byte.
    """

    def __init__(self, d_model: int, byte_dim: int, patch_size: int, overlap: int, head_width: int, rope_base: float):
        super().__init__()
        self.patch_size = patch_size
        self.overlap = overlap
        self.embedding = nn.Embedding(256, byte_dim)
        self.projection = nn.Linear((patch_size + overlap) * byte_dim, d_model, bias=False)
        self.columns = nn.ModuleList()  # projections to the channels of added columns
        self.rotary = Rotary(head_width, rope_base)

    def forward(self, x: Tensor, previous: Tensor | None = None) -> Tensor:
        """Whole patches to latents.

        Args:
            x: [B, T·P] integer bytes.
            previous: [B, overlap] the bytes before x, or None at the start of the text.

        Returns:
            [B, T, D], and behind D the channels of added columns.
        """
        if previous is None:
            x = F.pad(x.long(), (self.overlap, 0), value=NOTHING)
        else:
            x = torch.cat([previous, x], 1).long()
        # The bytes are laid out as patches before they are embedded: an index is small, what it gathers is not. On a
        # card the table is cast, not that, to what autocast makes of the projection's input, where that is bfloat16:
        # a CPU would add up its gradient in that type, and sums over all of a frequent byte are too large for float16.
        table = F.pad(self.embedding.weight, (0, 0, 0, 1))
        half = torch.get_autocast_dtype("cuda") if x.is_cuda and torch.is_autocast_enabled("cuda") else None
        if half == torch.bfloat16 and table.dtype == torch.float32:
            table = table.to(half)
        patches = F.embedding(x.unfold(1, self.patch_size + self.overlap, self.patch_size), table).flatten(2)
        latents = self.projection(patches)
        if self.columns:
            latents = torch.cat([latents, *(column(patches) for column in self.columns)], -1)
        return latents

    def add_column(self, width: int) -> None:
        """Project every patch to `width` more channels, behind those that are there."""
        self.columns.append(nn.Linear(self.projection.in_features, width, bias=False))

    def phases(self, T: int, offset: int | Tensor, device: torch.device) -> Phases:
        """Rotary phases of patch positions offset … offset + T − 1: (cos, sin), each [T, 1, E / 2]."""
        return self.rotary(T, offset, device)
