"""The seed's module and plugin: their contracts, one training step worked out by hand, and that replay remembers."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from model.genesis import GenesisPlugin, IntegratedLearningModule, SelfReplayBuffer, attach_genesis_plugin

CRITERION = nn.CrossEntropyLoss()


class CountingSGD(torch.optim.SGD):
    """Counts its calls."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.steps = self.zeros = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)

    def zero_grad(self, set_to_none=True):
        self.zeros += 1
        return super().zero_grad(set_to_none)


def batch(model, n=6, low=0):
    """A random batch for either kind of model."""
    targets = torch.randint(low, model.decoder.out_features, (n,))
    if isinstance(model, IntegratedLearningModule):
        return torch.randn(n, 5, model.encoder.input_size), targets
    return torch.randn(n, model.hidden_size), targets


def both(**options):
    torch.manual_seed(0)
    return IntegratedLearningModule(4, 12, 5, **options), GenesisPlugin(12, 5, **options)


# ── the parts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_seeds_example_runs_with_its_import_changed(capsys):
    """Section 13, word for word; it takes `torch` as imported."""
    example = """
from model.genesis import GenesisPlugin, attach_genesis_plugin
import torch.nn as nn

# Example base model
base = nn.Sequential(
    nn.Linear(32, 64),
    nn.ReLU(),
    nn.Linear(64, 10)
)

# Attach plugin to the first linear layer
plugin = GenesisPlugin(hidden_size=64, output_size=20, vocab_size=20)
# Enable gradient flow from plugin logits back to the hooked layer
handle = attach_genesis_plugin(base, plugin, layer_name='0', with_grad=True)

# After a forward pass, the plugin's logits are stored on the base model
x = torch.randn(8, 32)
_ = base(x)
print(base.genesis_logits.shape)  # torch.Size([8, 20])
"""
    scope = {"torch": torch}
    exec(example, scope)
    assert capsys.readouterr().out == "torch.Size([8, 20])\n"
    scope["handle"].remove()
    before = scope["base"].genesis_logits
    scope["base"](scope["x"])
    assert scope["base"].genesis_logits is before


def test_importing_genesis_does_not_import_the_trainer():
    code = "import sys, model.genesis; print([m for m in sys.modules if m.startswith('model.training')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_seeds_names_and_shapes():
    module = IntegratedLearningModule(8, 16, 20, vocab_size=20, disallowed_tokens=[0, 3])
    assert isinstance(module.encoder, nn.LSTM) and module.encoder.batch_first
    assert isinstance(module.decoder, nn.Linear) and isinstance(module.replay_buffer, SelfReplayBuffer)
    assert isinstance(module.anchor_bias, nn.Parameter) and module.anchor_bias.shape == (16,)
    buffers = dict(module.named_buffers())
    assert {"anchor_bias_ref", "importance_scores", "novelty_score", "steps", "ethical_mask"} <= set(buffers)
    x = torch.randn(4, 10, 8)
    logits, raw, final = module(x)
    assert logits.shape == raw.shape == (4, 20) and final.shape == (4, 16)
    assert (logits[:, [0, 3]] < -1e8).all() and torch.equal(logits[:, 4:], raw[:, 4:])
    with torch.no_grad():
        _, state = module.encoder(x[:, :6])
        expected = module.encoder(x[:, 6:], state)[0][:, -1] + module.anchor_bias
    torch.testing.assert_close(module(x[:, 6:], state)[2], expected)
    torch.testing.assert_close(final, expected)
    assert GenesisPlugin(16, 20).gate is None and not hasattr(GenesisPlugin(16, 20), "ethical_mask")


def test_the_anchor_bias_is_added_to_the_hidden_state():
    plugin = GenesisPlugin(6, 3)
    plugin.anchor_bias.data.copy_(torch.arange(6.0))
    hidden = torch.randn(2, 7, 6)
    logits, raw, final = plugin(hidden)
    torch.testing.assert_close(final, hidden + torch.arange(6.0))
    torch.testing.assert_close(logits, F.linear(hidden + torch.arange(6.0), plugin.decoder.weight, plugin.decoder.bias))
    assert logits.shape == raw.shape == (2, 7, 3)


