"""Small tasks for learning without gradients: a prompt, and the bytes that should follow it.

A hundred of them in five kinds (style, fact, preference, format, domain), interleaved, and the categories of the
self-improvement loop (reasoning, coding, memory, style, knowledge). English and Turkish.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("style", "fact", "preference", "format", "domain")
CATEGORIES = ("reasoning", "coding", "memory", "style", "knowledge")


@dataclass(frozen=True)
class Task:
    """What to learn: after each prompt comes its answer."""

    name: str
    kind: str
    pairs: tuple[tuple[str, str], ...]

    def batch(self, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Bytes [B, L] and which of them count [B, L] bool, the answers; rows are filled up with zeros behind."""
        return stack([self], length)


def stack(tasks: list[Task], length: int | None = None) -> tuple[Tensor, Tensor]:
    """The rows of several tasks: bytes [B, L] and which of them count [B, L] bool.

    Raises:
        ValueError: without tasks, or when a row is longer than `length`.
    """
    rows = [(prompt.encode(), answer.encode()) for task in tasks for prompt, answer in task.pairs]
    if not rows:
        raise ValueError(f"tasks={tasks!r}: accepted is at least one, with a pair")
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"length={length}: accepted is at least {longest}, the longest row")
    x = torch.zeros(len(rows), length, dtype=torch.uint8)
    counts = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        x[i, : len(prompt) + len(answer)] = torch.tensor(list(prompt + answer), dtype=torch.uint8)
        counts[i, len(prompt) : len(prompt) + len(answer)] = True
    return x, counts


_STYLES = (
    ("pirate", "Arr matey"), ("butler", "Very well, sir"), ("poet", "O gentle moon"), ("robot", "AFFIRMATIVE."),
    ("child", "Yay, cool!"), ("lawyer", "Pursuant to"), ("coach", "Push harder!"), ("monk", "Breathe in."),
    ("spy", "Burn this."), ("king", "We decree it"), ("korsan", "Yelkenler fora"), ("ozan", "Ey sevgili"),
    ("wizard", "By my staff"), ("sailor", "Aye captain"), ("chef", "Taste this!"), ("judge", "Order, order"),
    ("cowboy", "Howdy folks"), ("dede", "Ah evladım"), ("teacher", "Listen well"), ("pilot", "Cleared now"),
)  # fmt: skip
_FACTS = (
    ("capital of France", "Paris"), ("capital of Norway", "Oslo"), ("capital of Peru", "Lima"), ("başkent", "Ankara"),
    ("author of Hamlet", "Shakespeare"), ("symbol of gold", "Au"), ("symbol of iron", "Fe"),
    ("legs of a spider", "eight"), ("largest planet", "Jupiter"), ("red planet", "Mars"), ("frozen water", "ice"),
    ("opposite of hot", "cold"), ("days in a week", "seven"), ("sides of a square", "four"),
    ("en yüksek dağ", "Everest"), ("colour of grass", "green"), ("king of beasts", "lion"), ("our star", "the Sun"),
    ("first month", "January"), ("boiling point", "100 C"),
)  # fmt: skip
_PREFERENCES = (
    ("drink", "green tea"), ("food", "lentil soup"), ("colour", "dark blue"), ("sport", "swimming"), ("music", "jazz"),
    ("season", "autumn"), ("city", "Lisbon"), ("animal", "otters"), ("fruit", "ripe figs"), ("film", "old westerns"),
    ("yemek", "mantı"), ("renk", "turkuaz"), ("book", "Moby-Dick"), ("game", "chess"), ("number", "seventeen"),
    ("flower", "tulips"), ("şehir", "İzmir"), ("snack", "walnuts"), ("hour", "at dawn"), ("day", "Saturday"),
)  # fmt: skip
_FORMATS = (
    ("bold x", "**x**"), ("italic x", "_x_"), ("list a b", "- a\n- b"), ("json a 1", '{"a": 1}'), ("csv a b", "a,b"),
    ("html x", "<p>x</p>"), ("quote x", "> x"), ("title x", "# x"), ("link x", "[x](x)"), ("code x", "`x`"),
    ("tuple a b", "(a, b)"), ("array a b", "[a, b]"), ("toml a 1", "a = 1"), ("yaml a 1", "a: 1"), ("tex x", "$x$"),
    ("tarih", "22.11.2026"), ("time", "14:30:00"), ("path a b", "a/b"), ("flag x", "--x"), ("hex 255", "0xff"),
)  # fmt: skip
_DOMAINS = (
    ("law", "the tenant shall"), ("medicine", "twice daily"), ("cooking", "simmer gently"),
    ("sailing", "ease the sheet"), ("finance", "net of tax"), ("music", "play legato"), ("chess", "castle early"),
    ("garden", "prune in March"), ("physics", "at constant p"), ("biology", "cells divide"), ("tarih", "Osmanlı"),
    ("coğrafya", "iç bölgeler"),
    ("weather", "rain by night"), ("football", "offside trap"), ("railway", "mind the gap"), ("coffee", "grind finer"),
    ("painting", "thin glazes"), ("logic", "hence not p"), ("geology", "basalt flows"), ("sewing", "back stitch"),
)  # fmt: skip


