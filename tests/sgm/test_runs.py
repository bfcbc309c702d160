"""Runs give what their parts give by hand, go on where they stopped, and undo what costs more than it brings."""

import statistics
from dataclasses import replace
from functools import partial

import pytest
import torch

from model.sgm import runs
from model.sgm.learner import Learned, Learner
from model.sgm.lifelong import LifelongLearner
from model.sgm.lifelong_options import LifelongOptions
from model.sgm.locking import LockOptions
from model.sgm.population import Population
from model.sgm.runs import (
    LENGTH,
    RETENTION,
    SNAPSHOT,
    TARGETS,
    VARIANTS,
    ImproveOptions,
    improve,
    modules,
    run_tasks,
    stress,
    task_locks,
)
from model.sgm.storage import WeightStore
from model.sgm.tasks import CATEGORIES, Task, category_tasks, micro_tasks
from tests.conftest import make_random_model

FEW = LockOptions(candidates=8, groups=2, group_size=2, threshold=0.0, minimum=0.001, budget=0.002)
NONE = LockOptions(candidates=1, groups=0, minimum=0.0, budget=0.0)
OPTIONS = LifelongOptions(energy=0.5)


@pytest.fixture(autouse=True)
def quick_clock(monkeypatch):
    monkeypatch.setattr(runs, "REPEATS", 2)


def small(head_dim: int = 64, **changes):
    return make_random_model(**({"n_layers": 1, "thinking_steps": 1, "head_dim": head_dim} | changes))


def values_of(folder) -> torch.Tensor:
    with WeightStore.open(folder / "weights", read_only=True) as store:
        return store.values


# ── modules ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "growth", [(), ("grow 0", "petals 0 2", "widen 48", "grow 1", "widen 80", "petals 2 1", "thaw 0")]
)
@pytest.mark.parametrize("hull", ["convex", "swiglu"])
def test_modules_hold_every_parameter_once(growth, hull):
    model = small(growth=growth, hull=hull, n_layers=1 if growth else 2)
    found = modules(model)
    names = [name for part in found.values() for name in part]
    assert len(names) == len(set(names))
    assert set(names) == {name for name, _ in model.named_parameters()}
    assert all(found.values())
    for category in CATEGORIES:
        assert set(TARGETS[category]) <= set(found)
    owners = {p: name for name, p in model.named_parameters()}
    for kind in ("attention", "memory"):  # of every block, leaf, tree and column; of the head
        parts = [module for name, module in model.named_modules() if name.endswith(f".{kind}")]
        assert set(found[kind]) == {owners[p] for part in parts for p in part.parameters()}
    of_memory = set(model.head.memory.parameters())
    assert set(found["head"]) == {owners[p] for p in model.head.parameters() if p not in of_memory}
    for chosen in (("head",), ("head", "attention"), tuple(found)):
        assert set(runs.parameters_of(model, chosen)) == {name for part in chosen for name in found[part]}
    with pytest.raises(ValueError, match="modules='tail': accepted are embedding, attention, memory, hulls"):
        runs.parameters_of(model, ("head", "tail"))
    assert set(found["reasoning"]) == {owners[p] for p in model.reasoning.parameters()}
    assert {owners[p] for p in model.encoder.parameters()} < set(found["embedding"])


# ── tasks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_gives_what_a_loop_by_hand_gives(tmp_path):
    said = []
    with LifelongLearner.create(tmp_path / "free", small(), OPTIONS, lock=task_locks(small())) as free:
        target = statistics.median(free.learn(task, evaluations=64, target=1.0).after for task in micro_tasks(3))
    found = run_tasks(
        3, folder=tmp_path / "a", model=small(), options=OPTIONS, evaluations=64, target=target, progress=said.append
    )
    with LifelongLearner.create(tmp_path / "b", small(), OPTIONS, lock=task_locks(small())) as by_hand:
        after, evaluations = [], 0
        for task in micro_tasks(3):
            record = by_hand.learn(task, evaluations=64, target=target, length=LENGTH)
            after.append(record.after)
            assert 1 * 64 <= record.locked <= 4 * 64  # blocks, whatever the size of the model
            evaluations += record.evaluations
        now = [by_hand.losses([task], LENGTH).item() for task in micro_tasks(3)]
        locked, size = int(by_hand.store.locked.sum()), len(by_hand.store)
        full = len(by_hand.directions.protected["head.output.weight"]) / 64
    assert torch.equal(values_of(tmp_path / "a"), values_of(tmp_path / "b"))
    ratios = [loss / then for loss, then in zip(now, after, strict=True)]
    assert found.tasks == 3
    assert found.first_ratio == pytest.approx(ratios[0], rel=1e-5)
    assert found.worst_ratio == pytest.approx(max(ratios), rel=1e-5)
    assert found.after == pytest.approx(statistics.mean(after))
    assert found.at_end == pytest.approx(statistics.mean(now), rel=1e-5)
    assert found.learned == sum(loss <= target for loss in after)
    assert 0 < found.learned < 3
    assert found.locked == pytest.approx(locked / size)
    assert found.full == full > 0
    assert found.evaluations == evaluations
    assert found.changed == []
    assert list(found.latency) == [0, 1, 3]
    assert all(0 < milliseconds < 1000 for milliseconds in found.latency.values())
    assert [line.split(":")[0] for line in said] == ["1/3 style", "2/3 fact", "3/3 preference"]
    assert len(found.row()) == len(RETENTION)
    assert found.row()[0] == f"{found.first_ratio:.4f}x"