def test_a_classifier_comes_with_the_gate():
    plugin = GenesisPlugin(
        4, 5, vocab_size=5, disallowed_tokens=[0], gate_use_classifier=True, gate_classifier_scale=2.0
    )
    with torch.no_grad():
        plugin.ethical_classifier[2].bias[2] = -9.0
    logits, raw, _ = plugin(torch.randn(3, 4))
    assert (logits[:, 0] < -1e8).all() and (logits[:, 2] < raw[:, 2] - 1.9).all()
    assert (logits[:, [1, 3, 4]] > raw[:, [1, 3, 4]] - 0.1).all()


def test_bad_arguments_are_named():
    for options, words in (
        ({"vocab_size": 6}, "vocab_size=6"),
        ({"disallowed_tokens": [1]}, "disallowed_tokens"),
        ({"vocab_size": 5, "disallowed_tokens": [5]}, "from 0 to 4"),
        ({"bias_max": -1.0}, "bias_max"),
        ({"bias_decay": 1.5}, "bias_decay"),
        ({"replay_every": 0}, "replay_every"),
        ({"replay_size": 0}, "max_size"),
    ):
        for make in (lambda **o: GenesisPlugin(4, 5, **o), lambda **o: IntegratedLearningModule(3, 4, 5, **o)):
            with pytest.raises(ValueError, match=words):
                make(**options)
    with pytest.raises(ValueError, match=r"\(2, 3\).*4"):
        GenesisPlugin(4, 5)(torch.zeros(2, 3))
    module = IntegratedLearningModule(3, 4, 5)
    for x in (torch.zeros(2, 3), torch.zeros(2, 0, 3), torch.zeros(2, 1, 4)):
        with pytest.raises(ValueError, match="x has shape"):
            module(x)
    with pytest.raises(ValueError, match=r"target has shape \(3,\): accepted is \(2,\)"):
        module.training_step(
            torch.zeros(2, 1, 3), torch.zeros(3).long(), torch.optim.SGD(module.parameters()), CRITERION
        )


# ── the training step ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("which", [0, 1])
def test_a_step_is_one_zero_grad_and_one_step_replay_included(which):
    model = both(replay_every=2)[which]
    optimizer = CountingSGD(model.parameters(), lr=0.01)
    for i in range(10):
        x, y = batch(model)
        loss = model.training_step(x, y, optimizer, CRITERION)
        assert isinstance(loss, float) and loss > 0
        assert optimizer.steps == optimizer.zeros == model.steps == i + 1
    assert len(model.replay_buffer) == 10
    hidden, target = model.replay_buffer.sample(3)
    assert hidden.shape == (3, 12) and target.shape == (3,) and model.replay_buffer.buffer[0][0].dtype == torch.float16


