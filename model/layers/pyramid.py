"""The pyramid: a block of blocks (BoB) is a binary tree of blocks with the input and output of one (DESIGN: Pyramid).

                    x ──► left (the tree that was there, frozen) ──► mixer ──► l ─────────────────► + ──► y
                    └──► projector ──► right (a fresh tree)  ──► r                                 ▲
                              router(x) ──► w_l, w_r      norm(2 w_l l), norm(2 w_r r) ──► wide ──► gate (starts at 0)
                                                                                          attention

A leaf owns its own D-wide channel slice, which it reaches through the projectors on its path, and leaves never mix
channels with each other; only the nodes above consolidate them. Growing replaces a tree by a node whose left child it
is and whose right child is a fresh tree as deep, so that a BoB of depth k has 2^k leaves and 2^k − 1 nodes: parameters
and time grow linearly with the leaves (seed 003).

Notable: everything that is new passes through `gate`, a matrix that starts at exactly zero, so that growing changes no
logit, not in the last bit. The mixer starts at exactly the identity for the same reason.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.transforms import apply
from model.layers.attention import AttentionState, WindowAttention
from model.layers.block import BlockState, HybridBlock
from model.layers.norm import rms_norm
from model.layers.rotary import Phases

SINKHORN_ITERATIONS = 10
# The router's temperature: its Dirichlet sample is wide at first and ends as its mean, within some thousand steps.
HOTTEST, COLDEST, COOLING = 1.0, 0.01, 0.995
LOAD_MEMORY = 0.99  # of the running mean of the router's weights


@dataclass
class NodeState:
    """Streaming state of a node: its children's, and the window cache of its wide attention."""

    left: "BlockState | NodeState"
    right: "BlockState | NodeState"
    attention: AttentionState

    def clone(self) -> "NodeState":
        return NodeState(self.left.clone(), self.right.clone(), self.attention.clone())

    def tensors(self) -> list[Tensor]:
        """All tensors of the state."""
        return [*self.left.tensors(), *self.right.tensors(), *self.attention.tensors()]


class DirichletRouter(nn.Module):
    """Weights of the children per position, from a Dirichlet distribution (seed 003, o3's tip).

    The concentrations come from the input: c = (softplus(W norm(x) + b) + 1/2) / temperature. Training draws a sample,
    evaluation takes the mean. The temperature falls with every forward pass in training, and the sample closes in on
    the mean.
    """

    def __init__(self, d_model: int, children: int = 2):
        super().__init__()
        self.concentration = nn.Linear(d_model, children)
        self.temperature: Tensor
        self.load: Tensor
        self.register_buffer("temperature", torch.tensor(HOTTEST))
        self.register_buffer("load", torch.full((children,), 1 / children))

    @torch.no_grad()
    def reset(self) -> None:
        """No preference, hot."""
        self.concentration.weight.zero_()
        self.concentration.bias.zero_()
        self.temperature.fill_(HOTTEST)
        self.load.fill_(1 / self.load.numel())

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D], normalised → weights [B, T, children], which sum to 1; float32 at least."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            weight, bias = self.concentration.weight.to(x.dtype), self.concentration.bias.to(x.dtype)
            concentration = F.softplus(F.linear(x, weight, bias)) + 0.5
            if not self.training:
                return concentration / concentration.sum(-1, keepdim=True)
            # validate_args would look at the values, which waits for the device.
            # A copy: the backward pass needs today's temperature, and it falls before that.
            concentration = concentration / self.temperature.clone()
            dirichlet = torch.distributions.Dirichlet(concentration, validate_args=False)
            weights = dirichlet.rsample()
            with torch.no_grad():
                self.temperature.mul_(COOLING).clamp_(min=COLDEST)
                # A step that is skipped for numbers that are not finite leaves nothing of them here either.
                mean = weights.mean((0, 1)).to(self.load.dtype)
                self.load.lerp_(torch.where(mean.isfinite(), mean, self.load), 1 - LOAD_MEMORY)
            return weights


