"""When a run grows, and what: `--grow` as a plan, and its steps carried out on a model."""

import re
from dataclasses import dataclass

from model.agiformer import AGIFormer
from model.layers.pyramid import learning_leaves
from model.petals.growth import new_petals

_ENTRY = re.compile(r"(\d+)(?::(blocks|petals(?:=([1-9]\d*))?|thaw|widen=(\d+)|\d+(?:\+\d+)*))?")
ACCEPTED = "off, auto, or STEP[:WHAT],... with WHAT blocks, petals, petals=N, thaw, widen=D_MODEL or BoBs as 0+1+2"


@dataclass(frozen=True)
class GrowthStep:
    """One planned event: before `step`, `kind` "blocks", "petals", "thaw" or "widen".

    `bobs` () means all; `petals` per hull, 0 for half as many as there are; `d_model` of "widen".
    """

    step: int
    kind: str
    bobs: tuple[int, ...] = ()
    petals: int = 0
    d_model: int = 0


def parse_growth(text: str) -> tuple[GrowthStep, ...]:
    """The plan that `--grow` names; empty for "off" and "auto".

    Raises:
        ValueError: in one line, naming the entry and what is accepted.
    """
    if text in ("off", "auto"):
        return ()
    plan = []
    for entry in text.split(","):
        match = _ENTRY.fullmatch(entry.strip())
        if not match:
            raise ValueError(f"grow={text!r}: {entry!r} is not accepted; accepted is {ACCEPTED}")
        step, what, petals, width = int(match[1]), match[2] or "blocks", match[3], match[4]
        if petals:
            plan.append(GrowthStep(step, "petals", petals=int(petals)))
        elif width:
            plan.append(GrowthStep(step, "widen", d_model=int(width)))
        elif what[0].isdigit():
            plan.append(GrowthStep(step, "blocks", tuple(int(bob) for bob in what.split("+"))))
        else:
            plan.append(GrowthStep(step, what))
    return tuple(sorted(plan, key=lambda each: each.step))


def carry_out(model: AGIFormer, step: GrowthStep, thawed: bool = False) -> list[str]:
    """Grow the model by one planned step → the entries it added to `config.growth`.

    Args:
        thawed: let the left tree of a grown block of blocks go on learning.
    """
    before = len(model.config.growth)
    bobs = step.bobs or range(len(model.bobs()))
    if step.kind == "widen":
        model.widen(step.d_model)
    for bob in bobs if step.kind != "widen" else ():
        if step.kind == "blocks":
            model.grow(bob)
            if thawed:
                model.thaw(bob)
        elif step.kind == "thaw":
            model.thaw(bob)
        else:
            model.add_petals(bob, step.petals or half_more(model, bob))
    return list(model.config.growth[before:])


def half_more(model: AGIFormer, bob: int) -> int:
    """⌈total/2⌉ of the petals of a hull that learns in this block of blocks (seed 003, o3's expansion trigger)."""
    return new_petals(max(leaf.hull.petals for leaf in learning_leaves(model.bobs()[bob])))
