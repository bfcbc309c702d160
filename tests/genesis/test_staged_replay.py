"""Stages are remembered apart and rehearsed in equal parts: against loops over rings, counts and statistics."""

import random
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.genesis.staged_replay import StagedReplay
from tests.genesis.test_replay import chi_square, limit, needs_cuda, no_host_reads


def filled(stages: int = 4, per_ring: int = 8, **options) -> StagedReplay:
    """Entry j of ring i has latents and bytes 10 i + j and the priority j + 1."""
    memory = StagedReplay(stages, per_ring * max(1, stages - 1), (2, 3), (5,), **options)
    for i, ring in enumerate(memory.rings):
        numbers = 10 * i + torch.arange(ring.size, device=ring.target.device)
        hidden = numbers.view(-1, 1, 1).expand(-1, 2, 3).float()
        ring.write(hidden, numbers.view(-1, 1).expand(-1, 5).to(torch.uint8), numbers % 10 + 1.0)
    return memory


@pytest.mark.parametrize("stages, size, rings", [(2, 10, [10]), (4, 10, [3, 3, 3]), (5, 3, [1, 1, 1, 1]), (1, 10, [])])
def test_earlier_stages_share_the_room(stages, size, rings):
    memory = StagedReplay(stages, size, (0,), (4,))
    assert [ring.size for ring in memory.rings] == rings
    assert [memory.past(stage) for stage in range(stages)] == list(range(stages))
    for stage in range(stages - 1):
        assert memory.written_by(stage) is memory.rings[stage]
    assert memory.written_by(stages - 1) is None  # nothing comes after it


