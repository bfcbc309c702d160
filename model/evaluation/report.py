"""What the evaluation scripts share: argument checks, the device, text tables, and files written whole."""

import json
import math
from typing import Any

import torch


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError, naming argument, value and what is accepted, unless `value` is an integer ≥ `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: accepted is an integer ≥ {least}")


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is a card, else the CPU.

    Raises:
        ValueError: for a name that is no device, or a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    accepted = ["auto", "cpu", *(["cuda"] if cards else []), *(f"cuda:{i}" for i in range(cards))]
    if name not in accepted:
        raise ValueError(f"--device {name}: accepted here are {', '.join(accepted)}")
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Triton launches on the current one
    return device


def number(value: float | None, digits: int = 3) -> str:
    """A table's cell: fixed digits; "-" for what was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Lines of aligned columns, the first flush left and the others flush right, without trailing spaces."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths)))
        for line in lines
    )


def json_text(data: Any) -> str:
    """JSON of plain values; NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_plain(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
