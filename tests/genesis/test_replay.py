"""Entries are kept, evicted and drawn as plain Python and statistics say; the ring never waits for its device."""

import contextlib
import math
import time
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.genesis import SelfReplayBuffer
from model.genesis.replay import EVICTIONS, ReplayRing

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@contextlib.contextmanager
def no_host_reads():
    """Fails for an operation that reads a tensor's value on the host, or whose shape depends on one."""
    forbidden = ("local_scalar", "nonzero", "equal", "masked_select", "unique", "repeat_interleave")
    reads = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function).split(".")[1]
            masked = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
            if masked or any(word in name for word in forbidden):
                reads.append(name)
            return function(*args, **(kwargs or {}))

    with Spy():
        yield
    assert reads == []


def chi_square(counts, expected) -> float:
    """Pearson's statistic of counts against expected ones."""
    return sum((count - e) ** 2 / e for count, e in zip(counts, expected, strict=True))


def limit(degrees: int) -> float:
    """A chi-square value with so many degrees of freedom exceeds this once in 10,000 times (Wilson and Hilferty)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.72 * math.sqrt(spread)) ** 3


def entry(i: int, width: int = 3):
    return torch.full((width,), float(i)), torch.tensor(i)


def contents(buffer: SelfReplayBuffer) -> list[int]:
    return [int(target) for _, target, _ in buffer.buffer]


def filled(priorities, **options) -> SelfReplayBuffer:
    buffer = SelfReplayBuffer(len(priorities), **options)
    for i, priority in enumerate(priorities):
        buffer.add(*entry(i), priority)
    return buffer


def ring_of(priorities: torch.Tensor, **options) -> ReplayRing:
    """Entry i has hidden and target i, and its priority."""
    n = len(priorities)
    ring = ReplayRing(n, (1,), (), dtype=torch.float32, target_dtype=torch.int64, **options)
    numbers = torch.arange(n)
    ring.write(numbers[:, None].float(), numbers, priorities)
    return ring


# ── the seed's interface ─────────────────────────────────────────────────────────────────────────────────────────────


def test_an_empty_buffer_gives_nothing():
    buffer = SelfReplayBuffer()
    assert (buffer.max_size, buffer.dtype) == (1000, torch.float16)
    assert buffer.sample() == (None, None) and buffer.sample(5, device="cpu") == (None, None)
    assert len(buffer) == len(buffer.buffer) == 0 and list(buffer.buffer) == [] and buffer.buffer[:] == []
    with pytest.raises(IndexError):
        buffer.buffer[0]
    with pytest.raises(IndexError):
        buffer.update_priority(0, 1.0)


def test_entries_are_copies_in_the_storage_type():
    buffer = SelfReplayBuffer(4)
    h = torch.tensor([0.1, -2.0], requires_grad=True)
    buffer.add(h * 1, torch.tensor(7), priority=2.5)
    with torch.no_grad():
        h.zero_()
    hidden, target, priority = buffer.buffer[0]
    assert hidden.dtype == torch.float16 and not hidden.requires_grad
    assert torch.equal(hidden, torch.tensor([0.1, -2.0]).half()) and int(target) == 7 and priority == 2.5
    hidden.zero_()
    assert buffer.buffer[-1][0][1] == -2.0, "what the sequence gives is not the storage"


def test_samples_are_stacked_in_float32_with_their_own_targets():
    buffer = SelfReplayBuffer(8)
    for i in range(8):
        buffer.add(torch.full((2, 5), i / 4), torch.tensor([i, -i]))
    hidden, target = buffer.sample(batch_size=20, device="cpu")
    assert hidden.shape == (20, 2, 5) and hidden.dtype == torch.float32 and target.shape == (20, 2)
    assert target.dtype == torch.int64 and torch.equal(hidden[:, 0, 0] * 4, target[:, 0].float())
    assert torch.equal(target[:, 0], -target[:, 1])
    assert [x.shape[0] for x in buffer.sample()] == [1, 1]


def test_the_buffer_is_a_sequence_from_the_oldest():
    buffer = filled([1.0] * 5)
    buffer.add(*entry(5))
    assert contents(buffer) == [1, 2, 3, 4, 5]
    assert [int(y) for _, y, _ in buffer.buffer[1:4]] == [2, 3, 4] and int(buffer.buffer[-1][1]) == 5
    assert [int(y) for _, y, _ in reversed(buffer.buffer)] == [5, 4, 3, 2, 1]
    with pytest.raises(IndexError):
        buffer.buffer[5]


@pytest.mark.parametrize("priority", [-5.0, -0.0, float("-1e-30")])
def test_negative_priorities_are_zero(priority):
    buffer = filled([priority, 1.0])
    assert math.copysign(1, buffer.buffer[0][2]) == 1 and buffer.buffer[0][2] == 0.0
    assert set(buffer.sample(200)[1].tolist()) == {1}
    buffer.update_priority([0, 1], [3.0, -1.0])
    assert [p for _, _, p in buffer.buffer] == [3.0, 0.0]
    assert set(buffer.sample(200)[1].tolist()) == {0}


def test_priorities_can_be_set_one_and_several_at_a_time():
    buffer = SelfReplayBuffer(3)
    for i in range(5):  # the ring has gone round
        buffer.add(*entry(i))
    buffer.update_priority(0, 7.0)
    buffer.update_priority([1, 2], 0.5)
    assert [(int(y), p) for _, y, p in buffer.buffer] == [(2, 7.0), (3, 0.5), (4, 0.5)]
    buffer.update_priority(torch.tensor([2, 0]), torch.tensor([1.0, 2.0]))
    buffer.update_priority(torch.tensor(1), torch.tensor(4.0))
    assert [p for _, _, p in buffer.buffer] == [2.0, 4.0, 1.0]
    buffer.update_priority([], [])
    buffer.update_priority([1, 1], [8.0, 9.0])
    assert buffer.buffer[1][2] == 9.0, "the last of one index counts"


@pytest.mark.parametrize("index, value", [(3, 1.0), (-1, 1.0), ([0, 3], [5.0, 5.0]), (torch.tensor([0, -1]), 5.0)])
def test_an_index_out_of_range_changes_nothing(index, value):
    buffer = SelfReplayBuffer(10)
    for i in range(3):
        buffer.add(*entry(i))
    with pytest.raises(IndexError, match="under 3"):
        buffer.update_priority(index, value)
    assert [p for _, _, p in buffer.buffer] == [1.0] * 3


def test_bad_input_is_named_and_nothing_is_lost():
    buffer = filled([1.0, 1.0])
    for hidden, target, priority, words in (
        (torch.zeros(4), torch.tensor(0), 1.0, [r"\(4,\)", r"\(3,\)"]),
        (torch.zeros(1, 3), torch.tensor(0), 1.0, [r"\(1, 3\)", r"\(3,\)"]),
        (torch.zeros(3), torch.tensor([0]), 1.0, [r"\(1,\)", r"\(\)"]),
        (torch.zeros(3), torch.tensor(0.5), 1.0, ["float32", "int64"]),
        (torch.tensor([0.0, math.nan, 0.0]), torch.tensor(0), 1.0, ["finite"]),
        (torch.zeros(3), torch.tensor(0), math.inf, ["priority=inf"]),
        (torch.zeros(3), torch.tensor(0), math.nan, ["priority=nan"]),
    ):
        for word in words:
            with pytest.raises(ValueError, match=word):
                buffer.add(hidden, target, priority)
    for index, value in (([0, 1], [1.0]), (0, [1.0, 2.0]), (0, math.nan)):
        with pytest.raises(ValueError):
            buffer.update_priority(index, value)
    for size in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="batch_size"):
            buffer.sample(size)
    assert contents(buffer) == [0, 1] and [p for _, _, p in buffer.buffer] == [1.0, 1.0]
    for options in ({"max_size": 0}, {"dtype": torch.int8}, {"eviction": "random"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SelfReplayBuffer(**options)


def test_values_beyond_float16_are_stored_as_its_largest():
    buffer = SelfReplayBuffer(1)
    buffer.add(torch.tensor([1e6, -1e30, 3.0]), torch.tensor(0))
    assert buffer.sample()[0].tolist() == [[65504.0, -65504.0, 3.0]]


def test_nothing_large_is_allocated_before_the_first_entry():
    buffer = SelfReplayBuffer(10**12)
    assert buffer.state_dict() == {} and len(buffer) == 0


# ── drawing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_samples_follow_the_priorities():
    torch.manual_seed(1)
    priorities = [0.0, 1.0, 2.0, 0.0, 0.5, 4.0, 1e-3, 0.0]
    buffer = filled(priorities)
    draws = 50_000
    counts = Counter(buffer.sample(draws)[1].tolist())
    assert {i for i in counts if priorities[i] == 0} == set()
    likely = [i for i, p in enumerate(priorities) if p > 0]
    expected = [draws * priorities[i] / sum(priorities) for i in likely]
    assert chi_square([counts[i] for i in likely], expected) < limit(len(likely) - 1)
    buffer.update_priority(range(8), [1.0] * 8)
    evenly = Counter(buffer.sample(draws)[1].tolist())
    assert chi_square([evenly[i] for i in range(8)], [draws / 8] * 8) < limit(7)


@pytest.mark.parametrize("held", [3, 8])
def test_samples_are_even_when_all_priorities_are_zero(held):
    torch.manual_seed(2)
    buffer = SelfReplayBuffer(8)
    for i in range(held):
        buffer.add(*entry(i), 0.0)
    counts = Counter(buffer.sample(20_000)[1].tolist())
    assert set(counts) == set(range(held))
    assert chi_square(counts.values(), [20_000 / held] * held) < limit(held - 1)


def test_of_a_million_entries_the_few_with_priority_are_drawn():
    priorities = torch.zeros(1_000_000)
    few = [0, 1, 123_456, 999_998, 999_999]
    priorities[few] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    ring = ring_of(priorities)
    counts = Counter(ring.draw(60_000, generator=torch.Generator().manual_seed(3)).tolist())
    assert set(counts) == set(few)
    assert chi_square([counts[i] for i in few], [4000, 8000, 12000, 16000, 20000]) < limit(4)


def test_a_large_priority_does_not_swallow_a_million_small_ones():
    """1e8 + 1 is 1e8 in float32: with float32 sums most entries would never be drawn."""
    priorities = torch.ones(1_000_000)
    priorities[0] = 1e8
    drawn = ring_of(priorities).draw(100_000, generator=torch.Generator().manual_seed(4))
    small = drawn[drawn > 0]
    assert chi_square([len(small), 100_000 - len(small)], [100_000 / 101, 100_000 * 100 / 101]) < limit(1)
    for groups in (torch.bincount(small // 100_000, minlength=10), torch.bincount(small % 8, minlength=8)):
        assert chi_square(groups.tolist(), [len(small) / len(groups)] * len(groups)) < limit(len(groups) - 1)


def test_uniform_numbers_decide_the_rows():
    ring = ring_of(torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, 0.0]))
    uniform = torch.tensor([0.0, 0.24, 0.25, 0.74, 0.75, 0.99, 1.0, 2.0], dtype=torch.float64)
    assert ring.draw(8, uniform).tolist() == [0, 0, 2, 2, 4, 4, 4, 4]
    assert ring.draw(3, uniform[:3].float()).tolist() == [0, 0, 2]
    with pytest.raises(ValueError, match="uniform"):
        ring.draw(3, uniform)


def test_an_empty_ring_draws_row_0_which_is_not_valid():
    ring = ReplayRing(5, (2,), (4,))
    rows = ring.draw(3)
    hidden, target, valid = ring.gather(rows)
    assert rows.tolist() == [0, 0, 0] and valid.tolist() == [False] * 3
    assert hidden.dtype == torch.float32 and not hidden.any() and target.dtype == torch.uint8
    ring.reprioritise(rows, torch.ones(3))
    ring.write(torch.ones(1, 2), torch.ones(1, 4, dtype=torch.uint8), torch.zeros(1))
    assert ring.gather(ring.draw(3))[2].all() and ring.priority.tolist() == [0.0] * 6


def test_sampling_a_million_is_quick():
    buffer = SelfReplayBuffer(1_000_000, dtype=torch.float32)
    buffer.add(torch.zeros(2), torch.tensor(0))
    n = torch.arange(1, 1_000_000)
    buffer.ring.write(n[:, None].expand(-1, 2), n, torch.rand(len(n)))
    assert len(buffer) == 1_000_000
    buffer.sample(32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        buffer.sample(32)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05, "a pass over the priorities, no loop over the entries"


@needs_cuda
def test_sampling_a_million_takes_under_a_millisecond_on_cuda():
    buffer = SelfReplayBuffer(1_000_000, device="cuda")
    buffer.add(torch.zeros(64), torch.tensor(0))
    n = torch.arange(1, 1_000_000, device="cuda")
    buffer.ring.write(torch.randn(len(n), 64, device="cuda"), n, torch.rand(len(n), device="cuda"))
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        hidden, _ = buffer.sample(32)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    assert hidden.is_cuda and min(times) < 1e-3


# ── eviction ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class PlainList:
    """What the policies mean: entries (number, priority) in a Python list, one at a time."""

    def __init__(self, size, eviction):
        self.size, self.eviction, self.entries = size, eviction, []

    def write(self, batch):
        for _ in range(len(self.entries) + len(batch) - self.size):
            gone = 0 if self.eviction == "fifo" else min(range(len(self.entries)), key=lambda i: self.entries[i][1])
            del self.entries[gone]
        self.entries += batch


@pytest.mark.parametrize("eviction", ["fifo", "lowest"])
@pytest.mark.parametrize("b", [1, 3, 7])
def test_the_ring_evicts_as_a_plain_list_does(eviction, b):
    """Random priorities with many ties, rows that are not to be kept or not finite, and priorities that change."""
    generator = torch.Generator().manual_seed(b)
    ring = ReplayRing(7, (2,), (1,), target_dtype=torch.int64, eviction=eviction)
    plain = PlainList(7, eviction)
    number = 0
    for _ in range(40):
        priority = torch.randint(4, (b,), generator=generator).float()
        keep = torch.rand(b, generator=generator) < 0.8
        numbers = torch.arange(number, number + b)
        hidden = numbers[:, None].expand(b, 2).float().clone()
        broken = torch.rand(b, generator=generator) < 0.1
        hidden[broken, 1] = math.nan
        ring.write(hidden, numbers[:, None], priority, keep=keep)
        plain.write([(number + i, priority[i].item()) for i in range(b) if keep[i] and not broken[i]])
        number += b

        held = int(ring.count())
        stored = sorted(zip(ring.target[:held, 0].tolist(), ring.priority[:held].tolist()))
        assert stored == sorted(plain.entries)
        assert torch.equal(ring.hidden[:held, 0].long(), ring.target[:held, 0])
        assert not any(rows[7].any() for rows in (ring.hidden, ring.target, ring.priority, ring.born))
        if held:
            row = int(torch.randint(held, (), generator=generator))
            ring.reprioritise(torch.tensor([row]), torch.tensor([2.0]))
            known = int(ring.target[row])
            plain.entries = [(i, 2.0 if i == known else p) for i, p in plain.entries]


@pytest.mark.parametrize("eviction", ["fifo", "lowest"])
def test_the_buffer_evicts_as_its_ring_does(eviction):
    torch.manual_seed(5)
    buffer, plain = SelfReplayBuffer(6, eviction=eviction), PlainList(6, eviction)
    for i in range(50):
        priority = float(torch.randint(4, ()))
        buffer.add(*entry(i), priority)
        plain.write([(i, priority)])
        assert [(int(y), p) for _, y, p in buffer.buffer] == plain.entries, "oldest first, too"
        buffer.update_priority(i % len(buffer), 1.5)
        plain.entries[i % len(buffer)] = (plain.entries[i % len(buffer)][0], 1.5)


@pytest.mark.parametrize("b", [1, 5])
def test_a_reservoir_keeps_every_entry_with_the_same_probability(b):
    """6 of 30 for each of them, first and last, whether they come alone or in batches."""
    generator = torch.Generator().manual_seed(6)
    trials, stream, counts = 120 if b == 1 else 300, 30, Counter()
    for _ in range(trials):
        ring = ReplayRing(6, (1,), (), target_dtype=torch.int64, eviction="reservoir")
        for start in range(0, stream, b):
            n = torch.arange(start, start + b)
            ring.write(n[:, None].float(), n, torch.ones(b), generator=generator)
        counts.update(ring.target[:6].tolist())
        assert ring.written == stream and len(set(ring.target[:6].tolist())) == 6
    expected = trials * 6 / stream
    statistic = chi_square([counts[i] for i in range(stream)], [expected] * stream)
    statistic *= (stream - 1) / stream / (1 - 6 / stream)  # the six of a trial are drawn without replacement
    assert statistic < limit(stream - 1) and min(counts.values()) > 0


def test_a_buffer_can_be_a_reservoir():
    torch.manual_seed(7)
    early = 0
    for _ in range(100):
        buffer = SelfReplayBuffer(4, eviction="reservoir")
        for i in range(16):
            buffer.add(*entry(i))
        kept = contents(buffer)
        assert kept == sorted(kept) and len(kept) == 4
        early += sum(i < 8 for i in kept)
    assert 150 < early < 250, "of 400 kept, half are from the first half"


def test_of_one_row_the_largest_new_priority_counts():
    ring = ring_of(torch.ones(4))
    ring.reprioritise(torch.tensor([2, 0, 2, 1, 3]), torch.tensor([5.0, -1.0, 0.5, math.nan, math.inf]))
    assert ring.priority.tolist() == [0.0, 1.0, 5.0, 1.0, 0.0]


def test_the_ring_names_what_does_not_fit():
    ring = ReplayRing(4, (3,), (2,))
    good = torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.uint8), torch.ones(2)
    ring.write(*good)
    for place, wrong, words in (
        (0, torch.zeros(2, 5), r"\(5,\): accepted is \(3,\)"),
        (1, torch.zeros(2, 1, dtype=torch.uint8), r"\(1,\): accepted is \(2,\)"),
        (1, torch.zeros(2, 2), "uint8"),
        (1, torch.zeros(3, 2, dtype=torch.uint8), "3 targets"),
        (2, torch.ones(3), r"priorities \(3,\)"),
    ):
        entries = list(good)
        entries[place] = wrong
        with pytest.raises(ValueError, match=words):
            ring.write(*entries)
    with pytest.raises(ValueError, match="at most 4"):
        ring.write(torch.zeros(5, 3), torch.zeros(5, 2, dtype=torch.uint8), torch.ones(5))
    ring.write(torch.zeros(0, 3), torch.zeros(0, 2, dtype=torch.uint8), torch.ones(0))
    assert ring.written == 2


# ── state ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_saved_buffer_goes_on_exactly(tmp_path, eviction):
    def go_on(buffer):
        torch.manual_seed(8)
        for i in range(20, 28):
            buffer.add(*entry(i), i % 3)
        return [(h.tolist(), int(y), p) for h, y, p in buffer.buffer], buffer.sample(50)[1].tolist()

    buffer = SelfReplayBuffer(5, eviction=eviction)
    for i in range(9):
        buffer.add(*entry(i), i % 4)
    save_file(buffer.state_dict(), tmp_path / "buffer.safetensors")
    restored = SelfReplayBuffer(5, eviction=eviction)
    restored.load_state_dict(load_file(tmp_path / "buffer.safetensors"))
    assert go_on(restored) == go_on(buffer)


def test_loading_into_a_used_buffer_replaces_what_it_held():
    empty, used = SelfReplayBuffer(5), filled([1.0] * 5)
    other = SelfReplayBuffer(5)
    other.add(torch.zeros(2, 2), torch.tensor([1, 2]))
    used.load_state_dict(other.state_dict())
    assert len(used) == 1 and used.buffer[0][0].shape == (2, 2)
    used.load_state_dict(empty.state_dict())
    assert used.sample() == (None, None)
    with pytest.raises(RuntimeError, match="size mismatch"):
        SelfReplayBuffer(6).load_state_dict(other.state_dict())


def test_a_module_does_not_change_the_type_of_what_is_stored():
    module = nn.ModuleDict({"memory": filled([1.0, 2.0])})
    before = {name: x.clone() for name, x in module.state_dict().items()}
    module.double().half()
    assert all(
        torch.equal(x, before[name]) and x.dtype == before[name].dtype for name, x in module.state_dict().items()
    )
    module.to("meta")
    assert module["memory"].ring.hidden.is_meta
    fixed = nn.ModuleDict({"memory": filled([1.0], device="cpu")}).to("meta")
    assert not fixed["memory"].ring.hidden.is_meta


# ── the device ───────────────────────────────────────────────────────────────────────────────────────────────────────


def one_round(ring, hidden, target, priority, uniform):
    """What a training step does with a ring."""
    rows = ring.draw(len(uniform), uniform)
    seen, bytes_, valid = ring.gather(rows)
    ring.reprioritise(rows, seen.flatten(1).mean(1))
    ring.write(hidden, target, priority, keep=priority > 0.2)
    return seen, bytes_, valid


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_the_ring_never_reads_a_tensor_on_the_host(eviction):
    ring = ReplayRing(5, (6, 4), (6, 2), eviction=eviction)
    batch = torch.randn(3, 6, 4), torch.randint(256, (3, 6, 2), dtype=torch.uint8), torch.rand(3), torch.rand(4)
    with no_host_reads():
        for _ in range(3):
            one_round(ring, *batch)
        ring.draw(4)
    assert ring.written > 5


@needs_cuda
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_captured_ring_does_what_an_eager_one_does(eviction):
    rings = [ReplayRing(5, (4,), (2,), eviction=eviction, device="cuda") for _ in range(2)]
    inputs = [
        x.cuda() for x in (torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(3), torch.rand(4))
    ]
    one_round(ReplayRing(5, (4,), (2,), eviction=eviction, device="cuda"), *inputs)  # libraries set themselves up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = one_round(rings[0], *inputs)
    for i in range(6):
        new = torch.randn(3, 4), torch.randint(256, (3, 2), dtype=torch.uint8), torch.rand(3), torch.rand(4)
        for x, y in zip(inputs, new):
            x.copy_(y)
        torch.cuda.manual_seed(i)
        graph.replay()
        torch.cuda.manual_seed(i)
        eager = one_round(rings[1], *inputs)
        assert all(torch.equal(x, y) for x, y in zip(captured, eager))
        assert all(torch.equal(x, y) for x, y in zip(rings[0].buffers(), rings[1].buffers()))
    assert rings[0].written > 5
