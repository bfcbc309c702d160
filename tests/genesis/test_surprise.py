"""Recurring surprises: against a count of the runs themselves."""

from collections import Counter

import pytest
import torch

from model.genesis.surprise import CONTEXT, RecurringSurprises, surprising
from tests.genesis.test_replay import needs_cuda

TEXTS = {
    "repetitive": b"abcabdabcabeabcabd" * 12,
    "Turkish": "Şu ılık çayın içinde İstanbul'un sesi; şu ılık çayın içinde Iğdır'ın sesi. ".encode() * 3,
    "emoji": "🌳🦊 günaydın 🌳🦊🐚 iyi geceler ".encode() * 5,
    "binary": bytes(range(256)) + bytes(64) + bytes(range(200)) + b"\xff" * 40,
}


def rows(text: bytes, length: int) -> torch.Tensor:
    return torch.tensor(list(text[: len(text) // length * length]), dtype=torch.uint8).view(-1, length)


def runs(row: list[int]) -> list[bytes | None]:
    """What ends at each byte: its 16 bytes, or None at the beginning."""
    return [bytes(row[i - 15 : i + 1]) if i >= 15 else None for i in range(len(row))]


@pytest.mark.parametrize("name", TEXTS)
def test_a_run_is_seen_once_after_one_batch_in_which_it_surprised(name):
    x = rows(TEXTS[name], 48)
    kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    memory = RecurringSurprises()
    known: Counter[bytes] = Counter()  # batches of its surprises
    found = 0
    for batch, marks in zip(x.split(2), kept.split(2)):
        expected = [[known[run] == 1 for run in runs(row)] for row in batch.tolist()]
        assert memory.seen_once(batch).tolist() == expected
        found += sum(map(sum, expected))
        memory.write(batch, marks)
        known.update(
            {run for row, mark in zip(batch.tolist(), marks.tolist()) for run, m in zip(runs(row), mark) if m and run}
        )
    assert len(known) > 10 and (found > 0 or name == "binary")
    assert memory.seen_once(x).tolist() == [[known[run] == 1 for run in runs(row)] for row in x.tolist()]
    assert name == "binary" or max(known.values()) > 1


def test_one_byte_more_or_less_is_another_run():
    memory = RecurringSurprises()
    text = torch.randint(0, 256, (1, CONTEXT), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    memory.write(text, torch.ones_like(text).bool())
    assert memory.seen_once(text).tolist() == [[False] * (CONTEXT - 1) + [True]]
    for i in range(CONTEXT):
        other = text.clone()
        other[0, i] ^= 1
        assert not memory.seen_once(other).any()
    for i in range(CONTEXT - 1):
        other = text.clone()
        other[0, [i, i + 1]] = other[0, [i + 1, i]]
        assert torch.equal(other, text) or not memory.seen_once(other).any()


def test_text_that_was_not_written_is_not_found_in_a_full_table():
    memory = RecurringSurprises(2**12)
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 256, (64, 1024), dtype=torch.uint8, generator=generator)
    memory.write(x, torch.ones_like(x).bool())
    assert (memory.table > 0).all()
    assert not memory.seen_once(torch.randint(0, 256, (64, 1024), dtype=torch.uint8, generator=generator)).any()
    # Every slot holds one of the runs that were written.
    assert 2**11 < memory.seen_once(x).sum() <= 2**12 * 1.01


def test_slots_are_used_evenly():
    memory = RecurringSurprises(2**8)
    x = rows(b"".join(str(i).encode() + b" green bottles " for i in range(20_000)), 1024)
    slot, fingerprint = memory._places(x)
    slot, fingerprint = slot[:, CONTEXT - 1 :].flatten(), fingerprint[:, CONTEXT - 1 :].flatten()
    distinct = {run for row in x.tolist() for run in runs(row) if run}
    pairs = {(s, f) for s, f in zip(slot.tolist(), fingerprint.tolist())}
    assert len(pairs) >= len(distinct) - 1
    counts = torch.bincount(torch.tensor([s for s, _ in pairs]), minlength=256).double()
    chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
    assert 255 - 5 * (2 * 255) ** 0.5 < chi < 255 + 5 * (2 * 255) ** 0.5


def test_newer_runs_replace_older_ones():
    memory = RecurringSurprises(1)
    a, b = (torch.full((1, CONTEXT), value, dtype=torch.uint8) for value in (1, 2))
    every = torch.ones_like(a).bool()
    for first, second in ((a, b), (b, a)):
        memory.write(first, every)
        assert memory.seen_once(first)[0, -1] and not memory.seen_once(second).any()
    assert memory.writes == 2
    before = memory.table.clone()
    memory.write(b, ~every)  # nothing surprised
    assert torch.equal(memory.table, before) and memory.writes == 2


@pytest.mark.parametrize("shape", [(0, 32), (2, 0), (3, CONTEXT - 1)])
def test_rows_without_a_whole_run(shape):
    memory = RecurringSurprises(16)
    x = torch.zeros(shape, dtype=torch.uint8)
    memory.write(x, torch.ones(shape, dtype=torch.bool))
    assert not memory.table.any() and memory.seen_once(x).shape == shape and not memory.seen_once(x).any()


@pytest.mark.parametrize("slots", [0, 3, -4])
def test_slots_are_a_power_of_two(slots):
    with pytest.raises(ValueError, match=f"slots={slots}: accepted is a power of two"):
        RecurringSurprises(slots)


def test_surprising_is_over_the_mean_of_a_finite_batch():
    losses = torch.tensor([[0.0, 1.0], [4.0, 3.0]])
    assert surprising(losses).tolist() == [[False, False], [True, True]]
    losses[0, 0] = torch.inf
    assert not surprising(losses).any()
    assert not surprising(torch.full((2, 3), torch.nan)).any()
    assert not surprising(torch.ones(2, 3)).any()


@needs_cuda
def test_the_card_writes_and_finds_what_the_cpu_does():
    memories = [RecurringSurprises(2**10), RecurringSurprises(2**10, torch.device("cuda"))]
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        x = torch.randint(0, 2, (8, 512), dtype=torch.uint8, generator=generator)
        marks = torch.rand(x.shape, generator=generator) < 0.3
        assert torch.equal(memories[0].seen_once(x), memories[1].seen_once(x.cuda()).cpu())
        memories[0].write(x, marks)
        memories[1].write(x.cuda(), marks.cuda())
    assert torch.equal(memories[0].table, memories[1].table.cpu())
