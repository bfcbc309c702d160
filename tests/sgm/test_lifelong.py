"""A folder goes on to the bit where it was left, earlier tasks stay, and a kill at any moment loses nothing kept."""

import hashlib
import itertools
import os
import random
import signal
import time
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from model.sgm import lifelong as lifelong_module
from model.sgm.learner import LearnerOptions
from model.sgm.lifelong import ANCHORED, LifelongLearner, LifelongOptions, Record, demonstration_model
from model.sgm.locking import LockOptions
from model.sgm.storage import StoreBusy, WeightStore
from model.sgm.tasks import Task, ordinary
from model.training.checkpoint import load_checkpoint, save_checkpoint
from tests.conftest import fork, make_random_model
from tests.genesis.test_replay import needs_cuda

HEAD = "head.output.weight"
EMBEDDINGS = ("encoder.embedding.weight", "head.bytes.weight")
SHAPE = {"n_layers": 1, "thinking_steps": 1}
LOCK = LockOptions(candidates=16, groups=4, group_size=4, minimum=0.0001, budget=0.005)
TASKS = [  # short ones are quick
    Task("pirate", "style", (("Arr: ", "matey"),)),
    Task("başkent", "fact", (("TR: ", "Ankara"),)),
    Task("emoji", "format", (("\x00\x7f ığ", "🙂ş"), (":) ", "🙂"))),
    Task("law", "domain", (("In law, ", "hence"),)),
]


def small(head_dim: int = 128, **changes):
    return make_random_model(**(SHAPE | {"head_dim": head_dim} | changes))


def make(path, model=None, *, learner=None, lock=LOCK, **options) -> LifelongLearner:
    return LifelongLearner.create(path, model or small(), LifelongOptions(**options), learner=learner, lock=lock)


def state(lifelong: LifelongLearner) -> dict:
    """All that learning depends on, the weights and locks from the store itself."""
    found = {
        "values": lifelong.store.values,
        "now": lifelong.learner.values,
        "locked": lifelong.store.locked,
        "held": lifelong.learner.locked,
        "of the model": torch.cat([p.detach().flatten() for p in lifelong.model.parameters()]),
    }
    if lifelong.directions is not None:
        found |= {f"protected {name}": basis for name, basis in lifelong.directions.protected.items()}
    return found


def same(a: dict, b: dict) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def progress(lifelong: LifelongLearner) -> dict:
    segments = [(segment.task, segment.count, segment.digest) for segment in lifelong.store.segments]
    return {"learner": lifelong.learner.state(), "records": lifelong.records, "segments": segments}


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────

KINDS = {"both": {}, "float16": {"dtype": "float16"}, "every weight": {"learns": (), "guard": 0.5}}


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_is_as_never_having_stopped(tmp_path, kind, monkeypatch):
    coalitions = []  # the random states that they are drawn from
    find = lifelong_module.find_important

    def seen(*args, generator, **settings):
        coalitions.append(generator.get_state().tolist())
        return find(*args, generator=generator, **settings)

    monkeypatch.setattr(lifelong_module, "find_important", seen)
    with make(tmp_path / "a", **KINDS[kind]) as unbroken:
        for task in TASKS:
            unbroken.learn(task, evaluations=40)
        expected, known = state(unbroken), progress(unbroken)
    with make(tmp_path / "b", **KINDS[kind]) as made:
        for task in TASKS[:2]:
            made.learn(task, evaluations=40)
        losses, before, halfway = made.losses(TASKS), state(made), progress(made)
        options, lock_options = made.options, made.lock_options
    torch.manual_seed(1)  # nothing depends on it
    with LifelongLearner.open(tmp_path / "b") as opened:
        assert same(state(opened), before)
        assert progress(opened) == halfway
        assert torch.equal(opened.losses(TASKS), losses)
        assert (opened.options, opened.lock_options) == (options, lock_options)
        assert [record.task for record in opened.records] == TASKS[:2]
        for task in TASKS[2:]:
            opened.learn(task, evaluations=40)
    with LifelongLearner.open(tmp_path / "b", read_only=True) as opened:
        assert same(state(opened), expected)
        assert progress(opened) == known
    assert coalitions[:4] == coalitions[4:]
    assert all(a != b for a, b in itertools.pairwise(coalitions))


