"""Text that every machine has: the documentation inside the running Python's standard library and NumPy.

Sources are parsed, not imported; what is written in C is asked through `inspect` from modules that are built into the
interpreter, a few safe extension modules, and NumPy, which is loaded anyway. Three kinds of documents, easy to hard:

pydoc.names   "qualified.name: first sentence."
pydoc.short   a signature and a docstring of at most SHORT characters
pydoc.long    a signature and a longer docstring, and the language reference in pydoc_data.topics

A docstring that many objects share counts once. Documents come in the order of a hash of their name, the same in all
three kinds: so the held-out end is no single module, and nearly the same names are held out of every kind.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

SHORT = 400
VERSION = 1
_SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "turtledemo", "lib2to3", "__pycache__"}
_SAFE_EXTENSIONS = ("math", "cmath", "_datetime", "_struct", "array", "_bisect", "_heapq", "_random", "_json", "select")
_NUMPY_SPACES = ("numpy", "numpy.linalg", "numpy.fft", "numpy.random")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(])")
_TOPIC_PARAGRAPH = 60
_TOPIC_LEAST = 200

Entry = tuple[str, str, str]  # qualified name, signature line, docstring


def builtin_version() -> str:
    """What the text depends on besides Python's own version: it belongs to the key of a store."""
    return f"pydoc {VERSION}, {sys.implementation.cache_tag}, numpy {np.__version__}, short {SHORT}"


def builtin_documents(name: str) -> Iterator[bytes]:
    """The UTF-8 documents of "pydoc.names", "pydoc.short" or "pydoc.long" in their fixed order.

    The first call in a process parses everything, some seconds; the next ones reuse it. Raises KeyError for another
    name.
    """
    make = {"pydoc.names": _names, "pydoc.short": _short, "pydoc.long": _long}[name]
    seen = set()
    for _, text in sorted((_order(key), text) for key, text in make()):
        if text not in seen:
            seen.add(text)
            yield text.encode("utf-8", "backslashreplace")


def _order(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "backslashreplace")).digest()


def _names() -> Iterator[tuple[str, str]]:
    """A first sentence that several names share stays with the first, so that none is both trained on and held out."""
    seen = set()
    for name, _, doc in entries():
        sentence = _SENTENCE_END.split(" ".join(doc.split("\n\n")[0].split()))[0]
        if sentence not in seen and any(c.isalpha() for c in sentence):
            seen.add(sentence)
            yield name, f"{name}: {sentence if sentence[-1] in '.!?' else sentence.rstrip(':;,') + '.'}"


def _short() -> Iterator[tuple[str, str]]:
    return ((name, f"{line}\n{doc}") for name, line, doc in _distinct() if len(doc) <= SHORT)


def _long() -> Iterator[tuple[str, str]]:
    yield from ((name, f"{line}\n{doc}") for name, line, doc in _distinct() if len(doc) > SHORT)
    yield from _topics()


def _distinct() -> Iterator[Entry]:
    seen = set()
    for name, line, doc in entries():
        if doc not in seen:
            seen.add(doc)
            yield name, line, doc


def _topics() -> Iterator[tuple[str, str]]:
    """The language reference; a topic that repeats paragraphs of a longer one loses them, or goes."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    seen = set()
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        kept = []
        for paragraph in text.strip().split("\n\n"):
            if paragraph not in seen:
                kept.append(paragraph)
            if len(paragraph) >= _TOPIC_PARAGRAPH:
                seen.add(paragraph)
        body = "\n\n".join(kept)
        if len(body) >= _TOPIC_LEAST:
            yield f"topic.{name}", body


@cache
def entries() -> tuple[Entry, ...]:
    """Every documented object once by name, sorted by name: (qualified name, signature line, clean docstring)."""
    found: dict[str, Entry] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in sources and deprecated names in NumPy are not our news
        for root, prefix in ((Path(sysconfig.get_paths()["stdlib"]), ""), (Path(np.__file__).parent, "numpy.")):
            for entry in _parsed(root, prefix):
                found.setdefault(entry[0], entry)
        for entry in _compiled():
            found.setdefault(entry[0], entry)
    return tuple(found[name] for name in sorted(found))


def _parsed(root: Path, prefix: str) -> Iterator[Entry]:
    """The docstrings in the .py files under a folder."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED and f.isidentifier())
        for file in sorted(files):
            stem, extension = os.path.splitext(file)
            if extension != ".py" or stem.startswith("test_") or not stem.isidentifier():
                continue
            inside = Path(folder).relative_to(root).parts
            module = prefix + ".".join([*inside, stem]).removesuffix("__init__")
            try:
                tree = ast.parse((Path(folder) / file).read_bytes())
            except (OSError, SyntaxError, ValueError):
                continue
            yield from _node_entries(tree, module.strip("."), f"module {module.strip('.')}")


def _node_entries(node: ast.AST, name: str, line: str) -> Iterator[Entry]:
    if doc := ast.get_docstring(node):
        yield name, line, doc
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, child.bases))
            inner = f"{name}.{child.name}"
            yield from _node_entries(child, inner, f"class {inner}" + (f"({bases})" if bases else ""))
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(child)):
            yield f"{name}.{child.name}", f"{name}.{child.name}({ast.unparse(child.args)})", doc


def _compiled() -> Iterator[Entry]:
    """The docstrings of what is written in C. Importing these modules runs no file of anybody's."""
    for name in (*sorted(sys.builtin_module_names), *_SAFE_EXTENSIONS):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        public = {"posix": "os", "nt": "os"}.get(name, name.lstrip("_"))
        yield from _object_entries(module, "" if public == "builtins" else public, name)
    # Named, not taken from what happens to be loaded: NumPy loads some of these only on first use.
    for space in _NUMPY_SPACES:
        yield from _object_entries(importlib.import_module(space), space, "numpy")


def _object_entries(module, prefix: str, owner: str) -> Iterator[Entry]:
    if (doc := _doc(module)) and prefix:
        yield prefix, f"module {prefix}", doc
    for name, value in sorted(vars(module).items()):
        # Hooks are there to be replaced, by a debugger or a test runner, and the text must not depend on that.
        if name.startswith("_") or name.endswith("hook") or inspect.ismodule(value) or not callable(value):
            continue
        origin = getattr(value, "__module__", None) or owner
        if origin.split(".")[0].lstrip("_") != owner.lstrip("_"):
            continue  # borrowed from elsewhere: it is told there
        qualified = f"{prefix}.{name}" if prefix else name
        if doc := _doc(value):
            yield qualified, f"class {qualified}" if inspect.isclass(value) else _signature(qualified, value), doc
        if inspect.isclass(value):
            for member, inner in sorted(vars(value).items()):
                if member.startswith("__") or not (callable(inner) or inspect.isdatadescriptor(inner)):
                    continue  # "Return str(self)." a thousand times teaches nothing
                if doc := _doc(inner):
                    yield f"{qualified}.{member}", _signature(f"{qualified}.{member}", inner), doc


def _signature(name: str, value) -> str:
    text = getattr(value, "__text_signature__", None)
    if not isinstance(text, str):
        return name
    # "($self, /, sep=None)": the markers of C functions say nothing to a reader.
    return name + re.sub(r"(?<=\()/(, )?|, /", "", re.sub(r"\$\w+(, )?", "", " ".join(text.split())))


def _doc(value) -> str:
    doc = getattr(value, "__doc__", None)
    return inspect.cleandoc(doc) if isinstance(doc, str) else ""
