"""`python -m model.sgm`: what it prints, what it keeps, and bad arguments: one line, status 2, nothing left behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.inference.generate import generate
from model.sgm import __main__ as command
from model.sgm import runs
from model.sgm.lifelong import LifelongLearner
from model.sgm.memory import KINDS, ExternalMemory
from model.sgm.router import MemoryRouter
from model.sgm.storage import WeightStore
from model.sgm.tasks import micro_tasks
from model.training.checkpoint import load_checkpoint, save_checkpoint
from tests.conftest import make_random_model

ROOT = Path(__file__).parents[2]


def small(head_dim: int = 64):
    return make_random_model(n_layers=1, thinking_steps=1, head_dim=head_dim)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to work in, and runs of two tasks instead of 25 and three instead of 100."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    changes = {"QUICK": 2, "FULL": 3, "HEAD": {2: 64, 3: 72}, "demonstration_model": small, "REPEATS": 2}
    for name, value in changes.items():
        monkeypatch.setattr(runs, name, value)
    return tmp_path / "here"


@pytest.fixture
def call(capsys):
    """call(*argv) → (status, lines printed); what is said beside is in `call.said`."""

    def run(*argv: str) -> tuple[int, list[str]]:
        try:
            status = command.main(list(argv))
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        run.said = printed.err.splitlines()
        return status, printed.out.splitlines()

    return run


# ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tasks_prints_what_the_run_gave_and_goes_on(here, call):
    line = ("tasks", "--quick", "--evaluations", "16", "--out", "runs/şgm")
    status, printed = call(*line)
    assert status == 0
    assert [said.split(":")[0] for said in call.said] == ["1/2 style", "2/2 fact"]
    header, row = printed[0], printed[1]
    assert header.split()[:3] == ["strategy", "task", "1"]
    assert row.split()[0] == "both"
    for after, said in zip(("0 tasks", "1 task", "2 tasks"), printed[2:5], strict=True):
        assert re.fullmatch(rf"a forward pass after {after}: [\d.]+ ms", said)
    assert printed[5] == "locks that changed: none"
    with WeightStore.open(here / "runs" / "şgm" / "weights") as store:
        values = store.values
    assert call(*line)[0] == 0  # there is nothing more to learn
    assert call.said == []
    with WeightStore.open(here / "runs" / "şgm" / "weights") as store:
        assert torch.equal(store.values, values)
    assert call("tasks", "--evaluations", "16", "--out", "runs/şgm")[0] == 0
    assert [said.split(":")[0] for said in call.said] == ["3/3 preference"]
    with LifelongLearner.open(here / "runs" / "şgm") as lifelong:
        assert [record.task for record in lifelong.records] == micro_tasks(3)


def test_tasks_takes_its_options(here, call):
    save_checkpoint(small(48), here / "own.safetensors")
    line = ("tasks", "--quick", "--evaluations", "8", "--strategy", "locks", "--out", "a", "--json")
    line += ("--dtype", "float16", "--seed", "7")
    status, printed = call(*line, "--checkpoint", "own.safetensors", "--learns", "head.output.weight,head.output.bias")
    assert status == 0
    found = json.loads("\n".join(printed))
    assert found["tasks"] == 2
    assert found["full"] == 0
    assert found["changed"] == []
    with LifelongLearner.open(here / "a") as lifelong:
        options = lifelong.options
        assert lifelong.model.config.head_dim == 48
        assert options.learns == ("head.output.weight", "head.output.bias")
        assert (options.directions, options.locks, options.dtype, options.seed) == (False, True, "float16", 7)
        assert lifelong.learner.evaluations == found["evaluations"]
    assert call(*line, "--learns", "head.output.weight")[0] == 2
    assert "accepted are its own options" in call.said[0]
    assert call(*line, "--checkpoint", "own.safetensors")[0] == 2
    assert call.said == ["sgm: error: folder='a': holds a model already; accepted is a new one, or no other model"]
    line = ("tasks", "--quick", "--evaluations", "8", "--strategy", "nothing", "--out", "m")
    assert call(*line, "--modules", "attention,head")[0] == 0
    with LifelongLearner.open(here / "m") as lifelong:
        assert set(lifelong.options.learns) == set(runs.parameters_of(small(), ("attention", "head")))


def test_without_a_folder_nothing_is_kept(here, call):
    assert call("tasks", "--quick", "--evaluations", "8")[0] == 0
    assert list(here.iterdir()) == []


def test_stress_prints_a_row_for_each_strategy(monkeypatch, call):
    asked = []
    original = runs.run_tasks

    def quick(count, **settings):
        asked.append(count)
        return original(1, evaluations=8, **settings)

    monkeypatch.setattr(runs, "run_tasks", quick)
    status, printed = call("stress", "--fast")
    assert status == 0
    assert asked == [5] * 6
    assert len(call.said) == 6
    rows = [re.split(r"  +", row.strip()) for row in printed[:-1]]
    assert [row[0] for row in rows[1:]] == [
        "nothing", "locks", "directions", "both", "both, single weights", "both, float16",
    ]  # fmt: skip
    assert rows[0][-3:] == ["MB", "ms before", "ms after"]
    assert all(float(number) > 0 for row in rows[1:] for number in row[-3:])
    assert printed[-1].startswith("ms before, ms after: a forward pass")


def test_improve_prints_every_iteration_and_goes_on(here, call):
    line = ("improve", "--iterations", "2", "--evaluations", "16", "--out", "b")
    status, printed = call(*line)
    assert status == 0
    number = r"\d+\.\d{3}"
    for i, said in enumerate(printed, start=1):
        end = r"(rolled back|\d+ weights locked)"
        assert re.fullmatch(rf"{i} \w+: {number} -> {number}, total {number}, best {number}, {end}", said), said
    assert [said.split()[0] for said in printed] == ["1", "2"]
    assert [said.split()[0] for said in call(*line)[1]] == ["3", "4"]
    with LifelongLearner.open(here / "b") as lifelong:
        assert lifelong.store.meta["improve"]["iteration"] == 4
    # A folder of the one is none of the other.
    assert call("tasks", "--quick", "--out", "b")[0] == 2
    assert "folder='b'" in call.said[0]


def test_infer_writes_what_the_folders_model_writes(here, capsysbinary):
    assert command.main(["tasks", "--quick", "--evaluations", "64", "--out", "a"]) == 0
    with LifelongLearner.open(here / "a") as lifelong:
        # It reads beside a process that learns.
        for text in ("As a pirate: ", "Ağaç 🙂", ""):
            expected = b"".join(p.data for p in generate(lifelong.model, text.encode(), max_bytes=9, temperature=0.0))
            capsysbinary.readouterr()
            assert command.main(["infer", text, "--out", "a", "--max-bytes", "9"]) == 0
            assert capsysbinary.readouterr().out == expected + b"\n"


def test_a_model_goes_out_to_generate_and_comes_back_trained(here, call):
    line = ("tasks", "--quick", "--evaluations", "64", "--out", "a")
    assert call(*line)[0] == 0
    status, printed = call("export-model", "b/learned.safetensors", "--out", "a")
    assert (status, printed) == (0, ["b/learned.safetensors: the model of a after 2 tasks"])
    with LifelongLearner.open(here / "a") as lifelong:
        expected = b"".join(p.data for p in generate(lifelong.model, b"As a pirate: ", max_bytes=9, temperature=0.0))
    written = generate(load_checkpoint("b/learned.safetensors"), b"As a pirate: ", max_bytes=9, temperature=0.0)
    assert b"".join(piece.data for piece in written) == expected
    model = load_checkpoint("b/learned.safetensors")
    with torch.no_grad():
        model.head.initial.bias += 0.1
    save_checkpoint(model, "b/trained.safetensors")
    status, printed = call("import-model", "b/trained.safetensors", "--out", "a")
    assert status == 0
    assert [said.rpartition(": ")[0] for said in printed] == [task.name for task in micro_tasks(2)]
    with LifelongLearner.open(here / "a") as lifelong:
        assert torch.equal(lifelong.model.head.initial.bias, model.head.initial.bias)
    with torch.no_grad():
        model.encoder.embedding.weight += 0.1
    save_checkpoint(model, "b/trained.safetensors")
    assert call("import-model", "b/trained.safetensors", "--out", "a") == (2, [])
    assert "locked weights would change, the first is encoder.embedding.weight[0, 0]" in call.said[0]
    assert call(*line)[0] == 0  # there is nothing more to learn


def test_recover_puts_a_damaged_folder_back(here, call):
    line = ("tasks", "--quick", "--evaluations", "33", "--out", "a")
    assert call(*line)[0] == 0
    assert call("recover", "--out", "a") == (0, ["a: nothing is damaged"])
    with WeightStore.open(here / "a" / "weights") as store:
        values = store.values
        assert call("recover", "--out", "a") == (2, [])
        assert "open for writing" in call.said[0]
    for slot in (0, 1):
        (here / "a" / "weights" / f"weights.{slot}.bin").write_bytes(b"")
    assert call(*line)[0] == 2
    status, printed = call("recover", "--out", "a")
    assert status == 0
    assert printed[-1] == "a: put back to its snapshot 'kept', 2 tasks"
    with WeightStore.open(here / "a" / "weights") as store:
        assert torch.equal(store.values, values)
    assert call(*line)[0] == 0
    # Of the improvement loop it is the best total.
    assert call("improve", "--iterations", "2", "--evaluations", "64", "--out", "b")[0] == 0
    (here / "b" / "weights" / "head.bin").unlink()
    assert call("recover", "--out", "b")[0] == 0
    assert call("improve", "--iterations", "1", "--evaluations", "16", "--out", "b")[0] == 0


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def router(monkeypatch):
    """One that has not been trained, which would take seconds; where it would be trained, it is made."""
    torch.manual_seed(0)
    router = MemoryRouter().eval()
    with torch.no_grad():
        router.match.weight.normal_()
    made = []
    monkeypatch.setattr("model.sgm.router.train_router", lambda: made.append(1) or router)
    router.made = made
    return router


def test_remember_retrieve_forget_list(here, call, router):
    assert call("remember", "My sister lives in İzmir 🌊") == (0, ["#1 fact (1.00): My sister lives in İzmir 🌊"])
    assert call("remember", "Prune the roses in March", "--kind", "skill") == (
        0, ["#2 skill (1.00): Prune the roses in March"],
    )  # fmt: skip
    assert call("remember", "My sister lives in İzmir 🌊")[1] == ["#1 fact (1.00): My sister lives in İzmir 🌊"]
    assert call("remember", "My brother lives in Oslo")[0] == 0
    assert len(call("list")[1]) == 3
    assert call("list", "--kind", "skill")[1] == ["#2 skill (1.00): Prune the roses in March"]
    assert call("list", "--kind", "episode") == (0, [])

    question = "Where does my sister live?"
    with ExternalMemory("memory.sqlite") as memory:
        matches = memory.retrieve(question, touch=False)
    assert matches[0].entry.id == 1
    expected = [
        f"{trust:.2f}  {command._line(match.entry)}"
        for match, trust in zip(matches, router.trust(question, matches), strict=True)
    ]
    assert call("retrieve", question) == (0, expected)
    assert call("retrieve", question)[0] == 0
    assert router.made == [1]  # kept beside the memory
    assert call("retrieve", "quantum")[1] == []

    assert call("forget", "2")[1] == ["#2 skill (1.00): Prune the roses in March", "1 forgotten"]
    assert call("forget", "2") == (0, ["0 forgotten"])
    assert call("forget", "Lives MY") == (0, [
        "#1 fact (1.00): My sister lives in İzmir 🌊", "#3 fact (1.00): My brother lives in Oslo",
        "0 forgotten: 2 have these words; `forget NUMBER` forgets one",
    ])  # fmt: skip
    assert call("forget", "sis") == call("forget", "you") == (0, ["0 forgotten"])
    assert call("forget", "my sister")[1][-1] == call("forget", "#3")[1][-1] == "1 forgotten"
    assert call("list") == (0, [])


def test_list_shows_all_and_no_control_characters(call, here):
    with ExternalMemory("memory.sqlite", daily_budget=None) as memory:
        memory.remember_all([f"number {i}" for i in range(60)])
        memory.remember("a\x1b[31m\nb")
    status, printed = call("list")
    assert (status, len(printed)) == (0, 61)
    assert printed[0] == "#61 fact (1.00): a\\x1b[31m b"


def test_an_export_replaces_neither_the_memory_nor_a_folder(here, call):
    assert call("remember", "kept", "--memory", "m.db")[0] == 0
    (here / "folder").mkdir()
    os.mkfifo("pipe")
    for file in ("m.db", "./m.db", "m.db-wal", "m.db-shm", "m.db.router.safetensors", "folder", "pipe", ""):
        assert call("export", file, "--memory", "m.db") == (2, [])
        assert len(call.said) == 1
        assert f"path={file!r}: " in call.said[0] and "accepted is " in call.said[0]
    assert call("list", "--memory", "m.db")[1] == ["#1 fact (1.00): kept"]
    assert {path.name for path in here.iterdir()} == {"m.db", "folder", "pipe"}


def test_export_and_import(here, call):
    for text in ("Ayşe'nin kedisi 🐈 siyah", "x = 1\ny = 2"):
        assert call("remember", text, "--memory", "a/b.sqlite")[0] == 0
    assert call("export", "out.json", "--memory", "a/b.sqlite") == (0, ["2 written to out.json"])
    assert call("import", "out.json", "--memory", "c.sqlite") == (0, ["2 read from out.json"])
    assert call("import", "out.json", "--memory", "c.sqlite") == (0, ["0 read from out.json"])
    assert call("list", "--memory", "c.sqlite") == call("list", "--memory", "a/b.sqlite")


def test_the_daily_budget_is_one_line(here, call):
    with ExternalMemory("memory.sqlite") as memory:
        for i in range(memory.writes_left()):
            memory.remember(f"number {i}")
    assert call("remember", "one too many") == (2, [])
    assert len(call.said) == 1
    assert "daily_budget=100" in call.said[0]
    assert call("remember", "number 7")[0] == 0  # it is known


# ── bad arguments ────────────────────────────────────────────────────────────────────────────────────────────────────

BAD = {
    "": "the following arguments are required: tasks | stress",
    "bogus": "invalid choice: 'bogus'",
    "tasks --strategy x": "--strategy x: accepted are nothing, locks, directions, both",
    "tasks --dtype float8": "dtype='float8': accepted is float32 or float16",
    "tasks --learns head.nothing.weight": "'head.nothing.weight': accepted are",
    "tasks --learns nothing --strategy locks --out a": "'nothing': accepted are",
    "tasks --learns= --out a": "'': accepted are",
    "tasks --modules head": "modules='head': accepted without directions, by strategy nothing or locks",
    "tasks --modules tail --strategy locks --out a": "modules='tail': accepted are embedding, attention",
    "tasks --modules head --learns x": "not allowed with argument",
    "tasks --evaluations 0": "'0': accepted is an integer ≥ 1",
    "tasks --evaluations many": "'many': accepted is an integer ≥ 1",
    "tasks --checkpoint missing --out a": "checkpoint missing: no such file",
    "tasks --checkpoint file.txt --out a": "checkpoint file.txt: damaged or not a checkpoint",
    "tasks --seed -1 --out a": "seed=-1: accepted is an integer from 0",
    "tasks --seed 99999999999999999999 --out a": "seed=99999999999999999999: accepted",
    "tasks --seed x": "argument --seed: invalid int value: 'x'",
    "tasks --out taken": "path='taken': accepted is a new or empty folder",
    "tasks --out file.txt": "path='file.txt': accepted is a new or empty folder",
    "tasks --qui": "unrecognized arguments: --qui",
    "stress --slow": "unrecognized arguments: --slow",
    "improve --iterations 0": "'0': accepted is an integer ≥ 1",
    "improve --iterations 1 --out taken": "path='taken': accepted is a new or empty folder",
    "improve --checkpoint missing": "checkpoint missing: no such file",
    "improve --iterations 1 --out file.txt": "path='file.txt': accepted is a new or empty folder",
    "export-model": "required: file",
    "export-model a.safetensors --out missing": "path='missing': accepted is a folder",
    "import-model missing --out taken": "path='taken': accepted is a folder",
    "recover": "path='runs/sgm': accepted is a folder",
    "recover --out taken": "path='taken': accepted is a folder",
    "infer": "required: text",
    "infer x --out missing": "path='missing': accepted is a folder that was made by `create`",
    "infer x --out taken": "path='taken': accepted is a folder",
    "infer x": "path='runs/sgm': accepted is a folder",
    "infer x --max-bytes 0": "'0': accepted is an integer ≥ 1",
    "remember": "required: text",
    "remember x --kind dream": f"kind='dream': accepted are {', '.join(KINDS)}",
    "remember ": "text='': accepted is a text of 1 to 10000 characters",
    "remember x --memory taken": "'taken'",
    "remember x --memory file.txt": "memory file.txt: ",
    "remember x --memory :memory:": "--memory :memory:: keeps nothing; accepted is a file",
    "import file.txt --memory :memory:": "--memory :memory:: keeps nothing; accepted is a file",
    "list --memory :memory:": "--memory :memory:: there is none",
    f"list --memory {'x' * 300}": "xxx: there is none",
    f"remember x --memory {'x' * 300}": "unable to open database file",
    "retrieve x": "--memory memory.sqlite: there is none; `remember` makes it",
    "forget x": "--memory memory.sqlite: there is none",
    "list": "--memory memory.sqlite: there is none",
    "export a.json": "--memory memory.sqlite: there is none",
    "import missing.json": "import missing.json: No such file or directory",
    "import file.txt": "import file.txt: not JSON",
    "import taken": "import taken: ",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_arguments_are_one_line_and_leave_nothing(here, call, line):
    (here / "file.txt").write_text("not a database, not a checkpoint, not JSON 🙂")
    (here / "taken").mkdir()
    (here / "taken" / "mine").write_text("x")
    status, printed = call(*(line.split(" ") if line else []))
    assert (status, printed) == (2, [])
    assert len(call.said) == 1
    assert BAD[line] in call.said[0]
    assert "Traceback" not in call.said[0]
    assert {str(path.relative_to(here)) for path in here.rglob("*")} == {"file.txt", "taken", "taken/mine"}
    assert (here / "file.txt").read_text() == "not a database, not a checkpoint, not JSON 🙂"


def test_text_that_is_not_unicode_is_refused(here, call):
    assert call("remember", "a\udcff")[0] == 2
    assert len(call.said) == 1
    assert list(here.iterdir()) == []


def test_an_import_is_all_or_nothing(here, call):
    assert call("remember", "kept")[0] == 0
    assert call("export", "a.json")[0] == 0
    data = json.loads((here / "a.json").read_text())
    data["entries"] = [data["entries"][0] | {"text": "new"}, data["entries"][0] | {"confidence": 2}]
    (here / "a.json").write_text(json.dumps(data))
    for memory in ("memory.sqlite", "other.sqlite"):
        assert call("import", "a.json", "--memory", memory)[0] == 2
        assert "entry 2: confidence=2" in call.said[0]
    assert call("list")[1] == ["#1 fact (1.00): kept"]
    assert not (here / "other.sqlite").exists()


def test_every_action_has_help_and_an_example(call):
    for action in command._ACTIONS:
        status, printed = call(action, "--help")
        assert status == 0
        assert printed[0].startswith(f"usage: python -m model.sgm {action}")
    status, printed = call("--help")
    examples = {line.split()[3] for line in printed if line.startswith("python -m model.sgm")}
    learning = {"tasks", "stress", "improve", "infer", "export-model", "import-model", "recover"}
    assert learning | {"remember", "retrieve", "forget", "list"} <= examples


def test_as_a_process_of_its_own(here):
    done = subprocess.run(
        [sys.executable, "-m", "model.sgm", "remember", "Köpeğim 🐕 Karabaş", "--memory", "m.sqlite"],
        cwd=here, env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}, capture_output=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == "#1 fact (1.00): Köpeğim 🐕 Karabaş\n"
    with ExternalMemory("m.sqlite") as memory:
        assert [entry.text for entry in memory.list()] == ["Köpeğim 🐕 Karabaş"]
