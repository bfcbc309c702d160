"""`python -m model.genesis` as a user runs it: tables, marks, policies, a trained gate, one-line errors."""

import json
import os
import pty
import random
import select as poll
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from model import save_checkpoint
from model.genesis.__main__ import main
from model.genesis.gate.classifier import HiddenStateGate, gate_path
from model.genesis.gate.interventions import Marks, read_log
from model.genesis.gate.policy import load_policy
from tests.conftest import make_random_model
from tests.genesis.gate.test_interventions import entry, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def log(tmp_path, monkeypatch):
    """6 phone numbers, 3 e-mail addresses with text, one line of another program."""
    monkeypatch.chdir(tmp_path)
    phones = [
        entry("privacy/phone-us", run=f"r{i % 2}", time=f"2026-01-0{i + 1}T00:00:00Z", mass=0.1 * i) for i in range(6)
    ]
    mails = [entry("privacy/email", byte=64, text=text) for text in ("ığ@", "\x1b[2J@", "🔪\n@")]
    return write(tmp_path / "gate.jsonl", [*phones, b"# something else", *mails])


def run(capsys, *arguments):
    code = main(["review", "gate.jsonl", *arguments])
    out, err = capsys.readouterr()
    assert code == 0 and not err
    return out.splitlines()


def refused(capsys, *arguments):
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert code == 2 and err.startswith("genesis: error: ") and err.count("\n") == 1
    return out + err


def test_table(log, capsys):
    Marks(log).add(list(read_log(log))[:2], "false")
    header, mail, phone, total, damaged = run(capsys)
    assert header.split("  ")[0] == "category"
    day = "2026-01-0{} {}"
    seen = f"{day.format(2, '03:04:05')} {day.format(2, '03:04:05')}"
    assert " ".join(mail.split()) == f"privacy email 3 0.250 1 {seen} 0 0 3"
    seen = f"{day.format(1, '00:00:00')} {day.format(6, '00:00:00')}"
    assert " ".join(phone.split()) == f"privacy phone-us 6 0.250 2 {seen} 0 2 4"
    assert total.split() == ["all", "9", "0", "2", "7"]
    assert damaged == "1 line of gate.jsonl is no intervention and was left out: line 7: not JSON"
    write(log, [])
    assert run(capsys)[0] == "gate.jsonl: no interventions"


def test_list(log, capsys):
    Marks(log).add([next(read_log(log))], "true")
    header, *lines = run(capsys, "--list", "--category", "privacy", "--limit", "4")
    assert header.split()[0] == "number" and [line.split()[0] for line in lines[:4]] == ["6", "8", "9", "10"]
    assert lines[1].split()[3:] == ["a1", "0", "7", "privacy/email", "0x40", "@", "0.250", "-", "ığ@"]
    assert lines[2].endswith(r"\x1b[2J@") and lines[3].endswith(r"🔪\n@")  # nothing steers the terminal
    assert lines[4] == "the latest 4 of 9: --limit shows more"
    assert run(capsys, "--list")[1].split()[-2:] == ["true", "-"]
    assert run(capsys, "--list", "--category", "other")[0] == "gate.jsonl: no interventions of category other"


def test_marking(log, capsys):
    before = log.read_bytes()
    out = run(capsys, "--mark", "1-3,5=false", "--mark-rule", "email=true", "--mark", "2=true")
    assert out[:3] == ["marked false: 4", "marked true: 1", "marked true: 3"]
    marks = Marks(log)
    verdicts = [marks.of(each) for each in read_log(log) if hasattr(each, "rule")]
    assert verdicts == ["false", "true", "false", None, "false", None, "true", "true", "true"]
    assert log.read_bytes() == before


def test_a_bad_number_marks_nothing(log, capsys):
    said = refused(capsys, "review", "gate.jsonl", "--mark", "1=false", "--mark", "2,99=true")
    assert "--mark 2,99: 99 names no intervention of gate.jsonl; accepted are numbers up to 10" in said
    refused(capsys, "review", "gate.jsonl", "--mark", "1=false", "--mark-rule", "fax=true")
    assert not Marks(log).path.exists()
    for wrong in ("1", "1=perhaps", "=true"):
        with pytest.raises(SystemExit) as end:
            main(["review", "gate.jsonl", "--mark", wrong])
        assert end.value.code == 2 and "accepted is what to mark" in capsys.readouterr().err


def active(path):
    return {rule.id for rule in load_policy(path).rules}


def test_apply_disables_what_was_marked_false(log, capsys):
    run(capsys, "--mark", "1-2=false", "--mark", "3=true", "--mark-rule", "email=true")
    out = run(capsys, "--apply", "new.toml", "--dry-run")
    assert "privacy/phone-us: 1 true, 2 false: disabled" in out and "privacy/email: 3 true, 0 false: kept" in out
    assert tomllib.loads("\n".join(out[out.index('extends = "default"') :])) == {
        "extends": "default",
        "disabled": ["privacy/phone-us"],
    }
    assert not Path("new.toml").exists()
    assert run(capsys, "--apply", "new.toml")[-1] == "policy: new.toml"
    assert "# 2 of 3 marks are false" in Path("new.toml").read_text()
    assert active("new.toml") == {rule.id for rule in load_policy().rules} - {"privacy/phone-us"}

    assert "accepted is a new one" in refused(capsys, "review", "gate.jsonl", "--apply", "new.toml")
    for strict in (("--false-share", "0.7"), ("--min-marks", "4")):
        assert "is not written" in run(capsys, "--apply", "other.toml", *strict)[-1]
    assert not Path("other.toml").exists()


