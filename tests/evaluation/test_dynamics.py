"""Loops made by hand whose fate is known, and the model's own against its thinking steps."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from model.evaluation.dynamics import (
    CONVERGING_RATIO,
    CYCLE_RETURN,
    DRIFTING_GROWTH,
    EXPLODING_RATIO,
    KINDS,
    RESTING_STEP,
    LoopRuns,
    classify,
    run_length,
)
from model.evaluation.reasoning import measure_reasoning
from tests.conftest import make_random_model

D = 6


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(to, z=None, steps=24):
    """The judgement on z ← to(z)."""
    runs = LoopRuns(lambda z: (to(z) - z, torch.zeros(*z.shape[:-1], 1)), steps)
    runs.add(draw(3, 7, D) if z is None else z)
    return runs.report()


def shares(**shares):
    return {kind: pytest.approx(shares.get(kind, 0.0)) for kind in KINDS}


CENTRE = 5 + draw(D, seed=1)


def test_a_contraction_converges():
    found = run(lambda z: CENTRE + 0.7 * (z - CENTRE))
    assert found.kind == "converges" and found.shares == shares(converges=1.0)
    assert found.ratio == pytest.approx(0.7) and found.period is None
    assert found.growth == pytest.approx(1, abs=0.05) and found.one_back < found.two_back < 0.01


def test_a_damped_alternation_converges():
    assert run(lambda z: CENTRE - 0.8 * (z - CENTRE)).kind == "converges"


def test_rest_converges_from_anywhere():
    for z in (torch.zeros(1, 2, D), draw(1, 2, D)):
        found = run(lambda z: z, z)
        assert found.kind == "converges" and found.ratio == found.last_step == found.two_back == 0


def test_an_alternation_cycles():
    found = run(lambda z: -z)
    assert found.kind == "cycles" and found.period == 2 and found.shares == shares(cycles=1.0)
    assert found.one_back == pytest.approx(2) and found.two_back == 0
    assert found.ratio == pytest.approx(1) and found.growth == pytest.approx(1)


@pytest.mark.parametrize("period", range(2, 9))
def test_cycles_of_unequal_steps(period):
    """A permutation of so many channels in skewed coordinates: it comes back after a period, by steps of all sizes."""
    skew = draw(period, period, seed=period) + 2 * torch.eye(period)
    turn = torch.linalg.inv(skew) @ torch.roll(torch.eye(period, dtype=torch.float64), 1, 0) @ skew
    # Off the hyperplane that the permutation leaves alone, so that no shorter cycle is there.
    found = run(lambda z: z @ turn.T, draw(2, 5, period, seed=9))
    assert found.kind == "cycles" and found.period == period
    sizes = found.step_size[-period:]
    assert period == 2 or max(sizes) > 1.05 * min(sizes)


def test_a_cycle_that_is_longer_wanders():
    turn = torch.roll(torch.eye(9, dtype=torch.float64), 1, 0)
    assert run(lambda z: z @ turn.T, draw(2, 5, 9)).kind == "wanders"


def test_growth_by_a_factor_explodes():
    found = run(lambda z: 1.2 * z)
    assert found.kind == "explodes" and found.ratio == pytest.approx(1.2) and found.growth == pytest.approx(1.2**12)
    assert found.z_rms[-1] / found.z_rms[0] == pytest.approx(1.2**24)


def test_growth_beyond_all_numbers_explodes():
    z = draw(1, 3, D).float()
    found = run(lambda z: 1e3 * z, z)
    assert found.kind == "explodes" and found.last_step is None and not math.isfinite(found.z_rms[-1])


def test_growing_alternation_explodes():
    assert run(lambda z: -1.3 * z).kind == "explodes"


def test_constant_steps_drift_when_they_are_large():
    z = torch.nn.functional.normalize(draw(3, 7, D), dim=-1)
    towards = torch.nn.functional.normalize(draw(D, seed=3), dim=0)
    fast, slow = (run(lambda z, s=s: z + s * towards, z) for s in (1.0, 0.01))
    assert fast.kind == "drifts" and DRIFTING_GROWTH < fast.growth < 2.5 and fast.ratio == pytest.approx(1)
    assert slow.kind == "wanders" and slow.ratio == pytest.approx(1)


def test_a_random_walk_wanders():
    source = torch.Generator().manual_seed(4)
    found = run(lambda z: z + torch.randn(z.shape, generator=source, dtype=z.dtype), draw(2, 8, 3000))
    assert found.shares == shares(wanders=1.0) and found.growth == pytest.approx(math.sqrt(2), abs=0.05)


def test_a_turn_without_period_wanders():
    angle = 2 * math.pi / 5.5
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    assert run(lambda z: z @ turn.T, draw(2, 5, 2)).kind == "wanders"


def test_positions_are_judged_one_by_one_over_all_batches():
    z = draw(1, 10, D)
    z[0, :, 0] = torch.tensor([1.0, 1, 1, 1, 1, 1, 2, 2, 2, 3])  # the first channel says what the position does

    def to(z):
        what = z[..., :1]
        rest = z[..., 1:]
        moved = torch.where(what == 1, -rest, torch.where(what == 2, 0.5 * rest, 1.5 * rest))
        return torch.cat([what, moved], -1)

    runs = LoopRuns(lambda z: (to(z) - z, None), 24)
    runs.add(z[:, :4])
    runs.add(z[:, 4:])
    found = runs.report()
    assert found.shares == shares(cycles=0.6, converges=0.3, explodes=0.1)
    assert found.kind == "cycles" and found.period == 2
    assert "60% of positions" in found.reason and "period 2" in found.reason
    header, line = found.table().splitlines()
    assert line.split()[:6] == ["24", "30.0", "60.0", "0.0", "0.0", "10.0"] and line.split()[-1] == "2"
    assert [word for word in header.split() if word in KINDS] == list(reversed(KINDS))


def test_trajectories_equal_a_plain_loop():
    def to(z):
        return torch.tanh(z @ draw(D, D, seed=6)) + 0.3 * z

    z = draw(2, 4, D)
    found, path = run(to, z), [z]
    for _ in range(24):
        path.append(to(path[-1]))
    assert found.z_rms == pytest.approx([float(z.square().mean().sqrt()) for z in path])
    sizes = [float(((b - a).norm(dim=-1) / a.norm(dim=-1)).mean()) for a, b in pairwise(path)]
    assert found.step_size == pytest.approx(sizes)
    two = [float(((b - a).norm(dim=-1) / b.norm(dim=-1)).mean()) for a, b in zip(path, path[2:])]
    assert found.distance_two == pytest.approx(two)
    for back, distance in ((1, found.one_back), (2, found.two_back)):
        moved = (path[-1] - path[-1 - back]).norm(dim=-1) / path[-1].norm(dim=-1)
        assert distance == pytest.approx(float(np.median(moved.numpy())))


@pytest.mark.parametrize(
    "ratio, last_step, growth, returns, kind",
    [
        (CONVERGING_RATIO, 1.0, 1.0, False, "converges"),
        (CONVERGING_RATIO * 1.01, 1.0, 1.0, False, "wanders"),
        (1.0, RESTING_STEP, 1.0, False, "converges"),
        (1.0, RESTING_STEP * 1.01, 1.0, False, "wanders"),
        (1.0, 1.0, DRIFTING_GROWTH, True, "drifts"),
        (1.0, 1.0, DRIFTING_GROWTH * 0.99, True, "cycles"),
        (EXPLODING_RATIO, 1.0, DRIFTING_GROWTH, True, "explodes"),
        (EXPLODING_RATIO * 0.99, 1.0, DRIFTING_GROWTH, True, "drifts"),
        (EXPLODING_RATIO, 1.0, DRIFTING_GROWTH * 0.99, False, "wanders"),
    ],
)
def test_thresholds(ratio, last_step, growth, returns, kind):
    figures = [np.array([value]) for value in (True, ratio, last_step, growth, returns)]
    assert classify(*figures) == [kind]
    assert classify(np.array([False]), *figures[1:]) == ["explodes"]


def test_the_documented_thresholds():
    assert (CONVERGING_RATIO, RESTING_STEP, CYCLE_RETURN) == (0.9, 1e-3, 0.1)
    assert (EXPLODING_RATIO, DRIFTING_GROWTH) == (1.05, 1.5)
    assert [run_length(k) for k in (0, 1, 3, 4, 64)] == [24, 24, 24, 32, 512]


@pytest.mark.parametrize("returned, kind", [(0.99 * CYCLE_RETURN, "cycles"), (1.02 * CYCLE_RETURN, "wanders")])
def test_a_return_is_measured_in_steps(returned, kind):
    """An alternation by steps of length 1 whose centre moves sideways, so that two steps lead `returned` away."""
    side, up = torch.eye(2, dtype=torch.float64)
    ahead = returned / 2
    state = {"k": 0}

    def to(z):
        state["k"] += 1
        return z + ahead * side + math.sqrt(1 - ahead**2) * up * (-1) ** state["k"]

    assert run(to, torch.full((1, 1, 2), 40.0, dtype=torch.float64)).kind == kind


@pytest.mark.parametrize("factor, kind", [(-1.5, "converges"), (-2.0, "cycles"), (0.3, "explodes")])
def test_a_models_loop_with_another_step(random_model, monkeypatch, text, factor, kind):
    def step(z, read):
        return factor * z, torch.full((*z.shape[:2], 1), 0.5)

    monkeypatch.setattr(random_model.reasoning, "step", step)
    report = measure_reasoning(random_model, text[:200], context=64)
    assert report.dynamics.kind == kind and report.dynamics.shares[kind] == 1
    assert report.steps[1].relative == pytest.approx(abs(factor), rel=1e-5)


def test_a_models_weights_decide(text):
    """Without its MLP the loop rests; with a gate that is open and an MLP that says the same everywhere it drifts."""
    model = make_random_model()
    with torch.no_grad():
        model.reasoning.mlp.down.weight.zero_()
    assert measure_reasoning(model, text[:100]).dynamics.kind == "converges"
    with torch.no_grad():
        model.reasoning.mlp.down.weight.normal_(generator=torch.Generator().manual_seed(0))
        model.reasoning.gate.weight.zero_()
        model.reasoning.gate.bias.fill_(10)
        model.reasoning.halt.weight.zero_()
    found = measure_reasoning(model, text[:100]).dynamics
    assert found.kind == "drifts" and found.z_rms[-1] > 3 * found.z_rms[0]


def test_the_long_run_begins_as_the_thinking_steps_do(random_model, text):
    report = measure_reasoning(random_model, text[:230], steps=5, context=50, batch_size=3)
    assert report.dynamics.steps == 24
    assert report.dynamics.z_rms[:6] == pytest.approx([step.z_rms for step in report.steps], rel=1e-5)
    assert report.dynamics.step_size[:5] == pytest.approx([step.relative for step in report.steps[1:]], rel=1e-5)
