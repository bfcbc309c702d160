"""Checkpoints: one safetensors file with the weights, the config, and (optionally) all of the training state.

Writes are atomic: a file is complete under its name or it is not there. Nothing is ever unpickled: `.pth`
files are read with `weights_only=True`.

Layout: tensors `model.<name>` (parameters and buffers) and `training.<name>`, and one header entry, `agiformer`: JSON
of `version`, `config` and `training`. One, because safetensors writes several in any order, and equal states should
be equal files.
"""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from model.agiformer import AGIFormer
from model.config import HULLS, MEMORY_RULES, PRESETS, AGIFormerConfig
from model.files import write_atomically

FORMAT = "agiformer"
VERSION = 1


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint; the message is one line that names it."""


def save_checkpoint(
    model: AGIFormer,
    path: str | os.PathLike,
    *,
    tensors: dict[str, Tensor] | None = None,
    values: dict[str, Any] | None = None,
) -> Path:
    """Write model and training state to `path`, atomically.

    Args:
        model: its parameters, buffers and config are saved.
        path: the file; `.safetensors` by convention. Its folder is made when missing.
        tensors: training tensors by name (optimizer moments, scaler state).
        values: JSON-able training values (step, seed, positions).
    """
    contents = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    contents |= {f"training.{name}": tensor for name, tensor in (tensors or {}).items()}
    # Views of one flat buffer must not be written as shared storage: each becomes its own copy.
    contents = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in contents.items()}
    header = {"version": VERSION, "config": model.config.to_dict(), "training": values or {}}
    return write_atomically(path, serialise(contents, {FORMAT: json.dumps(header)}))


def load_checkpoint(
    path: str | os.PathLike, device: str | torch.device = "cpu", *, config: AGIFormerConfig | None = None
) -> AGIFormer:
    """The model saved at `path`, in eval mode on `device`.

    A `.pth` or `.pt` file holds a state dict, or {"config": {...}, "model": state dict}; without a config in it or
    given here, the preset whose shapes fit is taken.

    Raises:
        CheckpointError: when the file is missing, truncated, not a checkpoint, or does not fit its config.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    if path.suffix in (".pth", ".pt"):
        weights, config = _read_pickle(path, config)
    else:
        weights, header = _read(path, "model.")
        config = config or _read_config(path, header.get("config"))
    try:
        with torch.device("meta"):
            model = AGIFormer(config)
        model = model.to_empty(device=device)
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:  # weights, or a growth log, that do not fit
        raise CheckpointError(f"checkpoint {path}: {_first_line(error)}") from None
    return model.eval()


def load_training_state(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, values) as they were given to `save_checkpoint`; both empty for a file with weights alone."""
    tensors, header = _read(Path(path), "training.")
    return tensors, header.get("training", {})


def load_training_values(path: str | os.PathLike) -> dict[str, Any]:
    """The values of `load_training_state` alone, from the header: no tensor is read."""
    return _read(Path(path), None)[1].get("training", {})


def find_checkpoint(name: str | os.PathLike, folder: str = "checkpoints") -> Path:
    """`name` itself if it is a file, else the file of that bare name in `folder`."""
    path = Path(name)
    if path.is_file():
        return path
    if path.name == str(name) and (Path(folder) / path).is_file():
        return Path(folder) / path
    raise CheckpointError(
        f"checkpoint {name}: no such file, here or in {folder}/ (train one: python train_curriculum.py)"
    )


def _read(path: Path, prefix: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors whose names begin with `prefix`, without it (none for None), and the header's values."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise CheckpointError(f"checkpoint {path}: a safetensors file, but not written by this project")
            header = json.loads(metadata[FORMAT])
            if header["version"] > VERSION:
                raise CheckpointError(f"checkpoint {path}: version {header['version']}, accepted are up to {VERSION}")
            if prefix is None:
                return {}, header
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}, header
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path}: no such file") from None
    except CheckpointError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: damaged or not a checkpoint ({_first_line(error)})") from None


def _read_pickle(path: Path, config: AGIFormerConfig | None) -> tuple[dict[str, Tensor], AGIFormerConfig]:
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load fails in many ways on damaged or unsafe files; all of them mean the same to a user.
        raise CheckpointError(f"checkpoint {path}: not a weights-only state dict ({_first_line(error)})") from None
    if not isinstance(contents, dict):
        raise CheckpointError(f"checkpoint {path}: holds a {type(contents).__name__}, accepted is a state dict")
    weights = contents.get("model", contents)
    if not isinstance(weights, dict):
        raise CheckpointError(f"checkpoint {path}: its model is a {type(weights).__name__}, accepted is a state dict")
    if "config" in contents and config is None:
        config = _read_config(path, contents["config"])
    if config is None:
        config = _fitting_preset(path, weights)
    weights = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    weights.setdefault("plasticity", torch.tensor(float(config.plasticity)))
    return weights, config


def _read_config(path: Path, values: Any) -> AGIFormerConfig:
    if not isinstance(values, dict):
        raise CheckpointError(f"checkpoint {path}: its config is a {type(values).__name__}, accepted is a dict")
    try:
        return AGIFormerConfig.from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None


def _fitting_preset(path: Path, weights: dict[str, Tensor]) -> AGIFormerConfig:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    shapes.pop("plasticity", None)
    for preset, rule, hull in itertools.product(PRESETS.values(), MEMORY_RULES, HULLS):
        candidate = replace(preset, memory_rule=rule, hull=hull)
        with torch.device("meta"):
            expected = AGIFormer(candidate).state_dict()
        expected.pop("plasticity")
        if shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}:
            return candidate
    raise CheckpointError(
        f"checkpoint {path}: its shapes fit no preset ({', '.join(PRESETS)}); save it with its config"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
