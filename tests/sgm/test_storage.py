"""The store's files mean what is documented, damage is named, and a kill at any moment leaves a whole generation."""

import contextlib
import errno
import hashlib
import inspect
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import model.files
from model.sgm import storage
from model.sgm.storage import StoreBusy, StoreDamaged, WeightStore
from tests.conftest import fork

LAYOUT = {"gömme.ağırlık": (5, 7), "bias": (), "boş": (0, 3), "🙂.w": (4, 41)}  # 200 weights
N = 200


def drawn(seed, n=N) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def masked(*indices, n=N) -> torch.Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[list(indices)] = True
    return mask


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


def make(path, **options) -> WeightStore:
    return WeightStore.create(path, LAYOUT, drawn(0), **options)


# -- an independent reader of the documented files -------------------------------------------------------------------


def sealed(file) -> dict:
    """A sealed text's values, its SHA-256 checked by hand."""
    found = json.loads(file.read_text())
    check = found.pop("sha256")
    assert check == hashlib.sha256(json.dumps(found).encode()).hexdigest()
    return found


def read_raw(path) -> dict:
    """State, weights, and (record, indices, values) of each segment, from the files alone."""
    layout = sealed(path / "layout.json")
    magic, word = (path / "head.bin").read_bytes()[:8], int(np.fromfile(path / "head.bin", "<u8")[1])
    generation = word >> 24
    assert magic == b"SGMSTORE"
    assert word & 0xFFFFFF == zlib.crc32(generation.to_bytes(5, "little")) % 2**24
    state = sealed(path / f"state.{generation % 2}.json")
    assert state["generation"] == generation
    previous = hashlib.sha256((path / "layout.json").read_bytes()).hexdigest()
    assert state["layout"] == previous
    file = path / f"weights.{state['slot']}.bin"
    assert zlib.crc32(file.read_bytes()) == state["crc"]
    weights = np.fromfile(file, {"float32": "<f4", "float16": "<f2"}[layout["dtype"]])
    segments = []
    for number in range(1, state["segments"] + 1):
        file = path / "segments" / f"{number:06d}.safetensors"
        with safe_open(file, "numpy") as opened:
            record = json.loads(opened.metadata()["record"])
            values = opened.get_tensor("values")
            if "runs" in opened.keys():  # noqa: SIM118 — not a mapping
                runs = opened.get_tensor("runs")
                indices = np.array([i for start, stop in runs.tolist() for i in range(start, stop)], np.int64)
            else:
                bits = opened.get_tensor("bits")
                indices = np.array([i for i in range(len(weights)) if bits[i // 8] >> (7 - i % 8) & 1], np.int64)
        assert record["previous"] == previous
        previous = hashlib.sha256(file.read_bytes()).hexdigest()
        segments.append((record, indices, values))
    assert state["ledger"] == previous
    return {"layout": layout, "state": state, "weights": weights, "segments": segments}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_files_are_as_documented(path, dtype):
    kind = np.dtype(dtype)
    with make(path, dtype=dtype, meta={"soru": "ğüş🙂"}) as store:
        assert store.generation == 1
        assert (read_raw(path)["weights"] == drawn(0).numpy().astype(kind)).all()
        blocks, scattered = masked(*range(64, 128)), masked(*range(0, 200, 2))
        store.lock("birinci 🙂", blocks, meta={"step": 1})
        assert store.commit(torch.where(blocks, store.values, drawn(1)), meta={"step": 2, "best": 0.25}) == 3
        store.lock("second", scattered)
    raw = read_raw(path)
    expected = np.where(blocks, drawn(0), drawn(1)).astype(kind)
    assert (raw["weights"] == expected).all()
    assert raw["layout"] == {"version": 1, "dtype": dtype, "layout": [[k, list(v)] for k, v in LAYOUT.items()]}
    assert raw["state"]["meta"] == {"step": 2, "best": 0.25}
    assert raw["state"]["generation"] == 4
    for (record, indices, values), task, mask in zip(
        raw["segments"], ["birinci 🙂", "second"], [blocks, scattered], strict=True
    ):
        assert indices.tolist() == mask.nonzero()[:, 0].tolist()
        assert values.dtype == kind
        assert (values == expected[indices]).all()
        assert record["task"] == task
        assert record["count"] == int(mask.sum())
        assert abs(record["time"] - time.time()) < 60
        by_hand = task.encode() + indices.astype("<i8").tobytes() + values.tobytes()
        assert record["digest"] == hashlib.sha256(by_hand).hexdigest()
    files = sorted((path / "segments").iterdir())
    assert [sorted(safe_open(file, "numpy").keys()) for file in files] == [["runs", "values"], ["bits", "values"]]
    with WeightStore.open(path) as store:
        assert (store.values.numpy() == expected.astype(np.float32)).all()
        assert store.values.dtype == torch.float32
        assert torch.equal(store.locked, blocks | scattered)
        assert [(s.task, s.count, s.digest) for s in store.segments] == [
            (r["task"], r["count"], r["digest"]) for r, _, _ in raw["segments"]
        ]
        assert store.meta == {"step": 2, "best": 0.25}
        assert store.verify() == []
        assert (store.dtype, store.generation, len(store)) == (dtype, 4, N)


# -- values ----------------------------------------------------------------------------------------------------------


def test_float16_rounds_to_nearest_and_refuses_what_it_cannot_hold(path):
    values = drawn(3) * torch.logspace(-9, 4, N)
    values[:6] = torch.tensor([-0.0, float("inf"), -float("inf"), float("nan"), 65519.0, -65504.0])
    with WeightStore.create(path, LAYOUT, values, dtype="float16") as store:
        with np.errstate(over="ignore"):
            expected = values.numpy().astype(np.float16)
        assert store.values.numpy().tobytes() == expected.astype(np.float32).tobytes()
        values[[30, 40]] = torch.tensor([65520.0, -1e9])
        with pytest.raises(
            ValueError, match=re.escape("2 are beyond float16, the first is gömme.ağırlık[4, 2] = 65520")
        ):
            store.commit(values)
        assert store.generation == 1


def test_float32_keeps_every_bit(path):
    bits = np.random.default_rng(0).integers(0, 2**32, N, np.uint32)  # NaNs with payloads, denormals, all
    bits[:2] = 0x80000000, 0x7F800001
    with WeightStore.create(path, LAYOUT, torch.from_numpy(bits.view(np.float32))) as store:
        assert store.values.numpy().view(np.uint32).tolist() == bits.tolist()
        half = drawn(1).to(torch.bfloat16)
        store.commit(half)
        assert torch.equal(store.values, half.float())


@pytest.mark.parametrize(
    "values", [None, [1.0], torch.zeros(N - 1), torch.zeros(N, 1), torch.zeros(N).double(), torch.zeros(N).long()]
)
def test_values_that_do_not_fit_are_refused(path, values):
    with pytest.raises(ValueError, match=r"values=.*: accepted is .* of shape \[200\]"):
        WeightStore.create(path, LAYOUT, values)
    assert not list(path.parent.iterdir())
    with make(path) as store:
        if values is not None:
            with pytest.raises(ValueError, match=r"values=.*: accepted is .* of shape \[200\]"):
                store.commit(values)
        assert torch.equal(store.values, drawn(0))


def test_what_the_store_gives_are_copies(path):
    with make(path, meta={"a": [1]}) as store:
        store.values.zero_()
        store.locked.fill_(True)
        store.meta["a"].append(2)
        assert torch.equal(store.values, drawn(0))
        assert not store.locked.any()
        assert store.meta == {"a": [1]}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_commit_that_changes_a_locked_weight_is_refused(path, dtype):
    n = 3 * storage.CHUNK + 5  # so that the locked ones lie in several chunks
    values = torch.zeros(n)
    layout = {"first": (storage.CHUNK + 7,), "second": (n - storage.CHUNK - 7,)}
    with WeightStore.create(path, layout, values, dtype=dtype) as store:
        places = [storage.CHUNK + 10, 2 * storage.CHUNK, n - 1]
        store.lock("task", masked(*places, n=n))
        changed = torch.ones(n)
        changed[places] = torch.tensor([1e-9 if dtype == "float16" else 0.0, -0.0, 1.0])
        with pytest.raises(
            ValueError,
            match=re.escape(f"2 locked weights would change, the first is second[{places[1] - places[0] + 3}]"),
        ):
            store.commit(changed, meta={"lost": 1})
        assert store.generation == 2
        assert store.meta == {}
        assert torch.equal(store.values, values)
        changed[places[1:]] = 0.0
        store.commit(changed)
        expected = torch.ones(n)
        expected[places] = 0.0
        assert torch.equal(store.values, expected)
    with WeightStore.open(path) as store:
        assert torch.equal(store.values, expected)
        assert store.verify() == []


def test_meta_is_json(path):
    with make(path) as store:
        meta = {"best": float("inf"), "ğ🙂": [1, None, {"x": 1e-300}], "state": "0" * 50_000}
        store.commit(meta=meta)
        assert store.meta == meta
        store.commit(meta={"short": True})
        for bad in ({"a": torch.zeros(1)}, {"a": {1, 2}}, [1], "text"):
            with pytest.raises(ValueError, match=r"meta.*accepted is a dict of JSON values"):
                store.commit(drawn(1), meta=bad)
        assert torch.equal(store.values, drawn(0))
        assert store.meta == {"short": True}
    with WeightStore.open(path, read_only=True) as store:
        assert store.meta == {"short": True}


def test_locks_overlap_repeat_and_may_be_empty_or_all(path):
    with make(path) as store:
        for task, mask in [("a", masked(1, 2)), ("a", masked(2, 3)), ("boş", masked()), ("all", ~masked())]:
            assert store.lock(task, mask).count == int(mask.sum())
        assert store.locked.all()
        assert store.verify() == []
        with pytest.raises(ValueError, match="100 locked weights would change"):
            store.commit(torch.where(torch.arange(N) % 2 == 0, drawn(0), drawn(1)))
        for mask in (masked(1, n=N - 1), torch.ones(N), None):
            with pytest.raises(ValueError, match=r"mask=.*: accepted is a bool tensor of shape \[200\]"):
                store.lock("x", mask)
        for task in ("", None, "\ud800"):
            with pytest.raises(ValueError, match="task="):
                store.lock(task, masked(1))
    with WeightStore.open(path) as store:
        assert [segment.task for segment in store.segments] == ["a", "a", "boş", "all"]
        assert store.locked.all()
        assert store.verify() == []


# -- layouts and modules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [
        [("a", (200,))],
        {"a": (-1,)},
        {"a": (2.0,)},
        {"a": (True, 200)},
        {"a": 200},
        {"": (200,)},
        {3: (200,)},
        {"\ud800": (200,)},
    ],
)
def test_a_bad_layout_is_refused(path, layout):
    with pytest.raises(ValueError, match="layout"):
        WeightStore.create(path, layout, drawn(0))
    assert not list(path.parent.iterdir())


def test_empty_and_huge_layouts(path, tmp_path):
    with pytest.raises(ValueError, match=r"values=.*accepted is"):
        WeightStore.create(path, {"a": (2**40, 2**40)}, drawn(0))
    for name, layout in (("none", {}), ("zero", {"a": (0, 2**40)})):
        with WeightStore.create(tmp_path / name, layout, torch.zeros(0)) as store:
            store.commit(torch.zeros(0), meta={"g": 2})
            store.lock("nothing", masked(n=0))
            store.snapshot("s")
            assert store.restore("s").changed == 0
        with WeightStore.open(tmp_path / name) as store:
            assert (len(store), store.names(), store.verify(), store.meta) == (0, list(layout), [], {"g": 2})
    many = {f"blocks.{i}.ağırlık": (3, i % 5) for i in range(20_000)}
    total = sum(3 * (i % 5) for i in range(20_000))
    with WeightStore.create(path, many, torch.arange(total).float()) as store:
        where = store.range_of("blocks.19999.ağırlık")
        assert (where.start, where.stop) == (total - 12, total)
        assert torch.equal(store.values[where], torch.arange(total - 12, total).float())
        store.lock("last", masked(total - 1, n=total))
        with pytest.raises(ValueError, match=re.escape("the first is blocks.19999.ağırlık[2, 3]")):
            store.commit(torch.zeros(total))
    with WeightStore.open(path) as store:
        assert store.names() == list(many)
        with pytest.raises(ValueError, match=r"name='blocks\.x'"):
            store.range_of("blocks.x")


def test_a_path_that_is_taken_is_refused_and_a_killed_creation_is_not(path, tmp_path):
    leftover = tmp_path / ".store.creating"  # of a creation that was killed
    leftover.mkdir()
    (leftover / "weights.0.bin").write_bytes(b"x" * 5000)
    (leftover / "lock").write_bytes(b"99999999\n")
    path.mkdir()  # an empty folder is accepted
    with make(path):
        assert not leftover.exists()
    for taken in (path, path / "layout.json"):
        with pytest.raises(ValueError, match="accepted is a new or an empty folder"):
            make(taken)
    with WeightStore.open(path) as store:
        assert torch.equal(store.values, drawn(0))
    for missing in (tmp_path / "nowhere", tmp_path, path / "layout.json"):
        with pytest.raises(FileNotFoundError, match="no such store"):
            WeightStore.open(missing)
    assert not (tmp_path / "lock").exists()
    with pytest.raises(ValueError, match="dtype='bfloat16': accepted is one of float32, float16"):
        make(tmp_path / "other", dtype="bfloat16")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(7, 3), nn.LayerNorm(3), nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight


def test_modules_come_and_go(path):
    torch.manual_seed(0)
    module, other = Tied(), Tied().to(torch.bfloat16)
    with WeightStore.from_module(path, module, meta={"a": 1}) as store:
        assert store.names() == ["embedding.weight", "norm.weight", "norm.bias"]
        assert torch.equal(store.values, nn.utils.parameters_to_vector(module.parameters()))
        store.load_into(other)
        assert torch.equal(other.head.weight, module.head.weight.bfloat16())
        store.commit(drawn(1, 27))
        store.load_into(module)
        assert torch.equal(module.head.weight, drawn(1, 27)[:21].view(7, 3))
        assert torch.equal(module.norm.bias, drawn(1, 27)[24:])

        wrong = Tied()
        wrong.norm = nn.LayerNorm(3, bias=False)
        swapped = nn.Module()
        swapped.norm, swapped.embedding = nn.LayerNorm(3), nn.Embedding(7, 3)
        cases = {
            r"has no parameter 'norm.bias'": wrong,
            r"parameter 'extra' is not in the store": Tied(),
            r"'embedding.weight' has the shape \[3, 7\], in the store .* \[7, 3\]": Tied(),
            r"parameter 'norm.weight' is number 0, in the store 1": swapped,
        }
        list(cases.values())[1].extra = nn.Parameter(torch.zeros(2))
        list(cases.values())[2].embedding = nn.Embedding(3, 7)
        for message, case in cases.items():
            before = [parameter.clone() for parameter in case.parameters()]
            with pytest.raises(ValueError, match=message):
                store.load_into(case)
            assert all(torch.equal(a, b) for a, b in zip(before, case.parameters()))


# -- snapshots -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_restore_puts_back_what_is_not_locked(path, dtype):
    with make(path, dtype=dtype, meta={"step": 0}) as store:
        first = store.values
        store.snapshot("en iyi-1.0+ğ")
        store.commit(drawn(1), meta={"step": 1})
        second = store.values
        store.lock("task", masked(*range(36, 50)))
        store.snapshot("later")
        done = store.restore("en iyi-1.0+ğ")
        assert (done.changed, done.locked_differing, done.first_locked) == (N - 14, 14, "🙂.w[0, 0]")
        assert torch.equal(store.values, torch.where(store.locked, second, first))
        assert store.meta == {"step": 0}
        assert store.verify() == []
        done = store.restore("later", meta={"step": 9})
        assert (done.changed, done.locked_differing, done.first_locked) == (N - 14, 0, None)
        assert store.meta == {"step": 9}
        store.snapshot("later")  # replaces
        assert store.snapshots() == ["en iyi-1.0+ğ", "later"]
    with WeightStore.open(path) as store:
        assert torch.equal(store.values, second)
        assert store.generation == 5
        assert store.restore("later").changed == 0


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "/etc/x",
        "a/b",
        "a\\b",
        ".hidden",
        "a\0",
        "a\n",
        "-x",
        " x",
        "*",
        "ş" * 101,
        None,
        3,
        "\ud800",
    ],
)
def test_bad_snapshot_names_are_refused(path, name):
    with make(path) as store:
        for call in (store.snapshot, store.restore):
            with pytest.raises(ValueError, match="name="):
                call(name)
        assert sorted(file.name for file in path.parent.iterdir()) == ["store"]
        assert store.snapshots() == []


