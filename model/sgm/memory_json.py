"""A memory's entries as JSON: what `export` writes and `import` reads."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from model.sgm.memory_entry import Entry, calendar_day, check_integer, checked

FORMAT, VERSION = "agiformer.memory", 1
MAX_ACCESSES = 2**53 - 1  # that every reader of JSON keeps exactly, with room in the database to count on
_NAMES = [field.name for field in fields(Entry)]


def exported(entries: Sequence[Entry]) -> bytes:
    """The content of a file that holds the entries."""
    data = {"format": FORMAT, "version": VERSION, "entries": [asdict(entry) for entry in entries]}
    return (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode()


def read_export(path: str | os.PathLike) -> list[Entry]:
    """The entries of an exported file.

    Raises:
        ValueError: the file cannot be read or is no export, with the entry that is wrong.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"import {path}: {error.strerror or error}; accepted is a readable file") from None
    except (ValueError, RecursionError):
        raise ValueError(f"import {path}: not JSON; accepted is a file that export wrote") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("entries"), list):
        raise ValueError(f"import {path}: no export of a memory; accepted is a file that export wrote")
    if data.get("version") != VERSION:
        raise ValueError(f"import {path}: version {data.get('version')!r}; accepted is {VERSION}")
    entries = []
    for number, values in enumerate(data["entries"], 1):
        try:
            entries.append(_entry(values))
        except ValueError as error:
            raise ValueError(f"import {path}: entry {number}: {error}") from None
    return entries


def _entry(values: object) -> Entry:
    if not isinstance(values, dict) or set(values) != set(_NAMES):
        raise ValueError(f"accepted is an object with {', '.join(_NAMES)}")
    entry = Entry(**values)
    text = checked(entry.text, entry.kind, entry.confidence, entry.source)
    for name in ("created", "accessed"):
        calendar_day(getattr(entry, name), name)
    check_integer("accesses", entry.accesses, 0, math.inf)
    return replace(entry, text=text, accesses=min(entry.accesses, MAX_ACCESSES))
