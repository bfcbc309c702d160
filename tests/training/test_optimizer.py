"""MuonAdamW against torch's AdamW, against singular values, and its exact skips."""

import copy

import pytest
import torch

from model.training.optimizer import MuonAdamW, orthogonalise
from model.training.schedule import learning_rate
from tests.conftest import make_random_model


def random_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def test_adamw_equals_torch_adamw():
    model = make_random_model()
    reference = copy.deepcopy(model)
    ours = MuonAdamW(model, optimizer="adamw", lr=1e-2, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    biases = [p for name, p in reference.named_parameters() if p.dim() < 2 or name.endswith(".bias")]
    matrices = [p for name, p in reference.named_parameters() if not (p.dim() < 2 or name.endswith(".bias"))]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-10)
    expected = dict(reference.named_parameters())
    for step in range(5):
        for name, gradient in random_gradients(model, step).items():
            expected[name].grad = gradient.clone()
            dict(model.named_parameters())[name].grad.copy_(gradient)
        theirs.step()
        ours.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
def test_orthogonalise_pulls_all_singular_values_towards_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(x))
    # The quintic of five steps ends between 0.7 and 1.2 unless a value began under about a hundredth.
    assert singular.min() > 0.3
    assert singular.max() < 1.3
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    cosine = (orthogonalise(x) * (u @ vh)).sum((-1, -2)) / (
        orthogonalise(x).norm(dim=(-1, -2)) * (u @ vh).norm(dim=(-1, -2))
    )
    assert cosine.min() > 0.95


def test_muon_step_is_its_formula():
    """One matrix, two steps, against momentum + Nesterov + polar factor written out in float64."""
    model = make_random_model()
    optimizer = MuonAdamW(model, lr=0.01, momentum=0.9, weight_decay=0.1)
    name = "blocks.0.attention.qkv.weight"  # three stacked 32 × 32 matrices
    parameter = dict(model.named_parameters())[name]
    values, first = parameter.detach().double().clone(), torch.zeros(96, 32, dtype=torch.float64)
    for step in range(2):
        gradients = random_gradients(model, step)
        for other, p in model.named_parameters():
            p.grad.copy_(gradients[other])
        optimizer.step()
        g = gradients[name].double()
        first = 0.9 * first + 0.1 * g
        update = 0.1 * g + 0.9 * first
        pieces = [orthogonalise(piece.unsqueeze(0))[0] for piece in update.chunk(3)]
        values = values - 0.01 * (0.2 * 32**0.5 * torch.cat(pieces) + 0.1 * values)
    torch.testing.assert_close(parameter.detach().double(), values, rtol=1e-4, atol=1e-5)


def test_layout_keeps_values_and_makes_views():
    model = make_random_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MuonAdamW(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad.data_ptr() >= optimizer.grads.data_ptr()
    optimizer.values.zero_()
    assert all(not p.any() for p in model.parameters())
    kinds = {
        name: next(r.kind for r in optimizer.regions if r.start <= span.start < r.stop)
        for name, (span, _) in optimizer.views.items()
    }
    assert kinds["blocks.1.memory.qkv.weight"] == kinds["head.recurrent.weight"] == "muon"
    assert kinds["head.bytes.weight"] == kinds["encoder.embedding.weight"] == kinds["start"] == "plain"


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_step_moves_nothing_and_is_counted(kind, poison):
    model = make_random_model()
    optimizer = MuonAdamW(model, optimizer=kind, lr=0.1)
    for seed in range(2):
        for name, gradient in random_gradients(model, seed).items():
            dict(model.named_parameters())[name].grad.copy_(gradient)
        optimizer.clip(1.0)
        optimizer.step()
    before = {name: x.clone() for name, x in (model.state_dict() | optimizer.state_tensors()).items()}
    model.start.grad[3] = poison
    optimizer.clip(1.0)
    optimizer.step()
    after = model.state_dict() | optimizer.state_tensors()
    assert all(torch.equal(after[name], before[name]) for name in before if name != "optimizer.skipped")
    assert optimizer.skipped.item() == 1
    # and the next finite step moves again
    model.start.grad[3] = 0.0
    optimizer.clip(1.0)
    optimizer.step()
    assert not torch.equal(model.start, before["start"])


def test_clipping_equals_torch():
    model, reference = make_random_model(), make_random_model()
    optimizer = MuonAdamW(model, optimizer="adamw", lr=0.1, eps=1.0)  # a large eps lets the gradient's size through
    other = MuonAdamW(reference, optimizer="adamw", lr=0.1, eps=1.0)
    for name, gradient in random_gradients(model, 0).items():
        dict(model.named_parameters())[name].grad.copy_(gradient)
        dict(reference.named_parameters())[name].grad.copy_(gradient)
    norm = optimizer.clip(0.5)
    expected = torch.nn.utils.clip_grad_norm_(list(reference.parameters()), 0.5)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
    optimizer.step()
    other.step()
    torch.testing.assert_close(optimizer.values, other.values, rtol=1e-5, atol=1e-7)


def test_state_goes_round():
    model = make_random_model()
    optimizer = MuonAdamW(model, lr=0.1)
    optimizer.grads.normal_()
    optimizer.step()
    state = {name: x.clone() for name, x in optimizer.state_tensors().items()}
    fresh = MuonAdamW(make_random_model(), lr=0.1)
    fresh.load_state_tensors(state)
    assert torch.equal(fresh.first, optimizer.first)
    assert torch.equal(fresh.second, optimizer.second)
    del state["optimizer.first.start"]
    with pytest.raises(ValueError, match=r"optimizer\.first\.start: found nothing"):
        fresh.load_state_tensors(state)


def test_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="optimizer='sgd': accepted are muon, adamw"):
        MuonAdamW(make_random_model(), optimizer="sgd")


def test_learning_rate_rises_stays_and_falls_to_zero():
    rates = [learning_rate(step, 1000, 2.0, 0.02, 0.3) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[19:700] == pytest.approx([2.0] * 681)
    assert rates[850] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(2 / 300)
    assert rates[19:] == sorted(rates[19:], reverse=True)
    assert learning_rate(0, 1, 2.0, 0.02, 0.3) == 2.0
