"""A folder goes on to the bit where it was left, earlier tasks stay, and a kill at any moment loses nothing kept."""

import contextlib
import hashlib
import itertools
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from model.sgm import lifelong as lifelong_module
from model.sgm.demonstration import demonstration_model
from model.sgm.lifelong import ANCHORED, KEPT, LifelongLearner
from model.sgm.lifelong_options import LifelongOptions, Record
from model.sgm.locking import LockOptions, by_parameter, lock_updates
from model.sgm.mutations import LearnerOptions
from model.sgm.population import place_losses
from model.sgm.storage import StoreBusy, StoreDamaged
from model.sgm.tasks import Task, ordinary
from model.training.checkpoint import load_checkpoint, save_checkpoint
from model.training.optimizer import MuonAdamW
from model.training.step import TrainingStep
from tests.conftest import make_random_model
from tests.genesis.test_replay import needs_cuda

HEAD = "head.output.weight"
EMBEDDINGS = ("encoder.embedding.weight", "head.bytes.weight", "head.memory.values.weight")
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
        for task in TASKS[:3]:
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
        opened.learn(TASKS[2], evaluations=40)
    with LifelongLearner.open(tmp_path / "b", read_only=True) as opened:
        assert same(state(opened), expected)
        assert progress(opened) == known
    assert coalitions[:3] == coalitions[3:]
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
        record = lifelong.learn(TASKS[0], evaluations=100, target=1.0)
        assert record.task == TASKS[0]
        assert record.before == pytest.approx(now, rel=1e-5)
        assert record.after == pytest.approx(lifelong.losses(TASKS[:1]).item(), rel=1e-5)
        assert record.after < record.before - 0.1
        assert record.locked == lifelong.learner.locked.sum() - locked > 0
        assert record.evaluations == lifelong.learner.evaluations - evaluations > 32
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


LAYERS = {  # of every kind that can be kept, and several together
    "encoder": ("encoder.projection.weight",),
    "attention": ("blocks.0.attention.qkv.weight",),
    "gate": ("blocks.0.gate.weight",),
    "output": ("blocks.0.output.weight",),
    "thinking": ("reasoning.mlp.up.weight",),  # twice, with its own outputs
    "initial": ("head.initial.weight",),  # which the memory behind it carries to later bytes
    "recurrent": ("head.recurrent.weight",),
    "head": ("head.initial.weight", HEAD),
    "all over": ("blocks.0.attention.qkv.weight", "blocks.1.output.weight", "reasoning.mlp.down.weight", HEAD),
}


@pytest.mark.parametrize("layers", LAYERS)
def test_earlier_tasks_stay_whatever_layers_learn(tmp_path, layers):
    model = small(64, d_model=96, n_layers=2, thinking_steps=2)
    with make(tmp_path / "a", model, learns=LAYERS[layers], energy=0.0, locks=False) as lifelong:
        for task in TASKS[:3]:
            record = lifelong.learn(task, evaluations=33, target=1.0)
            assert record.after < record.before * 0.99  # something has moved
        after = torch.tensor([record.after for record in lifelong.records])
        assert (lifelong.losses(TASKS[:3]) / after - 1).abs().max() < 1e-4


def test_earlier_tasks_move_when_layers_before_the_memory_are_kept_at_the_answer_alone(tmp_path):
    """So that the test above sees what it should: at the prompt too, a block writes what the answer depends on."""
    model = small(64, d_model=96, n_layers=2)
    with make(tmp_path / "a", model, learns=LAYERS["attention"], energy=0.0, locks=False) as lifelong:
        lifelong.directions.everywhere = frozenset()
        for task in TASKS[:3]:
            lifelong.learn(task, evaluations=48)
        after = torch.tensor([record.after for record in lifelong.records])
        assert (lifelong.losses(TASKS[:3]) / after - 1).abs().max() > 1e-3


def test_layers_that_cannot_be_kept_are_refused(tmp_path):
    for name in ("blocks.0.memory.qkv.weight", "head.memory.keys.weight"):  # read by other means than the layer
        with pytest.raises(ValueError, match=f"names='{name}': accepted are layers that the module calls"):
            make(tmp_path / "a", learns=(name,), energy=0.0)
    assert list(tmp_path.iterdir()) == []