def test_a_run_goes_on_with_its_folder(tmp_path):
    run = partial(run_tasks, options=OPTIONS, evaluations=32)
    unbroken = run(3, folder=tmp_path / "a", model=small())
    run(2, folder=tmp_path / "b", model=small())
    said = []
    resumed = run(3, folder=tmp_path / "b", progress=said.append)
    assert len(said) == 1
    assert said[0].startswith("3/3")
    assert torch.equal(values_of(tmp_path / "a"), values_of(tmp_path / "b"))
    for name in ("tasks", "first_ratio", "worst_ratio", "after", "at_end", "learned", "locked", "full", "evaluations"):
        assert getattr(resumed, name) == getattr(unbroken, name), name
    fewer = run_tasks(2, folder=tmp_path / "b", options=None)  # there already
    assert fewer.tasks == 2
    with pytest.raises(ValueError, match=f"folder='{tmp_path / 'b'}': accepted are its own options"):
        run_tasks(3, folder=tmp_path / "b", options=LifelongOptions(energy=0.5, locks=False))
    with pytest.raises(ValueError, match=f"folder='{tmp_path / 'b'}': holds a model already"):
        run(3, folder=tmp_path / "b", model=small())
    assert run(3, folder=tmp_path / "b").evaluations == unbroken.evaluations  # what failed does not hold it


def test_a_folder_of_other_tasks_is_refused(tmp_path):
    first, second = micro_tasks(2)
    with LifelongLearner.create(tmp_path / "a", small(), OPTIONS, lock=task_locks(small())) as lifelong:
        lifelong.learn(first, evaluations=1)
        lifelong.learn(Task("mine", second.kind, second.pairs), evaluations=1)
    with pytest.raises(ValueError, match=f"its task 2 is 'mine', accepted is '{second.name}'"):
        run_tasks(3, folder=tmp_path / "a", options=OPTIONS, evaluations=1)
    assert run_tasks(1, folder=tmp_path / "a", options=OPTIONS, evaluations=1).tasks == 1


def test_modules_that_learn_alone(tmp_path):
    options = LifelongOptions(directions=False, locks=False)
    run = partial(run_tasks, 1, folder=tmp_path / "a", options=options, evaluations=64)
    run(parts=("attention", "reasoning"), model=small())
    names = runs.parameters_of(small(), ("attention", "reasoning"))
    with LifelongLearner.open(tmp_path / "a") as lifelong:
        assert lifelong.options.learns == names
        start = Population(small()).values()
        moved = {
            name for name, span in lifelong.population.spans.items() if (lifelong.learner.values != start)[span].any()
        }
        assert moved == set(names)
    run(parts=("attention", "reasoning"))
    with pytest.raises(ValueError, match="accepted are its own options"):
        run(parts=("head",))
    for refused in (None, LifelongOptions()):
        with pytest.raises(ValueError, match="modules='head': accepted without directions"):
            run_tasks(1, options=refused, parts=("head",))


def test_single_weights_are_locked(tmp_path):
    found = run_tasks(2, folder=tmp_path / "a", model=small(), options=OPTIONS, unit="weight", evaluations=64)
    with LifelongLearner.open(tmp_path / "a") as lifelong:
        assert lifelong.lock_options.unit == "weight"
        assert 0 < lifelong.records[-1].locked <= runs.LOCKS.candidates
        mask = lifelong.store.locked[lifelong.population.spans["head.output.weight"]].view(256, -1)
        blocks = mask.view(4, 64, -1).sum(1)
        assert ((blocks > 0) & (blocks < 64)).any()
    assert found.changed == []


