"""One step of the viscoelastic state of a flat buffer of weights: in-place PyTorch, or one Triton kernel on CUDA.

The definition, written for reading, is `model.petals.viscoelastic`. Here both of its variants are one recurrence over
numbers (`Rates`), on a state that is either float32 or a fixed-point code of 16 bits a value:

    r_up, r_down   resistance against moving up and down, in units of r_max / 32767
    coldness       1 − temperature, in units of 2⁻¹⁵

All zeros is a new weight: hot, without resistance. A code has an even step everywhere, where float16 would lose slow
changes near 1 (docs/petals.md has the measurement). What is under one step is handed out over time: the value is
rounded down after adding a dither u_n in [0, 1) that walks evenly through 512 levels as the counter n rises, so that an
increment of δ steps arrives in a share δ of the calls. Unchanged values stay unchanged whatever u_n is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this machine: the PyTorch form runs everywhere
    triton = None

SCALE = 0.2  # typical |û| per unit learning rate: a push of 1
LEVELS = 32767  # largest code of a resistance
DEGREES = 32768  # codes of coldness from 0 to 1: a power of two, so that the temperature is exact
DITHERS = 512  # dither levels: the largest that float32 still resolves beside a code of 15 bits
STRIDE = 317  # DITHERS over the golden ratio, odd: visits all levels, successive ones far apart
CHUNK = 1 << 17  # weights at a time on the CPU: the temporaries stay in the cache
BLOCK = 1024

IMPLEMENTATIONS = ("auto", "torch", "triton")


class Rates(NamedTuple):
    """The recurrence in numbers, with the push split by direction: one of push_up and push_down is 0.

    flow   = depletion · (push_up·r_up − push_down·r_down)
    r_up   ← min(top, keep·r_up   − flow + build·push_down)
    r_down ← min(top, keep·r_down + flow + build·push_up)
    T      ← max(t_min, T + heating·max(0, push − T) − cooling·max(0, T − push))

    r_up, r_down, build and top are in units of `unit`.
    """

    keep: float
    depletion: float
    build: float
    top: float
    heating: float
    cooling: float
    t_min: float
    unit: float  # of a stored resistance
    degree: float  # of a stored coldness


def dither(counter: int | Tensor) -> float | Tensor:
    """u_n in [0, 1) for the n-th call: n an int, or an integer tensor on any device."""
    return (counter * STRIDE % DITHERS) / DITHERS


def advance_(
    update: Tensor,
    r_up: Tensor,
    r_down: Tensor,
    coldness: Tensor,
    rates: Rates,
    counter: Tensor,
    active: Tensor | None = None,
    *,
    mobility_only: bool = False,
    impl: str = "auto",
) -> None:
    """Move the state by the attempted update û and damp the update: û ← û · T / (1 + R_d), with the values before.

    Args:
        update: [n] float32, contiguous, per unit learning rate; overwritten.
        r_up, r_down, coldness: [n] int16 or float32, contiguous; overwritten.
        rates: the numbers of the recurrence, in the units of this state.
        counter: int64 scalar on the same device: how many calls came before, for the dither. Not changed.
        active: scalar on the same device or None: where it is 0 the update becomes 0, whatever it held, and the
            state stays bit for bit.
        mobility_only: write T / (1 + R_d) into `update` instead of the product.
        impl: "torch", "triton" (CUDA, or any device under Triton's interpreter), or "auto".

    No host synchronisation: can be captured in a CUDA graph.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: accepted are {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton" and triton is None:
        raise ValueError("impl='triton': triton is not installed here, accepted are auto, torch")
    if impl == "auto":
        impl = "triton" if update.is_cuda and triton is not None else "torch"
    form = _advance_triton if impl == "triton" else _advance_torch
    form(update, r_up, r_down, coldness, rates, counter, active, mobility_only)


def _advance_torch(update, r_up, r_down, coldness, rates, counter, active, mobility_only) -> None:
    on_cpu = update.device.type == "cpu"
    if on_cpu and active is not None:  # reading a scalar there waits for nothing, and masking is half of the work
        if not active:
            update.zero_()
            return
        active = None
    moving = None if active is None else active > 0
    # A float state has no steps to round to.
    offset = dither(counter).float() if r_up.dtype == torch.int16 else None
    size = CHUNK if on_cpu else max(1, update.numel())
    for part in zip(*(x.split(size) for x in (update, r_up, r_down, coldness))):
        _advance_part(*part, rates, offset, moving, mobility_only)


def _advance_part(u, up, down, cold, rates, offset, moving, mobility_only) -> None:
    if moving is not None:
        u.masked_fill_(~moving, 0.0)
    # The sign of û is dealt with by clamps: a selection by mask costs the CPU as much as thirty products.
    push_up = u.div(-SCALE).clamp_(0.0, 1.0)
    push_down = u.div(SCALE).clamp_(0.0, 1.0)
    new_up, new_down = up.to(torch.float32, copy=True), down.to(torch.float32, copy=True)
    T = cold.float().mul(-rates.degree).add_(1.0)

    against = torch.lerp(new_up, new_down, u.sign().clamp_(min=0.0))  # û > 0 moves down; both ends are exact
    mobility = against.mul_(rates.unit).add_(1.0).reciprocal_().mul_(T)
    if mobility_only:
        u.copy_(mobility)
    else:
        u.mul_(mobility)

    flow = (push_up * new_up).sub_(push_down * new_down).mul_(rates.depletion)
    new_up.mul_(rates.keep).sub_(flow).add_(push_down, alpha=rates.build).clamp_(0.0, rates.top)
    new_down.mul_(rates.keep).add_(flow).add_(push_up, alpha=rates.build).clamp_(0.0, rates.top)
    short = push_up.add_(push_down).sub_(T)
    T.add_(short.clamp(min=0.0), alpha=rates.heating).add_(short.clamp_(max=0.0), alpha=rates.cooling)
    new_cold = T.clamp_(min=rates.t_min).neg_().add_(1.0).mul_(1.0 / rates.degree)
    for old, new in ((up, new_up), (down, new_down), (cold, new_cold)):
        if offset is not None:
            new.add_(offset)  # the copy below rounds towards zero
        old.copy_(new if moving is None else torch.where(moving, new, old))


def _advance_triton(update, r_up, r_down, coldness, rates, counter, active, mobility_only) -> None:
    n = update.numel()
    if n == 0:
        return
    _advance_kernel[(triton.cdiv(n, BLOCK),)](
        update,
        r_up,
        r_down,
        coldness,
        counter,
        counter if active is None else active.float(),
        n,
        *rates,
        SCALE=SCALE,
        STRIDE=STRIDE,
        DITHERS=DITHERS,
        CODED=r_up.dtype == torch.int16,
        GATED=active is not None,
        MOBILITY_ONLY=mobility_only,
        BLOCK=BLOCK,
    )


if triton is not None:

    @triton.jit
    def _advance_kernel(
        update_ptr,
        up_ptr,
        down_ptr,
        cold_ptr,
        counter_ptr,
        active_ptr,
        n,
        keep,
        depletion,
        build,
        top,
        heating,
        cooling,
        t_min,
        unit,
        degree,
        SCALE: tl.constexpr,
        STRIDE: tl.constexpr,
        DITHERS: tl.constexpr,
        CODED: tl.constexpr,
        GATED: tl.constexpr,
        MOBILITY_ONLY: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        u = tl.load(update_ptr + at, mask=inside, other=0.0)
        up = tl.load(up_ptr + at, mask=inside, other=0).to(tl.float32)
        down = tl.load(down_ptr + at, mask=inside, other=0).to(tl.float32)
        T = 1.0 - tl.load(cold_ptr + at, mask=inside, other=0).to(tl.float32) * degree
        stored = inside
        if GATED:
            moving = tl.load(active_ptr) > 0
            u = tl.where(moving, u, 0.0)
            stored = at < tl.where(moving, n, 0)

        falling = u > 0
        push = tl.minimum(tl.abs(u) / SCALE, 1.0)
        against = tl.where(falling, down, up)
        behind = tl.where(falling, up, down)
        mobility = tl.div_rn(T, 1.0 + against * unit)  # rounded: the fast division need not give 1 / 1 = 1
        damped = mobility
        if not MOBILITY_ONLY:
            damped = u * mobility
        tl.store(update_ptr + at, damped, mask=inside)

        flow = against * push * depletion
        behind = tl.minimum(keep * behind + flow + build * push, top)
        against = keep * against - flow
        T += heating * tl.maximum(push - T, 0.0) - cooling * tl.maximum(T - push, 0.0)
        cold = tl.div_rn(1.0 - tl.maximum(T, t_min), degree)  # exact: what did not change keeps its code
        up = tl.where(falling, behind, against)
        down = tl.where(falling, against, behind)
        if CODED:
            offset = (tl.load(counter_ptr) * STRIDE % DITHERS).to(tl.float32) * (1.0 / DITHERS)
            up = (up + offset).to(tl.int32).to(tl.int16)
            down = (down + offset).to(tl.int32).to(tl.int16)
            cold = (cold + offset).to(tl.int32).to(tl.int16)
        tl.store(up_ptr + at, up, mask=stored)
        tl.store(down_ptr + at, down, mask=stored)
        tl.store(cold_ptr + at, cold, mask=stored)