class SinkhornMixer(nn.Module):
    """(1 − g) x + g S x over channel slices, S doubly stochastic by Sinkhorn's iteration (seed 003, o3's tip).

    Every output slice is an average of input slices, and every input slice is used as much as any other. A convex
    combination with the identity is doubly stochastic too. g starts at exactly 0.
    """

    def __init__(self, slices: int):
        super().__init__()
        self.slices = slices
        self.scores = nn.Parameter(torch.zeros(slices, slices))
        self.amount = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def reset(self) -> None:
        """The identity. The scores are not all equal, so that they have something to learn from."""
        nn.init.normal_(self.scores)
        self.amount.zero_()

    def matrix(self) -> Tensor:
        """S [slices, slices]: rows sum to 1 exactly, columns within the iteration's error."""
        log_matrix = self.scores
        for _ in range(SINKHORN_ITERATIONS):
            log_matrix = log_matrix - log_matrix.logsumexp(0, keepdim=True)
            log_matrix = log_matrix - log_matrix.logsumexp(1, keepdim=True)
        return log_matrix.exp()

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        slices = x.unflatten(-1, (self.slices, -1))
        mixed = torch.einsum("st,...td->...sd", self.matrix().to(x.dtype), slices)
        amount = apply(_UnitInterval, self.amount).to(x.dtype)
        return x + amount * (mixed - slices).flatten(-2)


class _UnitInterval(torch.autograd.Function):
    """min(max(x, 0), 1), with the gradient that leads back into [0, 1] kept: a value at the border is not stuck."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        stuck = ((x <= 0) & (grad > 0)) | ((x >= 1) & (grad < 0))  # a descent step would lead further out
        return torch.where(stuck, 0.0, grad)


class Node(nn.Module):
    """An inner node of a block of blocks: consolidates a frozen left tree and a fresh right one.

    Args:
        left: the tree that was there. Frozen: in eval mode always, and without gradients, until `thaw`.
        right: the fresh block.
    """

    def __init__(self, left: "HybridBlock | Node", right: HybridBlock, d_model: int, n_heads: int, window: int):
        super().__init__()
        self.left, self.right = left, right
        self.frozen = True
        # α that the frozen tree learned under: another one would make its memories other functions.
        self.plasticity: Tensor
        self.register_buffer("plasticity", torch.ones(()))
        self.projector = nn.Linear(d_model, d_model, bias=False)
        self.router = DirichletRouter(d_model)
        self.mixer = SinkhornMixer(n_heads)
        self.attention = WindowAttention(d_model, n_heads, window, inputs=2 * d_model)
        self.gate = nn.Linear(2 * d_model, d_model, bias=False)
        left.requires_grad_(False)
        self.train(self.training)

    @torch.no_grad()
    def reset(self) -> None:
        """Nothing passes the gate."""
        self.gate.weight.zero_()

    def train(self, mode: bool = True) -> "Node":
        super().train(mode)
        if self.frozen:
            self.left.train(False)
        return self

    def thaw(self) -> None:
        """Let the left tree, and all in it, learn again."""
        self.frozen = False
        for node in (n for n in self.left.modules() if isinstance(n, Node)):
            node.frozen = False
        self.left.requires_grad_(True)
        self.train(self.training)

    def forward(
        self, x: Tensor, phases: Phases, plasticity: Tensor, state: NodeState | None = None
    ) -> tuple[Tensor, NodeState]:
        """As a HybridBlock's: x [B, T, D] → [B, T, D], and the state after it."""
        left, left_state = self.left(
            x, phases, self.plasticity if self.frozen else plasticity, None if state is None else state.left
        )
        right, right_state = self.right(self.projector(x), phases, plasticity, None if state is None else state.right)
        weights = 2 * self.router(rms_norm(x))  # an even split leaves both at their size
        left = self.mixer(left)
        seen = weights[..., :1].to(left.dtype) * rms_norm(left)
        fresh = weights[..., 1:].to(left.dtype) * rms_norm(right).to(left.dtype)
        attended, attention_state = self.attention(
            torch.cat([seen, fresh], -1), phases, None if state is None else state.attention
        )
        added = self.gate(torch.cat([attended.to(fresh.dtype), fresh], -1))
        y = left + weights[..., 1:].to(added.dtype) * added
        return y, NodeState(left_state, right_state, attention_state)


def leaves(tree: nn.Module) -> Iterator[HybridBlock]:
    """The blocks of a tree, oldest first."""
    if isinstance(tree, Node):
        yield from leaves(tree.left)
        yield from leaves(tree.right)
    else:
        yield tree


def learning_leaves(tree: nn.Module) -> Iterator[HybridBlock]:
    """The blocks of a tree that are not frozen."""
    if isinstance(tree, Node):
        if not tree.frozen:
            yield from learning_leaves(tree.left)
        yield from learning_leaves(tree.right)
    else:
        yield tree


def depth(tree: nn.Module) -> int:
    """0 for a single block."""
    return 1 + max(depth(tree.left), depth(tree.right)) if isinstance(tree, Node) else 0
