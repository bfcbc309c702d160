"""The penalty by hand, its written-out gradient against autograd, and that important weights stay."""

import pytest
import torch

from model.genesis.persistence import (
    add_consolidation_gradient_,
    consolidation_penalty,
    mobility,
    refresh_reference_,
    rowwise,
)
from tests.genesis.test_replay import no_host_reads


def case(shape=(6, 5), per_row=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, reference = (torch.randn(shape, generator=generator) for _ in range(2))
    return weight, reference, torch.rand(shape[:1] if per_row else shape, generator=generator)


def test_the_penalty_by_hand():
    weight = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    reference = torch.tensor([[0.0, 2.0], [1.0, 4.0]])
    assert consolidation_penalty(weight, reference, torch.tensor([10.0, 0.5])) == 10 * 1 + 0.5 * (4 + 1)
    assert consolidation_penalty(weight, reference, torch.zeros(2)) == 0


@pytest.mark.parametrize("shape, per_row", [((6, 5), True), ((6, 5), False), ((30,), False), ((3, 4, 2), True)])
@pytest.mark.parametrize("strength", [0.7, torch.tensor(0.7)])
def test_the_written_out_gradient_is_autograds(shape, per_row, strength):
    weight, reference, importance = case(shape, per_row)
    weight.requires_grad_()
    reference.requires_grad_()
    importance.requires_grad_()
    (strength * consolidation_penalty(weight, reference, importance)).backward()
    assert reference.grad is None and importance.grad is None
    gradient = torch.ones(shape)
    add_consolidation_gradient_(gradient, weight, reference, importance, strength)
    torch.testing.assert_close(gradient, 1 + weight.grad)


def test_important_weights_stay_near_their_reference():
    """Two weights are pulled away alike; the one with importance is held back."""
    weight, reference = torch.zeros(2, 3), torch.zeros(2, 3)
    for _ in range(100):
        gradient = torch.full((2, 3), -1.0)
        add_consolidation_gradient_(gradient, weight, reference, torch.tensor([0.0, 5.0]), 1.0)
        weight -= 0.05 * gradient
    torch.testing.assert_close(weight[0], torch.full((3,), 5.0))
    torch.testing.assert_close(weight[1], torch.full((3,), 0.1))  # 1 = 2 · 5 · w


def test_mobility_falls_with_importance():
    assert mobility(torch.tensor([0.0, 2.0, 8.0]), 3.0).tolist() == [1.0, pytest.approx(1 / 1.75), 0.25]
    assert mobility(torch.tensor([0.0, 200.0, 800.0]), 3.0).tolist() == [1.0, pytest.approx(1 / 1.75), 0.25]
    assert mobility(torch.zeros(4), 3.0).tolist() == [1.0] * 4
    assert mobility(torch.ones(2), torch.tensor(0.0)).tolist() == [1.0, 1.0]


def test_references_follow_where_the_mask_is():
    weight, reference, _ = case((4, 3))
    old = reference.clone()
    refresh_reference_(reference, weight, torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert torch.equal(reference[[0, 3]], weight[[0, 3]]) and torch.equal(reference[1:3], old[1:3])
    refresh_reference_(reference, weight, torch.tensor(0.0))
    assert torch.equal(reference[1:3], old[1:3])
    refresh_reference_(reference, weight, torch.tensor(1.0))
    assert torch.equal(reference, weight)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(5,\).*\(6, 5\)"):
        rowwise(torch.zeros(5), torch.zeros(6, 5))


def test_nothing_is_read_on_the_host():
    weight, reference, importance = case()
    with no_host_reads():
        consolidation_penalty(weight, reference, importance)
        add_consolidation_gradient_(torch.zeros(6, 5), weight, reference, importance, torch.tensor(0.1))
        refresh_reference_(reference, weight, importance > 0.5)
        mobility(importance, 1.0)