@needs_cuda
def test_a_folder_learns_on_a_card_and_on_the_cpu_in_turns(tmp_path):
    with make(tmp_path / "a") as begun:
        begun.learn(TASKS[0], evaluations=40)
        losses, locked = begun.losses(TASKS), begun.store.locked
        kept = begun.store.values[locked]
    for device, task in (("cuda", TASKS[1]), ("cuda", TASKS[2]), ("cpu", TASKS[3])):
        with LifelongLearner.open(tmp_path / "a", device=device) as opened:
            assert opened.device.type == opened.learner.values.device.type == device
            if task is TASKS[1]:
                torch.testing.assert_close(opened.losses(TASKS).cpu(), losses, rtol=1e-4, atol=1e-4)
            before = opened.losses([task]).item()
            record = opened.learn(task, evaluations=100)
            assert record.after < before - 0.1
            assert opened.losses([task]).item() == pytest.approx(record.after, rel=1e-4)
            assert torch.equal(opened.store.values[locked], kept)
            assert opened.store.verify() == []


def test_seeds_differ(tmp_path):
    values = []
    for seed in (0, 0, 1):
        with make(tmp_path / str(len(values)), seed=seed) as lifelong:
            lifelong.learn(TASKS[0], evaluations=40)
            values.append(lifelong.store.values)
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_a_record_is_what_happened(tmp_path):
    with make(tmp_path / "a") as lifelong:
        now = lifelong.losses(TASKS[:1]).item()
        locked, evaluations = lifelong.learner.locked.sum(), lifelong.learner.evaluations
        record = lifelong.learn(TASKS[0], evaluations=100)
        assert record.task == TASKS[0]
        assert record.before == pytest.approx(now, rel=1e-5)
        assert record.after == pytest.approx(lifelong.losses(TASKS[:1]).item(), rel=1e-5)
        assert record.after < record.before - 0.1
        assert record.locked == lifelong.learner.locked.sum() - locked > 0
        assert record.evaluations == lifelong.learner.evaluations - evaluations >= 100
        segment = lifelong.store.segments[-1]
        assert (segment.task, segment.count) == (TASKS[0].name, record.locked)
        assert Record.from_json(record.to_json()) == record
        stopped = lifelong.learn(TASKS[0], evaluations=10_000, target=record.after * 1.01)
        assert stopped.after <= record.after * 1.01  # at once: it is learned already
        assert stopped.evaluations < 200


