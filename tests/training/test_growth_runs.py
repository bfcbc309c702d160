"""Runs that grow and freeze: the optimizer's state, the plan and the policy, and a resume that is exact."""

import copy
import json
import re

import pytest
import torch

from model import load_checkpoint
from model.layers.hull import CHRYSALIS, CRYOGENIC
from model.petals.viscoelastic import ViscoelasticOptions
from model.training.checkpoint import load_training_state
from model.training.optimizer import MuonAdamW
from model.training.step import TrainingStep
from tests.conftest import make_random_model
from tests.training.test_step import batches, host_reads
from tests.training.test_train_script import RUN, curriculum, environment, identical, metrics, script  # noqa: F401

GROWING = ["--grow", "6:petals,10:blocks,15:0,20:widen=48,25:thaw"]
FREEZING = ["--freeze", "cryogenic", "--freeze-threshold", "0.85"]
KL = [*GROWING, "--freeze", "chrysalis", "--freeze-rule", "kl", "--freeze-threshold", "1000"]
FROZEN_ONCE = ["--freeze", "chrysalis", "--freeze-at", "10", "--freeze-threshold", "2", "--grow", "10:petals=3"]


def trained(steps: int = 3, **options):
    model = make_random_model().train()
    step = TrainingStep(model, MuonAdamW(model, lr=1e-2, **options))
    for batch in batches(steps):
        step.run(batch)
    return model, step


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("viscosity", [None, ViscoelasticOptions()])
def test_rebuilding_carries_the_state_of_what_was_there(kind, viscosity):
    model, step = trained(optimizer=kind, viscosity=viscosity)
    optimizer = step.optimizer
    names = {id(p): name for name, p in model.named_parameters()}
    before = {name: x.clone() for name, x in optimizer.state_tensors().items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.add_petals(0, 2)
    model.grow(1)
    optimizer.rebuild(model)
    after = optimizer.state_tensors()
    kept = 0
    for name, parameter in model.named_parameters():
        old = names.get(id(parameter))
        if old is not None:
            assert torch.equal(parameter, weights[old])
        for state in ("first", "second", "r_up", "r_down", "coldness"):
            key = f"optimizer.{state}.{name}"
            if not parameter.requires_grad:
                assert key not in after
            elif key in after and old is None:
                assert not after[key].any()
            elif key in after:
                assert torch.equal(after[key], before[f"optimizer.{state}.{old}"])
                kept += 1
    assert kept > 20
    assert any(name.startswith("blocks.1.left.") for name, p in model.named_parameters() if not p.requires_grad)
    assert optimizer.steps == 3


def test_a_rebuilt_optimizer_steps_as_one_that_never_was():
    """The new layout is another order of the same arithmetic: old parameters move as they would have."""
    model, step = trained()
    reference = copy.deepcopy(model)
    other = MuonAdamW(reference, lr=1e-2)
    other.load_state_tensors(step.optimizer.state_tensors())
    model.add_petals(None, 2)
    step.optimizer.rebuild(model)
    expected = dict(reference.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.grad.normal_(generator=generator)
        if name in expected:
            expected[name].grad.copy_(parameter.grad)
    step.optimizer.step()
    other.step()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=1e-7)


def test_a_training_step_goes_on_learning_after_every_kind_of_growth():
    model, step = trained(24)
    losses = []
    for change in (
        lambda: model.add_petals(None, 2),
        lambda: model.grow(),
        lambda: model.widen(48),
        lambda: model.thaw(),
    ):
        change()
        step.optimizer.rebuild(model)
        step.recapture()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        losses.append([step.run(batch).item() for batch in batches(8)])
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert sum(losses[-1][-4:]) < sum(losses[0][:4])
    assert step.optimizer.skipped == 0


@pytest.mark.parametrize("viscosity", [None, ViscoelasticOptions(resistance=0.0, heating=0.0, cooling=0.0)])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_without_resistance_and_cooling_the_updates_are_plain_bit_for_bit(kind, viscosity):
    plain, _ = trained(6, optimizer=kind)
    viscous, _ = trained(6, optimizer=kind, viscosity=viscosity, divider=1000.0)
    for (name, a), b in zip(plain.named_parameters(), viscous.parameters()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("status", [CRYOGENIC, CHRYSALIS])
def test_a_solid_petal_moves_by_less_than_a_hundredth(status):
    """Of what a fluid petal of the same group moves, weight decay included."""
    model, step = trained(3, divider=1000.0)
    group = model.blocks[0].hull.groups[0]
    group.set_status([1, 3], status)
    step.optimizer.set_petals()
    before = {name: p.detach().clone() for name, p in group.petal_parameters().items()}
    for batch in batches(10):
        step.run(batch)
    for name, parameter in group.petal_parameters().items():
        moved = (parameter - before[name]).flatten(1).norm(dim=1)
        assert moved[[1, 3]].max() < 0.01 * moved[[0, 2]].min()
        assert status == CRYOGENIC or not moved[[1, 3]].any()


def test_viscous_updates_are_the_reference_applied_to_plain_ones():
    """One step after some: the plain optimizer's update from the same state, damped by the definition."""
    from model.petals.viscoelastic import viscoelastic_reference

    options = ViscoelasticOptions(resistance=0.3, cooling=0.2, state_dtype="float32")
    model, step = trained(4, viscosity=options)
    plain_model = copy.deepcopy(model)
    plain = MuonAdamW(plain_model, lr=1e-2)
    plain.load_state_tensors({n: x for n, x in step.optimizer.state_tensors().items() if n in plain.state_tensors()})
    v = step.optimizer.viscosity
    (r_up, r_down), temperature = (x.double().clone() for x in v.resistance()), v.temperature().double().clone()
    before = plain.values.double().clone()
    for optimizer in (plain, step.optimizer):
        optimizer.grads.copy_(torch.randn(plain.grads.shape, generator=torch.Generator().manual_seed(1)))
        optimizer.step()
    update = (before - plain.values.double()) / 1e-2
    expected = before + viscoelastic_reference(update, r_up, r_down, temperature, options, 1e-2)
    torch.testing.assert_close(step.optimizer.values.double(), expected, rtol=1e-4, atol=1e-6)
    assert (expected - plain.values).abs().max() > 1e-4  # and it does something


@pytest.mark.parametrize("extra", [GROWING, FREEZING, FROZEN_ONCE, KL])
def test_a_growing_run_stopped_and_resumed_is_bit_identical(extra, curriculum, script, tmp_path):  # noqa: F811
    """Resumed twice, from saves on both sides of growth; routers sample and petals set on the way."""
    arguments = [*RUN, "--curriculum", curriculum, "--steps", 30, "--save-every", 5, "--eval-every", 6, *extra]
    assert script(*arguments, "--sample-bytes", 5, "--out", tmp_path / "whole", plot=extra is KL) == 0
    out = tmp_path / "stopped"
    arguments += ["--out", out]
    for stop in (8, 24):  # 24 is a step with an evaluation, which is still to be made when the run stops there
        assert script(*arguments, stop_at=stop) == 0
        assert load_training_state(out / "last_model_curriculum.safetensors")[1]["step"] == stop
        arguments = ["--resume", "--out", out, "--quiet", "--sample-bytes", 0]
    assert script(*arguments) == 0
    assert identical(out, tmp_path / "whole")
    data = metrics(tmp_path / "whole")
    if extra is FROZEN_ONCE:  # what was there at step 10 sets, what is added then does not
        assert {row["solid"] for row in data["hulls"] if row["step"] >= 10} == {4}
        assert data["hulls"][-1]["total"] == 7
    if extra is FREEZING:
        assert data["hulls"][-1]["solid"] == 4 and any(row["solid"] == 4 for row in data["hulls"] if row["step"] <= 24)
    if extra is KL:
        assert max(row["solid"] for row in data["hulls"]) > 4
    if extra in (GROWING, KL):
        assert [(e["step"], e["what"]) for e in data["growth"]] == [
            (6, "petals"), (10, "blocks"), (15, "blocks"), (20, "widen"), (25, "thaw"),
        ]  # fmt: skip
        model = load_checkpoint(tmp_path / "whole" / "last_model_curriculum.safetensors")
        assert model.config.growth[:2] == ("petals 0 2", "grow 0")
        assert model.parameter_count() == data["growth"][-1]["parameters"]


def test_petals_set_and_the_model_grows_by_itself(curriculum, script, tmp_path, capsys):  # noqa: F811
    """With a threshold over every mobility all petals set at the second observation, and the policy adds half again."""
    arguments = [*RUN, "--curriculum", curriculum, "--steps", 60, "--grow", "auto", "--freeze", "cryogenic"]
    assert script(*arguments, "--freeze-threshold", "2", "--out", tmp_path, plot=True) == 0
    data = metrics(tmp_path)
    (first, *_) = data["growth"]
    assert (first["why"], first["what"], first["changes"]) == ("auto", "petals", ["petals 0 2"])
    rows = [row for row in data["hulls"] if row["step"] <= first["step"]]
    assert rows[-1]["solid"] == rows[-1]["total"] == 4
    assert all(set(row["radius"]) for row in data["hulls"])
    lines = [json.loads(line) for line in (tmp_path / "log_curriculum.jsonl").read_text("utf-8").splitlines()]
    assert {"growth", "petal_set", "hulls"} <= {line["event"] for line in lines}
    assert "BPC long" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grow", "5:leaves"], "grow='5:leaves': '5:leaves' is not accepted; accepted is off, auto, or STEP"),
        (["--grow", "70"], r"grow='70': step 70, accepted are steps before 60"),
        (["--grow", "auto"], "freeze='off': accepted with grow='auto' are cryogenic, chrysalis"),
        (["--grow", "5:7"], "bob=7: accepted is an index from 0 to 0"),
        (["--grow", "5:widen=40"], "d_model=40: accepted is a multiple of 16 greater than 32"),
        (["--freeze-at", "20"], "freeze_at='20': accepted with freeze='off' is evaluations"),
        (["--freeze", "chrysalis", "--freeze-at", "soon"], "freeze_at='soon': accepted are evaluations, or steps"),
        (["--freeze", "chrysalis", "--freeze-at", "99"], "freeze_at='99': step 99, accepted are steps from 1 to 60"),
        (["--freeze", "hard"], "freeze='hard': accepted is one of off, cryogenic, chrysalis"),
        (["--hull", "relu"], "hull='relu': accepted are convex, swiglu"),
        (["--petals", "0"], "petals=0: accepted is an integer from 1 to 4096"),
    ],
)
def test_bad_growth_gets_one_line(arguments, message, curriculum, script, tmp_path, capsys):  # noqa: F811
    code = script(*RUN, "--curriculum", curriculum, "--steps", 60, *arguments, "--out", tmp_path)
    error = capsys.readouterr().err
    assert code == 2
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())  # refused before anything was written
    assert re.search(message, error), error


