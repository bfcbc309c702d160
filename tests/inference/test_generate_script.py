"""generate.py from outside: its streams, its exit codes, its one-line errors."""

import errno
import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import ByteStream, save_checkpoint
from model.genesis.__main__ import main as genesis
from model.genesis.gate.classifier import HiddenStateGate, gate_path
from model.genesis.gate.policy import load_policy
from model.inference.generate import generate
from tests.conftest import fork

SCRIPT = Path(__file__).parents[2] / "generate.py"
# The script must not need a UTF-8 locale.
ENVIRONMENT = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}

spec = importlib.util.spec_from_file_location("generate_script", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture(scope="module")
def folder(light_model, tmp_path_factory):
    """A folder with checkpoints/tiny.safetensors, the same as .pth, and damaged ones."""
    folder = tmp_path_factory.mktemp("script")
    whole = save_checkpoint(light_model, folder / "checkpoints" / "tiny.safetensors").read_bytes()
    contents = {"config": light_model.config.to_dict(), "model": light_model.state_dict()}
    torch.save(contents, folder / "tiny.pth")
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.safetensors").write_text("not a checkpoint\n")
    (folder / "cut.pth").write_bytes((folder / "tiny.pth").read_bytes()[:1000])
    torch.save(["a list"], folder / "list.pth")
    return folder


@pytest.fixture
def call(folder, capsys, monkeypatch):
    """call(*arguments) → (exit code, stdout, stderr), run inside this process."""
    monkeypatch.chdir(folder)

    def run(*arguments: str, stdin: bytes | None = None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code = script.main([*arguments, "--device", "cpu"])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


def expected(model, prompt: bytes, **arguments) -> str:
    (text,) = expected_rows(model, prompt, **arguments)
    return text


def expected_rows(model, prompt: bytes, *, batch: int = 1, **arguments) -> list[str]:
    data = [b""] * batch
    for piece in generate(model, prompt, batch=batch, **arguments):
        data[piece.row] += piece.data
    return [each.decode("utf-8") for each in data]


def start(folder, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, SCRIPT, *arguments], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )  # fmt: skip


class Forked:
    """generate.py in a fork, which need not import PyTorch again, with streams of its own that take ASCII alone.

    out: where its stdout goes, or None for a pipe; stdout, stderr: what comes out of it.
    """

    def __init__(self, folder, *arguments: str, out: int | None = None):
        stdout, stderr = os.pipe(), os.pipe()

        def work():
            os.chdir(folder)
            for fd, end in ((1, stdout[1] if out is None else out), (2, stderr[1])):
                os.dup2(end, fd)
            for end in (*stdout, *stderr):
                os.close(end)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", encoding="ascii") for fd in (1, 2))
            try:
                code = script.main([*arguments, "--threads", "1", "--device", "cpu"])
            except SystemExit as exit:
                code = exit.code
            sys.stdout.flush()  # as the interpreter does at its end
            sys.stderr.flush()
            os._exit(code)

        self.pid = fork(work)
        for end in (stdout[1], stderr[1]):
            os.close(end)
        self.stdout, self.stderr = os.fdopen(stdout[0], "rb"), os.fdopen(stderr[0], "rb")

    def end(self) -> tuple[int, bytes]:
        """(its exit code, what it wrote to stderr)."""
        self.stdout.close()
        with self.stderr:
            err = self.stderr.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), err


def test_bare_name_and_raw_stdin_in_a_c_locale(folder, light_model):
    """As a process of its own."""
    prompt = "ılık".encode() + b"\xff\n"
    arguments = ["tiny.safetensors", "--max-bytes", "60", "--seed", "5", "--temperature", "1.2", "--threads", "1"]
    process = start(folder, *arguments, stdin=subprocess.PIPE)
    out, err = process.communicate(prompt, timeout=60)
    assert process.returncode == 0, err
    text = expected(light_model, prompt, max_bytes=60, seed=5, temperature=1.2)
    assert out == text.encode() and not text.isascii()
    assert err.count(b"\n") == 1 and b"prompt 8 bytes" in err and b"bytes/s; seed 5" in err


