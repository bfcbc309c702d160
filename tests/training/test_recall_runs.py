"""Recall tasks in training: weights reach the loss, memory takes no tasks, and a run with them resumes exactly. What
writing and thinking cost."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from model.data.recall import TOLD, RecallOptions
from model.training.optimizer import MuonAdamW
from model.training.options import TrainingOptions
from model.training.step import TrainingStep
from tests.conftest import make_random_model
from tests.training import test_train_script as runs
from tests.training.test_genesis_step import built, noise, rehearsing, rows_drawn
from tests.training.test_train_script import RUN, environment, identical, metrics, script  # noqa: F401 (fixtures)

TOML = """
name = "tasks"
[[stages]]
name = "words"
source = "words.txt"
share = 0.4
plasticity = 0.5
[[stages]]
name = "long"
source = "words.txt"
share = 0.6
plasticity = 1.0
seq_len = 256
recall = 0.5
"""
WITH_MEMORY = [*RUN, "--set", "recall_heads=2", "--set", "recall_dim=8", "--set", "recall_key_dim=16"]
WITH_MEMORY += ["--eval-every", "7"]


@pytest.fixture(scope="module")
def curriculum(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "words.txt").write_text("elma, ağaç 🌳 and pear: a third. " * 600, encoding="utf-8")
    (folder / "tasks.toml").write_text(TOML, encoding="utf-8")
    return folder / "tasks.toml"


@pytest.mark.parametrize("genesis", ["off", "on", "all"])
def test_a_run_with_tasks_resumes_to_the_bit(curriculum, script, tmp_path, genesis, capsys):  # noqa: F811
    arguments = [*WITH_MEMORY, "--curriculum", curriculum, "--steps", 20, "--genesis", genesis]
    assert script(*arguments, "--sample-bytes", 5, "--out", tmp_path / "whole", plot=genesis == "on") == 0
    assert script(*arguments, "--out", tmp_path / "parts", stop_at=13) == 0
    if genesis == "off":  # when its price meant something else, it could not go on as it began
        with pytest.MonkeyPatch.context() as patch:
            check = runs.Trainer._check_same_run
            patch.setattr(runs.Trainer, "_check_same_run", lambda self, path, saved: check(self, path, older(saved)))
            assert script("--resume", "--out", tmp_path / "parts", "--quiet", "--sample-bytes", 0) == 2
        assert "write_price was times the share of tasks when this run began" in capsys.readouterr().err
    assert script("--resume", "--out", tmp_path / "parts", "--quiet", "--sample-bytes", 0) == 0
    assert identical(tmp_path / "whole", tmp_path / "parts")
    last = [(tmp_path / run / "log_curriculum.jsonl").read_text("utf-8").splitlines() for run in ("whole", "parts")]
    # The last reading is of steps before and after the stop.
    last = [[row for row in map(json.loads, lines) if row["event"] == "train"][-1] for lines in last]
    for name in ("gradient_norm", "largest_gradient_norm"):
        assert last[0][name] == last[1][name] > 0
    assert last[0]["gradient_norm"] < last[0]["largest_gradient_norm"]
    stages = metrics(tmp_path / "whole")["stages"]
    assert [stage["recall"]["share"] for stage in stages] == [0, 0.5]


def older(saved: dict) -> dict:
    """Metrics as they were before an answer's limit could be chosen."""
    for stage in (saved := copy.deepcopy(saved))["stages"]:
        del stage["recall"]["answer_limit"]
    return saved


