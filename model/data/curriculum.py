"""The curriculum: stages of text, each with its share of the steps and its plasticity, read from TOML.

Built-in curricula are the TOML files in `curricula/`; that folder is also the one place where hub ids are written.
"""

from __future__ import annotations

import glob
import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from .crops import CROPS
from .errors import DataError, one_line
from .recall import RecallOptions
from .sources import SourceSpec

_FOLDER = Path(__file__).parent / "curricula"
BUILTIN_CURRICULA = tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))
LOCAL_STAGES = ("dictionary", "stories", "encyclopedia")
LOCAL_FOLDER = "corpora"
_WANTED = ", ".join(f"{stage}.*" for stage in LOCAL_STAGES)
OF_FOLDER = ("local", "recall")  # built-in curricula of LOCAL_STAGES in LOCAL_FOLDER


@dataclass(frozen=True)
class Stage:
    """One stage: `source` for `share` of the steps, in (0, 1], at plasticity α in [0, 1].

    `seq_len` in bytes, or None for the run's own; `crops` is "any" or "document" (see CropSampler); `recall` is what
    recall tasks are mixed in, given as RecallOptions, a table of them, or their share alone. Raises DataError naming
    stage, field, value and what is accepted.
    """

    name: str
    source: SourceSpec
    share: float
    plasticity: float
    seq_len: int | None = None
    crops: str = "any"
    recall: RecallOptions | float | dict = 0.0

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name):
            raise DataError(f"stage field name={self.name!r}: accepted is a non-empty string")
        if not isinstance(self.source, SourceSpec):
            raise self._bad("source", "a SourceSpec")
        if not (_is_number(self.share) and 0 < self.share <= 1):
            raise self._bad("share", "a number above 0 and up to 1")
        if not (_is_number(self.plasticity) and 0 <= self.plasticity <= 1):
            raise self._bad("plasticity", "a number from 0 to 1")
        whole = isinstance(self.seq_len, int) and not isinstance(self.seq_len, bool)
        if self.seq_len is not None and not (whole and self.seq_len >= 1):
            raise self._bad("seq_len", "an integer of at least 1 byte, or nothing")
        if self.crops not in CROPS:
            raise self._bad("crops", " or ".join(CROPS))
        if not isinstance(self.recall, RecallOptions):
            object.__setattr__(self, "recall", self._recall(self.recall))

    def _recall(self, value) -> RecallOptions:
        try:
            if isinstance(value, dict):
                _check_keys("recall", value, tuple(field.name for field in fields(RecallOptions)))
                return RecallOptions(**({"share": None} | value))
            return RecallOptions(value)
        except DataError as error:
            raise DataError(f"stage {self.name}: {error}") from error

    def _bad(self, field: str, accepted: str) -> DataError:
        return DataError(f"stage {self.name}: field {field}={getattr(self, field)!r}: accepted is {accepted}")


@dataclass(frozen=True)
class Curriculum:
    """Stages in order; their names differ and their shares sum to 1 within 1e-6. Raises DataError otherwise."""

    name: str
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not (isinstance(self.name, str) and self.name):
            raise DataError(f"curriculum field name={self.name!r}: accepted is a non-empty string")
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise DataError(f"curriculum {self.name}: stages {names}: accepted are one or more, of different names")
        total = sum(stage.share for stage in self.stages)
        if abs(total - 1) > 1e-6:
            raise DataError(f"curriculum {self.name}: the stages' share sums to {total:g}: accepted is 1")

    def boundaries(self, total_steps: int) -> list[int]:
        """The step after the last of each stage; the last is `total_steps`.

        A stage never has fewer than one step where there are as many steps as stages. Raises DataError below 1 step.
        """
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise DataError(f"total_steps={total_steps!r}: accepted is an integer of at least 1")
        ends, done = [], 0.0
        for stage in self.stages:
            done += stage.share
            ends.append(round(done * total_steps))
        ends[-1] = total_steps
        count = len(ends)
        if total_steps >= count:
            for i in range(count):
                floor = ends[i - 1] + 1 if i else 1
                ends[i] = min(max(ends[i], floor), total_steps - (count - 1 - i))
        return ends

    def stage_at(self, step: int, total_steps: int) -> int:
        """The index of the stage that step `step` (0-based) of `total_steps` belongs to; the last one from there on."""
        if step < 0:
            raise DataError(f"step={step}: accepted is 0 or more")
        ends = self.boundaries(total_steps)
        return next((i for i, end in enumerate(ends) if step < end), len(ends) - 1)

    def describe(self) -> str:
        """A line for the curriculum and one for each stage."""
        lines = [f"curriculum {self.name}"]
        for stage in self.stages:
            length = f", seq_len {stage.seq_len}" if stage.seq_len else ""
            crops = f", crops {stage.crops}" if stage.crops != "any" else ""
            share = f"{100 * stage.share:.4g}% of steps"
            if stage.recall.share:
                crops += f", recall tasks in {100 * stage.recall.share:.4g}% of rows"
            lines.append(f"  {stage.name}: {stage.source.label}, {share}, α {stage.plasticity:g}{length}{crops}")
        return "\n".join(lines)