def test_ctrl_c_and_a_closed_pipe(folder):
    """Both in the middle of a stream that would go on for hours; text comes before the end."""
    arguments = ["tiny.safetensors", "--max-bytes", "100000000", "--prompt", "x"]
    interrupted, closed = Forked(folder, *arguments), Forked(folder, *arguments)
    assert interrupted.stdout.read(20) and closed.stdout.read(20)
    os.kill(interrupted.pid, signal.SIGINT)
    interrupted.stdout.read()
    code, err = interrupted.end()
    assert code == 130 and b"Traceback" not in err and b"stopped" in err
    assert closed.end() == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
def test_a_full_disk_is_one_line(folder):
    full = os.open("/dev/full", os.O_WRONLY)
    process = Forked(folder, "tiny.safetensors", "--prompt", "x", out=full)
    os.close(full)
    assert process.end() == (1, b"generate.py: error: stdout: No space left on device\n")


def test_too_little_memory_is_one_line(call, monkeypatch):
    def exhausted(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes")

    monkeypatch.setattr("model.inference.generate.generate", exhausted)
    code, _, err = call("tiny.safetensors", "--prompt", "x", "--batch", "9")
    assert code == 2 and err.count("\n") == 1 and "--batch 9" in err


def test_help_and_bad_arguments_do_not_load_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['generate.py', *sys.argv[2:]]\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code, "", "--help"], env=ENVIRONMENT, capture_output=True, timeout=60)
    assert found.returncode == 0 and b"--thinking-steps" in found.stdout and b"default 0.8" in found.stdout
    found = subprocess.run([sys.executable, "-c", code, "", "x", "--top-k", "0"], env=ENVIRONMENT, capture_output=True)
    assert found.returncode == 2 and found.stderr.count(b"\n") == 1


def test_prompts_from_everywhere(call, folder, light_model):
    prompt = "Bir varmış\n".encode()
    (folder / "prompt.txt").write_bytes(prompt)
    text = expected(light_model, prompt, max_bytes=30, seed=1)
    common = ["tiny.safetensors", "--max-bytes", "30", "--seed", "1"]
    assert call(*common, "--prompt", prompt.decode())[:2] == (0, text)
    assert call(*common, "--prompt-file", "prompt.txt")[:2] == (0, text)
    assert call(*common, "--prompt", "-", stdin=prompt)[:2] == (0, text)
    assert call(*common, stdin=prompt)[:2] == (0, text)
    assert call(*common, "--prompt", "")[1] == call(*common, stdin=b"")[1] != text


def test_pth_equals_safetensors(call):
    common = ["--prompt", "x", "--max-bytes", "30", "--seed", "1", "--top-k", "50", "--top-p", "0.9"]
    assert call("tiny.pth", *common)[:2] == call("checkpoints/tiny.safetensors", *common)[:2]


def test_every_option_reaches_the_model(call, light_model):
    text = expected(
        light_model, b"x", max_bytes=50, seed=3, temperature=1.1, top_k=90, top_p=0.95, thinking_steps=1,
    )  # fmt: skip
    found = call("tiny.safetensors", "--prompt", "x", "--max-bytes", "50", "--seed", "3", "--temperature", "1.1",
                 "--top-k", "90", "--top-p", "0.95", "--thinking-steps", "1")  # fmt: skip
    assert found[:2] == (0, text)


def test_batches_are_printed_whole_and_in_order(call, light_model):
    texts = expected_rows(light_model, b"x", max_bytes=40, seed=2, batch=3)
    code, out, err = call("tiny.safetensors", "--prompt", "x", "--max-bytes", "40", "--seed", "2", "--batch", "3")
    assert code == 0 and out == "".join(text + "\n" for text in texts)
    assert err.splitlines()[:3] == [f"--- sample {i} of 3 ---" for i in (1, 2, 3)]


def test_any_bytes_come_out_as_replacement_characters(call):
    arguments = ["tiny.safetensors", "--prompt", "x", "--seed", "2", "--temperature", "2", "--max-bytes", "60"]
    assert "\ufffd" in call(*arguments, "--any-bytes")[1]
    assert "\ufffd" not in call(*arguments)[1]


