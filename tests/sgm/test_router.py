"""The router on phrasings that training never shows; trust; explicit commands; messages through a memory."""

import re

import numpy as np
import pytest
import torch

from model.sgm.memory import MAX_TEXT, Entry, ExternalMemory, Match
from model.sgm.patterns import HELD_OUT_EVERY, LANGUAGES, draw_facts, messages, templates
from model.sgm.router import (
    ACTIONS,
    Command,
    Decision,
    MemoryRouter,
    RoutedMemory,
    gram_buckets,
    judged_queries,
    parse_command,
    train_router,
)


@pytest.fixture(scope="module")
def router():
    return train_router()


@pytest.fixture
def chat(router, tmp_path):
    with ExternalMemory(tmp_path / "m.db", daily_budget=5) as memory:
        yield RoutedMemory(memory, router)


# ── patterns ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_held_out_template_is_in_training():
    sides = {split: {(m.template, m.language) for m in messages(split, 3)} for split in ("training", "held_out")}
    assert not sides["training"] & sides["held_out"]
    assert len(sides["training"] | sides["held_out"]) == len(templates()) == len(set(templates()))
    for language in LANGUAGES:
        for action in ACTIONS:
            assert sum(t[1] == action and t[3] == language for t in templates()) >= 60
    held_out = {t[0] for i, t in enumerate(templates()) if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1}
    for language in LANGUAGES:
        for fact in draw_facts(200, language):
            assert fact.asks and fact.held_out and not set(fact.asks) & set(fact.held_out)
            if fact.form != "reworded":
                assert set(fact.held_out) <= held_out and not set(fact.asks) & held_out


def test_patterns_are_filled_and_repeat():
    for split in ("training", "held_out"):
        found = messages(split, 4, invented=0.2)
        assert found == messages(split, 4, invented=0.2) != messages(split, 4, seed=1)
        assert not [m for m in found if re.search(r"[{}]", m.text)] and len({m.text for m in found}) == len(found)
        assert {m.kind is not None for m in found if m.action == "store"} == {True}
    with pytest.raises(ValueError, match="split='test'"):
        messages("test", 1)


@pytest.mark.parametrize(
    ("noun", "person", "case", "expected"),
    [
        ("araba", 1, "in", "arabamın"), ("araba", 3, "i", "arabasını"), ("göbek ad", 2, "", "göbek adın"),
        ("doğum gün", 1, "e", "doğum günüme"), ("en sevdi{} renk", 3, "", "en sevdiği renk"),
        ("köpek", 1, "", "köpeğim"),
    ],
)  # fmt: skip
def test_turkish_possession(noun, person, case, expected):
    from model.sgm.patterns import possess

    assert format(possess(noun, person), case) == expected


@pytest.mark.parametrize(
    ("word", "case", "expected"),
    [("Ankara", "de", "Ankara'da"), ("İzmir", "e", "İzmir'e"), ("Muş", "den", "Muş'tan"), ("Ayşe", "in", "Ayşe'nin"),
     ("Iğdır", "i", "Iğdır'ı"), ("papağan", "i", "papağanı"), ("balık", "i", "balığı"), ("köprü", "i", "köprüyü")],
)  # fmt: skip
def test_turkish_cases(word, case, expected):
    from model.sgm.patterns import Word

    assert format(Word(word), case) == expected


def test_facts_have_different_subjects():
    facts = draw_facts(3000, "tr", people=40)
    assert len({(fact.owner, fact.about) for fact in facts}) == 3000
    with pytest.raises(ValueError, match="accepted are up to"):
        draw_facts(10**7, "en")


# ── network ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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
    monkeypatch.setattr("model.sgm.router.train_router", lambda: router)
    monkeypatch.setattr("model.sgm.router._patterns_hash", lambda: "others")
    before = path.stat().st_mtime_ns
    MemoryRouter.load_or_train(path)
    assert path.stat().st_mtime_ns != before  # patterns changed: trained and saved again
    for content in (b"", b"\xff" * 99, b'{"a": 1}'):
        path.write_bytes(content)
        for read in (MemoryRouter.load, MemoryRouter.load_or_train):
            with pytest.raises(ValueError, match="damaged, or no router"):
                read(path)
        assert path.read_bytes() == content
    with pytest.raises(ValueError, match="no such file"):
        MemoryRouter.load(tmp_path / "none")