def test_a_run_says_which_locks_changed(monkeypatch):
    monkeypatch.setattr(WeightStore, "verify", lambda self: ["style: pirate"])
    assert run_tasks(1, model=small(), options=OPTIONS, evaluations=8).changed == ["style: pirate"]


@pytest.mark.parametrize("count", [0, 101])
def test_a_run_of_no_tasks_or_too_many(tmp_path, count):
    with pytest.raises(ValueError, match=f"count={count}: accepted is from 1 to 100"):
        run_tasks(count, folder=tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_the_stress_test_has_a_row_for_each_strategy_and_type(monkeypatch):
    made, said = [], []
    original = runs.run_tasks

    def quick(count, *, folder, options, unit, device):
        made.append((options, unit))
        return original(count, folder=folder, options=options, unit=unit, model=small(), evaluations=33, device=device)

    monkeypatch.setattr(runs, "run_tasks", quick)
    rows = stress(2, progress=said.append)
    names = ["nothing", "locks", "directions", "both", "both, single weights", "both, float16"]
    assert [row.name for row in rows] == names
    assert [(options.directions, options.locks, unit, options.dtype) for options, unit in made] == [
        (False, False, "block", "float32"), (False, True, "block", "float32"), (True, False, "block", "float32"),
        (True, True, "block", "float32"), (True, True, "weight", "float32"), (True, True, "block", "float16"),
    ]  # fmt: skip
    assert all(list(row.retention.latency) == [0, 1, 2] for row in rows)
    by_name = {row.name: row for row in rows}
    assert all(row.retention.tasks == 2 and row.retention.changed == [] for row in rows)
    assert by_name["both"].retention.locked > by_name["directions"].retention.locked
    assert by_name["directions"].retention.full > by_name["locks"].retention.full == 0
    weights = sum(p.numel() for p in small().parameters())
    saved = by_name["both"].store_bytes - by_name["both, float16"].store_bytes
    assert 3 * 2 * weights <= saved < 4 * 2 * weights  # of each weight in two slots, a snapshot, and what is locked
    assert len(said) == 6
    assert set(VARIANTS) == {"nothing", "locks", "directions", "both"}


# ── improvement ──────────────────────────────────────────────────────────────────────────────────────────────────────


def categories(folder, monkeypatch, count: int, **options) -> list[str]:
    """Of `count` iterations that learn nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", lambda self, *batch, **settings: Learned(1.0, 1.0, 1, 0, 0, 0))
        patch.setattr(LifelongLearner, "losses", lambda self, tasks: torch.ones(len(tasks)))
        patch.setattr(LifelongLearner, "commit", lambda self, **changes: None)  # quick
        found = improve(folder, count, model=small(32), options=ImproveOptions(**options))
    assert [iteration.number for iteration in found] == list(range(1, count + 1))
    return [iteration.category for iteration in found]


def test_categories_go_round_and_three_in_ten_are_drawn(tmp_path, monkeypatch):
    count = 2000
    rounds = [CATEGORIES[number % 5] for number in range(1, count + 1)]
    assert categories(tmp_path / "a", monkeypatch, 50, random_share=0.0) == rounds[:50]
    found = categories(tmp_path / "b", monkeypatch, count)
    # A fifth of those drawn are those whose turn it was.
    drawn = [a for a, b in zip(found, rounds, strict=True) if a != b]
    assert abs(len(drawn) / count - 0.3 * 0.8) < 0.03
    for category in CATEGORIES:
        assert abs(drawn.count(category) / len(drawn) - 0.2) < 0.06
        assert abs(found.count(category) / count - 0.2) < 0.03
    always = categories(tmp_path / "c", monkeypatch, 500, random_share=1.0)
    assert abs(sum(a == b for a, b in zip(always, rounds, strict=False)) / 500 - 0.2) < 0.06


def test_an_iteration_changes_the_modules_of_its_category_alone(tmp_path):
    # The head's embedding of bytes is locked from the start.
    folder, model = tmp_path / "a", small()
    options = ImproveOptions(evaluations=64, random_share=0.0, tolerance=10.0, lock=NONE)
    before = None
    for _ in CATEGORIES:
        (iteration,) = improve(folder, 1, model=None if before is not None else model, options=options)
        assert iteration.after < iteration.before
        with WeightStore.open(folder / "weights", read_only=True) as store:
            if before is not None:
                changed = {name for name in store.names() if (store.values != before)[store.range_of(name)].any()}
                allowed = {name for part in TARGETS[iteration.category] for name in modules(model)[part]}
                assert changed <= allowed
                parts = [part for part in TARGETS[iteration.category] if changed & set(modules(model)[part])]
                assert parts == list(TARGETS[iteration.category])
            before = store.values
            assert len(store.segments) == 1  # the embeddings


def test_an_iteration_says_what_it_was(tmp_path):
    options = ImproveOptions(evaluations=64, tolerance=10.0, lock=NONE)
    model = small()
    said = []
    first, second = improve(tmp_path / "a", 2, model=model, options=options, progress=said.append)
    assert said == [first, second]
    with LifelongLearner.open(tmp_path / "a") as lifelong:
        losses = dict(zip(CATEGORIES, lifelong.losses([category_tasks()[name] for name in CATEGORIES]), strict=True))
        assert second.total == pytest.approx(sum(losses.values()).item(), rel=1e-6)
        assert second.after == pytest.approx(losses[second.category].item(), rel=1e-5)
        meta = lifelong.store.meta["improve"]
        assert meta == {"iteration": 2, "best": second.best}
        assert second.best <= first.best
        assert lifelong.learner.evaluations > 128
        assert SNAPSHOT in lifelong.store.snapshots()


@pytest.mark.parametrize(("after", "locks"), [(0.979, True), (0.981, False), (1.0, False)])
def test_locks_need_an_improvement_past_the_share(tmp_path, monkeypatch, after, locks):
    learn = Learner.learn

    def learned(self, *batch, **settings):
        return replace(learn(self, *batch, **settings), before=1.0, after=after)

    monkeypatch.setattr(Learner, "learn", learned)
    options = ImproveOptions(evaluations=32, lock_from=0.02, tolerance=10.0, lock=FEW)
    done = improve(tmp_path / "a", 2, model=small(), options=options)
    assert all((iteration.locked > 0) == locks for iteration in done)
    with LifelongLearner.open(tmp_path / "a") as lifelong:
        segments = [(segment.task, segment.count) for segment in lifelong.store.segments[1:]]
        assert segments == [(f"{each.category} {each.number}", each.locked) for each in done if locks]
        assert lifelong.store.verify() == []
        for segment, iteration in zip(segments, done, strict=False):
            names = [name for part in TARGETS[iteration.category] for name in modules(lifelong.model)[part]]
            assert segment[1] <= sum(lifelong.store.locked[lifelong.population.spans[name]].sum() for name in names)


def test_improving_goes_on_as_if_it_had_never_stopped(tmp_path):
    options = ImproveOptions(evaluations=32, lock_from=0.0, lock=FEW)
    unbroken = improve(tmp_path / "a", 5, model=small(), options=options)
    parts = improve(tmp_path / "b", 2, model=small(), options=options)
    torch.manual_seed(1)
    parts += improve(tmp_path / "b", 3, options=options)
    assert parts == unbroken
    with (
        WeightStore.open(tmp_path / "a" / "weights") as a,
        WeightStore.open(tmp_path / "b" / "weights") as b,
    ):
        assert torch.equal(a.values, b.values)
        assert torch.equal(a.locked, b.locked)
        assert a.meta == b.meta
        assert [segment.digest for segment in a.segments] == [segment.digest for segment in b.segments]


class Totals:
    """Scripted sums of the categories' losses, in the order in which they are asked for."""

    def __init__(self, monkeypatch, *totals: float):
        self.left = list(totals)
        monkeypatch.setattr(LifelongLearner, "losses", lambda _, tasks: torch.tensor([self.left.pop(0)]))


def test_a_total_that_rises_is_rolled_back(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    options = ImproveOptions(evaluations=32, tolerance=0.02, random_share=0.0, lock=NONE)
    go = partial(improve, folder, 1, options=options)
    totals = Totals(monkeypatch, 10.0, 9.0)
    (kept,) = go(model=small())
    assert (kept.total, kept.best, kept.rolled_back) == (9.0, 9.0, False)
    best = values_of(folder)

    totals.left = [9.1]  # within the tolerance: goes on from there, but it is not the best
    (worse,) = go()
    assert (worse.total, worse.best, worse.rolled_back) == (pytest.approx(9.1), 9.0, False)
    assert not torch.equal(values_of(folder), best)

    with WeightStore.open(folder / "weights") as store:
        random, segments = store.meta["learner"]["random"], store.segments
    totals.left = [9.3]
    (back,) = go()
    assert (back.best, back.rolled_back, back.locked) == (9.0, True, 0)
    assert torch.equal(values_of(folder), best)
    with WeightStore.open(folder / "weights") as store:
        assert store.meta["improve"] == {"iteration": 3, "best": 9.0}  # it counts, and the next is another
        assert store.meta["learner"]["random"] != random
        assert store.segments == segments

    totals.left = [9.3, 8.0]  # in one process: what follows a rollback begins at the best
    learned_from = []
    learn = Learner.learn
    monkeypatch.setattr(
        Learner, "learn", lambda self, *a, **k: (learned_from.append(self.values.clone()), learn(self, *a, **k))[1]
    )
    improve(folder, 2, options=options)
    assert torch.equal(learned_from[1], best)
    assert totals.left == []


def test_what_was_locked_since_the_best_stays_and_the_best_is_what_can_be_reached(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    options = ImproveOptions(evaluations=64, lock_from=0.0, random_share=0.0, lock=FEW)
    go = partial(improve, folder, 1, options=options)
    totals = Totals(monkeypatch, 10.0, 10.0)  # not better: no snapshot, but locks
    (first,) = go(model=small())
    assert first.locked > 0
    with WeightStore.open(folder / "weights") as store:
        locked, values = store.locked, store.values
        start = store.segments[0].count
    assert locked.sum() == start + first.locked
    totals.left = [11.0, 10.5]  # rolled back; of what then is there
    (second,) = go()
    assert (second.rolled_back, second.best) == (True, 10.5)
    with WeightStore.open(folder / "weights") as store:
        assert torch.equal(store.values[locked], values[locked])
        assert not torch.equal(store.values, values)
        assert store.verify() == []
        assert store.meta["improve"] == {"iteration": 2, "best": 10.5}
    totals.left = [10.6]
    assert not go()[0].rolled_back  # or nothing could ever be kept again


@pytest.mark.parametrize("at", ["snapshot", "lock"])
def test_a_best_that_has_no_snapshot_is_not_the_best(tmp_path, monkeypatch, at):
    folder = tmp_path / "a"
    options = ImproveOptions(evaluations=64, lock_from=0.0, random_share=0.0, lock=FEW)
    improve(folder, 1, model=small(), options=options)
    with WeightStore.open(folder / "weights") as store:
        meta = store.meta["improve"]
    with monkeypatch.context() as patch:
        patch.setattr(WeightStore, at, lambda *args, **settings: pytest.exit("killed"))
        with pytest.raises(pytest.exit.Exception):
            improve(folder, 5, options=options)
    with WeightStore.open(folder / "weights") as store:
        assert store.meta["improve"]["best"] == meta["best"]
        assert store.verify() == []
        last = store.meta["improve"]["iteration"]
    assert improve(folder, 1, options=options)[0].number == last + 1


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ({"evaluations": 0}, "an integer ≥ 1"), ({"evaluations": 1.5}, "an integer ≥ 1"),
        ({"random_share": 1.1}, "a number from 0 to 1"), ({"random_share": float("nan")}, "a number from 0 to 1"),
        ({"lock_from": 1.0}, "a number from 0 to below 1"), ({"lock_from": -0.1}, "a number from 0 to below 1"),
        ({"tolerance": -0.1}, "a number ≥ 0"), ({"tolerance": float("inf")}, "a number ≥ 0"),
    ],
)  # fmt: skip
def test_options_out_of_range(change, accepted):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"^{name}={value!r}: accepted is {accepted}$"):
        ImproveOptions(**change)


