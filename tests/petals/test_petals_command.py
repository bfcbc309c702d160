"""`python -m model.petals` as a user runs it: tables, files before and after, one-line errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import load_checkpoint, save_checkpoint
from model.layers.hull import CHRYSALIS, CRYOGENIC, FLUID
from model.petals.__main__ import main
from model.petals.crystallization import petal_groups
from model.training.checkpoint import load_training_state
from tests.conftest import make_random_model

ROOT = Path(__file__).resolve().parents[2]
A, B = "blocks.0.hull.groups.0", "blocks.1.hull.groups.0"
VALUES = {"step": 7, "türkçe": ["ığ", None, 0.5]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """checkpoints/run.safetensors: 3 petals a hull, of which one is cryogenic and one in chrysalis; cold weights."""
    model = make_random_model(petals=3, hull="swiglu")
    groups = petal_groups(model)
    groups[A].set_status([1], CRYOGENIC)
    groups[B].set_status([2], CHRYSALIS)
    tensors = {"losses": torch.arange(3.0)}
    for name, p in model.named_parameters():
        tensors[f"optimizer.first.{name}"] = torch.full_like(p, 0.5)
        tensors[f"optimizer.temperature.{name}"] = torch.full_like(p, 0.25)
        tensors[f"optimizer.r_up.{name}"] = torch.full_like(p, 3.0, dtype=torch.bfloat16)
        tensors[f"optimizer.r_down.{name}"] = torch.full_like(p, 3.0, dtype=torch.bfloat16)
    tensors[f"optimizer.temperature.{A}.up"][0] = 1.0
    tensors[f"crystallization.share.{A}"] = torch.tensor([-1.0, 0.75, 0.5], dtype=torch.float64)
    tensors[f"crystallization.observations.{A}"] = torch.tensor([0, 4, 5])
    save_checkpoint(model, tmp_path / "checkpoints" / "run.safetensors", tensors=tensors, values=VALUES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(path):
    tensors, values = load_training_state(path)
    model = load_checkpoint(path)
    return {f"model.{name}": x for name, x in model.state_dict().items()} | tensors, values, model.config


def different(before, after):
    assert before[1:] == after[1:] and list(before[0]) == list(after[0])
    return {name for name, tensor in before[0].items() if not torch.equal(tensor, after[0][name])}


def test_list(folder, capsys):
    assert main(["list", "run.safetensors"]) == 0
    header, *lines, last = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["petal", "status", "temperature", "crystallized", "weights"]
    group = petal_groups(load_checkpoint("checkpoints/run.safetensors"))[A]
    up, down = group.up[0].numel(), group.down[0].numel()
    warm = f"{(up + 0.25 * down) / (up + down):.3f}"
    size = str(up + down)
    assert lines == [
        [f"{A}:0", "fluid", warm, "-", size],
        [f"{A}:1", "cryogenic", "0.250", "0.750", size],
        [f"{A}:2", "fluid", "0.250", "0.500", size],
        [f"{B}:0", "fluid", "0.250", "-", size],
        [f"{B}:1", "fluid", "0.250", "-", size],
        [f"{B}:2", "chrysalis", "0.250", "-", size],
    ]
    assert last == ["2", "of", "6", "petals", "solid"]


def test_list_reads_what_the_optimizer_stores(folder, capsys):
    """Coldness 1 − T, as a float or in 1/32768."""
    model = load_checkpoint("checkpoints/run.safetensors")
    for dtype, quarter in ((torch.float32, 0.25), (torch.int16, 8192)):
        tensors = {
            f"optimizer.coldness.{A}.{name}": torch.full_like(p, quarter, dtype=dtype)
            for name, p in petal_groups(model)[A].petal_parameters().items()
        }
        save_checkpoint(model, "cold.safetensors", tensors=tensors)
        assert main(["list", "cold.safetensors"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[2] for line in lines[1:7]] == ["0.750"] * 3 + ["-"] * 3


def test_list_of_weights_alone_and_of_a_grown_model(folder, capsys):
    model = make_random_model(petals=2, hull="swiglu")
    model.grow(0)
    torch.save({"config": model.config.to_dict(), "model": model.state_dict()}, "grown.pth")
    assert main(["list", "grown.pth"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split(None, 1)[0] == "blocks.0.left.hull.groups.0:0" and " fluid, in a frozen tree " in lines[1]
    assert lines[3].split()[:-1] == ["blocks.0.right.hull.groups.0:0", "fluid", "-", "-"]
    assert lines[-1] == "0 of 6 petals solid"


def test_unfreeze_frees_and_warms_its_own_petals_alone(folder, capsys):
    path = folder / "checkpoints" / "run.safetensors"
    before = contents(path)
    assert main(["unfreeze", "run.safetensors", "--petal", f"{A}:*", "--petal", f"{B}:0"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == ["1 of 4 petals changed to fluid, and warmed: checkpoints/run.safetensors"]
    after = contents(path)
    kinds = ("temperature", "r_up", "r_down")
    state = [f"optimizer.{kind}.{A}.{name}" for kind in kinds for name in ("up", "down")]
    seen = [f"crystallization.share.{A}", f"crystallization.observations.{A}"]
    assert different(before, after) == {f"model.{A}.status", *state, *seen}
    tensors = after[0]
    assert tensors[f"model.{A}.status"].tolist() == [FLUID] * 3
    for name in state:
        assert (tensors[name][1] == (1 if "temperature" in name else 0)).all()
        assert torch.equal(tensors[name][[0, 2]], before[0][name][[0, 2]])
        assert tensors[name].dtype == before[0][name].dtype
    assert tensors[seen[0]].tolist() == [-1.0, -1.0, 0.5] and tensors[seen[1]].tolist() == [0, 0, 5]
    assert os.listdir(path.parent) == ["run.safetensors"]


def test_freeze_to_another_file(folder, capsys):
    path = folder / "checkpoints" / "run.safetensors"
    before, raw = contents(path), path.read_bytes()
    arguments = ["--petal", "all", "--mode", "chrysalis", "--out", "new/frozen.safetensors"]
    assert main(["freeze", str(path), *arguments]) == 0
    assert capsys.readouterr().out == "5 of 6 petals changed to chrysalis: new/frozen.safetensors\n"
    assert path.read_bytes() == raw
    after = contents("new/frozen.safetensors")
    assert different(before, after) == {f"model.{A}.status", f"model.{B}.status"}
    assert (after[0][f"model.{A}.status"] == CHRYSALIS).all() and (after[0][f"model.{B}.status"] == CHRYSALIS).all()
    assert main(["freeze", "new/frozen.safetensors", "--petal", f"{B}:1"]) == 0
    assert "1 of 1 petals changed to cryogenic" in capsys.readouterr().out
    status = load_checkpoint("new/frozen.safetensors").state_dict()[f"{B}.status"]
    assert status.tolist() == [CHRYSALIS, CRYOGENIC, CHRYSALIS]


def test_a_frozen_and_freed_file_is_the_file_before(folder, capsys):
    """Bit for bit, where there is no viscosity to warm."""
    save_checkpoint(
        make_random_model(petals=3, hull="swiglu"),
        "plain.safetensors",
        tensors={"losses": torch.ones(2)},
        values=VALUES,
    )
    raw = Path("plain.safetensors").read_bytes()
    assert main(["freeze", "plain.safetensors", "--petal", "*:1"]) == 0
    assert Path("plain.safetensors").read_bytes() != raw
    assert main(["unfreeze", "plain.safetensors", "--petal", "all"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 6 petals changed to fluid: plain.safetensors"
    assert Path("plain.safetensors").read_bytes() == raw


def test_a_file_that_stays_what_it_is_is_not_written(folder, capsys):
    path = folder / "checkpoints" / "run.safetensors"
    path.chmod(0o444)
    before = path.stat()
    assert main(["unfreeze", "run.safetensors", "--petal", f"{B}:0"]) == 0
    assert "0 of 1 petals changed" in capsys.readouterr().out
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert main(["unfreeze", "run.safetensors", "--petal", f"{B}:0", "--out", "copy.safetensors"]) == 0
    assert Path("copy.safetensors").read_bytes() == path.read_bytes()


def test_a_state_dict_is_only_read(folder, capsys):
    model = make_random_model(petals=2, hull="swiglu")
    torch.save({"config": model.config.to_dict(), "model": model.state_dict()}, "m.pth")
    assert main(["freeze", "m.pth", "--petal", "all"]) == 2
    assert "m.pth: accepted is a .safetensors file" in capsys.readouterr().err
    assert main(["freeze", "m.pth", "--petal", "all", "--out", "m.safetensors"]) == 0
    assert main(["list", "m.safetensors"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 of 4 petals solid"


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["list", "nothing.safetensors"], ["nothing.safetensors: no such file"]),
        (["list", "damaged.safetensors"], ["damaged.safetensors: damaged"]),
        (["unfreeze", "run.safetensors", "--petal", "all", "--petal", "blocks.9*"], ["petal blocks.9*", f"{A}:0–2"]),
        (["freeze", "run.safetensors", "--petal", "all", "--out", "folder"], ["folder"]),
        (["freeze", "run.safetensors", "--petal", "all", "--out", "x.pth"], ["x.pth: accepted is a .safetensors"]),
    ],
)
def test_errors_are_one_line(folder, capsys, arguments, parts):
    (folder / "damaged.safetensors").write_bytes(b"not a checkpoint at all")
    (folder / "folder").mkdir()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("petals: error: ")
    assert all(part in err for part in parts), err


def test_training_state_that_does_not_fit_its_model(folder, capsys):
    model = make_random_model(petals=3, hull="swiglu")
    petal_groups(model)[A].set_status([0], CRYOGENIC)
    save_checkpoint(model, "odd.safetensors", tensors={f"optimizer.temperature.{A}.up": torch.ones(3, 2)})
    raw = Path("odd.safetensors").read_bytes()
    for arguments in (["list", "odd.safetensors"], ["unfreeze", "odd.safetensors", "--petal", "all"]):
        assert main(arguments) == 2
        assert f"{A}.up: found (3, 2)" in capsys.readouterr().err
    assert Path("odd.safetensors").read_bytes() == raw


@pytest.mark.parametrize(
    "arguments, part",
    [
        ([], "list | unfreeze | freeze"),
        (["melt", "run.safetensors"], "melt"),
        (["list"], "checkpoint"),
        (["unfreeze", "run.safetensors"], "--petal"),
        (["freeze", "run.safetensors", "--petal", "all", "--mode", "fluid"], "cryogenic"),
        (["list", "run.safetensors", "--petal", "all"], "--petal"),
    ],
)
def test_bad_arguments_are_one_line(folder, capsys, arguments, part):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    out, err = capsys.readouterr()
    assert error.value.code == 2 and out == ""
    assert len(err.splitlines()) == 1 and part in err and "--help" in err


def test_as_a_command(folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "model.petals", "list", "run.safetensors"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.endswith("2 of 6 petals solid\n")
