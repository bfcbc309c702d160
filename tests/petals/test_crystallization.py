"""Petals set under both rules as brute force says, stay set, are frozen and freed by hand, and resume exactly."""

import math

import pytest
import torch
from torch import nn

from model import load_checkpoint, save_checkpoint
from model.layers.hull import CHRYSALIS, CRYOGENIC, FLUID, ConvexPetals, SwiGLUPetals
from model.petals.crystallization import (
    ESTABLISHED,
    Crystallization,
    CrystallizationOptions,
    freeze,
    match_petals,
    petal_groups,
    unfreeze,
    warm,
)
from tests.conftest import make_random_model

WEIGHTS = 24  # of a petal of `toy`: 2 · 2 · 4 in up, 2 · 4 in down


def toy(seed=0) -> nn.ModuleDict:
    """Two groups, of 3 and 2 petals with 24 weights each, all random; and a layer without petals."""
    torch.manual_seed(seed)
    module = nn.ModuleDict(
        {"a": SwiGLUPetals(4, 3, 2), "plain": nn.Linear(4, 4), "b": nn.ModuleList([SwiGLUPetals(4, 2, 2)])}
    )
    with torch.no_grad():
        for group in petal_groups(module).values():
            group.down.normal_()
    return module


def every(module):
    """(id, group, index) of each petal."""
    return [(f"{path}:{i}", group, i) for path, group in petal_groups(module).items() for i in range(group.petals)]


def flat(group, i, of=lambda parameter: parameter):
    """The 24 values of petal i as Python floats."""
    return [x for p in group.petal_parameters().values() for x in of(p)[i].detach().double().flatten().tolist()]


def pressed(**changes) -> CrystallizationOptions:
    return CrystallizationOptions(**({"mode": "cryogenic", "warmup": 0} | changes))


def frozen_at(events):
    return {event["petal"]: event["step"] for event in events}


# ── pressure ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pressure_by_brute_force():
    """Random mobilities and a falling learning rate: who sets when, and with which share."""
    module = toy()
    generator = torch.Generator().manual_seed(1)
    # Petals whose mobilities have different scales set at different learning rates.
    mobilities = {}
    for group in petal_groups(module).values():
        for p in group.parameters():
            scale = torch.rand(group.petals, 1, 1, generator=generator)
            mobilities[p] = torch.rand(p.shape, generator=generator) * scale
    crystallization = Crystallization(module, pressed(threshold=0.07))
    solid, seen = {}, []
    for step, lr in enumerate((3e-3, 1.3e-3, 8e-4, 6e-4, 4e-4, 2e-4, 1e-4)):
        expected = {}
        for name, group, i in every(module):
            if name not in solid:
                share = sum(lr / 3e-3 * m < 0.07 for m in flat(group, i, mobilities.get)) / WEIGHTS
                expected[name] = share
                if share >= 1 - math.exp(-1):
                    solid[name] = (step, share)
        seen += crystallization.observe(step, lr, 3e-3, mobilities.get)
        assert {name: crystallization.shares[name] for name in expected} == expected
        assert crystallization.counts() == (len(solid), 5)
    assert {e["petal"]: (e["step"], e["crystallized"]) for e in seen} == solid
    assert len(seen) == len(solid) == 5 and len({step for step, _ in solid.values()}) > 2


@pytest.mark.parametrize("still, sets", [(15, False), (16, True)])
def test_a_petal_sets_at_1_minus_1_over_e_of_all_its_weights(still, sets):
    """15 of 24 weights are 62.5%, 16 are 66.7%; 63.2% are needed, however they lie over the parameters."""
    assert 15 / 24 < ESTABLISHED < 16 / 24
    module = nn.ModuleDict({"a": SwiGLUPetals(4, 1, 2)})
    mobility = torch.ones(WEIGHTS)
    mobility[:still] = 0.099
    parts = {module["a"].up: mobility[:16].view(1, 4, 4), module["a"].down: mobility[16:].view(1, 2, 4)}
    events = Crystallization(module, pressed()).observe(7, 1.0, 1.0, parts.get)
    assert events == ([{"petal": "a:0", "step": 7, "crystallized": 16 / 24}] if sets else [])
    assert module["a"].status.tolist() == [CRYOGENIC if sets else FLUID]


