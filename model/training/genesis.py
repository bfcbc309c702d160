"""GENESIS in AGIFormer's training step (seed 000; DESIGN: Training step): what each of its lines calls.

Replay rows join the batch at the replay point and go through the rest of the model together with it, in one pass.
Everything below runs inside the captured step: static shapes, no host synchronisation.
What the host decides (the stage, the replay point) changes between stages, where the step is captured again.

Notable: a byte model's targets are its inputs, so an entry's bytes are enough to make its latents again, by today's
layers. That is what `replay="recomputed"` does: 1/256 of the memory of stored latents for `small`, and none
of them grow stale. `replay="stored"` keeps them, as the seed has it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.agiformer import AGIFormer, weighted_mean
from model.data.recall import has_tasks, is_text
from model.genesis.amplifier import amplify_, anchor_, flagged, position_mean
from model.genesis.balance import GradNorm
from model.genesis.learning_curve import LearningCurve, LearningCurveOptions
from model.genesis.persistence import add_consolidation_gradient_, mobility
from model.genesis.staged_replay import StagedReplay
from model.genesis.surprise import RecurringSurprises, surprising
from model.kernels.cross_entropy import byte_cross_entropy
from model.layers.block import HybridBlock
from model.layers.pyramid import Node
from model.training.distributed import Workers
from model.training.optimizer import MuonAdamW

ANCHOR_RATE, ANCHOR_DECAY, ANCHOR_MAX = 0.01, 0.99, 0.1  # η_amp, what a step keeps of an anchor, its largest value
AMPLIFICATION = 1.0  # λ: the updates of what feeds a flagged unit count 1 + λ times
SURPRISE = 2.0  # λ: the loss of a surprise counts 1 + λ times when it recurs
PROTECTION = 1.0  # s: what feeds the most important unit learns 1 + s times more slowly
RE_ENCODED = 64  # entries that pass at once when the replay point moves


@dataclass(frozen=True)
class GenesisOptions:
    """Which mechanisms a run uses. See `model.training.options.TrainingOptions` for what is accepted.

    replay: "off", "recomputed" or "stored"; replay_priority: "even" or "loss"; replay_mixed: draw from all stages alike
    (a baseline).
    amplifier: "off", "anchor", "rate", "both" of these, "surprise", or "all".
    """

    replay: str = "off"
    replay_rows: int = 2
    replay_size: int = 8192
    replay_weight: float = 0.0625
    replay_priority: str = "even"
    replay_depth: int = 0
    replay_mixed: bool = False
    amplifier: str = "off"
    persistence: float = 0.0  # λ of the pull towards the references; 0 is off
    learning_curve: bool = False
    balance: bool = False

    @property
    def any(self) -> bool:
        """Whether there is anything to do. Balance alone has nothing to balance."""
        return self.replay != "off" or self.watches or self.surprise or self.learning_curve

    @property
    def anchors(self) -> bool:
        """Whether flagged units are anchored."""
        return self.amplifier in ("anchor", "both", "all")

    @property
    def rate(self) -> bool:
        """Whether what feeds flagged units learns faster."""
        return self.amplifier in ("rate", "both", "all")

    @property
    def surprise(self) -> bool:
        """Whether recurring surprises count more."""
        return self.amplifier in ("surprise", "all")

    @property
    def watches(self) -> bool:
        """Whether hidden gradients are looked at."""
        return self.anchors or self.rate or self.persistence > 0

    @property
    def gated(self) -> bool:
        """Whether what the gate's policy blocks has to be known."""
        return self.watches or self.surprise


