"""The router: whether a message is to be stored, calls for what is stored, or neither, and how far to trust (seed 001).

    router = MemoryRouter.load_or_train("router.safetensors")      # trained in seconds where the file is missing
    router.decide("My dog is called Rex.")                         → Decision("store", 0.98, 0.99, "fact")
    router.trust("What is my dog called?", matches)                → [0.97]

    e = Σ_g E[hash(g)] / √n                    over the n different grams g of the folded text, of 1 to 4 bytes
    z = B gelu(A e + a) + b                    three logits of the action, three of the kind, one of certainty
    trust of a message = (1 + σ(z₇)) / 2
    trust of a match = σ(w · features + c)     features of query, entry and scores: `trust.py`

Notable: hashing (Weinberger et al. 2009) needs no vocabulary, and folding makes Turkish typed without its letters the
same text. No weights are kept in the repository: training is deterministic, on patterns that the project makes. A file
of weights says what it was trained by, and is trained again when that has changed.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from model.files import write_atomically
from model.genesis.gate import folding
from model.genesis.gate.folding import fold
from model.sgm import (
    facts,
    memory,
    memory_entry,
    memory_json,
    memory_text,
    patterns,
    phrases,
    phrases_en,
    phrases_tr,
    trust,
    turkish,
)
from model.sgm.memory_entry import KINDS, Match
from model.sgm.patterns import Message, messages
from model.sgm.trust import FEATURES, Judged, judged_queries, match_features

ACTIONS = ("neither", "store", "retrieve")
FORMAT, VERSION = "agiformer.memory_router", 1
BUCKETS, WIDTH, HIDDEN = 4096, 12, 24
LONGEST_GRAM = 4  # bytes
READ = 500  # characters at each end of a message that are read
TRUST_SIZES = (4, 8, 12, 25, 40, 80, 120, 200, 400)  # facts in the memories that trust learns from
# The modules that training goes through, besides this one: their text decides what comes out of it.
SOURCES = (
    folding, facts, memory, memory_entry, memory_json, memory_text, patterns, phrases, phrases_en, phrases_tr, trust,
    turkish,
)  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """What to do with a message.

    probability: of the action. trust: how sure the message itself sounds, 1 for a plain statement and 0.5 for a hedged
    one; it becomes the entry's confidence. kind: of what is stored.
    """

    action: str
    probability: float
    trust: float
    kind: str


def gram_buckets(text: str) -> np.ndarray:
    """Buckets of the different n-grams of a text's folded UTF-8 bytes, n = 1 to LONGEST_GRAM: int64, sorted."""
    if len(text) > 2 * READ:
        text = text[:READ] + " " + text[-READ:]
    folded = fold(text).replace("’", "'")
    line = "^ " + " ".join(re.findall(r"\w+|[^\w\s]", folded)) + " $"
    data = np.frombuffer(line.encode("utf-8", "replace"), np.uint8).astype(np.uint32)
    found, state = [], np.zeros(len(data) + 1, np.uint32)
    for n in range(1, LONGEST_GRAM + 1):
        state = state[:-1] * np.uint32(0x01000193) ^ data[n - 1 :]  # FNV-1
        mixed = (state + np.uint32(n)) * np.uint32(0x9E3779B1)
        mixed ^= mixed >> 15
        mixed *= np.uint32(0x85EBCA6B)
        mixed ^= mixed >> 13
        found.append(mixed % BUCKETS)
    return np.unique(np.concatenate(found)).astype(np.int64)