def test_without_mobilities_the_learning_rate_decides():
    module = toy()
    crystallization = Crystallization(module, pressed(threshold=0.1))
    assert crystallization.observe(0, 3e-4, 3e-3) == [], "exactly at the threshold"
    assert len(crystallization.observe(1, 2.9e-4, 3e-3)) == 5


def test_a_solid_petal_stays_solid_and_keeps_its_share():
    module = toy()
    crystallization = Crystallization(module, pressed(mode="chrysalis"))
    cold = {p: torch.full_like(p, 0.01) for p in module.parameters()}
    hot = {p: torch.ones_like(p) for p in module.parameters()}
    cold[module["b"][0].up] = hot[module["b"][0].up]
    assert set(frozen_at(crystallization.observe(0, 1.0, 1.0, cold.get))) == {"a:0", "a:1", "a:2"}
    assert crystallization.observe(1, 1.0, 1.0, hot.get) == []
    assert crystallization.counts() == (3, 5) and crystallization.fluid() == [0, 0, 0, 1, 1]
    assert crystallization.shares == {"a:0": 1.0, "a:1": 1.0, "a:2": 1.0, "b.0:0": 0.0, "b.0:1": 0.0}
    assert module["a"].status.tolist() == [CHRYSALIS] * 3 and module["b"][0].status.tolist() == [FLUID] * 2


def test_petals_do_not_set_before_their_warmup():
    """Nor do those that come later: their own observations count."""
    module = toy()
    crystallization = Crystallization(module, pressed(warmup=2))
    events = []
    for step in range(6):
        if step == 1:
            module["b"].append(SwiGLUPetals(4, 1, 2))
        events += crystallization.observe(step, 0.0, 1.0)
    assert frozen_at(events) == {"a:0": 2, "a:1": 2, "a:2": 2, "b.0:0": 2, "b.0:1": 2, "b.1:0": 3}


def test_petals_cool_under_the_viscoelastic_optimizer_and_set():
    """A petal that gets no gradient cools until it is solid; its neighbours, pushed in one direction, do not."""
    from model.petals.viscoelastic import ViscoelasticAdamW, ViscoelasticOptions

    module = nn.ModuleDict({"a": SwiGLUPetals(4, 3, 2)})
    options = ViscoelasticOptions(cooling=0.1, t_min=0.01)
    optimizer = ViscoelasticAdamW(module.parameters(), lr=1e-3, weight_decay=0.0, options=options)
    crystallization = Crystallization(module, pressed())
    events = []
    for step in range(40):
        for p in module.parameters():
            p.grad = torch.ones_like(p)
            p.grad[1] = 0
        optimizer.step()
        events += crystallization.observe(step, 1e-3, 1e-3, optimizer.mobility)
    # T falls as 0.9^(step + 1), and under 0.1 at the 22nd step.
    assert frozen_at(events) == {"a:1": 21}


