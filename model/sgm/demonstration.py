"""The model that tasks are shown on when none is given."""

import torch
from torch import nn

from model.agiformer import AGIFormer
from model.config import AGIFormerConfig


def demonstration_model(head_dim: int = 512, seed: int = 0) -> AGIFormer:
    """A small AGIFormer that has learned nothing, whose blocks mix what they read at random (a reservoir).

    As they are made, the blocks of a new model pass everything on unchanged, and what its head reads would tell
    nothing of a prompt but its last bytes.
    """
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AGIFormer(
            AGIFormerConfig(
                d_model=64,
                n_layers=2,
                n_heads=2,
                ffn_dim=128,
                petals=2,
                byte_dim=32,
                reasoning_dim=64,
                thinking_steps=1,
                head_dim=head_dim,
            )
        )
        with torch.no_grad():
            for block in model.blocks:
                nn.init.normal_(block.output.weight, std=block.output.in_features**-0.5)
                nn.init.normal_(block.hull.groups[0].down, std=model.config.ffn_dim**-0.5)
    finally:
        torch.set_rng_state(state)
    return model.eval()