def test_losses_are_means_over_the_bytes_that_count(tmp_path):
    with make(tmp_path / "a", small(), directions=False) as lifelong, torch.no_grad():
        expected = []
        for task in TASKS:
            of_pairs = []
            for prompt, answer in task.pairs:
                x = torch.tensor([list((prompt + answer).encode())], dtype=torch.uint8)
                logs = lifelong.model(x)[0].log_softmax(-1)
                first = len(prompt.encode())
                of_pairs.append(torch.stack([-logs[i, x[0, i].long()] for i in range(first, x.shape[1])]).mean())
            expected.append(torch.stack(of_pairs).mean())
        for length in (None, 64):
            torch.testing.assert_close(lifelong.losses(TASKS, length), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_model_of_another_shape_by_a_checkpoint(tmp_path):
    shape = {"d_model": 48, "n_heads": 3, "hull": "swiglu", "memory_rule": "delta", "growth": ("grow 0", "widen 80")}
    save_checkpoint(small(**shape), tmp_path / "grown.safetensors")
    model = load_checkpoint(tmp_path / "grown.safetensors")
    with make(tmp_path / "a", model) as made:
        record = made.learn(TASKS[0], evaluations=60)
        assert record.after < record.before
        losses, before = made.losses(TASKS), state(made)
    with LifelongLearner.open(tmp_path / "a") as opened:
        assert opened.model.config == model.config
        assert same(state(opened), before)
        assert torch.equal(opened.losses(TASKS), losses)


# ── retention ────────────────────────────────────────────────────────────────────────────────────────────────────────


def retained(path, **options) -> tuple[torch.Tensor, list[Record]]:
    """Losses at the end over those when each task had been learned, but for the last; and the records."""
    with make(path, small(256), energy=0.9, **options) as lifelong:
        for task in TASKS:
            lifelong.learn(task, evaluations=128)
        after = torch.tensor([record.after for record in lifelong.records])
        return (lifelong.losses(TASKS) / after)[:-1], lifelong.records


def test_earlier_tasks_stay_with_directions_and_not_without(tmp_path):
    ratios, records = retained(tmp_path / "with")
    assert (ratios - 1).abs().max() < 1e-3
    assert all(record.after < record.before - 0.3 for record in records)  # and all of them learned
    ratios, _ = retained(tmp_path / "without", directions=False)
    assert (ratios - 1).abs().max() > 0.02


def test_directions_come_from_what_was_read(tmp_path):
    with make(tmp_path / "a", small(256), energy=0.9) as lifelong:
        read = lifelong.directions.inputs(lifelong.learner.values, ordinary(48))[HEAD].double()
        basis = lifelong.directions.protected[HEAD].double()
        assert 0 < len(basis) < 256
        inside = (read @ basis.T).square().sum() / read.square().sum()
        assert 0.9 <= inside < 0.99
        before = lifelong.directions.inputs(lifelong.learner.values, *TASKS[0].batch())[HEAD].double()
        lifelong.learn(TASKS[0], evaluations=40)
        basis = lifelong.directions.protected[HEAD].double()
        # What the task has read when it began is what it reads when the last layer alone learns.
        assert (before - before @ basis.T @ basis).norm() < 1e-4 * before.norm()
        assert (basis @ basis.T - torch.eye(len(basis))).abs().max() < 1e-5
        files = sorted((tmp_path / "a" / "protected").iterdir())
        assert torch.equal(torch.cat([load_file(file)[HEAD] for file in files]).double(), basis)
    with make(tmp_path / "b", energy=0.0) as lifelong:
        assert len(lifelong.directions.protected[HEAD]) == 0
        assert not (tmp_path / "b" / "protected").exists()


def test_a_guard_turns_down_what_costs_earlier_tasks(tmp_path):
    """Without directions or locks, so that nothing else keeps them."""

    def ratios(path, guard):
        with make(path, directions=False, locks=False, guard=guard) as lifelong:
            for task in TASKS:
                lifelong.learn(task, evaluations=96)
            after = torch.tensor([record.after for record in lifelong.records])
            return lifelong.losses(TASKS) / after, lifelong.records

    free, _ = ratios(tmp_path / "free", None)
    assert free[:-1].max() > 1.05
    found, records = ratios(tmp_path / "guarded", 0.02)
    assert found.max() <= 1.02 + 2e-4
    assert any(record.after < record.before for record in records[1:])  # not all is turned down


# ── locks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def by_hand(values: torch.Tensor, mask: torch.Tensor) -> str:
    return hashlib.sha256(values[mask].numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("kind", ({"learns": ()}, {"directions": False, "dtype": "float16"}))
def test_locked_weights_are_the_same_for_ever(tmp_path, kind):
    with make(tmp_path / "a", **kind) as lifelong:
        spans = lifelong.population.spans
        # The embeddings, before anything is learned.
        locked, first = lifelong.store.locked, lifelong.store.values
        assert lifelong.store.segments[0].task == ANCHORED
        assert all(locked[spans[name]].all() for name in EMBEDDINGS)
        assert locked.sum() == sum(spans[name].stop - spans[name].start for name in EMBEDDINGS)  # it has no norms
        hashes, moved = [(locked, by_hand(first, locked))], []
    for part in (TASKS[:2], TASKS[2:]):  # in one process, and in the next
        with LifelongLearner.open(tmp_path / "a") as lifelong:
            for task in part:
                record = lifelong.learn(task, evaluations=60)
                new = lifelong.store.locked & ~locked
                assert new.sum() == record.locked > 0
                assert not (locked & ~lifelong.store.locked).any()
                locked, values = lifelong.store.locked, lifelong.store.values
                moved.append(values != first)
                hashes.append((new, by_hand(values, new)))
                assert lifelong.store.verify() == []
                for mask, expected in hashes:
                    assert by_hand(values, mask) == expected
    # Without a lock they would have moved: those beside them did, and they themselves until then.
    beside = slice(None) if kind.get("learns") == () else spans[HEAD]
    assert moved[-1][beside][~locked[beside]].float().mean() > 0.9
    assert moved[0][hashes[1][0]].any()
    assert all(torch.equal(values[spans[name]], first[spans[name]]) for name in EMBEDDINGS)


def test_without_locks_nothing_but_the_embeddings_is_locked(tmp_path):
    with make(tmp_path / "a", locks=False) as lifelong:
        record = lifelong.learn(TASKS[0], evaluations=40)
        assert (record.locked, record.important, record.credited) == (0, 0, 0)
        assert [segment.task for segment in lifelong.store.segments] == [ANCHORED]


def test_every_weight_learns_when_none_is_named(tmp_path):
    with make(tmp_path / "a", learns=()) as lifelong:
        before = lifelong.store.values
        record = lifelong.learn(TASKS[0], evaluations=120)
        assert record.after < record.before
        for name, span in lifelong.population.spans.items():
            assert bool((lifelong.store.values[span] != before[span]).any()) == (name not in EMBEDDINGS), name
        assert lifelong.directions is None
        assert not (tmp_path / "a" / "protected").exists()


def test_what_is_named_alone_learns(tmp_path):
    names = ("head.condition.weight", HEAD)
    for strategy in ({}, {"directions": False}):
        with make(tmp_path / f"{len(strategy)}", learns=names, energy=0.5, **strategy) as lifelong:
            before = lifelong.store.values
            lifelong.learn(TASKS[0], evaluations=60)
            for name, span in lifelong.population.spans.items():
                assert bool((lifelong.store.values[span] != before[span]).any()) == (name in names), name
            if lifelong.directions is not None:
                assert set(lifelong.directions.protected) == set(names)


def test_float16_is_what_was_evaluated(tmp_path):
    with make(tmp_path / "a", dtype="float16", locks=False, directions=False) as lifelong:
        record = lifelong.learn(TASKS[0], evaluations=120)
        values = lifelong.store.values
        assert torch.equal(values, values.half().float())
        assert torch.equal(values, lifelong.learner.values)
        # Weights that were rounded after their evaluation would be off by far more.
        assert record.after == pytest.approx(lifelong.losses(TASKS[:1]).item(), rel=2e-6)
        assert (tmp_path / "a" / "weights" / "weights.0.bin").stat().st_size == 2 * len(values)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"energy": 1.0}, "energy=1.0: accepted is a number from 0 to below 1"),
        ({"energy": -0.1}, "energy=-0.1"),
        ({"energy": float("nan")}, "energy=nan"),
        ({"guard": -1.0}, "guard=-1.0: accepted is a number ≥ 0, or None"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16': accepted is float32 or float16"),
        ({"seed": -1}, "seed=-1: accepted is an integer from 0"),
        ({"seed": 2**63}, f"seed={2**63}: accepted"),
        ({"learns": ("head.nothing.weight",)}, "'head.nothing.weight': accepted are"),
        ({"learns": ("head.nothing.weight",), "directions": False}, "'head.nothing.weight': accepted are"),
        ({"learns": ("head.output.bias",)}, "'head.output.bias': accepted are weights of nn.Linear"),
        ({"learns": ("",)}, "'': accepted are"),
    ],
)
def test_bad_options_are_named_and_leave_nothing(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        make(tmp_path / "a", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_creation_that_fails_leaves_nothing_and_can_be_repeated(tmp_path):
    model = small()
    with torch.no_grad():
        model.head.output.weight[3, 1] = 1e6
    with pytest.raises(ValueError, match=r"beyond float16.*head.output.weight\[3, 1\]"):
        make(tmp_path / "a", model, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    make(tmp_path / "a", model).store.close()


def test_folders_that_are_not_accepted(tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("ağaç")
    with pytest.raises(ValueError, match=f"path='{taken}': accepted is a new or empty folder"):
        make(taken)
    assert [file.name for file in taken.iterdir()] == ["mine.txt"]
    for path in (tmp_path / "missing", taken):
        with pytest.raises(ValueError, match=f"path='{path}': accepted is a folder that was made by `create`"):
            LifelongLearner.open(path)
    assert not (tmp_path / "missing").exists()
    save_checkpoint(small(), tmp_path / "checkpoint" / "model.safetensors")  # no weights beside it
    with pytest.raises(FileNotFoundError, match="no such store"):
        LifelongLearner.open(tmp_path / "checkpoint")
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty").store.close()
    make(tmp_path / "deep" / "er").store.close()
    LifelongLearner.open(tmp_path / "empty").store.close()


def test_a_task_that_does_not_fit_changes_nothing(tmp_path):
    with make(tmp_path / "a") as lifelong:
        before, known = state(lifelong), progress(lifelong)
        with pytest.raises(ValueError, match="length=5: accepted is at least"):
            lifelong.learn(TASKS[0], length=5)
        with pytest.raises(ValueError, match="accepted is at least one"):
            lifelong.learn(Task("empty", "style", ()))
        with pytest.raises(ValueError, match="accepted is at least one"):
            lifelong.losses([])
        assert same(state(lifelong), before)
        assert progress(lifelong) == known


def test_what_was_protected_is_missing_or_damaged(tmp_path):
    with make(tmp_path / "a") as lifelong:
        lifelong.learn(TASKS[0], evaluations=40)
        before = state(lifelong)
    file = tmp_path / "a" / "protected" / "000002.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"protected {file}: damaged"):
        LifelongLearner.open(tmp_path / "a")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="000002"):
        LifelongLearner.open(tmp_path / "a")
    file.write_bytes(data)
    with LifelongLearner.open(tmp_path / "a") as opened:  # those that failed do not hold the folder
        assert same(state(opened), before)


def test_options_that_learned_so_far_are_kept(tmp_path):
    with make(tmp_path / "a", learner=LearnerOptions(population=12, perturbation="dense")) as made:
        assert made.learner.options.population == 12
    with LifelongLearner.open(tmp_path / "a") as opened:
        assert opened.learner.options == LearnerOptions(population=12, perturbation="dense")
        assert asdict(opened.lock_options) == asdict(LOCK)


def test_the_demonstration_leaves_the_random_state_and_hears_the_prompt():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model = demonstration_model(32)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), demonstration_model(32).parameters(), strict=True))
    assert not torch.equal(next(demonstration_model(32, seed=1).parameters()), next(model.parameters()))
    # What the head reads tells of a byte far behind, beyond the encoder's overlap.
    read = []
    handle = model.head.output.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    x = torch.full((2, 24), ord("a"), dtype=torch.uint8)
    x[1, 0] = ord("b")
    with torch.no_grad():
        model(x)
    handle.remove()
    inputs = read[0].view(2, -1, read[0].shape[-1])
    assert (inputs[0, -1] - inputs[1, -1]).norm() > 1e-2 * inputs[0, -1].norm()