# ── KL ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_kl_by_brute_force():
    """Weights that move less and less, each petal at its own pace, against o3's rule weight by weight."""
    module, tau, decay, warmup = toy(), 1e-4, 0.8, 4
    crystallization = Crystallization(module, pressed(rule="kl", kl_tau=tau, kl_decay=decay, warmup=warmup))
    generator = torch.Generator().manual_seed(2)

    def petal_weights(group, i):
        return [p[i].detach().double().flatten().tolist() for p in group.petal_parameters().values()]

    before = {name: petal_weights(group, i) for name, group, i in every(module)}
    by_weight, of_largest, solid, events = {}, {}, {}, []
    for step in range(60):
        with torch.no_grad():
            for k, (_, group, i) in enumerate(every(module)):
                for p in group.parameters():
                    p[i] += torch.randn(p[i].shape, generator=generator) * 0.3 * (0.7 + 0.05 * k) ** step
        for name, group, i in every(module):
            after = petal_weights(group, i)
            kls = []
            for w, v in zip(before[name], after):
                rms = sum(x * x for x in w + v) / (2 * len(w))
                kls += [(x - y) ** 2 / (2 * rms) for x, y in zip(w, v)]
            before[name] = after
            if name in solid:
                continue
            old = by_weight.get(name, kls)
            by_weight[name] = [decay * a + (1 - decay) * x for a, x in zip(old, kls)]
            of_largest[name] = decay * of_largest.get(name, max(kls)) + (1 - decay) * max(kls)
            if step >= warmup and of_largest[name] < tau:
                solid[name] = (step, sum(x < tau for x in kls) / WEIGHTS)
                assert all(average < tau for average in by_weight[name]), "o3: for all weights in a petal"
        events += crystallization.observe(step, 1.0, 1.0)
    assert {e["petal"]: (e["step"], e["crystallized"]) for e in events} == solid
    assert len({step for step, _ in solid.values()}) == 5, "each at its own time"


def test_one_weight_that_moves_keeps_its_petal_fluid():
    module = toy()
    crystallization = Crystallization(module, pressed(rule="kl", kl_decay=0.5))
    events = []
    for step in range(5):
        with torch.no_grad():
            module["a"].down[1, 0, 0] += 1.0
        events += crystallization.observe(step, 1.0, 1.0)
    assert frozen_at(events) == {"a:0": 0, "a:2": 0, "b.0:0": 0, "b.0:1": 0}
    assert crystallization.shares["a:1"] == 23 / 24


def test_kl_of_weights_that_leave_zero_or_stay_there():
    module = nn.ModuleDict({"a": ConvexPetals(4, 2, 3)})  # biases and output weights are born zero
    crystallization = Crystallization(module, pressed(rule="kl"))
    with torch.no_grad():
        module["a"].down[0] = 1e-3
    assert frozen_at(crystallization.observe(0, 1.0, 1.0)) == {"a:1": 0}
    kl = crystallization.state_tensors()["crystallization.kl.a"]
    # Half the squared change over the mean of 0² and 1e-3²: one nat. What did not move has none.
    assert kl.tolist() == pytest.approx([1.0, 0.0])


# ── what becomes of solid petals, and of modules that grow ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["cryogenic", "chrysalis"])
def test_only_chrysalis_takes_the_gradients(mode):
    module = nn.ModuleDict({"a": SwiGLUPetals(4, 3, 2)})
    nn.init.normal_(module["a"].down)
    mobility = {p: torch.ones_like(p).index_fill(0, torch.tensor([1]), 0.0) for p in module.parameters()}
    Crystallization(module, pressed(mode=mode)).observe(0, 1.0, 1.0, mobility.get)
    module["a"](torch.randn(5, 4)).square().sum().backward()
    for p in module.parameters():
        assert p.grad[0].abs().sum() > 0 and p.grad[2].abs().sum() > 0
        assert (p.grad[1].abs().sum() > 0) == (mode == "cryogenic")


def test_off_observes_nothing():
    module = toy()
    crystallization = Crystallization(module, CrystallizationOptions())
    assert crystallization.observe(0, 0.0, 1.0) == []
    assert crystallization.shares == {} and crystallization.state_tensors() == {}
    assert crystallization.counts() == (0, 5)


