"""Layout of a weight store: which weights lie where, and the bits that are kept of them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.sgm.store_files import seal, sha256, unseal

VERSION = 1
DTYPES = {"float32": (torch.float32, np.uint32), "float16": (torch.float16, np.uint16)}  # and integers of equal bits


class Layout:
    """Names, shapes and kind of N weights, as layout.json has them.

    Attributes:
        described: the bytes of layout.json; sha256: theirs.
        shapes: name → shape, in the order in which they lie.
        dtype: "float32" or "float16"; float: the same for NumPy; bits: integers of as many bits.
        count: N.

    Raises:
        StoreDamaged: when the bytes fail their check.
        ValueError: when they are of a version that is not known.
    """

    def __init__(self, described: bytes, path: Path):
        self.path, self.described, self.sha256 = path, described, sha256(described)
        found = unseal(described, path / "layout.json")
        if found["version"] != VERSION:
            raise ValueError(f"store {path}: version {found['version']}; accepted is {VERSION}")
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in found["layout"]}
        self.dtype = found["dtype"]
        self._torch_dtype, self.bits = DTYPES[self.dtype]
        self.float = np.dtype(self.dtype)
        self._places = {name: place for place, name in enumerate(self.shapes)}
        self._offsets = np.cumsum([0, *map(math.prod, self.shapes.values())])
        self.count = int(self._offsets[-1])

    @classmethod
    def made(cls, shapes: dict[str, tuple[int, ...]], dtype: str, path: Path) -> "Layout":
        """A new one; ValueError for bad shapes or dtype."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: accepted is one of {', '.join(DTYPES)}")
        described = {"version": VERSION, "dtype": dtype, "layout": list(_checked_layout(shapes).items())}
        return cls(seal(described), path)

    def range_of(self, name: str) -> slice:
        """Where the weights of `name` lie."""
        if name not in self.shapes:
            raise ValueError(f"name={name!r}: accepted is one of the store's {len(self.shapes)} names (see names())")
        start = int(self._offsets[self._places[name]])
        return slice(start, start + math.prod(self.shapes[name]))

    def where(self, index: int) -> str:
        """Name and place of a weight, such as "blocks.0.up[3, 1]"."""
        place = int(np.searchsorted(self._offsets, index, "right")) - 1
        name, shape = list(self.shapes.items())[place]
        within = np.unravel_index(int(index) - int(self._offsets[place]), shape)
        return name + (str([int(axis) for axis in within]) if within else "")

    def stored(self, values: Tensor) -> np.ndarray:
        """The bits [N] that are kept of `values`; ValueError where they do not fit."""
        kinds = (torch.float32, torch.float16, torch.bfloat16)
        if not isinstance(values, Tensor) or values.dtype not in kinds or tuple(values.shape) != (self.count,):
            accepted = f"a float32, float16 or bfloat16 tensor of shape [{self.count}]"
            raise ValueError(f"values={outline(values)}: accepted is {accepted}")
        values = values.detach().cpu().contiguous()
        bits = values.to(self._torch_dtype).numpy().view(self.bits)
        if self.dtype == "float16" and ((bits & 0x7FFF) == 0x7C00).any():  # ±∞, which may have been a number
            lost = np.flatnonzero(((bits & 0x7FFF) == 0x7C00) & values.isfinite().numpy())
            if len(lost):
                first = f"{self.where(lost[0])} = {values[lost[0]].item():g}"
                raise ValueError(
                    f"values: {len(lost)} are beyond float16, the first is {first}; accepted is up to ±65504"
                )
        return bits

    def check_module(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The module's parameters by name; ValueError when names, shapes or order are others."""
        parameters = dict(module.named_parameters())
        for index, name in enumerate(parameters):
            if name not in self.shapes:
                raise ValueError(f"module: parameter {name!r} is not in the store {self.path}")
            if tuple(parameters[name].shape) != self.shapes[name]:
                shapes = f"{list(parameters[name].shape)}, in the store {self.path} {list(self.shapes[name])}"
                raise ValueError(f"module: parameter {name!r} has the shape {shapes}")
            if self._places[name] != index:
                raise ValueError(f"module: parameter {name!r} is number {index}, in the store {self._places[name]}")
        if len(parameters) < len(self.shapes):
            missing = next(name for name in self.shapes if name not in parameters)
            raise ValueError(f"module: has no parameter {missing!r}, which is in the store {self.path}")
        return parameters


def _checked_layout(layout: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    if not isinstance(layout, dict):
        raise ValueError(f"layout={layout!r}: accepted is a dict of names and shapes")
    for name, shape in layout.items():
        if not isinstance(name, str) or not name or not encodable(name):
            raise ValueError(f"layout: name {name!r}: accepted is a text that is not empty")
        sizes = shape if isinstance(shape, (tuple, list)) else [None]
        if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes):
            raise ValueError(f"layout: shape {shape!r} of {name!r}: accepted are integers ≥ 0")
    return {name: tuple(shape) for name, shape in layout.items()}


def checked_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """A copy of JSON values; ValueError for others."""
    if not isinstance(meta, dict):
        raise ValueError(f"meta={meta!r}: accepted is a dict of JSON values")
    try:
        return json.loads(json.dumps(meta))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"meta: {error}; accepted is a dict of JSON values") from error


def encodable(text: str) -> bool:
    """Whether a text is not empty and UTF-8 can hold it."""
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def outline(value: object) -> str:
    """Kind and shape of what was given instead of a tensor that fits."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