def load_curriculum(name_or_path: str | os.PathLike) -> Curriculum:
    """A built-in name, a .toml file, a folder, or any other file.

    A folder means its curriculum.toml if it has one; else the `local` curriculum where it holds dictionary.*, stories.*
    and encyclopedia.*; else one stage of everything in it. The name `local` is the folder ./corpora, and `recall` is
    the same with recall tasks. Any other file is one stage. Raises DataError, one line, for anything else.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if text in OF_FOLDER:
        if not Path(LOCAL_FOLDER).is_dir():
            raise DataError(f"curriculum {text}: there is no folder ./{LOCAL_FOLDER}; it is to hold {_WANTED}")
        return _from_folder(Path(LOCAL_FOLDER), text)
    if text in BUILTIN_CURRICULA:
        return _from_toml(_FOLDER / f"{text}.toml", _FOLDER)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_toml(path, path.parent) if path.suffix.lower() == ".toml" else _single(path)
    names = ", ".join(BUILTIN_CURRICULA)
    raise DataError(f"curriculum {text!r}: accepted is one of {names}, a .toml file, or a file or folder of text")


def _from_folder(folder: Path, name: str = "local") -> Curriculum:
    """The folder's own curriculum, or the one of this name, whose stages are its texts, or all of them as one stage.
    Only the second, if the name is not `local`."""
    if name == "local" and (folder / "curriculum.toml").is_file():
        return _from_toml(folder / "curriculum.toml", folder)
    found = {stage: sorted(glob.glob(f"{glob.escape(str(folder))}/{stage}.*")) for stage in LOCAL_STAGES}
    if not all(found.values()):
        if name != "local":
            raise DataError(f"curriculum {name}: folder {folder}: accepted is one that holds {_WANTED}")
        return _single(folder)
    for stage, matches in found.items():
        if len(matches) > 1:
            raise DataError(f"folder {folder}: {len(matches)} files for {stage} ({', '.join(matches)}): keep one")
    return _from_toml(_FOLDER / f"{name}.toml", folder)


def _single(path: Path) -> Curriculum:
    stage = Stage("local", SourceSpec(files=(str(path),)), share=1.0, plasticity=0.99)
    return Curriculum(path.name or str(path), (stage,))


def _from_toml(path: Path, base: Path) -> Curriculum:
    """Parse a curriculum whose relative paths start at `base`."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"file {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # TOML and UTF-8 errors are both ValueErrors
        raise DataError(f"file {path}: not valid TOML: {one_line(error)}") from error
    try:
        _check_keys("curriculum", table, ("name", "stages"))
        stages = table.get("stages")
        if not (isinstance(stages, list) and stages and all(isinstance(stage, dict) for stage in stages)):
            raise DataError("stages: accepted are one or more [[stages]] tables")
        return Curriculum(table.get("name", path.stem), tuple(_stage(stage, base) for stage in stages))
    except DataError as error:
        raise DataError(f"file {path}: {error}") from error


def _stage(table: dict, base: Path) -> Stage:
    name = table.get("name")
    accepted = tuple(field.name for field in fields(Stage))
    _check_keys(f"stage {name}", table, accepted)
    for key in ("name", "source", "share", "plasticity"):
        if key not in table:
            raise DataError(f"stage {name}: field {key} is missing; each stage needs name, source, share, plasticity")
    source = table["source"]
    if not isinstance(source, str | dict):
        raise DataError(f"stage {name}: field source={source!r}: accepted is a path, a glob or a table")
    values = {"files": source} if isinstance(source, str) else dict(source)
    _check_keys(f"stage {name}, source", values, tuple(field.name for field in fields(SourceSpec)))
    entries = [values["files"]] if isinstance(values.get("files"), str) else values.get("files")
    if isinstance(entries, list) and all(isinstance(entry, str) and entry for entry in entries):
        values["files"] = [_resolve(entry, base) for entry in entries]
    try:
        return Stage(**(table | {"source": SourceSpec(**values)}))
    except DataError as error:
        raise error if str(error).startswith("stage ") else DataError(f"stage {name}: {error}") from error


def _resolve(entry: str, base: Path) -> str:
    """An entry relative to `base`, whose own brackets and stars must not turn into a glob."""
    entry = os.path.expanduser(entry)
    joined = os.path.join(base, entry)
    return joined if os.path.exists(joined) else os.path.join(glob.escape(str(base)), entry)


def _check_keys(what: str, table: dict, accepted: tuple[str, ...]) -> None:
    for key in table:
        if key not in accepted:
            raise DataError(f"{what}: unknown key {key!r}; accepted are {', '.join(accepted)}")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
