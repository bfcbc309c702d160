"""The scripts as a user runs them, with their exit statuses and one-line errors.

What needs PyTorch and is no whole run calls `main` in this process: importing it again takes seconds.
"""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import save_checkpoint
from model.evaluation.__main__ import main as evaluate
from model.evaluation.bpc import bits_per_byte

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_model):
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(random_model, folder / "checkpoints" / "best_model_curriculum.safetensors")
    (folder / "damaged.safetensors").write_bytes(b"not a checkpoint at all")
    (folder / "text.txt").write_bytes("Kısa bir metin, with two languages.\n".encode() * 5)
    (folder / "empty.txt").write_bytes(b"")
    return folder


def run(folder, *command):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [str(ROOT / command[0]), *command[1:]] if command[0].endswith(".py") else command
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def as_main(folder, monkeypatch, capsys):
    """as_main("a_script.py" or "-m", …) → what `python …` does and prints, on the CPU, but in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def go(*command):
        module = command[0] == "-m"
        monkeypatch.setattr(sys, "argv", list(command[module:]))
        with pytest.raises(SystemExit) as end:
            if module:
                with monkeypatch.context() as patch:  # it is imported here, and would be warned of
                    patch.delitem(sys.modules, f"{command[1]}.__main__", raising=False)
                    runpy.run_module(command[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        return subprocess.CompletedProcess(command, end.value.code, *capsys.readouterr())

    return go


@pytest.fixture
def in_process(folder, monkeypatch, capsys):
    """Like `run`, by the script's `main` in this process."""
    monkeypatch.chdir(folder)

    def run(script, *arguments):
        spec = importlib.util.spec_from_file_location(f"script_{script[:-3]}", ROOT / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        code = module.main(list(arguments))
        return subprocess.CompletedProcess(script, code, *capsys.readouterr())

    return run


def one_line(done, *parts):
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(part in done.stderr for part in parts), done.stderr


CHECKPOINT = "best_model_curriculum.safetensors"


def test_recall_runs_and_fails_honestly(as_main, folder):
    arguments = ["--lengths", "200,300", "--depths", "0,1", "--pairs", "3,8", "--samples", "2", "--seed", "4"]
    arguments += ["--json", "out/recall.json", "--plot", "out/recall.png"]
    done = as_main("test_recall.py", CHECKPOINT, *arguments)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["bytes", "prompts"], ["200", "4"], ["300", "4"]]
    assert lines[-1].startswith("FAIL") and "recall" in done.stderr
    for part in ("depth \\ bytes", "pairs  bytes", "bytes/s", "peak memory", "memory contributes nothing"):
        assert part in done.stdout
    assert (folder / "out" / "recall.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((folder / "out" / "recall.json").read_text())
    assert data["settings"] == {
        "tasks": ["needle", "pairs"], "lengths": [200, 300], "depths": [0.0, 1.0], "pairs": [3, 8],
        "languages": ["en", "tr"], "samples": 2, "seed": 4, "batch_size": 16, "ablation": True,
    }  # fmt: skip
    assert data["checkpoint"].endswith(CHECKPOINT) and data["device"] == "cpu" and data["passed"] is False
    assert data["seconds"] > 0 and data["peak_bytes"] > 2**24
    assert set(data) == {"checkpoint", "device", "settings", "passed", "needle", "pairs", "seconds", "peak_bytes"}
    for task in ("needle", "pairs"):
        assert data[task]["reach"] > 50 and data[task]["contribution"]["verdict"]
        for cell in data[task]["cells"]:
            assert set(cell["cost"]) == {"seconds", "bytes_per_second", "state_bytes", "peak_bytes"}
            assert all(isinstance(cell[name], float) for name in ("accuracy", "without_memory", "log2_probability"))
    assert data["needle"]["pass_accuracy"] == 0.9 and data["needle"]["passed"] is False
    assert [cell["length"] for cell in data["needle"]["cells"]] == [200, 300]
    assert [cell["pairs"] for cell in data["pairs"]["cells"]] == [3, 8]


def test_recall_asks_what_it_is_asked_to(in_process, folder):
    done = in_process(
        "test_recall.py", CHECKPOINT, "--lengths", "200", "--depths", "0.5", "--samples", "2", "--language", "tr",
        "--tasks", "needle", "--no-ablation", "--json", "recall.json",
    )  # fmt: skip
    assert done.returncode == 1 and "pairs" not in done.stdout and "contributes" not in done.stdout
    data = json.loads((folder / "recall.json").read_text())
    assert data["pairs"] is None and data["settings"]["tasks"] == ["needle"] and not data["settings"]["ablation"]
    (cell,) = data["needle"]["cells"]
    assert list(cell["languages"]) == ["tr"] and cell["without_memory"] is None


def test_recall_of_pairs_alone_has_no_verdict(in_process, folder):
    done = in_process("test_recall.py", CHECKPOINT, "--tasks", "pairs", "--pairs", "2", "--json", "recall.json")
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("no verdict")
    data = json.loads((folder / "recall.json").read_text())
    assert data["needle"] is data["passed"] is None and data["pairs"]["cells"][0]["queries"] == 20


def test_recall_stopped_by_ctrl_c(in_process, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("model.inference.stream.ByteStream.logits", stop)
    done = in_process("test_recall.py", CHECKPOINT, "--lengths", "200")
    assert done.returncode == 130 and done.stderr.endswith("test_recall.py: stopped\n") and done.stdout == ""


def test_recall_defaults_are_those_of_the_help(in_process, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr("model.evaluation.needles.check_needles", lambda *values: seen.update(needle=values))

    def check_pairs(pairs):
        seen["pairs"] = pairs
        raise ValueError("seen")

    monkeypatch.setattr("model.evaluation.associative.check_pairs", check_pairs)
    assert in_process("test_recall.py", "missing").returncode == 2
    with pytest.raises(SystemExit):
        in_process("test_recall.py", "--help")
    shown = capsys.readouterr().out
    lengths, samples, depths, languages = seen["needle"]
    assert languages == ("en", "tr") and f"({samples})" in shown
    for values in (lengths, depths, seen["pairs"]):
        assert f"({','.join(f'{value:g}' for value in values)})".replace(" ", "") in "".join(shown.split())


def test_inspect_without_a_checkpoint_says_how_to_get_one(in_process, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    one_line(in_process("inspect_reasoning.py"), "best_model_curriculum.safetensors", "python train_curriculum.py")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["test_recall.py", "damaged.safetensors"], "damaged.safetensors"),
        (["test_recall.py", "missing.safetensors"], "missing.safetensors"),
        (["test_recall.py", "best_model_curriculum.safetensors", "--device", "tpu"], "--device tpu"),
        (["test_recall.py", "missing", "--lengths", "900,50"], "length=50: accepted is at least"),
        (["test_recall.py", "missing", "--pairs", "8,17577"], "pairs=17577: accepted is at most 17576"),
        (["test_recall.py", "missing", "--json", "checkpoints"], "--json checkpoints: it is a folder"),
        (["test_recall.py", "missing", "--plot", "."], "--plot .: it is a folder"),
        (["inspect_reasoning.py", "damaged.safetensors"], "damaged.safetensors"),
        (["inspect_reasoning.py", "--text", "missing.txt"], "missing.txt"),
        (["inspect_reasoning.py", "--text", "empty.txt"], "empty.txt"),
    ],
)
def test_bad_files_and_devices_are_one_line(in_process, arguments, named):
    one_line(in_process(*arguments), named)


def test_a_pass_exits_with_zero(in_process, monkeypatch):
    monkeypatch.setattr("model.evaluation.recall.PASS_ACCURACY", 0.0)
    done = in_process("test_recall.py", CHECKPOINT, "--lengths", "200", "--samples", "1", "--tasks", "needle")
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("PASS")


@pytest.mark.parametrize(
    "command, named",
    [
        (["test_recall.py"], "checkpoint"),
        (["test_recall.py", "x", "--lengths", "200,a"], "--lengths"),
        (["test_recall.py", "x", "--samples", "0"], "--samples"),
        (["test_recall.py", "x", "--lengths", ""], "--lengths"),
        (["test_recall.py", "x", "--depths", "0,2"], "--depths"),
        (["test_recall.py", "x", "--depths", "nan"], "--depths"),
        (["test_recall.py", "x", "--pairs", "8,0"], "--pairs"),
        (["test_recall.py", "x", "--tasks", "needle,copy"], "--tasks"),
        (["test_recall.py", "x", "--language", "de"], "--language"),
        (["inspect_reasoning.py", "x", "--steps", "-1"], "--steps"),
        (["inspect_reasoning.py", "x", "--unknown"], "--unknown"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, command, named):
    one_line(run(tmp_path, *command), named)


@pytest.mark.parametrize("script", ["test_recall.py", "inspect_reasoning.py"])
def test_help_does_not_load_pytorch(tmp_path, script):
    code = "import runpy, sys; sys.argv = ['x', '--help']\n"
    code += f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    code += "\nexcept SystemExit as stop: assert stop.code == 0 and 'torch' not in sys.modules"
    assert run(tmp_path, "-c", code).returncode == 0


def test_the_package_evaluates_a_whole_file(as_main, folder, random_model):
    checkpoint = "best_model_curriculum.safetensors"
    command = ["-m", "model.evaluation", checkpoint, "text.txt", "--split", "all", "--context", "32", "--json"]
    done = as_main(*command)
    assert done.returncode == 0, done.stderr
    (stage,) = json.loads(done.stdout)["stages"]
    expected = bits_per_byte(random_model, (folder / "text.txt").read_bytes(), context=32)
    assert stage["stage"] == "text.txt" and stage["bytes"] == expected.bytes
    assert stage["bpc"] == pytest.approx(expected.bpc, rel=1e-5)


def test_the_package_evaluates_the_val_split_of_a_curriculum(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("AGIFORMER_CACHE", str(folder / "cache"))
    for name in ("one", "two"):
        Path(f"{name}.txt").write_bytes(b"".join(b"line %d of a document\n\n" % i for i in range(200)))
    stage = '[[stages]]\nname = "{0}"\nsource = "{0}.txt"\nshare = 0.5\nplasticity = 0.5\n'
    Path("both.toml").write_text('name = "both"\n' + stage.format("one") + stage.format("two"))
    assert evaluate(["best_model_curriculum.safetensors", "both.toml", "--stream", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["one", "val"], ["two", "val"]]
    assert lines[1].split()[2:] == lines[2].split()[2:]  # the same text in both
    assert lines[3].startswith("context:") and len(lines) == 4


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["missing.safetensors", "text.txt"], "missing.safetensors"),
        (["damaged.safetensors", "text.txt"], "damaged.safetensors"),
        (["best_model_curriculum.safetensors", "no-such-curriculum"], "no-such-curriculum"),
        (["best_model_curriculum.safetensors", "empty.txt", "--split", "all"], "empty.txt"),
        (["best_model_curriculum.safetensors", "text.txt", "--split", "all", "--context", "0"], "context=0"),
        (["best_model_curriculum.safetensors", "text.txt", "--device", "tpu"], "--device tpu"),
    ],
)
def test_bad_input_of_the_package_is_one_line(folder, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(folder)
    assert evaluate(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1 and named in captured.err
