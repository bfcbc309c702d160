"""Needle in a haystack: can the model still write a key that it read thousands of bytes ago, and is it memory that can?

Prompts of one length are read side by side through `ByteStream`, in constant memory, and read again with the memory
ablated. `model.evaluation.needles` makes the prompts; `model.evaluation.associative` asks for values by their keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from torch import nn

from model.agiformer import AGIFormer
from model.data.haystack import LANGUAGES
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
from model.evaluation.needles import DEPTHS, LENGTHS, SAMPLES, Needle, check_needles, make_needles
from model.evaluation.report import check_count, number, text_table
from model.inference.stream import ByteStream

PASS_ACCURACY = 0.9  # exact matches of trained phrasings at every length that make a pass; guessing gives below 0.02


@dataclass(frozen=True)
class DepthCell:
    """Trained phrasings at one length and depth.

    Attributes:
        depth: 0 at the beginning of the prompt, 1 before the question.
        samples: prompts.
        accuracy, without_memory: share of exact matches, with the memory and without; None where not measured.
    """

    depth: float
    samples: int
    accuracy: float | None
    without_memory: float | None


@dataclass(frozen=True)
class RecallCell:
    """What was recalled at one length. None is what was not measured.

    Attributes:
        length: bytes of the prompt.
        samples: prompts read, of all depths together.
        accuracy, without_memory: share of exact matches, with the memory and with its output zeroed.
        languages: accuracy by language.
        trained, held_out: accuracy of the phrasings that model.data.recall teaches, and of those that it does not.
        log2_probability, log2_without_memory: mean log₂ p of the whole answer, in bits.
        chance: mean log₂ p of the whole answer for a guess among keys of its kind, in bits.
        beyond: share of the prompts whose key attention alone cannot carry to the answer (`attention_reach`).
        depths: one cell a depth, in the order asked for.
    """

    length: int
    samples: int
    accuracy: float
    without_memory: float | None
    languages: dict[str, float]
    trained: float
    held_out: float | None
    log2_probability: float
    log2_without_memory: float | None
    chance: float
    beyond: float
    depths: list[DepthCell]
    cost: Cost


@dataclass(frozen=True)
class RecallReport:
    """One cell a length, in the order asked for.

    Attributes:
        reach: bytes that attention alone can carry.
        contribution: of memory, over trained phrasings of all lengths and depths; None without the ablation.
    """

    cells: list[RecallCell]
    reach: int
    contribution: Contribution | None

    @property
    def passed(self) -> bool:
        """Whether trained phrasings reach PASS_ACCURACY over all depths, at every length."""
        return all(cell.trained >= PASS_ACCURACY for cell in self.cells)

    def verdict(self) -> str:
        """Pass or fail and why, in one line."""
        worst = min(self.cells, key=lambda cell: cell.trained)
        return (
            f"{'PASS' if self.passed else 'FAIL'}: at every length at least {percent(worst.trained)}% of the trained "
            f"phrasings exact (least at {worst.length} bytes); a pass needs {percent(PASS_ACCURACY)}%"
        )

    def table(self) -> str:
        """One line a length; accuracies in percent."""
        languages = list(self.cells[0].languages)
        header = ["bytes", "prompts", "exact %", "without memory %", *(f"{name} %" for name in languages)]
        header += ["trained %", "held-out %", "log2 p", "without memory", "chance", "beyond attention %"]
        rows = [
            [
                f"{cell.length}",
                f"{cell.samples}",
                *(percent(share) for share in (cell.accuracy, cell.without_memory, *cell.languages.values())),
                *(percent(share) for share in (cell.trained, cell.held_out)),
                *(number(bits, 2) for bits in (cell.log2_probability, cell.log2_without_memory, cell.chance)),
                percent(cell.beyond),
            ]
            for cell in self.cells
        ]
        return text_table(header, rows)

    def grid(self) -> str:
        """Depth by length: exact matches of trained phrasings in percent, with the memory / without it."""
        rows = [
            [f"{row[0].depth:g}", *(f"{percent(cell.accuracy)} / {percent(cell.without_memory)}" for cell in row)]
            for row in zip(*(cell.depths for cell in self.cells))
        ]
        return text_table(["depth \\ bytes", *(f"{cell.length}" for cell in self.cells)], rows)

    def costs(self) -> str:
        """One line a length: seconds, speed and memory."""
        return cost_table("bytes", [(cell.length, cell.cost) for cell in self.cells])

    def reach_line(self) -> str:
        """How many needles lie beyond attention's reach, length by length."""
        shares = ", ".join(f"{percent(cell.beyond)}% at {cell.length} bytes" for cell in self.cells)
        return f"attention alone reaches back at most {self.reach} bytes; keys further back than that: {shares}"

    def describe(self) -> str:
        """All tables, and what memory contributes, as text."""
        parts = [
            "needles, exact answers by length of the prompt:\n" + self.table(),
            "trained phrasings, exact % with the memory / without it, by depth and length:\n" + self.grid(),
            self.costs(),
            self.reach_line() + (f"\n{self.contribution.line(self.reach)}" if self.contribution else ""),
        ]
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        values = asdict(self) | {"passed": self.passed, "pass_accuracy": PASS_ACCURACY}
        if self.contribution:
            values["contribution"]["verdict"] = self.contribution.verdict
        return values


