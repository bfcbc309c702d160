"""The built-in text: enough of it, clean, always the same, and every docstring in one kind only."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from model.data import SourceSpec, iter_documents, load_curriculum, open_store
from model.data.pydoc import SHORT, _distinct, _long, _short, entries

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


def test_same_text_in_another_process(texts):
    code = (
        "import hashlib, sys; from model.data import SourceSpec, iter_documents\n"
        "for kind in ('names', 'short', 'long'):\n"
        "    text = b'|'.join(iter_documents(SourceSpec(builtin='pydoc.' + kind)))\n"
        "    print(hashlib.sha256(text).hexdigest())"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
    assert out.split() == [hashlib.sha256(b"|".join(texts[kind])).hexdigest() for kind in KINDS]
