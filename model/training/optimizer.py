"""Muon and AdamW over one flat buffer of parameters, without host synchronisation.

All parameters are views of one flat tensor, and so are their gradients. Elementwise updates are then a handful of
kernels however many parameters there are, matrices of one shape are one batch for Muon, and clipping, unscaling, the
non-finite check and a gradient all-reduce are one operation each. Every decision is a device tensor: the step can be
captured in a CUDA graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

OPTIMIZERS = ("muon", "adamw")

# Quintic Newton–Schulz coefficients that push all singular values towards 1 in five steps (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Weights that hold three matrices on top of each other; Muon treats each alone.
STACKED = {"qkv": 3, "condition": 3, "recurrent": 3}
# Small, sparse or output-facing matrices: AdamW's job in Muon training.
ADAMW_ONLY = ("embedding", "head.bytes", "head.output", "memory.gates", "halt")


@dataclass(frozen=True)
class Region:
    """A span of the flat buffer that is updated together. `matrices` is (n, rows, columns) for Muon, else None."""

    kind: str  # "muon", "decayed" (AdamW with weight decay) or "plain" (AdamW without)
    start: int
    stop: int
    matrices: tuple[int, int, int] | None = None


def region_key(name: str, parameter: nn.Parameter, optimizer: str) -> tuple:
    """How a parameter is updated: ("muon", rows, columns), ("decayed",) or ("plain",)."""
    if parameter.dim() < 2:
        return ("plain",)
    if optimizer == "adamw":
        return ("decayed",)
    if any(part in name for part in ADAMW_ONLY):
        return ("plain",)
    pieces = STACKED.get(name.split(".")[-2], 1)
    return ("muon", parameter.shape[0] // pieces, parameter.shape[1])


class MuonAdamW:
    """Muon (Jordan et al. 2024) for weight matrices, AdamW (Loshchilov and Hutter 2019) for everything else.

    One learning rate serves both: Muon's orthogonal update is scaled by 0.2·√max(rows, columns), the size of a typical
    AdamW update (Liu et al. 2025). `optimizer="adamw"` gives AdamW for all.

    Works with `torch.amp.GradScaler` without synchronising. A step with `found_inf` > 0 leaves parameters, moments and
    step count exactly as they were.

    Attributes:
        lr: device scalar; set it with `set_lr`.
        skipped: device scalar, number of steps skipped so far.
    """

    _step_supports_amp_scaling = True  # tells GradScaler to hand over found_inf instead of reading it on the host
    found_inf: Tensor | None = None  # on the class: GradScaler deletes its own after a step
    grad_scale: Tensor | None = None
    clip_factor: Tensor | None = None

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: str = "muon",
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        eps: float = 1e-10,
        weight_decay: float = 0.1,
    ):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={optimizer!r}: accepted are {', '.join(OPTIMIZERS)}")
        self.betas, self.momentum, self.eps, self.weight_decay = betas, momentum, eps, weight_decay
        self._lay_out(model, optimizer)
        device = self.values.device
        self.lr = torch.tensor(float(lr), device=device)
        self.steps = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.first = torch.zeros_like(self.values)  # momentum
        self.second = torch.zeros_like(self.values[self._adam_start :])  # mean square, AdamW's part only
        self.param_groups = [{"params": [self.values], "lr": self.lr}]

    @torch.no_grad()
    def _lay_out(self, model: nn.Module, optimizer: str) -> None:
        """Move all parameters and gradients into flat buffers, Muon's matrices first, by shape."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        keyed = [(region_key(name, p, optimizer), name, p) for name, p in named]
        order = {kind: i for i, kind in enumerate(("muon", "decayed", "plain"))}
        keyed.sort(key=lambda item: (order[item[0][0]], item[0]))  # stable: model order inside a region
        total = sum(p.numel() for _, p in named)
        device = named[0][1].device
        self.values = torch.empty(total, device=device)
        self.values.grad = torch.zeros(total, device=device)
        self.views: dict[str, tuple[slice, torch.Size]] = {}
        self.regions: list[Region] = []
        position = 0
        for key in dict.fromkeys(item[0] for item in keyed):
            start = position
            for _, name, parameter in (item for item in keyed if item[0] == key):
                span = slice(position, position + parameter.numel())
                self.views[name] = (span, parameter.shape)
                self.values[span].copy_(parameter.flatten())
                parameter.data = self.values[span].view(parameter.shape)
                parameter.grad = self.values.grad[span].view(parameter.shape)
                position = span.stop
            matrices = ((position - start) // (key[1] * key[2]), *key[1:]) if key[0] == "muon" else None
            self.regions.append(Region(key[0], start, position, matrices))
        self._adam_start = next((r.start for r in self.regions if r.kind != "muon"), total)

    @property
    def grads(self) -> Tensor:
        """All gradients, flat."""
        return self.values.grad

    def set_lr(self, lr: float) -> None:
        """Set the learning rate without synchronising."""
        self.lr.fill_(lr)

    def zero_grad(self) -> None:
        """Zero all gradients in place (they stay views of the flat buffer)."""
        self.grads.zero_()

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Limit the gradients of the next step to a norm of `max_norm`; returns the norm, a device scalar.

        The factor is applied where the step reads the gradients, to save a pass over them. A non-finite norm is
        noted in `found_inf`, which makes the next step a skip.
        """
        norm = torch.linalg.vector_norm(self.grads)
        self.clip_factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        self.found_inf = (~norm.isfinite()).float()
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters from the gradients; skip when `found_inf` > 0. No synchronisation."""
        ok = self.lr.new_ones(()) if self.found_inf is None else (self.found_inf == 0).float()
        factor = ok if self.clip_factor is None else self.clip_factor.where(ok > 0, ok)
        self.skipped += 1 - ok
        self.steps += ok
        # The gradients of a skipped step become 0 and all rates below become 0: nothing moves, exactly.
        g = torch.where(ok > 0, self.grads, 0.0).mul_(factor)
        lr = self.lr * ok
        for region in self.regions:
            span = slice(region.start, region.stop)
            values, grads, first = self.values[span], g[span], self.first[span]
            if region.kind == "muon":
                first.lerp_(grads, (1 - self.momentum) * ok)
                update = grads.lerp_(first, self.momentum)  # Nesterov
                update = orthogonalise(update.view(region.matrices)).flatten()
                scale = 0.2 * max(region.matrices[1:]) ** 0.5
                update = torch.add(update, values, alpha=self.weight_decay / scale)
                values.addcmul_(update, lr * -scale)
            else:
                second = self.second[region.start - self._adam_start : region.stop - self._adam_start]
                decay = self.weight_decay if region.kind == "decayed" else 0.0
                self._adamw(values, grads, first, second, lr, ok, decay)
        self.found_inf = self.clip_factor = None

    def _adamw(self, values, grads, first, second, lr, ok, decay) -> None:
        beta1, beta2 = self.betas
        first.lerp_(grads, (1 - beta1) * ok)
        second.lerp_(grads.square_(), (1 - beta2) * ok)
        step = self.steps.clamp(min=1.0)
        size = (second / (1 - beta2**step)).sqrt_().add_(self.eps)
        update = (first / (1 - beta1**step)).div_(size)
        if decay:
            update.add_(values, alpha=decay)
        values.addcmul_(update, -lr)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that changes in training besides the parameters, by name, for a checkpoint."""
        state = {"optimizer.steps": self.steps, "optimizer.skipped": self.skipped}
        for name, (span, shape) in self.views.items():
            state[f"optimizer.first.{name}"] = self.first[span].view(shape)
            if span.start >= self._adam_start:
                second = self.second[span.start - self._adam_start : span.stop - self._adam_start]
                state[f"optimizer.second.{name}"] = second.view(shape)
        return state

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`; a missing or misshapen tensor is an error that names it."""
        for name, tensor in self.state_tensors().items():
            if name not in state or state[name].shape != tensor.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"training state {name}: found {found}, accepted is shape {tuple(tensor.shape)}")
            tensor.copy_(state[name])


def orthogonalise(x: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix of each of x [n, rows, columns], approximately (Newton–Schulz, five steps).

    In bfloat16 on CUDA, where that is much faster and loses nothing that training shows; in x's type elsewhere.
    """
    a, b, c = NEWTON_SCHULZ
    y = x.bfloat16() if x.is_cuda else x
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        y = y.transpose(-1, -2)
    y = y / (torch.linalg.matrix_norm(y, keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = y @ y.transpose(-1, -2)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        y = torch.baddbmm(y, polynomial, y, beta=a)
    return y.transpose(-1, -2) if tall else y
