"""Every format comes back as the exact bytes that went in, and every bad input is one clear line."""

import csv
import dataclasses
import gzip
import io
import json
import lzma
import random
import sys
import types

import pytest

from model.data import DataError, SourceSpec, iter_documents
from model.data.readers import split_documents

TEXTS = [
    "ışık: ğüşiöç İIıi",
    "emoji: 🐢🚀 e\u0301",
    "three\r\nlines\r\nhere",
    "007",
    "NA",
    "2020-01-01",
    'quote " and, comma',
    "a\u2028b",
    "ends with newline\n",
    "two\n\nparagraphs",
]
BYTES = [text.encode() for text in TEXTS]


def documents(*files, **options):
    return list(iter_documents(SourceSpec(files=tuple(map(str, files)), **options)))


def need(name) -> None:
    """Skip what a machine without `datasets` cannot read; text and JSON never need it."""
    if ".csv" in str(name) or ".parquet" in str(name):
        pytest.importorskip("datasets")


def pack(data: bytes, compression: str) -> bytes:
    if compression == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[compression](data)


def encode(kind: str) -> bytes:
    rows = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode()
    if kind == "json":
        return json.dumps(rows, indent=1).encode()
    if kind == "csv":
        out = io.StringIO(newline="")
        csv.writer(out).writerows([["n", "text"], *([row["n"], row["text"]] for row in rows)])
        return out.getvalue().encode()
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_tables_read_back_exactly(tmp_path, kind, compression):
    path = tmp_path / f"odd [name]*.{kind}{compression}"
    need(path)
    path.write_bytes(pack(encode(kind), compression))
    assert documents(path) == BYTES


@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("extension", [".txt", ".md", ".text", ".unknown", ""])
def test_text_is_byte_exact(tmp_path, compression, extension):
    data = b"\n\n".join(["ğüş 🐢".encode(), b"bin\x00\xff\xfe\x80", b"crlf\r\n\r\nstill the same\r", b"last\n"])
    path = tmp_path / f"f{extension}{compression}"
    path.write_bytes(pack(data, compression))
    assert documents(path) == data.split(b"\n\n")


def reference_split(data: bytes) -> list[bytes]:
    """Byte by byte: a document ends before the last two newlines of a run that follows something."""
    lead = len(data) - len(data.lstrip(b"\n"))
    if lead == len(data):
        return []
    found, current, i = [], data[:lead], lead
    while i < len(data):
        run = 0
        while i + run < len(data) and data[i + run] == 10:
            run += 1
        if run >= 2:
            found.append(current + b"\n" * (run - 2))
            current, i = b"", i + run
        else:
            current, i = current + data[i : i + 1], i + 1
    return [*found, current] if current else found


def test_splitting_does_not_depend_on_the_pieces():
    rng = random.Random(0)
    for _ in range(1500):
        data = bytes(rng.choices(b"a\n\r", weights=[3, 5, 1], k=rng.randrange(40)))
        cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randrange(6)))
        pieces = [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)])]
        found = list(split_documents(pieces))
        assert found == reference_split(data)
        assert all(found)
        if found:
            assert b"\n\n".join(found) in (data, data.removesuffix(b"\n\n"))


