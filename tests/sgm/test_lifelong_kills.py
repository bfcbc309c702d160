"""One process learns in a folder and others read; a kill at any moment loses nothing kept."""

import fcntl
import os
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from model.sgm import lifelong as lifelong_module
from model.sgm.lifelong import LifelongLearner
from model.sgm.locking import LockOptions
from model.sgm.mutations import LearnerOptions
from model.sgm.storage import StoreBusy, WeightStore
from tests.conftest import fork
from tests.sgm.test_lifelong import EMBEDDINGS, HEAD, LOCK, TASKS, by_hand, make, progress, same, small, state


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


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
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert 0 < len(left) < len(codes) and set(left) <= {f".{i}.creating" for i in range(len(codes))}
    for i in range(len(codes)):  # where each was killed: what it left is taken over
        if not (tmp_path / f"{i}").exists():
            (tmp_path / f".{i}.creating" / "junk").mkdir(parents=True, exist_ok=True)
            with make(tmp_path / f"{i}", model) as made:
                assert same(state(made), whole)
    assert all(path.name.isdecimal() for path in tmp_path.iterdir())


def test_one_process_creates_a_folder(tmp_path):
    """Another says so; and when the first has died, it takes over."""
    heard, say = os.pipe()

    def work():
        save = lifelong_module.save_checkpoint

        def slow(*args):
            save(*args)
            os.write(say, b"x")
            time.sleep(60)

        lifelong_module.save_checkpoint = slow
        make(tmp_path / "a")

    child = fork(work)
    os.close(say)
    try:
        assert os.read(heard, 1) == b"x"
        with pytest.raises(StoreBusy, match="another process is making it"):
            make(tmp_path / "a")
        assert not (tmp_path / "a").exists()
    finally:
        os.kill(child, signal.SIGKILL)
        wait(child)
        os.close(heard)
    assert [path.name for path in tmp_path.iterdir()] == [".a.creating"]
    make(tmp_path / "a").store.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_model_that_was_given_is_left_as_it_was(tmp_path):
    """A float16 folder rounds a copy."""
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with make(tmp_path / "a", model, dtype="float16") as lifelong:
        lifelong.learn(TASKS[0], evaluations=40)
        assert lifelong.model is not model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_folder_whose_maker_was_quicker_is_not_written_to(tmp_path, monkeypatch):
    """Between opening the half-made folder and locking it, it was given its name, which then lay elsewhere again."""
    flock, calls = fcntl.flock, []

    def late(handle, how):
        if os.path.isdir(os.readlink(f"/proc/self/fd/{handle}")) and not calls:
            calls.append(os.rename(tmp_path / ".a.creating", tmp_path / "other"))
        return flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    make(tmp_path / "a", small(32)).store.close()
    assert calls
    assert list((tmp_path / "other").iterdir()) == []
    LifelongLearner.open(tmp_path / "a").store.close()


# Places at which a task's process ends, by what is called there.
ENDINGS = {
    "before the locks": (lifelong_module, "find_important"),
    "within the locks": (WeightStore, "lock"),
    "after the locks": (LifelongLearner, "_protect"),
    "before the record": (LifelongLearner, "_save_protected"),
    "after the record": (LifelongLearner, "_keep"),
}