def test_a_prompt_inside_a_character_comes_out_whole(call):
    prompt = "漢".encode()[:2]
    code, out, _ = call("tiny.safetensors", "--prompt", "-", "--max-bytes", "1", stdin=prompt)
    assert code == 0 and len(out) == 1 and out.encode()[:2] == prompt


def test_stop_escapes(call, light_model):
    assert script.stop_string(r"a\n\t\r\0\\b") == b"a\n\t\r\0\\b"
    assert script.stop_string(r"ğ\xff\x0aé") == "ğ".encode() + b"\xff\n" + "é".encode()
    assert script.stop_string(r"\\n") == rb"\n"
    assert script.stop_string(r"\u011f\u6f22") == "ğ漢".encode()
    whole = expected(light_model, b"x", max_bytes=200, seed=4)
    stop = next(c for c in whole[20:] if c.isascii() and c.isprintable() and c not in "\\-")
    escaped = f"\\x{ord(stop):02x}"
    found = call(
        "tiny.safetensors", "--prompt", "x", "--seed", "4", "--max-bytes", "200", "--stop", "~~~", "--stop", escaped
    )
    assert found[:2] == (0, whole[: whole.index(stop)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["CHECKPOINT"]),
        (["--max-bytes", "0"], ["--max-bytes", "'0'", "at least 1"]),
        (["--max-bytes", "1e3"], ["--max-bytes", "'1e3'", "integer"]),
        (["--temperature", "-1"], ["--temperature", "'-1'", "at least 0"]),
        (["--temperature", "nan"], ["--temperature", "'nan'", "finite"]),
        (["--temperature", "hot"], ["--temperature", "'hot'", "number"]),
        (["--top-k", "257"], ["--top-k", "'257'", "1 to 256"]),
        (["--top-p", "0"], ["--top-p", "'0'", "above 0"]),
        (["--top-p", "1.5"], ["--top-p", "'1.5'", "up to 1"]),
        (["--seed", "-3"], ["--seed", "'-3'", "from 0"]),
        (["--batch", "none"], ["--batch", "'none'", "integer"]),
        (["--thinking-steps", "-1"], ["--thinking-steps", "'-1'", "at least 0"]),
        (["--stop", ""], ["--stop", "''", "one byte"]),
        (["--stop", r"\q"], ["--stop", r"\q", r"\n"]),
        (["--stop", "\\"], ["--stop", "escapes"]),
        (["--threads", "0"], ["--threads", "'0'"]),
        (["--classifier", "on"], ["--classifier", "on", "lower"]),
        (["--device", "tpu"], ["--device", "tpu", "cuda"]),
        (["--prompt", "a", "--prompt-file", "b"], ["--prompt-file", "--prompt"]),
        (["--colour"], ["--colour", "--help"]),
    ],
)
def test_bad_arguments_get_one_line_and_code_2(call, arguments, words):
    code, out, err = call(*(["tiny.safetensors"] if arguments else []), *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    "name", ["missing.safetensors", "missing/tiny.safetensors", "checkpoints", "cut.safetensors", "empty.safetensors",
             "text.safetensors", "cut.pth", "list.pth"],
)  # fmt: skip
def test_bad_files_get_one_line_and_code_2(call, name):
    code, out, err = call(name, "--prompt", "x")
    assert code == 2 and out == "" and err.count("\n") == 1 and name in err, err


def test_bad_prompt_files_get_one_line_and_code_2(call):
    for name in ("missing.txt", "checkpoints"):
        code, _, err = call("tiny.safetensors", "--prompt-file", name)
        assert code == 2 and err.count("\n") == 1 and f"--prompt-file {name!r}" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_cuda_where_there_is_none_is_an_argument_error(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="2"):
        script.main(["tiny.safetensors", "--prompt", "x", "--device", "cuda"])
    assert "--device 'cuda'" in capsys.readouterr().err


