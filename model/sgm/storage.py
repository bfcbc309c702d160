"""Weights in a folder: memory-mapped, committed in one atomic step, locked for ever task by task (seed 001).

Files of a store (numbers are little-endian; NumPy, json and safetensors read each of them):

    layout.json                  {"sha256", "version", "dtype", "layout": [[name, shape], …]}, written once; "sha256" is
                                 that of the text without `"sha256": "…", `
    head.bin                     16 bytes: "SGMSTORE" and one word, generation << 24 | check (low 24 bits of the CRC-32
                                 of the generation's 5 bytes): the generation that counts
    state.0.json, state.1.json   of the even and the odd generation: {"sha256", "generation", "layout", "slot", "crc",
                                 "segments", "ledger", "meta"}; "layout" is the SHA-256 of layout.json
    weights.0.bin, weights.1.bin the two slots, N weights each; a state names one of them, and the CRC-32 of the whole
    segments/000001.safetensors  one per lock, never changed: `values` [count] and their places, as `runs` int64 [R, 2]
                                 (start, stop) or, where that is smaller, as `bits` uint8 [⌈N/8⌉] (np.packbits of the
                                 mask); header entry `record`: JSON of sha256, task, count, digest, time, previous
    snapshots/NAME.safetensors   `weights` [N]; header entry `record`: JSON of sha256, layout, generation, time, meta
    lock                         held (flock) and signed with its process id by the one writer

Notable:
- A commit writes the slot and the state that do not count, then stores one aligned 8-byte word. A process killed at any
  instruction leaves the generation before or the one after, with its own `meta` and number of segments. There is no
  journal and nothing to replay.
- What is damaged is told from what was interrupted: an interrupted commit leaves no trace in what the head points to,
  so whatever fails its check there was damaged, and opening says so rather than fall back to older weights.
- A state counts its segments and names the SHA-256 of the last; each names that of the one before it, the first that
  of layout.json. So no segment can be changed, exchanged or taken away unseen. A file after the last that is counted
  belongs to a lock that was never acknowledged: it is removed.
- Killed processes lose nothing, because the system keeps what they wrote. A power cut is another matter. Locks and
  snapshots are always synchronised to the disk before they count; commits only with `durable=True`. Without it, a
  power cut leaves a store that opens with weights of one generation at or after the last lock, or one that says that
  it is damaged. `WeightStore.recover` then puts it back from a snapshot, with all locked weights.
- Slots are read through the mapping and written by `pwrite`: as fast, and a full disk is an error, not a signal.
"""

import contextlib
import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.files import sync_folder, write_atomically
from model.sgm.store_files import (
    StoreDamaged,
    head_word,
    indices_of,
    lock_digest,
    pack,
    read,
    read_snapshot,
    runs_of,
    seal,
    segment_file,
    sha256,
    snapshot_file,
    unpack,
    unseal,
    write,
)
from model.sgm.store_layout import Layout, checked_meta, encodable, outline

MAGIC = int.from_bytes(b"SGMSTORE", "little")
CHUNK = 1 << 18  # weights compared, written and summed at a time: they stay in the cache
PATIENCE = 10.0  # seconds that a reader tries to catch a generation between two commits


class StoreBusy(ValueError):
    """Another process writes the store."""


@dataclass(frozen=True)
class Segment:
    """One lock: `digest` is the SHA-256 of task (UTF-8), indices (int64) and stored values, `time` in Unix seconds."""

    task: str
    count: int
    digest: str
    time: float


@dataclass(frozen=True)
class Restored:
    """What `restore` did: weights put back, and locked ones that differ from the snapshot and stay as they are."""

    changed: int
    locked_differing: int
    first_locked: str | None  # where the first of those is, such as "blocks.0.up[3, 1]"