# ── several processes, and kills ─────────────────────────────────────────────────────────────────────────────────────


def test_one_process_learns_and_others_read(tmp_path):
    path = tmp_path / "a"
    make(path).store.close()
    heard, say = os.pipe()

    def work():
        with LifelongLearner.open(path) as lifelong:
            lifelong.learn(TASKS[0], evaluations=40)
            os.write(say, b"x")
            time.sleep(60)

    child = fork(work)
    os.close(say)
    try:
        assert os.read(heard, 1) == b"x"
        with pytest.raises(StoreBusy, match=f"open for writing in process {child}"):
            LifelongLearner.open(path)
        with LifelongLearner.open(path, read_only=True) as reader:
            assert [record.task for record in reader.records] == TASKS[:1]
            loss = reader.losses(TASKS[:1]).item()
            assert loss == pytest.approx(reader.records[0].after, rel=1e-5)
            with pytest.raises(ValueError, match="open for reading only"):
                reader.learn(TASKS[1], evaluations=40)
    finally:
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
        os.close(heard)
    with LifelongLearner.open(path) as lifelong:
        with pytest.raises(StoreBusy, match=f"process {os.getpid()}"):
            LifelongLearner.open(path)
        assert lifelong.losses(TASKS[:1]).item() == loss


def kill_before(count: int) -> None:
    """From now on: this process kills itself before the count-th time that a file or folder gets its name."""
    calls = [0]

    def counted(function):
        def call(*args, **settings):
            calls[0] += 1
            if calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **settings)

        return call

    os.replace, os.rename = counted(os.replace), counted(os.rename)