def interventions(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_policies_reach_generation_and_interventions_the_log(call, folder, light_model, tmp_path):
    list_of_my_own = tmp_path / "mine.toml"
    list_of_my_own.write_text('[mine]\nword_boundaries = false\nphrases = ["a", "e", "i"]\npatterns = ["\\\\d"]')
    common = ["tiny.safetensors", "--prompt", "xyz", "--max-bytes", "80", "--seed", "3", "--temperature", "1.5"]
    free = call(*common)[1]
    log = tmp_path / "log.jsonl"
    code, out, err = call(*common, "--policy", str(list_of_my_own), "--gate-log", str(log))
    arguments = {"max_bytes": 80, "seed": 3, "temperature": 1.5}
    assert code == 0 and out == expected(light_model, b"xyz", policy=load_policy(list_of_my_own), **arguments) != free
    lines = interventions(log)
    assert lines and {line["category"] for line in lines} == {"mine"} and "text" not in lines[0]
    assert err.count("\n") == 1 and f"gate: mine {len(lines)}, logged in {log}" in err

    # Without --gate-log beside the checkpoint; with the text when asked.
    code, again, _ = call(*common, "--policy-only", str(list_of_my_own), "--log-text")
    beside = folder / "checkpoints" / "gate_log.jsonl"
    assert again == out and len(interventions(beside)) == len(lines)
    assert all(line["text"].startswith("xyz") for line in interventions(beside))
    beside.unlink()


def test_the_default_policy_holds_unless_it_is_replaced(call, tmp_path, monkeypatch):
    """A model that wants nothing but to complete a card number."""
    logits = torch.zeros(256)
    logits[ord("1")] = 90.0
    monkeypatch.setattr(ByteStream, "logits", lambda self: logits.expand(self.batch_size, -1))
    common = [
        "tiny.safetensors",
        "--prompt",
        "4111 1111 1111 111",
        "--max-bytes",
        "1",
        "--temperature",
        "0",
        "--any-bytes",
    ]
    log = tmp_path / "log.jsonl"
    assert call(*common, "--gate-log", str(log))[1] == "\0"
    (line,) = interventions(log)
    assert (line["category"], line["rule"], line["byte"], line["position"]) == ("privacy", "card-grouped", ord("1"), 0)
    assert line["mass"] > 0.999
    other = tmp_path / "other.toml"
    other.write_text('[c]\nphrases = ["x"]')
    assert call(*common, "--policy", str(other), "--gate-log", str(log))[1] == "\0"
    assert call(*common, "--policy-only", str(other))[:2] == (0, "1")


def test_a_log_that_cannot_be_written_does_not_stop_the_text(call, folder, tmp_path, monkeypatch):
    policy = tmp_path / "p.toml"
    policy.write_text('[c]\nphrases = ["a", "e"]\nword_boundaries = false')
    common = [
        "tiny.safetensors",
        "--prompt",
        "x",
        "--max-bytes",
        "60",
        "--seed",
        "3",
        "--temperature",
        "1.5",
        "--policy",
    ]
    text = call(*common, str(policy), "--gate-log", str(tmp_path / "log"))[1]
    monkeypatch.setattr("model.genesis.gate.byte_gate.os.open", refuse)
    code, out, err = call(*common, str(policy))
    assert (code, out) == (0, text) and err.count("\n") == 1 and "not logged: No space left" in err
    code, out, err = call(*common, str(policy), "--gate-log", str(tmp_path / "log"))
    assert (code, out) == (1, text) and err.count("\n") == 2 and "--gate-log" in err.splitlines()[1]


def refuse(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["policy ", "No such file"]),
        ("[c", ["TOML"]),
        ("[c]\nphrases = [1]", ["[c] phrases 1=1"]),
        ('[c]\npatterns = ["a*"]', ["[c] patterns 1", "'a*'", "empty text"]),
    ],
)
@pytest.mark.parametrize("option", ["--policy", "--policy-only"])
def test_bad_policies_get_one_line_and_code_2(call, tmp_path, option, text, words):
    path = tmp_path / "policy.toml"
    if text is not None:
        path.write_text(text)
    code, out, err = call("missing.safetensors", "--prompt", "x", option, str(path))
    assert code == 2 and out == "" and err.count("\n") == 1 and str(path) in err
    assert all(word in err for word in [*words, "accepted"]), err


