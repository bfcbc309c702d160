"""Labelled messages in English and Turkish: what the router learns from.

    messages("training", 20)          → store, retrieve or neither; whole templates are kept for "held_out"

Notable: a template is a sentence with slots. Every fifth one (`HELD_OUT_EVERY`) is held out with everything that can be
made of it; words that fill slots are shared. Turkish slots take a case suffix with vowel harmony: `{city:de}` is
Ankara'da and İzmir'de. The sentences and words are in `phrases_en` and `phrases_tr`.
"""

import random
import re
from dataclasses import dataclass
from functools import cache

from model.sgm.phrases import FILLERS, PHRASES, SHARED
from model.sgm.turkish import Possessed, Word, conjugate, possess

HELD_OUT_EVERY = 5
_BOUND = re.compile(r"\{(mine|my|yours|noun|value|did|do|you|had|that|to)\b")


@dataclass(frozen=True)
class Message:
    """A labelled message. kind is None where nothing is stored; certainty is 0.5 for a hedged statement, else 1."""

    text: str
    action: str
    kind: str | None
    language: str
    template: str
    certainty: float


@cache
def templates() -> tuple[tuple[str, str, str | None, str], ...]:
    """Every (template, action, kind, language)."""
    found = []
    for language, phrases in PHRASES.items():
        groups = [("store", kind, text) for kind, text in phrases.STORE.items()]
        groups += [("retrieve", None, phrases.RETRIEVE), ("neither", None, phrases.NEITHER)]
        for action, kind, text in groups:
            found += [(line.strip(), action, kind, language) for line in text.split("|")]
    return tuple(found)


def is_held_out(number: int) -> bool:
    """Whether the template, or another item, of this number in its list is kept from training."""
    return number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def messages(
    split: str, per_template: int, *, seed: int = 0, noise: bool = True, hedged: float = 0.25, invented: float = 0.0
) -> list[Message]:
    """Messages of a split, "training" or "held_out"; the same for the same arguments.

    Args:
        per_template: drawn from each template; what comes out alike is there once.
        noise: typing errors, case, punctuation left out, greetings before and thanks behind, each in a part of them.
        hedged: share of statements that are made uncertain, in phrasings that are split likewise.
    """
    if split not in ("training", "held_out"):
        raise ValueError(f"split={split!r}: accepted are training and held_out")
    rng, found = random.Random(f"{seed} {split}"), {}
    for i, (template, action, kind, language) in enumerate(templates()):
        if is_held_out(i) != (split == "held_out"):
            continue
        hedges = part(PHRASES[language].HEDGES.split("|"), split == "held_out")
        for _ in range(per_template):
            text, certainty = fill(template, language, rng, invented=invented if noise else 0.0), 1.0
            if action == "store" and rng.random() < hedged:
                text, certainty = rng.choice(hedges).format(text.rstrip(".")), 0.5
                text = text[0].upper() + text[1:]
            if noise:
                text = disturb(text, language, rng)
            found.setdefault(text, Message(text, action, kind, language, template, certainty))
    return list(found.values())


def invent(rng: random.Random, name: bool = False) -> Word:
    """A word that no language has: what is around it must tell what a message is."""
    word = "".join(
        rng.choice("bcdfghklmnprstvyzşğç") + rng.choice("aeiouıöü") + rng.choice(("", "", "", *"nlrksmt"))
        for _ in range(rng.choice((1, 2, 2, 3)))
    )
    return Word(word.capitalize() if name else word)


def part(items, held_out: bool) -> list:
    """Every fifth item, or the others."""
    return [item for i, item in enumerate(items) if is_held_out(i) == held_out]


def fill(template: str, language: str, rng: random.Random, bound=None, invented=0.0) -> str:
    """The template with a word drawn for each of its slots, its first letter a capital."""

    def draw(slot: str) -> Word:
        return invent(rng, slot == "name") if rng.random() < invented else rng.choice(FILLERS[language][slot])

    if bound is None:
        bound = bind(language, rng, invented=invented) if _BOUND.search(template) else {}
    text = re.sub(
        r"\{(\w+)(?::(\w+))?\}",
        lambda slot: format(bound[slot[1]] if slot[1] in bound else draw(slot[1]), slot[2] or ""),
        template,
    )
    first = "İ" if language == "tr" and text[0] == "i" else text[0].upper()
    return first + text[1:] if template[0] != "d" else text


def disturb(text: str, language: str, rng: random.Random) -> str:
    """The text as a person in a hurry may type it."""
    if rng.random() < 0.15:
        text = rng.choice(PHRASES[language].OPENINGS.split("|")) + text[0].lower() + text[1:]
    if rng.random() < 0.4:
        text = text.rstrip("?.!")
    if rng.random() < 0.1:
        text += rng.choice(PHRASES[language].CLOSINGS.split("|"))
    if rng.random() < 0.15:
        text = text.replace("'", rng.choice(["", "’", " "]))
    if rng.random() < 0.1:
        text = text.replace(",", "")
    if (case := rng.random()) < 0.35:
        text = text.lower() if case < 0.3 else text.upper()
    if rng.random() < 0.25 and len(text) > 8:
        i = rng.randrange(1, len(text) - 2)
        a, b = text[i], text[i + 1]
        text = text[:i] + rng.choice([b + a, b, a + a + b, a + rng.choice("aeiklnrst")]) + text[i + 2 :]
    return text


def bind(
    language: str,
    rng: random.Random,
    *,
    owner: str | None = None,
    noun: str | None = None,
    deed: str | None = None,
    invented: float = 0.0,
) -> dict[str, str]:
    """Slots that belong together: someone's noun and its value, something done in all its forms; None draws.

    owner: "" for the one who speaks. noun, deed: as the tables have them.
    """
    noun, slot = (noun or rng.choice(PHRASES[language].ATTRIBUTES.split(", "))).split("=")
    what, verb = (deed or rng.choice(PHRASES[language].EPISODES.split(", "))).split("/")
    if rng.random() < invented:
        noun = invent(rng)
    if rng.random() < invented:
        what, verb = invent(rng), invent(rng)
        what, verb = (verb + "ed", f"{verb} the {what}") if language == "en" else (what, verb)
    if owner is None:
        owner = rng.choice(["", "", "", rng.choice(PHRASES[language].OWNERS), rng.choice(FILLERS[language]["name"])])
    if slot == "number":
        value = str(rng.randrange(10, 10 ** rng.randrange(2, 7)))
    elif slot == "secret":
        value = rng.choice(SHARED["pet"]).lower() + str(rng.randrange(1000))
    else:
        value = rng.choice(FILLERS[language][slot])
    if language == "en":
        rest = verb.partition(" ")[2]
        return {
            "mine": (owner + "'s " if owner else "my ") + noun, "my": "my " + noun, "yours": "your " + noun,
            "noun": noun, "value": value, "did": f"{what} {rest}", "do": verb,
        }  # fmt: skip
    mine = possess(noun, 3 if owner else 1)
    if owner:
        third, mine = mine, Possessed(f"{Word(owner):in} {mine}")
        mine.third = third.third
    forms = {form: f"{what} {conjugate(verb, form)}" for form in ("did", "you", "had", "that", "to")}
    return forms | {
        "mine": mine, "my": possess(noun, 1), "yours": possess(noun, 2),
        "noun": noun.replace("{} ", "ğim "), "value": value, "do": f"{what} {verb}",
    }  # fmt: skip
