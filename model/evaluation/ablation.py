"""What is left of a model without its memory: the same weights with what the fast weights hand on zeroed, and how far
back the bytes are that attention alone can carry to a prediction.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model.agiformer import AGIFormer
from model.layers.block import HybridBlock
from model.layers.byte_memory import ByteMemory
from model.layers.memory import HebbianMemory
from model.layers.pyramid import Node

MEMORIES = (HebbianMemory, ByteMemory)  # whose forward returns what it hands on, and its state


@contextmanager
def without_memory(model: nn.Module) -> Iterator[None]:
    """Inside the with-block all fast weights of the model hand on exact zeros: those of every block, and of the head.

    Their states are written as ever, from what reaches them: the first block's is what it would have been. Afterwards,
    also after an exception, the model is what it was. May be nested.
    """
    hooks = [module.register_forward_hook(_silence) for module in model.modules() if isinstance(module, MEMORIES)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _silence(module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    handed_on, state = output
    if getattr(state, "read", None) is not None:
        state = replace(state, read=torch.zeros_like)
    return torch.zeros_like(handed_on), state


def attention_reach(model: AGIFormer) -> int:
    """Bytes: no byte further back than this reaches a prediction except through the fast weights.

    (window − 1) patches for each attention on the longest path through the trunk, then the byte's own way in and out:
    one patch because a latent predicts the patch after its own, P − 1 bytes inside that, and the encoder's overlap.
    """
    config = model.config
    stack, columns = 0, [0] * len(model.columns)
    for i, block in enumerate(model.blocks):
        stack += _attentions(block)
        # A column reads the stack at every layer; the stack reads no column, and no column another one.
        columns = [max(seen, stack) + _attentions(column.blocks[i]) for seen, column in zip(columns, model.columns)]
    path = max([stack, *columns])
    return path * (config.window - 1) * config.patch_size + 2 * config.patch_size - 1 + config.patch_overlap


def _attentions(tree: HybridBlock | Node) -> int:
    """Attentions one after another in a block of blocks: its leaf's, and its nodes'."""
    return 1 + max(_attentions(tree.left), _attentions(tree.right)) if isinstance(tree, Node) else 1