class MemoryRouter(nn.Module):
    """The network; untrained as constructed (see `train_router`, `load_or_train`). Works on the CPU."""

    def __init__(self):
        super().__init__()
        self.grams = nn.Linear(BUCKETS, WIDTH, bias=False)
        nn.init.normal_(self.grams.weight, std=0.3)
        self.hidden = nn.Linear(WIDTH, HIDDEN)
        self.out = nn.Linear(HIDDEN, len(ACTIONS) + len(KINDS) + 1)
        self.match = nn.Linear(FEATURES, 1)

    def forward(self, rows: Sequence[Tensor], dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of action [B, 3], kind [B, 3] and certainty [B, 1] for B texts, given as their buckets."""
        lengths = torch.tensor([len(row) for row in rows])
        # A dense matrix: its product is several times faster, in training, than gathering rows.
        present = torch.zeros(len(rows), BUCKETS)
        text = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        present[text, torch.cat(list(rows))] = torch.repeat_interleave(lengths.float().rsqrt(), lengths)
        hidden = F.gelu(self.hidden(F.dropout(self.grams(present), dropout, self.training)))
        return self.out(F.dropout(hidden, dropout, self.training)).split([3, 3, 1], 1)

    @torch.no_grad()
    def decide_all(self, texts: Sequence[str]) -> list[Decision]:
        """`decide` of several texts at once."""
        decisions = []
        for start in range(0, len(texts), 256):
            action, kind, certain = self([torch.from_numpy(gram_buckets(text)) for text in texts[start : start + 256]])
            best, chosen = action.softmax(1).max(1)
            trust = 0.5 + 0.5 * certain.sigmoid().squeeze(1)
            decisions += [
                Decision(ACTIONS[a], p, t, KINDS[k])
                for a, p, t, k in zip(chosen.tolist(), best.tolist(), trust.tolist(), kind.argmax(1).tolist())
            ]
        return decisions

    def decide(self, text: str) -> Decision:
        """What to do with a message, of which the first and the last READ characters are read.

        Raises:
            ValueError: it is no str.
        """
        if not isinstance(text, str):
            raise ValueError(f"text={text!r}: accepted is a text (str)")
        return self.decide_all([text])[0]

    @torch.no_grad()
    def trust(self, query: str, matches: Sequence[Match]) -> list[float]:
        """The calibrated probability, for each match, that it answers the query; best first, as retrieved."""
        if not matches:
            return []
        features = torch.from_numpy(match_features(query, matches))
        return self.match(features).sigmoid().squeeze(1).tolist()

    def save(self, path: str | os.PathLike) -> Path:
        """Write the weights atomically."""
        header = {FORMAT: json.dumps({"version": VERSION, "recipe": _recipe()})}
        return write_atomically(path, serialise({k: v.contiguous() for k, v in self.state_dict().items()}, header))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "MemoryRouter":
        """The router saved at `path`.

        Raises:
            ValueError: the file is missing, damaged or no router of this version.
        """
        header = _header(path)
        if header.get("version") != VERSION:
            raise ValueError(f"router {path}: version {header.get('version')!r}; accepted is {VERSION}")
        router = cls()
        with safe_open(path, framework="pt") as file:
            try:
                router.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            except RuntimeError:
                raise ValueError(
                    f"router {path}: its tensors are not those of a router; remove it to train again"
                ) from None
        return router.eval()

    @classmethod
    def load_or_train(cls, path: str | os.PathLike) -> "MemoryRouter":
        """The router at `path`; trained and saved there first where there is none, or one that was trained otherwise.

        Raises:
            ValueError: the file is there and no router.
        """
        wanted = {"version": VERSION, "recipe": _recipe()}
        if Path(path).exists() and _header(path) == wanted:
            return cls.load(path)
        router = train_router()
        with contextlib.suppress(FileNotFoundError):  # another process was quicker to write the same
            router.save(path)
        return router


def _header(path: str | os.PathLike) -> dict:
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})[FORMAT])
    except FileNotFoundError:
        raise ValueError(f"router {path}: no such file") from None
    except (SafetensorError, OSError, KeyError, ValueError):
        raise ValueError(
            f"router {path}: damaged, or no router; accepted is a file that MemoryRouter.save wrote"
        ) from None


@cache
def _recipe() -> str:
    """A hash of all that training depends on: patterns, words, features and settings, as they are written down."""
    files = [__file__, *(module.__file__ for module in SOURCES)]
    return hashlib.sha256(b"".join(hashlib.sha256(Path(file).read_bytes()).digest() for file in files)).hexdigest()[:16]


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def train_router(seed: int = 0, *, per_template: int = 12, epochs: int = 14) -> MemoryRouter:
    """A router trained on the patterns of the training split; on one core, and the same for the same seed.

    Args:
        per_template: messages drawn from each template.
        epochs: passes over them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            router = MemoryRouter()
            _train_actions(router, messages("training", per_template, seed=seed, invented=0.1), epochs)
            _train_trust(router, judged_queries(TRUST_SIZES, held_out=False, seed=seed, queries=30))
    finally:
        torch.set_num_threads(threads)
    return router.eval()


def _train_actions(router: MemoryRouter, texts: list[Message], epochs: int, batch: int = 256) -> None:
    """AdamW on the sum of three cross-entropies; kind and trust count for what is stored."""
    rows = [torch.from_numpy(gram_buckets(each.text)) for each in texts]
    actions = torch.tensor([ACTIONS.index(each.action) for each in texts])
    kinds = torch.tensor([KINDS.index(each.kind or KINDS[0]) for each in texts])
    plain = torch.tensor([float(each.certainty == 1) for each in texts])
    weight = 1 / torch.bincount(actions).float()
    weight *= len(ACTIONS) / weight.sum()
    parameters = [p for name, p in router.named_parameters() if not name.startswith("match")]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=1.0)
    steps = epochs * -(-len(texts) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps, pct_start=max(0.1, 2 / steps))
    router.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(texts)).split(batch):
            stored = actions[chosen] == ACTIONS.index("store")
            action, kind, certain = router([rows[i] for i in chosen.tolist()], 0.2)
            loss = F.cross_entropy(action, actions[chosen], weight=weight, label_smoothing=0.05)
            loss = loss + 0.6 * F.cross_entropy(kind[stored], kinds[chosen][stored])
            loss = loss + 0.4 * F.binary_cross_entropy_with_logits(certain.squeeze(1)[stored], plain[chosen][stored])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    router.eval()


def _train_trust(router: MemoryRouter, judged: list[Judged], ridge: float = 1e-4) -> None:
    """Logistic regression by L-BFGS; unweighted, so that its probabilities are calibrated."""
    x = torch.from_numpy(np.concatenate([match_features(each.query, each.matches) for each in judged]))
    y = torch.tensor([answer for each in judged for answer in each.answers], dtype=torch.float32)
    nn.init.zeros_(router.match.weight)
    nn.init.zeros_(router.match.bias)
    optimizer = torch.optim.LBFGS(router.match.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(router.match(x).squeeze(1), y)
        value = value + ridge * router.match.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
