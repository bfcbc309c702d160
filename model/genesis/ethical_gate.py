"""The ethical gate over tokens (seed 000, sections 5 and 8): disallowed tokens lose their probability.

    L_filtered = L_raw + (1 − M) · (−1e9)         M = 0 for a disallowed token, else 1
    L_filtered −= scale · (1 − safety)            with a classifier, which scores every token between 0 and 1

For any model whose outputs are tokens or classes. Bytes have no bad token: what AGIFormer says is gated by its policy.

Notable: the classifier is learned apart from the model, from labelled examples. No gradient of a filtered logit reaches
it, because a training loss would teach it to let its own targets through. Untrained, it lets everything pass.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

BLOCKED = -1e9
UNTRAINED = 8.0  # logit of the safety that a new classifier gives every token


class EthicalGate:
    """Filters logits by a list of tokens and, if asked, by a classifier.

    Args:
        vocab_size: V, number of tokens.
        disallowed_tokens: from 0 to V − 1; not all of them.
        use_classifier: make a classifier of `classifier_hidden` hidden units.
        classifier_hidden: its width.
        classifier_scale: ≥ 0, what a token of safety 0 loses of its logit.
        classifier_inputs: width of the hidden state that the classifier reads; None: it reads the V raw logits.
        block_below: tokens of a safety under this are blocked outright; 0 blocks none.

    Attributes:
        mask: M [V] float32.
        classifier: inputs [..., V or classifier_inputs] → safety [..., V] in [0, 1]; None without one.

    Raises:
        ValueError: a token or a number out of range.
    """

    def __init__(
        self,
        vocab_size: int,
        disallowed_tokens: Iterable[int] | None = None,
        *,
        use_classifier: bool = False,
        classifier_hidden: int = 32,
        classifier_scale: float = 5.0,
        classifier_inputs: int | None = None,
        block_below: float = 0.0,
    ):
        tokens = sorted({int(token) for token in disallowed_tokens} if disallowed_tokens is not None else ())
        for name, value, good, accepted in (
            ("vocab_size", vocab_size, vocab_size >= 1, "an integer ≥ 1"),
            ("disallowed_tokens", tokens, all(0 <= t < vocab_size for t in tokens), f"from 0 to {vocab_size - 1}"),
            ("disallowed_tokens", tokens, len(tokens) < vocab_size, "a list that leaves a token"),
            ("classifier_hidden", classifier_hidden, classifier_hidden >= 1, "an integer ≥ 1"),
            ("classifier_scale", classifier_scale, classifier_scale >= 0, "a number ≥ 0"),
            ("block_below", block_below, 0 <= block_below < 1, "a number from 0 to under 1"),
        ):
            if not good:
                raise ValueError(f"{name}={value!r}: accepted is {accepted}")
        self.vocab_size, self.disallowed_tokens = vocab_size, tokens
        self.mask = torch.ones(vocab_size)
        self.mask[tokens] = 0.0
        self.use_classifier = use_classifier
        self.classifier_scale, self.classifier_inputs = classifier_scale, classifier_inputs
        self.block_below = block_below
        self.classifier = None
        if use_classifier:
            last = nn.Linear(classifier_hidden, vocab_size)
            nn.init.zeros_(last.weight)
            nn.init.constant_(last.bias, UNTRAINED)
            first = nn.Linear(classifier_inputs or vocab_size, classifier_hidden)
            self.classifier = nn.Sequential(first, nn.ReLU(), last, nn.Sigmoid())

    def register_to_module(self, module: nn.Module) -> None:
        """Make the mask its buffer `ethical_mask` and the classifier its submodule `ethical_classifier`.

        Both then move, are saved and are loaded with the module. A classifier of another gate keeps its name; this one
        becomes `ethical_classifier_1`, or the next number that is free.
        """
        device = next((t.device for t in (*module.parameters(), *module.buffers())), self.mask.device)
        module.register_buffer("ethical_mask", self.mask.to(device, copy=True))
        if self.classifier is None or any(child is self.classifier for child in module.children()):
            return
        self.classifier.to(device)
        name, number = "ethical_classifier", 0
        while hasattr(module, name):
            number += 1
            name = f"ethical_classifier_{number}"
        module.add_module(name, self.classifier)

    def filter_logits(self, logits: Tensor, module: nn.Module | None = None) -> Tensor:
        """Logits [..., V] with −1e9 added to those of disallowed tokens; the others keep their bits.

        Args:
            module: the one that the gate is registered to; its `ethical_mask` counts. Without one the gate's own.

        Raises:
            ValueError: when the logits are not V.
        """
        if logits.shape[-1] != self.vocab_size:
            raise ValueError(f"logits have shape {tuple(logits.shape)}: accepted is [..., {self.vocab_size}]")
        blocked = 1 - self._mask(module, logits.device).float()  # −1e9 is out of float16's range
        return logits + blocked * BLOCKED

    def filter_logits_with_classifier(
        self, logits: Tensor, module: nn.Module | None = None, hidden: Tensor | None = None
    ) -> Tensor:
        """`filter_logits`, and every token lowered by scale · (1 − safety), or blocked when its safety is too low.

        Args:
            logits: [..., V], raw.
            hidden: [..., classifier_inputs], for a classifier that reads hidden states.

        Raises:
            ValueError: when the logits are not V, or the hidden states are missing or of another width.
        """
        filtered = self.filter_logits(logits, module)
        if self.classifier is None:
            return filtered
        features = logits
        if self.classifier_inputs is not None:
            features, found = hidden, None if hidden is None else tuple(hidden.shape)
            if found is None or found[-1] != self.classifier_inputs:
                raise ValueError(f"hidden={found}: accepted is [..., {self.classifier_inputs}], to be classified")
        with torch.no_grad():
            safety = self.classifier(features.to(next(self.classifier.parameters()).dtype))
            penalty = self.classifier_scale * (1 - safety) - BLOCKED * (safety < self.block_below)
        return filtered - penalty

    def allowed(self, tokens: Tensor, module: nn.Module | None = None) -> Tensor:
        """Which of the tokens [...] may be learned from, bool [...]; what is no token, such as −100, may."""
        inside = (tokens >= 0) & (tokens < self.vocab_size)
        mask = self._mask(module, tokens.device)
        return (mask[tokens.clamp(0, self.vocab_size - 1).long()] > 0) | ~inside

    def _mask(self, module: nn.Module | None, device: torch.device) -> Tensor:
        return getattr(module, "ethical_mask", self.mask).to(device)