def test_a_step_by_hand():
    """The gradient is that of main loss + penalty + replay loss, and the learning rate is the novelty's."""
    torch.manual_seed(1)
    plugin = GenesisPlugin(12, 5, replay_every=1, amp_rate=0.0, bias_decay=1.0)
    with torch.no_grad():
        plugin.anchor_bias.normal_(std=0.1)
        plugin.importance_scores.copy_(torch.rand(12))
    old = torch.randn(12).half().float(), torch.tensor(2)
    plugin.replay_buffer.add(*old)
    hidden, target = batch(plugin)
    optimizer = torch.optim.SGD(plugin.parameters(), lr=0.1)

    bias, weight, offset = (
        p.detach().clone().requires_grad_() for p in (plugin.anchor_bias, *plugin.decoder.parameters())
    )
    main = F.cross_entropy(F.linear(hidden + bias, weight, offset), target)
    penalty = 0.3 * (plugin.importance_scores * (bias - plugin.anchor_bias_ref) ** 2).sum()
    replay = F.cross_entropy(F.linear(old[0] + bias, weight, offset)[None], old[1][None])
    (main + penalty + replay).backward()
    rate = 0.05 + 0.15 * (1 - torch.tanh(main).item())

    loss = plugin.training_step(hidden, target, optimizer, CRITERION, lambda_reg=0.3)
    assert loss == pytest.approx((main + penalty + replay).item(), rel=1e-5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    for p, expected in zip((plugin.anchor_bias, *plugin.decoder.parameters()), (bias, weight, offset)):
        torch.testing.assert_close(p, expected - rate * expected.grad, rtol=1e-4, atol=1e-6)
    stored, y, priority = plugin.replay_buffer.buffer[1]
    row = (hidden - stored.float()).abs().sum(-1).argmin()
    torch.testing.assert_close(stored.float(), hidden[row], rtol=2e-3, atol=2e-3)
    own = F.cross_entropy(F.linear(hidden[row] + bias, weight, offset), target[row])
    assert y == target[row] and priority == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_amplifier_multiplies_what_feeds_a_flagged_unit(share):
    """In the LSTM the four rows of the unit; in a base model the gradient that enters through the unit."""
    torch.manual_seed(2)
    module = IntegratedLearningModule(3, 8, 2, amp_strength=share, amp_rate=0.0)
    with torch.no_grad():
        module.decoder.weight[:, 5] *= 100
    plain = copy.deepcopy(module)
    x, y = torch.randn(4, 6, 3), torch.tensor([0, 1, 1, 0])
    CRITERION(plain(x)[0], y).backward()
    scale = 5.0 / max(5.0, nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None]).item())
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    module.training_step(x, y, optimizer, CRITERION)
    assert module.importance_scores.nonzero().flatten().tolist() == [5]
    got, expected = module.encoder.weight_hh_l0.grad, plain.encoder.weight_hh_l0.grad.clone()
    expected.view(4, 8, 8)[:, 5] *= 1 + share
    torch.testing.assert_close(got / got.norm(), expected / expected.norm(), rtol=1e-4, atol=1e-6)
    assert 0 < scale <= 1

    base, plugin = nn.Linear(3, 8), GenesisPlugin(8, 2, amp_strength=share)
    plugin.load_state_dict({k: v for k, v in plain.state_dict().items() if not k.startswith("encoder")})
    x = torch.randn(4, 3)
    CRITERION(plugin(base(x))[0], y).backward()
    expected = base.weight.grad.clone()
    expected[5] *= 1 + share
    optimizer = torch.optim.SGD([*base.parameters(), *plugin.parameters()], lr=1e-3)
    plugin.training_step(base(x), y, optimizer, CRITERION)
    got = base.weight.grad
    torch.testing.assert_close(got / got.norm(), expected / expected.norm(), rtol=1e-4, atol=1e-6)


def test_the_amplifier_anchors_counts_and_refreshes_the_reference():
    plugin = GenesisPlugin(8, 3)
    optimizer = torch.optim.SGD(plugin.parameters(), lr=1e-9)
    hidden, target = torch.ones(2, 8), torch.ones(2, dtype=torch.long)
    with torch.no_grad():
        plugin.decoder.weight.zero_()
    plugin.training_step(hidden, target, optimizer, CRITERION)
    assert not plugin.importance_scores.any() and not plugin.anchor_bias_ref.any(), "no gradient, nothing fires"
    with torch.no_grad():
        plugin.decoder.weight[0, 0] = 100.0
    plugin.training_step(hidden, target, optimizer, CRITERION)
    assert plugin.importance_scores.tolist() == [1.0] + [0.0] * 7
    assert plugin.anchor_bias[0].item() == pytest.approx(0.1, abs=1e-5) and torch.equal(
        plugin.anchor_bias_ref, plugin.anchor_bias
    )


def test_a_replayed_memory_fires_the_amplifier_again():
    """The batch has no target that may be learned from, so that the replay is alone."""
    plugin = GenesisPlugin(8, 3, vocab_size=3, disallowed_tokens=[1], replay_every=1)
    plugin.replay_buffer.add(torch.ones(8), torch.tensor(2))
    with torch.no_grad():
        plugin.decoder.weight.zero_()
        plugin.decoder.weight[0, 4] = 100.0
    optimizer = torch.optim.SGD(plugin.parameters(), lr=1e-9)
    plugin.training_step(torch.ones(2, 8), torch.ones(2, dtype=torch.long), optimizer, CRITERION)
    assert plugin.importance_scores.nonzero().flatten().tolist() == [4]
    assert plugin.anchor_bias_ref[4] > 0.09 and torch.equal(plugin.anchor_bias_ref, plugin.anchor_bias)