# ── trust ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_trust_is_calibrated_on_held_out_phrasings(router):
    judged = judged_queries((5, 30, 150), held_out=True, seed=11, queries=60)
    trust = np.array([p for each in judged for p in router.trust(each.query, each.matches)])
    right = np.array([a for each in judged for a in each.answers])
    accepted = trust >= 0.5
    assert right[accepted].mean() > 0.8 and accepted[right].mean() > 0.6
    bins = np.minimum((trust * 10).astype(int), 9)
    error = sum(abs(trust[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    assert error < 0.04
    assert right.mean() < 0.15  # so that accepting nothing, or all, would not do


def test_trust_of_near_misses(router):
    def trust(query, *texts):
        matches = [Match(Entry(i, "fact", text, 1.0, 0.0, 0.0, 0, "user"), 5.0 - i) for i, text in enumerate(texts)]
        return router.trust(query, matches)

    assert router.trust("anything", []) == []
    right, other = trust("What is my dog's name?", "My dog's name is Rex.", "Anna's shoe size is 38.")
    assert right > 0.5 > other
    for text in ("My cat's name is Rex.", "My shoe size is 41.", "Rex is Anna's best friend."):
        assert trust("What is my dog's name?", text)[0] < 0.5
    mine, hers = trust("What is my dog's name?", "My dog's name is Rex.", "Anna's dog's name is Max.")
    assert mine > 0.9 and hers < 0.5
    assert trust("Mehmet'in doğum günü ne zaman?", "Ayşe'nin doğum günü 3 Mayıs.")[0] < 0.5
    right, other = trust("Ayşe'nin arabası ne?", "Ayşe'nin arabası mavi.", "Mehmet'in arabası siyah.")
    assert right > 0.5 > other


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "name", "argument"),
    [
        ("Remember that my name is Ali.", "remember", "my name is Ali."), ("remember: tea", "remember", "tea"),
        ("don't forget to buy milk", "remember", "buy milk"), ("/remember a\nb", "remember", "a\nb"),
        ("Hatırla: kapı şifrem 42", "remember", "kapı şifrem 42"), ("HATIRLA: x", "remember", "x"),
        ("Unutma ki annem gelecek", "remember", "annem gelecek"), ("şunu not et: 😀", "remember", "😀"),
        ("forget my name", "forget", "my name"), ("Forget about Anna.", "forget", "Anna"),
        ("forget #12", "forget", "#12"),
        ("arabamı unut", "forget", "arabamı"), ("unut: kapı", "forget", "kapı"), ("unut 3", "forget", "3"),
        ("list", "list", ""), ("List facts", "list", "fact"), ("show my memories", "list", ""),
        ("/list skills", "list", "skill"),
        ("listele", "list", ""), ("becerileri listele", "list", "skill"), ("Neleri hatırlıyorsun?", "list", ""),
        ("What do you remember about me?", "list", ""),
    ],
)  # fmt: skip
def test_commands(text, name, argument):
    assert parse_command(f"  {text} ") == Command(name, argument)


@pytest.mark.parametrize(
    "text",
    [
        "", "Do you remember my name?", "Remember me?", "Remember when we met?", "forget it", "Forget about it.",
        "forget everything", "I forgot my name", "list three advantages of tea", "show me the way", "bunu unut",
        "adımı unuttum", "her şeyi unut", "Beni hatırlıyor musun?", "/remember", "remember:", "/listing", "\x00",
    ],
)  # fmt: skip
def test_what_is_no_command(text):
    assert parse_command(text) is None


# ── through a memory ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_conversation(chat):
    stored = chat.handle("My dog's name is Rex.")
    assert stored.stored.text == "My dog's name is Rex." and stored.decision.action == "store"
    assert chat.handle("Arabam kırmızı.").stored.confidence == pytest.approx(
        chat.router.decide("Arabam kırmızı.").trust
    )
    for question, text in (("What is my dog's name?", "My dog's name is Rex."), ("Arabam ne renk?", "Arabam kırmızı.")):
        routed = chat.handle(question)
        assert [match.entry.text for match, trust in routed.retrieved if trust >= 0.5] == [text]
    assert {entry.text: entry.accesses for entry in chat.memory.list()} == {
        "My dog's name is Rex.": 1, "Arabam kırmızı.": 1,
    }  # fmt: skip
    for text in ("Write a poem about the sea.", "Merhaba!", "", "x" * (MAX_TEXT + 1), "\ud800"):
        routed = chat.handle(text)
        assert routed.stored is None and not routed.retrieved
    assert len(chat.memory) == 2


def test_nothing_below_the_threshold_is_retrieved(chat, monkeypatch):
    chat.handle("remember that my dog is called Rex")
    chat.handle("remember that my cat is called Rex too")
    monkeypatch.setattr(chat.router, "trust", lambda query, matches: [0.4, 0.6][: len(matches)])
    assert [trust for _, trust in chat.retrieve("what is my dog called")] == [0.6]
    monkeypatch.setattr(chat.router, "trust", lambda query, matches: [0.49] * len(matches))
    assert chat.retrieve("what is my dog called") == []
    with pytest.raises(ValueError, match=r"threshold=1\.5"):
        RoutedMemory(chat.memory, chat.router, threshold=1.5)


def test_commands_are_carried_out(chat):
    entry = chat.handle("Unutma: köpeğimin adı Karabaş").stored
    assert entry.confidence == 1.0 and chat.handle("listele").listed == [entry]
    assert chat.handle("list skills").listed == []
    assert chat.handle("köpeğimi unut").forgotten == [entry] and len(chat.memory) == 0
    entry = chat.handle("remember: tea").stored
    assert chat.handle("forget #999").forgotten == [] == chat.handle("forget 0").forgotten
    routed = chat.handle(f"forget #{entry.id}")
    assert routed.forgotten == [entry] and routed.command == "forget" and routed.decision is None
    with pytest.raises(ValueError, match="text="):
        chat.handle("remember: " + "x" * (MAX_TEXT + 1))
    with pytest.raises(ValueError, match="text=b''"):
        chat.handle(b"")


def test_a_spent_budget_is_told(chat):
    for i in range(5):
        assert chat.handle(f"remember: text {i}").stored
    assert chat.handle("remember: text 5").budget_exceeded
    routed = chat.handle("My name is Ali.")
    assert routed.budget_exceeded and routed.stored is None and routed.decision.action == "store"
    assert len(chat.memory) == 5


def test_a_doubtful_statement_is_not_stored(chat, monkeypatch):
    for probability, kept in ((0.55, False), (0.65, True)):
        monkeypatch.setattr(chat.router, "decide", lambda text, p=probability: Decision("store", p, 0.9, "skill"))
        assert bool(chat.handle("To fix it, wait.").stored) == kept
    assert chat.memory.list("skill")


def test_ranking_by_trust_beats_bm25_alone(router):
    judged = [j for j in judged_queries((300,), held_out=True, seed=5, queries=200) if any(j.answers)]
    alone = np.mean([j.answers[0] for j in judged])
    ranked = np.mean([j.answers[int(np.argmax(router.trust(j.query, j.matches)))] for j in judged])
    assert ranked > 0.9 and ranked >= alone
