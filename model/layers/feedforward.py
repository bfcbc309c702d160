"""The feed-forward layer of the reasoning block."""

from torch import Tensor, nn

from model.kernels.elementwise import squared_relu


class FeedForward(nn.Module):
    """[..., D] → [..., D] through `hidden` squared-ReLU units (So et al. 2021)."""

    def __init__(self, d_model: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(squared_relu(self.up(x)))