def test_a_creation_that_is_killed_leaves_no_folder_or_a_whole_one(tmp_path):
    model, whole, codes = small(32), None, []
    while 0 not in codes and len(codes) < 50:
        path = tmp_path / f"{len(codes)}"

        def work(path=path):
            kill_before(len(codes) + 1)
            make(path, model).store.close()

        codes.append(wait(fork(work)))
        if path.exists():
            with LifelongLearner.open(path) as opened:
                assert all(opened.store.locked[opened.population.spans[name]].all() for name in EMBEDDINGS)
                assert len(opened.directions.protected[HEAD]) > 0
                whole = whole or state(opened)
                assert same(state(opened), whole)
    assert len(codes) > 5
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0]
    make(tmp_path / "0", model).store.close()  # where the first was killed


def test_a_task_whose_record_was_lost_is_learned_on(tmp_path, monkeypatch):
    with make(tmp_path / "a") as lifelong:
        lifelong.learn(TASKS[0], evaluations=40)
        monkeypatch.setattr(lifelong, "_save_protected", lambda spans: pytest.exit("killed"))
        with pytest.raises(pytest.exit.Exception):
            lifelong.learn(TASKS[1], evaluations=40)
        locked, values = lifelong.store.locked, lifelong.store.values
    with LifelongLearner.open(tmp_path / "a") as opened:
        assert [segment.task for segment in opened.store.segments] == [ANCHORED, TASKS[0].name, TASKS[1].name]
        assert [record.task for record in opened.records] == TASKS[:1]
        assert len(list((tmp_path / "a" / "protected").iterdir())) == opened.store.meta["protected"] == 2
        assert torch.equal(opened.learner.locked, locked)
        opened.learn(TASKS[1], evaluations=40)
        assert by_hand(opened.store.values, locked) == by_hand(values, locked)
        assert opened.store.verify() == []
        assert [record.task for record in opened.records] == TASKS[:2]


