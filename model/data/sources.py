"""Where text comes from: local files, a data set on the hub, or the built-in text; always as a stream of documents.

A document is a `bytes` without its separator. Rows of tables become documents through one column or through a template
such as "{word}: {meaning}".
"""

from __future__ import annotations

import dataclasses
import os
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import readers
from .errors import DataError, one_line

BUILTINS = ("pydoc.names", "pydoc.short", "pydoc.long")
SEPARATOR = b"\n\n"


@dataclass(frozen=True)
class SourceSpec:
    """What to read. Exactly one of `files`, `hub` and `builtin` is given.

    files       local files, globs or folders, in reading order; a single string is taken for a tuple of one
    hub         id of a data set on the hub, such as "roneneldan/TinyStories"
    config      its configuration, such as "20231101.tr"                      (hub only)
    hub_files   the data files inside it                                      (hub only)
    split       its split                                                     (hub only)
    revision    a branch, tag or commit of it                                 (hub only)
    column      the column of a table that holds the text; ignored for text files and where there is a template
    template    text with column names in braces; "{{" and "}}" are braces
    builtin     "pydoc.names", "pydoc.short" or "pydoc.long"
    max_bytes   stop before the document that would pass this many bytes, separators counted

    Raises DataError naming field, value and what is accepted.
    """

    files: tuple[str, ...] = ()
    hub: str | None = None
    config: str | None = None
    hub_files: str | None = None
    split: str = "train"
    column: str | None = "text"
    template: str | None = None
    builtin: str | None = None
    revision: str | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        files = (self.files,) if isinstance(self.files, str | os.PathLike) else self.files
        if not isinstance(files, tuple | list) or not all(isinstance(f, str | os.PathLike) and str(f) for f in files):
            raise _bad("files", self.files, "a path, glob or folder, or a list of them")
        object.__setattr__(self, "files", tuple(os.fspath(f) for f in files))
        for name in ("hub", "config", "hub_files", "column", "template", "builtin", "revision"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise _bad(name, value, "a non-empty string, or None")
        if not (isinstance(self.split, str) and self.split):
            raise _bad("split", self.split, "a non-empty string")
        if self.builtin is not None and self.builtin not in BUILTINS:
            raise _bad("builtin", self.builtin, ", ".join(BUILTINS))
        if self.max_bytes is not None and (
            isinstance(self.max_bytes, bool) or not isinstance(self.max_bytes, int) or self.max_bytes < 2
        ):
            raise _bad("max_bytes", self.max_bytes, "an integer of at least 2 bytes, or None")
        self._check_combination()

    def _check_combination(self) -> None:
        given = [name for name in ("files", "hub", "builtin") if getattr(self, name)]
        if len(given) != 1:
            values = {name: getattr(self, name) for name in given}
            raise DataError(f"source {values}: accepted is exactly one of files, hub and builtin")
        if not self.hub:
            for name, default in (("config", None), ("hub_files", None), ("revision", None), ("split", "train")):
                if getattr(self, name) != default:
                    raise _bad(name, getattr(self, name), "a value only together with hub")
        if self.template is not None:
            _template_parts(self.template)
        elif self.column is None:
            raise _bad("column", None, "a column name, unless there is a template")

    @property
    def label(self) -> str:
        """A short name for bars, errors and metadata: the file, hub id or built-in."""
        if self.files:
            more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
            return f"{Path(self.files[0]).name or self.files[0]}{more}"
        return self.hub or self.builtin

    def settings(self) -> dict:
        """Every field as plain JSON values."""
        return dataclasses.asdict(self) | {"files": list(self.files)}


def iter_documents(spec: SourceSpec) -> Iterator[bytes]:
    """The documents of a source, in order, without separators, one in memory at a time.

    Raises DataError for a missing, unreadable or empty source, naming it, and for a column that is not in the data,
    naming those that are.
    """
    documents = _documents(spec)
    return documents if spec.max_bytes is None else _limited(documents, spec.max_bytes)


def _documents(spec: SourceSpec) -> Iterator[bytes]:
    if spec.builtin:
        from .pydoc import builtin_documents

        yield from builtin_documents(spec.builtin)
    elif spec.hub:
        yield from _row_documents(_hub_rows(spec), spec, f"hub {spec.hub}")
    else:
        for path, named in readers.expand_files(spec.files):
            empty = True
            for document in _file_documents(path, spec):
                empty = False
                yield document
            # A stray empty file in a folder is no reason to refuse the folder.
            if empty and named:
                raise DataError(f"file {path}: it is empty; at least one document is needed")


def _file_documents(path: Path, spec: SourceSpec) -> Iterator[bytes]:
    if readers.file_kind(path)[0] == "text":
        return readers.text_documents(path)
    if path.is_file() and path.stat().st_size == 0:
        return iter(())
    return _row_documents(readers.table_rows(path), spec, f"file {path}")


def _hub_rows(spec: SourceSpec) -> Iterator[dict]:
    load_dataset = readers.import_datasets(f"hub {spec.hub}").load_dataset
    try:
        yield from load_dataset(
            spec.hub,
            spec.config,
            data_files=spec.hub_files,
            split=spec.split,
            revision=spec.revision,
            streaming=True,
        )
    except DataError:
        raise
    except Exception as error:  # network, hub and Arrow errors share no base class
        raise DataError(f"hub {spec.hub}: cannot be read: {one_line(error)}") from error


def _row_documents(rows: Iterable[dict], spec: SourceSpec, where: str) -> Iterator[bytes]:
    """Rows as documents; a row in which a wanted column is empty is left out."""
    if spec.template is None:
        wanted, field, render = [spec.column], "column", lambda values: values[0]
    else:
        parts = _template_parts(spec.template)
        wanted, field, render = [name for _, name in parts if name is not None], "template", _renderer(parts)
    for number, row in enumerate(rows):
        if number == 0 and (missing := [name for name in wanted if name not in row]):
            raise DataError(f"{where}: {field} needs {', '.join(missing)}; its columns are {', '.join(row)}")
        values = [_as_bytes(row.get(name), name, where) for name in wanted]
        if all(values):
            yield render(values)


def _as_bytes(value, name: str, where: str) -> bytes:
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if isinstance(value, list | dict):
        raise DataError(f"{where}: column {name} holds a {type(value).__name__}; accepted are text and numbers")
    # JSON may hold half of a surrogate pair, which has no place in strict UTF-8.
    return str(value).encode("utf-8", "surrogatepass")


def _template_parts(template: str) -> list[tuple[bytes, str | None]]:
    """[(literal bytes, column or None)]; raises DataError unless it names at least one column and nothing fancier."""
    accepted = 'text with column names in braces, such as "{word}: {meaning}"'
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise _bad("template", template, f"{accepted} ({error})") from error
    if any(spec or conversion or name == "" for _, name, spec, conversion in parts):
        raise _bad("template", template, accepted)
    if not any(name for _, name, _, _ in parts):
        raise _bad("template", template, accepted)
    return [(literal.encode(), name) for literal, name, _, _ in parts]


def _renderer(parts: list[tuple[bytes, str | None]]) -> Callable[[list[bytes]], bytes]:
    def render(values: list[bytes]) -> bytes:
        rest = iter(values)
        return b"".join(literal + (b"" if name is None else next(rest)) for literal, name in parts)

    return render


def _limited(documents: Iterator[bytes], max_bytes: int) -> Iterator[bytes]:
    """Documents until the next would pass `max_bytes`; a first document longer than that is cut."""
    total = 0
    for document in documents:
        size = len(document) + len(SEPARATOR)
        if total + size > max_bytes:
            if total == 0:
                yield document[: max(1, max_bytes - len(SEPARATOR))]
            return
        total += size
        yield document


def _bad(field: str, value, accepted: str) -> DataError:
    return DataError(f"source field {field}={value!r}: accepted is {accepted}")