BOTH = {"learns": ("head.condition.weight", HEAD)}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(state, progress, records) of a folder that has learned three tasks, and a folder that has learned one."""
    base = tmp_path_factory.mktemp("unbroken")
    with make(base / "a", **BOTH) as lifelong:
        lifelong.learn(TASKS[0], evaluations=66)
    shutil.copytree(base / "a", base / "one")
    with LifelongLearner.open(base / "a") as lifelong:
        for task in TASKS[1:3]:
            lifelong.learn(task, evaluations=66)
        return (state(lifelong), progress(lifelong), lifelong.records), base / "one"


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_task_that_was_killed_ends_as_if_it_had_not_been(tmp_path, monkeypatch, unbroken, ending):
    (expected, known, records), one = unbroken
    shutil.copytree(one, tmp_path / "b")
    with LifelongLearner.open(tmp_path / "b") as lifelong, monkeypatch.context() as patch:
        patch.setattr(*ENDINGS[ending], lambda *_, **__: pytest.exit("killed"))
        with pytest.raises(pytest.exit.Exception):
            lifelong.learn(TASKS[1], evaluations=66)
    with LifelongLearner.open(tmp_path / "b") as opened:
        done = ending == "after the record"
        assert [record.task for record in opened.records] == TASKS[: 1 + done]
        for task in TASKS[1 + done : 3]:
            opened.learn(task, evaluations=66)
        assert opened.records == records  # losses before and after, evaluations, locks
        assert same(state(opened), expected)
        assert progress(opened) == known
        assert opened.store.verify() == []


@pytest.mark.parametrize("accepted", [1, 2])
def test_a_task_that_is_learned_on_began_where_it_began(tmp_path, monkeypatch, accepted):
    """Its changes, its loss before and its evaluations count from the first beginning, over several kills."""
    task, seen, find = TASKS[2], [], lifelong_module.find_important
    monkeypatch.setattr(
        lifelong_module, "find_important", lambda *a, **k: (seen.append(k["reference"].clone()), find(*a, **k))[1]
    )
    with make(tmp_path / "a", directions=False) as lifelong:
        lifelong.learn(TASKS[0], evaluations=40)
        start, before = lifelong.learner.values.clone(), lifelong.losses([task]).item()
        used = lifelong.learner.evaluations
    for _ in range(2):
        with LifelongLearner.open(tmp_path / "a") as lifelong:
            commits = []

            def commit(original=lifelong.commit, commits=commits, **changes):
                original(**changes)
                commits.append(1)
                if len(commits) == accepted:
                    raise KeyboardInterrupt

            lifelong.commit = commit
            with pytest.raises(KeyboardInterrupt):
                lifelong.learn(task, evaluations=400, target=-1.0)
            assert not torch.equal(lifelong.learner.values, start)
    with LifelongLearner.open(tmp_path / "a") as lifelong:
        spent = lifelong.learner.evaluations - used
        assert 2 * accepted * 32 <= spent < 300
        record = lifelong.learn(task, evaluations=spent + 40, target=-1.0)
        assert torch.equal(seen[-1], start)
        assert record.before == pytest.approx(before, rel=1e-6)
        assert spent + 40 <= record.evaluations - (1 + LOCK.candidates + LOCK.groups) < spent + 40 + 32
        assert record.evaluations == lifelong.learner.evaluations - used
        assert record.locked > 0
        # One whose evaluations have been spent does not search again.
        with monkeypatch.context() as patch:
            patch.setattr(lifelong, "_lock", lambda *_: pytest.exit("killed"))
            with pytest.raises(pytest.exit.Exception):
                lifelong.learn(TASKS[3], evaluations=33, target=-1.0)
        values = lifelong.learner.values.clone()
    with LifelongLearner.open(tmp_path / "a") as lifelong:
        lifelong.learn(TASKS[3], evaluations=33, target=-1.0)
        assert torch.equal(lifelong.learner.values, values)


def test_a_task_that_is_left_for_another_is_none_of_its_beginning(tmp_path, monkeypatch):
    seen, find = [], lifelong_module.find_important
    monkeypatch.setattr(
        lifelong_module, "find_important", lambda *a, **k: (seen.append(k["reference"].clone()), find(*a, **k))[1]
    )
    with make(tmp_path / "a", directions=False) as lifelong:
        with monkeypatch.context() as patch:
            patch.setattr(LifelongLearner, "_lock", lambda *_: pytest.exit("killed"))
            with pytest.raises(pytest.exit.Exception):
                lifelong.learn(TASKS[0], evaluations=100)
        moved, used = lifelong.learner.values.clone(), lifelong.learner.evaluations
    with LifelongLearner.open(tmp_path / "a") as lifelong:
        record = lifelong.learn(TASKS[1], evaluations=40)
        assert torch.equal(seen[0], moved)
        assert record.evaluations == lifelong.learner.evaluations - used
        assert [each.task for each in lifelong.records] == [TASKS[1]]


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
