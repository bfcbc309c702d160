import itertools
import re

import pytest

from model.data.haystack import KEY_BYTES, LANGUAGES
from model.evaluation.needles import DEPTHS, make_needles

HELD_OUT = {name: [question for _, question in language.held_out] for name, language in LANGUAGES.items()}


@pytest.mark.parametrize("length", [200, 1003, 4000])
@pytest.mark.parametrize("depths", [DEPTHS, (0.37,)])
def test_prompts_have_the_stated_shape(length, depths):
    samples = 16
    needles = list(make_needles(length, samples, seed=3, depths=depths))
    assert [needle.depth for needle in needles] == [depth for depth in depths for _ in range(samples)]
    for needle in needles:
        prompt, language = needle.prompt, LANGUAGES[needle.language]
        assert len(prompt) == length and len(needle.answer) == KEY_BYTES
        prompt.decode()  # whole characters only
        assert prompt.count(needle.answer) == 1
        assert needle.key == prompt.index(needle.answer) and needle.distance == length - needle.key
        assert needle.start < needle.key < needle.question
        # Needle and question are one phrasing of the language, for one person.
        phrasings = language.held_out if needle.held_out else language.needles
        said = {
            (statement.format(who=who, key=needle.answer.decode()).encode(), question.format(who=who).encode())
            for statement, question in phrasings
            for who in language.who
        }
        found = [(a, b) for a, b in said if prompt[needle.start :].startswith(a + b" ") and prompt.endswith(b)]
        assert len(found) == 1
        (statement, question), *_ = found
        assert prompt[needle.question :] == question
        room = length - len(statement) - 1 - len(question)
        assert needle.start == round(needle.depth * room)
        # What is around it is the haystack, which ends before the question.
        assert prompt[needle.question - 1 : needle.question] == b" "


def test_languages_keys_and_phrasings_take_turns():
    needles = list(make_needles(400, 64, depths=(0.5,)))
    assert [needle.language for needle in needles[:4]] == ["en", "tr", "en", "tr"]
    for name, language in LANGUAGES.items():
        own = [needle for needle in needles if needle.language == name]
        count = len(language.needles) + len(language.held_out)
        # Every phrasing comes equally often, with digits as often as with words.
        seen = {}
        for needle in own:
            texts = [*language.needles, *language.held_out]
            questions = [
                i for i, (_, text) in enumerate(texts)
                if any(needle.prompt.endswith(text.format(who=who).encode()) for who in language.who)
            ]  # fmt: skip
            seen.setdefault(questions[-1], []).append(needle.answer.isdigit())
        assert len(seen) == count == 8
        assert all(sorted(kinds) == [False] * 2 + [True] * 2 for kinds in seen.values())
        assert sum(needle.held_out for needle in own) == len(own) * len(language.held_out) // count
        assert not own[0].held_out and len({needle.answer for needle in own}) > 12
    assert {needle.language for needle in make_needles(300, 4, languages=["tr"])} == {"tr"}


def test_no_phrasing_falls_together_with_a_depth():
    needles = list(make_needles(400, 10))
    for depth, group in itertools.groupby(needles, lambda needle: needle.depth):
        group = list(group)
        assert 1 <= sum(needle.held_out for needle in group) <= 4, depth
        assert 3 <= sum(needle.answer.isdigit() for needle in group) <= 7, depth
        assert sum(needle.language == "en" for needle in group) == 5


def test_held_out_phrasings_are_taught_nowhere():
    for language in LANGUAGES.values():
        for text in itertools.chain(*language.held_out):
            for learned in itertools.chain(*language.needles, *language.taught):
                # Whatever stands for {who}, {key} and {thing}.
                pattern = re.sub(r"\\\{\w+\\\}", ".+", re.escape(learned))
                assert not re.fullmatch(pattern, text), (text, learned)


def texts(sentences):
    """The parts of sentences by name."""
    return {name: value for name, value in vars(sentences).items() if isinstance(value, tuple)}


FUNCTION_WORDS = {"the", "a", "in", "on", "at", "by", "after", "before", "during", "bir", "sonra", "boyunca"}


def test_asides_are_not_the_haystack_that_is_tested():
    for language in LANGUAGES.values():
        for part, words in texts(language.haystack).items():
            others = texts(language.asides)[part]
            assert not set(words) & set(others), part
            common = {word for text in words for word in text.split()} & {
                word for text in others for word in text.split()
            }
            assert part == "templates" or common <= FUNCTION_WORDS, part
            if part in ("subjects", "adjectives", "objects", "verbs"):
                # Not in another form either: a Turkish object's case, an English plural.
                assert not any(a[:4] == b[:4] for a in words for b in others if len(a) > 4), part


def test_keys_have_one_length_and_occur_nowhere_else():
    for language in LANGUAGES.values():
        parts = [words for sentences in (language.haystack, language.asides) for words in texts(sentences).values()]
        parts += [language.who, language.things]
        parts += [sum(pairs, ()) for pairs in (language.needles, language.taught, language.held_out)]
        vocabulary = " ".join(" ".join(part) for part in parts).lower()
        assert not any(character.isdigit() for character in vocabulary)
        assert len(set(language.keys)) == len(language.keys)
        for key in language.keys:
            assert len(key.encode()) == KEY_BYTES and key not in vocabulary


def test_prompts_depend_on_seed_length_depth_and_number_alone():
    one = list(make_needles(500, 6, seed=1))
    assert one == list(make_needles(500, 6, seed=1))
    assert not set(one) & set(make_needles(500, 6, seed=2))
    assert one[:6] == list(make_needles(500, 8, seed=1))[:6]
    # The number goes on from depth to depth: no two depths have the same text.
    assert len({needle.prompt[needle.start :] for needle in one}) == len(one)


def test_a_long_haystack_does_not_repeat():
    (needle,) = make_needles(100_000, 1, depths=[0.5])
    sentences = [sentence for sentence in needle.prompt.decode().split(". ") if len(sentence) > 20]
    assert len(sentences) > 1000 and len(set(sentences)) == len(sentences)


def test_prompts_are_made_one_at_a_time():
    needles = make_needles(1000, 10**9)
    assert len(next(needles).prompt) == 1000


@pytest.mark.parametrize("language", ["en", "tr"])
def test_the_shortest_accepted_length_works(language):
    with pytest.raises(ValueError, match="accepted is at least") as error:
        make_needles(10, 1, languages=[language])
    shortest = int(str(error.value).split("at least ")[1].split()[0])
    needles = list(make_needles(shortest, 100, languages=[language]))
    assert {len(needle.prompt) for needle in needles} == {shortest}
    assert min(needle.question - needle.key for needle in needles) >= KEY_BYTES
