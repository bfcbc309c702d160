"""Muon and AdamW over one flat buffer of parameters, without host synchronisation.

All parameters are views of one flat tensor, and so are their gradients. Elementwise updates are then a handful of
kernels however many parameters there are, matrices of one shape are one batch for Muon, and clipping, unscaling, the
non-finite check and a gradient all-reduce are one operation each. Every decision is a device tensor: the step can be
captured in a CUDA graph.

Notable: every region first writes its update for a learning rate of 1, and one line moves all weights. In between a
viscoelastic state may damp the updates weight by weight, and petals that have set theirs petal by petal. Last come the
locks: what they hold does not move by a bit, whatever asked for it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.layers.hull import CHRYSALIS, CRYOGENIC
from model.petals.crystallization import petal_groups
from model.petals.viscoelastic import ViscoelasticOptions, Viscosity

OPTIMIZERS = ("muon", "adamw")

# Quintic Newton–Schulz coefficients that push all singular values towards 1 in five steps (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Root mean square of an update for a learning rate of 1: what is typical of AdamW (Liu et al. 2025).
UPDATE_SIZE = 0.2
# Weights that hold three matrices on top of each other; Muon treats each alone.
STACKED = {"qkv": 3, "condition": 3, "recurrent": 3}
LOCKED = "optimizer.locked."  # in a checkpoint, before the name of the parameter
# Small, sparse or output-facing matrices: AdamW's job in Muon training.
ADAMW_ONLY = ("embedding", "head.bytes", "head.output", "memory.values", "memory.output", "memory.gates", "halt")
ADAMW_ONLY += ("router", "mixer")


@dataclass(frozen=True)
class Region:
    """A span of the flat buffer that is updated together. `matrices` is (n, rows, columns) for Muon, else None."""

    kind: str  # "muon", "decayed" (AdamW with weight decay) or "plain" (AdamW without)
    start: int
    stop: int
    matrices: tuple[int, int, int] | None = None


def region_key(name: str, parameter: nn.Parameter, optimizer: str) -> tuple:
    """How a parameter is updated: ("muon", rows, columns), ("decayed",) or ("plain",)."""
    if parameter.dim() < 2 or name.endswith(".bias"):
        return ("plain",)
    if optimizer == "adamw":
        return ("decayed",)
    if any(part in name for part in ADAMW_ONLY):
        return ("plain",)
    if parameter.dim() == 3:  # one matrix a petal
        return ("muon", parameter.shape[1], parameter.shape[2])
    pieces = STACKED.get(name.split(".")[-2], 4 if "head.columns" in name else 1)
    return ("muon", parameter.shape[0] // pieces, parameter.shape[1])


class MuonAdamW:
    """Muon (Jordan et al. 2024) for weight matrices, AdamW (Loshchilov and Hutter 2019) for everything else.

    One learning rate serves both: Muon's orthogonal update is scaled by 0.2·√max(rows, columns), the size of a typical
    AdamW update (Liu et al. 2025). `optimizer="adamw"` gives AdamW for all.

    Works with `torch.amp.GradScaler` without synchronising. A step with `found_inf` > 0 leaves parameters, moments and
    step count exactly as they were.

    Args:
        viscosity: damp every weight by its resistance and temperature (docs/petals.md); None for plain updates.
        divider: how much smaller the steps of a petal with status "cryogenic" are; None where no petal ever sets.

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
        viscosity: ViscoelasticOptions | None = None,
        divider: float | None = None,
    ):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={optimizer!r}: accepted are {', '.join(OPTIMIZERS)}")
        self.betas, self.momentum, self.eps, self.weight_decay = betas, momentum, eps, weight_decay
        self.kind, self.viscoelastic, self.divider = optimizer, viscosity, divider
        # Called in each step with all updates for a learning rate of 1, flat as `values`, to change them in place.
        self.modifiers: list[Callable[[Tensor], None]] = []
        self._locks: list[dict[nn.Parameter, Tensor]] = []
        device = next(model.parameters()).device
        self.lr = torch.tensor(float(lr), device=device)
        self.steps = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self._lay_out(model)

    @torch.no_grad()
    def rebuild(self, model: nn.Module) -> None:
        """Lay out the parameters anew after `model` has grown, or some of them have been frozen or thawed.

        Parameters that were there keep their state; new ones begin with none. What is frozen leaves, state and all.
        The buffers are new: a captured step has to be captured again.
        """
        before = {id(self._parameters[name]): span for name, (span, _) in self.views.items()}
        old, old_start = self._state_tensors(), self._adam_start
        scalars = self.viscosity.scalars() if self.viscosity else {}
        self._lay_out(model)
        for name, (span, _) in self.views.items():
            source = before.get(id(self._parameters[name]))
            if source is None:
                continue
            for kind, tensor in self._state_tensors().items():
                if kind == "second":
                    if span.start >= self._adam_start:
                        moved = slice(source.start - old_start, source.stop - old_start)
                        tensor[span.start - self._adam_start : span.stop - self._adam_start] = old[kind][moved]
                else:
                    tensor[span] = old[kind][source]
        for name, value in scalars.items():
            self.viscosity.scalars()[name].copy_(value)

    def _state_tensors(self) -> dict[str, Tensor]:
        """The flat state tensors by short name; one value a weight, "second" of AdamW's part only."""
        state = {"first": self.first, "second": self.second}
        return state | (self.viscosity.tensors() if self.viscosity else {})

    @torch.no_grad()
    def _lay_out(self, model: nn.Module) -> None:
        """Move all parameters and gradients into flat buffers, Muon's matrices first, by shape; make fresh state."""
        optimizer = self.kind
        for parameter in model.parameters():
            if not parameter.requires_grad:
                # Perhaps a view of an earlier buffer, which it would keep in memory.
                parameter.data, parameter.grad = parameter.data.clone(), None
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        keyed = [(region_key(name, p, optimizer), name, p) for name, p in named]
        order = {kind: i for i, kind in enumerate(("muon", "decayed", "plain"))}
        keyed.sort(key=lambda item: (order[item[0][0]], item[0]))  # stable: model order inside a region
        total = sum(p.numel() for _, p in named)
        device = named[0][1].device
        self.values = torch.empty(total, device=device)
        self.values.grad = torch.zeros(total, device=device)
        self.views: dict[str, tuple[slice, torch.Size]] = {}
        self._parameters = dict(named)
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
        self.first = torch.zeros_like(self.values)  # momentum
        self.second = torch.zeros_like(self.values[self._adam_start :])  # mean square, AdamW's part only
        self.viscosity = Viscosity(total, self.viscoelastic, device) if self.viscoelastic else None
        self.param_groups = [{"params": [self.values], "lr": self.lr}]
        self._petals: list[tuple[slice, int, Tensor]] = []
        self._groups: list[tuple[nn.Module, Tensor, Tensor]] = []
        if self.divider is not None:
            spans = {id(self._parameters[name]): span for name, (span, _) in self.views.items()}
            for group in petal_groups(model).values():
                factor = torch.ones(group.petals, device=device)
                owned = [spans[id(p)] for p in group.petal_parameters().values() if id(p) in spans]
                self._petals += [(span, group.petals, factor) for span in owned]
                # What the petals share, such as the hulls' τ, moves as freely as the freest of them.
                shared = torch.ones(1, device=device)
                common = [spans[id(p)] for p in group.shared_parameters().values() if id(p) in spans]
                self._petals += [(span, 1, shared) for span in common]
                self._groups.append((group, factor, shared))
            self.set_petals()
        self._known = dict(model.named_parameters())  # frozen ones too
        self._lay_out_locks()

    def lock(self, locked: dict[str, Tensor]) -> Callable[[], None]:
        """From now on no step moves these weights → a function that lets them go again.

        Locks are held by parameter, and laid out anew with the parameters. They are in `state_tensors`. A captured step
        has to be captured again, after locking and after letting go.

        Args:
            locked: [shape of the parameter] bool by name, frozen parameters included.

        Raises:
            ValueError: for a name that the model has not, or a mask of another dtype or shape.
        """
        held = {self._known[name]: mask for name, mask in checked_masks(locked, self._known).items()}
        self._locks.append(held)
        self._lay_out_locks()

        def unlock() -> None:
            self._locks = [each for each in self._locks if each is not held]
            self._lay_out_locks()

        return unlock

    def locked(self) -> dict[str, Tensor]:
        """What all locks hold, as `lock` takes it, without parameters of which nothing is locked."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._known.items():
            for held in self._locks:
                if parameter in held:
                    found[name] = found[name] | held[parameter] if name in found else held[parameter]
        return found

    def _lay_out_locks(self) -> None:
        locked = self.locked()
        self._locked = torch.zeros_like(self.values, dtype=torch.bool) if locked else None
        for name, (span, _) in self.views.items():
            if name in locked:
                self._locked[span] = locked[name].flatten()

    def set_petals(self) -> None:
        """Take over what the petals' statuses say: solid ones move `divider` times less, those in chrysalis not."""
        for group, factor, shared in self._groups:
            factor.fill_(1.0)
            factor[group.status == CRYOGENIC] = 1 / self.divider
            factor[group.status == CHRYSALIS] = 0.0
            shared.copy_(factor.max())

    def mobility(self, parameter: nn.Parameter) -> Tensor:
        """T / (1 + R) of every weight of a parameter, in its shape, float32 (docs/petals.md); 1 without viscosity."""
        span, shape = next(
            (span, shape) for name, (span, shape) in self.views.items() if self._parameters[name] is parameter
        )
        if self.viscosity is None:
            return torch.ones(shape, device=self.values.device)
        return self.viscosity.mobility(span.start, span.stop).view(shape)

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
        for region in self.regions:
            span = slice(region.start, region.stop)
            values, grads, first = self.values[span], g[span], self.first[span]
            if region.kind == "muon":
                first.lerp_(grads, (1 - self.momentum) * ok)
                update = torch.lerp(grads, first, self.momentum)  # Nesterov
                update = orthogonalise(update.view(region.matrices)).flatten()
                torch.mul(update, UPDATE_SIZE * max(region.matrices[1:]) ** 0.5, out=grads)
            else:
                second = self.second[region.start - self._adam_start : region.stop - self._adam_start]
                self._adamw(grads, first, second, ok)
            if region.kind != "plain" and self.weight_decay:
                grads.add_(values, alpha=self.weight_decay)
        for modify in self.modifiers:
            modify(g)
        if self.viscosity is not None:
            self.viscosity.damp_(g, ok)
        for span, petals, factor in self._petals:
            g[span].view(petals, -1).mul_(factor.unsqueeze(1))
        if self._locked is not None:
            # Not a product with 0, which would keep NaN, and the sign: -0.0 would become 0.0.
            g.masked_fill_(self._locked, 0)
        self.values.addcmul_(g, self.lr * -ok)
        self.found_inf = self.clip_factor = None

    def _adamw(self, grads: Tensor, first: Tensor, second: Tensor, ok: Tensor) -> None:
        """Replace the gradients by AdamW's update, without weight decay."""
        beta1, beta2 = self.betas
        first.lerp_(grads, (1 - beta1) * ok)
        second.lerp_(grads.square(), (1 - beta2) * ok)
        step = self.steps.clamp(min=1.0)
        size = (second / (1 - beta2**step)).sqrt_().add_(self.eps)
        torch.div(first / (1 - beta1**step), size, out=grads)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that changes in training besides the parameters, and the locks, by name, for a checkpoint."""
        return self._running_state() | {f"{LOCKED}{name}": mask for name, mask in self.locked().items()}

    def _running_state(self) -> dict[str, Tensor]:
        state = {"optimizer.steps": self.steps, "optimizer.skipped": self.skipped}
        if self.viscosity is not None:
            state |= {f"optimizer.{name}": value for name, value in self.viscosity.scalars().items()}
        for name, (span, shape) in self.views.items():
            for kind, tensor in self._state_tensors().items():
                if kind != "second":
                    state[f"optimizer.{kind}.{name}"] = tensor[span].view(shape)
                elif span.start >= self._adam_start:
                    part = slice(span.start - self._adam_start, span.stop - self._adam_start)
                    state[f"optimizer.{kind}.{name}"] = tensor[part].view(shape)
        return state

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`; a missing or misshapen tensor is an error that names it.

        What is locked already stays locked, beside what the state locks.
        """
        for name, tensor in self._running_state().items():
            if name not in state or state[name].shape != tensor.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"training state {name}: found {found}, accepted is shape {tuple(tensor.shape)}")
            tensor.copy_(state[name])
        if locked := {name.removeprefix(LOCKED): mask for name, mask in state.items() if name.startswith(LOCKED)}:
            self.lock(locked)


def checked_masks(masks: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Masks of parameters, each on its parameter's device, without those that hold nothing.

    Raises:
        ValueError: for a name that is none of the parameters', or a mask of another dtype or shape.
    """
    found: dict[str, Tensor] = {}
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"locked {name!r}: accepted are names of the model's {len(parameters)} parameters")
        shape = tuple(parameters[name].shape)
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            given = f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
            raise ValueError(f"locked {name!r}: {given}, accepted is bool {shape}")
        if mask.any():
            found[name] = mask.to(parameters[name].device)
    return found


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
