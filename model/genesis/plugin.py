"""GENESIS around any model (seed 000, sections 8 and 13): an LSTM with all of it, and a plugin for a model's layer.

A training step of either is one `zero_grad`, one backward of the main loss, the amplifier on the hidden gradient, now
and then one backward of a replay loss, clipping, and one `step`.

Notable:
- The buffer keeps the hidden state without the anchor bias, which replay adds as it is then.
- Positions whose target the gate does not allow are left out: they feed neither the loss nor the amplifier nor the
  buffer, so that what may not be said is not learned either.
- The step reads a few numbers on the host, as the seed's does. AGIFormer's own step does not: it is written on the
  mechanisms themselves.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from model.genesis.amplifier import amplify_, anchor_, position_mean, salient_units
from model.genesis.ethical_gate import EthicalGate
from model.genesis.persistence import consolidation_penalty, refresh_reference_
from model.genesis.replay import SelfReplayBuffer

NOVELTY_DECAY = 0.9
CLIP_NORM = 5.0
# The learning rate around the optimizer's own when none is given: its slow start, least and most.
BASE_SHARE, MIN_SHARE, MAX_SHARE = 0.5, 0.01, 2.0
LAYERS_LISTED = 6  # in the error for an unknown layer

Criterion = Callable[[Tensor, Tensor], Tensor]


class GenesisCore(nn.Module):
    """What module and plugin share: anchor bias, decoder, gate, replay, and the training step on a hidden state.

    Args:
        hidden_size: D, width of the hidden state.
        output_size: number of logits.
        vocab_size: of the gate, equal to output_size; no gate when None.
        disallowed_tokens: of the gate.
        replay_size: entries of the replay buffer.
        bias_decay: what a step keeps of the anchor bias.
        bias_max: its largest absolute value.
        gate_use_classifier, gate_classifier_hidden, gate_classifier_scale: of the gate; see `EthicalGate`.
        amp_rate: η of the anchoring.
        amp_threshold: standard deviations above the mean that flag a unit.
        amp_strength: λ, the gradient of what feeds a flagged unit is multiplied by 1 + λ.
        replay_every: steps from one replay to the next.
        replay_batch: entries of a replay.

    Attributes:
        decoder: hidden [..., D] → logits.
        anchor_bias: b [D], a parameter that is added to the hidden state.
        anchor_bias_ref [D]: the penalty's reference, b when the amplifier last fired.
        importance_scores [D]: how often each unit was flagged.
        novelty_score: scalar, EMA of the loss that starts at the first one.
        steps: int64 scalar, training steps.
        replay_buffer: `SelfReplayBuffer`; gate: `EthicalGate` or None.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        output_size: int,
        vocab_size: int | None = None,
        disallowed_tokens: Iterable[int] | None = None,
        replay_size: int = 500,
        bias_decay: float = 0.999,
        bias_max: float = 5.0,
        gate_use_classifier: bool = False,
        gate_classifier_hidden: int = 32,
        gate_classifier_scale: float = 5.0,
        amp_rate: float = 0.1,
        amp_threshold: float = 2.0,
        amp_strength: float = 1.0,
        replay_every: int = 10,
        replay_batch: int = 8,
    ):
        super().__init__()
        for name, value, good, accepted in (
            ("vocab_size", vocab_size, vocab_size in (None, output_size), f"output_size = {output_size}, or None"),
            ("bias_decay", bias_decay, 0 <= bias_decay <= 1, "a number from 0 to 1"),
            ("bias_max", bias_max, bias_max >= 0, "a number ≥ 0"),
            ("replay_every", replay_every, replay_every >= 1, "an integer ≥ 1"),
            ("replay_batch", replay_batch, replay_batch >= 1, "an integer ≥ 1"),
            ("disallowed_tokens", disallowed_tokens, vocab_size or not disallowed_tokens, "None without vocab_size"),
        ):
            if not good:
                raise ValueError(f"{name}={value!r}: accepted is {accepted}")
        self.hidden_size = hidden_size
        self.bias_decay, self.bias_max = bias_decay, bias_max
        self.amp_rate, self.amp_threshold, self.amp_strength = amp_rate, amp_threshold, amp_strength
        self.replay_every, self.replay_batch = replay_every, replay_batch
        self.decoder = nn.Linear(hidden_size, output_size)
        self.replay_buffer = SelfReplayBuffer(replay_size)
        self.anchor_bias = nn.Parameter(torch.zeros(hidden_size))
        self.register_buffer("anchor_bias_ref", torch.zeros(hidden_size))
        self.register_buffer("importance_scores", torch.zeros(hidden_size))
        self.register_buffer("novelty_score", torch.tensor(0.0))
        self.register_buffer("steps", torch.tensor(0))
        self.gate = None
        if vocab_size is not None:
            self.gate = EthicalGate(
                vocab_size,
                disallowed_tokens,
                use_classifier=gate_use_classifier,
                classifier_hidden=gate_classifier_hidden,
                classifier_scale=gate_classifier_scale,
            )
            self.gate.register_to_module(self)

    def core_forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden [..., D] → filtered logits [..., output_size], raw logits, and the hidden state with its anchor bias.

        Raises:
            ValueError: for another width.
        """
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden has shape {tuple(hidden.shape)}: accepted is [..., {self.hidden_size}]")
        final_hidden = hidden + self.anchor_bias
        raw = self.decoder(final_hidden)
        return raw if self.gate is None else self.gate.filter_logits_with_classifier(raw, self), raw, final_hidden

    def training_step(
        self, x: Tensor, target: Tensor, optimizer: Optimizer, criterion: Criterion, lambda_reg: float = 0.0
    ) -> float:
        """One step of the optimizer on a batch, with replay.

        Args:
            x: what `forward` takes.
            target: one a logits row: class indices [B] (or [B, T] for hidden states [B, T, D]), or what else the
                criterion compares rows [n, output_size] to. Targets of the gate's vocabulary that it does not allow are
                left out.
            optimizer: its learning rate is set by `update_learning_rate`. Where gradients are not finite, it gets none.
            criterion: (logits [n, output_size], targets [n, ...]) → loss, as PyTorch's.
            lambda_reg: λ of the consolidation penalty.

        Returns:
            main loss + penalty + replay loss.

        Raises:
            ValueError: when targets do not fit the logits, naming both shapes.
        """
        self.train()
        optimizer.zero_grad()
        logits, _, final_hidden = self(x)
        final_hidden.retain_grad()
        rows, targets = _as_rows(logits, target)
        allowed = self._allowed(targets)
        kept = allowed.nonzero().flatten()
        # A batch with nothing to learn from still makes its step, with gradients of 0.
        loss = criterion(rows[kept], targets[kept]).mean() if len(kept) else 0.0 * rows.sum()
        penalty = self.apply_consolidation(lambda_reg)
        entry = None
        if len(kept) and loss.isfinite():
            self._update_novelty(loss.detach())
            entry = self._choose_entry(rows, targets, final_hidden, kept, criterion)
        self.update_learning_rate(optimizer)

        (loss + penalty).backward()
        mask = self._amplify(final_hidden, allowed.reshape(logits.shape[:-1]))
        self._amplify_feeding(mask)
        replay = self._replay(criterion)
        if replay is not None:
            replay_loss, replayed = replay
            mask = torch.maximum(mask, self._amplify(replayed))
        self._step(optimizer, mask)
        if entry is not None:
            self.replay_buffer.add(*entry)
        self.steps.add_(1)
        return (loss + penalty).item() + (replay_loss if replay is not None else 0.0)

    def apply_consolidation(self, lambda_reg: float = 0.1) -> Tensor:
        """λ Σ importance_i · (b_i − b_ref,i)², a scalar to add to a loss (seed 000, section 6)."""
        return lambda_reg * consolidation_penalty(self.anchor_bias, self.anchor_bias_ref, self.importance_scores)

    @torch.no_grad()
    def update_learning_rate(
        self,
        optimizer: Optimizer,
        base_lr: float | None = None,
        min_lr: float | None = None,
        max_lr: float | None = None,
    ) -> float:
        """Set the learning rate to base + (max − base) · (1 − tanh(novelty)), within min and max.

        It rises to max_lr as novelty falls to 0 (seed 000, sections 4 and 8). What is not given is 0.5, 0.01 and 2
        times the rate that the parameter group had at first, its `initial_lr`.

        Returns:
            the rate of the last group.
        """
        progress = 1 - torch.tanh(self.novelty_score).item()
        for group in optimizer.param_groups:
            initial = float(group.setdefault("initial_lr", float(group["lr"])))
            base = initial * BASE_SHARE if base_lr is None else base_lr
            least = initial * MIN_SHARE if min_lr is None else min_lr
            most = initial * MAX_SHARE if max_lr is None else max_lr
            rate = max(least, min(most, base + (most - base) * progress))
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        return rate

    def _allowed(self, targets: Tensor) -> Tensor:
        """Which rows may be learned from, bool [n]; all, when targets are not class indices or there is no gate."""
        if self.gate is None or targets.dim() != 1 or targets.is_floating_point():
            return torch.ones(len(targets), dtype=torch.bool, device=targets.device)
        return self.gate.allowed(targets, self)

    @torch.no_grad()
    def _update_novelty(self, loss: Tensor) -> None:
        novelty = NOVELTY_DECAY * self.novelty_score + (1 - NOVELTY_DECAY) * loss
        self.novelty_score.copy_(torch.where(self.novelty_score == 0, loss, novelty))  # 0 is before the first loss

    @torch.no_grad()
    def _choose_entry(
        self, rows: Tensor, targets: Tensor, final_hidden: Tensor, kept: Tensor, criterion: Criterion
    ) -> tuple[Tensor, Tensor, float] | None:
        """One of the rows to remember, its own loss being its priority; None where the criterion ignores its target."""
        row = kept[int(torch.randint(len(kept), ()))]
        hidden = final_hidden.detach().reshape(-1, self.hidden_size)[row] - self.anchor_bias
        priority = criterion(rows[row][None], targets[row][None]).mean()
        return (hidden, targets[row], priority.item()) if priority.isfinite() else None

    def _amplify(self, hidden: Tensor, weights: Tensor | None = None) -> Tensor:
        """Anchor the units of hidden [..., D] that its gradient flags, and count them → mask [D]."""
        mask, _ = salient_units(hidden.grad, stds=self.amp_threshold, weights=weights)
        mean = position_mean(hidden.detach(), weights)
        decay = 1.0 if weights is None else self.bias_decay  # once a step
        anchor_(self.anchor_bias, mask, mean, rate=self.amp_rate, decay=decay, bias_max=self.bias_max)
        self.importance_scores.add_(mask)
        return mask

    def _amplify_feeding(self, mask: Tensor) -> None:
        """Multiply the gradients of the weights that feed each unit by 1 + λ m; a subclass knows them."""

    def _replay(self, criterion: Criterion) -> tuple[float, Tensor] | None:
        """Every few steps, add the gradient of a replay loss → the loss and the replayed hidden state."""
        if (int(self.steps) + 1) % self.replay_every or not len(self.replay_buffer):
            return None
        hidden, target = self.replay_buffer.sample(self.replay_batch, self.anchor_bias.device)
        logits, _, final_hidden = self.core_forward(hidden.to(self.anchor_bias.dtype))
        final_hidden.retain_grad()
        loss = criterion(logits, target).mean()
        loss.backward()
        return loss.item(), final_hidden

    @torch.no_grad()
    def _step(self, optimizer: Optimizer, mask: Tensor) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        if not norm.isfinite():
            for p in parameters:
                p.grad = None
        optimizer.step()
        self.anchor_bias.clamp_(-self.bias_max, self.bias_max)
        refresh_reference_(self.anchor_bias_ref, self.anchor_bias, mask.amax())


class IntegratedLearningModule(GenesisCore):
    """An LSTM with GENESIS: the seed's demonstration model.

    Args:
        input_size: width of the inputs.
        hidden_size, output_size, vocab_size, disallowed_tokens, options: as in `GenesisCore`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        vocab_size: int | None = None,
        disallowed_tokens: Iterable[int] | None = None,
        **options: Any,
    ):
        super().__init__(hidden_size, output_size, vocab_size, disallowed_tokens, **options)
        self.encoder = nn.LSTM(input_size, hidden_size, batch_first=True)

    def forward(self, x: Tensor, hidden_in: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the sequence's end.

        Args:
            x: [B, T, input_size], T ≥ 1.
            hidden_in: the LSTM's first state (h, c), each [1, B, D]; zeros when None.

        Returns:
            filtered logits [B, output_size], raw logits [B, output_size], final hidden state [B, D].
        """
        if x.dim() != 3 or not x.shape[1] or x.shape[2] != self.encoder.input_size:
            raise ValueError(f"x has shape {tuple(x.shape)}: accepted is [B, T, {self.encoder.input_size}], T ≥ 1")
        output, _ = self.encoder(x, hidden_in)
        return self.core_forward(output[:, -1])

    def _amplify_feeding(self, mask: Tensor) -> None:
        for weight in (self.encoder.weight_ih_l0, self.encoder.weight_hh_l0):
            if weight.grad is not None:
                # Four gates a unit, on top of each other.
                amplify_(weight.grad.view(4, self.hidden_size, -1), mask, self.amp_strength, dim=1)


class GenesisPlugin(GenesisCore):
    """GENESIS on the hidden states of a model that it leaves as it is; the arguments are those of `GenesisCore`."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden [B, D] or [B, T, D] → filtered logits [..., output_size], raw logits, final hidden state [..., D]."""
        return self.core_forward(hidden)

    def training_step(
        self, x: Tensor, target: Tensor, optimizer: Optimizer, criterion: Criterion, lambda_reg: float = 0.0
    ) -> float:
        """`GenesisCore.training_step` on hidden states x; their model learns too when x carries its graph.

        The weights that feed x are not the plugin's. The gradient that enters the model through a flagged unit is
        multiplied by 1 + λ instead, and so is all that comes of it.
        """
        if x.grad_fn is not None:
            x = x.view_as(x)  # so that the hook is on this use of x alone
            x.register_hook(self._amplified)
        return super().training_step(x, target, optimizer, criterion, lambda_reg)

    def _amplified(self, gradient: Tensor) -> Tensor:
        mask, _ = salient_units(gradient, stds=self.amp_threshold)
        return gradient * (1 + self.amp_strength * mask).to(gradient.dtype)


def attach_genesis_plugin(
    base: nn.Module,
    plugin: GenesisPlugin,
    layer_name: str,
    output_attr: str = "genesis_logits",
    with_grad: bool = False,
) -> RemovableHandle:
    """Run the plugin on a layer's output in every forward pass of a model (seed 000, section 13).

    Args:
        base: any model.
        plugin: moves to the layer's device, now and when the layer has moved.
        layer_name: as in `base.named_modules()`. Of an output that is a tuple, list or dict, the first tensor is read.
        output_attr: attribute of the base that holds the logits after a forward pass.
        with_grad: let gradients flow from the logits to the plugin and back into the base; else they carry none.

    Returns:
        a handle whose `remove()` detaches the plugin.

    Raises:
        ValueError: for a layer that is not there, or an attribute that the base has of its own.
    """
    layers = dict(base.named_modules())
    if layer_name not in layers:
        known = [name for name in layers if name]
        more = ", …" if len(known) > LAYERS_LISTED else ""
        raise ValueError(f"layer_name={layer_name!r}: accepted are {', '.join(known[:LAYERS_LISTED])}{more}")
    own = (base._parameters, base._buffers, base._modules)
    if not output_attr.isidentifier() or hasattr(type(base), output_attr) or any(output_attr in names for names in own):
        raise ValueError(f"output_attr={output_attr!r}: accepted is a name that the model does not use")
    layer = layers[layer_name]
    tensors = (t for module in (layer, base) for t in (*module.parameters(), *module.buffers()))
    if (tensor := next(tensors, None)) is not None:
        plugin.to(tensor.device)

    def run(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = _first_tensor(output)
        if hidden is None:
            raise ValueError(f"layer {layer_name!r} returned {type(output).__name__}: accepted is one with a tensor")
        if hidden.device != plugin.anchor_bias.device:
            plugin.to(hidden.device)
        with torch.set_grad_enabled(with_grad and torch.is_grad_enabled()):
            logits, _, _ = plugin(hidden.to(plugin.anchor_bias.dtype))
        setattr(base, output_attr, logits)

    return layer.register_forward_hook(run)


def _as_rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [..., C] → [n, C], and one target a row."""
    lead = logits.shape[:-1]
    if target.shape[: len(lead)] != lead:
        raise ValueError(f"target has shape {tuple(target.shape)}: accepted is {tuple(lead)}, one a row of the logits")
    return logits.reshape(-1, logits.shape[-1]), target.reshape(-1, *target.shape[len(lead) :])


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)