class Genesis:
    """The mechanisms on one model and optimizer.

    Args:
        batch_size: sequences of a full batch, which rehearses `replay_rows`; another batch rehearses in proportion.
        entry: bytes of an entry in memory: the shortest sequence of the curriculum's stages.
        stages, steps: numbers of them in the run.
        blocked: called with the batch [B, L] → [B, L] bool, targets that the gate's policy blocks; None for none.

    Attributes:
        stage: the stage that the step trains; change it with `enter_stage`.
        importance: [blocks, D] float32, how often the amplifier has flagged each unit.
    """

    def __init__(
        self,
        model: AGIFormer,
        optimizer: MuonAdamW,
        options: GenesisOptions,
        *,
        batch_size: int,
        entry: int,
        stages: int,
        steps: int,
        workers: Workers | None = None,
        blocked=None,
    ):
        self.model, self.optimizer, self.options = model, optimizer, options
        self.batch_size, self.entry = batch_size, entry
        self.workers = workers or Workers()
        self.blocked = blocked
        self.stages = stages
        self.stage = torch.zeros((), dtype=torch.int64)
        device, D = model.start.device, model.config.d_model
        n = len(model.blocks)
        if options.replay_depth > n:
            raise ValueError(f"replay_depth={options.replay_depth}: accepted is from 0 to {n}, the model's blocks")
        if options.replay_depth == n and model.config.thinking_reads:
            raise ValueError(f"replay_depth={n}: accepted with thinking_reads, of the last block, is below {n}")
        self.memory: StagedReplay | None = None
        if options.replay != "off" and (stages > 1 or options.replay_mixed):
            if options.replay == "stored" and entry % model.config.patch_size:
                raise ValueError(
                    f"seq_len={entry}: accepted with replay='stored' is a multiple of {model.config.patch_size}"
                )
            latents = (entry // model.config.patch_size, model.width) if options.replay == "stored" else (0,)
            self.memory = StagedReplay(
                stages, options.replay_size, latents, (entry,), mixed=options.replay_mixed, device=device
            )
        # What all workers average in a step, as one tensor: |∂L/∂h| and h by block and unit, and the loss.
        self._shared = torch.zeros(2 * n * D + 1, device=device)
        self.magnitude, self.hidden = self._shared[:-1].view(2, n, D)
        self.loss = self._shared[-1]
        self.importance = torch.zeros(n, D, device=device)
        self.references: dict[str, Tensor] = {}
        self._feeding: list[list[tuple[str, torch.nn.Parameter, int]]] = []
        self.consolidates = torch.zeros((), device=device)  # 1 once there is a reference to be pulled to
        self.curve = LearningCurve(_curve_options(steps), device) if options.learning_curve else None
        self.balance = GradNorm(2, device=device) if options.balance and self.memory is not None else None
        self.surprises = RecurringSurprises(device=device) if options.surprise else None
        self.rebuild()

    def rebuild(self) -> None:
        """Find the weights anew after the model has grown or the optimizer was laid out anew."""
        names = {id(p): name for name, p in self.model.named_parameters() if p.requires_grad}
        # By the weight itself: one that grew may have the name that another had before.
        known = {id(p): self.references[name] for block in self._feeding for name, p, _ in block if self.references}
        self._feeding = [
            [(names[id(p)], p, dim) for p, dim in feeding_weights(block) if id(p) in names]
            for block in self.model.blocks
        ]
        ours = [self._amplify_updates] if self.options.rate else []
        if self.options.persistence:
            self.references = {
                name: known[id(p)] if id(p) in known else p.detach().clone()
                for block in self._feeding
                for name, p, _ in block
            }
            ours.append(self._persist)
        others = (each for each in self.optimizer.modifiers if each not in (self._amplify_updates, self._persist))
        self.optimizer.modifiers = [*ours, *others]
        if self.options.replay == "stored" and self.memory is not None:
            for ring in self.memory.rings:
                # Channels that `widen` has added: what they would have held is not known.
                ring.hidden = F.pad(ring.hidden, (0, self.model.width - ring.hidden.shape[-1]))

    # ── what the host decides ────────────────────────────────────────────────────────────────────────────────────

    def enter_stage(self, stage: int) -> None:
        """Go on to a stage: the one before it becomes something to rehearse and to keep. Changes the step's graph."""
        before = self.replay_point
        if self.references and stage > int(self.stage):
            for block in self._feeding:
                for name, p, _ in block:
                    self.references[name].copy_(p.detach())
            self.consolidates.fill_(1.0)
        self.stage.fill_(stage)
        if self.options.replay == "stored" and self.memory is not None:
            self._move_latents(before, self.replay_point)

    @property
    def replay_point(self) -> int:
        """Blocks that replayed latents do not pass, or pass without gradient: from 0 to `replay_depth` by stage."""
        return round(self.options.replay_depth * int(self.stage) / max(1, self.stages - 1))

    @torch.no_grad()
    def _move_latents(self, start: int, stop: int) -> None:
        """Take all stored latents through the blocks between two replay points."""
        if stop == start:
            return
        for ring in self.memory.rings:
            for rows in ring.hidden[: ring.size].split(RE_ENCODED):
                rows.copy_(self._through(rows.float(), start, stop))

    @torch.no_grad()
    def _through(self, z: Tensor, start: int, stop: int) -> Tensor:
        """Latents after `start` blocks → after `stop` blocks, without gradient. Routers take their mean."""
        training = self.model.training
        self.model.eval()
        z = self.model.trunk(z, first=start, last=stop)[0]
        self.model.train(training)
        return z

    # ── the step's lines ─────────────────────────────────────────────────────────────────────────────────────────

    def losses(
        self,
        x: Tensor,
        weights: Tensor | None = None,
        writes: list[Tensor] | None = None,
        halts: list[Tensor] | None = None,
        told: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [B, L] → the main loss in nats per byte, and what is to be minimised: it and the weighted replay loss.

        With weights [B, L] the main loss is that of the text, and what is minimised counts each byte as they say.
        `writes` and `halts` as in `AGIFormer.forward`, of all rows that are read; `told` [B, L] as there, of x:
        what is rehearsed has no tasks.
        """
        model, stage = self.model, int(self.stage)
        model.head.joined = self.balance is None  # which asks for the gradient of the head's last layer alone
        rehearses = self.memory is not None and self.memory.past(stage) > 0
        point, stored = self.replay_point, self.options.replay == "stored"
        B, rows, joined = len(x), x, None
        if rehearses:
            latents, targets, valid = self._rehearsal(x, stage)
            rows = torch.cat([x, targets])
            if stored:
                joined = latents
            elif point:
                joined = self._through(model.latents(targets).detach(), 0, point)
        self._batch, self._kept = x, None
        blocked = None if self.blocked is None else self.blocked(x)

        def visit(depth: int, z: Tensor) -> Tensor:
            if depth == point:
                self._kept = z[:B].detach()
                if joined is not None:
                    z = torch.cat([z, joined.to(z.dtype)])
            if depth and self.options.watches and z.requires_grad:
                self._watch(depth - 1, z, B)
            return z

        if self.options.watches:
            self._counts = self._positions_that_count(blocked)
        z, state = model.trunk(model.latents(x if joined is not None else rows), visit=visit)
        if told is not None:
            told = F.pad(told, (0, 0, 0, len(rows) - B))
        logits = model.read_out(model.think(z, state, halts=halts), rows, writes, told)
        each = byte_cross_entropy(logits, rows, "none")
        # Split, not two slices: their gradients would be two tensors of zeros, filled and added up.
        ours, theirs = each.split([B, len(rows) - B]) if rehearses else (each, None)
        main = self._main_loss(x, ours, weights, blocked)
        loss = main
        if weights is not None:
            loss = weighted_mean(ours, is_text(weights))
        elif self.surprises is not None:
            loss = ours.mean()
        if self.curve is not None:
            self.loss.copy_(loss.detach())
        if self._remembers(stage):
            self._row_losses = ours.detach().mean(1)
            if weights is not None:
                # Not finite is not remembered: tasks are made anew in every stage, and would be rehearsed as text.
                self._row_losses = self._row_losses.masked_fill(has_tasks(weights), torch.inf)
        if not rehearses:
            return loss, main
        theirs, valid = theirs.mean(1), valid.to(each.dtype)
        self._rehearsed_losses = theirs.detach()
        replayed = (theirs * valid).sum() / valid.sum().clamp_min(1)
        if self.balance is None:
            return loss, torch.add(main, replayed, alpha=self.options.replay_weight)
        weights = self._balanced(main, replayed, (1.0, self.options.replay_weight))
        return loss, weights[0] * main + weights[1] * replayed

    def _remembers(self, stage: int) -> bool:
        """Whether the batch of a stage is written to memory."""
        return self.memory is not None and self.memory.written_by(stage) is not None

    def _main_loss(self, x: Tensor, each: Tensor, weights: Tensor | None, blocked: Tensor | None) -> Tensor:
        """x [B, L] and each byte's loss [B, L] → their mean, in which surprises that recur count more."""
        if self.surprises is None:  # one mean over all bytes, as in `model.loss`: one of means would round otherwise
            return each.mean() if weights is None else weighted_mean(each, weights)
        self._surprising = surprising(each.detach())
        if blocked is not None:
            self._surprising &= ~blocked
        if weights is not None:
            self._surprising &= is_text(weights) > 0
        counts = 1 + SURPRISE * (self._surprising & self.surprises.seen_once(x)).to(each.dtype)
        return weighted_mean(each, counts if weights is None else counts * weights)

    def _rehearsal(self, x: Tensor, stage: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that rehearse beside x [B, L]: latents [R, T, D], bytes [R, L], whether all of a row is one [R] bool.

        An entry longer than a row is cut; where it is shorter, several follow each other in a row.
        """
        L, P = x.shape[1], self.model.config.patch_size
        R = max(1, self.options.replay_rows * len(x) // self.batch_size)
        self._joined = -(-L // self.entry)
        self._drawn = self.memory.draw(R * self._joined, stage)
        latents, targets, valid = self.memory.gather(*self._drawn, stage)
        latents = latents.flatten(1).reshape(R, -1)  # of an empty entry too
        if self.options.replay == "stored":
            latents = latents.unflatten(1, (-1, self.model.width))[:, : -(-L // P)]
        return latents, targets.reshape(R, -1)[:, :L], valid.view(R, -1).all(1)

    def _balanced(self, loss: Tensor, replayed: Tensor, weights: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """GradNorm's factors on our weights, by the gradients at the layer that both losses share last."""
        shared = self.model.head.output.weight
        # Of the losses as they are: of the weighted ones, equally large gradients would undo the weights.
        terms = torch.stack([loss, replayed])
        # The losses are means over many bytes: their gradients would vanish in fp16.
        scale = float(self._batch.numel())
        norms = [
            torch.autograd.grad(scale * term, shared, retain_graph=True)[0].float().norm() / scale for term in terms
        ]
        factors = self.balance.weights.clone()
        measured = torch.stack([terms.detach(), torch.stack(norms)])
        self.workers.average_(measured)  # or every worker would come to weights of its own
        self.balance.update(*measured)
        return factors[0] * weights[0], factors[1] * weights[1]

    def _positions_that_count(self, blocked: Tensor | None) -> Tensor | None:
        """[B, T] bool: positions whose patch has none of the blocked [B, L] bytes. None is all."""
        if blocked is None:
            return None
        P = self.model.config.patch_size
        return ~F.pad(blocked, (0, -blocked.shape[1] % P)).unflatten(1, (-1, P)).any(-1)

    def _watch(self, block: int, z: Tensor, B: int) -> None:
        D = self.model.config.d_model
        self.hidden[block].copy_(position_mean(z[:B, :, :D].detach(), self._counts))
        counts = self._counts

        def look(gradient: Tensor) -> None:
            self.magnitude[block].copy_(position_mean(gradient[:B, :, :D], counts, absolute=True))

        z.register_hook(look)

    @torch.no_grad()
    def amplify(self) -> None:
        """Flag the units of large gradient."""
        if self.options.watches or self.curve is not None:
            self.workers.average_(self._shared)
        if not self.options.watches:
            return
        self._masks = flagged(self.magnitude)

    def pace(self) -> None:
        """Set the learning rate of this step by the learning curve."""
        if self.curve is not None:
            self.optimizer.lr.mul_(self.curve.rate_factor())

    @torch.no_grad()
    def _amplify_updates(self, updates: Tensor) -> None:
        """Amplify the updates of what feeds flagged units. Called by the optimizer: Muon undoes a gradient's factor."""
        for mask, block in zip(self._masks, self._feeding):
            for name, _, dim in block:
                span, shape = self.optimizer.views[name]
                amplify_(updates[span].view(shape), mask, AMPLIFICATION, dim=dim)

    @torch.no_grad()
    def _persist(self, updates: Tensor) -> None:
        """Damp the updates of what feeds important units, and pull it to its reference. Called by the optimizer.

        The pull is decoupled, as weight decay is in AdamW: inside the loss, Muon would take its size away.
        """
        largest = self.importance.amax(1, keepdim=True).clamp_min(1.0)
        for importance, relative, block in zip(self.importance, self.importance / largest, self._feeding):
            free = mobility(importance, PROTECTION * self.consolidates)
            for name, p, dim in block:
                span, shape = self.optimizer.views[name]
                update = updates[span].view(shape).movedim(dim, 0)
                update.mul_(free.view(-1, *[1] * (update.dim() - 1)))
                add_consolidation_gradient_(
                    update,
                    p.detach().movedim(dim, 0),
                    self.references[name].movedim(dim, 0),
                    relative,
                    self.options.persistence * self.consolidates,
                )

    @torch.no_grad()
    def remember(self, norm: Tensor) -> None:
        """Write the batch and its surprises to memory, anchor flagged units; nothing of it after a step whose
        gradients have a norm, a scalar, that is not finite."""
        stage = int(self.stage)
        by_loss = self.options.replay_priority == "loss"  # what is hard is rehearsed more
        reprioritises = by_loss and self.memory is not None and self.memory.past(stage) > 0
        if not (self.options.gated or reprioritises or self._remembers(stage)):
            return
        finite = norm.isfinite()
        if self.options.watches:
            masks = self._masks * finite
            self.importance.add_(masks)
            if self.options.anchors:
                decay = 1 - (1 - ANCHOR_DECAY) * finite
                anchor_(self.model.anchors, masks, self.hidden, rate=ANCHOR_RATE, decay=decay, bias_max=ANCHOR_MAX)
        if self.surprises is not None:
            self.surprises.write(self._batch, self._surprising & finite)
        # Memory takes nothing that is not finite.
        if reprioritises:
            now = torch.where(finite, self._rehearsed_losses, torch.inf).repeat_interleave(self._joined)
            self.memory.reprioritise(*self._drawn, now, stage)
        if self._remembers(stage):
            ring = self.memory.written_by(stage)
            hidden, targets, losses = self._entries(torch.where(finite, self._row_losses, torch.inf))
            priority = losses if by_loss else torch.where(losses.isfinite(), 1.0, losses)
            ring.write(hidden[: ring.size], targets[: ring.size], priority[: ring.size])

    def _entries(self, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The batch as entries: long rows are cut; short ones follow each other until they are as long as an entry."""
        x, kept, M = self._batch, self._kept, self.entry
        several = -(-M // x.shape[1])
        n = len(x) // several
        targets = x[: n * several].reshape(n, several * x.shape[1])[:, :M]
        hidden = kept.new_zeros(n, 0)
        if self.options.replay == "stored":
            hidden = kept[: n * several].reshape(n, several * kept.shape[1], kept.shape[-1])
            hidden = hidden[:, : M // self.model.config.patch_size]
        return hidden, targets, losses[: n * several].view(n, several).mean(1)

    @torch.no_grad()
    def note(self) -> None:
        """Take the loss into the novelty."""
        if self.curve is not None:
            self.curve.update(self.loss)

    # ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────

    def shared_state(self) -> dict[str, Tensor]:
        """What is the same on every worker, by name."""
        state = {"stage": self.stage}
        if self.options.watches:
            state |= {"importance": self.importance, "consolidates": self.consolidates}
        state |= {f"reference.{name}": tensor for name, tensor in self.references.items()}
        for name, module in (("curve", self.curve), ("balance", self.balance)):
            if module is not None:
                state |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
        return state

    def own_state(self) -> dict[str, Tensor]:
        """What each worker has for itself, by name: its memory, and what surprised it."""
        parts = (("memory", self.memory), ("surprises", self.surprises))
        return {f"{name}.{k}": v for name, part in parts if part is not None for k, v in part.state_dict().items()}

    def report(self) -> dict[str, object]:
        """What the mechanisms have done so far, as plain values. Waits for the device."""
        row: dict[str, object] = {}
        if self.memory is not None:
            row["remembered"] = [int(ring.count()) for ring in self.memory.rings]
        if self.options.watches:
            row["flagged_units"] = int((self.importance > 0).sum())
        if self.model.anchors is not None:
            row["anchor_size"] = float(self.model.anchors.abs().mean())
        if self.curve is not None:
            row |= {"novelty": float(self.curve.novelty()), "rate_factor": float(self.curve.rate_factor())}
        if self.balance is not None:
            row["loss_weights"] = self.balance.weights.tolist()
        return row

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over both; a missing or misshapen tensor is an error that names it."""
        for name, tensor in (self.shared_state() | self.own_state()).items():
            if name not in state or state[name].shape != tensor.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"training state genesis.{name}: found {found}, accepted is {tuple(tensor.shape)}")
            tensor.copy_(state[name])


def feeding_weights(block: HybridBlock | Node) -> Iterator[tuple[torch.nn.Parameter, int]]:
    """The weights that feed the units of a block's output, and which of their dimensions counts the units.

    A node adds what passes its gate to its left tree's output; its right tree is heard through the gate alone.
    """
    if isinstance(block, Node):
        yield block.gate.weight, 0
        yield from feeding_weights(block.left)
        return
    yield block.output.weight, 0
    for group in block.hull.groups:
        yield group.down, 2


def _curve_options(steps: int) -> LearningCurveOptions:
    """The learning curve of a run of so many steps: its averages and waits are shares of it."""
    return LearningCurveOptions(
        ramp=max(1, steps // 20),
        patience=max(1, steps // 100),
        settle=max(1, steps // 50),
        novelty_decay=max(0.5, 1 - 25 / steps) if steps > 50 else 0.5,
        slow_decay=max(0.9, 1 - 5 / steps) if steps > 50 else 0.9,
    )