def test_a_share_on_the_command_line_is_that_of_every_stage(curriculum, script, tmp_path, capsys):  # noqa: F811
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        step = runs.Trainer._difficulty
        patch.setattr(runs.Trainer, "_difficulty", lambda self: seen.append((self.step, step(self))) or seen[-1][1])
        arguments = [*RUN, "--curriculum", curriculum, "--steps", 20, "--write-price", 0, "--eval-every", 20]
        assert script(*arguments, "--recall", 0.25, "--out", tmp_path / "all") == 0
        assert [stage["recall"]["share"] for stage in metrics(tmp_path / "all")["stages"]] == [0.25, 0.25]
        assert seen == [(i, min(1.0, i / 8)) for i in range(20)]
        seen.clear()
        assert script(*arguments, "--out", tmp_path / "one") == 0
        assert [step for step, _ in seen] == list(range(8, 20))
        assert [difficulty for _, difficulty in seen] == pytest.approx([min(1.0, i / 4.8) for i in range(12)])
        seen.clear()
        assert script(*arguments, "--recall", 0, "--out", tmp_path / "none") == 0
        assert not seen
    assert not identical(tmp_path / "one", tmp_path / "none")
    assert script(*arguments, "--recall", 1.5, "--out", tmp_path / "bad") == 2
    assert "recall=1.5: accepted is a number from 0 to 1" in capsys.readouterr().err


def weights_of(batch: torch.Tensor) -> torch.Tensor:
    """Of a batch whose second row is an aside with an answer, and part of whose third is told and asked."""
    weights = torch.ones(batch.shape)
    weights[1], weights[1, 10:14], weights[2, 40:50], weights[2, 20:40] = 0, 8, 8, TOLD
    return weights


@pytest.mark.parametrize("amplifier", ["off", "surprise", "both"])
def test_the_loss_with_replay_counts_as_the_weights_say(amplifier):
    (batch,) = noise(1)
    weights = weights_of(batch)
    anchored = {"anchors": amplifier == "both"}
    step, twin = rehearsing(make_random_model(**anchored), amplifier=amplifier), make_random_model(**anchored)
    twin.load_state_dict(step.model.state_dict())
    loss, _ = step.genesis.losses(batch, weights)
    each = F.cross_entropy(twin(batch).transpose(1, 2), batch.long(), reduction="none")
    assert loss.item() == pytest.approx(each[weights == 1].mean().item(), rel=1e-4)
    main = step.genesis._main_loss(batch, each, weights, None)
    if amplifier != "surprise":
        assert main.item() == pytest.approx(((weights * each).sum() / weights.sum()).item(), rel=1e-5)
    else:  # no more than text can be a surprise
        assert not (step.genesis._surprising & (weights != 1)).any()
        assert (step.genesis._surprising & (weights == 1)).any()


def test_memory_takes_no_rows_with_tasks():
    step = built(make_random_model(), replay="recomputed", replay_priority="even")
    (batch,) = noise(1)
    step.run(batch, weights_of(batch))
    (ring, *_) = step.genesis.memory.rings
    assert int(ring.count()) == 2
    kept = {bytes(row.tolist()) for row in ring.target[ring.priority > 0]}
    assert kept == {bytes(batch[row].tolist()) for row in (0, 3)}


# ── what writing into the byte memory costs ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rehearses", [False, True])
def test_the_price_is_that_of_the_writing_strengths(weighted, rehearses):
    """Against the gradient of the strengths themselves, taken by autograd on a model of its own. The last patch is not
    whole; what is told and asked costs nothing."""
    batch = next(noise(1))[:, :62]
    weights, text = weights_of(batch) if weighted else None, torch.ones(4, 64)
    if weighted:
        text[1, 10:14] = text[2, 20:50] = 0
    gradients = {}
    for price in (0.0, 3.0):
        model = make_random_model()
        step = rehearsing(model, replay="recomputed") if rehearses else TrainingStep(model, MuonAdamW(model))
        before = copy.deepcopy(model)  # before the step moves the weights
        step.priced = True
        step.write_price.fill_(price)
        gate = model.head.memory.gates.weight
        gate.register_hook(lambda gradient, price=price: gradients.update({price: gradient.clone()}))
        torch.manual_seed(0)  # of what is drawn to be rehearsed
        step.run(batch, weights)
    before(torch.cat([batch, rows_drawn(step, 62)]) if rehearses else batch, writes=(writes := []))
    text = torch.cat([text, torch.ones(len(writes[0]) - 4, 64)])
    assert len(text) > 4 if rehearses else len(text) == 4
    cost = 3.0 * (text * (1 - (1 - writes[0]) ** 2).sum(1)).mean()
    (expected,) = torch.autograd.grad(cost, before.head.memory.gates.weight)
    torch.testing.assert_close(gradients[3.0] - gradients[0.0], expected, rtol=1e-3, atol=1e-6)
    assert expected.abs().max() > 1e-3


