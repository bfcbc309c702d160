"""The store's files mean what is documented, damage is named, and a kill at any moment leaves a whole generation."""

import hashlib
import inspect
import json
import re
import shutil
import time
import zlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from model.sgm import storage, store_files, store_layout
from model.sgm.storage import StoreDamaged, WeightStore
from model.sgm.store_files import newest_snapshot

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
        generation = store.generation
        assert torch.equal(store.of_snapshot("en iyi-1.0+ğ"), first)
        assert torch.equal(store.of_snapshot("later"), second)
        assert (store.generation, newest_snapshot(path)) == (generation, "later")
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
        for call in (store.snapshot, store.restore, store.of_snapshot):
            with pytest.raises(ValueError, match="name="):
                call(name)
        with pytest.raises(StoreDamaged, match="has no snapshot that is whole"):
            newest_snapshot(path)
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


def test_nothing_is_unpickled():
    for module in (storage, store_files, store_layout):
        assert not re.search(r"pickle|torch\.load|np\.load|allow_pickle", inspect.getsource(module))
