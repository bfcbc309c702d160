"""Rotary position phases (Su et al. 2021), counted in patches."""

import torch
from torch import Tensor, nn

from model.kernels.qk_rotary import Phases, rotate

__all__ = ["Phases", "Rotary", "rotate"]


class Rotary(nn.Module):
    """Phases for heads of width E at patch positions `offset … offset + T − 1`.

    The angle is formed in float64: at a million patches float32 would be off by tenths of a radian, and
    streaming has no longest context.
    """

    def __init__(self, head_width: int, base: float):
        super().__init__()
        # Kept out of the module's buffers so that `.half()` or a checkpoint cannot round it, and made on the CPU
        # even when the module is built on the meta device.
        exponents = torch.arange(0, head_width, 2, dtype=torch.float64, device="cpu") / head_width
        self._frequencies = base**-exponents

    def forward(self, T: int, offset: int | Tensor, device: torch.device) -> Phases:
        """(cos, sin), each [T, 1, E / 2] in float32, to broadcast over heads of [..., T, H, E].

        `offset` may be a tensor [] on the device: a captured step goes on counting."""
        if self._frequencies.device != device:
            self._frequencies = self._frequencies.to(device)
        positions = torch.arange(T, dtype=torch.float64, device=device) + offset
        angles = torch.outer(positions, self._frequencies)
        return angles.cos().float().unsqueeze(1), angles.sin().float().unsqueeze(1)