def test_frozen_subtrees_are_neither_observed_nor_counted():
    module = toy()
    module["a"].requires_grad_(False)

    def mobility(parameter):
        assert parameter.requires_grad
        return torch.zeros_like(parameter)

    crystallization = Crystallization(module, pressed())
    assert set(frozen_at(crystallization.observe(0, 1.0, 1.0, mobility))) == {"b.0:0", "b.0:1"}
    assert module["a"].status.tolist() == [FLUID] * 3
    assert crystallization.counts() == (2, 2) and crystallization.fluid() == [0, 0]
    module["b"].requires_grad_(False)
    assert crystallization.observe(1, 1.0, 1.0, mobility) == [] and crystallization.counts() == (0, 0)


def test_records_follow_parameters_that_are_renamed():
    """What was observed of a group counts on when growth has put it somewhere else."""
    module = toy()
    crystallization = Crystallization(module, pressed(rule="kl", warmup=2))
    for step in range(2):
        assert crystallization.observe(step, 1.0, 1.0) == []
    tree = nn.Module()
    tree.left, tree.right = module["a"], SwiGLUPetals(4, 1, 2)
    module["a"] = tree
    crystallization.refresh()
    assert set(crystallization.shares) == {"a.left:0", "a.left:1", "a.left:2", "b.0:0", "b.0:1"}
    assert "crystallization.snapshot.a.left.up" in crystallization.state_tensors()
    events = [event for step in range(2, 5) for event in crystallization.observe(step, 1.0, 1.0)]
    assert frozen_at(events) == {"a.left:0": 2, "a.left:1": 2, "a.left:2": 2, "b.0:0": 2, "b.0:1": 2, "a.right:0": 4}


def test_growth_of_the_model_itself():
    model = make_random_model(petals=3)
    crystallization = Crystallization(model, pressed(warmup=1))
    crystallization.observe(0, 0.0, 1.0)
    model.grow(0)
    model.add_petals(1, 2)
    events = crystallization.observe(1, 0.0, 1.0)
    assert set(frozen_at(events)) == {f"blocks.1.hull.groups.0:{i}" for i in range(3)}
    assert crystallization.counts() == (3, 3 + 3 + 2)
    model.thaw(0)
    assert crystallization.counts() == (3, 3 + 3 + 3 + 2)
    events = crystallization.observe(2, 0.0, 1.0)
    assert set(frozen_at(events)) == {
        *(f"blocks.0.right.hull.groups.0:{i}" for i in range(3)),
        *(f"blocks.1.hull.groups.1:{i}" for i in range(2)),
    }, "a thawed tree begins anew"


@pytest.mark.parametrize("rule", ["pressure", "kl"])
def test_a_resumed_run_is_exact(rule):
    """Stopped after any observation, state through copies: the same events, shares and state as an unbroken run."""
    options = pressed(rule=rule, warmup=3, kl_tau=1e-3, kl_decay=0.7)

    def train(module, step):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for group in petal_groups(module).values():
                for p in group.parameters():
                    p += torch.randn(p.shape, generator=generator) * 0.5 * 0.8**step

    def run(crystallization, module, steps):
        events = []
        for step in steps:
            train(module, step)
            events += crystallization.observe(step, 0.9**step, 1.0, lambda p: p.detach().abs() / 3)
        return events

    module = toy()
    whole = Crystallization(module, options)
    expected = run(whole, module, range(28))
    assert len(expected) == 5 and len(set(frozen_at(expected).values())) > 1
    for stop in (0, 1, 9, 15):
        first = toy()
        stopped = Crystallization(first, options)
        events = run(stopped, first, range(stop))
        state = {name: tensor.clone() for name, tensor in stopped.state_tensors().items()}
        second = toy(seed=9)
        resumed = Crystallization(second, options)
        second.load_state_dict(first.state_dict())
        resumed.load_state_tensors(state)
        assert events + run(resumed, second, range(stop, 28)) == expected
        assert resumed.shares == whole.shares
        for name, tensor in whole.state_tensors().items():
            assert torch.equal(tensor, resumed.state_tensors()[name]), name


