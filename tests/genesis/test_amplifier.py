"""Salient units by the formula in float64, whatever the loss's scale; anchors and amplified gradients by hand."""

import math

import pytest
import torch
from torch import nn

from model.genesis.amplifier import amplify_, anchor_, position_mean, salient_units
from tests.genesis.test_replay import needs_cuda, no_host_reads


def gradient(units=32, shape=(4, 7), seed=0) -> torch.Tensor:
    """Normal noise in which units 3 and 20 are ten times as large."""
    g = torch.randn(*shape, units, generator=torch.Generator().manual_seed(seed))
    g[..., [3, 20]] *= 10
    return g


def by_hand(g: torch.Tensor, stds=2.0):
    """Mean and threshold in plain Python, float64, with D − 1 in the variance as `torch.std` has."""
    rows = g.double().abs().reshape(-1, g.shape[-1]).tolist()
    size = [sum(column) / len(rows) for column in zip(*rows)]
    mean = sum(size) / len(size)
    std = math.sqrt(sum((x - mean) ** 2 for x in size) / (len(size) - 1))
    return [float(x > mean + stds * std) for x in size], size


@pytest.mark.parametrize("shape", [(5,), (4, 7), (1, 1), (2, 3, 4)])
@pytest.mark.parametrize("stds", [0.0, 1.0, 2.0])
def test_units_above_the_threshold_are_flagged(shape, stds):
    g = gradient(shape=shape)
    mask, magnitude = salient_units(g, stds=stds)
    expected, size = by_hand(g, stds)
    assert mask.tolist() == expected and mask.dtype == magnitude.dtype == torch.float32
    torch.testing.assert_close(magnitude, torch.tensor(size), rtol=1e-5, atol=0)
    if stds == 2.0 and len(shape) > 1 and shape != (1, 1):
        assert mask.nonzero().flatten().tolist() == [3, 20]


@pytest.mark.parametrize("scale", [65536.0, 3.7e-6, 2.0**-100, 1e-33, 1e33])
@pytest.mark.parametrize("options", [{}, {"stds": 1.0}, {"top_share": 0.2}])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_scaling_the_loss_flags_the_same_units(scale, options, device):
    """Also where the squares of the gradients are beyond float32."""
    for seed in range(5):
        g = gradient(seed=seed).to(device)
        mask = salient_units(g, **options)[0]
        assert torch.equal(salient_units(g * scale, **options)[0], mask) and mask.any() and not mask.all()


def test_low_precision_gradients_are_averaged_in_float32():
    g = gradient(shape=(64, 64)).to(torch.bfloat16)
    assert torch.equal(salient_units(g)[1], salient_units(g.float())[1])


@pytest.mark.parametrize("share, flagged", [(0.01, 1), (0.1, 3), (0.25, 8), (1.0, 32)])
def test_the_top_share_is_flagged(share, flagged):
    g = gradient()
    mask, magnitude = salient_units(g, top_share=share)
    assert mask.sum() == flagged
    assert magnitude[mask > 0].min() >= magnitude[mask == 0].max() if flagged < 32 else mask.all()


def test_a_unit_without_gradient_is_never_flagged():
    g = torch.zeros(3, 8)
    for options in ({}, {"top_share": 0.5}, {"top_share": 1.0}):
        mask, magnitude = salient_units(g, **options)
        assert not mask.any() and not magnitude.any()
    g[0, 2] = 1
    assert salient_units(g, top_share=0.5)[0].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("top_share", [0.0, -0.1, 1.5, math.nan])
def test_a_bad_share_is_named(top_share):
    with pytest.raises(ValueError, match="top_share"):
        salient_units(gradient(), top_share=top_share)


def test_positions_that_do_not_count_change_nothing():
    """Whatever is at them, even what is not finite; fractions weigh."""
    g = gradient()
    weights = torch.ones(4, 7)
    weights[1:3] = 0
    mask, magnitude = salient_units(torch.cat((g[:1], g[3:])))
    for junk in (1e6, math.nan, math.inf):
        spoilt = g.clone()
        spoilt[1:3] = junk
        found, size = salient_units(spoilt, weights=weights)
        assert torch.equal(found, mask)
        torch.testing.assert_close(size, magnitude)
    assert torch.equal(salient_units(g, weights=weights.bool())[0], mask)
    halves = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(position_mean(torch.tensor([[2.0], [6.0]]), halves), torch.tensor([5.0]))
    assert not salient_units(g, weights=torch.zeros(4, 7))[0].any()
    assert position_mean(g, torch.zeros(4, 7)).tolist() == [0.0] * 32
    with pytest.raises(ValueError, match=r"\(7, 4\)"):
        salient_units(g, weights=torch.ones(7, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_flags_nothing(bad):
    g = gradient()
    g[2, 3, 9] = bad
    for options in ({}, {"top_share": 0.5}, {"weights": torch.ones(4, 7)}):
        mask, magnitude = salient_units(g, **options)
        assert not mask.any() and not magnitude.any()


def test_anchors_decay_grow_and_stay_within_their_bound():
    bias = torch.tensor([0.5, 0.5, -0.9, 0.0])
    mask, hidden = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([4.0, 4.0, -4.0, math.nan])
    anchor_(bias, mask, hidden, rate=0.1, decay=0.5, bias_max=0.6)
    torch.testing.assert_close(bias, torch.tensor([0.25, 0.6, -0.6, 0.0]))
    anchor_(bias, mask, hidden, rate=0.1, decay=1.0, bias_max=9.0, sign=torch.tensor([1.0, -1.0, 0.0, 1.0]))
    torch.testing.assert_close(bias, torch.tensor([0.25, 0.2, -0.6, 0.0]))


def test_repeated_anchoring_never_leaves_the_bound():
    bias = torch.zeros(16)
    for seed in range(200):
        hidden = 100 * torch.randn(16, generator=torch.Generator().manual_seed(seed))
        anchor_(bias, torch.ones(16), hidden, rate=1.0, decay=0.999, bias_max=0.3)
        assert bias.abs().max() <= 0.3


def test_gradients_of_feeding_weights_are_multiplied():
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    layer(torch.randn(3, 5)).square().sum().backward()
    before = layer.weight.grad.clone()
    amplify_(layer.weight.grad, torch.tensor([0.0, 1.0, 0.0, 1.0]), 2.0)
    torch.testing.assert_close(layer.weight.grad, before * torch.tensor([[1.0], [3.0], [1.0], [3.0]]))
    columns = before.clone()
    amplify_(columns, torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0]), torch.tensor(0.5), dim=1)
    torch.testing.assert_close(columns, before * torch.tensor([1.0, 1.0, 1.5, 1.0, 1.5]))


def test_nothing_is_read_on_the_host():
    g, bias = gradient(), torch.zeros(32)
    with no_host_reads():
        for options in ({}, {"top_share": 0.1}, {"weights": torch.ones(4, 7)}):
            mask, _ = salient_units(g, **options)
        anchor_(bias, mask, position_mean(g), rate=0.1, decay=0.9, bias_max=1.0, sign=position_mean(g).sign())
        amplify_(torch.ones(32, 3), mask, torch.tensor(1.0))
    assert bias.any()
