"""The gate in generation: masks every byte that would complete a match of a policy, and logs what it took away.

    gate = ByteGate(compile_policy(load_policy()), batch_size=2)
    gate.read([b"a prompt", b"another"])
    chosen = sample(gate.mask(logits), ...)
    gate.advance(chosen)

Notable: nothing of it waits for the device but `removals`, which is for the rows that `flagged` names. All state is
replaced, never written in place: a copy of a gate is a branch of it. The look-ups are written once for two kinds of
arrays: tensors on a GPU, NumPy's on the CPU, where a byte of one row is too little work for PyTorch's calls.
"""

import json
import os
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.genesis.gate.automaton import ByteAutomaton
from model.kernels.automaton import run

LEAST_MASS = 1e-3
CONTEXT = 200  # bytes of text before the masked byte in a log that has text


@dataclass(frozen=True)
class Removal:
    """What the mask took from one category at one byte of a row.

    `byte` is the most probable of the bytes removed, `rule` the name of the rule that it would have completed, `state`
    that of the rule's automaton; `mass` is the probability of all bytes removed for the category.
    """

    row: int
    category: str
    rule: str
    state: int
    byte: int
    mass: float


class ByteGate:
    """Keeps every row of a batch from completing a match.

    Args:
        automaton: of `compile_policy`.
        batch_size: B, rows.
        device: where the logits are.
        least_mass: rows of which at least this probability is masked are flagged.
    """

    def __init__(
        self,
        automaton: ByteAutomaton,
        batch_size: int,
        device: torch.device | str = "cpu",
        *,
        least_mass: float = LEAST_MASS,
    ):
        self.automaton = automaton
        self.least_mass = least_mass
        self._tables = automaton.tables(device)
        masks = automaton.masks(device)
        self._nothing = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self._on_host = not self._nothing.is_cuda
        replacement = torch.tensor(automaton.replacement, dtype=torch.int32, device=device)
        arrays = self._tables.table, masks.byte_sets, masks.sets, masks.blocked, replacement
        if self._on_host:
            arrays = [each.numpy() for each in arrays]
        self._table, self._byte_sets, self._sets, self._blocked_sets, self._replacement = arrays
        self._move(*self._tables.begin(batch_size))
        self._before = self._node, self._registers
        self._taken: tuple[Tensor, Tensor] | None = None  # what was last masked, and where; None: nowhere
        self._begins, self._stuck = True, self._nothing

    def read(self, prompts: Sequence[bytes]) -> "ByteGate":
        """Begin anew after these prompts, one a row. Returns the gate itself.

        What a prompt alone completes is not held against its continuation; what it only begins is.
        """
        if len(prompts) != len(self._node):
            raise ValueError(f"prompts has {len(prompts)} rows: accepted are {len(self._node)}")
        known = {prompt: self.automaton.read(prompt) for prompt in dict.fromkeys(prompts)}
        nodes, registers = zip(*(known[prompt] for prompt in prompts))
        self._begins, self._stuck = True, self._nothing
        device = self._nothing.device
        self._move(*(torch.tensor(each, dtype=torch.int32).to(device) for each in (nodes, registers)))
        return self

    def _move(self, node: Tensor, registers: Tensor) -> None:
        self._node, self._registers = (node.numpy(), registers.numpy()) if self._on_host else (node, registers)
        heads = self._table[self._registers]
        # Rows in which something is blocked, [n]: mostly none. All of them where looking would wait for the device.
        self._rows = heads.any(1).nonzero()[0] if self._on_host else slice(None if heads.shape[1] else 0)
        self._heads = heads[self._rows]  # [n, F]

    def _spread(self, found: Tensor | np.ndarray) -> Tensor:
        """[n, ...] bool of the rows in which something is blocked → [B, ...], False elsewhere."""
        found = torch.as_tensor(found)
        if len(found) == len(self._nothing):
            return found
        spread = torch.zeros(len(self._nothing), *found.shape[1:], dtype=torch.bool, device=found.device)
        spread[self._rows] = found
        return spread

    def blocked(self) -> Tensor:
        """[B, 256] bool: the bytes that would complete a match, or that can become nothing but such a byte."""
        if not len(self._heads):
            return self._nothing.unsqueeze(1).expand(-1, 256)
        sets = self._blocked_sets[self._heads[:, 0]]
        for f in range(1, self._heads.shape[1]):
            sets = sets | self._blocked_sets[self._heads[:, f]]
        can_become = self._sets[self._byte_sets[self._node[self._rows]]]
        return self._spread(((can_become & ~sets[:, None]) == 0).all(-1))

    def mask(self, logits: Tensor) -> Tensor:
        """logits [B, 256] with −inf at every blocked byte, and some byte left.

        One thing leaves none: a prompt that ends inside a character, all of whose completions are blocked, where only
        UTF-8 may be written. Such a row is left as it is, and `must_not_end` from there on: its bytes are for nobody.
        """
        self._before = self._node, self._registers
        begins, self._begins = self._begins, False
        if not len(self._heads):
            self._taken = None
            return logits
        blocked = self.blocked()
        if begins:
            self._stuck = ~logits.masked_fill(blocked, -torch.inf).isfinite().any(-1)
        blocked = blocked & ~self._stuck.unsqueeze(1)
        self._taken = logits, blocked
        return logits.masked_fill(blocked, -torch.inf)

    def advance(self, chosen: Tensor) -> None:
        """Read the bytes chosen [B] from masked logits."""
        node, registers = torch.as_tensor(self._node), torch.as_tensor(self._registers)
        _, *state = run(self._tables, chosen.to(torch.uint8).unsqueeze(1), node, registers)
        self._move(*state)

    def flagged(self) -> Tensor:
        """[B] bool: rows of which the last mask took at least `least_mass` of the probability."""
        return self._nothing if self._taken is None else self._removed().sum(-1) >= self.least_mass

    def _removed(self) -> Tensor:
        """[B, 256] float32: the probability of each byte that the last mask took."""
        logits, blocked = self._taken
        return logits.float().softmax(-1) * blocked

    def must_not_end(self) -> Tensor:
        """[B] bool: rows of which the text must not end here: it would complete a match, as the end of a word."""
        if not len(self._heads):  # where the end is blocked, so is what ends a word
            return self._stuck
        inside = (self._node[self._rows] > 0)[:, None]
        # The beginning of a character would read as U+FFFD.
        column = inside * self._replacement + ~inside * 1
        return self._spread((self._table[self._registers[self._rows] + column] < 0).any(1)) | self._stuck

    def removals(self, rows: Sequence[int]) -> list[Removal]:
        """What the last mask took from these rows: one entry for each category of a row. Waits for the device."""
        if self._taken is None:
            return []
        index = torch.tensor(rows, device=self._nothing.device)
        node, registers = (torch.as_tensor(each)[index].tolist() for each in self._before)
        found = []
        for i, removed in enumerate(self._removed()[index].tolist()):
            by_category: dict[str, list[tuple[float, int]]] = {}
            reasons = {}
            for byte, mass in enumerate(removed):
                if mass > 0 and (reason := self.automaton.explain(node[i], registers[i], byte)):
                    reasons[byte] = reason
                    by_category.setdefault(reason[0].category, []).append((mass, byte))
            for category, taken in by_category.items():
                byte = max(taken)[1]
                rule, state = reasons[byte]
                found.append(Removal(rows[i], category, rule.name, state, byte, sum(mass for mass, _ in taken)))
        return found


