"""The router's network on phrasings that training never shows; its file."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from model.sgm import router as module
from model.sgm.patterns import messages
from model.sgm.phrases import LANGUAGES
from model.sgm.router import ACTIONS, MemoryRouter, gram_buckets, train_router


def test_buckets_are_those_of_all_grams():
    """Counted apart: a text's buckets are those of its grams, whatever case, accents and apostrophes it has."""
    line = b"^ ayse ' nin $"
    grams = {line[i : i + n] for n in range(1, 5) for i in range(len(line) - n + 1)}
    single = set()
    for gram in grams:
        state = 0
        for byte in gram:
            state = (state * 0x01000193 & 0xFFFFFFFF) ^ byte
        mixed = (state + len(gram)) * 0x9E3779B1 & 0xFFFFFFFF
        mixed ^= mixed >> 15
        mixed = mixed * 0x85EBCA6B & 0xFFFFFFFF
        mixed ^= mixed >> 13
        single.add(mixed % 4096)
    for text in ("Ayşe'nin", "AYŞE’NİN", "ayse 'nin"):
        assert set(gram_buckets(text).tolist()) == single


def test_held_out_phrasings(router):
    """Far above chance (each about a third) on templates that training never shows, in both languages."""
    held_out = messages("held_out", 6, seed=1, noise=False)
    decisions = router.decide_all([m.text for m in held_out])
    for language in LANGUAGES:
        pairs = [(m.action, d.action) for m, d in zip(held_out, decisions) if m.language == language]
        for action in ("store", "retrieve"):
            hits = pairs.count((action, action))
            assert hits / sum(said == action for _, said in pairs) > 0.7
            assert hits / sum(true == action for true, _ in pairs) > 0.75
    stored = [(m, d) for m, d in zip(held_out, decisions) if m.action == "store"]
    assert np.mean([m.kind == d.kind for m, d in stored]) > 0.85
    assert 45_000 < sum(p.numel() for p in router.parameters()) < 55_000


def test_a_hedged_statement_is_trusted_less(router):
    plain = ["My dog is called Rex.", "Ankara'da yaşıyorum.", "I was born in 1990."]
    hedged = ["I think my dog is called Rex.", "Sanırım Ankara'da yaşıyorum.", "Maybe I was born in 1990."]
    for a, b in zip(plain, hedged):
        assert router.decide(a).trust > router.decide(b).trust + 0.1


@pytest.mark.parametrize("text", ["", "   ", "\x00\xff\x01", "🔪" * 9, "x" * 1_000_000, "漢字", "\ud800"])
def test_any_text_gets_a_decision(router, text):
    decision = router.decide(text)
    assert decision.action in ACTIONS and 0 < decision.probability <= 1 and 0 <= decision.trust <= 1


def test_training_repeats(router, monkeypatch):
    monkeypatch.setattr("model.sgm.router.TRUST_SIZES", (8,))
    threads = torch.get_num_threads()
    state = torch.random.get_rng_state()
    a, b = (train_router(3, per_template=1, epochs=2).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.get_num_threads() == threads and torch.equal(state, torch.random.get_rng_state())


def test_saved_and_loaded(router, tmp_path, monkeypatch):
    path = router.save(tmp_path / "folder" / "r.safetensors")
    loaded = MemoryRouter.load(path)
    assert all(torch.equal(a, b) for a, b in zip(router.state_dict().values(), loaded.state_dict().values()))
    monkeypatch.setattr("model.sgm.router.train_router", lambda: pytest.fail("trained though the file is there"))
    assert MemoryRouter.load_or_train(path).decide("hello") == router.decide("hello")
    for content in (b"", b"\xff" * 99, b'{"a": 1}'):
        path.write_bytes(content)
        for read in (MemoryRouter.load, MemoryRouter.load_or_train):
            with pytest.raises(ValueError, match="damaged, or no router"):
                read(path)
        assert path.read_bytes() == content
    with pytest.raises(ValueError, match="no such file"):
        MemoryRouter.load(tmp_path / "none")


@pytest.mark.parametrize("changed", ["this one", *(source.__name__ for source in module.SOURCES)])
def test_a_router_that_was_trained_otherwise_is_trained_again(router, tmp_path, monkeypatch, changed):
    """Where one letter of what it was made by has changed: sentences, words that fill them, features, settings."""
    path = router.save(tmp_path / "r.safetensors")
    source = module if changed == "this one" else next(each for each in module.SOURCES if each.__name__ == changed)
    text = Path(source.__file__).read_text("utf-8")
    copy = tmp_path / "changed.py"
    copy.write_text(text[:-2] + "#\n", "utf-8")
    trained = []
    monkeypatch.setattr(module, "train_router", lambda: trained.append(1) or router)
    monkeypatch.setattr(source, "__file__", str(copy))
    module._recipe.cache_clear()
    try:
        for _ in range(2):
            MemoryRouter.load_or_train(path)
        assert trained == [1]
    finally:
        module._recipe.cache_clear()


def test_the_recipe_is_all_that_training_imports():
    """Of this package: a module that is split leaves no part out."""
    package, found, left = Path(module.__file__).parent, set(), ["router"]
    while left:
        for node in ast.walk(ast.parse((package / f"{left.pop()}.py").read_text("utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("model.sgm"):
                continue
            name = node.module.removeprefix("model.sgm").strip(".")
            names = {name} if name else {each.name for each in node.names}
            left += names - found
            found |= names
    assert {f"model.sgm.{name}" for name in found} <= {source.__name__ for source in module.SOURCES}