def test_tasks_without_a_memory_for_them_are_told(curriculum, script, tmp_path, capsys):  # noqa: F811
    for memory in (0, 1):
        settings = [*WITH_MEMORY, "--set", f"recall_heads={memory}", "--set", "recall_text_heads=1"]
        assert script(*settings, "--curriculum", curriculum, "--steps", 2, "--out", tmp_path / str(memory)) == 0
        assert ("no memory of bytes to learn them with" in capsys.readouterr().out) == (memory == 0)


def test_the_price_rises_with_the_difficulty(curriculum, script, tmp_path, capsys):  # noqa: F811
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        run = TrainingStep.run
        patch.setattr(TrainingStep, "run", lambda s, *rest: seen.append(s.write_price.item()) or run(s, *rest))
        arguments = [*WITH_MEMORY, "--curriculum", curriculum, "--steps", 20]
        for options, price in ((["--recall", 0.25], 4.0), (["--recall", 0.5, "--write-price", 1], 1.0)):
            seen.clear()
            assert script(*arguments, *options, "--out", tmp_path / f"at{price}") == 0
            assert seen == pytest.approx([price * min(1.0, i / 8) for i in range(20)])
        seen.clear()
        assert script(*arguments, "--recall", 0, "--out", tmp_path / "no tasks") == 0
        assert seen == [0.0] * 20
        # A stage without tasks has no price, before the one that has and after it.
        seen.clear()
        first, tasks = TOML.split("[[stages]]\n")[1:]
        last = first.replace('"words"', '"again"')
        toml = TOML.split("[[stages]]")[0] + "".join("[[stages]]\n" + each for each in (first, tasks, last))
        between = curriculum.parent / "between.toml"
        between.write_text(toml.replace("share = 0.4", "share = 0.2"), encoding="utf-8")
        assert script(*WITH_MEMORY, "--curriculum", between, "--steps", 20, "--out", tmp_path / "between") == 0
        assert seen == pytest.approx([0.0] * 4 + [4 * min(1.0, i / 4.8) for i in range(12)] + [0.0] * 4)
    assert not identical(tmp_path / "at4.0", tmp_path / "at1.0")
    assert script(*arguments, "--write-price", -1, "--out", tmp_path / "bad") == 2
    assert "write_price=-1.0: accepted is a number ≥ 0" in capsys.readouterr().err


@pytest.mark.parametrize("rehearses", [False, True])
def test_text_heads_are_not_told_what_tasks_tell(rehearses):
    """Statements, questions and answers; asides and what is rehearsed are text to them."""
    batch = next(noise(1))[:, :62]  # the last patch is not whole
    for text, weights in ((1, weights_of(batch)), (1, None), (0, weights_of(batch))):
        model, seen = make_random_model(recall_text_heads=text), []
        step = rehearsing(model, replay="recomputed") if rehearses else TrainingStep(model, MuonAdamW(model))
        before = copy.deepcopy(model)
        note = lambda module, inputs, named, seen=seen: seen.append(named["told"])  # noqa: E731
        model.head.memory.register_forward_pre_hook(note, with_kwargs=True)
        loss = step.run(batch, weights)
        if text == 0 or weights is None:
            assert seen == [None]
            continue
        (told,) = seen
        expected = torch.zeros(told.shape, dtype=torch.bool)
        expected[1, 10:14] = expected[2, 20:50] = True
        assert torch.equal(told, expected) and told.shape[1] == 64 and (len(told) > 4) == rehearses
        with_them, without = (
            F.cross_entropy(before(batch, told=marked).transpose(1, 2), batch.long(), reduction="none")
            for marked in (told[:4, :62], None)
        )
        assert loss.item() == pytest.approx(with_them[weights == 1].mean().item(), rel=1e-5)
        assert (with_them - without)[2].abs().max() > 0.01 and torch.equal(with_them[0], without[0])


