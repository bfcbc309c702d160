"""The key of a store: what was read and how. Local files count by content, so a moved file keeps its store.

Content hashes are remembered by (path, size, times, inode) in `<cache>/hashes.json`, so that a second run does not read
the files at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .errors import DataError
from .readers import expand_files, file_kind
from .sources import SourceSpec

FORMAT_VERSION = 1
# A file written twice within one tick of the file system's clock looks the same both times; wait out the tick.
_CLOCK_TICK_NS = 50_000_000


def source_key(spec: SourceSpec, cache: Path) -> tuple[str, Callable[[], bool]]:
    """(folder name for the store, function that says whether the source's files are still what was hashed).

    Raises DataError for files that are missing or cannot be read.
    """
    settings = spec.settings()
    del settings["files"]
    files = [path for path, _ in expand_files(spec.files)] if spec.files else []
    stamps = {path: _stamp(path) for path in files}
    content: object = None
    if files:
        kinds = [file_kind(path) for path in files]
        if all(kind == "text" for kind, _ in kinds):
            settings["column"] = settings["template"] = None  # they do nothing to text
        content = list(zip(kinds, _hashes(files, stamps, cache)))
    elif spec.builtin:
        from .pydoc import builtin_version

        content = [builtin_version(), platform.python_version()]
    text = json.dumps({"version": FORMAT_VERSION, "settings": settings, "content": content}, sort_keys=True)
    # A file's own name stays out: the same bytes under another name are the same store.
    label = "files" if files else spec.label
    readable = "".join(c if c.isascii() and c.isalnum() else "-" for c in label)
    name = f"{readable[:40]}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"
    return name, lambda: all(_stamp(path) == stamp for path, stamp in stamps.items())


def _stamp(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"file {path}: cannot be read: {error.strerror}") from error
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _hashes(files: list[Path], stamps: dict[Path, list[int]], cache: Path) -> list[str]:
    """SHA-256 of each file's raw bytes, from the memo where its stamp is unchanged."""
    memo_path = cache / "hashes.json"
    memo = _load_memo(memo_path)
    fresh, hashes = {}, []
    for path in files:
        name, stamp = str(path.resolve()), stamps[path]
        known = memo.get(name)
        if isinstance(known, list) and len(known) == 2 and known[0] == stamp:
            hashes.append(known[1])
            continue
        now = time.time_ns()
        hashes.append(_hash(path))
        if now - max(stamp[1], stamp[2]) > _CLOCK_TICK_NS and _stamp(path) == stamp:
            fresh[name] = [stamp, hashes[-1]]
    if fresh:
        _save_memo(memo_path, fresh)
    return hashes


def _hash(path: Path) -> str:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"file {path}: cannot be read: {error.strerror}") from error


def _load_memo(path: Path) -> dict:
    try:
        memo = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return memo if isinstance(memo, dict) else {}


def _save_memo(path: Path, fresh: dict) -> None:
    """Merge and replace. Two processes may lose each other's entries, which costs a hash, never a wrong key."""
    with suppress(OSError):
        handle, name = tempfile.mkstemp(prefix=".hashes-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump(_load_memo(path) | fresh, out)
            os.replace(name, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)
