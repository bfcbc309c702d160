"""One process writes a store and others read; a kill or an interrupt at any line leaves a whole generation."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open

import model.files
from model.sgm import storage, store_files, store_layout
from model.sgm.storage import StoreBusy, WeightStore
from tests.conftest import fork
from tests.sgm.test_storage import contents, drawn, make, masked, read_raw


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


class Child:
    """`work()` in a fork; killed when the block ends, if not before."""

    def __init__(self, work):
        self.pid, self.code = fork(work), None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def wait(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def kill(self) -> int:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()


def test_one_writer_and_any_readers(path):
    make(path).close()
    ready, say = os.pipe()

    def write():
        with WeightStore.open(path):
            os.write(say, b"x")
            time.sleep(60)

    with Child(write) as writer:
        os.read(ready, 1)
        with pytest.raises(StoreBusy, match=f"open for writing in process {writer.pid}; accepted is one writer"):
            WeightStore.open(path)
        with WeightStore.open(path, read_only=True) as reader, WeightStore.open(path, read_only=True):
            assert torch.equal(reader.values, drawn(0))
            for change in (
                lambda: reader.commit(drawn(1)),
                lambda: reader.lock("x", masked(1)),
                lambda: reader.snapshot("s"),
            ):
                with pytest.raises(ValueError, match="open for reading only"):
                    change()
    with WeightStore.open(path) as store:  # the killed one's lock is gone
        with pytest.raises(StoreBusy, match=f"process {os.getpid()}"):
            WeightStore.open(path)
        with Child(lambda: store.commit(drawn(1))) as fork:
            assert fork.wait() == 1
        assert store.commit(drawn(2)) == 2
    for use in (lambda: store.values, lambda: store.commit(drawn(1)), store.verify, store.refresh):
        with pytest.raises(ValueError, match="closed"):
            use()


BLOCK = 64


def rule(base: int, n: int) -> torch.Tensor:
    """The weights of base `base`: exact in float32 and different in every place and for every base."""
    return (torch.arange(n) * 7 + base * 13).remainder(1009).float() + base * 1024


def work_on(store, say=lambda text: None):
    """One more commit, lock, snapshot or restore, by turns; `meta` says what the weights then are."""
    n, meta = len(store), store.meta
    base, locks, turn = meta["base"], meta["locks"], meta["turn"]
    following = meta | {"turn": turn + 1}
    if turn % 5 == 3 and len(locks) < n // BLOCK:
        following["locks"] = [*locks, base]  # block i is locked at the weights of that base
        mask = torch.zeros(n, dtype=torch.bool)
        mask[len(locks) * BLOCK :][:BLOCK] = True
        store.lock(f"task {len(locks)}", mask, meta=following)
    elif turn % 11 == 6:
        store.snapshot("s")  # then a commit of meta alone, which says that it is there
        store.commit(meta=following | {"kept": base})
    elif turn % 11 == 10 and meta["kept"] is not None:
        store.restore("s", meta=following | {"base": store_base(store)})
    else:
        store.commit(torch.where(store.locked, store.values, rule(turn + 1, n)), meta=following | {"base": turn + 1})
    say(f"{store.generation}\n")


def store_base(store) -> int:
    """The base of the snapshot's unlocked weights, as its file says."""
    with safe_open(store.path / "snapshots" / "s.safetensors", "numpy") as opened:
        return json.loads(opened.metadata()["record"])["meta"]["base"]


def check_whole(store):
    """All that `meta` says of the weights and the locks is so."""
    meta, n = store.meta, len(store)
    expected, locked = rule(meta["base"], n), torch.zeros(n, dtype=torch.bool)
    for i, base in enumerate(meta["locks"]):
        expected[i * BLOCK : (i + 1) * BLOCK] = rule(base, n)[i * BLOCK : (i + 1) * BLOCK]
        locked[i * BLOCK : (i + 1) * BLOCK] = True
    assert torch.equal(store.values, expected)
    assert torch.equal(store.locked, locked)
    assert [segment.task for segment in store.segments] == [f"task {i}" for i in range(len(meta["locks"]))]
    assert store.verify() == []
    assert store.generation == meta["turn"] + 1  # every turn makes one generation


def begin(path, blocks: int) -> WeightStore:
    meta = {"base": 0, "locks": [], "turn": 0, "kept": None}
    return WeightStore.create(path, {"w": (blocks, BLOCK)}, rule(0, blocks * BLOCK), meta=meta)


