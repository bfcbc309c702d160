"""The byte store: exact, split as stated, built once, and whole or absent whatever happens to its builder."""

import hashlib
import json
import os
import signal
import sys
import time

import numpy as np
import pytest

import model.data.store as store_module
from model.data import ByteStore, DataError, SourceSpec, open_store
from model.data.store import choose_split
from tests.conftest import fork


def write(path, n=400, seed=0):
    rng = np.random.default_rng(seed)
    docs = [rng.integers(0, 256, rng.integers(1, 80), np.uint8).tobytes().replace(b"\n", b" ") for _ in range(n)]
    path.write_bytes(b"\n\n".join(docs))
    age(path)
    return docs


def age(path):
    """Let the file be older than a tick of the clock, as a user's file is."""
    past = time.time() - 100
    os.utime(path, (past, past))
    time.sleep(0.06)  # the change time cannot be set


def build(path, cache, **options):
    return open_store(SourceSpec(files=str(path), **options), cache, progress=False)


def leftovers(cache):
    return [p.name for p in (cache / "stores").iterdir() if p.name.startswith(".building-")]


@pytest.mark.parametrize("flush", [7, 1 << 16])
def test_data_offsets_and_meta(tmp_path, cache, monkeypatch, flush):
    monkeypatch.setattr(store_module, "_FLUSH", flush)
    docs = write(tmp_path / "a.txt")
    store = build(tmp_path / "a.txt", cache)
    expected = b"".join(doc + b"\n\n" for doc in docs)
    assert bytes(store.data) == expected
    assert store.data.dtype == np.uint8 and store.offsets.dtype == np.int64
    assert store.n_documents == len(docs) and len(store.offsets) == len(docs) + 1
    for i, doc in enumerate(docs):
        assert bytes(store.data[store.offsets[i] : store.offsets[i + 1]]) == doc + b"\n\n"
    assert store.meta["sha256"] == hashlib.sha256(expected).hexdigest()
    assert store.meta["n_bytes"] == len(expected) and store.meta["text_bytes"] == sum(map(len, docs))
    assert not leftovers(cache)


def test_val_is_the_last_five_percent_and_disjoint(tmp_path, cache):
    docs = write(tmp_path / "a.txt")
    store = build(tmp_path / "a.txt", cache)
    bounds = np.cumsum([0] + [len(d) + 2 for d in docs])
    nearest = min(bounds[1:-1], key=lambda b: abs(b - round(0.95 * bounds[-1])))
    assert store.split_byte == nearest and store.meta["split_rule"] == "document"
    assert len(store.train) == nearest and len(store.train) + len(store.val) == len(store.data)
    assert bytes(store.train) + bytes(store.val) == bytes(store.data)
    assert not np.shares_memory(store.train, store.val)
    assert 0.04 < len(store.val) / len(store.data) < 0.06


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (b"word " * 19 + b"\n" + b"more " * 981, "byte"),
        (b"a line of text\n" * 500, "line"),
        (b"x" * 5000 + b"\n\n" + b"a line\n" * 700, "line"),
        (b"x" * 9990 + b"\n\nyy", "byte"),
        (b"x" * 9500 + b"\n\n" + b"y" * 498, "document"),
        (b"ab", "byte"),
    ],
)
def test_split_of_few_documents(text, rule):
    data = text + b"\n\n"
    cut = text.find(b"\n\n") + 2
    offsets = np.array([0, cut, len(data)] if cut > 1 else [0, len(data)], np.int64)
    split, found = choose_split(np.frombuffer(data, np.uint8), offsets)
    assert found == rule and 0 < split < len(data)
    if rule == "line":
        starts = [i + 1 for i, byte in enumerate(data[:-1]) if byte == 10]
        assert split == min(starts, key=lambda s: abs(s - round(0.95 * len(data))))
    if rule == "byte":
        assert split == min(round(0.95 * len(data)), len(data) - 1)
    if len(data) > 100:
        assert 0.01 <= 1 - split / len(data) <= 0.15