@pytest.mark.parametrize("which", [0, 1])
def test_the_anchor_bias_stays_within_its_bound_and_decays(which):
    model = both(bias_max=0.05, bias_decay=0.98)[which]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(30):
        model.training_step(*batch(model), optimizer, CRITERION)
        assert model.anchor_bias.abs().max() <= 0.05
    assert model.anchor_bias.any()
    with torch.no_grad():
        model.anchor_bias.fill_(0.05)
        model.decoder.weight.zero_()
    model.training_step(*batch(model), torch.optim.SGD(model.parameters(), lr=1e-12), CRITERION)
    torch.testing.assert_close(model.anchor_bias, torch.full((12,), 0.049))


def test_consolidation_holds_the_anchor_bias():
    assert both()[0].apply_consolidation(1.0) == 0
    distances = []
    for strength in (0.0, 5.0):
        model = both(amp_rate=0.0)[0]
        with torch.no_grad():
            model.importance_scores.fill_(1.0)
            model.anchor_bias.fill_(0.1)
        assert model.apply_consolidation(2.0).item() == pytest.approx(2 * 12 * 0.01)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(0)
        model.training_step(*batch(model), optimizer, CRITERION, lambda_reg=strength)
        distances.append(model.anchor_bias.detach().abs().sum().item())
    assert distances[1] < 0.6 * distances[0]


def test_the_learning_rate_follows_novelty():
    plugin = GenesisPlugin(4, 3)
    optimizer = torch.optim.SGD(
        [{"params": [plugin.anchor_bias]}, {"params": plugin.decoder.parameters(), "lr": 0.2}], lr=0.1
    )
    rates = []
    for novelty in (100.0, 2.0, 1.0, 0.3, 0.0):
        plugin.novelty_score.fill_(novelty)
        rates.append(plugin.update_learning_rate(optimizer, 1e-3, 1e-5, 1e-2))
        assert all(group["lr"] == rates[-1] for group in optimizer.param_groups)
    assert rates[0] == pytest.approx(1e-3) and rates[-1] == pytest.approx(1e-2) and rates == sorted(rates)
    assert plugin.update_learning_rate(optimizer, 1e-3, 1e-5, 5e-3) == pytest.approx(5e-3)
    assert plugin.update_learning_rate(optimizer, 1e-6, 1e-5, 2e-6) == 1e-5, "never under min_lr"
    plugin.update_learning_rate(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.4]), "around the groups' own"
    plugin.novelty_score.fill_(50.0)
    plugin.update_learning_rate(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.1])


def test_novelty_is_the_average_of_the_losses():
    plugin = both(amp_rate=0.0, replay_every=1000)[1]
    optimizer = torch.optim.SGD(plugin.parameters(), lr=0.01)
    novelty = None
    for _ in range(5):
        loss = plugin.training_step(*batch(plugin), optimizer, CRITERION)
        novelty = loss if novelty is None else 0.9 * novelty + 0.1 * loss
        assert plugin.novelty_score.item() == pytest.approx(novelty, rel=1e-5)


@pytest.mark.parametrize("kind", ["sequence", "regression", "probabilities", "uneven"])
def test_targets_of_other_kinds(kind):
    plugin = GenesisPlugin(6, 4, replay_every=2)
    optimizer = torch.optim.SGD(plugin.parameters(), lr=0.1)
    hidden = torch.randn(3, 5, 6) if kind == "sequence" else torch.randn(3, 6)
    target, criterion = {
        "sequence": (torch.randint(4, (3, 5)), CRITERION),
        "regression": (torch.randn(3, 4), nn.MSELoss()),
        "probabilities": (torch.rand(3, 4).softmax(-1), CRITERION),
        "uneven": (torch.randint(4, (3,)), nn.CrossEntropyLoss(reduction="none")),
    }[kind]
    losses = [plugin.training_step(hidden, target, optimizer, criterion) for _ in range(30)]
    assert losses[-2] < losses[0] and plugin.replay_buffer.buffer[0][0].shape == (6,)
    assert plugin.replay_buffer.buffer[0][1].shape == target.shape[hidden.dim() - 1 :]


def test_targets_that_the_criterion_ignores_are_not_remembered():
    for gate in ({}, {"vocab_size": 4, "disallowed_tokens": [0]}):
        plugin = GenesisPlugin(6, 4, replay_every=1, **gate)
        optimizer = torch.optim.SGD(plugin.parameters(), lr=0.01)
        for _ in range(20):
            loss = plugin.training_step(torch.randn(3, 6), torch.tensor([-100, 2, -100]), optimizer, CRITERION)
            assert 0 < loss < 100
        assert {int(y) for _, y, _ in plugin.replay_buffer.buffer} == {2}


