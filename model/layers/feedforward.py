"""The feed-forward layer of a block."""

from torch import Tensor, nn


class FeedForward(nn.Module):
    """[..., D] → [..., D] through `hidden` squared-ReLU units (So et al. 2021)."""

    def __init__(self, d_model: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        # Not .square(): autocast runs powers in float32, four times the memory traffic of this product.
        return self.down(hidden * hidden)