def test_a_reader_beside_a_writer_sees_whole_generations(path):
    begin(path, 400).close()

    def write():
        with WeightStore.open(path) as store:
            while True:
                work_on(store)

    with Child(write) as writer:
        seen, deadline = [], time.monotonic() + 1
        with WeightStore.open(path, read_only=True) as held:
            while time.monotonic() < deadline:
                check_whole(held)
                seen.append(held.generation)
                held.refresh()
                with WeightStore.open(path, read_only=True) as fresh:
                    assert fresh.generation >= held.generation
                    check_whole(fresh)
        assert writer.code is None
        assert writer.kill() == -signal.SIGKILL
    assert seen == sorted(seen)
    assert len(set(seen)) > 10


def test_kill_9_twenty_times_at_random_moments(path):
    begin(path, 200).close()
    rng = random.Random(0)
    for _ in range(20):
        heard, say = os.pipe()

        def work(say=say):
            with WeightStore.open(path) as store:
                while True:
                    work_on(store, lambda reply, say=say: os.write(say, reply.encode()))

        with Child(work) as worker:
            os.close(say)
            text = os.read(heard, 1)  # it is at work
            time.sleep(rng.uniform(0, 0.07))
            assert worker.kill() == -signal.SIGKILL
        with open(heard, "rb") as rest:
            acknowledged = int((text + rest.read()).split(b"\n")[-2])
        with WeightStore.open(path) as store:
            check_whole(store)
            assert acknowledged <= store.generation <= acknowledged + 1
            if store.meta["kept"] is not None:
                store.restore("s", meta=store.meta | {"base": store_base(store), "turn": store.meta["turn"] + 1})
                check_whole(store)
    assert len(read_raw(path)["segments"]) > 5
    assert acknowledged > 100


# -- every moment ----------------------------------------------------------------------------------------------------


class Lines:
    """Calls `at(i)` before line i of the store's and the atomic writer's code runs."""

    FILES = (storage.__file__, store_files.__file__, store_layout.__file__, model.files.__file__)

    def __init__(self, at):
        self.at, self.count = at, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *_):
        sys.settrace(self.before)

    def trace(self, frame, event, _):
        if frame.f_code.co_filename not in self.FILES:
            return None
        if event == "line":
            self.count += 1
            self.at(self.count)
        return self.trace


