"""The benchmark of memories: its table, that a silenced memory takes no part, what full attention sees and keeps."""

import json
import math
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
import torch

from benchmarks import recall
from model.data import load_curriculum, open_store
from model.data.recall import RecallOptions
from model.evaluation.needles import KEY_BYTES
from model.inference.stream import ByteStream
from model.layers.memory import HebbianMemory, MemoryState

CPU = torch.device("cpu")
TEXT = "Elma ağacı çiçek açtı 🌳 and the quick fox — naïve, ılık — ran %d times.\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A text in two languages; stores lie in a cache of this module's own."""
    folder = tmp_path_factory.mktemp("recall")
    (folder / "text.txt").write_text("".join(TEXT % i for i in range(600)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGIFORMER_CACHE", str(folder / "cache"))
        yield folder / "text.txt"


@pytest.fixture(scope="module")
def store(corpus):
    return open_store(load_curriculum(corpus).stages[-1].source, progress=False)


def command(*arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = recall.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def quick(*arguments):
    return recall.parse(["--quick", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def result(corpus):
    """A quick run of two variants: what it printed, and its JSON."""
    file = corpus.parent / "recall.json"
    code, out, _ = command("--quick", "--variants", "bytes,full", "--corpus", corpus, "--json", file)
    assert code == 0
    return out, json.loads(file.read_text("utf-8"))


def test_table_and_json_have_all_rows_and_columns_and_the_same_finite_numbers(result):
    out, found = result
    header, *lines = out.split("\n\n")[0].split("\n")
    for column in ("variant", "M parameters", "in use", "needle 192", "needle 256 (trained)", "needle 512", "pairs 2"):
        assert column in header
    assert header.split()[-8:] == ["8", "BPC", "training", "MB/s", "reading", "MB/s", "state", "kB"]
    assert [line.split()[0] for line in lines] == [row["variant"] for row in found["rows"]] == ["bytes", "full"]
    for line, row in zip(lines, found["rows"]):
        cells = [float(cell) for cell in line.split()[1:]]
        told = [row["parameters"] / 1e6, row["parameters_in_use"] / 1e6]
        told += [100 * cell["trained"] for cell in row["needle"]["cells"]]
        told += [100 * cell["accuracy"] for cell in row["pairs"]["cells"]]
        told += [row["bpc"], row["training_bytes_per_second"] / 1e6, row["reading_bytes_per_second"] / 1e6]
        assert all(math.isfinite(cell) for cell in cells)
        assert cells == pytest.approx([*told, row["state_bytes"] / 1000], rel=0.02, abs=0.5)
        assert [cell["length"] for cell in row["needle"]["cells"]] == [192, 256, 512]
        assert [cell["pairs"] for cell in row["pairs"]["cells"]] == [2, 8]
        assert 0 < row["bpc"] < 8 and row["skipped_steps"] == 0  # 8 is what a model that has learned nothing has
        assert row["training_bytes_per_second"] > 0 and row["training_seconds"] > 0
    assert "torch " + torch.__version__ in out and found["machine"] in out
    assert found["settings"]["steps"] == 8 and "text.txt" in found["corpus"]


def test_full_states_its_windows_and_keeps_all_keys(result):
    out, found = result
    row = found["rows"][1]
    patches = 512 // 4 + 2
    assert row["window"] == row["config"]["window"] >= 256 // 4 and row["reading_window"] >= patches
    (note,) = (line for line in out.split("\n") if line.startswith("full: "))
    assert f"of {row['window']} patches in training" in note and f"of {row['reading_window']} in reading" in note
    assert "more than 256 bytes" in note and "out of the range" in note
    # Keys and values of what has been read: the start and every whole patch, the answer's too; all else is a few KB.
    cache = 2 * 4 * 64 * (1 + (512 + KEY_BYTES) // 4)
    assert cache < row["state_bytes"] < cache + 2048


def test_only_full_attention_sees_what_lies_beyond_the_windows():
    x = torch.randint(0, 256, (1, 600), generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[0, 0] = (x[0, 0] + 128) % 256
    changed = {}
    for name in ("window", "full"):
        model = recall.make_model(recall.VARIANTS[name], quick("--seq-len", 600), CPU).eval()
        with torch.no_grad(), recall.silence(recall.VARIANTS[name], model):
            for parameter in model.parameters():  # outputs start at zero
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
            changed[name] = not torch.equal(model(x)[0, -1], model(other)[0, -1])
    assert changed == {"window": False, "full": True}


def garbage(self, x, plasticity, state=None, impl="auto"):
    """What no memory would say."""
    B, E = x.shape[0], x.shape[2] // self.n_heads
    M = torch.full((B, self.n_heads, E, E), 7.0)
    return torch.full(x.shape, 1e3).cumsum(1), MemoryState(M, M[..., 0])


@pytest.mark.parametrize("name", ["window", "blocks"])
def test_a_silenced_memory_has_no_part_in_training_and_reading(name, store, monkeypatch):
    """Trained and read with a memory that says garbage: the silenced variant is the same to the bit."""
    arguments, variant = quick("--lengths", 512), recall.VARIANTS[name]
    runs = []
    for said in (HebbianMemory.forward, garbage):
        monkeypatch.setattr(HebbianMemory, "forward", said)
        model = recall.make_model(variant, arguments, CPU)
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        recall.train(name, model, arguments, store, CPU)
        runs.append((dict(model.named_parameters()), recall.read(name, model, arguments, store, CPU)))
    (weights, told), (weights_with_garbage, told_with_garbage) = runs
    same = {key for key in weights if torch.equal(weights[key], weights_with_garbage[key])}
    still = {key for key in weights if torch.equal(weights[key], before[key])}
    memory = {key for key in weights if ".memory." in key}
    assert memory and "blocks.0.attention.qkv.weight" in weights.keys() - still
    numbers = [
        [cells["bpc"], *(cell["log2_probability"] for task in ("needle", "pairs") for cell in cells[task]["cells"])]
        for cells in (told, told_with_garbage)
    ]
    if name == "window":
        assert same == weights.keys() and still == memory
        assert numbers[0] == numbers[1]
    else:
        assert not still & {"blocks.0.memory.qkv.weight"} and same != weights.keys()
        assert numbers[0] != numbers[1]


def test_state_and_parameters_in_use_leave_a_silenced_memory_out(store):
    rows = {}
    for name in ("window", "blocks"):
        arguments = quick("--steps", 1, "--layers", 2, "--pairs", 2)
        rows[name] = recall.measure(name, arguments, store, CPU)
    model = recall.make_model(recall.VARIANTS["blocks"], arguments, CPU)
    stream = ByteStream(model, 1).feed(torch.zeros(1, 300, dtype=torch.uint8))
    written = sum(t.numel() * t.element_size() for block in stream._trunk.blocks for t in block.memory.tensors())
    assert rows["blocks"]["state_bytes"] - rows["window"]["state_bytes"] == written
    unused = sum(p.numel() for block in model.blocks for p in block.memory.parameters())
    assert rows["window"]["parameters"] - rows["window"]["parameters_in_use"] == unused
    assert rows["blocks"]["parameters"] == rows["blocks"]["parameters_in_use"] == rows["window"]["parameters"]


@pytest.mark.parametrize(
    ("name", "memory", "rule"),
    [
        ("bytes", (1, 256, 64, 4, "delta"), "hebbian"),
        ("bytes-hebbian", (1, 256, 64, 4, "hebbian"), "hebbian"),
        ("bytes-span1", (1, 256, 64, 1, "delta"), "hebbian"),
        ("bytes-2", (2, 256, 64, 4, "delta"), "hebbian"),
        ("bytes-square", (4, 64, 64, 4, "delta"), "hebbian"),
        ("bytes-text", (2, 256, 64, 4, "delta"), "hebbian"),
        ("bytes-free", (1, 256, 64, 4, "delta"), "hebbian"),
        ("blocks", None, "hebbian"),
        ("blocks-delta", None, "delta"),
        ("window", None, "hebbian"),
        ("full", None, "hebbian"),
    ],
)
def test_variants_have_the_memory_that_they_are_called_by(name, memory, rule):
    model = recall.make_model(recall.VARIANTS[name], quick(), CPU)
    found = model.head.memory
    widths = found and [x // found.heads for x in (found.queries.out_features, found.values.embedding_dim)]
    assert (found and (found.heads, *widths, found.span, found.rule)) == memory
    assert not found or found.heads - found.facts == (name == "bytes-text")
    assert [block.memory.rule for block in model.blocks] == [rule]
    assert float(model.plasticity) == 1


@pytest.mark.parametrize(("name", "price"), [("bytes", 4.0), ("bytes-free", 0.0)])
def test_tasks_get_harder_and_writing_dearer_over_the_first_steps(name, price, store, monkeypatch):
    seen, prices, mix, run = [], [], recall.mix, recall.TrainingStep.run

    def spied_mix(batch, options, *, difficulty, seed, index):
        seen.append((difficulty, index, options))
        return mix(batch, options, difficulty=difficulty, seed=seed, index=index)

    def spied_run(self, batch, weights):
        prices.append(float(self.write_price))
        return run(self, batch, weights)

    monkeypatch.setattr(recall, "mix", spied_mix)
    monkeypatch.setattr(recall.TrainingStep, "run", spied_run)
    monkeypatch.setattr(recall.Stopwatch, "seconds", lambda self: [9.0] * 5 + [1.0, 4.0, 2.0])
    arguments = quick("--share", 0.25)
    cost = recall.train(name, recall.make_model(recall.VARIANTS[name], arguments, CPU), arguments, store, CPU)
    rising = [0, 1 / 3.2, 2 / 3.2, 3 / 3.2, 1, 1, 1, 1]
    tasks = RecallOptions(0.25, answer_limit=1.0)
    assert seen == [(pytest.approx(difficulty), i, tasks) for i, difficulty in enumerate(rising)]
    assert prices == pytest.approx([price * difficulty for difficulty in rising])
    # The median of the steps after the first five, which are the eager ones and the capture where there is one.
    assert cost["training_bytes_per_second"] == 2 * 256 / 2.0
    assert cost["write_price"] == (price or None)


def test_a_corpus_that_is_no_text_of_any_language(corpus):
    """Random bytes, zeros among them, and fewer than a row."""
    file = corpus.parent / "noise.bin"
    noise = torch.randint(0, 256, (200,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    file.write_bytes(bytes(noise.tolist()))
    with pytest.warns(UserWarning, match="repeated"):
        code, out, _ = command("--quick", "--variants", "blocks", "--corpus", file, "--steps", 1, "--pairs", 2)
    assert code == 0 and "noise.bin" in out and len(out.split("\n\n")[0].split("\n")) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--variants", "bytes,attention"], "attention: accepted are bytes, "),
        (["--variants", ""], "accepted are bytes, "),
        (["--corpus", "missing.txt"], "missing.txt"),
        (["--corpus", "empty.txt"], "empty"),
        (["--json", "."], "--json"),
        (["--share", "1.5"], "share=1.5"),
        (["--share", "nan"], "share=nan"),
        (["--seq-len", "64"], "--seq-len 64"),
        (["--lengths", "1024,20"], "length=20"),
        (["--lengths", "1024,x"], "'x'"),
        (["--pairs", "1000000"], "pairs=1000000"),
        (["--d-model", "200"], "d_model=200"),
        (["--seed", "-1"], "--seed -1"),
        (["--device", "abacus"], "abacus"),
        (["--variants", "full", "--lengths", "1000000"], "variant full"),
    ],
)
def test_bad_arguments_are_one_line(arguments, named, corpus, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    (corpus.parent / "empty.txt").touch()
    code, out, err = command("--quick", "--corpus", corpus, *arguments)
    assert code == 2 and not out
    said = [line for line in err.split("\n") if line.strip() and "\r" not in line]  # bars begin with \r
    assert len(said) == 1 and said[0].startswith("recall.py: error: ") and named in said[0]