def test_a_bad_place_for_the_log_gets_one_line_and_code_2(call, tmp_path):
    code, out, err = call("tiny.safetensors", "--prompt", "x", "--gate-log", str(tmp_path / "no" / "log"))
    assert code == 2 and out == "" and err.count("\n") == 1 and "--gate-log" in err and "accepted" in err


@pytest.fixture
def classified(light_model, tmp_path, capsys):
    """A checkpoint with a classifier, of train-classifier, that fires at about half of what the model writes."""
    checkpoint = save_checkpoint(light_model, tmp_path / "run.safetensors")
    rng, rows = random.Random(1), []
    for i in range(120):
        text = "".join(chr(rng.choice(range(32, 127) if i % 2 else range(160, 1000))) for _ in range(40))
        rows.append({"text": text, "label": "bad" if i % 2 else "good"})
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    learn = ["train-classifier", str(checkpoint), str(labelled), "--positive", "bad", "--device", "cpu"]
    assert genesis([*learn, "--false-positive-rate", "0.9", "--window", "2"]) == 0
    capsys.readouterr()
    return checkpoint


COMMON = ["--prompt", "ığ", "--max-bytes", "60", "--seed", "3", "--batch", "3", "--stop", "~"]
ARGUMENTS = {"max_bytes": 60, "seed": 3, "batch": 3, "stop": [b"~"]}


def test_the_classifier_beside_the_checkpoint_is_used(call, classified, light_model):
    def texts(**arguments):
        return "".join(text + "\n" for text in expected_rows(light_model, "ığ".encode(), **ARGUMENTS, **arguments))

    gate = HiddenStateGate.load(gate_path(classified), light_model)
    lowered, blocked, free = texts(classifier=gate), texts(classifier=gate, classifier_mode="block"), texts()
    assert len({lowered, blocked, free}) == 3
    log = classified.parent / "gate_log.jsonl"
    for options, text in (([], lowered), (["--classifier", "lower"], lowered), (["--classifier", "block"], blocked)):
        code, out, err = call(str(classified), *COMMON, *options)
        lines = [line for line in interventions(log) if line["category"] == "classifier"]
        assert (code, out) == (0, text) and f"gate: classifier {len(lines)}" in err and "text" not in lines[0]
        assert ("; ended by the classifier: " in err) == (text == blocked)
        log.unlink()
    code, out, err = call(str(classified), *COMMON, "--classifier", "off")
    assert (code, out) == (0, free) and "classifier" not in err and not log.exists()


def test_off_does_not_concern_the_policy(call, classified, tmp_path):
    policy = tmp_path / "p.toml"
    policy.write_text('[c]\npatterns = ["[a-m]"]')
    arguments = [str(classified), *COMMON, "--temperature", "1.5", "--classifier", "off"]
    free, kept = call(*arguments)[1], call(*arguments, "--policy", str(policy))[1]
    letters = set("abcdefghijklm")
    assert letters & set(free) and not letters & set(kept)


def test_a_classifier_of_other_weights_gets_one_line_and_code_2(call, classified, tiny_model):
    def refused(*options):
        code, out, err = call(str(classified), *COMMON, *options)
        assert code == 2 and out == "" and err.count("\n") == 1 and str(gate_path(classified)) in err
        return err

    save_checkpoint(tiny_model(thinking_steps=1), classified)
    assert "other weights than the checkpoint's" in refused() and "--classifier off" in refused("--classifier", "block")
    gate_path(classified).write_bytes(b"PK")
    assert "damaged" in refused()
    assert call(str(classified), *COMMON, "--classifier", "off")[0] == 0
    gate_path(classified).unlink()
    assert "no such file" in refused("--classifier", "block") and "no such file" in refused("--classifier", "lower")
    assert call(str(classified), *COMMON)[0] == 0