@pytest.mark.parametrize("stages", [1, 3])
def test_a_mixed_memory_is_one_ring_throughout(stages):
    memory = StagedReplay(stages, 10, (0,), (4,), mixed=True)
    assert [ring.size for ring in memory.rings] == [10]
    for stage in range(stages):
        assert memory.past(stage) == 1 and memory.written_by(stage) is memory.rings[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_every_draw_divides_the_earlier_stages_evenly(stage, n):
    torch.manual_seed(0)
    memory = filled()
    total = Counter()
    for _ in range(300):
        counts = Counter(memory.draw(n, stage)[0].tolist())
        assert set(counts) <= set(range(stage))  # of the stage itself and of later ones nothing
        assert max(counts.values()) - min(counts[i] for i in range(stage)) <= 1
        total += counts
    # Whose turn it is first is drawn: no stage is favoured when n is no multiple of their number.
    spread = chi_square([total[i] for i in range(stage)], [300 * n / stage] * stage)
    assert spread < limit(max(1, stage - 1))


def test_rows_of_a_stage_come_in_proportion_to_their_priority():
    torch.manual_seed(1)
    memory = filled()
    rings, rows = memory.draw(30_000, 3)
    for i in range(3):
        counts = Counter(rows[rings == i].tolist())
        expected = [10_000 * (j + 1) / 36 for j in range(8)]
        assert chi_square([counts[j] for j in range(8)], expected) < limit(7)


def test_the_first_stage_has_nothing_to_draw_from_an_empty_ring():
    memory = StagedReplay(3, 8, (1,), (2,))
    memory.rings[0].write(torch.ones(1, 1), torch.ones(1, 2, dtype=torch.uint8), torch.ones(1))
    rings, rows = memory.draw(6, 2)
    _, _, valid = memory.gather(rings, rows, 2)
    assert valid.tolist() == [ring == 0 for ring in rings.tolist()]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gathering_is_a_lookup_in_each_ring(stage):
    memory = filled()
    rng = random.Random(2)
    rings = [rng.randrange(stage) for _ in range(40)]
    rows = [rng.randrange(8) for _ in range(40)]
    hidden, target, valid = memory.gather(torch.tensor(rings), torch.tensor(rows), stage)
    expected = torch.tensor([10.0 * i + j for i, j in zip(rings, rows)])
    assert hidden.dtype == torch.float32 and target.dtype == torch.uint8
    assert torch.equal(hidden, expected.view(-1, 1, 1).expand(-1, 2, 3))
    assert torch.equal(target.float(), expected.view(-1, 1).expand(-1, 5))
    assert valid.all()


def test_entries_without_latents_are_gathered_too():
    memory = StagedReplay(3, 8, (0,), (2,))
    for i, ring in enumerate(memory.rings):
        ring.write(torch.ones(4, 0), torch.full((4, 2), i + 1, dtype=torch.uint8), torch.ones(4))
    hidden, target, valid = memory.gather(torch.tensor([0, 1, 1]), torch.tensor([0, 3, 1]), 2)
    assert hidden.shape == (3, 0) and valid.all()
    assert target[:, 0].tolist() == [1, 2, 2]


def test_new_priorities_reach_their_entry_alone():
    """Against a dictionary: of one entry's several values the largest counts, what is not finite changes nothing."""
    memory = filled()
    rng = random.Random(3)
    expected = {(i, j): j + 1.0 for i in range(3) for j in range(8)}
    rings = [rng.randrange(3) for _ in range(30)]
    rows = [rng.randrange(6) for _ in range(30)]  # rows 6 and 7 keep theirs
    values = [rng.choice([rng.uniform(0, 9), float("nan"), float("inf")]) for _ in range(30)]
    new: dict[tuple[int, int], float] = {}
    for i, j, value in zip(rings, rows, values):
        if value < float("inf"):
            new[i, j] = max(value, new.get((i, j), 0.0))
    assert 5 < len(new) < 24
    memory.reprioritise(torch.tensor(rings), torch.tensor(rows), torch.tensor(values), 3)
    for i, ring in enumerate(memory.rings):
        wanted = torch.tensor([(expected | new)[i, j] for j in range(8)])
        assert torch.equal(ring.priority[:8], wanted)
        assert ring.priority[8] == 0


def test_a_later_stage_leaves_the_priorities_of_those_after_it_alone():
    memory = filled()
    before = memory.rings[1].priority.clone()
    memory.reprioritise(torch.tensor([0]), torch.tensor([2]), torch.tensor([50.0]), 1)
    assert memory.rings[0].priority[2] == 50 and torch.equal(memory.rings[1].priority, before)


def test_a_stage_keeps_a_uniform_sample_of_all_it_showed():
    """Each of 60 entries, written in fives, stays with probability 12/60, those of the first batch too."""
    torch.manual_seed(4)
    kept = Counter()
    runs = 300
    for _ in range(runs):
        ring = StagedReplay(2, 12, (0,), (1,)).written_by(0)
        for first in range(0, 60, 5):
            numbers = torch.arange(first, first + 5, dtype=torch.uint8).view(-1, 1)
            ring.write(torch.zeros(5, 0), numbers, torch.ones(5))
        held = ring.target[:12, 0].tolist()
        assert len(set(held)) == 12
        kept.update(held)
    # Fewer degrees than entries: a run keeps exactly 12 of them, which makes the counts less spread.
    assert chi_square([kept[i] for i in range(60)], [runs * 12 / 60] * 60) < limit(59)


def test_nothing_waits_for_the_device():
    memory = filled()
    with no_host_reads():
        drawn = memory.draw(5, 3)
        memory.gather(*drawn, 3)
        memory.reprioritise(*drawn, torch.rand(5), 3)
        memory.written_by(1).write(torch.zeros(4, 2, 3), torch.zeros(4, 5, dtype=torch.uint8), torch.rand(4))


def test_the_state_survives_a_file(tmp_path):
    memory = filled()
    path = str(tmp_path / "memory.safetensors")
    save_file(memory.state_dict(), path)
    other = StagedReplay(4, 24, (2, 3), (5,))
    other.load_state_dict(load_file(path))
    for name, tensor in memory.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    for seed in range(5):
        drawn = []
        for each in (memory, other):
            torch.manual_seed(seed)
            drawn.append(each.draw(9, 3))
        assert all(torch.equal(a, b) for a, b in zip(*drawn))


@needs_cuda
def test_draws_in_a_captured_graph_change_from_replay_to_replay():
    """One graph that draws, gathers, reprioritises and writes: what it does is what eager calls do, draw by draw."""
    memories = [filled(device="cuda") for _ in range(2)]
    outputs: list[list[torch.Tensor]] = [[], []]
    new = torch.full((2, 5), 99, dtype=torch.uint8, device="cuda")

    def once(memory: StagedReplay) -> tuple[torch.Tensor, ...]:
        rings, rows = memory.draw(6, 2)
        _, target, _ = memory.gather(rings, rows, 2)
        memory.reprioritise(rings, rows, target[:, 0].float(), 2)
        memory.written_by(2).write(torch.ones(2, 2, 3, device="cuda"), new, torch.ones(2, device="cuda"))
        return rings, rows, target

    torch.cuda.manual_seed(0)
    for _ in range(8):
        outputs[0].append(torch.cat([x.flatten().float() for x in once(memories[0])]))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = once(memories[1])
    torch.cuda.manual_seed(0)
    for _ in range(8):
        graph.replay()
        outputs[1].append(torch.cat([x.flatten().float() for x in result]))
    assert torch.equal(torch.stack(outputs[0]), torch.stack(outputs[1]))
    assert len({tuple(each.tolist()) for each in outputs[1]}) > 4
    for name, tensor in memories[0].state_dict().items():
        assert torch.equal(memories[1].state_dict()[name], tensor), name
