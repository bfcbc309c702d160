"""Novelty and progress by their formulas, a boom where one is and none where none is, and what follows from it."""

import math
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.genesis.learning_curve import LearningCurve, LearningCurveOptions
from tests.genesis.test_replay import no_host_reads


def follow(losses, **options) -> LearningCurve:
    curve = LearningCurve(LearningCurveOptions(**options))
    for loss in losses:
        curve.update(torch.tensor(loss))
    return curve


def noisy(f, n, seed=0):
    generator = random.Random(seed)
    return [f(t) * (1 + 0.05 * generator.gauss(0, 1)) for t in range(n)]


def spurt(t):
    """A plateau at 3, and from step 400 on a fall to 2 within about 50 steps."""
    return 2 + 1 / (1 + math.exp((t - 430) / 10))


def test_novelty_and_progress_are_weighted_means():
    losses = noisy(lambda t: 5 * math.exp(-t / 100) + 1, 300)
    for n in (1, 2, 37, 300):
        curve = follow(losses[:n], novelty_decay=0.9, slow_decay=0.98)
        means = []
        for decay in (0.9, 0.98):
            weights = [decay ** (n - 1 - t) for t in range(n)]
            means.append(sum(w * x for w, x in zip(weights, losses)) / sum(weights))
        assert curve.novelty().item() == pytest.approx(means[0], rel=1e-5)
        assert curve.progress().item() == pytest.approx((means[1] - means[0]) / means[1], abs=1e-6)


def test_before_the_first_loss():
    curve = LearningCurve()
    assert curve.novelty() == curve.progress() == curve.steps == 0 and curve.boom_step == -1 and not curve.boomed
    assert curve.rate_factor() == 0.5


def test_a_sustained_drop_is_the_boom():
    """The loss steps from 4 to 1.5; novelty is under half of 4 once 0.9^k · 2.5 < 0.5, at k = 16, for 10 steps."""
    options = {"novelty_decay": 0.9, "slow_decay": 0.99, "patience": 10, "settle": 20, "spike": 1e6}
    losses = [4.0] * 100 + [1.5] * 100
    curve = follow(losses, **options)
    assert curve.boomed and curve.boom_step == 100 + 16 + 9
    assert not follow(losses[: 100 + 16 + 8], **options).boomed
    assert curve.start == 4.0


def test_a_drop_that_does_not_last_is_not():
    losses = ([4.0] * 50 + [1.0] * 18) * 6
    curve = follow(losses, novelty_decay=0.9, slow_decay=0.99, patience=25, spike=1e6)
    assert not curve.boomed and curve.boom_step == -1


def test_a_spike_in_progress_is_the_boom():
    curve = follow(noisy(spurt, 700), drop=0.1, novelty_decay=0.9, slow_decay=0.99, patience=20)
    assert 405 + 20 <= curve.boom_step < 470


@pytest.mark.parametrize(
    "name, loss",
    [
        ("plateau", lambda t: 3.0),
        ("slow fall", lambda t: 3.0 + 2.5 * math.exp(-t / 300)),
        ("power law", lambda t: 5.5 * (1 + t) ** -0.08),
        ("rise", lambda t: 2.0 + t / 500),
    ],
)
def test_no_boom_where_there_is_none(name, loss):
    assert not follow(noisy(loss, 1000)).boomed, name


def test_a_small_gain_after_a_long_plateau_is_no_spike():
    assert not follow([3.0] * 300 + [2.98] * 300).boomed
    assert follow([3.0] * 300 + [2.98] * 300, least_progress=0.0).boomed


def test_what_is_not_finite_only_counts_as_a_step():
    losses = [4.0, 3.0, 2.0, 1.0] * 20
    spoilt = list(losses)
    for place, bad in ((60, math.nan), (45, math.inf), (30, -math.inf)):
        spoilt.insert(place, bad)
    one, other = follow(losses), follow(spoilt)
    assert other.steps == one.steps + 3
    for name in ("averages", "start", "sustained"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-6, atol=0)
    assert follow([math.nan, 2.0]).novelty() == 2.0


def test_the_rate_ramps_after_the_boom_and_the_boom_stays():
    options = {"patience": 5, "settle": 5, "ramp": 40, "slow": 0.5, "boost": 2.5}
    options |= {"novelty_decay": 0.5, "slow_decay": 0.9}
    curve = follow([4.0] * 30 + [1.0] * 30, **options)
    boom = int(curve.boom_step)
    assert 30 < boom < 45
    follow_on = {}
    for step in range(61, 140):
        curve.update(torch.tensor(4.0))  # the loss is up again, the boom is not undone
        follow_on[step] = curve.rate_factor().item()
    assert curve.boom_step == boom
    for step, rate in follow_on.items():
        maturity = min(1.0, (step - boom) / 40)
        assert rate == pytest.approx(0.5 + 2 * maturity, rel=1e-6)
    assert follow_on[139] == 2.5


def test_a_saved_curve_goes_on_exactly(tmp_path):
    losses = noisy(spurt, 600)
    whole = LearningCurve(LearningCurveOptions(drop=0.1, patience=20, novelty_decay=0.9, slow_decay=0.99))
    for step, loss in enumerate(losses):
        if step in (0, 5, 420, 599):
            save_file(whole.state_dict(), tmp_path / f"{step}.safetensors")
        whole.update(torch.tensor(loss))
    assert whole.boomed
    for cut in (0, 5, 420, 599):
        second = LearningCurve(whole.options)
        second.load_state_dict(load_file(tmp_path / f"{cut}.safetensors"))
        for loss in losses[cut:]:
            second.update(torch.tensor(loss))
        assert all(torch.equal(x, y) for x, y in zip(whole.buffers(), second.buffers(), strict=True))


def test_options_are_checked():
    for name, value in (
        *(("slow", 0), ("boost", -1), ("ramp", 0), ("ramp", 1.5), ("drop", 1), ("spike", 1), ("patience", True)),
        *(("settle", 0), ("least_progress", -0.1), ("slow_decay", 1.0), ("shortest", 0), ("narrowest", 1.1)),
        *(("drop", "half"), ("novelty_decay", 0.9995)),
    ):
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            LearningCurveOptions(**{name: value})


def test_nothing_is_read_on_the_host():
    curve = LearningCurve()
    with no_host_reads():
        for loss in torch.rand(30):
            curve.update(loss)
            curve.rate_factor()
    assert curve.steps == 30