def test_snapshots_that_are_missing_foreign_or_damaged(path, tmp_path):
    with make(path) as store, make(tmp_path / "half", dtype="float16") as half:
        with pytest.raises(ValueError, match="no such snapshot"):
            store.restore("s")
        file = store.snapshot("s")
        (half.path / "snapshots").mkdir()
        shutil.copy(file, half.path / "snapshots")
        with pytest.raises(ValueError, match="another layout or dtype"):
            half.restore("s")
        store.commit(drawn(1))
        whole = file.read_bytes()
        for place in {*range(8), *range(8, len(whole), 11), len(whole) - 1}:
            file.write_bytes(flipped(whole, place))
            with pytest.raises(StoreDamaged, match=r"snapshot .*s\.safetensors: fails its check"):
                store.restore("s")
        file.write_bytes(whole[:-1])
        with pytest.raises(StoreDamaged):
            store.restore("s")
        assert torch.equal(store.values, drawn(1))


# -- damage ----------------------------------------------------------------------------------------------------------


def flipped(data: bytes, place: int, bit: int = 4) -> bytes:
    return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


def damaged_in(path) -> str | None:
    """What opening says, or None when it opens."""
    try:
        WeightStore.open(path).close()
    except StoreDamaged as error:
        return str(error)
    return None


