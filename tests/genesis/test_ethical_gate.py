"""Disallowed tokens lose their probability and nothing else changes; the classifier lowers and blocks, untrained."""

import copy

import pytest
import torch
from torch import nn

from model.genesis import EthicalGate


def gated(gate) -> nn.Module:
    module = nn.Module()
    gate.register_to_module(module)
    return module


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 5, 7), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_disallowed_tokens_get_no_probability(shape, dtype):
    gate = EthicalGate(7, [0, 5])
    module = gated(gate)
    logits = torch.randn(shape).mul(10).to(dtype)
    filtered = gate.filter_logits(logits, module)
    allowed = [1, 2, 3, 4, 6]
    assert torch.equal(filtered[..., allowed], logits[..., allowed].to(filtered.dtype))
    assert (filtered[..., [0, 5]] < -1e8).all()
    probability = filtered.softmax(-1)
    assert not probability[..., [0, 5]].any()
    torch.testing.assert_close(probability[..., allowed], logits[..., allowed].to(filtered.dtype).softmax(-1))
    assert torch.equal(gate.filter_logits(logits, None), filtered), "its own mask, where no module has it"


def test_what_is_added_is_1e9():
    gate = EthicalGate(3, [1])
    logits = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert gate.filter_logits(logits, gated(gate)).tolist() == [1.0, 2.0 - 1e9, 3.0]


@pytest.mark.parametrize("tokens", [None, [], (), torch.tensor([], dtype=torch.int64)])
def test_without_disallowed_tokens_logits_keep_their_bits(tokens):
    gate = EthicalGate(4, tokens)
    logits = torch.randn(2, 4)
    assert torch.equal(gate.filter_logits(logits, gated(gate)), logits)


def test_the_mask_is_the_modules():
    gate = EthicalGate(4, [3])
    module = gated(gate)
    assert torch.equal(gate.mask, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert list(module.state_dict()) == ["ethical_mask"]
    module.load_state_dict({"ethical_mask": torch.tensor([0.0, 1.0, 1.0, 1.0])})
    assert gate.filter_logits(torch.zeros(4), module).argmin() == 0
    module.half()
    assert (gate.filter_logits(torch.zeros(4), module) < -1e8).tolist() == [True, False, False, False]
    gate.register_to_module(module)
    assert gate.filter_logits(torch.zeros(4), module).argmin() == 3


def test_gradients_pass_through_the_gate():
    gate = EthicalGate(3, [0])
    logits = torch.zeros(3, requires_grad=True)
    gate.filter_logits(logits, gated(gate)).softmax(-1)[1].backward()
    torch.testing.assert_close(logits.grad, torch.tensor([0.0, 0.25, -0.25]))


def test_bad_arguments_are_named():
    for options, words in (
        ({"disallowed_tokens": [4]}, "disallowed_tokens.*from 0 to 3"),
        ({"disallowed_tokens": [-1]}, "disallowed_tokens.*from 0 to 3"),
        ({"disallowed_tokens": range(4)}, "leaves a token"),
        ({"classifier_scale": -1.0}, "classifier_scale"),
        ({"classifier_hidden": 0}, "classifier_hidden"),
        ({"block_below": 1.0}, "block_below"),
    ):
        with pytest.raises(ValueError, match=words):
            EthicalGate(4, **options)
    with pytest.raises(ValueError, match="vocab_size=0"):
        EthicalGate(0)
    with pytest.raises(ValueError, match=r"\(2, 5\).*4"):
        EthicalGate(4).filter_logits(torch.zeros(2, 5), None)


# ── the classifier ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_untrained_classifier_lets_everything_pass():
    gate = EthicalGate(6, [0], use_classifier=True)
    module, logits = gated(gate), torch.randn(5, 6)
    filtered = gate.filter_logits_with_classifier(logits, module)
    torch.testing.assert_close(filtered[:, 1:], logits[:, 1:], rtol=0, atol=0.01)
    assert (filtered[:, 0] < -1e8).all()
    without = EthicalGate(6, [0])
    assert torch.equal(without.filter_logits_with_classifier(logits, module), without.filter_logits(logits, module)), (
        "without a classifier it is the list alone"
    )


def test_tokens_are_lowered_by_their_lack_of_safety():
    gate = EthicalGate(3, [0], use_classifier=True, classifier_scale=2.0)
    module = gated(gate)
    safety = torch.tensor([0.9, 0.25, 0.75])
    with torch.no_grad():
        for parameter in module.ethical_classifier.parameters():
            parameter.zero_()
        module.ethical_classifier[2].bias.copy_(safety.logit())
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    filtered = gate.filter_logits_with_classifier(logits, module)
    torch.testing.assert_close(filtered[0, 1:], torch.tensor([2.0 - 2 * 0.75, 3.0 - 2 * 0.25]))
    assert filtered[0, 0] < -1e8
    gate.block_below = 0.5
    filtered = gate.filter_logits_with_classifier(logits, module)
    assert (filtered < -1e8).tolist() == [[True, True, False]]


def test_a_classifier_learns_to_lower_a_token_in_a_context():
    """Token 2 is unsafe where the hidden state's first unit is positive, and nowhere else."""
    torch.manual_seed(0)
    gate = EthicalGate(3, use_classifier=True, classifier_inputs=4)
    module = gated(gate)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(200):
        hidden = torch.randn(64, 4)
        label = torch.ones(64, 3)
        label[:, 2] = (hidden[:, 0] < 0).float()
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy(module.ethical_classifier(hidden), label).backward()
        optimizer.step()
    hidden = torch.tensor([[1.5, 0.0, 0.0, 0.0], [-1.5, 0.0, 0.0, 0.0]])
    filtered = gate.filter_logits_with_classifier(torch.zeros(2, 3), module, hidden)
    assert filtered[0, 2] < -4 and (filtered[0, :2] > -0.5).all() and (filtered[1] > -0.5).all()
    for wrong in (None, torch.zeros(2, 5)):
        with pytest.raises(ValueError, match="hidden="):
            gate.filter_logits_with_classifier(torch.zeros(2, 3), module, wrong)


def test_no_gradient_of_a_filtered_logit_reaches_the_classifier():
    gate = EthicalGate(3, use_classifier=True)
    module, logits = gated(gate), torch.randn(2, 3, requires_grad=True)
    gate.filter_logits_with_classifier(logits, module).logsumexp(-1).sum().backward()
    assert all(p.grad is None for p in module.ethical_classifier.parameters())
    torch.testing.assert_close(logits.grad.sum(-1), torch.ones(2))


def test_classifiers_of_several_gates_share_a_module():
    first, second, plain = (EthicalGate(3, use_classifier=use) for use in (True, True, False))
    module = gated(first)
    second.register_to_module(module)
    plain.register_to_module(module)
    first.register_to_module(module)
    assert module.ethical_classifier is first.classifier and module.ethical_classifier_1 is second.classifier
    assert len(list(module.children())) == 2


def test_a_copy_has_its_own_classifier():
    holder = nn.Module()
    holder.gate = EthicalGate(3, use_classifier=True)
    holder.gate.register_to_module(holder)
    other = copy.deepcopy(holder)
    assert (
        other.gate.classifier is other.ethical_classifier and other.ethical_classifier is not holder.ethical_classifier
    )


def test_which_tokens_may_be_learned_from():
    gate = EthicalGate(4, [1, 3])
    tokens = torch.tensor([[0, 1, 2], [3, -100, 4]])
    assert gate.allowed(tokens).tolist() == [[True, False, True], [False, True, True]]
    assert gate.allowed(tokens.to(torch.uint8)[:1], gated(gate)).tolist() == [[True, False, True]]