class WeightStore:
    """N weights under names; made by `create`, `from_module` or `open`; a context manager.

    The writer sees its own commits. A reader (`open(..., read_only=True)`) holds a copy of one generation, whole, and
    takes over a newer one by `refresh`.
    """

    def __init__(self, path: Path, *, read_only: bool, durable: bool):
        self.path, self.read_only, self._durable = path, read_only, durable
        self._files, self._pid = contextlib.ExitStack(), os.getpid()
        self._head = self._current = None

    # -- making and opening ------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        layout: dict[str, tuple[int, ...]],
        values: Tensor,
        *,
        dtype: str = "float32",
        meta: dict[str, Any] | None = None,
        durable: bool = False,
    ) -> "WeightStore":
        """Make a store and open it for writing. A killed `create` leaves no store.

        Args:
            path: the folder; it must not exist, or be empty.
            layout: name → shape of every weight tensor, in the order in which they lie in `values`.
            values: [N] float32, float16 or bfloat16, N the sum of the shapes' sizes.
            dtype: "float32", or "float16": values are rounded to the nearest.
            meta: JSON values kept with the weights.
            durable: whether each commit waits for the disk, so that it survives a power cut.

        Raises:
            ValueError: for a path that is taken, a bad layout or dtype, or values that do not fit.
            StoreBusy: when another process is creating it.
        """
        path = Path(path)
        taken = f"path={str(path)!r}: exists; accepted is a new or an empty folder"
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(taken)
        making = path.parent / f".{path.name}.creating"  # a killed creation's is taken over
        with cls(making, read_only=False, durable=durable)._closed_on_error() as store:
            store._take_layout(Layout.made(layout, dtype, making))
            bits, meta = store._layout.stored(values), checked_meta({} if meta is None else meta)
            making.mkdir(parents=True, exist_ok=True)
            store._take_lock()
            store._begin(1, bits, meta)
            sync_folder(making)
            try:
                os.rename(making, path)
            except OSError as error:
                raise ValueError(taken) from error
            sync_folder(path.parent)
            store.path = path
        return store

    @classmethod
    def from_module(
        cls,
        path: str | os.PathLike,
        module: nn.Module,
        *,
        dtype: str = "float32",
        meta: dict[str, Any] | None = None,
        durable: bool = False,
    ) -> "WeightStore":
        """`create` with the module's parameters, in the order of `named_parameters`; a shared one is stored once."""
        parameters = dict(module.named_parameters())
        flat = [parameter.detach().to("cpu", torch.float32).flatten() for parameter in parameters.values()]
        layout = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        values = torch.cat(flat) if flat else torch.empty(0)
        return cls.create(path, layout, values, dtype=dtype, meta=meta, durable=durable)

    @classmethod
    def open(cls, path: str | os.PathLike, *, read_only: bool = False, durable: bool = False) -> "WeightStore":
        """Open a store at the last generation that was committed, after checking all that it rests on.

        Args:
            path: the folder.
            read_only: take no lock and write nothing; a writer may work meanwhile.
            durable: whether each commit waits for the disk, so that it survives a power cut.

        Raises:
            FileNotFoundError: when there is no store.
            StoreBusy: when another process, or this one, has it open for writing.
            StoreDamaged: when a file that counts is missing or fails its check; nothing was changed.
        """
        path = Path(path)
        if not any((path / name).is_file() for name in ("head.bin", "layout.json")):
            raise FileNotFoundError(f"store {path}: no such store")
        with cls(path, read_only=read_only, durable=durable)._closed_on_error() as store:
            if not read_only:
                store._take_lock()
            store._take_layout(Layout(read(path / "layout.json"), path))
            store._map()
            store._load()
            if not read_only:
                store._clean()
        return store

    @classmethod
    def recover(cls, path: str | os.PathLike, snapshot: str, *, durable: bool = False) -> "WeightStore":
        """Put back a damaged store from a snapshot, and open it for writing: locked weights come from their segments.

        It relies on nothing but the snapshot and the segments, and can be repeated when interrupted.

        Raises:
            StoreDamaged: when the snapshot or a segment fails its check. Nothing was changed: the segment named and the
                later ones can be moved elsewhere by hand, to recover with what was locked before.
        """
        path = Path(path)
        record, weights = read_snapshot(path, snapshot)
        with cls(path, read_only=False, durable=durable)._closed_on_error() as store:
            store._take_lock()
            store._take_layout(Layout(record["layout"].encode(), path))
            bits = weights.view(store._layout.bits)
            count = len(list((path / "segments").glob("[!.]*.safetensors")))
            last = unpack(segment_file(path, count))[2] if count else store._layout.sha256
            store._ledger, store._locked = store._read_ledger(count, last)
            for number in range(1, count + 1):
                _, indices, stored, *_ = store._read_segment(number)
                bits[indices] = stored
            store._begin(record["generation"] + 1, bits, record["meta"])
            store._clean()
        return store

    def close(self) -> None:
        """Give up the files and the writer's lock. Everything acknowledged is kept; there is nothing to flush."""
        self._files.close()
        self._head = self._current = None
        self._slots = ()

    def __enter__(self) -> "WeightStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # -- what is there -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._layout.count

    @property
    def dtype(self) -> str:
        """How the weights are kept: "float32" or "float16"."""
        return self._layout.dtype

    def names(self) -> list[str]:
        """Names of the weight tensors, in the order in which they lie in `values`."""
        return list(self._layout.shapes)

    def range_of(self, name: str) -> slice:
        """Where the weights of `name` lie in `values`."""
        return self._layout.range_of(name)

    @property
    def generation(self) -> int:
        """Number of commits, locks and restores so far, the creation included."""
        return self._state["generation"]

    @property
    def values(self) -> Tensor:
        """[N] float32, a copy of what is committed."""
        return torch.from_numpy(np.array(self._weights())).to(torch.float32)

    @property
    def locked(self) -> Tensor:
        """[N] bool, a copy: which weights are in any segment."""
        return torch.from_numpy(self._locked.copy())

    @property
    def segments(self) -> list[Segment]:
        """All locks, oldest first."""
        return [segment for segment, _ in self._ledger]

    @property
    def meta(self) -> dict[str, Any]:
        """A copy of the JSON values committed with the weights."""
        return json.loads(json.dumps(self._state["meta"]))

    def snapshots(self) -> list[str]:
        """Names of the snapshots, sorted."""
        return sorted(file.stem for file in (self.path / "snapshots").glob("[!.]*.safetensors"))

    def verify(self) -> list[str]:
        """Recompute every segment's digest from the weights as they are now.

        Returns:
            The tasks of those that differ, or whose file fails its check; empty when every locked weight is as it was.
        """
        bits, differing = self._weights().view(self._layout.bits), []
        for number, (segment, digest) in enumerate(self._ledger, start=1):
            try:
                _, indices, _, _, found = self._read_segment(number)
                whole = found == digest and lock_digest(segment.task, indices, bits[indices]) == segment.digest
            except StoreDamaged:
                whole = False
            if not whole:
                differing.append(segment.task)
        return differing

    def load_into(self, module: nn.Module) -> None:
        """Copy the weights into the module's parameters, each in its own dtype and on its own device.

        Raises:
            ValueError: when names, shapes or order are not the store's; the module is unchanged.
        """
        parameters = self._layout.check_module(module)
        values = self.values
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[self.range_of(name)].view(parameter.shape))

    def refresh(self) -> bool:
        """Take over the newest generation; whether there was a newer one. Only readers have need of it."""
        self._weights()  # refuses when closed
        before = self.generation
        if int(self._head[1]) != head_word(before):
            self._load()
        return self.generation != before

    # -- changing it -------------------------------------------------------------------------------------------------

    def commit(self, values: Tensor | None = None, *, meta: dict[str, Any] | None = None) -> int:
        """Take over new weights, or new `meta`, or both, in one atomic step.

        Args:
            values: [N] float32, float16 or bfloat16; a float16 store rounds to the nearest. None keeps the weights.
            meta: replaces the JSON values. None keeps them.

        Returns:
            The new generation.

        Raises:
            ValueError: when a locked weight would change, in any bit of what is stored; how many and the first one's
                name are in the message. Or for values that do not fit. The store is unchanged.
        """
        self._prepare()
        state = self._next(meta)
        if values is not None:
            self._write_weights(state, self._layout.stored(values))
        self._publish(state, self._durable)
        return self.generation

    def lock(self, task: str, mask: Tensor, *, meta: dict[str, Any] | None = None) -> Segment:
        """Lock weights for ever at their present values: append a segment and wait for the disk.

        Args:
            task: whose they are; a name may come again. Weights that are locked already may be locked again.
            mask: [N] bool, True for each weight to lock.
            meta: replaces the JSON values in the same atomic step. None keeps them.

        Raises:
            ValueError: for an empty task or a mask that does not fit.
        """
        self._prepare()
        if not isinstance(task, str) or not task or not encodable(task):
            raise ValueError(f"task={task!r}: accepted is a text that is not empty")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (len(self),):
            raise ValueError(f"mask={outline(mask)}: accepted is a bool tensor of shape [{len(self)}]")
        state = self._next(meta)
        chosen = mask.detach().cpu().numpy()
        indices = np.flatnonzero(chosen)
        stored = self._current[indices]
        segment = Segment(task, len(indices), lock_digest(task, indices, stored), time.time())
        runs = runs_of(indices)
        places = {"runs": runs} if runs.nbytes <= (len(self) + 7) // 8 else {"bits": np.packbits(chosen)}
        record = vars(segment) | {"previous": self._state["ledger"]}
        data = pack({"values": stored.view(self._layout.float)} | places, record)
        write_atomically(segment_file(self.path, len(self._ledger) + 1), data)
        state["segments"], state["ledger"] = len(self._ledger) + 1, sha256(data)
        self._publish(state, True)
        self._locked |= chosen
        self._ledger.append((segment, state["ledger"]))
        return segment

    def snapshot(self, name: str) -> Path:
        """Keep weights and `meta` as they are under a name; one of that name is replaced, atomically.

        Args:
            name: letters, digits, "_", and after the first also ".", "-", "+" and spaces; at most 200 bytes.
        """
        self._prepare()
        file = snapshot_file(self.path, name)
        record = {"layout": self._layout.described.decode(), "generation": self.generation, "time": time.time()}
        record["meta"] = self.meta
        return write_atomically(file, pack({"weights": np.array(self._weights())}, record))

    def of_snapshot(self, name: str) -> Tensor:
        """The weights [N] of a snapshot, float32.

        Raises:
            ValueError: when there is no such snapshot, or it is of another layout or dtype.
            StoreDamaged: when it fails its check.
        """
        return torch.from_numpy(self._snapshot(name)[1]).to(torch.float32)

    def restore(self, name: str, *, meta: dict[str, Any] | None = None) -> Restored:
        """Put back a snapshot's weights, except those locked by now, as one commit.

        Args:
            name: of the snapshot.
            meta: replaces the JSON values in the same atomic step. None puts back the snapshot's.

        Raises:
            ValueError: when there is no such snapshot, or it is of another layout or dtype.
            StoreDamaged: when it fails its check.
        """
        self._prepare()
        record, weights = self._snapshot(name)
        state = self._next(record["meta"] if meta is None else meta)
        bits = weights.view(self._layout.bits)
        differing = bits != self._current
        kept = np.flatnonzero(differing & self._locked)
        bits[kept] = self._current[kept]
        self._write_weights(state, bits)
        self._publish(state, self._durable)
        first = self._layout.where(kept[0]) if len(kept) else None
        return Restored(int(np.count_nonzero(differing)) - len(kept), len(kept), first)

    def _snapshot(self, name: str) -> tuple[dict[str, Any], np.ndarray]:
        record, weights = read_snapshot(self.path, name)
        if record["layout"] != self._layout.described.decode():
            raise ValueError(f"name={name!r}: the snapshot is of another layout or dtype than the store {self.path}")
        return record, weights

    # -- inside ------------------------------------------------------------------------------------------------------

    def _take_lock(self) -> None:
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        self._files.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 20, 0).decode(errors="replace").strip() or "unknown"
            raise StoreBusy(
                f"store {self.path}: open for writing in process {holder}; accepted is one writer, and any readers"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{self._pid}\n".encode(), 0)

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator["WeightStore"]:
        try:
            yield self
        except BaseException:
            self.close()
            raise

    def _take_layout(self, layout: Layout) -> None:
        """Set names, places and kind of the weights, and no segments."""
        self._layout = layout
        self._ledger: list[tuple[Segment, str]] = []  # with the SHA-256 of their files

    def _sizes(self) -> dict[str, int]:
        """Bytes of the files of fixed size."""
        size = len(self) * self._layout.float.itemsize
        return {"head.bin": 16, "weights.0.bin": size, "weights.1.bin": size}

    def _map(self) -> None:
        """Map head and slots; a writer opens what it writes."""
        for name, size in self._sizes().items():
            file = self.path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes, not {size}"
                raise StoreDamaged(f"store {self.path}: {name} {what}")
        self._head = np.memmap(self.path / "head.bin", np.uint64, "r" if self.read_only else "r+")
        files = [self.path / f"weights.{slot}.bin" for slot in (0, 1)]
        if not self._ledger:
            self._locked = np.zeros(len(self), bool)
        # An empty file cannot be mapped.
        bits = self._layout.bits
        self._slots = [np.memmap(file, bits, "r") if len(self) else np.empty(0, bits) for file in files]
        if not self.read_only:
            self._slot_files = [self._open_file(f"weights.{slot}.bin") for slot in (0, 1)]
            self._state_files = [self._open_file(f"state.{parity}.json") for parity in (0, 1)]

    def _open_file(self, name: str) -> int:
        try:
            handle = os.open(self.path / name, os.O_RDWR)
        except FileNotFoundError:
            raise StoreDamaged(f"store {self.path}: {name} is missing") from None
        self._files.callback(os.close, handle)
        return handle

    def _begin(self, generation: int, bits: np.ndarray, meta: dict[str, Any]) -> None:
        """Write all but the segments anew, with one generation that counts."""
        write_atomically(self.path / "layout.json", self._layout.described)
        for name, size in (self._sizes() | {"state.0.json": 0, "state.1.json": 0}).items():
            with open(self.path / name, "ab") as file:
                file.truncate(size)
                if size:
                    os.posix_fallocate(file.fileno(), 0, size)  # or the disk might turn out to be full at a commit
                os.fsync(file.fileno())
        self._map()
        self._head[:] = MAGIC, 0
        self._current = bits
        state = {"generation": generation, "layout": self._layout.sha256, "slot": 1, "crc": 0}
        state |= {"segments": len(self._ledger), "ledger": self._last(), "meta": meta}
        self._write_weights(state, bits)
        self._publish(state, True)

    def _last(self) -> str:
        """SHA-256 of the last segment's file, or of layout.json."""
        return self._ledger[-1][1] if self._ledger else self._layout.sha256

    def _load(self) -> None:
        """Take over the generation that counts.

        Two commits later a writer overwrites it: a reader then finds a failing check, and that the head has moved on.
        """
        deadline, failed = time.monotonic() + PATIENCE, None
        while True:
            word = int(self._head[1])
            try:
                return self._read_generation(word)
            except StoreDamaged as error:
                if not self.read_only or word == failed:
                    raise
                if time.monotonic() > deadline:
                    raise StoreBusy(f"store {self.path}: commits come faster than it can be read") from error
                failed = word

    def _read_generation(self, word: int) -> None:
        generation = word >> 24
        if int(self._head[0]) != MAGIC or word != head_word(generation):
            raise StoreDamaged(f"store {self.path}: head.bin fails its check")
        file = self.path / f"state.{generation & 1}.json"
        state = unseal(read(file), file)
        if state["generation"] != generation or state["layout"] != self._layout.sha256:
            raise StoreDamaged(f"store {self.path}: {file.name} is of another generation or layout")
        weights = np.array(self._slots[state["slot"]]) if self.read_only else self._slots[state["slot"]]
        if zlib.crc32(weights) != state["crc"]:
            raise StoreDamaged(f"store {self.path}: weights.{state['slot']}.bin fails its check")
        if self._last() != state["ledger"]:
            self._ledger, self._locked = self._read_ledger(state["segments"], state["ledger"])
        self._state, self._current = state, weights

    def _read_ledger(self, count: int, last: str) -> tuple[list[tuple[Segment, str]], np.ndarray]:
        """All segments, checked from the last back, and the mask of what they lock."""
        ledger, locked = [], np.zeros(len(self), bool)
        for number in range(count, 0, -1):
            segment, indices, _, previous, digest = self._read_segment(number)
            if digest != last:
                raise StoreDamaged(f"segment {segment_file(self.path, number)}: fails its check")
            ledger.append((segment, digest))
            locked[indices] = True
            last = previous
        if last != self._layout.sha256:
            raise StoreDamaged(f"store {self.path}: its first segment is of another layout")
        return ledger[::-1], locked

    def _read_segment(self, number: int) -> tuple[Segment, np.ndarray, np.ndarray, str, str]:
        """A segment, its indices and stored bits [count], the SHA-256 of the file before it and that of its own."""
        tensors, record, digest = unpack(segment_file(self.path, number))
        previous, stored = record.pop("previous"), tensors["values"].view(self._layout.bits)
        return Segment(**record), indices_of(tensors, len(self)), stored, previous, digest

    def _clean(self) -> None:
        """Remove what killed writers left: temporary files, and segments that never counted."""
        counted = {segment_file(self.path, number) for number in range(1, len(self._ledger) + 1)}
        stale = set((self.path / "segments").glob("[!.]*.safetensors")) - counted
        for file in stale.union(*((self.path / folder).glob(".*.tmp") for folder in ("segments", "snapshots"))):
            file.unlink()

    def _weights(self) -> np.ndarray:
        """[N] in the store's own dtype; not a copy."""
        if self._current is None:
            raise ValueError(f"store {self.path}: closed")
        return self._current.view(self._layout.float)

    def _prepare(self) -> None:
        """Check that this process may write now, and that it knows what was committed last."""
        self._weights()
        if self.read_only:
            raise ValueError(f"store {self.path}: open for reading only")
        if os.getpid() != self._pid:
            raise StoreBusy(f"store {self.path}: open for writing in process {self._pid}, of which this is a fork")
        # Otherwise an exception, such as that of Ctrl-C, came while a commit was being entered here.
        if int(self._head[1]) != head_word(self.generation) or self._last() != self._state["ledger"]:
            self._load()

    def _next(self, meta: dict[str, Any] | None) -> dict[str, Any]:
        meta = self._state["meta"] if meta is None else checked_meta(meta)
        return self._state | {"generation": self.generation + 1, "meta": meta}

    def _write_weights(self, state: dict[str, Any], bits: np.ndarray) -> None:
        """Write the slot that does not count, and enter it in `state`; refused where a locked weight would change."""
        slot, crc, changed, first = 1 - state["slot"], 0, 0, 0
        for start in range(0, len(self), CHUNK):
            part = slice(start, start + CHUNK)
            differs = (bits[part] != self._current[part]) & self._locked[part]
            if differs.any():
                first = first if changed else start + int(differs.argmax())
                changed += int(np.count_nonzero(differs))
            elif not changed:
                write(self._slot_files[slot], bits[part], start * bits.itemsize)
                crc = zlib.crc32(bits[part], crc)
        if changed:
            where = self._layout.where(first)
            raise ValueError(
                f"values: {changed} locked weights would change, the first is {where}; accepted are values that "
                "equal the stored ones, bit for bit, wherever `locked` is true"
            )
        state["slot"], state["crc"] = slot, crc

    def _publish(self, state: dict[str, Any], durable: bool) -> None:
        """Write the state that does not count, then make it count by one store of 8 bytes."""
        data = seal(state)
        handle = self._state_files[state["generation"] & 1]
        write(handle, data, 0)
        os.ftruncate(handle, len(data))
        if durable:
            os.fsync(self._slot_files[state["slot"]])
            os.fsync(handle)
        self._head[1] = head_word(state["generation"])
        if durable:
            self._head.flush()
        self._state, self._current = state, self._slots[state["slot"]]
