"""The gate's log, the marks that a reviewer puts on it, and the policy that they make (seed 000, section 5: feedback).

A log has one JSON object a line: time, run, row, position, category, rule, state, byte, mass, and text when that was
asked for. A mark is a line of LOG.marks.jsonl: "false" for an intervention that should not have been, "true" for a
right one.

Notable: both files are only ever appended to, and a log is read as a stream, however long it is. An intervention's
number is that of its line; a mark also keeps a hash of the line, so that it does not pass to another one when the
log is rotated.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from model.files import write_atomically

VERDICTS = ("false", "true")
ROUNDING = 1e-6  # a mass is a sum of float32 probabilities


@dataclass(frozen=True)
class Intervention:
    """One line of a log: the mask removed `byte`, of probability `mass`, which would have completed `rule`."""

    number: int  # of the line, from 1
    hash: str  # of the line
    time: datetime
    run: str
    row: int
    position: int  # bytes before it in its row
    category: str
    rule: str
    state: int  # of the automaton
    byte: int
    mass: float
    text: str | None

    @property
    def rule_id(self) -> str:
        """The rule's name as a policy's `disabled` has it."""
        return f"{self.category}/{self.rule}"


@dataclass(frozen=True)
class Damaged:
    """A line that is no intervention, and why."""

    number: int
    reason: str


def read_log(path: str | os.PathLike) -> Iterator[Intervention | Damaged]:
    """The lines of a log in order; blank ones are left out.

    Raises:
        ValueError: the file cannot be read.
    """
    for number, line in _lines(path):
        try:
            yield _intervention(number, line)
        except ValueError as error:
            yield Damaged(number, str(error))


def _lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line := line.strip():
                    yield number, line
    except OSError as error:
        raise ValueError(f"log {path}: {error.strerror or error}; accepted is a readable file") from None


def _json_object(line: bytes) -> dict:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return values


def _intervention(number: int, line: bytes) -> Intervention:
    values = _json_object(line)
    for name in ("run", "category", "rule", "text"):
        value = values.get(name)
        if not isinstance(value, str) and not (name == "text" and value is None):
            raise ValueError(f"{name} is no string")
        # Half of a surrogate pair can be written in JSON, but in no policy file.
        if name in ("category", "rule") and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{name} is no Unicode text")
    for name, most in (("row", math.inf), ("position", math.inf), ("state", math.inf), ("byte", 255)):
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise ValueError(f"{name} is no integer from 0" + (f" to {most}" if most < math.inf else ""))
    mass = values.get("mass")
    if isinstance(mass, bool) or not isinstance(mass, int | float) or not 0 <= mass <= 1 + ROUNDING:
        raise ValueError("mass is no number from 0 to 1")
    names = ("run", "row", "position", "category", "rule", "state", "byte")
    return Intervention(
        number,
        hashlib.sha256(line).hexdigest()[:16],
        _time(values.get("time")),
        *(values[name] for name in names),
        mass=float(mass),
        text=values.get("text"),
    )


def _time(text: object) -> datetime:
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is not None:
            return time.astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError("time is no ISO 8601 time with a zone")


class Marks:
    """The marks of a log, read from and appended to the file beside it; of several for a line the last holds.

    Args:
        log: path of the log; the marks are in `<log>.marks.jsonl`.
    """

    def __init__(self, log: str | os.PathLike):
        self.path = Path(f"{os.fspath(log)}.marks.jsonl")
        self.damaged: list[Damaged] = []  # lines of the file of marks that are none
        self._verdicts: dict[tuple[int, str], str] = {}  # by number and hash of the line
        if self.path.exists():
            for number, line in _lines(self.path):
                try:
                    self._read(line)
                except ValueError as error:
                    self.damaged.append(Damaged(number, str(error)))

    def _read(self, line: bytes) -> None:
        values = _json_object(line)
        number, digest, verdict = values.get("line"), values.get("hash"), values.get("mark")
        if isinstance(number, bool) or not isinstance(number, int) or not isinstance(digest, str):
            raise ValueError("line or hash is missing")
        if verdict not in VERDICTS:
            raise ValueError("mark is neither false nor true")
        self._verdicts[number, digest] = verdict

    def __len__(self) -> int:
        return len(self._verdicts)

    def of(self, intervention: Intervention) -> str | None:
        """The mark of an intervention: "false", "true" or None."""
        return self._verdicts.get((intervention.number, intervention.hash))

    def add(self, interventions: Iterable[Intervention], verdict: str) -> int:
        """Mark interventions, in the file too. Returns how many.

        Raises:
            ValueError: `verdict` is neither "false" nor "true".
        """
        if verdict not in VERDICTS:
            raise ValueError(f"mark={verdict!r}: accepted are {' and '.join(VERDICTS)}")
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        keys = [(each.number, each.hash) for each in interventions]
        lines = [
            json.dumps({"time": now, "line": number, "hash": digest, "mark": verdict}) + "\n" for number, digest in keys
        ]
        if lines:
            with open(self.path, "ab+") as file:
                if file.tell():  # a writer that was killed may have left a part of a line
                    file.seek(-1, os.SEEK_END)
                    lines = lines if file.read(1) == b"\n" else ["\n", *lines]
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
            self._verdicts.update(dict.fromkeys(keys, verdict))
        return len(keys)


@dataclass
class RuleCount:
    """What a log says of one rule."""

    category: str
    rule: str
    count: int = 0
    mass: float = 0.0  # sum
    runs: set[str] = field(default_factory=set)
    first: datetime | None = None
    last: datetime | None = None
    marks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VERDICTS, 0))

    @property
    def rule_id(self) -> str:
        return f"{self.category}/{self.rule}"

    @property
    def marked(self) -> int:
        """Interventions with a mark."""
        return sum(self.marks.values())

    def is_wrong(self, false_share: float, min_marks: int) -> bool:
        """Whether it has at least `min_marks` marks, of which at least `false_share` are false."""
        return self.marked >= min_marks and self.marks["false"] >= false_share * self.marked

    def add(self, each: Intervention, verdict: str | None) -> None:
        """Count one intervention more."""
        self.count += 1
        self.mass += each.mass
        self.runs.add(each.run)
        self.first = min(self.first or each.time, each.time)
        self.last = max(self.last or each.time, each.time)
        if verdict:
            self.marks[verdict] += 1


@dataclass
class Review:
    """A log's interventions by rule, in order of their ids, its damaged lines, and how many marks fit no line of it."""

    rules: list[RuleCount]
    damaged: list[Damaged]
    stale: int


