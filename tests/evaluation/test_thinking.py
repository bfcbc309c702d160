import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.evaluation.distribution import UnitHistogram
from model.evaluation.reasoning import (
    DEFAULT_TEXT,
    DORMANT_GAIN,
    DORMANT_SIZE,
    UNSTABLE_LOSS,
    UNSTABLE_SIZE,
    StepReport,
    judge,
    measure_reasoning,
    thinking_trace,
)
from model.evaluation.report import json_text
from tests.conftest import make_random_model


@pytest.fixture(scope="module")
def x(text):
    return torch.tensor([list(text[:101]), list(text[200:301])])


@torch.no_grad()
def test_every_step_decodes_as_the_model_does(random_model, x):
    for k, step in enumerate(thinking_trace(random_model, x, 6)):
        assert torch.equal(step.logits, random_model(x, thinking_steps=k))
    assert k == 6


@torch.no_grad()
def test_steps_are_the_formula(random_model, x):
    steps = list(thinking_trace(random_model, x, 3))
    block = random_model.reasoning
    for before, after in pairwise(steps):
        rms = before.z.double().square().mean(-1, keepdim=True).add(1e-6).sqrt()
        normed = (before.z.double() / rms).float()
        p_halt = torch.sigmoid(normed @ block.halt.weight.T + block.halt.bias)
        gate = torch.sigmoid(normed @ block.gate.weight.T + block.gate.bias)
        torch.testing.assert_close(after.p_halt, p_halt, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after.gate, gate, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after.delta, (1 - p_halt) * gate * block.mlp(normed), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(after.z, before.z + after.delta)


@torch.no_grad()
def test_added_columns_pass_the_loop_by(tiny_model, x):
    model = tiny_model(growth=("grow 0", "widen 48"))
    for k, step in enumerate(thinking_trace(model, x, 4)):
        assert torch.equal(step.logits, model(x, thinking_steps=k))


def test_the_hooks_are_gone_afterwards(random_model, x):
    list(thinking_trace(random_model, x, 1))
    assert not random_model.reasoning._forward_pre_hooks and not random_model.head._forward_pre_hooks


@torch.no_grad()
def test_numbers_equal_a_reference_over_all_windows(random_model, text):
    """Windows and batches of odd sizes against one list of positions per step, made window by window."""
    text, context = text[:230], 50
    report = measure_reasoning(random_model, text, steps=4, context=context, batch_size=3)
    traces = [
        list(thinking_trace(random_model, torch.tensor([list(text[i : i + context])]), 4))
        for i in range(0, len(text), context)
    ]
    assert report.bytes == 230 and report.thinking_steps == 3 and len(report.steps) == 5
    for k, step in enumerate(report.steps):
        z = torch.cat([trace[k].z[0] for trace in traces]).double()
        logits = torch.cat([trace[k].logits[0] for trace in traces]).double()
        bpc = float(F.cross_entropy(logits, torch.tensor(list(text)))) / math.log(2)
        assert step.step == k and step.bpc == pytest.approx(bpc, rel=1e-5)
        assert step.z_rms == pytest.approx(float(z.square().mean().sqrt()), rel=1e-5)
        if k == 0:
            assert step.delta_rms is step.relative is step.cosine_z is step.halt_mean is step.halt_histogram is None
            assert step.gate_mean is step.gate_quantiles is step.gate_closed is None
            continue
        delta = torch.cat([trace[k].delta[0] for trace in traces]).double()
        before = torch.cat([trace[k - 1].z[0] for trace in traces]).double()
        halts = torch.cat([trace[k].p_halt[0] for trace in traces]).double().flatten()
        assert step.delta_rms == pytest.approx(float(delta.square().mean().sqrt()), rel=1e-4)
        assert step.relative == pytest.approx(float((delta.norm(dim=1) / before.norm(dim=1)).mean()), rel=1e-4)
        assert step.halt_mean == pytest.approx(float(halts.mean()), rel=1e-4)
        assert step.halt_quantiles == pytest.approx([float(halts.quantile(q)) for q in (0.05, 0.5, 0.95)], rel=1e-3)
        shares = [((halts >= i / 10) & ((halts < (i + 1) / 10) | (i == 9))).double().mean() for i in range(10)]
        assert step.halt_histogram == pytest.approx([float(share) for share in shares])
        gates = torch.cat([trace[k].gate[0] for trace in traces]).double()
        assert step.gate_mean == pytest.approx(float(gates.mean()), rel=1e-4)
        expected = np.quantile(gates.numpy(), (0.05, 0.5, 0.95), method="inverted_cdf")
        assert step.gate_quantiles == pytest.approx(expected, abs=6e-4)
        assert step.gate_closed == pytest.approx(float((gates < 0.1).double().mean()), abs=1e-6)
        assert step.gate_open == pytest.approx(float((gates >= 0.9).double().mean()), abs=1e-6)
        assert 0 < step.gate_closed < 1 and 0 < step.gate_open < 1
        cosine = (delta * before).sum(1) / delta.norm(dim=1) / before.norm(dim=1)
        assert step.cosine_z == pytest.approx(float(cosine.mean()), rel=1e-4)
        if k == 1:
            assert step.cosine is step.angle is None
        else:
            last = torch.cat([trace[k - 1].delta[0] for trace in traces]).double()
            cosine = (delta * last).sum(1) / delta.norm(dim=1) / last.norm(dim=1)
            assert step.cosine == pytest.approx(float(cosine.mean()), rel=1e-4)
            assert step.angle == pytest.approx(float(torch.rad2deg(torch.acos(cosine)).mean()), rel=1e-4)


@torch.no_grad()
def test_halting_of_all_sizes(text):
    model = make_random_model()
    model.reasoning.halt.weight.mul_(4)
    model.reasoning.halt.bias.zero_()
    report = measure_reasoning(model, text[:600])
    (first, *_) = list(thinking_trace(model, torch.tensor([list(text[:600])]), 1))[1:]
    halts = first.p_halt.double().flatten().tolist()
    shares = [sum(i / 10 <= p < (i + 1) / 10 for p in halts) / len(halts) for i in range(10)]
    assert report.steps[1].halt_histogram == pytest.approx(shares) and min(shares) > 0
    assert f"{100 * shares[9]:.1f}" == report.halting_table().splitlines()[1].split()[-1]


def test_a_fresh_model_is_dormant_and_goes_to_twice_k(fresh_model):
    report = measure_reasoning(fresh_model)
    assert report.verdict == "dormant" and len(report.steps) == 7
    assert report.bytes == len(DEFAULT_TEXT) == 595  # docs/diagnostics.md names it
    assert all(step.bpc == pytest.approx(8) and not step.delta_rms for step in report.steps)
    assert report.steps[1].halt_mean == pytest.approx(1 / (1 + math.exp(3)))
    assert len(report.table().splitlines()) == 8 and "← K" in report.table().splitlines()[4]
    assert len(report.halting_table().splitlines()) == len(report.gate_table().splitlines()) == 7
    assert report.dynamics.kind == "converges" and not report.gains.best and not report.gains.worst


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_other_numbers_of_steps_change_no_step_and_no_gain(random_model, text, steps):
    report, usual = (measure_reasoning(random_model, text[:90], steps=n, context=40) for n in (steps, 3))
    assert len(report.steps) == steps + 1 and report.steps[: min(steps, 3) + 1] == usual.steps[: steps + 1]
    assert report.gains == usual.gains and report.dynamics == usual.dynamics


def test_a_model_without_thinking_steps(tiny_model, text):
    report = measure_reasoning(tiny_model(thinking_steps=0), text[:50])
    assert report.verdict == "dormant" and len(report.steps) == 3 and report.dynamics.steps == 24
    assert report.gains.steps == 0 and report.gains.extremes_table() == "no byte changes"
    assert len(measure_reasoning(tiny_model(thinking_steps=0), b"a", steps=0).gate_table().splitlines()) == 1


def test_numbers_that_are_not_finite_are_unstable():
    model = make_random_model()
    with torch.no_grad():
        model.reasoning.gate.weight[0] = math.nan
    report = measure_reasoning(model, "Işık".encode())
    assert report.verdict == "unstable" and report.dynamics.kind == "explodes"
    for table in (report.table(), report.halting_table(), report.gate_table(), report.gains.table()):
        assert table
    assert json.loads(json_text(report.to_dict()))["steps"][1]["delta_rms"] is None


def test_a_histogram_counts_as_its_values_do():
    values = torch.rand(3, 777, generator=torch.Generator().manual_seed(2)) ** 3
    counted = UnitHistogram()
    for part in values:
        counted.add(part)
    flat = values.double().numpy().ravel()
    assert counted.mean == pytest.approx(flat.mean(), rel=1e-9)
    levels = (0.0, 0.05, 0.5, 0.95, 1.0)
    expected = np.quantile(flat, levels, method="inverted_cdf")
    assert counted.quantiles(levels) == pytest.approx(expected, abs=5.1e-4)
    assert counted.below(0.1) == (flat < 0.1).mean() and counted.above(0.9) == pytest.approx((flat >= 0.9).mean())


def test_a_histogram_of_the_ends_of_nothing_and_of_nan():
    ends = UnitHistogram()
    ends.add(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert ends.below(0.1) == 0.75 and ends.above(0.9) == 0.25
    assert ends.quantiles((0.5, 1.0)) == pytest.approx((0, 1), abs=1e-3)
    nothing = UnitHistogram()
    assert nothing.mean is nothing.quantiles() is nothing.below(0.1) is nothing.above(0.9) is None
    nothing.add(torch.tensor([math.nan]))
    assert math.isnan(nothing.mean) and nothing.quantiles() is None


def steps_of(sizes, bpcs):
    return [StepReport(k, bpc, 1.0, relative=size) for k, (size, bpc) in enumerate(zip([None, *sizes], bpcs))]


@pytest.mark.parametrize(
    "sizes, bpcs, verdict",
    [
        ([0.3, 0.2, 0.1], [3.0, 2.8, 2.7, 2.6], "active"),
        ([DORMANT_SIZE * 0.99] * 3, [3.0] * 4, "dormant"),
        ([DORMANT_SIZE, 0.0, 0.0], [3.0] * 4, "active"),
        ([DORMANT_SIZE / 2] * 3, [3.0, 3.0, 3.0, 3.0 - DORMANT_GAIN * 1.01], "active"),
        ([DORMANT_SIZE / 2] * 3, [3.0, 3.0, 3.0, 3.0 - DORMANT_GAIN * 0.99], "dormant"),
        ([0.1, UNSTABLE_SIZE, 0.1], [3.0] * 4, "unstable"),
        ([0.1, UNSTABLE_SIZE * 0.99, 0.1], [3.0] * 4, "active"),
        ([0.1, 0.1, 0.1], [3.0, 3.0, 3.0, 3.0 + UNSTABLE_LOSS * 1.01], "unstable"),
        ([0.1, 0.1, 0.1], [3.0, 9.0, 9.0, 3.0 + UNSTABLE_LOSS * 0.99], "active"),
        ([0.1, math.nan, 0.1], [3.0] * 4, "unstable"),
        ([0.1, 0.1, 0.1], [3.0, math.inf, 3.0, 3.0], "unstable"),
        # Beyond the configured three steps nothing counts.
        ([0.1, 0.1, 0.1, math.nan], [3.0, 3.0, 3.0, 3.0, 99.0], "active"),
    ],
)
def test_verdict_thresholds(sizes, bpcs, verdict):
    assert judge(steps_of(sizes, bpcs), 3)[0] == verdict


def test_no_steps_is_dormant():
    assert judge(steps_of([0.5], [3.0, 2.0]), 0)[0] == "dormant"


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"data": b""}, "data"),
        ({"steps": -1}, "steps=-1"),
        ({"context": 0}, "context=0"),
        ({"top": -1}, "top=-1"),
        ({"top": True}, "top=True"),
        ({"max_bytes": 0}, "max_bytes=0"),
    ],
)
def test_bad_arguments_are_named(fresh_model, arguments, named):
    with pytest.raises(ValueError, match=named):
        measure_reasoning(fresh_model, **({"data": b"abc"} | arguments))


def test_the_documented_thresholds():
    assert (DORMANT_SIZE, DORMANT_GAIN, UNSTABLE_SIZE, UNSTABLE_LOSS) == (0.01, 0.01, 2.0, 0.5)