@pytest.mark.parametrize("which", [0, 1])
def test_targets_that_the_gate_does_not_allow_teach_nothing(which):
    """A batch with such rows is a step on the others, to the bit of the parameters' rounding."""
    options = {"vocab_size": 5, "disallowed_tokens": [1, 2], "replay_every": 3}
    one, other = both(**options)[which], both(**options)[which]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (one, other)]
    for i in range(6):
        x, _ = batch(one, 8)
        y = torch.tensor([0, 1, 3, 2, 4, 1, 2, 0])
        good = [0, 2, 4, 7]
        torch.manual_seed(i)
        loss = one.training_step(x, y, optimizers[0], CRITERION)
        torch.manual_seed(i)
        assert (
            other.training_step(x[good], y[good], optimizers[1], CRITERION) == pytest.approx(loss, rel=1e-4)
            and loss < 100
        )
    for name, p in one.state_dict().items():
        torch.testing.assert_close(p, other.state_dict()[name], rtol=1e-3, atol=1e-5)
    assert {int(y) for _, y, _ in one.replay_buffer.buffer} <= {0, 3, 4}
    before = {name: p.clone() for name, p in one.named_parameters()}
    novelty, entries = one.novelty_score.clone(), len(one.replay_buffer)
    one.training_step(x, torch.ones(8, dtype=torch.long), optimizers[0], CRITERION)
    assert one.novelty_score == novelty and len(one.replay_buffer) == entries
    assert all(torch.equal(p, before[name]) for name, p in one.named_parameters() if name != "anchor_bias")


@pytest.mark.parametrize("which", [0, 1])
def test_a_batch_that_is_not_finite_leaves_the_parameters(which):
    model = both()[which]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model.training_step(*batch(model), optimizer, CRITERION)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    x, y = batch(model)
    x[0] = torch.nan
    model.training_step(x, y, optimizer, CRITERION)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed <= {"steps", "anchor_bias"} and model.anchor_bias.isfinite().all()
    assert optimizer.state[model.decoder.weight]["exp_avg"].isfinite().all()
    assert model.training_step(*batch(model), optimizer, CRITERION) < 100


