"""Local files as bytes, documents or rows.

Text never becomes a Python string: a file is decompressed in pieces and cut at blank lines, so that NULs, invalid UTF-8
and CRLF come back exactly as they were. Joining the documents of a file with a blank line gives the file back, less one
blank line at its end. gz and xz need only the standard library; zst needs `zstandard`; CSV and Parquet need `datasets`.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DataError, one_line

PIECE = 1 << 20
COMPRESSED = (".gz", ".xz", ".zst")
TABLES = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
BLANK_LINES = re.compile(rb"\n{2,}")


def file_kind(path: str | os.PathLike) -> tuple[str, str]:
    """(format, compression) by extension, such as ("csv", ".gz"); an unknown extension is ("text", "")."""
    suffixes = [s.lower() for s in Path(path).suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    return TABLES.get(suffixes[-1] if suffixes else "", "text"), packed


def expand_files(entries: Iterable[str]) -> list[tuple[Path, bool]]:
    """Paths in reading order, each with whether it was named outright (True) or found by a folder or glob (False).

    A folder means every file under it, at any depth, that is not hidden and, unless compressed or a table, has no
    zero byte in its first 8 KiB (pictures, checkpoints and the like lie beside text); folders and globs are read in
    sorted order, and a file that comes up twice is read once. Raises DataError for an entry that matches nothing.
    """
    found: dict[Path, bool] = {}
    for entry in entries:
        path = Path(entry).expanduser()
        if path.is_dir():
            inside = (p for p in path.rglob("*") if not any(q.startswith(".") for q in p.relative_to(path).parts))
            files = sorted(p for p in inside if p.is_file())
            matches, named = [p for p in files if not _looks_binary(p)], False
            if not matches:
                raise DataError(f"folder {entry}: it holds no files of text; a binary file must be named itself")
        elif path.exists():
            matches, named = [path], True
        else:
            matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            named = False
            if not matches:
                raise DataError(f"file {entry}: no such file, folder or glob match")
        for match in matches:
            found.setdefault(match, named)
    return list(found.items())


def _looks_binary(path: Path) -> bool:
    if file_kind(path) != ("text", ""):
        return False
    try:
        with open(path, "rb") as stream:
            return b"\0" in stream.read(8192)
    except OSError:
        return False  # reading it will say what is wrong with it


def open_pieces(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file in pieces of about a mebibyte. Raises DataError naming the path."""
    packed = file_kind(path)[1]
    try:
        if packed == ".zst":
            yield from _zst_pieces(path)
            return
        with {".gz": gzip.open, ".xz": lzma.open}.get(packed, open)(path, "rb") as stream:
            while piece := stream.read(PIECE):
                yield piece
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        reason = "it is truncated" if isinstance(error, EOFError) else reason
        raise DataError(f"file {path}: cannot be read: {reason}") from error


def _zst_pieces(path: Path) -> Iterator[bytes]:
    """Frames one by one, because zstandard's stream reader takes a truncated frame for a finished one."""
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"file {path}: .zst needs the package zstandard; .gz and .xz need nothing") from error
    factory = zstandard.ZstdDecompressor()
    frame = None
    try:
        with open(path, "rb") as stream:
            while piece := stream.read(PIECE):
                while piece:
                    frame = frame or factory.decompressobj()
                    yield frame.decompress(piece)
                    piece = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise DataError(f"file {path}: cannot be read: {one_line(error)}") from error
    if frame is not None:
        raise DataError(f"file {path}: cannot be read: it is truncated")


