"""Hulls: a block's feed-forward layer as petals, the units that set (freeze) and are added (DESIGN: Hull; seed 003).

    HullLayer ── PetalGroup (the petals it was made with)      each group is one batched computation,
              └─ PetalGroup (petals added by growth) …          and the layer is the sum of its groups

A group is of kind "convex" (ConvexPetals: signed input-convex hulls) or "swiglu" (SwiGLUPetals: gated hidden units).
`VectorHull` and `ScalarHull` are the input-convex functions by themselves.

Notable: a group is born with zero output weights, so that adding it changes nothing, to the bit; and the groups that
were there keep their shapes, because a wider matrix product would round differently.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.hull import log_mean_exp
from model.kernels.petals import petal_outputs, petals

# What a petal is: it learns; its steps are divided (optimizer's job); its gradients are not even computed.
FLUID, CRYOGENIC, CHRYSALIS = 0, 1, 2

# The hulls' τ at first. 1 costs 0.6% in BPC over 0.1 with 4 petals, and more with 8.
FIRST_TAU = 0.1
WIDTH_MULTIPLE = 8  # hidden units of a petal: matrix units want multiples


class PetalGroup(nn.Module):
    """n petals born together. Every parameter has the petals first: [n, ...].

    The protocol that `model.petals` works on, on any module that follows it: `petals` (their number), `status` (buffer
    [n] uint8: fluid 0, cryogenic 1, chrysalis 2), `set_status`, and `petal_parameters()`.
    """

    PETAL_WEIGHTS: tuple[str, ...] = ()  # the parameters that petals own

    def __init__(self, petals: int):
        super().__init__()
        self.petals = petals
        self.status: Tensor
        self.register_buffer("status", torch.zeros(petals, dtype=torch.uint8))
        self._runs: list[tuple[int, int, bool]] = []
        self.register_load_state_dict_post_hook(_after_loading)

    def petal_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that petals own, by name: [n, ...] each."""
        return {name: getattr(self, name) for name in self.PETAL_WEIGHTS}

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that belong to all petals together, by name."""
        return {name: p for name, p in self.named_parameters(recurse=False) if name not in self.PETAL_WEIGHTS}

    @torch.no_grad()
    def set_status(self, petals: Tensor | list[int], status: int) -> None:
        """Give petals (their indices in the group) a status. Looks at the device: for events, not for every step."""
        if status not in (FLUID, CRYOGENIC, CHRYSALIS):
            raise ValueError(
                f"status={status!r}: accepted are {FLUID} fluid, {CRYOGENIC} cryogenic, {CHRYSALIS} chrysalis"
            )
        petals = torch.as_tensor(petals, device=self.status.device)
        integers = not petals.numel() or not (petals.is_floating_point() or petals.dtype == torch.bool)
        if not integers or bool(((petals < 0) | (petals >= self.petals)).any()):
            raise ValueError(f"petals={petals.tolist()!r}: accepted are indices from 0 to {self.petals - 1}")
        self.status[petals.long()] = status
        self._find_runs()

    def _find_runs(self) -> None:
        """[start, stop) of neighbours that learn or that are in chrysalis; empty when all learn."""
        asleep = (self.status == CHRYSALIS).tolist() if self.status.device.type != "meta" else [False]
        runs: list[tuple[int, int, bool]] = []
        for i, value in enumerate(asleep):
            if runs and runs[-1][2] == value:
                runs[-1] = (runs[-1][0], i + 1, value)
            else:
                runs.append((i, i + 1, value))
        self._runs = runs if any(asleep) else []


def _after_loading(group: PetalGroup, _) -> None:
    group._find_runs()  # a named function: a group can be pickled


class SwiGLUPetals(PetalGroup):
    """Σ_p down_p(silu(gate_p x) ⊙ up_p x): [..., D] → [..., D], a petal being a group of gated units (Shazeer 2020).

    Args:
        dim: D.
        petals: n.
        width: hidden units of a petal.
    """

    PETAL_WEIGHTS = ("up", "down")

    def __init__(self, dim: int, petals: int, width: int):
        super().__init__(petals)
        self.width = width
        self.up = nn.Parameter(torch.empty(petals, 2 * width, dim))  # gate rows, then value rows
        self.down = nn.Parameter(torch.empty(petals, width, dim))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Unit-variance hidden inputs, no output."""
        nn.init.normal_(self.up, std=self.up.shape[-1] ** -0.5)
        self.down.zero_()

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if onto is not None:
            return onto + self(x)
        if not self._runs:
            return self._sum(x, self.up, self.down)
        parts = []
        for start, stop, asleep in self._runs:
            up, down = self.up[start:stop], self.down[start:stop]
            parts.append(self._sum(x, up.detach(), down.detach()) if asleep else self._sum(x, up, down))
        return sum(parts[1:], parts[0])

    def _sum(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gate, value = F.linear(x, up.flatten(0, 1)).unflatten(-1, (-1, 2, self.width)).unbind(-2)
        hidden = (F.silu(gate) * value).flatten(-2)
        return F.linear(hidden, down.flatten(0, 1).t())

    @staticmethod
    def width_for(dim: int, petals: int, budget: int) -> int:
        """Hidden units a petal, so that a group has the weights of a two-matrix layer with `budget` hidden units."""
        return _rounded(2 * budget / (3 * petals))


def _rounded(width: float) -> int:
    return max(WIDTH_MULTIPLE, round(width / WIDTH_MULTIPLE) * WIDTH_MULTIPLE) if width >= 4 else max(1, round(width))


class ConvexPetals(PetalGroup):
    """A rising hull minus a falling one over the same hidden units: [..., D] → [..., D].

        h_p = relu(A_p x + b_p)²,   rising = lme_p(h_p · max(B_p, 0)),   falling = lme_p(h_p · max(−B_p, 0)),
        y = n · (rising − falling),   lme_p o = τ⁻¹ · log(mean_p exp(τ · o_p))

    Both hulls are input-convex (Amos et al. 2017): convex features under non-negative weights, and a log-mean-exp with
    a learned constant τ > 0. The signs are per weight rather than per channel: a hull alone can only rise, and channels
    that all rise together cost 2 to 4% in BPC, whereas one matrix shared by its positive and negative part is no
    larger than the plain layer's (docs/results.md). τ → 0 makes the hulls means, and the layer a plain squared ReLU.

    Args:
        dim: D.
        petals: n.
        width: hidden units of a petal.
    """

    PETAL_WEIGHTS = ("up", "bias", "down")

    def __init__(self, dim: int, petals: int, width: int):
        super().__init__(petals)
        self.width = width
        self.up = nn.Parameter(torch.empty(petals, width, dim))
        self.bias = nn.Parameter(torch.empty(petals, width))
        self.down = nn.Parameter(torch.empty(petals, width, dim))
        self.log_tau = nn.Parameter(torch.empty(1))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Unit-variance hidden inputs, no output, hulls that are nearly means."""
        nn.init.normal_(self.up, std=self.up.shape[-1] ** -0.5)
        self.bias.zero_()
        self.down.zero_()
        self.log_tau.fill_(math.log(FIRST_TAU))

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        flat, tau = x.reshape(-1, x.shape[-1]), self.log_tau.exp()
        onto = None if onto is None else onto.reshape(flat.shape)
        y = petals(flat, self.up, self.bias, self.down, tau, self._runs, onto=onto)
        return (y if onto is not None else y.to(x.dtype)).view(x.shape)

    def hulls(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two convex functions, rising and falling: [..., D] → [..., D] each. For audits."""
        outputs = petal_outputs(x.reshape(-1, x.shape[-1]), self.up, self.bias, self.down, self._runs)
        rising, falling = log_mean_exp(outputs, self.log_tau.exp()).chunk(2, -1)
        return rising.view(x.shape), falling.view(x.shape)

    @staticmethod
    def width_for(dim: int, petals: int, budget: int) -> int:
        """Hidden units a petal, so that a group has the weights of a two-matrix layer with `budget` hidden units."""
        return _rounded(budget / petals)


class VectorHull(nn.Module):
    """A convex function of its input: [..., D] → [..., D], convex in every output (Amos et al. 2017; DESIGN: Hull).

        petal_p(x) = B_p softplus(A_p x + b_p) + S_p x + c_p,  B_p ≥ 0;   hull = τ⁻¹ · logsumexp_p(τ · petal_p)

    B is non-negative by its parametrisation |raw|, τ > 0 a learned constant. Once differentiable everywhere.

    Args:
        dim: D.
        petals: n.
        width: hidden units of a petal; D when None.
    """

    outputs_per_petal: int | None = None  # D

    def __init__(self, dim: int, petals: int, width: int | None = None):
        super().__init__()
        for name, value in (("dim", dim), ("petals", petals), ("width", width)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: accepted is an integer ≥ 1")
        self.dim, self.petals, self.width = dim, petals, width or dim
        outputs = self.outputs_per_petal or dim
        self.up = nn.Parameter(torch.randn(petals, self.width, dim) * dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(petals, self.width))
        self.raw = nn.Parameter(torch.randn(petals, self.width, outputs) / self.width)
        self.skip = nn.Parameter(torch.randn(petals, outputs, dim) * dim**-0.5)
        self.offset = nn.Parameter(torch.zeros(petals, outputs))
        self.log_tau = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"x of shape {tuple(x.shape)}: accepted is [..., {self.dim}]")
        flat = x.reshape(-1, self.dim)
        hidden = F.softplus(F.linear(flat, self.up.flatten(0, 1), self.bias.flatten()))
        hidden = hidden.unflatten(-1, (self.petals, self.width)).transpose(0, 1)  # [n, N, width]
        outputs = torch.bmm(hidden, self.raw.abs().to(hidden.dtype))
        straight = F.linear(flat, self.skip.flatten(0, 1), self.offset.flatten())
        outputs = outputs + straight.unflatten(-1, (self.petals, -1)).transpose(0, 1)
        exact = torch.promote_types(outputs.dtype, torch.float32)
        tau = self.log_tau.exp()
        return (torch.logsumexp(tau * outputs.to(exact), 0) / tau).to(x.dtype).view(*x.shape[:-1], self.raw.shape[-1])


class ScalarHull(VectorHull):
    """A convex function with one output: [..., D] → [...]. Otherwise as VectorHull."""

    outputs_per_petal = 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(-1)


class HullLayer(nn.Module):
    """A block's feed-forward layer: the sum of its petal groups, [..., D] → [..., D].

    Args:
        dim: D.
        petals: n of the first group.
        budget: size of that group, as the hidden units of a two-matrix layer with as many weights.
        kind: "convex" or "swiglu".
    """

    def __init__(self, dim: int, petals: int, budget: int, kind: str):
        super().__init__()
        if isinstance(petals, bool) or not isinstance(petals, int) or petals < 1:
            raise ValueError(f"petals={petals!r}: accepted is an integer ≥ 1")
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: accepted are {', '.join(KINDS)}")
        self.dim = dim
        self.kind = KINDS[kind]
        self.petal_width = self.kind.width_for(dim, petals, budget)
        self.groups = nn.ModuleList([self.kind(dim, petals, self.petal_width)])

    @property
    def petals(self) -> int:
        """Petals of all groups."""
        return sum(group.petals for group in self.groups)

    def add_petals(self, n: int) -> None:
        """Add a group of n petals, as wide as those that are there. The output does not change in the last bit."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n={n!r}: accepted is an integer ≥ 1")
        group = self.kind(self.dim, n, self.petal_width)
        like = next(self.parameters())
        self.groups.append(group.to(like).train(self.training))

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """With `onto` [..., D] the sum of it and the layer's output: one pass over memory less."""
        if len(self.groups) == 1:
            return self.groups[0](x) if onto is None else self.groups[0](x, onto)
        y = self.groups[0](x)
        for group in self.groups[1:]:
            y = y + group(x)
        return y if onto is None else onto + y


KINDS: dict[str, type[PetalGroup]] = {"convex": ConvexPetals, "swiglu": SwiGLUPetals}
