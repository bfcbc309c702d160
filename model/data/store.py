"""Documents encoded once into a memory-mapped file of bytes, with an index of where each document starts.

A store is a folder `<cache>/stores/<key>/` of data.bin (documents, each followed by a blank line), offsets.bin
(int64, n_documents + 1 values) and meta.json. It is written beside its final name and renamed into place, so it is
whole or absent however the writer ends; one process builds while others wait for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from model.files import sync_folder

from .errors import DataError
from .keys import FORMAT_VERSION, source_key
from .sources import SEPARATOR, SourceSpec, iter_documents

VAL_SHARE = 0.05
VAL_RANGE = (0.01, 0.15)
STALE_SECONDS = 3600
_TEMPORARY = ".building-"
_FLUSH = 1 << 16


class ByteStore:
    """A store on disk, opened read-only; making one costs milliseconds whatever its size.

    data         uint8 [n_bytes], memory-mapped: every document followed by b"\\n\\n"
    offsets      int64 [n_documents + 1]: where documents start; the last is n_bytes
    train, val   uint8 views of `data` before and from `split_byte`: disjoint, together everything
    split_byte   the byte where val starts; meta["split_rule"] says how it was chosen
    n_documents  documents
    meta         name, key, sha256 of the data, settings, counts, split and format version
    path         the store's folder

    Raises DataError when the folder is not a whole store of this format version.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self.meta = json.loads((self.path / "meta.json").read_text("utf-8"))
            if self.meta["version"] != FORMAT_VERSION:
                raise DataError(f"store {self.path}: format {self.meta['version']}, accepted is {FORMAT_VERSION}")
            self.n_documents, n_bytes = self.meta["n_documents"], self.meta["n_bytes"]
            self.split_byte = self.meta["split_byte"]
            for name, size in (("data.bin", n_bytes), ("offsets.bin", 8 * (self.n_documents + 1))):
                actual = (self.path / name).stat().st_size
                if actual != size:
                    raise DataError(f"store {self.path}: {name} has {actual} bytes, meta.json says {size}")
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"store {self.path}: not a whole store ({type(error).__name__}: {error})") from error
        self.data = np.memmap(self.path / "data.bin", np.uint8, "r")
        self.offsets = np.memmap(self.path / "offsets.bin", np.int64, "r")
        ordered = self.offsets[0] == 0 and self.offsets[-1] == n_bytes and bool((np.diff(self.offsets) > 0).all())
        if not ordered or not 0 < self.split_byte < n_bytes:
            raise DataError(f"store {self.path}: its offsets do not fit its data")
        self.train, self.val = self.data[: self.split_byte], self.data[self.split_byte :]

    def __repr__(self) -> str:
        train, val = self.split_byte, self.meta["n_bytes"] - self.split_byte
        return f"ByteStore({self.meta['name']!r}, {self.n_documents} documents, {train} + {val} bytes)"


