"""AGIFormer: a byte-level language model with fast weights, a thinking loop and a curriculum."""

from model.agiformer import AGIFormer
from model.config import AGIFormerConfig
from model.inference.stream import ByteStream
from model.training.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, save_checkpoint

__all__ = [
    "AGIFormer",
    "AGIFormerConfig",
    "ByteStream",
    "CheckpointError",
    "find_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]