@pytest.fixture
def worked(path):
    """A store with a history: two locks, a snapshot, commits after them. Values drawn(2) where not locked."""
    with make(path) as store:
        store.lock("one", masked(*range(64)))
        store.snapshot("s")
        store.commit(torch.where(store.locked, drawn(0), drawn(1)), meta={"step": 1})
        store.lock("two", masked(*range(0, 200, 3)))
        store.commit(torch.where(store.locked, store.values, drawn(2)), meta={"step": 2})
    return path


def contents(path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_every_flipped_byte_is_found_and_named(worked):
    before = contents(worked)
    state = read_raw(worked)["state"]
    live = [f"weights.{state['slot']}.bin", f"state.{state['generation'] % 2}.json", "head.bin", "layout.json"]
    for name in [*live, "segments/000001.safetensors", "segments/000002.safetensors"]:
        file, whole = worked / name, before[name]
        for place in range(0, len(whole), 1 if len(whole) < 100 else 11):
            file.write_bytes(flipped(whole, place, 1 << place % 8))
            assert (worked / name).name in (damaged_in(worked) or ""), (name, place)
            if name == "layout.json":
                continue
            with pytest.raises(StoreDamaged):
                WeightStore.open(worked, read_only=True)
        file.write_bytes(whole)
    assert {k: v for k, v in contents(worked).items() if k != "lock"} == {
        k: v for k, v in before.items() if k != "lock"
    }
    # What does not count may hold anything.
    for name in (f"weights.{1 - state['slot']}.bin", f"state.{1 - state['generation'] % 2}.json"):
        (worked / name).write_bytes(flipped(before[name], 20))
    with WeightStore.open(worked) as store:
        assert torch.equal(store.values[~store.locked], drawn(2)[~store.locked])


def test_missing_truncated_and_exchanged_files_are_found(worked):
    before = contents(worked)
    state = read_raw(worked)["state"]
    others = ("lock", "snapshots/s.safetensors")
    for name in [name for name in before if name not in others]:
        (worked / name).unlink()
        assert (worked / name).name in damaged_in(worked), name
        (worked / name).write_bytes(before[name])
    stale = f"state.{1 - state['generation'] % 2}.json"
    for name in [name for name in before if name not in (*others, stale)]:
        for data in (before[name][:-1], before[name] + b"\0", b""):
            (worked / name).write_bytes(data)
            assert damaged_in(worked), name
        (worked / name).write_bytes(before[name])
    one, two = (worked / "segments" / f"00000{i}.safetensors" for i in (1, 2))
    one.write_bytes(two.read_bytes())
    assert "000001" in damaged_in(worked)
    one.write_bytes(before["segments/000001.safetensors"])
    # An older state, whole in itself, is not taken for the newest.
    newest = f"state.{state['generation'] % 2}.json"
    (worked / newest).write_bytes(before[stale])
    assert "of another generation" in damaged_in(worked)
    (worked / newest).write_bytes(before[newest])
    assert damaged_in(worked) is None


def test_verify_names_the_tasks_whose_weights_or_files_changed(worked):
    with WeightStore.open(worked) as store, WeightStore.open(worked, read_only=True) as reader:
        slot = worked / f"weights.{read_raw(worked)['state']['slot']}.bin"
        whole = slot.read_bytes()

        def overwrite(data):
            with open(slot, "r+b") as file:  # under the mapping
                file.write(data)

        for weight, tasks in ((1, ["one"]), (66, ["two"]), (3, ["one", "two"]), (100, [])):
            overwrite(flipped(whole, 4 * weight + 1))
            assert store.verify() == tasks
        assert reader.verify() == []  # it holds a copy
        overwrite(whole)
        file = worked / "segments" / "000002.safetensors"
        kept = file.read_bytes()
        for damage in (flipped(kept, len(kept) - 1), kept[:20], b""):
            file.write_bytes(damage)
            assert store.verify() == ["two"]
        file.unlink()
        assert store.verify() == ["two"]
        file.write_bytes(kept)
        assert store.verify() == []


def test_what_an_interrupted_lock_left_is_ignored_and_cut(worked):
    segments = worked / "segments"
    whole = (segments / "000002.safetensors").read_bytes()
    (segments / "000003.safetensors").write_bytes(whole[:100])  # torn
    (segments / "000004.safetensors").write_bytes(whole)
    (segments / ".000003.safetensors.abc.tmp").write_bytes(b"x")
    (worked / "snapshots" / ".s.safetensors.abc.tmp").write_bytes(b"x")
    with WeightStore.open(worked, read_only=True) as reader:
        assert [segment.task for segment in reader.segments] == ["one", "two"]
    assert len(list(segments.iterdir())) == 5  # a reader changes nothing
    with WeightStore.open(worked) as store:
        assert sorted(file.name for file in segments.iterdir()) == ["000001.safetensors", "000002.safetensors"]
        assert store.snapshots() == ["s"]
        assert [file.name for file in (worked / "snapshots").iterdir()] == ["s.safetensors"]
        store.lock("three", masked(199))
        assert store.verify() == []
    assert len(read_raw(worked)["segments"]) == 3


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_damaged_store_is_recovered_from_a_snapshot_with_all_locked_weights(path, dtype):
    with make(path, dtype=dtype, meta={"step": 0}) as store:
        store.snapshot("early")
        store.commit(drawn(1))
        store.lock("one", masked(*range(50)))
        store.commit(torch.where(store.locked, store.values, drawn(2)))
        store.lock("two", masked(*range(40, 100, 2)))
        segments, locked, values = store.segments, store.locked, store.values
    before = contents(path)
    first = drawn(0).to(getattr(torch, dtype)).float()
    for damage in (["head.bin"], ["state.0.json", "state.1.json"], ["weights.0.bin", "weights.1.bin"], ["layout.json"]):
        for name in damage:
            (path / name).write_bytes(before[name][: len(before[name]) // 2])
        assert damaged_in(path)
        with WeightStore.recover(path, "early") as store:
            assert torch.equal(store.values, torch.where(locked, values, first))
            assert torch.equal(store.locked, locked)
            assert (store.segments, store.verify(), store.meta) == (segments, [], {"step": 0})
            store.commit(torch.where(locked, values, drawn(3)))
        with WeightStore.open(path) as store:
            assert torch.equal(store.values, torch.where(locked, values, drawn(3).to(getattr(torch, dtype)).float()))
        assert len(read_raw(path)["segments"]) == 2
    before = contents(path)
    for name in ("segments/000001.safetensors", "segments/000002.safetensors"):
        for place in range(0, len(before[name]), 13):
            (path / name).write_bytes(flipped(before[name], place))
            now = contents(path)
            with pytest.raises(StoreDamaged, match="segment"):
                WeightStore.recover(path, "early")
            assert {k: v for k, v in contents(path).items() if k != "lock"} == {
                k: v for k, v in now.items() if k != "lock"
            }
        (path / name).write_bytes(before[name])
    with pytest.raises(ValueError, match="no such snapshot"):
        WeightStore.recover(path, "late")


# -- several processes -----------------------------------------------------------------------------------------------


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

    FILES = (storage.__file__, model.files.__file__)

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


def test_nothing_is_unpickled():
    assert not re.search(r"pickle|torch\.load|np\.load|allow_pickle", inspect.getsource(storage))
