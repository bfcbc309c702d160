"""How far to trust a match: what is looked at, and generated queries with their answers to learn it from.

match_features(query, matches)                    → [matches, FEATURES]
judged_queries((100,), held_out=True)             → queries to memories of generated facts, their matches, the answers
"""

import itertools
import random
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from model.sgm.facts import ask, draw_facts
from model.sgm.memory import ExternalMemory
from model.sgm.memory_entry import Match
from model.sgm.memory_text import search_words, stem
from model.sgm.patterns import is_held_out, messages, templates
from model.sgm.phrases import LANGUAGES

CANDIDATES = 20  # entries that trust ranks
FEATURES = 19

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
        if action == "retrieve" and not is_held_out(i):
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
