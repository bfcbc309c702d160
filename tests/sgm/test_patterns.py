"""Generated messages and facts: what is held out stays out of training; Turkish inflection."""

import re

import pytest

from model.sgm.facts import _reworded, draw_facts
from model.sgm.patterns import HELD_OUT_EVERY, messages, templates
from model.sgm.phrases import FILLERS, LANGUAGES
from model.sgm.router import ACTIONS
from model.sgm.turkish import Word, possess


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
    assert format(possess(noun, person), case) == expected


@pytest.mark.parametrize(
    ("word", "case", "expected"),
    [("Ankara", "de", "Ankara'da"), ("İzmir", "e", "İzmir'e"), ("Muş", "den", "Muş'tan"), ("Ayşe", "in", "Ayşe'nin"),
     ("Iğdır", "i", "Iğdır'ı"), ("papağan", "i", "papağanı"), ("balık", "i", "balığı"), ("köprü", "i", "köprüyü")],
)  # fmt: skip
def test_turkish_cases(word, case, expected):
    assert format(Word(word), case) == expected


def test_facts_have_different_subjects():
    facts = draw_facts(3000, "tr", people=40)
    assert len({(fact.owner, fact.about) for fact in facts}) == 3000
    with pytest.raises(ValueError, match="accepted are up to"):
        draw_facts(10**7, "en")


@pytest.mark.parametrize("language", LANGUAGES)
def test_held_out_statements_are_phrased_as_training_never_phrases_them(language):
    """Reworded facts by a sentence of their own, attributes by frames of which every fifth is held out."""

    def lower(text: str) -> str:
        return (text.replace("İ", "i").replace("I", "ı") if language == "tr" else text).lower()

    def could_say(template: str, text: str) -> bool:
        # A word's last letter may change before a suffix.
        words = {slot: "|".join(re.escape(lower(word)[:-1]) for word in all) for slot, all in FILLERS[language].items()}
        parts = re.split(r"\{(\w+)(?::\w+)?\}", template)
        pattern = "".join(rf"({words.get(x, '.+')})\S*" if i % 2 else re.escape(lower(x)) for i, x in enumerate(parts))
        return re.fullmatch(pattern, lower(text)) is not None

    shown = [each[0] for pair in _reworded(language) for each in pair]
    kept = [each[1] for pair in _reworded(language) for each in pair]
    assert len(set(shown + kept)) == len(shown + kept)
    for held_out, split in ((False, "training"), (True, "held_out")):
        said = {message.template for message in messages(split, 1) if message.action == "store"}
        said = [each for each in said if set(re.findall(r"\{(\w+)", each)) == {"mine", "value"}]
        seen = set()
        for fact in draw_facts(600, language, held_out=held_out):
            seen.add(fact.form)
            if fact.form == "attribute":
                assert lower(fact.text) in {lower(each.format_map(fact.bound)) for each in said}, fact
            if fact.form == "reworded":
                shows, keeps = (_reworded(language)[int(fact.about)][bool(fact.owner)][i] for i in (0, 1))
                assert could_say(keeps if held_out else shows, fact.text), fact
                assert not could_say(shows if held_out else keeps, fact.text), fact
        assert seen == {"attribute", "episode", "reworded"}
