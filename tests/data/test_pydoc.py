"""The built-in text: enough of it, clean, always the same, and every docstring in one kind only."""

import hashlib
import os
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from model.data import SourceSpec, iter_documents, load_curriculum, open_store, pydoc
from model.data.pydoc import SHORT, _distinct, _long, _short, entries

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"pydoc.names": 300_000, "pydoc.short": 700_000, "pydoc.long": 1_500_000}


@pytest.fixture(scope="module")
def texts():
    return {kind: list(iter_documents(SourceSpec(builtin=kind))) for kind in KINDS}


def test_sizes_and_encoding(texts):
    for kind, least in KINDS.items():
        assert sum(map(len, texts[kind])) > least
        assert len(set(texts[kind])) == len(texts[kind])
        for document in texts[kind]:
            assert document.decode() and document.strip(b"\n")


def test_names_are_a_name_and_one_line(texts):
    for document in texts["pydoc.names"]:
        name, _, sentence = document.decode().partition(": ")
        assert name.replace(".", "_").isidentifier() and sentence and "\n" not in sentence
        assert sentence[-1] in ".!?"
    assert b"functools.reduce" in b"".join(texts["pydoc.names"])


def test_every_docstring_is_short_or_long(texts):
    docs = [doc for _, _, doc in _distinct()]
    assert len(set(docs)) == len(docs) == len({doc for _, _, doc in entries()})
    assert not any("\n" in line for _, line, _ in _distinct())
    short = {text.split("\n", 1)[1] for _, text in _short()}
    long = {text.split("\n", 1)[1] for name, text in _long() if not name.startswith("topic.")}
    assert short | long == set(docs) and not short & long
    assert max(map(len, short)) <= SHORT < min(map(len, long))


def test_nothing_from_tests_or_other_packages(texts):
    modules = {name for name, _, _ in entries()}
    assert not {name.split(".")[0] for name in modules} & {"test", "idlelib", "pip", "torch", "pytest", "setuptools"}
    assert not any(".tests." in name for name in modules)
    assert {"json.loads", "math.sqrt", "len", "str.join", "shutil.copy", "numpy.add", "numpy.ndarray.sum"} <= modules


def test_held_out_end_is_no_single_module(texts, cache):
    for stage in load_curriculum("pydoc").stages:
        store = open_store(stage.source, cache, progress=False)
        assert store.meta["split_rule"] == "document" and 0.03 < store.meta["val_share"] < 0.07
    names = [doc.split(b":")[0].split(b".")[0] for doc in texts["pydoc.names"][-300:]]
    assert max(map(names.count, names)) < 240 and len(set(names)) > 30


def test_same_text_in_another_process(tmp_path):
    """Where sets have another order. Of a part of what there is: to parse all of it once is enough."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("asyncio", "email", "json", "shutil.py"):
        (tmp_path / name).symlink_to(library / name)
    program = f"from tests.data.test_pydoc import sums; print(sums({str(tmp_path)!r}))"
    environment = os.environ | {"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{sums(str(tmp_path))}\n", done.stderr


def sums(library: str) -> list[str]:
    """Of the three kinds of documents, from the files of this folder, of numpy.linalg and what is written in C."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_paths", lambda: {"stdlib": library})
        patch.setattr(np, "__file__", np.linalg.__file__)
        patch.setattr(pydoc, "entries", cache(entries.__wrapped__))
        texts = [b"|".join(iter_documents(SourceSpec(builtin=kind))) for kind in KINDS]
    assert all(len(text) > 10_000 for text in texts)
    return [hashlib.sha256(text).hexdigest() for text in texts]
