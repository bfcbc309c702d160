"""GradNorm's weights against autograd on the paper's formula, and what they do to losses of unlike scale."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.genesis.balance import GradNorm
from tests.genesis.test_replay import no_host_reads


def by_autograd(weights, initial, losses, norms, alpha, lr):
    """Chen et al. 2018, algorithm 1, in float64: L_grad is differentiated by the weights, its target being constant."""
    w = weights.double().clone().requires_grad_()
    size = w * norms.double()
    ratio = losses.double() / initial.double()
    target = (size.mean() * (ratio / ratio.mean()) ** alpha).detach()
    (size - target).abs().sum().backward()
    new = w.detach() - lr * w.grad
    return new * len(w) / new.sum()


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_steps_are_those_of_autograd(n, alpha):
    generator = torch.Generator().manual_seed(n)
    balance = GradNorm(n, alpha=alpha, lr=0.01)
    initial = torch.rand(n, generator=generator) + 1
    losses = initial
    for _ in range(10):
        norms = torch.rand(n, generator=generator) + 0.1
        expected = by_autograd(balance.weights, initial, losses, norms, alpha, 0.01)
        balance.update(losses, norms)
        torch.testing.assert_close(balance.weights.double(), expected, rtol=1e-5, atol=0)
        assert balance.weights.sum().item() == pytest.approx(n, rel=1e-6)
        losses = losses * (0.5 + 0.5 * torch.rand(n, generator=generator))
    assert torch.equal(balance.initial, initial)


def test_the_loss_that_lags_and_the_small_gradient_gain():
    balance = GradNorm(2)
    for t in range(50):
        balance.update(torch.tensor([math.exp(-t / 10), 1.0]), torch.tensor([1.0, 1.0]))
    assert balance.weights[1] > 1.5 > balance.weights[0] > 0
    balance = GradNorm(2, alpha=0.0)
    for _ in range(500):
        balance.update(torch.ones(2), torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(balance.weights * torch.tensor([3.0, 1.0]), torch.tensor([1.5, 1.5]), rtol=0.1, atol=0)


def test_weights_stay_positive_and_sum_to_n():
    balance = GradNorm(3, lr=0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        balance.update(torch.rand(3, generator=generator), 10 * torch.rand(3, generator=generator))
        assert (balance.weights > 0).all() and balance.weights.sum().item() == pytest.approx(3, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_what_is_not_finite_counts_as_absent(bad, where):
    balance = GradNorm(3)
    balance.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 0.5]))
    before = balance.weights.clone()
    values = {"loss": torch.tensor([1.0, 1.0, 1.0]), "norm": torch.ones(3)}
    values[where][1] = bad
    balance.update(values["loss"], values["norm"])
    assert balance.weights[1] == before[1] and balance.weights[0] != before[0]
    assert balance.weights.sum().item() == pytest.approx(3, rel=1e-6)
    values[where][:] = bad
    before = balance.weights.clone()
    balance.update(values["loss"], values["norm"])
    assert torch.equal(balance.weights, before) and torch.equal(balance.initial, torch.tensor([1.0, 2.0, 3.0]))


def test_gradients_beyond_float32_leave_the_weights():
    balance = GradNorm(2, lr=100.0)
    balance.update(torch.tensor([1.0, 2.0]), torch.tensor([3e38, 3e38]))
    assert balance.weights.isfinite().all() and balance.weights.sum().item() == pytest.approx(2)


def test_a_loss_that_comes_later_starts_from_its_own_first_value():
    """Replay has no loss while nothing is stored; the two others go on as if they were alone."""
    three, two = GradNorm(3), GradNorm(2)
    for t in range(5):
        losses, norms = torch.tensor([2.0 / (1 + t), 1.0]), torch.tensor([1.0, 0.4])
        three.update(torch.cat((losses, torch.zeros(1))), torch.cat((norms, torch.zeros(1))))
        two.update(losses, norms)
    torch.testing.assert_close(three.weights, torch.cat((two.weights, torch.ones(1))))
    assert three.initial.tolist() == [2.0, 1.0, 0.0]
    three.update(torch.tensor([0.3, 1.0, 7.0]), torch.tensor([1.0, 0.4, 1.0]))
    assert three.initial.tolist() == [2.0, 1.0, 7.0] and three.weights[2] != 1


def test_bad_input_is_named():
    for options in ({"n": 0}, {"n": 1.5}, {"n": 2, "alpha": -1}, {"n": 2, "lr": -0.1}):
        with pytest.raises(ValueError, match="accepted"):
            GradNorm(**options)
    with pytest.raises(ValueError, match=r"losses \(3,\).*\(2,\)"):
        GradNorm(2).update(torch.ones(3), torch.ones(2))


def test_saved_weights_go_on_exactly(tmp_path):
    steps = [(torch.rand(3) + 0.1, torch.rand(3) + 0.1) for _ in range(6)]
    whole, first = GradNorm(3), GradNorm(3)
    for losses, norms in steps:
        whole.update(losses, norms)
    for losses, norms in steps[:3]:
        first.update(losses, norms)
    save_file(first.state_dict(), tmp_path / "balance.safetensors")
    second = GradNorm(3)
    second.load_state_dict(load_file(tmp_path / "balance.safetensors"))
    for losses, norms in steps[3:]:
        second.update(losses, norms)
    assert torch.equal(second.weights, whole.weights)


def test_nothing_is_read_on_the_host():
    balance = GradNorm(3)
    with no_host_reads():
        for _ in range(3):
            balance.update(torch.rand(3), torch.rand(3))