@dataclass(frozen=True)
class _NeedleAnswer(Answer):
    """An answer and what its prompt was; the prompt itself is not kept."""

    depth: float
    language: str
    held_out: bool
    chance: float


def needle_accuracy(
    model: AGIFormer,
    lengths: Sequence[int] = LENGTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    depths: Sequence[float] = DEPTHS,
    *,
    languages: Sequence[str] = tuple(LANGUAGES),
    batch_size: int = 16,
    ablation: bool = True,
    stream: Callable[[nn.Module, int], Any] = ByteStream,
    progress: Callable[[int], None] | None = None,
) -> RecallReport:
    """Exact match and log₂ probability of needles' keys, by length of the prompt and depth of the needle.

    Args:
        model: an AGIFormer.
        lengths: bytes of the prompts, at least as many as needle and question take.
        samples: prompts a length and depth; languages, kinds of key and phrasings take turns.
        seed: of all random choices; a prompt depends on seed, length, depth and its number alone.
        depths: places of the needle in the sentences, 0 first, 1 last.
        languages: "en", "tr".
        batch_size: prompts read side by side, of one length and any depths.
        ablation: whether to read everything a second time with the memory's output zeroed.
        stream: makes the reader of a batch, with `.feed(bytes [B, n])`, `.logits() -> [B, 256]`, `.state_bytes()`.
        progress: called with the number of bytes just read, all prompts together.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    check_needles(lengths, samples, depths, languages)
    check_count("batch_size", batch_size)
    cells, trained = [], []
    reach = attention_reach(model)
    with evaluation_mode(model):
        for length in lengths:
            asking = Asking(model, ablation)
            needles = make_needles(length, samples, seed, depths, languages)
            answers = []
            while group := list(islice(needles, batch_size)):
                answers += _ask(asking, group, stream, progress)
            cells.append(_cell(length, depths, answers, reach, asking.cost()))
            trained += [answer for answer in answers if not answer.held_out]
    return RecallReport(cells, reach, contribution(trained, reach))


def _ask(
    asking: Asking, needles: list[Needle], stream: Callable[[nn.Module, int], Any], progress: Callable | None
) -> list[_NeedleAnswer]:
    """Answers to prompts of one length, read side by side."""
    prompts = byte_rows([needle.prompt for needle in needles])
    expected = byte_rows([needle.answer for needle in needles]).to(asking.device)

    def ask():
        reader = stream(asking.model, len(needles))
        read(reader, prompts, asking.device, progress)
        return *answer(reader, expected), reader.state_bytes()

    return [
        _NeedleAnswer(needle.distance, *answered, needle.depth, needle.language, needle.held_out, needle.chance)
        for needle, answered in zip(needles, asking(ask, prompts.numel(), len(needles)))
    ]


def _cell(length: int, depths: Sequence[float], answers: list[_NeedleAnswer], reach: int, cost: Cost) -> RecallCell:
    learned = [each for each in answers if not each.held_out]
    return RecallCell(
        length=length,
        samples=len(answers),
        accuracy=_exact(answers),
        without_memory=_exact_without(answers),
        languages={
            name: _exact([each for each in answers if each.language == name])
            for name in dict.fromkeys(each.language for each in answers)
        },
        trained=_exact(learned),
        held_out=_exact([each for each in answers if each.held_out]),
        log2_probability=mean([each.bits for each in answers]),
        log2_without_memory=mean([each.bits_without for each in answers]),
        chance=mean([each.chance for each in answers]),
        beyond=mean([each.distance > reach for each in answers]),
        depths=[_depth_cell(depth, [each for each in learned if each.depth == depth]) for depth in depths],
        cost=cost,
    )


def _depth_cell(depth: float, answers: list[Answer]) -> DepthCell:
    return DepthCell(depth, len(answers), _exact(answers), _exact_without(answers))


def _exact(answers: Sequence[Answer]) -> float | None:
    return mean([each.exact for each in answers])


def _exact_without(answers: Sequence[Answer]) -> float | None:
    return mean([each.exact_without for each in answers])