def test_kill_9_while_learning_twenty_times(tmp_path):
    path = tmp_path / "a"
    lock = LockOptions(candidates=6, groups=2, group_size=2, minimum=0.0001, budget=0.002)
    make(path, small(64), learner=LearnerOptions(population=8), lock=lock, energy=0.5).store.close()
    rng, took = random.Random(1), 0.2  # seconds that a task takes, as far as is known
    held: list[tuple[torch.Tensor, str]] = []
    acknowledged: list[str] = []
    for _ in range(20):
        heard, say = os.pipe()

        def work(say=say):
            with LifelongLearner.open(path) as lifelong:
                os.write(say, b"\n")
                while True:
                    task = TASKS[len(lifelong.records) % len(TASKS)]
                    os.write(say, f"{lifelong.learn(task, evaluations=8).task.name}\n".encode())

        child = fork(work)
        os.close(say)
        text, start = os.read(heard, 1), time.monotonic()  # it is at work
        for _ in range(rng.randrange(3)):
            text += os.read(heard, 100)
            took, start = time.monotonic() - start, time.monotonic()
        time.sleep(rng.uniform(0, took))
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
        with open(heard, "rb") as rest:
            text += rest.read()
        acknowledged += [name for name in text.decode().split("\n") if name]

        with WeightStore.open(path / "weights") as store:
            assert store.verify() == []
            values, locked = store.values, store.locked
            for mask, digest in held:
                assert locked[mask].all()
                assert by_hand(values, mask) == digest
            held.append((locked, by_hand(values, locked)))
        with LifelongLearner.open(path) as lifelong:
            records = [record.task.name for record in lifelong.records]
            # What was acknowledged is there, and at most one more, whose word did not come through.
            assert records[: len(acknowledged)] == acknowledged
            assert len(records) <= len(acknowledged) + 1
            acknowledged = records
            meta = lifelong.store.meta
            assert meta["protected"] == 1 + len(records)
            files = sorted((path / "protected").glob("[!.]*"))
            assert meta["protected"] <= len(files) <= meta["protected"] + 1
            bases = [load_file(file)[HEAD] for file in files[: meta["protected"]]]
            assert torch.equal(torch.cat(bases), lifelong.directions.protected[HEAD])
            assert lifelong.losses(TASKS[:1]).isfinite().all()
    assert len(acknowledged) >= 10
    assert held[-1][0].sum() > held[0][0].sum()
    with LifelongLearner.open(path) as lifelong:  # and it learns on
        task = TASKS[len(acknowledged) % len(TASKS)]
        assert lifelong.learn(task, evaluations=8).task == task
        assert len(lifelong.records) == len(acknowledged) + 1
        assert lifelong.store.verify() == []