def grown_step(device="cpu", **options):
    """A step on a model with everything: added petals, a frozen tree, a column, solid petals, viscous updates."""
    torch.manual_seed(0)
    model = make_random_model().train().to(device)
    optimizer = MuonAdamW(model, lr=1e-3, viscosity=ViscoelasticOptions(), divider=1000.0)
    step = TrainingStep(model, optimizer, **options)
    model.add_petals(0, 2)
    model.grow(1)
    model.widen(48)
    model.blocks[0].hull.groups[0].set_status([0], CRYOGENIC)
    model.blocks[0].hull.groups[0].set_status([1], CHRYSALIS)
    optimizer.rebuild(model)
    return model, step


def test_a_grown_step_never_reads_a_tensor_on_the_host():
    _, step = grown_step()
    seen, reads = host_reads(step)
    assert any("dirichlet" in name for name in seen)
    # On the CPU, where reading waits for nothing, the viscous update asks once whether the step is a skip.
    assert reads == ["aten._local_scalar_dense.default"]


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
def test_a_grown_step_does_not_wait_for_the_device():
    _, step = grown_step("cuda", amp_dtype=torch.bfloat16)
    first, second = (batch.pin_memory() for batch in batches(2))
    step.run(first)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run(second)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
def test_captured_and_eager_steps_agree_across_growth(amp_dtype):
    """Routers draw from the device's generator: a captured step draws the same numbers as an eager one."""
    losses = []
    for graph in (False, True):
        model, step = grown_step("cuda", amp_dtype=amp_dtype, graph=graph)
        torch.manual_seed(1)
        run = []
        for i, batch in enumerate(batches(40)):
            if i == 20:
                model.grow(0)
                step.optimizer.rebuild(model)
                step.recapture()
            run.append(step.run(batch.pin_memory()).clone())
        assert (step._captured is not None) == graph
        losses.append(torch.stack(run).cpu())
    torch.testing.assert_close(losses[0], losses[1], rtol=5e-3, atol=5e-3)
    assert losses[1][-1] < losses[1][0]


