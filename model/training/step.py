"""The training step, as lines that a reader sees, and its capture as one CUDA graph.

Static shapes and no host synchronisation: learning rate, plasticity, the loss and the decision to skip a non-finite
step are device tensors. The eager path is the reference; a captured step runs the same kernels.

The lines are numbered as in the whole design. Without GENESIS those that are its own are left out, and the rest is the
same to the bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.agiformer import AGIFormer, weighted_mean
from model.data.recall import is_text, is_told
from model.kernels.cross_entropy import byte_cross_entropy
from model.training.distributed import Workers
from model.training.genesis import Genesis
from model.training.optimizer import MuonAdamW

EAGER_STEPS = 3  # steps run eagerly before capture: libraries allocate their workspaces in them


class TrainingStep:
    """One optimization step on a batch of bytes.

    Args:
        amp_dtype: torch.bfloat16, torch.float16 (then with a GradScaler) or None for float32.
        clip_norm: largest gradient norm.
        graph: capture the step on CUDA after a few eager ones, again for every new batch shape.
        genesis: its mechanisms; None for plain training.
        priced: whether writing into the byte memory costs something.
        ponder_cost: what is minimised has this times the mean of 1 − p_halt over all thinking steps added (nats).

    Attributes:
        write_price: what is minimised has this times the mean over bytes of Σ β (2 − β) added, β being the fact heads'
            writing strengths; a device scalar. A full write costs 1, and a small one twice its size: it pays to write
            in full or not at all. What tasks tell and ask costs nothing (`is_told`): where they are rare, a price on
            facts outweighs what these are good for, and the gate shuts for good.
        norm: of the last step's gradients before they were clipped, a device scalar.
    """

    def __init__(
        self,
        model: AGIFormer,
        optimizer: MuonAdamW,
        *,
        amp_dtype: torch.dtype | None = None,
        clip_norm: float = 1.0,
        graph: bool = False,
        workers: Workers | None = None,
        genesis: Genesis | None = None,
        priced: bool = False,
        ponder_cost: float = 0.0,
    ):
        self.genesis = genesis
        self.model = model
        self.optimizer = optimizer
        self.amp_dtype = amp_dtype
        self.clip_norm = clip_norm
        self.device = model.start.device
        self.workers = workers or Workers()
        self.graph = graph and self.device.type == "cuda"
        memory = model.head.memory
        self.priced = priced and memory is not None
        self._has_text_heads = memory is not None and memory.heads > memory.facts
        self.ponder_cost = ponder_cost
        self.write_price = torch.zeros((), device=self.device)
        self.norm = torch.zeros((), device=self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype == torch.float16)
        self._shape: tuple[int, ...] | None = None
        self._captured: torch.cuda.CUDAGraph | None = None
        self._eager_left = 0
        if self.graph:
            # Eager and captured steps on one side stream, as capture wants it.
            self._stream = torch.cuda.Stream()

    def run(self, batch: Tensor, weights: Tensor | None = None) -> Tensor:
        """Train on batch [B, L] uint8 (pinned, if on the host).

        Args:
            weights: [B, L] float32 ≥ 0, how much each byte counts, as `model.data.recall.mix` makes them; all alike
                when None.

        Returns:
            The loss in nats per byte, a device scalar: with weights, of the bytes of weight 1, which are text.
        """
        if not self.graph:
            there = weights if weights is None else weights.to(self.device, non_blocking=True)
            return self._step(batch.to(self.device, non_blocking=True), there)
        shape = (*batch.shape, weights is None)
        if shape != self._shape:
            self._shape = shape
            self._captured = None
            self._eager_left = EAGER_STEPS
            self._input = torch.empty(batch.shape, dtype=batch.dtype, device=self.device)
            self._weights = None if weights is None else torch.empty_like(weights, device=self.device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._input.copy_(batch, non_blocking=True)
            if weights is not None:
                self._weights.copy_(weights, non_blocking=True)
            if self._eager_left:
                self._eager_left -= 1
                loss = self._step(self._input, self._weights)
            else:
                if self._captured is None:
                    self._capture()
                self._captured.replay()
                loss = self._loss
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def recapture(self) -> None:
        """Forget the captured step: the model or its optimizer's buffers have changed."""
        self._shape = self._captured = None

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._loss = self._step(self._input, self._weights)
        self._captured = graph

    def _step(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        model, optimizer, scaler, genesis = self.model, self.optimizer, self.scaler, self.genesis
        writes, halts = [] if self.priced else None, [] if self.ponder_cost else None
        told = is_told(weights) > 0 if self._has_text_heads and weights is not None else None
        asked = writes, halts, told
        optimizer.zero_grad()
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            if genesis is not None:
                loss, total = genesis.losses(x, weights, *asked)  # 1. main loss; 2. replay loss, balanced
            else:
                loss, total = main_losses(model, x, weights, *asked)  # 1. main loss, answers counting more
        if writes:
            total = total + self.write_price * write_cost(writes[0], weights)
        if halts:
            total = total + self.ponder_cost * (1 - torch.cat(halts, -1).float()).mean()
        scaler.scale(total).backward()  # 4. backward,
        self.workers.average_(optimizer.grads)
        scaler.unscale_(optimizer)  #    unscale
        if genesis is not None:
            genesis.amplify()  # 5. amplifier, by the hidden gradients
            genesis.pace()  # learning rate by the novelty so far
        self.norm = optimizer.clip(self.clip_norm)  # 6. clip; notes non-finite gradients
        scaler.step(optimizer)  # 7. optimizer step, skipped on the device when they are; 3. consolidation, decoupled
        scaler.update()
        if genesis is not None:
            genesis.remember(self.norm)  # 8. replay write, anchors
            genesis.note()  # 9. novelty
        return loss.detach()

    def state_tensors(self) -> dict[str, Tensor]:
        """Optimizer and loss-scale state by name, for a checkpoint."""
        state = self.optimizer.state_tensors()
        if self.scaler.is_enabled():
            saved = self.scaler.state_dict()
            state["scaler.scale"] = torch.tensor(float(saved.get("scale", 2.0**16)))
            state["scaler.growth"] = torch.tensor(float(saved.get("_growth_tracker", 0)))
        return state

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`."""
        self.optimizer.load_state_tensors(state)
        if self.scaler.is_enabled() and "scaler.scale" in state:
            saved = self.scaler.state_dict()
            saved["scale"] = state["scaler.scale"].item()
            saved["_growth_tracker"] = int(state["scaler.growth"].item())
            self.scaler.load_state_dict(saved)


def write_cost(strengths: Tensor, weights: Tensor | None) -> Tensor:
    """What writing with strengths [R, H, T] into the heads for facts costs, before the price; a scalar.

    Weights [B, L], B ≤ R and L ≤ T, say what costs nothing because a task has told it; rows beyond them, which GENESIS
    rehearses, are text, and so is what fills up the last patch.
    """
    cost = (strengths * (2 - strengths)).sum(1)
    if weights is not None:
        (R, T), (B, L) = cost.shape, weights.shape
        cost = cost * F.pad(1 - is_told(weights), (0, T - L, 0, R - B), value=1.0)
    return cost.mean()


def main_losses(
    model: AGIFormer,
    x: Tensor,
    weights: Tensor | None,
    writes: list[Tensor] | None = None,
    halts: list[Tensor] | None = None,
    told: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x [B, L], weights [B, L] or None for all alike → the mean loss of its text, for the record, and the weighted one,
    to be minimised. `writes`, `halts` and `told` as in `AGIFormer.forward`."""
    if weights is None and writes is None and halts is None:
        loss = model.loss(x)
        return loss, loss
    logits = model(x, writes=writes, halts=halts, told=told)
    each = byte_cross_entropy(logits, x, "none")
    if weights is None:
        loss = each.mean()
        return loss, loss
    return weighted_mean(each.detach(), is_text(weights)), weighted_mean(each, weights)
