"""The training step: it learns, skips on the device, scales for fp16, and its graph gives the eager numbers."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from model.data.recall import TOLD
from model.training.optimizer import MuonAdamW
from model.training.step import EAGER_STEPS, TrainingStep
from tests.conftest import make_random_model

TEXT = torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy dog. " * 20), dtype=torch.uint8)


def batches(count: int, B: int = 4, L: int = 64):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        starts = torch.randint(0, len(TEXT) - L, (B,), generator=generator)
        yield torch.stack([TEXT[i : i + L] for i in starts.tolist()])


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
def test_it_learns_a_repeated_sentence(kind, amp_dtype):
    model = make_random_model()
    with torch.no_grad():
        model.head.output.weight.zero_()
        model.head.memory.output.weight.zero_()
    step = TrainingStep(model, MuonAdamW(model, optimizer=kind, lr=1e-2), amp_dtype=amp_dtype)
    losses = [step.run(batch).item() / math.log(2) for batch in batches(25)]
    assert losses[0] == pytest.approx(8.0, abs=0.01)
    assert sum(losses[-5:]) / 5 < 2.0
    assert step.optimizer.skipped.item() == 0


@pytest.mark.parametrize("amp_dtype", [None, torch.float16])
def test_the_norm_is_that_of_the_gradients_before_they_are_clipped(amp_dtype):
    model = make_random_model()
    before = copy.deepcopy(model)
    step = TrainingStep(model, MuonAdamW(model, lr=1e-3), amp_dtype=amp_dtype, clip_norm=1e-3)
    (batch,) = batches(1)
    step.run(batch)
    with torch.autocast("cpu", amp_dtype, enabled=amp_dtype is not None):
        before.loss(batch).backward()
    squares = sum(p.grad.double().square().sum() for p in before.parameters() if p.grad is not None)
    assert squares.sqrt() > 0.01
    assert step.norm.item() == pytest.approx(squares.sqrt().item(), rel=1e-3 if amp_dtype is None else 2e-2)


def test_float16_overflow_is_skipped_and_the_scale_falls():
    model = make_random_model()
    step = TrainingStep(model, MuonAdamW(model, lr=1e-3), amp_dtype=torch.float16)
    (batch,) = batches(1)
    step.run(batch)
    step.scaler.update(2.0**40)  # far beyond what float16 gradients can carry
    before = model.start.detach().clone()
    step.run(batch)
    assert step.optimizer.skipped.item() == 1
    assert torch.equal(model.start, before)
    assert step.scaler.get_scale() == 2.0**39
    state = step.state_tensors()
    assert state["scaler.scale"].item() == 2.0**39
    other = TrainingStep(make_random_model(), MuonAdamW(make_random_model()), amp_dtype=torch.float16)
    other.optimizer = MuonAdamW(other.model)
    other.load_state_tensors(state)
    assert other.scaler.get_scale() == 2.0**39


@pytest.mark.parametrize("amp_dtype", [None, torch.float16])
def test_a_poisoned_batch_changes_nothing(amp_dtype):
    """A loss that is not finite, as from a broken input: the step is skipped on the device and training goes on."""
    model = make_random_model()
    step = TrainingStep(model, MuonAdamW(model, lr=1e-3), amp_dtype=amp_dtype)
    first, second = batches(2)
    step.run(first)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    true_loss = model.loss
    model.loss = lambda x: true_loss(x) * float("nan")
    step.run(second)
    model.loss = true_loss
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert step.optimizer.skipped.item() == 1
    assert math.isfinite(step.run(second).item())
    assert step.optimizer.skipped.item() == 1


def host_reads(step: TrainingStep, weights: torch.Tensor | None = None) -> tuple[list[str], list[str]]:
    """(all operations of one step, those that read a value on the host: a local_scalar_dense, nonzero or the like)."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    (batch,) = batches(1)
    with Spy():
        step.run(batch, weights)
    forbidden = ("local_scalar", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
    return seen, [name for name in seen if any(word in name.split(".")[1] for word in forbidden)]


@pytest.mark.parametrize("tasks", [False, True])
def test_the_step_never_reads_a_tensor_on_the_host(tasks):
    """Nor with tasks, whose writing has a price, and text heads that are not told what they tell."""
    model = make_random_model(recall_text_heads=int(tasks))
    weights = torch.tensor([1.0, 1.0, 0.0, TOLD]).unsqueeze(1).repeat(1, 64) if tasks else None
    seen, reads = host_reads(TrainingStep(model, MuonAdamW(model, lr=1e-3), priced=tasks), weights)
    assert any("mm" in name for name in seen) and any("signbit" in name for name in seen) == tasks
    assert reads == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
def test_a_step_does_not_wait_for_the_device(amp_dtype):
    model = make_random_model().cuda()
    step = TrainingStep(model, MuonAdamW(model, lr=1e-3), amp_dtype=amp_dtype)
    first, second = (batch.pin_memory() for batch in batches(2))
    step.run(first)  # libraries and the scaler set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.optimizer.set_lr(1e-4)
        model.set_plasticity(0.3)
        step.run(second)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("amp_dtype", "tasks"), [(None, False), (torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)]
)
def test_captured_and_eager_steps_agree(amp_dtype, tasks):
    losses = []
    for graph in (False, True):
        model = make_random_model(recall_text_heads=int(tasks)).cuda()
        step = TrainingStep(model, MuonAdamW(model, lr=1e-3), amp_dtype=amp_dtype, graph=graph, priced=tasks)
        step.write_price.fill_(0.5)
        run = []
        for i, batch in enumerate(batches(EAGER_STEPS + 20)):
            step.optimizer.set_lr(1e-3 if i < 10 else 5e-4)
            model.set_plasticity(0.1 if i < 15 else 0.9)
            weights = torch.ones(batch.shape)
            weights[i % 4, 10:20], weights[i % 4, 30:34] = TOLD, 8.0  # in another row each time
            run.append(step.run(batch.pin_memory(), weights.pin_memory() if tasks else None).clone())
        assert (step._captured is not None) == graph
        losses.append(torch.stack(run).cpu())
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=2e-3)
    assert losses[1][-1] < losses[1][0]


def test_weights_say_what_a_byte_counts():
    """Gradients are those of the weighted mean, the loss on record is that of the text, and weight 0 is unseen."""
    (batch,) = batches(1)
    generator = torch.Generator().manual_seed(3)
    weights = torch.tensor([0.0, 1.0, 8.0, TOLD])[torch.randint(0, 4, batch.shape, generator=generator)]
    model, twin = make_random_model(), make_random_model()
    step = TrainingStep(model, MuonAdamW(model, lr=1e-3))
    step.optimizer.step = lambda *args: None  # gradients stay as they are
    loss = step.run(batch, weights)
    each = F.cross_entropy(twin(batch).transpose(1, 2), batch.long(), reduction="none")
    (sum(w * e for w, e in zip(weights.flatten(), each.flatten())) / weights.sum()).backward()
    of_text = [e.item() for w, e in zip(weights.flatten(), each.flatten()) if w == 1]
    assert loss.item() == pytest.approx(sum(of_text) / len(of_text), rel=1e-5)
    for (name, p), other in zip(model.named_parameters(), twin.parameters()):
        if other.grad is not None:
            torch.testing.assert_close(
                p.grad, other.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_weights_of_one_are_no_weights():
    (batch,) = batches(1)
    found = []
    for weights in (None, torch.ones(batch.shape)):
        model = make_random_model()
        loss = TrainingStep(model, MuonAdamW(model, lr=1e-3)).run(batch, weights)
        found.append((loss, model.head.output.weight.detach()))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