def test_second_open_reads_nothing(tmp_path, cache, monkeypatch):
    write(tmp_path / "a.txt")
    first = build(tmp_path / "a.txt", cache)

    def refuse(*_):
        raise AssertionError("the source was read again")

    monkeypatch.setattr(store_module, "iter_documents", refuse)
    monkeypatch.setattr("model.data.keys._hash", refuse)
    began = time.perf_counter()
    second = build(tmp_path / "a.txt", cache)
    assert time.perf_counter() - began < 0.1
    assert second.path == first.path


def test_moved_file_keeps_its_store_and_changed_content_does_not(tmp_path, cache):
    write(tmp_path / "a.txt")
    first = build(tmp_path / "a.txt", cache).path
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").rename(tmp_path / "sub" / "b.md")
    assert build(tmp_path / "sub" / "b.md", cache).path == first
    (tmp_path / "sub" / "b.md").rename(tmp_path / "a.txt")
    data = bytearray((tmp_path / "a.txt").read_bytes())
    data[0] ^= 1
    stat = (tmp_path / "a.txt").stat()
    (tmp_path / "a.txt").write_bytes(data)
    os.utime(tmp_path / "a.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time, other bytes
    changed = build(tmp_path / "a.txt", cache)
    assert changed.path != first and changed.data[0] == data[0]


def test_settings_are_part_of_the_key(tmp_path, cache):
    (tmp_path / "a.jsonl").write_text('{"text": "abc", "b": "xyz"}\n')
    (tmp_path / "a.txt").write_text("some\n\ntext")
    jsonl, text = tmp_path / "a.jsonl", tmp_path / "a.txt"
    paths = {build(jsonl, cache).path, build(jsonl, cache, column="b").path, build(jsonl, cache, template="{b}").path}
    assert len(paths) == 3
    assert build(text, cache).path == build(text, cache, column="b").path
    assert build(text, cache).path != build(text, cache, max_bytes=6).path


def test_default_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("AGIFORMER_CACHE", str(tmp_path / "elsewhere"))
    (tmp_path / "a.txt").write_text("text")
    store = open_store(SourceSpec(files=str(tmp_path / "a.txt")), progress=False)
    assert store.path.parent == tmp_path / "elsewhere" / "stores"


@pytest.mark.parametrize("name", ["data.bin", "offsets.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "garbage"])
def test_broken_store_is_rebuilt(tmp_path, cache, name, damage, capsys):
    write(tmp_path / "a.txt", n=20)
    store = build(tmp_path / "a.txt", cache)
    whole, file = bytes(store.data), store.path / name
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"\xff" * (len(content) + (name == "data.bin")))
    with pytest.raises(DataError):
        ByteStore(store.path)
    again = build(tmp_path / "a.txt", cache)
    assert bytes(again.data) == whole and again.path == store.path
    assert "building it again" in capsys.readouterr().err
    assert not leftovers(cache)


@pytest.mark.parametrize("text", [b"", b"\n\n\n", b"x"])
def test_too_little_text_names_the_source(tmp_path, cache, text):
    (tmp_path / "tiny.txt").write_bytes(text)
    with pytest.raises(DataError, match=r"tiny\.txt"):
        build(tmp_path / "tiny.txt", cache)
    assert not leftovers(cache)


def test_folder_of_empty_files_and_unusable_cache(tmp_path, cache):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").touch()
    with pytest.raises(DataError, match="folder: it has 0 bytes"):
        build(tmp_path / "folder", cache)
    with pytest.raises(DataError, match=r"cache folder .*a\.txt"):
        build(tmp_path / "folder", tmp_path / "folder/a.txt")


def test_old_leftovers_are_removed_and_young_ones_stay(tmp_path, cache):
    for name, seconds in (("old", 7200), ("young", 60)):
        folder = cache / "stores" / f".building-{name}"
        folder.mkdir(parents=True)
        (folder / "data.bin").write_bytes(b"x")
        for path in (folder / "data.bin", folder):
            os.utime(path, (time.time() - seconds,) * 2)
    write(tmp_path / "a.txt", n=5)
    build(tmp_path / "a.txt", cache)
    assert leftovers(cache) == [".building-young"]


class Build:
    """A fork that builds the store of a file, slowly, and says so: a line half way, and one when it has done."""

    def __init__(self, path, cache, pause: float):
        heard, say = os.pipe()
        real = store_module.iter_documents

        def slow(spec):
            for i, document in enumerate(real(spec)):
                if i == 50:
                    os.write(say, b"half way\n")
                time.sleep(pause)
                yield document

        def work():
            store_module.iter_documents = slow
            found = build(path, cache)
            os.write(say, f"done {found.path.name} {found.meta['sha256']}\n".encode())

        self.pid = fork(work)
        os.close(say)
        self.stdout = open(heard)  # noqa: SIM115 (until its end)

    def end(self) -> tuple[int, list[str]]:
        """(exit code, the lines that are left), when it has come to its end."""
        with self.stdout:
            lines = self.stdout.read().splitlines()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), lines


def test_killed_build_leaves_no_half_store(tmp_path, cache):
    docs = write(tmp_path / "a.txt")
    process = Build(tmp_path / "a.txt", cache, 0.01)
    assert process.stdout.readline() == "half way\n"
    os.kill(process.pid, signal.SIGKILL)
    assert process.end() == (-signal.SIGKILL, [])
    names = [p.name for p in (cache / "stores").iterdir() if not p.name.startswith(".lock-")]
    assert len(names) == 1 and names[0].startswith(".building-")
    store = build(tmp_path / "a.txt", cache)
    assert bytes(store.data) == b"".join(doc + b"\n\n" for doc in docs)


def test_two_processes_build_at_once(tmp_path, cache):
    docs = write(tmp_path / "a.txt")
    processes = [Build(tmp_path / "a.txt", cache, 0.002) for _ in range(2)]
    (one, said), (other, too) = [process.end() for process in processes]
    assert one == other == 0
    assert said[-1] == too[-1]
    assert not leftovers(cache)
    store = build(tmp_path / "a.txt", cache)
    assert store.n_documents == len(docs) and store.meta["sha256"] in said[-1]


def test_two_builds_without_locks(tmp_path, cache, monkeypatch):
    """The second to finish finds the first one's store in place, and takes it."""
    docs = write(tmp_path / "a.txt", n=30)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    real, nested = store_module.iter_documents, []

    def twice(spec):
        if not nested:
            nested.append(None)
            nested.append(build(tmp_path / "a.txt", cache))
        return real(spec)

    monkeypatch.setattr(store_module, "iter_documents", twice)
    outer = build(tmp_path / "a.txt", cache)
    assert outer.path == nested[1].path and outer.n_documents == len(docs)
    assert not leftovers(cache)


def test_source_that_changes_while_read(tmp_path, cache, monkeypatch):
    write(tmp_path / "a.txt", n=30)
    real = store_module.iter_documents

    def meddle(spec):
        yield from real(spec)
        (tmp_path / "a.txt").write_bytes(b"other")

    monkeypatch.setattr(store_module, "iter_documents", meddle)
    with pytest.raises(DataError, match=r"a\.txt: its files changed"):
        build(tmp_path / "a.txt", cache)
    assert not leftovers(cache)


def test_progress_bar_and_metadata_are_readable(tmp_path, cache, capsys):
    write(tmp_path / "a.txt")
    store = open_store(SourceSpec(files=str(tmp_path / "a.txt")), cache)
    assert "encoding a.txt" in capsys.readouterr().err
    meta = json.loads((store.path / "meta.json").read_text())
    assert {"name", "key", "sha256", "settings", "n_documents", "version", "split_rule"} <= set(meta)