def test_a_price_makes_it_write_less():
    """Of texts that each say one thing again and again."""
    strengths = {}
    for price in (0.0, 4.0):
        model = make_random_model()
        step = TrainingStep(model, MuonAdamW(model, lr=0.01), priced=True)
        step.write_price.fill_(price)
        for batch in noise(60):
            batch = batch[:, :12].repeat(1, 5)
            step.run(batch)
        with torch.no_grad():
            model(batch, writes=(writes := []))
        strengths[price] = writes[0].mean().item()
    assert strengths[4.0] < 0.02 < 0.1 < strengths[0.0]


# ── what thinking costs ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rehearses", [False, True])
def test_the_ponder_cost_is_that_of_the_steps_taken(rehearses):
    """Against the gradient of 1 − p_halt itself, taken by autograd on a model of its own."""
    (batch,) = noise(1)
    gradients = {}
    for cost in (0.0, 3.0):
        model = make_random_model()
        step = rehearsing(model, replay="recomputed") if rehearses else TrainingStep(model, MuonAdamW(model))
        before = copy.deepcopy(model)
        step.ponder_cost = cost
        halt = model.reasoning.halt.weight
        halt.register_hook(lambda gradient, cost=cost: gradients.update({cost: gradient.clone()}))
        torch.manual_seed(0)  # of what is drawn to be rehearsed
        step.run(batch)
    before(torch.cat([batch, rows_drawn(step, 64)]) if rehearses else batch, halts=(halts := []))
    assert len(halts) == 3
    (expected,) = torch.autograd.grad(3.0 * (1 - torch.stack(halts)).mean(), before.reasoning.halt.weight)
    torch.testing.assert_close(gradients[3.0] - gradients[0.0], expected, rtol=1e-3, atol=1e-6)
    assert expected.abs().max() > 1e-3


def test_a_ponder_cost_makes_it_think_less():
    shares = {}
    for cost in (0.0, 1.0):
        model = make_random_model()
        step = TrainingStep(model, MuonAdamW(model, lr=0.01), ponder_cost=cost)
        for batch in noise(40):
            step.run(batch)
        with torch.no_grad():
            model(batch, halts=(halts := []))
        shares[cost] = 1 - torch.stack(halts).mean().item()
    assert shares[1.0] < 0.1 < 0.4 < shares[0.0]


def test_a_run_that_skips_and_reads_and_pays_resumes_to_the_bit(curriculum, script, tmp_path, capsys):  # noqa: F811
    arguments = [*RUN, "--curriculum", curriculum, "--steps", 12, "--genesis", "all", "--ponder-cost", 0.01]
    arguments += ["--set", "thinking_skip=2", "--set", "thinking_reads=true"]
    assert script(*arguments, "--out", tmp_path / "whole") == 0
    assert script(*arguments, "--out", tmp_path / "parts", stop_at=7) == 0
    assert script("--resume", "--out", tmp_path / "parts", "--quiet", "--sample-bytes", 0) == 0
    assert identical(tmp_path / "whole", tmp_path / "parts")
    assert script(*arguments, "--ponder-cost", "-0.1", "--out", tmp_path / "bad") == 2
    assert "ponder_cost=-0.1: accepted is a number ≥ 0" in capsys.readouterr().err


def test_a_run_saved_before_an_option_existed_goes_on_with_its_default(curriculum, script, tmp_path):  # noqa: F811
    new, arguments = {"write_price", "ponder_cost"}, [*RUN, "--curriculum", curriculum, "--steps", 12]
    assert script(*arguments, "--out", tmp_path / "whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        known = TrainingOptions.to_dict
        patch.setattr(TrainingOptions, "to_dict", lambda s: {k: v for k, v in known(s).items() if k not in new})
        tasks = RecallOptions.to_dict
        patch.setattr(RecallOptions, "to_dict", lambda s: {k: v for k, v in tasks(s).items() if k != "answer_limit"})
        assert script(*arguments, "--out", tmp_path / "old", stop_at=7) == 0
    assert script("--resume", "--out", tmp_path / "old", "--quiet", "--sample-bytes", 0) == 0
    assert identical(tmp_path / "whole", tmp_path / "old")