def test_replay_keeps_what_was_learned_first():
    """Four classes, then four others: without replay the first are hardly ever predicted again."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(8, 16), torch.arange(8)
    loss = {}
    for every in (1, 10**9):
        plugin = GenesisPlugin(16, 8, replay_every=every, amp_rate=0.0)
        optimizer = torch.optim.Adam(plugin.parameters(), lr=0.02)
        for rows in (slice(0, 4), slice(4, 8)):
            for _ in range(60):
                plugin.training_step(hidden[rows], targets[rows], optimizer, CRITERION)
        loss[every] = CRITERION(plugin(hidden[:4])[0], targets[:4]).item()
        assert CRITERION(plugin(hidden[4:])[0], targets[4:]) < 0.2
    assert loss[1] < 0.3 * loss[10**9]


@pytest.mark.parametrize("which", [0, 1])
def test_a_saved_model_goes_on_exactly(tmp_path, which):
    options = {"vocab_size": 5, "disallowed_tokens": [1], "replay_every": 2, "gate_use_classifier": True}
    whole = both(**options)[which]
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    for _ in range(5):
        whole.training_step(*batch(whole, low=2), optimizer, CRITERION)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    resumed = both(**options)[which]
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"))
    again = torch.optim.SGD(resumed.parameters(), lr=0.1)
    for i in range(5):
        losses = []
        for model, opt in ((whole, optimizer), (resumed, again)):
            torch.manual_seed(i)
            losses.append(model.training_step(*batch(model, low=2), opt, CRITERION))
        assert losses[0] == losses[1]
    assert all(torch.equal(x, resumed.state_dict()[name]) for name, x in whole.state_dict().items())
    fresh = both(**options)[which]
    fresh.load_state_dict(both(**options)[which].state_dict())
    assert len(fresh.replay_buffer) == 0


# ── on a base model ──────────────────────────────────────────────────────────────────────────────────────────────────


class Tupled(nn.Module):
    """A layer whose output is more than a tensor."""

    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = nn.Linear(4, 6), wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


def test_with_grad_decides_whether_gradients_flow():
    for with_grad in (False, True):
        base, plugin = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), GenesisPlugin(6, 3)
        handle = attach_genesis_plugin(base, plugin, "0", with_grad=with_grad)
        x = torch.randn(2, 4)
        output = base(x)
        assert base.genesis_logits.requires_grad == with_grad
        torch.testing.assert_close(base.genesis_logits, plugin(base[0](x))[0])
        (output.sum() * 0 + base.genesis_logits.square().sum()).backward()
        assert base[0].weight.grad.any() == with_grad
        assert (plugin.decoder.weight.grad is not None) == with_grad
        with torch.no_grad():
            base(x)
        assert not base.genesis_logits.requires_grad
        handle.remove()


@pytest.mark.parametrize(
    "wrap", [lambda h: (None, h, 1), lambda h: [h], lambda h: {"a": 3, "b": h}, lambda h: ((h, h), h)]
)
def test_the_first_tensor_of_an_output_is_read(wrap):
    base = nn.ModuleDict({"layer": Tupled(wrap)})
    base.forward = lambda x: base["layer"](x)
    attach_genesis_plugin(base, GenesisPlugin(6, 3), "layer", output_attr="probe")
    base.forward(torch.randn(2, 7, 4))
    assert base.probe.shape == (2, 7, 3)


def test_the_base_stays_as_it_was():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    before, state = base(x), list(base.state_dict())
    handles = [attach_genesis_plugin(base, GenesisPlugin(6, 3), name, f"probe_{name}") for name in ("0", "1")]
    assert torch.equal(base(x), before) and list(base.state_dict()) == state
    assert base.probe_0.shape == base.probe_1.shape == (3, 3)
    for handle in handles:
        handle.remove()
    attach_genesis_plugin(base, GenesisPlugin(6, 3), "0", "probe_0")


def test_what_cannot_be_attached_is_named():
    base, plugin = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9))), GenesisPlugin(4, 3)
    with pytest.raises(ValueError, match=r"layer_name='head': accepted are 0, 1, 2, 3, 4, 5, …$"):
        attach_genesis_plugin(base, plugin, "head")
    for name in ("forward", "0", "not a name"):
        with pytest.raises(ValueError, match="output_attr"):
            attach_genesis_plugin(base, plugin, "0", output_attr=name)
    silent = nn.Sequential(Tupled(lambda h: None))
    attach_genesis_plugin(silent, GenesisPlugin(6, 3), "0")
    with pytest.raises(ValueError, match="NoneType"):
        silent(torch.randn(1, 4))


def test_the_plugin_has_the_bases_type_and_device():
    base, plugin = nn.Sequential(nn.Linear(4, 6).to("meta"), nn.ReLU()), GenesisPlugin(6, 3)
    attach_genesis_plugin(base, plugin, "1")
    assert plugin.anchor_bias.is_meta, "a layer without parameters is where its model is"
    base, plugin = nn.Sequential(nn.Linear(4, 6)), GenesisPlugin(6, 3)
    attach_genesis_plugin(base, plugin, "0")
    base.to("meta")(torch.randn(2, 4, device="meta"))
    assert plugin.anchor_bias.is_meta, "it follows a model that moves later"
    base, plugin = nn.Sequential(nn.Linear(4, 6).to(torch.bfloat16)), GenesisPlugin(6, 3)
    attach_genesis_plugin(base, plugin, "0")
    base(torch.randn(2, 4).to(torch.bfloat16))
    assert base.genesis_logits.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_modules_and_plugins_on_cuda():
    base, plugin = nn.Sequential(nn.Linear(4, 6)).cuda(), GenesisPlugin(6, 3, vocab_size=3, disallowed_tokens=[0])
    attach_genesis_plugin(base, plugin, "0", with_grad=True)
    assert plugin.anchor_bias.is_cuda and plugin.ethical_mask.is_cuda
    base(torch.randn(2, 4).cuda())
    assert base.genesis_logits.is_cuda
    for model in both(replay_every=2):
        optimizer = torch.optim.Adam(model.cuda().parameters(), lr=0.01)
        for _ in range(6):
            x, y = batch(model)
            assert model.training_step(x.cuda(), y.cuda(), optimizer, CRITERION) > 0
        assert model.replay_buffer.buffer[0][0].is_cuda