@cuda
@pytest.mark.parametrize("preset", ["nano", "small"])
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_growth_is_exact_on_the_card(preset, amp_dtype):
    from model import AGIFormer, AGIFormerConfig
    from model.inference.stream import ByteStream

    torch.manual_seed(0)
    model = AGIFormer(AGIFormerConfig.preset(preset)).cuda()
    step = TrainingStep(model, MuonAdamW(model, lr=4e-3), amp_dtype=amp_dtype)
    text = torch.randint(97, 105, (4, 512), dtype=torch.uint8)
    for _ in range(4):
        step.run(text.pin_memory())
    x = text[:2, :301].cuda()

    def everything() -> list[torch.Tensor]:
        with torch.autocast("cuda", amp_dtype, enabled=amp_dtype is not None), torch.no_grad():
            training, evaluation = model.train()(x), model.eval()(x)
            stream = ByteStream(model, 2)
            written = []
            stream.feed(x[:, :50])
            for _ in range(24):
                written.append(stream.logits().argmax(-1, keepdim=True))
                stream.feed(written[-1])
        return [training, evaluation, torch.cat(written, 1)]

    before = everything()
    head = model.config.d_model // model.config.n_heads
    for grow in (
        lambda: model.grow(0),
        lambda: model.add_petals(1, 3),
        lambda: model.grow(0),
        lambda: model.widen(model.width + head),
        lambda: model.grow(),
    ):
        grow()
        assert all(torch.equal(a, b) for a, b in zip(before, everything()))