class GateLog:
    """Appends interventions to a file, one JSON object a line, and counts them by category.

    Args:
        path: appended to, and made by the first intervention; None only counts.
        with_text: also write the text before the masked byte, up to CONTEXT bytes of it.
    """

    def __init__(self, path: str | os.PathLike | None = None, *, with_text: bool = False):
        self.path = None if path is None else Path(path)
        self.with_text = with_text
        self.run = secrets.token_hex(4)
        self.counts: Counter[str] = Counter()
        self.failure: OSError | None = None  # why not every line is in the file

    def add(self, removal: Removal, position: int, text: bytes = b"") -> None:
        """Write one line. A file that cannot be written is noted in `failure`: the text goes on.

        Args:
            removal: what was masked.
            position: bytes generated before it in its row.
            text: before it, the prompt included.
        """
        self.counts[removal.category] += 1
        if self.path is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {
            "time": now, "run": self.run, "row": removal.row, "position": position, "category": removal.category,
            "rule": removal.rule, "state": removal.state, "byte": removal.byte, "mass": round(removal.mass, 6),
        }  # fmt: skip
        if self.with_text:
            line["text"] = text[-CONTEXT:].decode("utf-8", "replace")
        try:
            # One write of a line to a file that is only appended to: lines of several processes do not mix.
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(handle, (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
            finally:
                os.close(handle)
        except OSError as error:
            self.failure = error