@pytest.fixture
def slow_writes(monkeypatch):
    """Every write takes a few bytes at a time, as the system may: so that torn files are seen too."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: pwrite(handle, memoryview(data)[:97], offset))


def disk_states(folder, action) -> list[dict[str, bytes]]:
    """What a kill before each line of `action()` would leave in the folder, each different one once."""
    states = []

    def look(_):
        now = contents(folder)
        if not states or now != states[-1]:
            states.append(now)

    with Lines(look):
        action()
    look(0)
    return states


def put(folder, files: dict[str, bytes]):
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_a_kill_before_any_line_leaves_the_state_before_or_after(path, tmp_path, slow_writes):
    killed, total = tmp_path / "killed", 0
    with begin(path, 6) as store:
        work_on(store)
        for turn in range(1, 11):  # each kind of work
            before = store.generation
            states = disk_states(path, lambda: work_on(store))
            found = []
            for files in states:
                put(killed, files)
                with WeightStore.open(killed, read_only=True) as reader:
                    check_whole(reader)
                with WeightStore.open(killed) as opened:
                    check_whole(opened)
                    found.append(opened.generation)
                    work_on(opened)  # and it goes on
                    check_whole(opened)
            assert found == sorted(found)
            assert set(found) == {before, before + 1}, turn
            total += len(states)
    assert total > 100


def test_a_creation_killed_before_any_line_leaves_no_store_and_can_be_repeated(tmp_path, slow_writes):
    folder, killed = tmp_path / "a", tmp_path / "b"
    folder.mkdir()
    states = disk_states(folder, lambda: begin(folder / "store", 2).close())
    opened = []
    for files in states:
        put(killed, files)
        killed.mkdir(exist_ok=True)
        opened.append((killed / "store").exists())
        with WeightStore.open(killed / "store") if opened[-1] else begin(killed / "store", 2) as store:
            check_whole(store)
        assert [file.name for file in killed.iterdir()] == ["store"]
    assert opened == sorted(opened)
    assert len(states) > 10


def test_a_recovery_killed_before_any_line_can_be_repeated(path, tmp_path, slow_writes):
    killed = tmp_path / "killed"
    with begin(path, 3) as store:
        for _ in range(9):  # a lock, a snapshot, a lock
            work_on(store)
        locked, values, segments = store.locked, store.values, store.segments
    assert len(segments) == 2
    (path / "head.bin").write_bytes(b"x")
    states = disk_states(path, lambda: WeightStore.recover(path, "s").close())
    for files in states:
        put(killed, files)
        with WeightStore.recover(killed, "s") as store:
            assert torch.equal(store.values[locked], values[locked])
            assert store.segments == segments
            assert store.verify() == []
    assert len(states) > 10


def test_an_interrupt_at_any_line_leaves_a_store_that_goes_on(path, tmp_path):
    """Ctrl-C: the store object lives on, and must not take what it knew for what is on the disk."""
    line, done = 0, 2
    template = contents_of(begin(tmp_path / "template", 6))
    while done < 4:  # a commit, then a lock: each is interrupted at every line it has
        line += 1
        put(path, template)
        with WeightStore.open(path) as store:
            for _ in range(done):
                work_on(store)
            before = store.generation

            def interrupt(i, line=line):
                if i == line:
                    raise KeyboardInterrupt

            lines = Lines(interrupt)
            with contextlib.suppress(KeyboardInterrupt), lines:
                work_on(store)
            over = lines.count < line
            store.commit()  # the same weights and meta, as a generation of their own
            assert store.generation in (before + 1, before + 2)
            turn = store.generation - 1
            assert store.meta["turn"] in (turn - 1, turn)
            store.commit(meta=store.meta | {"turn": store.generation})
            check_whole(store)
            work_on(store)
            check_whole(store)
        if over:
            line, done = 0, done + 1


def contents_of(store) -> dict[str, bytes]:
    store.close()
    return contents(store.path)


def test_a_full_disk_is_an_error_and_changes_nothing(path, monkeypatch):
    with begin(path, 6) as store:
        for _ in range(4):
            work_on(store)
        pwrite, replace, room = os.pwrite, os.replace, [0]

        def write(handle, data, offset):
            data = memoryview(data)[: room[0]]
            if not data:
                raise OSError(errno.ENOSPC, "No space left on device")
            room[0] -= len(data)
            return pwrite(handle, data, offset)

        def refuse(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", write)
        for room[0] in (0, 1, 500, 1536, 1600):
            with pytest.raises(OSError, match="No space left"):
                store.commit(torch.where(store.locked, store.values, torch.tensor(5.0)))
            check_whole(store)
        room[0] = 10**9
        monkeypatch.setattr(os, "replace", refuse)
        for change in (lambda: store.lock("x", ~store.locked), lambda: store.snapshot("s")):
            with pytest.raises(OSError, match="No space left"):
                change()
            check_whole(store)
        monkeypatch.setattr(os, "pwrite", pwrite)
        monkeypatch.setattr(os, "replace", replace)
        for _ in range(8):
            work_on(store)
            check_whole(store)


def test_durable_commits_and_all_locks_reach_the_disk_before_they_count(path, monkeypatch):
    fsync, synced = os.fsync, []

    def watch(handle):
        fsync(handle)
        name = os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), path)
        word = int(np.fromfile(path / "head.bin", np.uint64)[1]) >> 24 if (path / "head.bin").exists() else 0
        synced.append((re.sub(r"\.\w+\.tmp$", "", name), word))

    begin(path, 6).close()
    monkeypatch.setattr(os, "fsync", watch)
    with WeightStore.open(path) as store:
        store.commit(rule(1, 384))
        assert synced == []
        store.lock("x", masked(1, n=384))
        slot = read_raw(path)["state"]["slot"]
        assert synced == [
            ("segments/.000001.safetensors", 2),
            ("segments", 2),
            (f"weights.{slot}.bin", 2),
            ("state.1.json", 2),
        ]
    synced.clear()
    with WeightStore.open(path, durable=True) as store:
        store.commit(torch.where(store.locked, store.values, rule(2, 384)))
        assert synced == [(f"weights.{1 - slot}.bin", 3), ("state.0.json", 3)]