def test_apply_builds_upon_a_policy_and_leaves_it_alone(log, capsys):
    run(capsys, "--mark", "1-3=false")
    Path("sub").mkdir()
    source = Path('sub/ana "1".toml')
    text = 'disabled = ["privacy/iban"]\n[iftira]\nphrases = ["şüpheli"]\n'
    source.write_text(text, "utf-8")
    for out in ("new.toml", "sub/deeper/new.toml"):  # beside or above it by a relative path, else by a whole one
        run(capsys, "--apply", out, "--policy", str(source))
        assert active(out) == active(source) - {"privacy/phone-us"} != active(source)
    assert source.read_text("utf-8") == text

    run(capsys, "--mark-rule", "email=false")
    run(capsys, "--apply", "newer.toml", "--policy", "new.toml")
    assert active("newer.toml") == active("new.toml") - {"privacy/email"}
    assert "policy none.toml: " in refused(capsys, "review", "gate.jsonl", "--apply", "x.toml", "--policy", "none.toml")


def test_apply_leaves_rules_of_no_policy_alone(log, capsys):
    write(log, [entry("classifier/hidden-state")] * 3 + [entry("privacy/ssn")] * 3)
    run(capsys, "--mark-rule", "hidden-state=false")
    assert "is not written" in run(capsys, "--apply", "new.toml")[-1]
    run(capsys, "--mark-rule", "ssn=false")
    assert "classifier/hidden-state: 0 true, 3 false: left alone, for the policy has no such rule" in run(
        capsys, "--apply", "new.toml"
    )
    assert tomllib.loads(Path("new.toml").read_text())["disabled"] == ["privacy/ssn"]


def test_unreadable_logs(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "none.jsonl"):
        assert "accepted is a readable file" in refused(capsys, "review", str(path))


def test_interactive_needs_a_terminal(log, capsys):
    assert "accepted is a terminal" in refused(capsys, "review", "gate.jsonl", "--interactive")


def test_interactive(log):
    """All keys are pressed before it asks for the first; x is none, and passed over."""
    Marks(log).add([next(read_log(log))], "true")
    ours, theirs = pty.openpty()
    os.write(ours, b"tfxsq")
    command = [sys.executable, "-m", "model.genesis", "review", str(log), "--interactive"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while poll.select([ours], [], [], 30)[0]:
        try:
            said += os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
    else:
        process.kill()
    assert process.wait(30) == 0 and said.count(b"q quit: ") == 4
    marks = Marks(log)
    verdicts = [marks.of(each) for each in read_log(log) if hasattr(each, "rule")]
    assert verdicts == ["true", "true", "false", *[None] * 6]


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    """A checkpoint, and labelled.jsonl of two distributions of bytes with a repeated, a doubtful and a short text."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(make_random_model(), tmp_path / "checkpoints" / "run.safetensors")
    rng = random.Random(3)
    rows = []
    for i in range(160):
        letters = "qwxz çğ" if i % 4 == 0 else "aeıo 🌱"
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(30, 90)))
        rows.append({"body": text, "kind": "bad" if i % 4 == 0 else "good"})
    rows += [rows[0], rows[1], rows[2] | {"kind": "bad"}, {"body": "ab", "kind": "good"}]
    Path("labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return ["train-classifier", "run.safetensors", "labelled.jsonl", "--text-column", "body", "--label-column", "kind"]


def test_train_classifier(labelled, capsys):
    assert main([*labelled, "--positive", "bad", "--false-positive-rate", "0.1", "--window", "4"]) == 0
    out = capsys.readouterr().out.splitlines()
    reasons = ["left out: 3 repeated", "left out: 1 with both kinds of labels", "left out: 1 shorter than a patch"]
    assert out[:3] == reasons
    assert out[3] == "trained on 127 texts, held out 8 bad and 24 others"
    figures = dict(zip(*[iter(" ".join(out[4:6]).split())] * 2))
    assert float(figures["ROC-AUC"]) > 0.9 and float(figures["recall"]) > 0.5
    path = gate_path("checkpoints/run.safetensors")
    assert out[-1] == f"gate: {path}" and path.exists()
    assert HiddenStateGate.load(path, make_random_model()).window == 4
    assert main([*labelled, "--positive", "bad"]) == 0  # replaces its own file
    assert "a rate of 0.01 cannot be seen in 24 texts" in capsys.readouterr().out


def test_train_classifier_refuses(labelled, capsys):
    before = Path("checkpoints/run.safetensors").read_bytes()
    told = refused(capsys, *labelled, "--positive", "bad", "--out", "checkpoints/run.safetensors")
    assert "--out checkpoints/run.safetensors: the file is there" in told
    assert Path("checkpoints/run.safetensors").read_bytes() == before
    assert "accepted are 'worst' (--positive)" in refused(capsys, *labelled, "--positive", "worst")
    assert "--device tpu" in refused(capsys, *labelled, "--positive", "bad", "--device", "tpu")
    assert "no such file" in refused(capsys, labelled[0], "none.safetensors", "labelled.jsonl")
    for option, value in (("--epochs", "0"), ("--validation-share", "0"), ("--false-positive-rate", "2")):
        with pytest.raises(SystemExit) as end:
            main([*labelled, option, value])
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
