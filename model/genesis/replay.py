"""Self-replay of hidden states (seed 000, section 2): entries (h, y, p) in preallocated storage, drawn by priority.

`ReplayRing` is the storage: fixed shapes, all state in device tensors, no host synchronisation, so that writing and
drawing can be part of a captured training step. `SelfReplayBuffer` is the same for code that adds and samples entry by
entry, with the seed's interface.

Notable: running sums are float64. In float32 the sum over a million entries stops growing, and the last of them would
never be drawn.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

EVICTIONS = ("fifo", "lowest", "reservoir")
BELOW_ONE = 1 - 2**-53  # the largest float64 under 1
UNWRITTEN = -(2**62)  # order of evictions: rows without an entry come before all that have one


class ReplayRing(nn.Module):
    """Up to `size` entries of one shape, on one device.

    Args:
        size: N, most entries.
        hidden_shape, target_shape: of one entry.
        dtype: of the stored hidden states; values beyond its range are stored as its largest.
        target_dtype: of the stored targets.
        eviction: who makes room when all rows are taken: "fifo" (the oldest), "lowest" (the lowest priority, of equal
            ones the oldest) or "reservoir" (every entry ever written is kept with the same probability; Vitter 1985,
            algorithm R).

    Attributes:
        hidden [N + 1, *hidden_shape], target [N + 1, *target_shape], priority float32 [N + 1], born int64 [N + 1]: a
            row an entry; `born` is its number among all writes. Row N takes what is not kept, and is zero.
        written: int64 scalar, entries ever written. Rows 0 … min(written, N) − 1 hold entries.

    Raises:
        ValueError: for a size under 1 or an unknown eviction.
    """

    def __init__(
        self,
        size: int,
        hidden_shape: Sequence[int],
        target_shape: Sequence[int] = (),
        *,
        dtype: torch.dtype = torch.float16,
        target_dtype: torch.dtype = torch.uint8,
        eviction: str = "fifo",
        device: torch.device | str | None = None,
    ):
        super().__init__()
        _check(size, dtype, eviction)
        self.size, self.eviction = size, eviction
        rows = size + 1
        self.register_buffer("hidden", torch.zeros(rows, *hidden_shape, dtype=dtype, device=device))
        self.register_buffer("target", torch.zeros(rows, *target_shape, dtype=target_dtype, device=device))
        self.register_buffer("priority", torch.zeros(rows, device=device))
        self.register_buffer("born", torch.zeros(rows, dtype=torch.int64, device=device))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64, device=device))

    def count(self) -> Tensor:
        """Entries held, int64 scalar."""
        return self.written.clamp(max=self.size)

    @torch.no_grad()
    def write(
        self,
        hidden: Tensor,
        target: Tensor,
        priority: Tensor,
        *,
        keep: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Store b entries; all of them evict together, so b is at most N.

        Args:
            hidden: [b, *hidden_shape] of any float type. A row that is not finite is not stored.
            target: [b, *target_shape] of the stored type.
            priority: [b]; below 0 is 0, and a row whose priority is not finite is not stored.
            keep: [b] bool or 0/1; rows to store, all when None.
            generator: of the device, for "reservoir".

        Raises:
            ValueError: for a shape or type that differs from the stored one, or for b > N.
        """
        b = len(hidden)
        self.check(hidden.shape[1:], target.shape[1:], target.dtype)
        if b > self.size or len(target) != b or priority.shape != (b,):
            raise ValueError(
                f"{b} hidden states, {len(target)} targets, priorities {tuple(priority.shape)}: "
                f"accepted are as many of each, at most {self.size}"
            )
        if not b:
            return
        kept = hidden.isfinite().reshape(b, -1).all(1) & priority.isfinite()
        if keep is not None:
            kept = kept & (keep > 0)
        rank = kept.cumsum(0) - 1  # among the rows that are kept
        time = self.written + rank
        slots = torch.where(kept, self._slots(time, rank, generator), self.size)
        if self.eviction == "reservoir":
            # Where two of the batch go to one row, the later evicts the earlier.
            same = slots[:, None] == slots
            slots = torch.where(same.triu(1).any(1), self.size, slots)

        for rows, values in (
            (self.hidden, saturated(hidden, self.hidden.dtype)),
            (self.target, target),
            (self.priority, priority.float().clamp_min(0).abs()),  # abs: -0.0 is 0.0
            (self.born, time),
        ):
            rows.index_copy_(0, slots, values)
            rows[self.size].zero_()
        self.written.add_(kept.sum())

    def _slots(self, time: Tensor, rank: Tensor, generator: torch.Generator | None) -> Tensor:
        """The row [b] that the writes number `time` [b] go to."""
        if self.eviction == "fifo":
            return time % self.size
        if self.eviction == "lowest":
            return self.lowest(len(time))[rank.clamp_min(0)]
        uniform = torch.rand(time.shape, dtype=torch.float64, device=time.device, generator=generator)
        drawn = (uniform * (time + 1)).long()
        return torch.where(time < self.size, time, drawn.clamp(max=self.size))

    def lowest(self, n: int) -> Tensor:
        """The n rows to give up first, [n]: without an entry, then by priority, then by age."""
        # The bits of floats ≥ 0 sort as the floats do; the write's number breaks ties.
        order = (self.priority.view(torch.int32).long() << 32) | self.born
        rows = torch.arange(self.size, device=order.device)
        order = torch.where(rows < self.written, order[: self.size], rows + UNWRITTEN)
        return order.topk(n, largest=False).indices

    @torch.no_grad()
    def draw(self, n: int, uniform: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """n rows with replacement, each with probability priority / sum, or evenly when all priorities are 0.

        Args:
            uniform: [n] in [0, 1), the random numbers to draw with; float64 reaches the most rows. Drawn from
                `generator` of the device when None.

        Returns:
            [n] int64; all 0 while nothing is stored.
        """
        if uniform is None:
            uniform = torch.rand(n, dtype=torch.float64, device=self.priority.device, generator=generator)
        elif uniform.shape != (n,):
            raise ValueError(f"uniform has shape {tuple(uniform.shape)}: accepted is ({n},)")
        else:
            uniform = uniform.double().clamp(0, BELOW_ONE)
        count = self.count()
        sums = self.priority[: self.size].cumsum(0, dtype=torch.float64)
        total = sums[-1]
        # right=True steps over rows of priority 0, whose sum is that of the row before.
        steered = torch.searchsorted(sums, uniform * total, right=True)
        rows = torch.where(total > 0, steered, (uniform * count).long())
        return torch.minimum(rows, count - 1).clamp_min(0)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The entries of rows [n].

        Returns:
            hidden [n, *hidden_shape] float32, target [n, *target_shape], and valid [n] bool: whether the row has one.
        """
        return self.hidden[rows].float(), self.target[rows], rows < self.written

    @torch.no_grad()
    def reprioritise(self, rows: Tensor, values: Tensor) -> None:
        """Set priorities [n] of rows [n]; of one row's values the largest counts, values not finite do not."""
        rows = torch.where((rows < self.written) & values.isfinite(), rows, self.size)
        values = values.float().clamp_min(0).abs()
        self.priority.scatter_reduce_(0, rows, values, "amax", include_self=False)
        self.priority[self.size].zero_()

    def check(self, hidden_shape: Sequence[int], target_shape: Sequence[int], target_dtype: torch.dtype) -> None:
        """Raises ValueError naming both, when the shapes or the type of an entry are not those of the stored ones."""
        for name, found, stored in (
            ("hidden has shape", tuple(hidden_shape), tuple(self.hidden.shape[1:])),
            ("target has shape", tuple(target_shape), tuple(self.target.shape[1:])),
            ("target is", target_dtype, self.target.dtype),
        ):
            if found != stored:
                raise ValueError(f"{name} {found}: accepted is {stored}, as stored")

    def _apply(self, fn, recurse: bool = True):
        # A module's .to(device) takes the entries along; its .half() or .double() does not change their types.
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)


