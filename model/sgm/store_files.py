"""Files of a weight store: how they are sealed, named and read, and what is wrong with one that fails its check.

A text carries its own SHA-256 (`seal`), a head word a check of its generation (`head_word`), and a safetensors file a
record with the SHA-256 of itself and the tensors (`pack`). model.sgm.storage says which files there are.
"""

import contextlib
import hashlib
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as deserialise
from safetensors.numpy import save as serialise

SEAL = len('{"sha256": "", ') + 64  # bytes before what a sealed text holds


class StoreDamaged(ValueError):
    """A file of a store is missing or fails its check; the message names it."""


def head_word(generation: int) -> int:
    """The head's word of a generation: itself, and 24 bits that check it."""
    return generation << 24 | zlib.crc32(generation.to_bytes(5, "little")) & 0xFFFFFF


def sha256(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def read(file: Path) -> bytes:
    """All of a file; StoreDamaged when it is missing."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise StoreDamaged(f"store {file.parent}: {file.name} is missing") from None


def seal(values: dict[str, Any]) -> bytes:
    """JSON that carries its own SHA-256."""
    text = json.dumps(values).encode()
    return b'{"sha256": "%s", ' % sha256(text).encode() + text[1:]


def unseal(data: bytes, file: Path) -> dict[str, Any]:
    """What `seal` was given; StoreDamaged naming the file when it fails its check."""
    text = b"{" + data[SEAL:]
    if data[:SEAL] != b'{"sha256": "%s", ' % sha256(text).encode():
        raise StoreDamaged(f"store {file.parent}: {file.name} fails its check")
    return json.loads(text)


def write(handle: int, data: bytes | np.ndarray, offset: int) -> None:
    """Write all of the data to an open file from `offset` on."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def pack(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> bytes:
    """A safetensors file whose record carries the SHA-256 of itself and the tensors."""
    return serialise(tensors, {"record": json.dumps({"sha256": _tensors_check(tensors, record)} | record)})


def unpack(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    """Tensors and record of a file of `pack`, and the SHA-256 of all its bytes."""
    data = read(file)
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        tensors, record = deserialise(data), json.loads(header["__metadata__"]["record"])
        whole = record.pop("sha256") == _tensors_check(tensors, record)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise StoreDamaged(f"{file.parent.name[:-1]} {file}: fails its check")
    return tensors, record, sha256(data)


def _tensors_check(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> str:
    check = hashlib.sha256(json.dumps(record).encode())
    for name, tensor in sorted(tensors.items()):
        check.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        check.update(tensor)
    return check.hexdigest()


def segment_file(path: Path, number: int) -> Path:
    """Of a store's lock; the first has number 1."""
    return path / "segments" / f"{number:06d}.safetensors"


def snapshot_file(path: Path, name: str) -> Path:
    """Of a store's snapshot; ValueError for a name that is not accepted."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+ -]*", name) or len(name.encode()) > 200:
        accepted = "letters, digits, '_', and after the first also '.', '-', '+' and spaces; at most 200 bytes"
        raise ValueError(f"name={name!r}: accepted are {accepted}")
    return path / "snapshots" / f"{name}.safetensors"


def read_snapshot(path: Path, name: str) -> tuple[dict[str, Any], np.ndarray]:
    """Record and weights [N] of a store's snapshot.

    Raises:
        ValueError: when there is no such snapshot.
        StoreDamaged: when it fails its check.
    """
    file = snapshot_file(path, name)
    if not file.is_file():
        raise ValueError(f"name={name!r}: there is no such snapshot in the store {path}")
    tensors, record, _ = unpack(file)
    return record, tensors["weights"].copy()  # what was read cannot be written to


def newest_snapshot(path: Path) -> str:
    """The name of a store's newest snapshot that passes its check; StoreDamaged when there is none."""
    found = []
    for file in (path / "snapshots").glob("[!.]*.safetensors"):
        with contextlib.suppress(StoreDamaged):
            found.append((unpack(file)[1]["generation"], file.stem))
    if not found:
        raise StoreDamaged(f"store {path}: has no snapshot that is whole")
    return max(found)[1]


def runs_of(indices: np.ndarray) -> np.ndarray:
    """[R, 2] start and stop of the maximal runs in ascending indices."""
    last = np.flatnonzero(np.diff(indices) != 1)
    starts = indices[np.concatenate([[0], last + 1])] if len(indices) else indices
    stops = indices[np.concatenate([last, [len(indices) - 1]])] + 1 if len(indices) else indices
    return np.stack([starts, stops], axis=1)


def indices_of(tensors: dict[str, np.ndarray], count: int) -> np.ndarray:
    """Ascending indices, int64, of a segment's runs or bits."""
    if "bits" in tensors:
        return np.flatnonzero(np.unpackbits(tensors["bits"], count=count).view(bool))  # bools are faster
    starts, stops = tensors["runs"].T
    lengths = stops - starts
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())


def lock_digest(task: str, indices: np.ndarray, stored: np.ndarray) -> str:
    """SHA-256 of a lock: whose it is, the places of its weights, and their bits."""
    check = hashlib.sha256(task.encode())
    check.update(np.ascontiguousarray(indices, "<i8"))
    check.update(stored)
    return check.hexdigest()