def test_state_that_does_not_fit_is_refused():
    crystallization = Crystallization(toy(), pressed(rule="kl"))
    state = dict(crystallization.state_tensors())
    assert set(state) == {
        *(f"crystallization.{kind}.{path}" for kind in ("observations", "share", "kl") for path in ("a", "b.0")),
        *(f"crystallization.snapshot.{path}.{name}" for path in ("a", "b.0") for name in ("up", "down")),
    }
    short = state | {"crystallization.kl.a": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"crystallization\.kl\.a: found \(2,\), accepted is shape \(3,\)"):
        crystallization.load_state_tensors(short)
    del state["crystallization.snapshot.b.0.down"]
    with pytest.raises(ValueError, match=r"snapshot\.b\.0\.down: found nothing"):
        crystallization.load_state_tensors(state)


@pytest.mark.parametrize("hull", ["convex", "swiglu"])
def test_a_solid_petal_is_solid_in_the_checkpoint(tmp_path, hull):
    model = make_random_model(petals=3, hull=hull)

    def mobility(p):
        return torch.ones_like(p).index_fill(0, torch.tensor([1]), 0.0)

    Crystallization(model, pressed(mode="chrysalis")).observe(0, 1.0, 1.0, mobility)
    loaded = load_checkpoint(save_checkpoint(model, tmp_path / "m.safetensors"))
    assert [g.status.tolist() for g in petal_groups(loaded).values()] == [[FLUID, CHRYSALIS, FLUID]] * 2
    assert Crystallization(loaded, pressed()).counts() == (2, 6)


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "patterns, expected",
    [
        (["all"], {"a": [0, 1, 2], "b.0": [0, 1]}),
        (["a:1"], {"a": [1]}),
        ("a:1", {"a": [1]}),
        (["*:0"], {"a": [0], "b.0": [0]}),
        (["b*"], {"b.0": [0, 1]}),
        (["b.0:1", "a:[02]", "b.?:1"], {"a": [0, 2], "b.0": [1]}),
        ([], {}),
    ],
)
def test_patterns(patterns, expected):
    assert match_petals(toy(), patterns) == expected


@pytest.mark.parametrize("pattern", ["a", "a:3", "A:0", "plain*", "", "a:0-2"])
def test_a_pattern_that_matches_nothing_says_what_would(pattern):
    with pytest.raises(ValueError) as error:
        match_petals(toy(), ["a:0", pattern])
    message = str(error.value)
    assert message == f"petal {pattern}: matches nothing; accepted are all, ids and patterns over them: a:0–2, b.0:0–1"


def test_patterns_over_many_groups_and_over_none():
    many = nn.ModuleList(SwiGLUPetals(4, 1, 1) for _ in range(9))
    with pytest.raises(ValueError, match=r"4:0, 5:0 and 3 more groups$"):
        match_petals(many, ["x"])
    with pytest.raises(ValueError, match="the model has no petals"):
        match_petals(nn.Linear(2, 2), ["all"])


def test_freezing_and_unfreezing_say_what_they_changed():
    module = toy()
    assert freeze(module, {"a": [0, 1], "b.0": [1]}, "chrysalis") == {"a": [0, 1], "b.0": [1]}
    assert freeze(module, {"a": [1, 2]}, "chrysalis") == {"a": [2]}
    assert unfreeze(module, {"a": [0], "b.0": [0]}) == {"a": [0]}
    assert module["a"].status.tolist() == [FLUID, CHRYSALIS, CHRYSALIS]
    with pytest.raises(ValueError, match="mode='fluid': accepted are cryogenic, chrysalis"):
        freeze(module, {"a": [0]}, "fluid")
    with pytest.raises(ValueError, match="petal group c"):
        unfreeze(module, {"c": [0]})


def viscoelastic_state(module, dtype=torch.float32):
    """Training tensors with a cold, resisting weight everywhere."""
    state = {"optimizer.steps": torch.tensor(5.0)}
    for name, p in module.named_parameters():
        state[f"optimizer.first.{name}"] = torch.full(p.shape, 0.25)
        for kind in ("temperature", "coldness", "r_up", "r_down", "e_pos", "e_neg"):
            value = 7 if dtype in (torch.int16,) else 0.25
            state[f"optimizer.{kind}.{name}"] = torch.full(p.shape, value, dtype=dtype)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int16])