def micro_tasks(count: int = 100) -> list[Task]:
    """The first `count` of the hundred: kinds by turns.

    Raises:
        ValueError: for a count out of range.
    """
    if not 1 <= count <= 100:
        raise ValueError(f"count={count!r}: accepted is from 1 to 100")
    prompts = {
        "style": ("As a {}: ", _STYLES),
        "fact": ("Q: {}? A: ", _FACTS),
        "preference": ("My favourite {} is ", _PREFERENCES),
        "format": ("Write {} -> ", _FORMATS),
        "domain": ("In {}, ", _DOMAINS),
    }
    tasks = []
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        prompt, items = prompts[kind]
        about, answer = items[i // len(KINDS)]
        tasks.append(Task(f"{kind}: {about}", kind, ((prompt.format(about), answer),)))
    return tasks


def category_tasks() -> dict[str, Task]:
    """One task of several pairs for each category of the self-improvement loop."""
    return {
        "reasoning": Task(
            "reasoning", "reasoning",
            (
                ("2 + 3 = ", "5"), ("7 - 4 = ", "3"), ("a<b, b<c: ", "a<c"), ("if p then q; p: ", "q"),
                ("2, 4, 6, ", "8"),
            ),
        ),
        "coding": Task(
            "coding", "coding",
            (
                ("def add(a, b):\n", "    return a + b"), ("for i in ", "range(n):"), ("import ", "torch"),
                ("if x is ", "None:"),
            ),
        ),
        "memory": Task(
            "memory", "memory",
            (("key 7 is red. key 7: ", "red"), ("Ada has a cat. Ada has a ", "cat"), ("kod 42. kod: ", "42")),
        ),
        "style": Task(
            "style", "style",
            (("formal: hi -> ", "Good day."), ("kibar: gel -> ", "Buyurun."), ("shout: no -> ", "NO!")),
        ),
        "knowledge": Task(
            "knowledge", "knowledge",
            (
                ("capital of Italy: ", "Rome"), ("H2O is ", "water"), ("Türkiye'nin başkenti ", "Ankara"),
                ("sun rises in the ", "east"),
            ),
        ),
    }  # fmt: skip


# Ordinary text of no task: what its inputs have in common is protected before the first task.
ORDINARY = (
    "It was raining when the train stopped at the small station, and nobody got off but an old man with two cases.",
    "Bir sabah erkenden kalktık; deniz durgundu, kayıklar ağır ağır açılıyor, martılar bağırıyordu.",
    "To install the program, open a terminal, change to its folder and run the first line that the manual shows.",
    "The committee will meet again on 12 October at 9:45 to hear what both sides have to say about the new bridge.",
    "Çocuklar okuldan dönünce önce ellerini yıkadı, sonra mutfakta bekleyen sıcak çorbayı içtiler.",
    "x = [i * 2 for i in range(10) if i % 3]; print(sum(x), max(x))  # a line of code, 1.5e-3, {'key': None}",
)


def ordinary(length: int) -> Tensor:
    """Rows of `ORDINARY` [B, length] bytes.

    Raises:
        ValueError: for a length that is not positive, or longer than all of them.
    """
    longest = max(len(text.encode()) for text in ORDINARY)
    if not 1 <= length <= longest:
        raise ValueError(f"length={length!r}: accepted is from 1 to {longest}")
    rows = [text.encode()[i : i + length] for text in ORDINARY for i in range(0, len(text.encode()), length)]
    return torch.tensor([list(row) for row in rows if len(row) == length], dtype=torch.uint8)