def split_documents(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Cut a stream of bytes at blank lines (b"\\n\\n"); one document at a time is held in memory.

    The last two newlines of a longer run are the separator and the rest stays with the document before it, so no byte
    is lost and no document is empty. Newlines at the very start stay with the first document.
    """
    buffer, scan, first = bytearray(), 0, True
    for piece in itertools.chain(pieces, [None]):
        buffer += piece or b""
        start = 0
        resume = len(buffer) - (buffer[-1:] == b"\n")
        # bytes() of a match, not the match, outlives the loop: a live scanner would forbid resizing the buffer.
        for begin, end in [match.span() for match in BLANK_LINES.finditer(buffer, scan)]:
            if end == len(buffer) and piece is not None:
                resume = begin  # the run may go on in the next piece
            elif begin > 0 or not first:
                yield bytes(buffer[start : end - 2])
                start, first = end, False
        del buffer[:start]
        scan = max(0, resume - start)
    if buffer.strip(b"\n") or (buffer and not first):
        yield bytes(buffer)


def text_documents(path: Path) -> Iterator[bytes]:
    """The documents of a text file, byte for byte. Raises DataError naming the path."""
    return split_documents(open_pieces(path))


def table_rows(path: Path) -> Iterator[dict]:
    """The rows of a json, jsonl, csv, tsv or parquet file, compressed or not. Raises DataError naming the path."""
    kind = file_kind(path)[0]
    return _json_rows(path) if kind == "json" else _arrow_rows(path, kind)


def _json_rows(path: Path) -> Iterator[dict]:
    """JSON Lines, or one JSON value, whichever the bytes turn out to be.

    The standard library reads them, not Arrow, which would turn a column of ISO dates into timestamps and refuse a
    column whose type changes from one row to the next.
    """
    stream = io.BufferedReader(_PieceStream(open_pieces(path)), PIECE)
    try:
        head = stream.readline()
        while head and not head.strip():
            head = stream.readline()
        head = head.removeprefix(b"\xef\xbb\xbf")
        number = 1
        try:
            rows = None if head.lstrip().startswith(b"[") else [json.loads(head)] if head else []
        except ValueError:
            rows = None
        if rows is None:
            value = json.loads(head + stream.read())
            rows = value if isinstance(value, list) else [value]
        for row in rows:
            yield _json_object(path, number, row)
            number += 1
        for line in stream:
            if line.strip():
                yield _json_object(path, number, json.loads(line))
            number += 1
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"file {path}: not valid JSON near row {number}: {one_line(error)}") from error


def _json_object(path: Path, number: int, row) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"file {path}: row {number} is a {type(row).__name__}; rows must be JSON objects")
    return row


def _arrow_rows(path: Path, kind: str) -> Iterator[dict]:
    """CSV and Parquet through `datasets`, streaming."""
    load_dataset = import_datasets(f"file {path}").load_dataset
    options = {}
    if kind == "csv":
        options = _csv_options(path)
    with _plain_copy(path, kind) as plain:
        try:
            yield from load_dataset(kind, data_files=[str(plain)], split="train", streaming=True, **options)
        except DataError:
            raise
        except Exception as error:  # Arrow, pandas and datasets share no base class
            raise DataError(f"file {path}: cannot be read as {kind}: {one_line(error)}") from error


def _csv_options(path: Path) -> dict:
    """Every column as a string: type inference would turn "007" into 7 and "NA" into nothing."""
    from datasets import Features, Value

    delimiter = "\t" if ".tsv" in [s.lower() for s in path.suffixes] else ","
    stream = io.BufferedReader(_PieceStream(open_pieces(path)), PIECE)
    try:
        header = next(csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"file {path}: cannot be read as csv: {one_line(error)}") from error
    if not header:
        raise DataError(f"file {path}: it is empty; a csv file starts with its column names")
    return {
        "features": Features({name: Value("string") for name in header}),
        "keep_default_na": False,
        "sep": delimiter,
        "encoding": "utf-8-sig",
    }


@contextmanager
def _plain_copy(path: Path, kind: str) -> Iterator[Path]:
    """A name for the file without compression and without characters that `datasets` would take for a glob."""
    with tempfile.TemporaryDirectory(prefix="agiformer-") as folder:
        plain = Path(folder) / f"table.{kind}"
        if not file_kind(path)[1]:
            try:
                plain.symlink_to(path.resolve())
            except OSError:  # a system without links
                shutil.copyfile(path, plain)
        else:
            with open(plain, "wb") as out:
                for piece in open_pieces(path):
                    out.write(piece)
        yield plain


class _PieceStream(io.RawIOBase):
    """A readable raw stream over an iterator of bytes."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._rest = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = piece
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def import_datasets(what: str):
    """The `datasets` module, or a DataError that says what needs it."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{what}: needs the package datasets (pip install datasets); text and json files do not"
        ) from error
    return datasets
