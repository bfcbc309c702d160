"""Random crops of a region of bytes, as a pure function of the step: any step can be asked for, in any order.

Sample number `i = (index * world_size + rank) * batch_size + row` names a crop for the whole job, so ranks never share
one and the crops of a step do not depend on how the job was split among them.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from .errors import DataError
from .store import ByteStore

CROPS = ("any", "document")


class CropSampler:
    """Batches of crops, uint8 [batch_size, seq_len], from a ByteStore's train region or a uint8 array [n].

    crops="any": in epochs without replacement. An epoch cuts the region, taken as a ring, into ceil(n / seq_len)
    windows from a random phase, and visits them in random order; every byte is seen, and fewer than seq_len bytes
    twice. Windows cross document boundaries freely.

    crops="document": documents drawn in proportion to their bytes, with replacement. A document of at least seq_len
    bytes (its separator counted) gives a random crop inside itself; a shorter one starts the crop and the following
    ones fill it. Needs a ByteStore, or `offsets` (int64 [n_documents + 1], document starts) with an array.

    `stream` separates samplers that share a seed, such as the stages of a curriculum. A region shorter than seq_len is
    repeated, with a warning. Raises DataError naming the argument, its value and what is accepted.
    """

    def __init__(
        self,
        store_or_bytes: ByteStore | np.ndarray | bytes,
        seq_len: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        crops: str = "any",
        *,
        stream: int = 0,
        offsets: np.ndarray | None = None,
    ):
        limits = {"seq_len": (seq_len, 1), "batch_size": (batch_size, 1), "seed": (seed, 0), "rank": (rank, 0)}
        for name, (value, least) in (limits | {"world_size": (world_size, 1), "stream": (stream, 0)}).items():
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise DataError(f"{name}={value!r}: accepted is an integer of at least {least}")
        if rank >= world_size:
            raise DataError(f"rank={rank}: accepted is 0 to {world_size - 1}, below world_size")
        if crops not in CROPS:
            raise DataError(f"crops={crops!r}: accepted is {' or '.join(CROPS)}")
        self.seq_len, self.batch_size, self.seed = int(seq_len), int(batch_size), int(seed)
        self.rank, self.world_size, self.crops, self.stream = int(rank), int(world_size), crops, int(stream)
        self.index = 0
        self._region, offsets = _region(store_or_bytes, offsets)
        self._check_length(store_or_bytes)
        self._ends = self._documents(offsets) if crops == "document" else None
        self._windows = -(-len(self._region) // self.seq_len)
        self._orders: dict[int, np.ndarray] = {}
        self._key = np.random.SeedSequence([self.seed, self.stream]).generate_state(2, np.uint64)

    @property
    def n_bytes(self) -> int:
        """Bytes of the region."""
        return len(self._region)

    @property
    def samples_per_epoch(self) -> int:
        """Crops in an epoch of crops="any", over all ranks."""
        return self._windows

    def starts(self, index: int) -> np.ndarray:
        """int64 [batch_size]: the first byte of each crop of step `index` (0, 1, 2, ...) on this rank."""
        first = (int(index) * self.world_size + self.rank) * self.batch_size
        if first < 0:
            raise DataError(f"index={index}: accepted is 0 or more")
        return self._any_starts(first) if self._ends is None else self._document_starts(first)

    def batch(self, index: int) -> torch.Tensor:
        """uint8 [batch_size, seq_len] on the CPU: the crops of step `index` on this rank."""
        starts = self.starts(index)
        n, length = len(self._region), self.seq_len
        inside = starts <= n - length
        if inside.all():
            return torch.from_numpy(np.lib.stride_tricks.sliding_window_view(self._region, length)[starts])
        out = np.empty((self.batch_size, length), np.uint8)
        if inside.any():
            out[inside] = np.lib.stride_tricks.sliding_window_view(self._region, length)[starts[inside]]
        out[~inside] = self._region[(starts[~inside, None] + np.arange(length)) % n]
        return torch.from_numpy(out)

    def next(self) -> torch.Tensor:
        """The batch at the current position, uint8 [batch_size, seq_len]; moves on by one step."""
        batch = self.batch(self.index)
        self.index += 1
        return batch

    def state_dict(self) -> dict:
        """The position, and what it belongs to. The same on every rank."""
        samples = self.index * self.batch_size * self.world_size
        return {"index": self.index, "samples": samples, "batch_size": self.batch_size, **self._identity()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved position.

        With the saved batch size and number of ranks that is exact. With others it goes on from the last whole
        step at or before the saved sample, so less than a step's crops come twice. Raises DataError when the state
        belongs to another region, seed, stream, sequence length or kind of crop.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise DataError(f"sampler state {name}={state.get(name)!r}: this sampler has {value!r}")
        self.index = int(state["samples"]) // (self.batch_size * self.world_size)

    def _identity(self) -> dict:
        names = ("seed", "stream", "seq_len", "crops", "n_bytes")
        return {name: getattr(self, name) for name in names}

    def _check_length(self, source) -> None:
        n = len(self._region)
        if n < 2:
            raise DataError(f"{_name(source)}: it has {n} bytes to train on; {self.seq_len} are needed, 2 at the least")
        if n < self.seq_len:
            warnings.warn(
                f"{_name(source)}: {n} bytes to train on are fewer than seq_len={self.seq_len}; they are repeated",
                UserWarning,
                stacklevel=3,
            )

    def _documents(self, offsets: np.ndarray | None) -> np.ndarray:
        """int64 [documents + 1]: 0 and the end of every document that starts in the region, cut at its end."""
        if offsets is None:
            raise DataError("offsets=None: crops='document' needs a ByteStore, or the document starts as offsets")
        n = len(self._region)
        bounds = np.asarray(offsets, np.int64)
        bounds = np.append(bounds[bounds < n], n)
        if bounds[0] != 0 or (np.diff(bounds) <= 0).any():
            raise DataError("offsets: accepted are increasing document starts, the first of them 0")
        return bounds

    def _any_starts(self, first: int) -> np.ndarray:
        """Sample i is window i mod windows of epoch i // windows."""
        numbers = np.arange(first, first + self.batch_size)
        epochs, places = np.divmod(numbers, self._windows)
        if epochs[0] == epochs[-1]:
            return self._epoch(int(epochs[0]))[places]
        starts = np.empty(self.batch_size, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            rows = epochs == epoch
            starts[rows] = self._epoch(epoch)[places[rows]]
        return starts

    def _epoch(self, epoch: int) -> np.ndarray:
        """int64 [windows]: the window starts of an epoch in the order of their visit."""
        if epoch not in self._orders:
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, self.stream, epoch])))
            phase = int(rng.integers(self.seq_len))
            order = (rng.permutation(self._windows) * self.seq_len + phase) % len(self._region)
            while len(self._orders) >= 2:  # a batch may straddle two epochs; older ones are cheap to make again
                del self._orders[min(self._orders)]
            self._orders[epoch] = order
        return self._orders[epoch]

    def _document_starts(self, first: int) -> np.ndarray:
        """Sample i owns the four random words at counter i of one Philox stream, whatever the batch it comes in."""
        words = np.random.Philox(key=self._key, counter=first).random_raw(4 * self.batch_size).reshape(-1, 4)
        uniform = (words[:, :2] >> np.uint64(11)) * 2.0**-53  # [batch_size, 2] in [0, 1)
        drawn = (uniform[:, 0] * len(self._region)).astype(np.int64)
        document = np.searchsorted(self._ends, drawn, side="right") - 1
        begin, end = self._ends[document], self._ends[document + 1]
        room = np.maximum(end - begin - self.seq_len + 1, 1)
        return begin + (uniform[:, 1] * room).astype(np.int64)


def _region(source, offsets) -> tuple[np.ndarray, np.ndarray | None]:
    if isinstance(source, ByteStore):
        return np.asarray(source.train), np.asarray(source.offsets)
    if isinstance(source, bytes | bytearray | memoryview):
        source = np.frombuffer(source, np.uint8)
    if not (isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim == 1):
        raise DataError(f"store_or_bytes={type(source).__name__}: accepted is a ByteStore, bytes or a uint8 array [n]")
    return np.asarray(source), offsets


def _name(source) -> str:
    return f"store {source.meta['name']}" if isinstance(source, ByteStore) else "text"
