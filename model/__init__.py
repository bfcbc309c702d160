"""AGIFormer: a byte-level language model with fast weights, a thinking loop and a curriculum.

The public names are loaded when they are first asked for: importing the package for its command-line helpers does not
wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_HOMES = {
    "AGIFormer": "model.agiformer",
    "AGIFormerConfig": "model.config",
    "ByteStream": "model.inference.stream",
    "CheckpointError": "model.training.checkpoint",
    "find_checkpoint": "model.training.checkpoint",
    "load_checkpoint": "model.training.checkpoint",
    "save_checkpoint": "model.training.checkpoint",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
