"""The router: whether a message is to be stored, calls for what is stored, or neither, and how far to trust (seed 001).

    router = MemoryRouter.load_or_train("router.safetensors")      # trained in seconds where the file is missing
    router.decide("My dog is called Rex.")                         → Decision("store", 0.98, 0.99, "fact")
    chat = RoutedMemory(ExternalMemory("memory.db"), router)
    chat.handle("What is my dog called?").retrieved                → [(Match(...), 0.97)]

    e = Σ_g E[hash(g)] / √n                    over the n different grams g of the folded text, of 1 to 4 bytes
    z = B gelu(A e + a) + b                    three logits of the action, three of the kind, one of certainty
    trust of a message = (1 + σ(z₇)) / 2
    trust of a match = σ(w · features + c)     features of query, entry and scores: `match_features`

Notable: hashing (Weinberger et al. 2009) needs no vocabulary, and folding makes Turkish typed without its letters the
same text. No weights are kept in the repository: training is deterministic, on patterns that the project makes.
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from model.files import write_atomically
from model.genesis.gate.folding import fold
from model.sgm.memory import KINDS, MAX_TEXT, BudgetExceeded, Entry, ExternalMemory, Match, search_words, stem
from model.sgm.patterns import (
    HELD_OUT_EVERY,
    LANGUAGES,
    Message,
    ask,
    draw_facts,
    messages,
    templates,
)

ACTIONS = ("neither", "store", "retrieve")
FORMAT, VERSION = "agiformer.memory_router", 1
BUCKETS, WIDTH, HIDDEN = 4096, 12, 24
LONGEST_GRAM = 4  # bytes
READ = 500  # characters at each end of a message that are read
STORE_PROBABILITY = 0.6  # below it a message is not stored: what is stored wrongly stays
CANDIDATES = 20  # entries that trust ranks
FEATURES = 19
TRUST_SIZES = (4, 8, 12, 25, 40, 80, 120, 200, 400)  # facts in the memories that trust learns from


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
        header = {FORMAT: json.dumps({"version": VERSION, "patterns": _patterns_hash()})}
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
        """The router at `path`; trained and saved there first where there is none, or one of other patterns.

        Raises:
            ValueError: the file is there and no router.
        """
        wanted = {"version": VERSION, "patterns": _patterns_hash()}
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
def _patterns_hash() -> str:
    return hashlib.sha256(repr(templates()).encode()).hexdigest()[:16]


# ── trust in a match ─────────────────────────────────────────────────────────────────────────────────────────────────

_MINE, _SELF = {"my", "our", "mine"}, {"i", "am", "we", "me"}
# Turkish endings of the first person, after folding: possessive and case (evimin, evimde), verb (yasiyorum).
_FIRST = re.compile(r"\w[aeiou]m(i|u|in|un|a|e|da|de|dan|den|la|le)?$")

# Whose something is: English 's, but for "it's" and the like, and the Turkish genitive of a name.
_OWNER = re.compile(
    r"\b(?!(?:it|that|what|who|where|when|how|he|she|there|here|let)['’])(\w\w+)['’](?:s|n?[ıiuü]n)\b", re.IGNORECASE
)


@cache
def _asking_words() -> frozenset[str]:
    """What questions are made of, whatever they ask for: stems in three or more templates that training shows."""
    counts = Counter()
    for i, (template, action, *_) in enumerate(templates()):
        if action == "retrieve" and i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1:
            counts.update({stem(word) for word in search_words(re.sub(r"\{.*?\}", " ", template))})
    return frozenset(word for word, count in counts.items() if count >= 3)


def _shared(a: str, b: str) -> float:
    """How much of word a begins word b, in [0, 1]; less than three characters count only where the words are equal."""
    if a == b or a[:3] != b[:3]:
        return float(a == b)
    n = 0
    for x, y in zip(a, b):
        if x != y:
            break
        n += 1
    return n / len(a) if n >= 3 else 0.0


def _best(word: str, others: Sequence[str]) -> tuple[float, str]:
    return max(((_shared(word, other), other) for other in others), default=(0.0, ""))


def _trigrams(words: Sequence[str]) -> set[str]:
    line = " " + " ".join(words) + " "
    return {line[i : i + 3] for i in range(len(line) - 2)}


def _owners(text: str) -> list[str]:
    """The words that a text makes owners of something."""
    return [words[-1] for part in _OWNER.findall(text) if (words := search_words(part))]


def match_features(query: str, matches: Sequence[Match]) -> np.ndarray:
    """What trust looks at: float32 [matches, FEATURES]; the matches are those of one query, best first.

    How much of the query's words, of those that do not merely ask (and that any match has), and of its trigrams the
    entry has; how much of the entry, and of its first words, the query has; score against the best and against the
    next; whether names, owners and first persons agree.
    """
    asked = list(dict.fromkeys(search_words(query)))[:64]
    content = [word for word in asked if stem(word) not in _asking_words()]
    grams, top = _trigrams(asked), max((match.score for match in matches), default=0.0) or 1.0
    owners = set(_owners(query))
    texts = [search_words(match.entry.text)[:256] for match in matches]
    aligned = [{word: _best(word, words) for word in asked} for words in texts]
    # What no entry has may be but another way to ask; what another entry has speaks against this one.
    known = [word for word in content if any(found[word][0] >= 0.5 for found in aligned)]
    rows = []
    for i, (match, words, found) in enumerate(zip(matches, texts, aligned)):
        back = {word: _best(word, asked)[0] for word in dict.fromkeys(words)}
        pairs = [(word, other) for word, (share, other) in found.items() if share >= 0.5]
        person = [(bool(_FIRST.search(word)), bool(_FIRST.search(other))) for word, other in pairs]
        stranger = any(owner not in words for owner in owners)
        owned = any(owner not in asked for owner in _owners(match.entry.text))
        mine_asked, mine_there = not _MINE.isdisjoint(asked), not _MINE.isdisjoint(words)
        after = matches[i + 1].score if i + 1 < len(matches) else 0.0
        weight = [found[word][0] for word in content]
        rows.append([
            sum(weight) / len(weight) if weight else 0.0,
            sum(found[word][0] for word in known) / len(known) if known else 0.0,
            min((found[word][0] for word in known), default=0.0),
            sum(share for share, _ in found.values()) / max(len(asked), 1),
            sum(share < 0.5 for share in weight) / 3,
            float(not content),
            len(grams & _trigrams(words)) / max(len(grams), 1),
            match.score / top,
            (match.score - after) / top if i == 0 else match.score / top - 1,
            sum(back.values()) / max(len(back), 1),
            sum(list(back.values())[:2]) / 2,
            sum(list(back.values())[:4]) / 4,
            stranger,
            owned,
            (stranger and mine_there) or (owned and mine_asked),
            any(a and not b for a, b in person),
            any(b and not a for a, b in person),
            mine_asked - mine_there,
            _SELF.isdisjoint(words) - _SELF.isdisjoint(asked),
        ])  # fmt: skip
    return np.array(rows, dtype=np.float32).reshape(-1, FEATURES)


@dataclass
class Judged:
    """A query, the matches that a memory gave, and which of them answers it."""

    query: str
    matches: list[Match]
    answers: list[bool]


def judged_queries(
    sizes: Sequence[int], *, held_out: bool, seed: int = 0, queries: int = 60, limit: int = CANDIDATES
) -> list[Judged]:
    """Questions to memories of generated facts, one memory for each size and language.

    Half of the queries have no answer in the memory. An eighth are messages that ask for nothing stored; of the others
    a third ask for what is known of somebody else, a third for something else of somebody known, a third for any fact.
    """
    found = []
    idle = [m for m in messages("held_out" if held_out else "training", 1, seed=seed) if m.action == "neither"]
    with tempfile.TemporaryDirectory() as folder:
        for number, (size, language) in enumerate(itertools.product(sizes, LANGUAGES)):
            rng = random.Random(f"{seed} {number} {held_out}")
            facts = draw_facts(
                2 * size, language, seed=1000 * seed + number, held_out=held_out, people=max(2, size // 12)
            )
            kept, absent = facts[:size], facts[size:]
            owners, abouts = {fact.owner for fact in kept}, {fact.about for fact in kept}
            near = [fact for fact in absent if fact.about in abouts] or absent
            near_too = [fact for fact in absent if fact.owner in owners] or absent
            with ExternalMemory(Path(folder, f"{number}.db"), daily_budget=None) as memory:
                ids = memory.remember_all([fact.text for fact in kept])
                for _ in range(queries):
                    draw, answer = rng.random(), None
                    # Forms of facts weigh the same, however many there are of each.
                    pool = kept if draw < 0.5 else rng.choice((near, near_too, absent))
                    form = rng.choice(sorted({fact.form for fact in pool}))
                    i = rng.choice([i for i, fact in enumerate(pool) if fact.form == form])
                    query = ask(pool[i], rng, held_out=held_out)
                    if pool is kept:
                        answer = ids[i]
                    elif draw > 0.875:
                        query = rng.choice(idle).text
                    if rng.random() < 0.3:
                        query = query.lower().rstrip("?.")
                    matches = memory.retrieve(query, limit=limit, touch=False)
                    found.append(Judged(query, matches, [match.entry.id == answer for match in matches]))
    return found


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


# ── explicit commands, and messages through a memory ─────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Command:
    """An explicit command: name "remember", "forget" or "list", and what it is about ("" or a kind for list)."""

    name: str
    argument: str


_END = r"\s*[.!]*\s*$"
_LISTED = r"(?:all |my |your |the |our )*(?P<kind>memories|memory|facts?|episodes?|skills?)?"
_COMMANDS = tuple(
    (name, re.compile(pattern, re.IGNORECASE | re.DOTALL))
    for name, pattern in (
        ("remember", r"^/remember\s+(?P<what>.+)$"),
        ("forget", r"^/forget\s+(?P<what>.+)$"),
        ("list", r"^/list(?:\s+(?P<kind>facts?|episodes?|skills?))?\s*$"),
        (
            "remember",
            r"^(?:please |can you |could you )?"
            r"(?:remember|memori[sz]e|note|don['’]?t forget|do not forget|keep in mind)"
            r"(?: this| the following)?(?:\s*[:,]\s*| that | to )(?P<what>.+)$",
        ),
        (
            "remember",
            r"^(?:please )?remember (?!me\b|when\b|what\b|who\b|how\b|where\b|why\b|the time\b|this\b|that\b)"
            r"(?P<what>[^?]+)$",
        ),
        (
            "forget",
            r"^(?:please )?forget(?: that| about|:)? (?!it\b|that\b|this\b|me\b|about\b|everything\b|all\b|what\b)"
            r"(?P<what>[^?]+?)" + _END,
        ),
        ("list", rf"^(?:please )?(?:list|show)(?: me)? (?=\w){_LISTED}{_END}"),
        ("list", rf"^list{_END}"),
        ("list", r"^what (?:do|can) you remember(?: about me)?\s*\??\s*$"),
        (
            "remember",
            r"^(?:l[uü]tfen )?(?:[sş]unu |bunu )?(?:hat[ıiIİ]rla|unutma|akl[ıiIİ]nda tut|kaydet|not et|not al)"
            r"(?:\s*[:,]\s*| ki )(?P<what>.+)$",
        ),
        ("forget", r"^(?:l[uü]tfen )?(?:[sş]unu )?unut\s*:\s*(?P<what>[^?]+?)" + _END),
        ("forget", r"^(?:l[uü]tfen )?unut (?P<what>#?\d+)" + _END),
        (
            "forget",
            r"^(?:l[uü]tfen )?(?!bunu\b|[sş]unu\b|onu\b|beni\b|her [sş]eyi\b|hepsini\b)(?P<what>[^?]+?) unut" + _END,
        ),
        (
            "list",
            r"^(?:l[uü]tfen )?(?:t[uü]m |b[uü]t[uü]n )?"
            r"(?P<kind>haf[ıiIİ]zan[ıiIİ]|an[ıiIİ]lar[ıiIİ]m?[ıiIİ]?|bilgileri|olaylar[ıiIİ]|becerileri)"
            r" (?:listele|g[oö]ster)" + _END,
        ),
        ("list", rf"^listele{_END}"),
        ("list", r"^(?:neleri|neler|ne) hat[ıiIİ]rl[ıiIİ]yorsun\s*\??\s*$"),
    )
)
_KIND_WORDS = {"fact": "fact", "epis": "episode", "skil": "skill", "bilg": "fact", "olay": "episode", "bece": "skill"}


def parse_command(text: str) -> Command | None:
    """The explicit command that a message is, in English or Turkish; None for any other message.

    remember that X · remember: X · don't forget X · /remember X · hatırla: X · unutma ki X · not et: X
    forget X · forget #12 · /forget X · X unut · unut: X
    list · list facts · show my memories · what do you remember? · /list · listele · becerileri listele
    """
    text = text.strip()
    for name, pattern in _COMMANDS:
        if found := pattern.match(text):
            groups = found.groupdict()
            if name == "list":
                return Command(name, _KIND_WORDS.get(fold(groups.get("kind") or "")[:4], ""))
            if argument := groups["what"].strip():
                return Command(name, argument)
    return None


@dataclass(frozen=True)
class Routed:
    """What became of a message.

    decision: the router's; None for an explicit command, whose name is `command`. retrieved: matches with their trust,
    the most trusted first, all at or above the threshold. budget_exceeded: it was to be stored, and the day's writes
    are used up.
    """

    decision: Decision | None = None
    command: str | None = None
    stored: Entry | None = None
    forgotten: list[Entry] = field(default_factory=list)
    listed: list[Entry] = field(default_factory=list)
    retrieved: list[tuple[Match, float]] = field(default_factory=list)
    budget_exceeded: bool = False


class RoutedMemory:
    """A memory that messages pass through.

    Args:
        threshold: trust, in [0, 1], below which a match is not retrieved.
        limit: matches retrieved for a message, at most.
    """

    def __init__(self, memory: ExternalMemory, router: MemoryRouter, *, threshold: float = 0.5, limit: int = 5):
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold!r}: accepted is a number from 0 to 1")
        self.memory, self.router, self.threshold, self.limit = memory, router, threshold, limit

    def handle(self, text: str) -> Routed:
        """Carry out an explicit command; else store the message, retrieve for it, or neither.

        Raises:
            ValueError: `text` is no str, or an explicit command's text is not accepted by the memory.
        """
        if not isinstance(text, str):
            raise ValueError(f"text={text!r}: accepted is a text (str)")
        if command := parse_command(text):
            return self._carry_out(command)
        decision = self.router.decide(text)
        if decision.action == "store":
            if decision.probability < STORE_PROBABILITY or not 0 < len(text.strip()) <= MAX_TEXT:
                return Routed(decision)
            return self._store(text, decision.kind, decision.trust, decision=decision)
        if decision.action == "retrieve":
            return Routed(decision, retrieved=self.retrieve(text))
        return Routed(decision)

    def retrieve(self, query: str) -> list[tuple[Match, float]]:
        """The trusted matches of a query, whatever the router says of it; counts an access to each."""
        matches = self.memory.retrieve(query, limit=max(CANDIDATES, self.limit), touch=False)
        ranked = sorted(zip(matches, self.router.trust(query, matches)), key=lambda pair: -pair[1])
        trusted = [pair for pair in ranked if pair[1] >= self.threshold][: self.limit]
        self.memory.touch([match.entry for match, _ in trusted])
        return trusted

    def _carry_out(self, command: Command) -> Routed:
        if command.name == "list":
            return Routed(command="list", listed=self.memory.list(command.argument or None))
        if command.name == "remember":
            return self._store(command.argument, self.router.decide(command.argument).kind, 1.0, command="remember")
        if number := re.fullmatch(r"#?(\d{1,18})", command.argument):
            entry = self.memory.forget(int(number[1])) if int(number[1]) else None
            return Routed(command="forget", forgotten=[entry] if entry else [])
        return Routed(command="forget", forgotten=self.memory.forget_matching(command.argument))

    def _store(self, text: str, kind: str, confidence: float, **outcome) -> Routed:
        try:
            return Routed(**outcome, stored=self.memory.remember(text, kind, confidence=confidence))
        except BudgetExceeded:
            return Routed(**outcome, budget_exceeded=True)