def test_a_long_document_in_many_pieces_is_linear_and_whole():
    piece = bytes(range(256)).replace(b"\n", b"x") * 64
    found = list(split_documents([piece] * 2000 + [b"\n", b"\nend"]))
    assert found == [piece * 2000, b"end"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_several_compressed_members(tmp_path, suffix):
    path = tmp_path / f"two.txt{suffix}"
    path.write_bytes(pack(b"one\n", suffix) + pack(b"\ntwo", suffix))
    assert documents(path) == [b"one", b"two"]


def test_folder_glob_and_list_order(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden/x.txt", "sub/.x", "d.jsonl", "empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        body = '{"text": "d.jsonl"}' if name.endswith("jsonl") else name
        (tmp_path / name).write_text("" if name == "empty.txt" else body)
    assert documents(tmp_path) == [b"a.txt", b"b.txt", b"d.jsonl", b"sub/c.txt"]
    assert documents(tmp_path / "?.txt") == [b"a.txt", b"b.txt"]
    assert documents(tmp_path / "b.txt", tmp_path / "*.txt") == [b"b.txt", b"a.txt"]


def test_template_and_missing_values(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"w": "ev", "m": "house", "n": 1}, {"w": "x", "m": None}, {"w": "at"}, {"w": "su", "m": "water", "n": "2"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert documents(path, template="{w}: {m} {{ok}}.") == [b"ev: house {ok}.", b"su: water {ok}."]
    assert documents(path, column="n") == [b"1", b"2"]
    for options, wanted in (({}, "column needs text"), ({"template": "{zz}{w}"}, "template needs zz")):
        with pytest.raises(DataError, match=rf"d\.jsonl: {wanted}; its columns are w, m, n$"):
            documents(path, **options)


def test_max_bytes_counts_whole_documents(tmp_path):
    path = tmp_path / "f.txt"
    path.write_bytes(b"aaaa\n\nbbbb\n\ncccc")
    assert documents(path, max_bytes=17) == [b"aaaa", b"bbbb"]
    assert documents(path, max_bytes=18) == [b"aaaa", b"bbbb", b"cccc"]
    assert documents(path, max_bytes=5) == [b"aaa"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_truncated_and_corrupt_files(tmp_path, suffix, kind):
    need(f".{kind}")
    noise = random.Random(1).randbytes(5000).hex().encode()
    whole = pack(b"text\n" + noise, suffix)
    for name, data in (("cut", whole[:-20]), ("short", whole[: len(whole) // 2]), ("bad", b"not compressed at all")):
        path = tmp_path / f"{name}.{kind}{suffix}"
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"{name}.{kind}.*cannot be read") as caught:
            documents(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["e.txt", "e.json", "e.jsonl", "e.csv", "e.parquet", "e.txt.gz", "e.csv.gz"])
def test_empty_and_missing_files(tmp_path, name):
    need(name)
    with pytest.raises(DataError, match=rf"{name}: no such file"):
        documents(tmp_path / name)
    (tmp_path / name).write_bytes(pack(b"", ".gz") if name.endswith("gz") else b"")
    with pytest.raises(DataError, match=rf"{name}: it is empty"):
        documents(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.json", b'{"text": '),
        ("x.jsonl", b'{"text": "a"}\n{nope}\n'),
        ("x.jsonl", b'["a list"]\n'),
        ("x.jsonl", b'{"text": "\xff"}\n'),
        ("x.jsonl", b'{"text": ["a"]}\n'),
        ("x.csv", b"text\n\xff\xfe\n"),
        ("x.parquet", b"PAR1 but not really"),
    ],
)
def test_malformed_tables_are_one_line(tmp_path, name, data):
    need(name)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=name) as caught:
        documents(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"files": (1,)}, "files"),
        ({"files": ("",)}, "files"),
        ({"hub": ""}, "hub"),
        ({"hub": "a/b", "split": ""}, "split"),
        ({"files": "x", "split": "test"}, "split"),
        ({"files": "x", "config": "c"}, "config"),
        ({"builtin": "pydoc.names", "revision": "r"}, "revision"),
        ({"files": "x", "hub_files": "c"}, "hub_files"),
        ({"builtin": "pydoc.all"}, "builtin"),
        ({"files": "x", "max_bytes": 0}, "max_bytes"),
        ({"files": "x", "max_bytes": True}, "max_bytes"),
        ({"files": "x", "column": None}, "column"),
        ({"files": "x", "template": "no columns"}, "template"),
        ({"files": "x", "template": "{a!r}"}, "template"),
        ({"files": "x", "template": "{a"}, "template"),
        ({"files": "x", "template": "{}"}, "template"),
        ({}, "exactly one"),
        ({"files": "x", "hub": "a/b"}, "exactly one"),
    ],
)
def test_spec_errors_name_the_field(values, field):
    with pytest.raises(DataError, match=field) as caught:
        SourceSpec(**values)
    assert "accepted" in str(caught.value) and "\n" not in str(caught.value)


def test_spec_is_frozen_and_takes_a_single_path():
    spec = SourceSpec(files="a.txt")
    assert spec.files == ("a.txt",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.split = "x"


def fake_datasets(monkeypatch, rows):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_hub_arguments_and_errors(monkeypatch):
    calls = fake_datasets(monkeypatch, [{"a": "x", "b": "y"}, {"a": "z", "b": "w"}])
    spec = SourceSpec(hub="o/n", config="c", hub_files="f.csv", split="val", revision="r", template="{a}={b}")
    assert list(iter_documents(spec)) == [b"x=y", b"z=w"]
    options = {"data_files": "f.csv", "split": "val", "revision": "r", "streaming": True}
    assert calls == [(("o/n", "c"), options)]
    with pytest.raises(DataError, match="hub o/n: column needs text; its columns are a, b"):
        list(iter_documents(SourceSpec(hub="o/n")))
    fake_datasets(monkeypatch, ConnectionError("no\nnetwork"))
    with pytest.raises(DataError, match="hub o/n: cannot be read: no network"):
        list(iter_documents(SourceSpec(hub="o/n")))


def test_without_datasets_and_zstandard(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for suffix in ("", ".gz", ".xz"):
        (tmp_path / f"f.txt{suffix}").write_bytes(pack(b"still\n\nread", suffix))
        assert documents(tmp_path / f"f.txt{suffix}") == [b"still", b"read"]
    for name, package in (("f.csv", "datasets"), ("f.txt.zst", "zstandard")):
        (tmp_path / name).write_bytes(b"text\na\n")
        with pytest.raises(DataError, match=f"{name}.*{package}"):
            documents(tmp_path / name)


def test_a_folder_leaves_out_what_is_not_text(tmp_path):
    """Pictures and checkpoints that lie beside the text are not read; a binary file that is named is."""
    (tmp_path / "a.txt").write_bytes(b"text")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\0\0")
    assert list(iter_documents(SourceSpec(files=(str(tmp_path),)))) == [b"text"]
    assert list(iter_documents(SourceSpec(files=(str(tmp_path / "b.png"),)))) == [b"\x89PNG\0\0"]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match="no files of text"):
        list(iter_documents(SourceSpec(files=(str(tmp_path),))))