def open_store(spec: SourceSpec, cache_dir: str | os.PathLike | None = None, progress: bool = True) -> ByteStore:
    """The store of a source: opened if it exists and is whole, else built.

    `cache_dir` defaults to the environment's AGIFORMER_CACHE, else ~/.cache/agiformer. A bar on stderr shows the build
    when `progress`. Raises DataError for a source that cannot be read or that has fewer than 2 bytes of text.
    """
    cache = Path(cache_dir or os.environ.get("AGIFORMER_CACHE") or "~/.cache/agiformer").expanduser()
    stores = cache / "stores"
    try:
        stores.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cache folder {cache}: cannot be used: {error.strerror}") from error
    key, unchanged = source_key(spec, cache)
    path = stores / key
    if store := _open_if_whole(path):
        return store
    with _build_lock(stores / f".lock-{key}", spec.label, progress):
        if store := _open_if_whole(path):
            return store
        _remove_stale(stores)
        folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=stores))
        try:
            _write(folder, spec, key, progress)
            if not unchanged():
                raise DataError(f"source {spec.label}: its files changed while they were read; run again")
            _publish(folder, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return ByteStore(path)


def choose_split(data: np.ndarray, offsets: np.ndarray) -> tuple[int, str]:
    """(first byte of val, rule) for uint8 [n] data and its int64 document offsets.

    The document boundary nearest to 95% of the bytes ("document"). When that would make val less than 1% or more than
    15% of them, the line start nearest to 95% inside those limits ("line"); when there is none within a mebibyte,
    95% itself ("byte").
    """
    n = len(data)
    target = min(max(round(n * (1 - VAL_SHARE)), 1), n - 1)
    low, high = n * (1 - VAL_RANGE[1]), n * (1 - VAL_RANGE[0])
    inner = offsets[1:-1]
    if len(inner):
        at = int(np.searchsorted(inner, target))
        best = min((int(b) for b in inner[max(0, at - 1) : at + 1]), key=lambda b: abs(b - target))
        if low <= best <= high:
            return best, "document"
    begin = max(int(np.ceil(low)), target - (1 << 20), 1)
    end = min(int(high), target + (1 << 20), n - 1)
    lines = np.flatnonzero(data[begin - 1 : max(begin - 1, end)] == 10) + begin
    if len(lines):
        return int(lines[np.argmin(np.abs(lines - target))]), "line"
    return target, "byte"


def _open_if_whole(path: Path) -> ByteStore | None:
    if not path.is_dir():
        return None
    try:
        return ByteStore(path)
    except DataError as error:
        print(f"{error}; building it again", file=sys.stderr)
        return None


def _write(folder: Path, spec: SourceSpec, key: str, progress: bool) -> None:
    """Stream the documents into `folder`, then the split and the metadata; everything is on disk when it returns."""
    digest, position, text_bytes, n_documents = hashlib.sha256(), 0, 0, 0
    pending = array("q", [0])
    with open(folder / "data.bin", "wb") as data, open(folder / "offsets.bin", "wb") as offsets:
        for document in _with_bar(iter_documents(spec), spec.label, progress):
            piece = document + SEPARATOR
            data.write(piece)
            digest.update(piece)
            position += len(piece)
            text_bytes += len(document)
            n_documents += 1
            pending.append(position)
            if len(pending) >= _FLUSH:
                pending.tofile(offsets)
                del pending[:]
        pending.tofile(offsets)
        if text_bytes < 2:
            raise DataError(f"source {spec.label}: it has {text_bytes} bytes of text; at least 2 are needed")
        _sync(data)
        _sync(offsets)
    split_byte, rule = choose_split(
        np.memmap(folder / "data.bin", np.uint8, "r"), np.fromfile(folder / "offsets.bin", np.int64)
    )
    meta = {
        "version": FORMAT_VERSION,
        "name": spec.label,
        "key": key,
        "sha256": digest.hexdigest(),
        "settings": spec.settings(),
        "n_documents": n_documents,
        "n_bytes": position,
        "text_bytes": text_bytes,
        "split_byte": split_byte,
        "split_rule": rule,
        "val_share": (position - split_byte) / position,
    }
    with open(folder / "meta.json", "w", encoding="utf-8") as out:
        json.dump(meta, out, ensure_ascii=True, indent=1)
        _sync(out)
    sync_folder(folder)


def _with_bar(documents: Iterator[bytes], label: str, progress: bool) -> Iterator[bytes]:
    if not progress:
        yield from documents
        return
    from tqdm import tqdm

    with tqdm(desc=f"encoding {label}", unit="B", unit_scale=True, unit_divisor=1000) as bar:
        waiting = 0
        for document in documents:
            waiting += len(document) + len(SEPARATOR)
            if waiting >= 1 << 16:  # a call per short document would cost more than writing it
                bar.update(waiting)
                waiting = 0
            yield document
        bar.update(waiting)


def _publish(folder: Path, path: Path) -> None:
    """Rename into place. A broken store in the way is moved aside; a whole one, built meanwhile, wins."""
    for _ in range(2):
        try:
            os.replace(folder, path)
            sync_folder(path.parent)
            return
        except OSError:
            if not path.is_dir():
                raise
            with suppress(DataError):
                ByteStore(path)
                return
            aside = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=path.parent))
            os.replace(path, aside / "broken")
            shutil.rmtree(aside, ignore_errors=True)
    raise DataError(f"store {path}: cannot be replaced")


def _remove_stale(stores: Path) -> None:
    """Delete what killed builds left behind, once nothing in it has been written for an hour."""
    for folder in stores.glob(_TEMPORARY + "*"):
        with suppress(OSError):
            newest = max([folder.stat().st_mtime, *(p.stat().st_mtime for p in folder.iterdir())])
            if time.time() - newest > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _build_lock(path: Path, label: str, progress: bool) -> Iterator[None]:
    """One builder per store, freed by the system if it dies. Without locks, the rename alone keeps it safe."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"waiting for another process that encodes {label}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def _sync(stream) -> None:
    stream.flush()
    os.fsync(stream.fileno())
