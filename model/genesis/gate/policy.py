"""Policies: what the gate keeps a model from writing, read from TOML files.

    policy = load_policy("mine.toml")              # with the default policy
    policy = load_policy("mine.toml", default=False)

A rule is a phrase or a pattern of a category. Rules of several files are taken together; of two with one id the later
holds. docs/gate.md describes the format.
"""

import hashlib
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.genesis.gate.checksums import PREFIX
from model.genesis.gate.folding import fold

DEFAULT = "default"
DEFAULT_POLICY = Path(__file__).parent / "policies" / "default.toml"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_FIELDS = {"enabled": bool, "word_boundaries": bool, "phrases": list, "phrases_file": str, "patterns": (list, dict)}
_KINDS = {bool: "true or false", list: "a list of strings", str: "a string", (list, dict): "a list or table of strings"}


@dataclass(frozen=True)
class Rule:
    """One phrase, folded and with single spaces, or one pattern as it was written.

    `name` is unique in the category; `word_boundaries` matters to phrases. `origin` says where it stands.
    """

    category: str
    name: str
    kind: Literal["phrase", "pattern"]
    text: str
    word_boundaries: bool = True
    origin: str = field(default="policy", compare=False)

    @property
    def id(self) -> str:
        """What `disabled` calls it."""
        return f"{self.category}/{self.name}"


@dataclass(frozen=True)
class Policy:
    """Rules in order: where a byte completes several, the first is told. No rule is a policy too."""

    rules: tuple[Rule, ...] = ()


def load_policy(*paths: str | os.PathLike, default: bool = True) -> Policy:
    """The rules of all files together, and of the default policy unless that is not wanted.

    Raises:
        ValueError: of one line, naming file, category, entry, and what is accepted.
    """
    reader = _Reader()
    if default:
        reader.read(DEFAULT_POLICY)
    for path in paths:
        reader.read(Path(path))
    return reader.policy()


class _Reader:
    def __init__(self):
        self.seen: set[Path] = set()
        self.rules: dict[str, Rule] = {}
        self.disabled: dict[str, str] = {}  # where each id was disabled
        self.enabled: dict[str, bool] = {}

    def policy(self) -> Policy:
        for name, where in self.disabled.items():
            if name not in self.rules:
                raise ValueError(f"{where} {name!r}: accepted are ids of the policy's rules, such as privacy/email")
        rules = self.rules.values()
        return Policy(tuple(r for r in rules if r.id not in self.disabled and self.enabled.get(r.category, True)))

    def read(self, path: Path) -> None:
        """Take in a file and what it extends; one that was read already changes nothing."""
        if path.resolve() in self.seen:
            return
        self.seen.add(path.resolve())
        where = f"policy {path}:"
        values = _toml(path)
        extends = values.pop("extends", None)
        if extends is not None:
            if not isinstance(extends, str) or not extends:
                raise ValueError(f'{where} extends={extends!r}: accepted is "{DEFAULT}" or the path of a policy')
            self.read(DEFAULT_POLICY if extends == DEFAULT else path.parent / extends)
        for name in _strings(values.pop("disabled", []), f"{where} disabled"):
            self.disabled.setdefault(name, f"{where} disabled")
        for category, entries in values.items():
            if not _NAME.fullmatch(category) or not isinstance(entries, dict):
                raise ValueError(
                    f"{where} {category}: accepted are extends, disabled, and [categories] of letters, digits, _, -"
                )
            self._category(path, category, entries)

    def _category(self, path: Path, category: str, entries: dict[str, Any]) -> None:
        where = f"policy {path}: [{category}]"
        for name, value in entries.items():
            if name not in _FIELDS:
                raise ValueError(f"{where} {name}: accepted are {', '.join(_FIELDS)}")
            if not isinstance(value, _FIELDS[name]):
                raise ValueError(f"{where} {name}={value!r}: accepted is {_KINDS[_FIELDS[name]]}")
        if "enabled" in entries:
            self.enabled[category] = entries["enabled"]
        bounded = entries.get("word_boundaries", True)
        for text, origin in _phrases(path, where, entries):
            phrase = " ".join(fold(text).split())
            if not phrase:
                raise ValueError(f"{origin} {text!r}: accepted is a phrase of which something is left after folding")
            self._add(Rule(category, f"phrase:{_digest(phrase)}", "phrase", phrase, bounded, origin))
        for name, pattern, origin in _patterns(where, entries.get("patterns", [])):
            self._add(Rule(category, name, "pattern", pattern, origin=origin))

    def _add(self, rule: Rule) -> None:
        self.rules[rule.id] = rule


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_text(path, f"policy {path}:"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"policy {path}: {' '.join(str(error).split())}; accepted is a TOML file") from None


def _text(path: Path, where: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{where} {error.strerror or error}; accepted is a readable file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} byte {error.start} is not UTF-8; accepted is a UTF-8 file") from None


def _strings(value: Any, where: str) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"{where}={value!r}: accepted is a list of strings")
    for i, text in enumerate(value):
        if not isinstance(text, str):
            raise ValueError(f"{where} {i + 1}={text!r}: accepted is a string")
    return value


def _phrases(path: Path, where: str, entries: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(phrase, where it stands) of the list and the file."""
    for i, text in enumerate(_strings(entries.get("phrases", []), f"{where} phrases"), 1):
        yield text, f"{where} phrases {i}"
    if "phrases_file" in entries:
        file = path.parent / entries["phrases_file"]
        for i, line in enumerate(_text(file, f"{where} phrases_file {str(file)!r}:").splitlines(), 1):
            if line.strip():
                yield line, f"{where} {file} line {i}"


def _patterns(where: str, entries: list | dict) -> Iterator[tuple[str, str, str]]:
    """(name, pattern, where it stands)."""
    if isinstance(entries, list):
        for i, text in enumerate(_strings(entries, f"{where} patterns"), 1):
            yield text if text.startswith(PREFIX) else f"pattern:{_digest(text)}", text, f"{where} patterns {i}"
        return
    for name, text in entries.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"{where} patterns {name!r}: accepted are names of letters, digits, _ and -")
        if not isinstance(text, str):
            raise ValueError(f"{where} patterns {name}={text!r}: accepted is a string")
        yield name, text, f"{where} patterns {name}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
