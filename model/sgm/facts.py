"""Facts of many subjects, and questions about them, in English and Turkish.

    draw_facts(1000, "tr")            → different facts
    ask(fact, rng, held_out=True)     → a question that the fact answers, in a phrasing that training never shows

Notable: statements and questions are split apart. With `held_out=True` a fact is stated as training never states one,
whatever it is then asked with.
"""

import random
import re
from dataclasses import dataclass
from functools import cache

from model.sgm.patterns import bind, fill, is_held_out, templates
from model.sgm.phrases import FILLERS, PHRASES
from model.sgm.turkish import Word

_SLOTS = {"attribute": ({"mine", "value"}, {"mine"}), "episode": ({"did", "when"}, {"do", "did", "had", "that"})}


@dataclass(frozen=True)
class Fact:
    """Something to remember, and what questions about it are made of.

    form: "attribute" (questions name what the statement names), "episode" (something done at a time) or "reworded".
    owner, about: whose it is, "" for the speaker, and what; no two facts drawn together have the same.
    """

    text: str
    language: str
    form: str
    owner: str
    about: str
    bound: dict[str, str]
    asks: tuple[str, ...]  # templates of questions that training shows
    held_out: tuple[str, ...]  # and of others


@cache
def _frames(language: str, action: str, form: str, held_out: bool) -> tuple[str, ...]:
    """The messages' templates of a split that say, or ask for, a fact of the form and nothing else."""
    says, asks = _SLOTS[form]
    found = []
    for i, (template, has, _, spoken) in enumerate(templates()):
        slots = set(re.findall(r"\{(\w+)", template))
        fits = slots == says if action == "store" else len(slots) == 1 and slots <= asks
        if (has, spoken) == (action, language) and fits:
            found.append((i, template))
    return tuple(each for i, each in found if is_held_out(i) == held_out)


@cache
def _reworded(language: str) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """(of the speaker, of another): what is said, what is said in held-out words, questions, the held-out one."""
    entries = PHRASES[language].REWORDED.strip().replace("\n  ", "").split("\n")
    lines = [tuple(part.strip() for part in entry.split("|")) for entry in entries]
    return tuple(zip(lines[::2], lines[1::2]))


def draw_facts(
    count: int, language: str, *, seed: int = 0, held_out: bool = False, people: int | None = None
) -> list[Fact]:
    """Facts of different subjects, shuffled: the speaker's own, of relatives, and of people with names.

    Args:
        count: half of them are the speaker's own and a tenth of relatives, as far as there are so many.
        held_out: whether statements are phrased as training never shows them.
        people: how many have names, half of them a first name only; fewer share more of what is told of them.

    Raises:
        ValueError: more facts than there are.
    """
    rng = random.Random(f"{seed} facts {language}")
    about = PHRASES[language].ATTRIBUTES.split(", ") + list(range(len(_reworded(language))))
    names = [f"{a} {b}" for a in FILLERS[language]["name"] for b in PHRASES[language].SURNAMES]
    if people:
        first = rng.sample(FILLERS[language]["name"], min(people // 2, len(FILLERS[language]["name"])))
        names = [str(name) for name in first] + rng.sample(names, people - len(first))
    own = [("", each) for each in about] + [("", deed) for deed in PHRASES[language].EPISODES.split(", ")]
    relatives = [(str(owner), each) for owner in PHRASES[language].OWNERS for each in about]
    rng.shuffle(own)
    chosen = own[: count // 2] + rng.sample(relatives, min(count // 10, len(relatives)))
    total = len(names) * len(about)
    if (missing := count - len(chosen)) > total:
        raise ValueError(f"count={count!r}: accepted are up to {total + len(chosen)}")
    chosen += [(names[k // len(about)], about[k % len(about)]) for k in rng.sample(range(total), missing)]
    rng.shuffle(chosen)
    return [_fact(language, rng, owner, each, held_out) for owner, each in chosen]


def _fact(language: str, rng: random.Random, owner: str, about: str | int, held_out: bool) -> Fact:
    if isinstance(about, int):
        says, says_otherwise, *asks = _reworded(language)[about][bool(owner)]
        bound = {"who": Word(owner)}
        text = fill(says_otherwise if held_out else says, language, rng, bound)
        return Fact(text, language, "reworded", owner, str(about), bound, tuple(asks[:-1]), (asks[-1],))
    form = "attribute" if "=" in about else "episode"
    bound = bind(language, rng, owner=owner, **{"noun" if form == "attribute" else "deed": about})
    bound["when"] = rng.choice(FILLERS[language]["when"])
    text = fill(rng.choice(_frames(language, "store", form, held_out)), language, rng, bound)
    asks, others = (_frames(language, "retrieve", form, each) for each in (False, True))
    return Fact(text, language, form, owner, about, bound, asks, others)


def ask(fact: Fact, rng: random.Random, *, held_out: bool = False) -> str:
    """A question that the fact answers."""
    return fill(rng.choice(fact.held_out if held_out else fact.asks), fact.language, rng, fact.bound)