def test_directions_come_from_what_was_read(tmp_path):
    with make(tmp_path / "a", small(256), energy=0.9) as lifelong:
        read = lifelong.directions.inputs(lifelong.learner.values, ordinary(48))[HEAD].double()
        basis = lifelong.directions.protected[HEAD].double()
        assert 0 < len(basis) < 256
        inside = (read @ basis.T).square().sum() / read.square().sum()
        assert 0.9 <= inside < 0.99
        lifelong.learn(TASKS[0], evaluations=40)
        after = lifelong.directions.inputs(lifelong.learner.values, *TASKS[0].batch())[HEAD].double()
        basis = lifelong.directions.protected[HEAD].double()
        assert (after - after @ basis.T @ basis).norm() < 1e-4 * after.norm()
        assert (basis @ basis.T - torch.eye(len(basis))).abs().max() < 1e-5
        files = sorted((tmp_path / "a" / "protected").iterdir())
        assert torch.equal(torch.cat([load_file(file)[HEAD] for file in files]).double(), basis)
    with make(tmp_path / "b", energy=0.0) as lifelong:
        assert len(lifelong.directions.protected[HEAD]) == 0
        assert not (tmp_path / "b" / "protected").exists()


def test_what_is_protected_is_what_the_task_reads_once_it_has_been_learned(tmp_path):
    """With two layers the second one's inputs have moved; and of the prompt nothing behind the answer is read."""
    with make(tmp_path / "a", learns=("head.initial.weight", HEAD), energy=0.0) as lifelong:
        x, counts = TASKS[0].batch(48)
        before = lifelong.directions.inputs(lifelong.learner.values, x, counts)[HEAD].double()
        lifelong.learn(TASKS[0], evaluations=40, length=48)
        after = lifelong.directions.inputs(lifelong.learner.values, x, counts)[HEAD].double()
        basis = lifelong.directions.protected[HEAD].double()
        outside = [(read - read @ basis.T @ basis).norm() / read.norm() for read in (before, after)]
        assert outside[0] > 0.01 and outside[1] < 1e-5
        assert len(basis) == counts.sum()
        used = -(-len(TASKS[0].pairs[0][0] + TASKS[0].pairs[0][1]) // lifelong.model.config.patch_size)
        assert len(lifelong.directions.protected["head.initial.weight"]) <= used


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


def test_a_task_that_learns_nothing_locks_nothing(tmp_path, monkeypatch):
    with make(tmp_path / "a", lock_from=0.9) as lifelong:
        kept = lifelong.store.locked
        first = lifelong.learn(TASKS[0], evaluations=1)  # not one generation
        assert first.after == first.before
        second = lifelong.learn(TASKS[1], evaluations=33, target=0.0)
        third = lifelong.learn(TASKS[2], evaluations=200)
        assert 0.1 * second.before < second.after < second.before and third.after < 0.1 * third.before
        assert (first.locked, second.locked) == (0, 0) < (third.locked, 0)
        assert [segment.task for segment in lifelong.store.segments] == [ANCHORED, TASKS[2].name]
        assert (lifelong.store.locked & ~kept).sum() == third.locked
    for evaluations in (0, -3, 2.0):
        with LifelongLearner.open(tmp_path / "a") as lifelong:
            with pytest.raises(ValueError, match=f"evaluations={evaluations!r}: accepted is an integer ≥ 1"):
                lifelong.learn(TASKS[3], evaluations=evaluations)
            assert len(lifelong.records) == 3 and lifelong.store.meta["begun"] is None


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
        record = lifelong.learn(TASKS[0], evaluations=120, target=1.5)
        values = lifelong.store.values
        assert torch.equal(values, values.half().float())
        assert torch.equal(values, lifelong.learner.values)
        # Weights that were rounded after their evaluation would be off by far more.
        assert record.after == pytest.approx(lifelong.losses(TASKS[:1]).item(), rel=2e-6)
        assert (tmp_path / "a" / "weights" / "weights.0.bin").stat().st_size == 2 * len(values)


# ── in and out ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_export_is_a_checkpoint_of_what_has_been_learned(tmp_path):
    model = small()
    with make(tmp_path / "a", model) as lifelong:
        lifelong.learn(TASKS[2], evaluations=64)
        losses, values = lifelong.losses(TASKS), lifelong.store.values
    with LifelongLearner.open(tmp_path / "a", read_only=True) as reader:
        file = reader.export(tmp_path / "out" / "learned.safetensors")
    exported = load_checkpoint(file)
    assert torch.equal(torch.cat([p.flatten() for p in exported.parameters()]), values)
    assert not torch.equal(exported.head.output.weight, model.head.output.weight)
    start = load_checkpoint(tmp_path / "a" / "start.safetensors")  # what it was, for its shape alone
    assert torch.equal(start.head.output.weight, model.head.output.weight)
    with make(tmp_path / "b", exported) as again:
        assert torch.equal(again.losses(TASKS), losses)


def trained(lifelong: LifelongLearner, steps: int = 3):
    """The folder's model after some gradient steps with its locks."""
    file = lifelong.export(lifelong.path.parent / "trained.safetensors")
    model = load_checkpoint(file).train()
    model.set_plasticity(0.5)
    updates = MuonAdamW(model, lr=0.01)
    lock_updates(updates, by_parameter(lifelong.population, lifelong.learner.locked))
    x = torch.randint(256, (4, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        TrainingStep(model, updates).run(x)
    return load_checkpoint(save_checkpoint(model, file))


def test_a_folder_goes_on_with_weights_that_gradients_have_trained(tmp_path):
    with make(tmp_path / "a", small(256), energy=0.5) as lifelong:
        for task in TASKS[:2]:
            lifelong.learn(task, evaluations=64)
        locked = lifelong.store.locked
        kept = by_hand(lifelong.store.values, locked)
        model = trained(lifelong)
        old = lifelong.losses(TASKS[:2])
        lifelong.take(model)
        assert torch.equal(lifelong.store.values, torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert (lifelong.losses(TASKS[:2]) - old).abs().min() > 1e-3  # it is another model
        with torch.no_grad():
            x, counts = TASKS[0].batch()
            loss = place_losses(model, x, counts).mean()
        assert lifelong.records[0].after == pytest.approx(loss.item(), rel=1e-5)
        assert float(lifelong.model.plasticity) == 0.5
        after = torch.tensor([record.after for record in lifelong.records])
        expected = state(lifelong)
    with LifelongLearner.open(tmp_path / "a") as lifelong:
        assert same(state(lifelong), expected)
        record = lifelong.learn(TASKS[3], evaluations=64)
        assert record.after < record.before - 0.3
        assert (lifelong.losses(TASKS[:2]) / after - 1).abs().max() < 1e-3  # they stay as they were taken
        assert by_hand(lifelong.store.values, locked) == kept
        assert lifelong.store.verify() == []
        basis = lifelong.directions.protected[HEAD]
        assert (basis @ basis.T - torch.eye(len(basis))).abs().max() < 1e-5


def test_a_model_with_another_locked_weight_or_another_shape_is_not_taken(tmp_path):
    with make(tmp_path / "a") as lifelong:
        lifelong.learn(TASKS[0], evaluations=64)
        before, known = state(lifelong), progress(lifelong)
        other = load_checkpoint(lifelong.export(tmp_path / "other.safetensors"))
        name, index = next((name, each.nonzero()[0]) for name, each in by_parameter(
            lifelong.population, lifelong.learner.locked).items() if each.any())  # fmt: skip
        with torch.no_grad():
            other.get_parameter(name)[tuple(index)] += 1e-3
        with pytest.raises(ValueError, match="1 locked weights would change, the first is "):
            lifelong.take(other)
        with pytest.raises(ValueError, match="accepted is the folder's"):
            lifelong.take(small(64))
        assert same(state(lifelong), before) and progress(lifelong) == known
    with LifelongLearner.open(tmp_path / "a") as opened:
        assert same(state(opened), before) and progress(opened) == known


DAMAGE = {
    "weights": "weights/weights.0.bin", "other weights": "weights/weights.1.bin", "head": "weights/head.bin",
    "state": "weights/state.0.json", "layout": "weights/layout.json", "protected": "protected/000002.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory):
    """A folder that has learned two tasks; its state, progress and losses."""
    path = tmp_path_factory.mktemp("two") / "a"
    with make(path, small(64), energy=0.5) as lifelong:
        for task in TASKS[:2]:
            lifelong.learn(task, evaluations=40)
        return path, state(lifelong), progress(lifelong), lifelong.losses(TASKS[:2])


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_folder_is_recovered_at_the_end_of_its_last_task(tmp_path, two_tasks, damage, missing):
    whole, expected, known, losses = two_tasks
    shutil.copytree(whole, tmp_path / "a")
    file = tmp_path / "a" / DAMAGE[damage]
    if missing:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with contextlib.suppress(ValueError, OSError):
        LifelongLearner.open(tmp_path / "a").store.close()
        assert damage in ("weights", "other weights", "state") and not missing  # the one that does not count
    recovered, snapshot = LifelongLearner.recover(tmp_path / "a")
    with recovered:
        assert snapshot == KEPT
        found = state(recovered)
        for name in expected:
            if not name.startswith("protected"):
                assert torch.equal(found[name], expected[name]), name
        assert progress(recovered) == known
        assert recovered.store.verify() == []
        x, counts = TASKS[1].batch()
        read = recovered.directions.inputs(recovered.learner.values, x, counts)[HEAD]
        basis = recovered.directions.protected[HEAD]
        assert (read - read @ basis.T @ basis).norm() < 1e-4 * read.norm()
        recovered.learn(TASKS[2], evaluations=40)
    with LifelongLearner.open(tmp_path / "a") as opened:
        torch.testing.assert_close(opened.losses(TASKS[:2]), losses, rtol=1e-3, atol=1e-4)
        assert len(opened.records) == 3


def test_what_cannot_be_recovered_says_so(tmp_path):
    with pytest.raises(ValueError, match="accepted is a folder that was made by `create`"):
        LifelongLearner.recover(tmp_path / "missing")
    make(tmp_path / "a", small(32)).store.close()
    with make(tmp_path / "b", small(32)) as lifelong:
        with pytest.raises(StoreBusy):
            LifelongLearner.recover(tmp_path / "b")
        assert lifelong.learn(TASKS[0], evaluations=8)
    (snapshot,) = (tmp_path / "a" / "weights" / "snapshots").iterdir()
    snapshot.write_bytes(snapshot.read_bytes()[:-1])
    with pytest.raises(StoreDamaged, match="has no snapshot that is whole"):
        LifelongLearner.recover(tmp_path / "a")
    (tmp_path / "b" / "weights" / "segments" / "000001.safetensors").unlink()
    with pytest.raises(StoreDamaged, match="000001"):
        LifelongLearner.recover(tmp_path / "b")


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"energy": 1.0}, "energy=1.0: accepted is a number from 0 to below 1"),
        ({"energy": -0.1}, "energy=-0.1"),
        ({"energy": float("nan")}, "energy=nan"),
        ({"guard": -1.0}, "guard=-1.0: accepted is a number ≥ 0, or None"),
        ({"guard": float("nan")}, "guard=nan: accepted"),
        ({"lock_from": 1.0}, "lock_from=1.0: accepted is a number from 0 to below 1"),
        ({"lock_from": float("nan")}, "lock_from=nan"),
        ({"directions": 1}, "directions=1: accepted is True or False"),
        ({"locks": "no"}, "locks='no': accepted is True or False"),
        ({"learns": HEAD}, f"learns='{HEAD}': accepted is a tuple of parameters' names"),
        ({"learns": (1,)}, "learns=\\(1,\\): accepted is a tuple"),
        ({"seed": 1.5}, "seed=1.5: accepted is an integer"),
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
    save_checkpoint(small(), tmp_path / "checkpoint" / "start.safetensors")  # no weights beside it
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
        with pytest.raises(ValueError, match="task 'silent' has no answer"):
            lifelong.learn(Task("silent", "style", (("ağ", ""), ("🙂", ""))))
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