class SelfReplayBuffer(nn.Module):
    """The seed's replay buffer: entries of one hidden state, its target and its priority (seed 000, sections 2 and 8).

    Storage is allocated when the first entry is added. It is part of `state_dict`, and moves with the module that the
    buffer is in, unless it has a device of its own.

    Args:
        max_size: most entries.
        dtype: of the stored hidden states.
        eviction: "fifo", "lowest" or "reservoir"; see `ReplayRing`.
        device: where entries are stored; None is where the first one lives.

    Raises:
        ValueError: for a size under 1, a type that is not floating-point or an unknown eviction.
    """

    def __init__(
        self,
        max_size: int = 1000,
        dtype: torch.dtype = torch.float16,
        *,
        eviction: str = "fifo",
        device: torch.device | str | None = None,
    ):
        super().__init__()
        _check(max_size, dtype, eviction)
        self.max_size, self.dtype, self.eviction, self.device = max_size, dtype, eviction, device
        self.register_module("ring", None)

    def add(self, hidden: Tensor, target: Tensor, priority: float = 1.0) -> None:
        """Store a copy of one entry, detached.

        Args:
            hidden: of any shape, that of the entries before; finite.
            target: likewise, of their type too.
            priority: finite; below 0 is 0.

        Raises:
            ValueError: naming both shapes when they differ, or for values that are not finite.
        """
        hidden, target = torch.as_tensor(hidden).detach(), torch.as_tensor(target).detach()
        priority = _finite("priority", priority)
        if not hidden.isfinite().all():
            raise ValueError(f"hidden {tuple(hidden.shape)} has values that are not finite: accepted are finite ones")
        if self.ring is None:
            self._allocate(hidden.shape, target.shape, target.dtype, self.device or hidden.device)
        self.ring.check(hidden.shape, target.shape, target.dtype)
        ring, written = self.ring, int(self.ring.written)
        slot = self._slot(written)
        if slot < self.max_size:
            ring.hidden[slot].copy_(saturated(hidden, self.dtype))
            ring.target[slot].copy_(target)
            ring.priority[slot] = priority
            ring.born[slot] = written
        ring.written.add_(1)

    def sample(
        self, batch_size: int = 1, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Entries drawn with replacement in proportion to priority, evenly when all are 0.

        Args:
            batch_size: n ≥ 1.
            device: of the result; where they are stored when None.

        Returns:
            hidden states [n, *hidden shape] float32 and targets [n, *target shape]; (None, None) when empty.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: accepted is an integer ≥ 1")
        if not len(self):
            return None, None
        hidden, target, _ = self.ring.gather(self.ring.draw(batch_size))
        return hidden.to(device), target.to(device)

    def update_priority(self, index: int | Iterable[int], value: float | Iterable[float]) -> None:
        """Set the priority of one or several entries by their place in `buffer`; all of them or, on an error, none.

        Args:
            index: from 0, the oldest, to len − 1; or several, as a sequence or tensor.
            value: finite, below 0 is 0; one for all or one for each.

        Raises:
            IndexError: for an index out of range.
            ValueError: for a value that is not finite, or for other numbers of values than of indices.
        """
        indices = [operator.index(i) for i in _listed(index)]
        values = [_finite("value", v) for v in _listed(value)]
        if len(values) == 1 and not _is_many(value):
            values *= len(indices)
        if len(values) != len(indices):
            raise ValueError(f"{len(values)} values for {len(indices)} indices: accepted is one value or one for each")
        for i in indices:
            if not 0 <= i < len(self):
                raise IndexError(f"index={i}: accepted is from 0 to under {len(self)}, the number of entries")
        if indices:
            last = dict(zip(indices, values))  # of an index given twice
            self.ring.priority[self._rows(list(last))] = self.ring.priority.new_tensor(list(last.values()))

    @property
    def buffer(self) -> "Entries":
        """The entries (hidden, target, priority), oldest first; a view to read from."""
        return Entries(self)

    def __len__(self) -> int:
        return 0 if self.ring is None else int(self.ring.count())

    def _slot(self, written: int) -> int:
        """`ReplayRing`'s choice for a single write, on the host: a fifth of the time."""
        if written < self.max_size:
            return written
        if self.eviction == "fifo":
            return written % self.max_size
        if self.eviction == "lowest":
            return int(self.ring.lowest(1))
        return int(torch.randint(written + 1, ()))

    def _rows(self, places: Sequence[int]) -> Tensor:
        """The ring's rows of entries by their place from the oldest, [n]."""
        ring = self.ring
        places = torch.tensor(places, device=ring.born.device)
        if self.eviction == "fifo":
            return (places + (ring.written - self.max_size).clamp_min(0)) % self.max_size
        return ring.born[: len(self)].argsort()[places]

    def _allocate(self, hidden_shape: Sequence[int], target_shape: Sequence[int], target_dtype, device) -> None:
        self.ring = ReplayRing(
            self.max_size,
            hidden_shape,
            target_shape,
            dtype=self.dtype,
            target_dtype=target_dtype,
            eviction=self.eviction,
            device=device,
        )

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        hidden, target = state_dict.get(f"{prefix}ring.hidden"), state_dict.get(f"{prefix}ring.target")
        if hidden is None or target is None:
            self.ring = None
        else:
            device = self.device or (hidden.device if self.ring is None else self.ring.hidden.device)
            self._allocate(hidden.shape[1:], target.shape[1:], target.dtype, device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn, recurse: bool = True):
        return self if self.device is not None else super()._apply(fn, recurse)


class Entries(Sequence):
    """The entries of a `SelfReplayBuffer` in order: (hidden of the storage type, target, priority as a float)."""

    def __init__(self, owner: SelfReplayBuffer):
        self._owner = owner

    def __len__(self) -> int:
        return len(self._owner)

    def __getitem__(self, index: int | slice) -> tuple[Tensor, Tensor, float] | list[tuple[Tensor, Tensor, float]]:
        chosen = range(len(self))[index]  # raises IndexError as a list does
        entries = self._read(chosen if isinstance(index, slice) else (chosen,))
        return entries if isinstance(index, slice) else entries[0]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        return iter(self[:])

    def _read(self, chosen: Sequence[int]) -> list[tuple[Tensor, Tensor, float]]:
        if not len(chosen):
            return []
        ring = self._owner.ring
        rows = self._owner._rows(list(chosen))
        return list(zip(ring.hidden[rows], ring.target[rows], ring.priority[rows].tolist()))


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in a type of a smaller range, those beyond it as its largest."""
    largest = torch.finfo(dtype).max
    if values.is_floating_point() and torch.finfo(values.dtype).max > largest:
        values = values.clamp(-largest, largest)
    return values.to(dtype)


def _check(size: int, dtype: torch.dtype, eviction: str) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"max_size={size!r}: accepted is an integer ≥ 1")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r}: accepted are floating-point types")
    if eviction not in EVICTIONS:
        raise ValueError(f"eviction={eviction!r}: accepted are {', '.join(EVICTIONS)}")


def _finite(name: str, value: float) -> float:
    number = float(value)
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name}={number!r}: accepted is a finite number; below 0 counts as 0")
    return number if number > 0 else 0.0


def _is_many(value: object) -> bool:
    return isinstance(value, Iterable) and not (isinstance(value, Tensor) and value.dim() == 0)


def _listed(value: object) -> list:
    if isinstance(value, Tensor):
        return value.reshape(-1).tolist()
    return list(value) if isinstance(value, Iterable) else [value]
