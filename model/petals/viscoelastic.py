"""Viscoelastic updates (seed 003): every weight resists turning back, and hardens when it is left alone.

An optimizer proposes û per weight, the update per unit learning rate: the plain move is Δw = −lr·û. Here the weight
has two resistances, R_up and R_down, one against each direction, and a temperature T in (0, 1]; the petal it lies in
may have a cryogenic divider C. With the push a = min(1, |û| / SCALE) and d the direction of the move, sign(−û):

    Δw   = −lr · û · T / ((1 + R_d) · C)
    R_d  ← R_d − flow            R_−d ← min(r_max, R_−d + flow + resistance·a)        flow = depletion·a·R_d
    T    ← max(t_min, T + heating·max(0, a − T) − cooling·max(0, T − a))

The temperature follows the attempted push, not the damped move: a cold or resisting weight would otherwise have no way
to warm up, and a strong effort must be able to. Weight decay is a part of û, so a frozen weight does not decay either.

`viscoelastic_reference` is this definition, one tensor at a time. `Viscosity` is its state for a flat buffer of weights
with a fused step, for optimizers that lay all weights out in one tensor; `ViscoelasticAdamW` is a complete optimizer
for any parameters. docs/petals.md has the equations of both variants, the 16-bit state and the measurements.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from model.kernels.viscoelastic import DEGREES, LEVELS, SCALE, Rates, advance_, dither

VARIANTS = ("resistance", "ema")
STATE_DTYPES = {"int16": torch.int16, "float32": torch.float32}
STATE = ("r_up", "r_down", "coldness")  # what is stored for every weight; zeros for a new one

__all__ = ["SCALE", "ViscoelasticAdamW", "ViscoelasticOptions", "Viscosity", "viscoelastic_reference"]


@dataclass(frozen=True)
class ViscoelasticOptions:
    """How weights resist, warm and cool. Rates are per step at full push (a = 1).

    `resistance=0, heating=0, cooling=0` leaves every update exactly as it was.
    """

    variant: str = "resistance"  # or "ema": averages of signed updates (seed 003, o3's comment)
    resistance: float = 0.005  # what a move builds against turning back
    depletion: float = 0.1  # share of the resistance in the way that a move turns round
    r_max: float = 1.0  # most resistance in one direction: a reversal keeps at least 1 / (1 + r_max)
    heating: float = 0.1  # share of the way up to the push that T takes
    cooling: float = 0.003  # share of the way down to the push
    t_min: float = 0.01  # T never falls below: a weight that is cold can still be moved
    ema: float = 0.99  # variant "ema": what the averages keep
    strength: float = 1.0  # variant "ema": resistance per unit of average push
    state_dtype: str = "int16"  # "int16": fixed point, 6 bytes a weight; "float32": 12

    def __post_init__(self) -> None:
        self._accept("variant", f"one of {', '.join(VARIANTS)}", lambda v: v in VARIANTS)
        self._accept("state_dtype", f"one of {', '.join(STATE_DTYPES)}", lambda v: v in STATE_DTYPES)
        for name in ("resistance", "strength"):
            self._accept(name, "a finite number ≥ 0", lambda v: _is_number(v) and 0 <= v < math.inf)
        for name in ("depletion", "heating", "cooling", "ema"):
            self._accept(name, "a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)
        self._accept("r_max", "a finite number > 0", lambda v: _is_number(v) and 0 < v < math.inf)
        self._accept("t_min", "a number from 0.001 to 1", lambda v: _is_number(v) and 0.001 <= v <= 1)

    def _accept(self, name: str, accepted: str, test: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if not test(value):
            raise ValueError(f"{name}={value!r}: accepted is {accepted}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for checkpoints: `ViscoelasticOptions(**options.to_dict()) == options`."""
        return asdict(self)

    def rates(self) -> Rates:
        """The numbers of the fused step, in the units of the stored state."""
        coded = self.state_dtype == "int16"
        largest = self.r_max if self.variant == "resistance" else self.strength or 1.0
        unit = largest / LEVELS if coded else 1.0
        if self.variant == "resistance":
            keep, depletion, build = 1.0, self.depletion, self.resistance
        else:
            keep, depletion, build = self.ema, 0.0, (1 - self.ema) * self.strength
        numbers = (keep, depletion, build / unit, largest / unit, self.heating, self.cooling, self.t_min, unit)
        return Rates(*map(float, numbers), degree=1 / DEGREES if coded else 1.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@torch.no_grad()
def viscoelastic_reference(
    update: Tensor,
    r_up: Tensor,
    r_down: Tensor,
    temperature: Tensor,
    options: ViscoelasticOptions,
    lr: float,
    divider: float | Tensor | None = None,
) -> Tensor:
    """One step by the definition: returns Δw and moves the state on, in place.

    Args:
        update: û of any shape and float type, per unit learning rate; finite.
        r_up, r_down: resistance against moving up and down, ≥ 0, shaped as update. In the variant "ema" they are
            strength·E_pos and strength·E_neg: what once pushed û one way resists it the other way.
        temperature: T in (0, 1], shaped as update.
        lr: learning rate.
        divider: C ≥ 1, broadcastable to update; inf freezes. None is 1.
    """
    delta = -lr * update * _advance(update, r_up, r_down, temperature, options)
    return delta if divider is None else delta / divider


def _advance(update: Tensor, r_up: Tensor, r_down: Tensor, temperature: Tensor, options: ViscoelasticOptions) -> Tensor:
    """The mobility T / (1 + R_d) before the step; moves the state on, in place."""
    push = (update.abs() / SCALE).clamp(max=1.0)
    upwards = update < 0
    against = torch.where(upwards, r_up, r_down)  # resistance against the attempted direction,
    behind = torch.where(upwards, r_down, r_up)  # and against turning back from it
    mobility = temperature / (1 + against)

    if options.variant == "resistance":
        flow = options.depletion * push * against
        behind = (behind + flow + options.resistance * push).clamp(max=options.r_max)
        against = against - flow
    else:
        behind = options.ema * behind + (1 - options.ema) * options.strength * push
        against = options.ema * against
    r_up.copy_(torch.where(upwards, against, behind))
    r_down.copy_(torch.where(upwards, behind, against))

    warming = options.heating * (push - temperature).clamp(min=0.0)
    chilling = options.cooling * (temperature - push).clamp(min=0.0)
    temperature.add_(warming - chilling).clamp_(min=options.t_min)
    return mobility


def _new_state(shape: int | torch.Size, options: ViscoelasticOptions, device: torch.device) -> dict[str, Tensor]:
    dtype = STATE_DTYPES[options.state_dtype]
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name in STATE}


