"""inspect_reasoning.py as a user runs it: its tables, its files, its exit statuses and one-line errors."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import save_checkpoint
from model.evaluation.inspection import inspect_layers
from model.evaluation.reasoning import DEFAULT_TEXT, measure_reasoning
from model.evaluation.report import json_text
from tests.conftest import make_random_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "inspect_reasoning.py"
BEST, LAST = "best_model_curriculum.safetensors", "last_model_curriculum.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_model):
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(random_model, folder / "checkpoints" / BEST)
    grown = make_random_model(growth=("grow 0",), anchors=True, memory_rule="delta")
    tensors = {"genesis.importance": torch.ones(2, 32), "worker.0.losses": torch.zeros(3)}
    save_checkpoint(grown, folder / "checkpoints" / LAST, tensors=tensors, values={"step": 3})
    torch.save({"config": random_model.config.to_dict(), "model": random_model.state_dict()}, folder / "model.pth")
    (folder / "damaged.safetensors").write_bytes(b"not a checkpoint at all")
    (folder / "text.txt").write_bytes("Kısa bir metin 🙂, with two languages.\n".encode() * 5)
    (folder / "binary.bin").write_bytes(bytes(range(256)) + b"\xf0\x9f")
    (folder / "empty.txt").write_bytes(b"")
    return folder


@pytest.fixture
def inspect(folder, monkeypatch, capsys):
    """The script's `main` in this process: importing PyTorch again takes seconds."""
    monkeypatch.chdir(folder)
    spec = importlib.util.spec_from_file_location("inspect_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        code = module.main(list(arguments))
        return subprocess.CompletedProcess("inspect_reasoning.py", code, *capsys.readouterr())

    return run


def one_line(done, *parts):
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(part in done.stderr for part in parts), done.stderr


def test_tables_files_and_verdicts(inspect, folder, random_model):
    done = inspect("--text", "text.txt", "--steps", "2", "--top", "3", "--json", "out/a.json", "--plot", "out/a.png")
    assert done.returncode == 0 and done.stderr == ""
    text = (folder / "text.txt").read_bytes()
    reasoning, layers = measure_reasoning(random_model, text, steps=2, top=3), inspect_layers(random_model, text)
    for table in (
        reasoning.table(),
        reasoning.halting_table(),
        reasoning.gate_table(),
        reasoning.dynamics.table(),
        reasoning.gains.table(),
        reasoning.gains.extremes_table(),
        layers.layers_table(),
        layers.heads_table(),
        layers.points_table(),
    ):
        assert table in done.stdout
    data = json.loads((folder / "out" / "a.json").read_text())
    expected = {"checkpoint": f"checkpoints/{BEST}", **reasoning.to_dict(), "inspection": layers.to_dict()}
    assert data == json.loads(json_text(expected))
    lines = done.stdout.splitlines()
    assert lines[lines.index("── Verdicts") + 1 :] == [
        f"thinking: {data['verdict']}: {data['reason']}",
        f"in the long run: {data['dynamics']['kind']}: {data['dynamics']['reason']}",
        *(f"{each['name']}: {each['verdict']}: {each['reason']}" for each in data["inspection"]["memories"]),
    ]
    assert (folder / "out" / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a.json", "a.png"]


def test_the_schema_of_the_json(inspect, folder):
    assert inspect(LAST, "--json", "b.json").returncode == 0
    data = json.loads((folder / "b.json").read_text())
    assert list(data) == [
        "checkpoint", "steps", "thinking_steps", "bytes", "context", "verdict", "reason", "dynamics", "gains",
        "inspection",
    ]  # fmt: skip
    assert data["bytes"] == data["inspection"]["bytes"] == len(DEFAULT_TEXT) and len(data["steps"]) == 7
    assert len(data["gains"]["best"]) == len(data["gains"]["worst"]) == 10
    assert set(data["gains"]["best"][0]) == {"position", "byte", "kind", "before", "after", "gain", "text"}
    inspection = data["inspection"]
    assert list(inspection) == ["bytes", "layers", "memories", "nodes", "blocks"]
    assert [layer["name"] for layer in inspection["layers"]] == ["blocks.0.left", "blocks.0.right", "blocks.1"]
    assert len(inspection["memories"]) == 4 and len(inspection["memories"][0]["points"]) == 8
    assert {memory["verdict"] for memory in inspection["memories"]} <= {"dormant", "active", "saturated", "unstable"}
    assert [node["name"] for node in inspection["nodes"]] == ["blocks.0"]


def test_importance_comes_from_the_runs_last_checkpoint(inspect, folder):
    done = inspect(LAST, "--json", "c.json", "--text", "text.txt")
    blocks = json.loads((folder / "c.json").read_text())["inspection"]["blocks"]
    assert [block["importance_mean"] for block in blocks] == [1, 1] and blocks[0]["anchor_mean"] == 0
    assert "mean importance" in done.stdout and "node " in done.stdout
    done = inspect("--text", "text.txt")
    assert done.returncode == 0 and "importance" not in done.stdout and "node " not in done.stdout


def test_a_pth_file_and_a_binary_text(inspect):
    done = inspect("model.pth", "--text", "binary.bin", "--max-bytes", "200", "--device", "cpu")
    assert done.returncode == 0 and "200 of 258 bytes, evenly spaced" in done.stdout
    assert "the first 200 bytes as one stream" in done.stdout


def test_a_terminal_that_knows_ascii_alone(folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, str(SCRIPT), "--text", "text.txt"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.isascii() and b"thinking: " in done.stdout and b"\\u27e6" in done.stdout


def test_without_a_checkpoint_it_says_how_to_get_one(inspect, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    one_line(inspect(), BEST, "python train_curriculum.py")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["damaged.safetensors"], "damaged.safetensors"),
        (["missing.safetensors"], "missing.safetensors"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--text", "empty.txt"], "empty.txt"),
        (["--text", "checkpoints"], "checkpoints"),
        (["--device", "tpu"], "--device tpu"),
    ],
)
def test_bad_files_and_devices_are_one_line(inspect, arguments, named):
    one_line(inspect(*arguments), named)


def test_importance_that_does_not_fit_is_one_line(inspect, tmp_path, random_model):
    tensors = {"genesis.importance": torch.zeros(3, 32)}
    path = save_checkpoint(random_model, tmp_path / "odd.safetensors", tensors=tensors)
    one_line(inspect(str(path)), "importance has shape (3, 32): accepted is (2, 32)")


def test_a_file_that_cannot_be_written_loses_no_table(inspect):
    done = inspect("--text", "text.txt", "--json", "checkpoints")
    assert done.returncode == 2 and "thinking: " in done.stdout and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--steps", "0"], "--steps"),
        (["--top", "0"], "--top"),
        (["--max-bytes", "x"], "--max-bytes"),
        (["a", "b"], "b"),
        (["--unknown"], "--unknown"),
    ],
)
def test_bad_arguments_are_one_line(inspect, capsys, arguments, named):
    with pytest.raises(SystemExit) as stopped:
        inspect(*arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1 and named in captured.err