def review(log: str | os.PathLike, marks: Marks) -> Review:
    """Count the interventions of a log. Raises ValueError when it cannot be read."""
    rules: dict[tuple[str, str], RuleCount] = {}
    damaged = []
    for each in read_log(log):
        if isinstance(each, Damaged):
            damaged.append(each)
            continue
        count = rules.setdefault((each.category, each.rule), RuleCount(each.category, each.rule))
        count.add(each, marks.of(each))
    ordered = [rules[key] for key in sorted(rules)]
    return Review(ordered, damaged, len(marks) - sum(count.marked for count in ordered))


def select(log: str | os.PathLike, numbers: str) -> list[Intervention]:
    """The interventions of a log that `numbers` names, such as "3,7-9".

    Raises:
        ValueError: it is malformed, a number is that of no intervention, or a range ends after the last one.
    """
    ranges = []
    for part in numbers.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isascii() and first.isdecimal() and last.isascii() and last.isdecimal()):
            raise ValueError(f"--mark {numbers}: {part.strip()!r} is no number; accepted are such as 3,7-9")
        ranges.append((_integer(first), _integer(last)))
    chosen: list[Intervention] = []
    found, greatest = set(), 0
    for each in read_log(log):
        if isinstance(each, Damaged):
            continue
        greatest = each.number
        hits = [i for i, (first, last) in enumerate(ranges) if first <= each.number <= last]
        found.update(hits)
        if hits:
            chosen.append(each)
    for i, (first, last) in enumerate(ranges):
        if i not in found or last > greatest:
            named = f"{first}" if first == last else f"{first}-{last}"
            raise ValueError(
                f"--mark {numbers}: {named} names no intervention of {log}; "
                f"accepted are numbers up to {greatest} as --list shows them"
            )
    return chosen


def _integer(digits: str) -> int:
    return int(digits[:18])  # no log has so many lines; Python refuses to read thousands of digits


def select_rule(log: str | os.PathLike, rule: str) -> list[Intervention]:
    """All interventions of a rule, by its id, or by its name alone where one category has it.

    Raises:
        ValueError: no intervention is of that rule, or rules of several categories have the name.
    """
    names = {(each.rule_id, each.rule) for each in read_log(log) if isinstance(each, Intervention)}
    ids = sorted({each for each, _ in names if each == rule} or {each for each, name in names if name == rule})
    if len(ids) == 1:
        return [each for each in read_log(log) if isinstance(each, Intervention) and each.rule_id == ids[0]]
    known = ids or sorted(each for each, _ in names)
    accepted = f"accepted are {', '.join(known)}" if known else "it has none"
    raise ValueError(f"--mark-rule {rule}: {'several rules' if ids else 'no rule'} of {log}; {accepted}")


def write_policy(path: str | os.PathLike, extends: str, rules: list[RuleCount]) -> Path:
    """Write the policy that `policy_text` gives to a new file.

    Raises:
        ValueError: there is a file of that name.
    """
    if Path(path).exists():
        raise ValueError(f"--apply {path}: the file is there; accepted is a new one (--policy {path} builds upon it)")
    return write_atomically(path, policy_text(extends, rules).encode("utf-8"))


def policy_text(extends: str, rules: list[RuleCount]) -> str:
    """A policy in TOML: that of `extends` (a path, or "default") without `rules`."""
    lines = ["# Rules whose interventions were marked as false: python -m model.genesis review"]
    lines.append(f"extends = {toml_string(extends)}")
    lines.append("disabled = [")
    for rule in rules:
        lines.append(f"    {toml_string(rule.rule_id)},  # {rule.marks['false']} of {rule.marked} marks are false")
    return "\n".join([*lines, "]"]) + "\n"


def toml_string(text: str) -> str:
    """A TOML basic string (TOML 1.0) whose value is `text`."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