def _decode(state: dict[str, Tensor], options: ViscoelasticOptions) -> tuple[Tensor, Tensor, Tensor]:
    """The stored state → R_up, R_down, T as new float32 tensors."""
    rates = options.rates()
    r_up, r_down = (state[name].float() * rates.unit for name in ("r_up", "r_down"))
    return r_up, r_down, 1 - state["coldness"].float() * rates.degree


def _encode_(state: dict[str, Tensor], r_up, r_down, temperature, options: ViscoelasticOptions, n: int) -> None:
    """Write R_up, R_down, T into the stored state, rounding as the n-th call does."""
    rates = options.rates()
    offset = dither(n) if options.state_dtype == "int16" else 0.0
    for name, value in zip(STATE, (r_up / rates.unit, r_down / rates.unit, (1 - temperature) / rates.degree)):
        top = 1.0 / rates.degree if name == "coldness" else rates.top
        state[name].copy_(value.clamp(max=top) + offset)


class Viscosity:
    """The viscoelastic state of a flat buffer of weights, and its fused step.

    All in place on the device, without host synchronisation: `damp_` can be captured in a CUDA graph. Petals' dividers
    are not in here: divide the spans of the damped update by them.

    Attributes:
        r_up, r_down, coldness: [numel] of `options.state_dtype`, as stored (see `model.kernels.viscoelastic`); zeros
            are a new weight. Copy spans of them freely between states of equal options.
        moves: int64 device scalar, number of `damp_` calls that moved something.
    """

    def __init__(self, numel: int, options: ViscoelasticOptions, device: torch.device | str = "cpu"):
        self.options = options
        self.rates = options.rates()
        self._state = _new_state(numel, options, device)
        self.r_up, self.r_down, self.coldness = (self._state[name] for name in STATE)
        self.moves = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def damp_(self, update: Tensor, active: Tensor | None = None, *, start: int = 0, impl: str = "auto") -> None:
        """û ← û · T / (1 + R_d) in place, and the state of these weights moves on.

        Args:
            update: û [n] of the weights start … start + n − 1, float32, contiguous, per unit learning rate.
            active: device scalar, 0 or 1. Where it is 0 (a skipped step) the update becomes 0, even where it was not
                finite, and nothing in the state changes. Without it the update must be finite.
            impl: "auto", "torch" or "triton".
        """
        span = self._span(start, start + update.numel())
        if update.dtype != torch.float32 or update.dim() != 1 or not update.is_contiguous():
            raise ValueError(f"update is {update.dtype} {tuple(update.shape)}: accepted is contiguous float32 [n]")
        state = (tensor[span] for tensor in (self.r_up, self.r_down, self.coldness))
        advance_(update, *state, self.rates, self.moves, active, impl=impl)
        self.moves.add_(1 if active is None else active > 0)

    def temperature(self, start: int = 0, stop: int | None = None) -> Tensor:
        """T of a span, float32 [stop − start]."""
        return _decode(self._part(start, stop), self.options)[2]

    def resistance(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """(R_up, R_down) of a span, each float32 [stop − start]."""
        return _decode(self._part(start, stop), self.options)[:2]

    def mobility(self, start: int = 0, stop: int | None = None) -> Tensor:
        """T / (1 + min(R_up, R_down)) of a span, float32 [stop − start].

        At learning rate lr and divider C, the step that these weights could take is lr · SCALE · mobility / C.
        """
        return _mobility(self._part(start, stop), self.options)

    @torch.no_grad()
    def warm_(self, start: int = 0, stop: int | None = None, temperature: float = 1.0) -> None:
        """Set T of a span, for weights that are to move again after a thaw. Resistances stay."""
        if not self.options.t_min <= temperature <= 1:
            raise ValueError(f"temperature={temperature!r}: accepted is a number from {self.options.t_min} to 1")
        coldness = (1 - temperature) / self.rates.degree
        self._part(start, stop)["coldness"].fill_(round(coldness) if self.coldness.dtype == torch.int16 else coldness)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored per weight, flat, by short name: for checkpoints and for copying spans."""
        return dict(self._state)

    def scalars(self) -> dict[str, Tensor]:
        """What else changes, by short name."""
        return {"moves": self.moves}

    def _span(self, start: int, stop: int | None) -> slice:
        numel = self.coldness.numel()
        stop = numel if stop is None else stop
        if not 0 <= start <= stop <= numel:
            raise ValueError(f"span {start}…{stop}: accepted is inside 0…{numel}")
        return slice(start, stop)

    def _part(self, start: int, stop: int | None) -> dict[str, Tensor]:
        span = self._span(start, stop)
        return {name: tensor[span] for name, tensor in self._state.items()}


def _mobility(state: dict[str, Tensor], options: ViscoelasticOptions) -> Tensor:
    r_up, r_down, temperature = _decode(state, options)
    return temperature / (1 + torch.minimum(r_up, r_down))


class ViscoelasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) whose updates are viscoelastic, for any dense real parameters.

    û = m̂ / (√v̂ + eps) + weight_decay·p. With R = 0, T = 1 and no divider the parameters on the CPU are those of
    `torch.optim.AdamW(foreach=False)`, bit for bit.

    Args:
        params: parameters or groups; a group may have its own lr, betas, eps, weight_decay, options and divider.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        options: `ViscoelasticOptions` or their dict; in `param_groups` it is the dict, so that a saved state is plain.
        divider: the cryogenic divider C ≥ 1 of the group; inf freezes it. `set_divider` sets one weight by weight.
        fused: False is the readable loop; True runs torch's foreach operations and the fused step (one Triton kernel
            a parameter on CUDA); None, the default, is True.

    The two forms round differently: weights differ by less than 1e-5 of the distance moved with a float32 state, 1e-3
    with 16 bits, and not at all in the plain case.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        options: ViscoelasticOptions | dict[str, Any] | None = None,
        divider: float = 1.0,
        fused: bool | None = None,
    ):
        if fused not in (None, True, False):
            raise ValueError(f"fused={fused!r}: accepted are None, True and False")
        self.is_fused = fused is not False
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "divider": divider}
        super().__init__(params, defaults | {"options": options or ViscoelasticOptions()})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"is_fused": self.is_fused}  # torch's copies and pickles leave it out

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add parameters with their own settings; what a group leaves out is the constructor's."""
        settings = self.defaults | group
        beta1, beta2 = settings["betas"]
        for name, value, good, accepted in (
            ("lr", settings["lr"], settings["lr"] >= 0, "a number ≥ 0"),
            ("betas", settings["betas"], 0 <= beta1 < 1 and 0 <= beta2 < 1, "two numbers, each ≥ 0 and < 1"),
            ("eps", settings["eps"], settings["eps"] >= 0, "a number ≥ 0"),
            ("weight_decay", settings["weight_decay"], settings["weight_decay"] >= 0, "a number ≥ 0"),
            ("divider", settings["divider"], settings["divider"] >= 1, "a number ≥ 1, inf to freeze"),
        ):
            if not good:
                raise ValueError(f"{name}={value!r}: accepted is {accepted}")
        options = settings["options"]
        options = options if isinstance(options, ViscoelasticOptions) else ViscoelasticOptions(**options)
        super().add_param_group({**group, "options": options.to_dict()})
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                raise ValueError(f"a parameter is {p.dtype}: accepted are real floating-point types")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update the parameters that have a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            options = ViscoelasticOptions(**group["options"])
            moving = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in moving):
                raise ValueError("a gradient is sparse: accepted are dense gradients")
            for p in moving:
                self._start(p, options)
            if self.is_fused and moving:
                self._fused_step(moving, group, options)
            else:
                for p in moving:
                    self._reference_step(p, group, options)
        return loss

    def _start(self, p: Tensor, options: ViscoelasticOptions) -> None:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state.update(_new_state(p.shape, options, p.device))

    def _reference_step(self, p: Tensor, group: dict[str, Any], options: ViscoelasticOptions) -> None:
        """The order of operations is that of torch's single-tensor AdamW, for its bits in the plain case."""
        state, (beta1, beta2), lr, decay = self.state[p], group["betas"], float(group["lr"]), group["weight_decay"]
        state["step"] += 1
        n = state["step"].item()
        correction1, correction2 = 1 - beta1**n, 1 - beta2**n
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(p.grad, 1 - beta1)
        second.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        size = (second.sqrt() / correction2**0.5).add_(group["eps"])

        update = first / size / correction1 + decay * p
        values = _decode(state, options)
        factor = _advance(update.float(), *values, options) / self._divider(p, group)
        _encode_(state, *values, options, int(n))

        factor = factor.to(p.dtype)
        p.lerp_(p * (1 - lr * decay), factor)  # exactly the decayed weight where the factor is 1
        p.addcdiv_(first * factor, size, value=-lr / correction1)

    def _fused_step(self, params: list[Tensor], group: dict[str, Any], options: ViscoelasticOptions) -> None:
        """`_reference_step` for a list: foreach operations, and one pass over each parameter's viscoelastic state."""
        (beta1, beta2), lr, decay = group["betas"], float(group["lr"]), group["weight_decay"]
        states = [self.state[p] for p in params]
        grads, firsts, seconds = [p.grad for p in params], *([s[k] for s in states] for k in ("exp_avg", "exp_avg_sq"))
        torch._foreach_add_([s["step"] for s in states], 1.0)
        steps = [s["step"].item() for s in states]
        corrections1 = [1 - beta1**n for n in steps]
        torch._foreach_lerp_(firsts, grads, 1 - beta1)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, grads, grads, 1 - beta2)
        sizes = torch._foreach_sqrt(seconds)
        torch._foreach_div_(sizes, [(1 - beta2**n) ** 0.5 for n in steps])
        torch._foreach_add_(sizes, group["eps"])

        updates = torch._foreach_div(firsts, sizes)
        torch._foreach_div_(updates, corrections1)
        torch._foreach_add_(updates, params, alpha=decay)
        rates, counters = options.rates(), {}
        factors = []
        for p, update, state, n in zip(params, updates, states, steps):
            if (p.device, n) not in counters:
                counters[p.device, n] = torch.full((), int(n), dtype=torch.int64, device=p.device)
            factor = update.float().contiguous()
            flat = (x.view(-1) for x in (factor, *(state[name] for name in STATE)))
            advance_(*flat, rates, counters[p.device, n], mobility_only=True)
            factors.append(factor.div_(self._divider(p, group)).to(p.dtype))

        if decay:
            torch._foreach_lerp_(params, torch._foreach_mul(params, 1 - lr * decay), factors)
        moves = torch._foreach_mul(firsts, factors)
        torch._foreach_addcdiv_(params, moves, sizes, [-lr / c for c in corrections1])

    def set_divider(self, param: Tensor, divider: float | Tensor | None) -> None:
        """Set C ≥ 1 of one parameter, a number or broadcastable to it; None gives it its group's again."""
        if divider is None:
            self.state[param].pop("divider", None)
            return
        divider = torch.as_tensor(divider, dtype=torch.float32, device=param.device)
        try:
            fits = torch.broadcast_shapes(divider.shape, param.shape) == param.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"divider has shape {tuple(divider.shape)}: accepted broadcasts to {tuple(param.shape)}")
        if not (divider >= 1).all():
            raise ValueError(f"divider has a smallest value of {divider.min().item()}: accepted are numbers ≥ 1")
        self.state[param]["divider"] = divider.clone()

    def _divider(self, p: Tensor, group: dict[str, Any]) -> float | Tensor:
        return self.state[p].get("divider", group["divider"])

    def temperature(self, param: Tensor) -> Tensor:
        """T of every weight of a parameter, float32, shaped as it; 1 before its first step."""
        return _decode(*self._state_of(param))[2]

    def resistance(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """(R_up, R_down) of every weight of a parameter, float32, shaped as it."""
        return _decode(*self._state_of(param))[:2]

    def mobility(self, param: Tensor) -> Tensor:
        """T / (1 + min(R_up, R_down)) of every weight of a parameter, float32, shaped as it; dividers not included."""
        return _mobility(*self._state_of(param))

    def _state_of(self, param: Tensor) -> tuple[dict[str, Tensor], ViscoelasticOptions]:
        group = next((g for g in self.param_groups if any(p is param for p in g["params"])), None)
        if group is None:
            raise ValueError(f"a tensor of shape {tuple(param.shape)}: accepted are parameters of this optimizer")
        options = ViscoelasticOptions(**group["options"])
        if "coldness" in self.state.get(param, {}):
            return self.state[param], options
        return _new_state(param.shape, options, param.device), options

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`, on any device."""
        super().load_state_dict(state_dict)
        # torch gives all state the parameter's type; the viscoelastic state and the dividers have their own.
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for index, p in zip(saved, chain.from_iterable(group["params"] for group in self.param_groups)):
            for name in (*STATE, "divider"):
                if name in state_dict["state"].get(index, {}):
                    self.state[p][name] = state_dict["state"][index][name].to(p.device)