def test_improving_has_a_number_of_iterations_and_one_model(tmp_path):
    for iterations in (0, -1, 2.0):
        with pytest.raises(ValueError, match=f"iterations={iterations!r}: accepted is an integer ≥ 1"):
            improve(tmp_path / "a", iterations)
    assert list(tmp_path.iterdir()) == []
    improve(tmp_path / "a", 1, model=small(), options=ImproveOptions(evaluations=8))
    with pytest.raises(ValueError, match=f"folder='{tmp_path / 'a'}': holds a model already"):
        improve(tmp_path / "a", 1, model=small())


def test_folders_of_the_other_kind_are_refused(tmp_path):
    run_tasks(1, folder=tmp_path / "tasks", model=small(), options=OPTIONS, evaluations=8)
    before = values_of(tmp_path / "tasks")
    with pytest.raises(ValueError, match=f"folder='{tmp_path / 'tasks'}': accepted is one of `improve`"):
        improve(tmp_path / "tasks", 1)
    assert torch.equal(values_of(tmp_path / "tasks"), before)
    run_tasks(2, folder=tmp_path / "tasks", evaluations=8)  # it is not held
    improve(tmp_path / "improve", 1, model=small(), options=ImproveOptions(evaluations=8))
    with pytest.raises(ValueError, match="accepted are its own options"):
        run_tasks(1, folder=tmp_path / "improve", options=OPTIONS)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="accepted is a new or empty folder"):
        improve(tmp_path / "taken", 1, model=small(32))