def test_warming_warms_these_petals_alone(dtype):
    module = toy()
    state = viscoelastic_state(module, dtype)
    before = {name: tensor.clone() for name, tensor in state.items()}
    assert warm(state, module, {"a": [0, 2]}) == 12
    for name, tensor in state.items():
        _, kind, path = (*name.split(".", 2), "")[:3]
        if path in ("a.up", "a.down") and kind != "first":
            value = 1.0 if kind == "temperature" else 0.0
            assert tensor.dtype == dtype
            assert (tensor[[0, 2]] == value).all(), name
            assert torch.equal(tensor[1], before[name][1]), name
        else:
            assert torch.equal(tensor, before[name]), name


def test_a_state_without_viscosity_has_nothing_to_warm():
    assert warm({"optimizer.first.a.up": torch.zeros(3, 4, 4)}, toy(), {"a": [0]}) == 0


def test_a_state_that_does_not_fit_is_left_as_it_was():
    module = toy()
    state = viscoelastic_state(module) | {"optimizer.r_down.a.down": torch.full((3, 2), 0.25)}
    with pytest.raises(ValueError, match=r"optimizer\.r_down\.a\.down: found \(3, 2\), accepted is shape \(3, 2, 4\)"):
        warm(state, module, {"a": [0]})
    assert all((tensor == 0.25).all() for name, tensor in state.items() if name != "optimizer.steps")


@pytest.mark.parametrize("rule", ["pressure", "kl"])
def test_a_freed_petal_does_not_set_again_at_once(rule):
    """It is observed as a new one is, from the weights that it has now."""
    module = toy()
    crystallization = Crystallization(module, pressed(rule=rule, warmup=2, kl_decay=0.5))
    for step in range(4):
        crystallization.observe(step, 0.0, 1.0)
    assert crystallization.counts() == (5, 5)
    with torch.no_grad():
        module["a"].up[0] += 5.0  # moved since it was seen last; not while it learned
    changed = unfreeze(module, {"a": [0]})
    state = crystallization.state_tensors()
    warm(state, module, changed)
    resumed = Crystallization(module, crystallization.options)
    resumed.load_state_tensors(state)
    assert set(resumed.shares) == {"a:1", "a:2", "b.0:0", "b.0:1"}
    events = [event for step in range(4, 9) for event in resumed.observe(step, 0.0, 1.0)]
    assert frozen_at(events) == {"a:0": 6}


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"mode": "cold"}, "mode='cold': accepted are off, cryogenic, chrysalis"),
        ({"rule": "ice"}, "rule='ice': accepted are pressure, kl"),
        ({"threshold": 0.0}, "threshold=0.0: accepted is a number > 0"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"share": 1.01}, "share=1.01"),
        ({"divider": 0.5}, "divider=0.5: accepted is a number ≥ 1"),
        ({"kl_tau": -1}, "kl_tau=-1"),
        ({"kl_decay": 1.0}, "kl_decay=1.0"),
        ({"warmup": 1.5}, "warmup=1.5: accepted is an integer ≥ 0"),
        ({"warmup": True}, "warmup=True"),
    ],
)
def test_options_out_of_range(changes, text):
    with pytest.raises(ValueError, match=text):
        CrystallizationOptions(**changes)


def test_observations_out_of_range():
    crystallization = Crystallization(toy(), pressed())
    for lr, peak in ((-1.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="accepted are numbers"):
            crystallization.observe(0, lr, peak)
    with pytest.raises(ValueError, match=r"mobility of up: found \(1,\), accepted is shape \(3, 4, 4\)"):
        crystallization.observe(0, 1.0, 1.0, lambda p: torch.ones(1))
