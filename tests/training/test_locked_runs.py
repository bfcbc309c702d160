"""`train_curriculum.py --locks FOLDER`: gradients train what tasks have left free, and the folder goes on with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from model import load_checkpoint
from model.sgm.lifelong import LifelongLearner
from model.sgm.lifelong_options import LifelongOptions
from model.sgm.locking import LockOptions
from model.sgm.tasks import Task
from model.training.trainer import Trainer
from tests.conftest import make_random_model
from tests.training.test_train_script import curriculum, environment, script  # noqa: F401 (fixtures)

TASKS = [Task("pirate", "style", (("Arr: ", "matey"),)), Task("başkent", "fact", (("TR: ", "Ankara 🙂"),))]
LOCK = LockOptions(candidates=16, groups=4, group_size=4, minimum=0.001, budget=0.01)
RUN = ["--batch-size", "2", "--seq-len", "64", "--sample-bytes", "0", "--quiet", "--steps", "12", "--save-every", "4"]
RUN += ["--weight-decay", "0.3", "--lr", "0.01", "--eval-every", "12"]
LAST = "last_model_curriculum.safetensors"


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    monkeypatch.setattr(Trainer, "plot", lambda self: None)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder that has learned one task; to be copied."""
    model = make_random_model(n_layers=1, head_dim=64)
    path = tmp_path_factory.mktemp("learned") / "sgm"
    options = LifelongOptions(learns=("blocks.0.output.weight",), energy=0.5)
    with LifelongLearner.create(path, model, options, lock=LOCK) as lifelong:
        lifelong.learn(TASKS[0], evaluations=64)
        for name in options.learns:
            assert lifelong.store.locked[lifelong.store.range_of(name)].any()
    return path


@pytest.fixture
def folder(learned, tmp_path):
    return Path(shutil.copytree(learned, tmp_path / "sgm"))


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


VARIANTS = {
    "plain": [],
    "adamw": ["--optimizer", "adamw"],
    "genesis": ["--genesis", "all", "--viscosity", "resistance"],
    "petals that set": ["--freeze", "chrysalis", "--freeze-at", "4"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_locked_weights_are_the_same_to_the_bit(folder, variant, script, curriculum, tmp_path):  # noqa: F811
    with LifelongLearner.open(folder, read_only=True) as lifelong:
        locked, before = lifelong.store.locked, lifelong.store.values
    line = [*RUN, *VARIANTS[variant], "--curriculum", curriculum, "--locks", folder, "--out", tmp_path / "out"]
    assert script(*line) == 0
    for name in (LAST, "best_model_curriculum.safetensors"):
        after = weights(load_checkpoint(tmp_path / "out" / name))
        assert same_bits(after[locked], before[locked])
        assert (after != before)[~locked].float().mean() > 0.3
    options = json.loads((tmp_path / "out" / "metrics_curriculum.json").read_text())["run"]["options"]
    assert options["locks"] == str(folder.resolve())


def test_a_resumed_run_keeps_the_locks_without_the_folder(folder, script, curriculum, tmp_path):  # noqa: F811
    with LifelongLearner.open(folder, read_only=True) as lifelong:
        locked, before = lifelong.store.locked, lifelong.store.values
    line = [*RUN, "--curriculum", curriculum, "--locks", folder, "--out"]
    assert script(*line, tmp_path / "whole") == 0
    assert script(*line, tmp_path / "parts", stop_at=5) == 0
    with safe_open(tmp_path / "parts" / LAST, "pt") as file:
        assert any(name.startswith("training.optimizer.locked.") for name in file.keys())  # noqa: SIM118
    folder.rename(tmp_path / "elsewhere")
    assert script("--resume", "--out", tmp_path / "parts", "--sample-bytes", "0", "--quiet") == 0
    whole, parts = (weights(load_checkpoint(tmp_path / each / LAST)) for each in ("whole", "parts"))
    assert same_bits(whole, parts)
    assert same_bits(parts[locked], before[locked])


def test_locks_outlive_growth_and_a_resume_after_it(folder, script, curriculum, tmp_path):  # noqa: F811
    with LifelongLearner.open(folder, read_only=True) as lifelong:
        store = lifelong.store
        parts = {
            name: (store.locked[store.range_of(name)], store.values[store.range_of(name)]) for name in store.names()
        }
    line = [*RUN, "--curriculum", curriculum, "--locks", folder, "--out", tmp_path / "out"]
    assert script(*line, "--grow", "4:blocks,4:thaw,4:petals=2", stop_at=7) == 0
    assert script("--resume", "--out", tmp_path / "out", "--sample-bytes", "0", "--quiet") == 0
    model = load_checkpoint(tmp_path / "out" / LAST)
    assert model.config.growth
    grown, checked = dict(model.named_parameters()), 0
    for name, (mask, then) in parts.items():
        now = grown[name.replace("blocks.0.", "blocks.0.left.")].detach().flatten()
        assert same_bits(now[mask], then[mask]), name
        checked += int(mask.sum())
    assert checked > 10_000


def test_the_folder_learns_on_with_what_was_trained(folder, script, curriculum, tmp_path):  # noqa: F811
    assert script(*RUN, "--curriculum", curriculum, "--locks", folder, "--out", tmp_path / "out") == 0
    model = load_checkpoint(tmp_path / "out" / LAST)
    with LifelongLearner.open(folder) as lifelong:
        lifelong.take(model)
        assert torch.equal(lifelong.store.values, weights(model))
        (first,) = lifelong.records
        record = lifelong.learn(TASKS[1], evaluations=64)
        assert record.after < record.before - 0.1
        assert lifelong.losses(TASKS[:1]).item() == pytest.approx(first.after, rel=1e-3)
        assert lifelong.store.verify() == []


BAD = {
    "--locks missing": "--locks {here}/missing: accepted is a folder that python -m model.sgm has made",
    "--locks sgm --set d_model=64": "--set d_model=64: differs from the model of --locks; leave it out",
    "--locks sgm --hull swiglu": "--set hull=swiglu: differs from the model of --locks; leave it out",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_arguments_are_one_line(folder, line, script, curriculum, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert script(*RUN, "--curriculum", curriculum, *line.split(), "--out", tmp_path / "out") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert BAD[line].format(here=tmp_path) in said
    assert not (tmp_path / "out").exists()


def test_a_run_is_resumed_with_its_own_locks(folder, script, curriculum, tmp_path, capsys):  # noqa: F811
    line = [*RUN, "--curriculum", curriculum, "--locks", folder, "--out", tmp_path / "out"]
    assert script(*line, stop_at=2) == 0
    assert f"weights locked by {folder.resolve()}" in capsys.readouterr().out
    other = ["--resume", "--out", tmp_path / "out", "--quiet"]
    assert script(*other, "--locks", tmp_path / "other") == 2
    assert f"--locks {tmp_path / 'other'}: the run being resumed has {folder.resolve()}" in capsys.readouterr().err
    assert script(*other, "--locks", folder, stop_at=3) == 0
