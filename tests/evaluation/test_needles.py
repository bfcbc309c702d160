import math

import pytest
import torch

from model.data.haystack import KEY_BYTES, LANGUAGES
from model.evaluation.recall import PASS_ACCURACY, make_needles, needle_accuracy


@pytest.mark.parametrize("length", [200, 1003, 4000])
@pytest.mark.parametrize("depth", [None, 0.0, 0.37, 1.0])
def test_prompts_have_the_stated_shape(length, depth):
    samples = 24
    for i, needle in enumerate(make_needles(length, samples, seed=3, depth=depth)):
        prompt = needle.prompt
        assert len(prompt) == length and len(needle.answer) == KEY_BYTES
        prompt.decode()  # whole characters only
        assert prompt.count(needle.answer) == 1
        assert needle.start < prompt.index(needle.answer) < needle.question
        # The needle ends where its sentence ends; what is around it is the haystack.
        statement = prompt[needle.start :].split(b". ")[0] + b". "
        assert needle.answer in statement
        room = needle.question - len(statement)
        assert needle.start == round(((i + 0.5) / samples if depth is None else depth) * room)
        assert not prompt.endswith(needle.answer) and prompt[needle.question - 1 : needle.question] == b" "
        # The question ends with the words that came before the key.
        assert prompt.endswith(prompt[needle.start : prompt.index(needle.answer)][-12:])


def test_languages_keys_and_phrasings_take_turns():
    needles = make_needles(300, 24)
    assert [needle.language for needle in needles[:4]] == ["en", "tr", "en", "tr"]
    assert sum(needle.answer.isdigit() for needle in needles) == 12
    questions = {needle.prompt[needle.question :][-10:] for needle in needles if needle.language == "en"}
    assert len(questions) >= 3
    assert len({needle.answer for needle in needles}) > 12
    assert {needle.language for needle in make_needles(300, 4, languages=["tr"])} == {"tr"}


def test_keys_have_one_length_and_occur_nowhere_else():
    for language in LANGUAGES.values():
        parts = [language.sentences, language.subjects, language.adjectives, language.objects, language.verbs]
        parts += [language.places, language.times, language.who, sum(language.needles, ())]
        vocabulary = " ".join(" ".join(part) for part in parts).lower()
        assert not any(character.isdigit() for character in vocabulary)
        assert len(set(language.keys)) == len(language.keys)
        for key in language.keys:
            assert len(key.encode()) == KEY_BYTES and key not in vocabulary


def test_prompts_depend_on_seed_length_and_number_alone():
    assert make_needles(500, 6, seed=1) != make_needles(500, 6, seed=2)
    assert make_needles(500, 6, seed=1, depth=0.5) == make_needles(500, 8, seed=1, depth=0.5)[:6]


def test_a_long_haystack_does_not_repeat():
    (needle,) = make_needles(100_000, 1, depth=0.5)
    sentences = [sentence for sentence in needle.prompt.decode().split(". ") if len(sentence) > 20]
    assert len(sentences) > 1000 and len(set(sentences)) == len(sentences)


class Oracle:
    """A stream that finds the answer by reading: the bytes that followed the last 12 earlier in the text."""

    def __init__(self, model, batch_size):
        self.read = torch.empty(batch_size, 0, dtype=torch.long)

    def feed(self, x):
        self.read = torch.cat([self.read, x.long()], 1)

    def logits(self):
        logits = torch.zeros(len(self.read), 256)
        for row, text in enumerate(self.read):
            text = bytes(text.tolist())
            at = text.find(text[-12:])
            if at < len(text) - 12:
                logits[row, text[at + 12]] = 20.0
        return logits


def test_an_oracle_recalls_everything(fresh_model):
    report = needle_accuracy(fresh_model, [250, 5000], samples=13, batch_size=4, stream=Oracle)
    assert [cell.accuracy for cell in report.cells] == [1.0, 1.0]
    assert [cell.length for cell in report.cells] == [250, 5000]
    for cell in report.cells:
        assert cell.log2_probability == pytest.approx(-4 * math.log2(1 + 255 * math.exp(-20)), abs=1e-6)
        assert cell.languages == {"en": 1.0, "tr": 1.0} and cell.samples == 13
    assert report.passed


def test_a_uniform_model_recalls_nothing(fresh_model):
    read = []
    report = needle_accuracy(fresh_model, [200, 300], samples=5, batch_size=2, progress=read.append)
    for cell in report.cells:
        assert cell.accuracy == 0 and cell.log2_probability == pytest.approx(-8 * KEY_BYTES, abs=1e-4)
    assert not report.passed and sum(read) == 5 * 500


def test_probability_equals_the_full_forward(random_model):
    needles = make_needles(260, 3, seed=9)
    expected = []
    for needle in needles:
        x = torch.tensor([list(needle.prompt + needle.answer)])
        with torch.no_grad():
            log_p = random_model(x).double().log_softmax(-1)[0, -KEY_BYTES:]
        expected.append(float(log_p.gather(1, x[0, -KEY_BYTES:, None]).sum()) / math.log(2))
    (cell,) = needle_accuracy(random_model, [260], samples=3, seed=9, batch_size=2).cells
    assert cell.log2_probability == pytest.approx(sum(expected) / 3, abs=1e-3)


def test_chance_is_that_of_the_kind_of_key(fresh_model):
    (cell,) = needle_accuracy(fresh_model, [200], samples=2, languages=["en"]).cells
    keys = len(LANGUAGES["en"].keys)
    assert cell.chance == pytest.approx(-(math.log2(10_000) + math.log2(keys)) / 2)
    # What docs/diagnostics.md says of guessing: far below the threshold.
    worst = max((1e-4 + 1 / len(language.keys)) / 2 for language in LANGUAGES.values())
    assert worst < 0.02 < PASS_ACCURACY


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"lengths": [20]}, "length=20"),
        ({"lengths": []}, "lengths=\\[\\]"),
        ({"lengths": [0]}, "length=0"),
        ({"samples": 0}, "samples=0"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"languages": ["de"]}, "languages="),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_arguments_are_named(fresh_model, arguments, named):
    with pytest.raises(ValueError, match=named) as error:
        needle_accuracy(fresh_model, **({"lengths": [200], "samples": 1} | arguments))
    assert "accepted" in str(error.value)


def test_the_shortest_accepted_length_works(fresh_model):
    with pytest.raises(ValueError, match="accepted is at least") as error:
        make_needles(10, 1, languages=["tr"])
    shortest = int(str(error.value).split("at least ")[1].split()[0])
    needles = make_needles(shortest, 60, languages=["tr"])
    assert {len(needle.prompt) for needle in needles} == {shortest}
    assert min(needle.question - needle.prompt.index(needle.answer) for needle in needles) >= KEY_BYTES
