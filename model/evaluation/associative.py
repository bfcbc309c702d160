"""Associative recall: of n pairs "key=value;", which value belongs to a key? (multi-query, as Zoology's, in bytes)

The list is read once; every query is asked from a branch of the stream, so that no query sees another one's answer.
Keys have 3 letters and values 3 digits: "abc=731;…" and then "?abc=", as in `model.data.recall`.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from model.agiformer import AGIFormer
from model.evaluation.ablation import attention_reach
from model.evaluation.answers import (
    Answer,
    Asking,
    Contribution,
    Cost,
    answer,
    byte_rows,
    contribution,
    cost_table,
    mean,
    percent,
    read,
)
from model.evaluation.bpc import evaluation_mode
from model.evaluation.report import check_count, number, text_table
from model.inference.stream import ByteStream

PAIRS = (8, 16, 32, 64, 128, 256)
QUERIES = 8  # asked of each list, of different keys; all keys of a shorter list
VALUES = 1000
PAIR_BYTES = len("abc=731;")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
MAX_PAIRS = len(_LETTERS) ** 3


@dataclass(frozen=True)
class PairList:
    """A list of pairs and what is asked of it.

    Attributes:
        text: the pairs, PAIR_BYTES each.
        queries: (question, answer, distance in bytes from each byte of the value to where it has to be predicted).
    """

    text: bytes
    queries: list[tuple[bytes, bytes, int]]


@dataclass(frozen=True)
class PairsCell:
    """What was recalled of lists of one length. None is what was not measured.

    Attributes:
        pairs: in a list.
        samples: lists read.
        queries: answers, of all lists together.
        accuracy, without_memory: share of exact matches, with the memory and with its output zeroed.
        log2_probability, log2_without_memory: mean log₂ p of the whole value, in bits.
        chance: share of exact matches for one who has read the list and picks any of its values.
        beyond: share of the queries whose value attention alone cannot carry to the answer (`attention_reach`).
    """

    pairs: int
    samples: int
    queries: int
    accuracy: float
    without_memory: float | None
    log2_probability: float
    log2_without_memory: float | None
    chance: float
    beyond: float
    cost: Cost


@dataclass(frozen=True)
class PairsReport:
    """One cell a number of pairs, in the order asked for; `reach` and `contribution` as in `RecallReport`."""

    cells: list[PairsCell]
    reach: int
    contribution: Contribution | None

    def table(self) -> str:
        """One line a number of pairs; accuracies in percent."""
        header = ["pairs", "bytes", "queries", "exact %", "without memory %", "chance %"]
        header += ["log2 p", "without memory", "beyond attention %"]
        rows = [
            [
                f"{cell.pairs}",
                f"{cell.pairs * PAIR_BYTES}",
                f"{cell.queries}",
                *(percent(share) for share in (cell.accuracy, cell.without_memory, cell.chance)),
                *(number(bits, 2) for bits in (cell.log2_probability, cell.log2_without_memory)),
                percent(cell.beyond),
            ]
            for cell in self.cells
        ]
        return text_table(header, rows)

    def costs(self) -> str:
        """One line a number of pairs: seconds, speed and memory."""
        return cost_table("pairs", [(cell.pairs, cell.cost) for cell in self.cells])

    def describe(self) -> str:
        """All tables, and what memory contributes, as text."""
        parts = ["values by their keys, exact answers by number of pairs:\n" + self.table(), self.costs()]
        return "\n\n".join([*parts, *([self.contribution.line(self.reach)] if self.contribution else [])])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        values = asdict(self)
        if self.contribution:
            values["contribution"]["verdict"] = self.contribution.verdict
        return values


def pair_accuracy(
    model: AGIFormer,
    pairs: Sequence[int] = PAIRS,
    samples: int = 10,
    seed: int = 0,
    *,
    queries: int = QUERIES,
    batch_size: int = 16,
    ablation: bool = True,
    stream: Callable[[nn.Module, int], Any] = ByteStream,
    progress: Callable[[int], None] | None = None,
) -> PairsReport:
    """Exact match and log₂ probability of the values that belong to keys, by number of pairs.

    Args:
        model: an AGIFormer.
        pairs: in a list, from 1 to MAX_PAIRS, the number of keys that there are.
        samples: lists a number.
        seed: of all random choices; a list depends on seed, number of pairs and its own number alone.
        queries: asked of each list, at most as many as it has pairs.
        batch_size: lists read side by side.
        ablation: whether to read everything a second time with the memory's output zeroed.
        stream: as in `needle_accuracy`, and with `.clone()`.
        progress: called with the number of bytes of lists just read.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    check_pairs(pairs)
    for name, value in (("samples", samples), ("queries", queries), ("batch_size", batch_size)):
        check_count(name, value)
    cells, everything = [], []
    reach = attention_reach(model)
    with evaluation_mode(model):
        for count in pairs:
            asking = Asking(model, ablation)
            lists = make_pairs(count, samples, seed, queries)
            answers = []
            while group := list(islice(lists, batch_size)):
                answers += _ask(asking, group, stream, progress)
            cells.append(_cell(count, samples, answers, reach, asking.cost()))
            everything += answers
    return PairsReport(cells, reach, contribution(everything, reach))


def check_pairs(pairs: Sequence[int]) -> None:
    """Raise ValueError, naming the argument, its value and what is accepted, unless all lists can be made."""
    if not pairs:
        raise ValueError(f"pairs={pairs!r}: accepted are one or more numbers of pairs")
    for count in pairs:
        check_count("pairs", count)
        if count > MAX_PAIRS:
            raise ValueError(f"pairs={count}: accepted is at most {MAX_PAIRS}, the number of keys of 3 letters")


def make_pairs(count: int, samples: int, seed: int = 0, queries: int = QUERIES) -> Iterator[PairList]:
    """Lists of `count` pairs, each made when it is asked for: the same for the same arguments."""
    for nth in range(samples):
        rng = random.Random(f"pairs/{seed}/{count}/{nth}")
        keys = [_key(i) for i in rng.sample(range(MAX_PAIRS), count)]
        values = [f"{rng.randrange(VALUES):03}" for _ in keys]
        text = "".join(f"{key}={value};" for key, value in zip(keys, values)).encode()
        asked = []
        for i in rng.sample(range(count), min(queries, count)):
            question = f"?{keys[i]}=".encode()
            asked.append((question, values[i].encode(), len(text) + len(question) - (i * PAIR_BYTES + len("abc="))))
        yield PairList(text, asked)


def _key(i: int) -> str:
    """The i-th of MAX_PAIRS keys."""
    first, rest = divmod(i, len(_LETTERS) ** 2)
    return _LETTERS[first] + _LETTERS[rest // len(_LETTERS)] + _LETTERS[rest % len(_LETTERS)]


def _ask(
    asking: Asking, lists: list[PairList], stream: Callable[[nn.Module, int], Any], progress: Callable | None
) -> list[Answer]:
    """Answers to all queries of lists of one length, read side by side."""
    texts = byte_rows([each.text for each in lists])
    turns = list(zip(*(each.queries for each in lists)))  # the first query of every list, the second …
    questions, expected = (
        [byte_rows([query[part] for query in turn]).to(asking.device) for turn in turns] for part in (0, 1)
    )

    def ask():
        reader = stream(asking.model, len(lists))
        read(reader, texts, asking.device, progress)
        scored = []
        for question, value in zip(questions, expected):
            branch = reader.clone()
            branch.feed(question)
            scored.append(answer(branch, value))
        exact, bits = (torch.cat(parts) for parts in zip(*scored))
        return exact, bits, reader.state_bytes()

    size = texts.numel() + sum(x.numel() + y.numel() for x, y in zip(questions, expected))
    distances = [query[2] for turn in turns for query in turn]
    return [Answer(distance, *answered) for distance, answered in zip(distances, asking(ask, size, len(lists)))]


def _cell(count: int, samples: int, answers: list[Answer], reach: int, cost: Cost) -> PairsCell:
    return PairsCell(
        pairs=count,
        samples=samples,
        queries=len(answers),
        accuracy=mean([each.exact for each in answers]),
        without_memory=mean([each.exact_without for each in answers]),
        log2_probability=mean([each.bits for each in answers]),
        log2_without_memory=mean([each.bits_without for each in answers]),
        chance=1 / count + (1 - 1 / count) / VALUES,
        beyond=mean([each.distance > reach for each in answers]),
        cost=cost,
    )
