"""Recall tasks: an answer can be read off what stands before it, and everything else is the text or weighs nothing."""

import os
import random
import re
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path

import pytest
import torch

from model.data.curriculum import Stage, load_curriculum
from model.data.errors import DataError
from model.data.haystack import LANGUAGES
from model.data.recall import SHORTEST, TASKS, RecallOptions, _with_asides, has_tasks, is_text, is_told, make_row, mix
from model.data.sources import SourceSpec

WORDS = "Nehir 🙂 tepelerden doğar, the river rises in the hills and reaches the sea after many miles. "
ALL = RecallOptions(1.0)
ROOT = Path(__file__).resolve().parents[2]


@cache
def text(length: int, seed: int = 0) -> bytes:
    rng, words = random.Random(seed), WORDS.split()
    made = " ".join(rng.choice(words) for _ in range(length // 3 + 1)).encode()  # each is two letters at the least
    return made[:length]


def batch(rows: int = 8, length: int = 1024) -> torch.Tensor:
    return torch.stack([torch.tensor(list(text(length, seed)), dtype=torch.uint8) for seed in range(rows)])


@cache
def rows(task: str, length: int, difficulty: float, count: int = 40, options: RecallOptions = ALL):
    return [
        make_row(text(length, seed), task, options, difficulty, random.Random(f"{task}/{seed}"))
        for seed in range(count)
    ]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [128, 129, 1000, 4096])
@pytest.mark.parametrize("difficulty", [0.0, 0.6, 1.0])
def test_rows_keep_their_length_and_their_answers_have_been_told(task, length, difficulty):
    made = rows(task, length, difficulty)
    for row in made:
        assert len(row.data) == length and row.task == task
        last = 0
        for start, stop, distance in sorted(row.answers):
            assert last <= start < stop <= length
            last = stop
            answer = row.data[start:stop]
            assert answer in row.data[: start - distance], (row.data[:start][-60:], answer)
            assert distance >= 0
        assert b"{" not in row.data and b"}" not in row.data  # nothing of a template is left
    if length >= 1000:
        assert sum(bool(row.answers) for row in made) > 20


def test_tasks_are_the_same_in_every_process():
    """A set's order follows from a secret of the process: nothing may follow from that."""
    program = "from tests.data.test_recall_tasks import checksum; print(checksum())"
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = os.environ | {"PYTHONHASHSEED": other}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == f"{checksum()}\n", done.stderr


def checksum() -> int:
    return zlib.crc32(b"".join(row.data for task in TASKS for row in rows(task, 700, 1.0, 6)))


@pytest.mark.parametrize("length", [128, 400, 1024, 8192])
def test_asides_are_whole_and_so_is_the_text_around_them(length):
    """Turkish text, most of whose words have a character of two bytes, and a text without spaces."""
    turkish, solid = ("çiğ köfte ığdır şölen öğün " * 400).encode(), ("şığöü" * 900).encode()
    made = 0
    for seed in range(150):
        for text in (turkish, solid):
            own = text[:length].decode(errors="ignore").encode()
            data, spans = _with_asides(own, ("en", "tr"), random.Random(seed))
            assert len(data) == len(own)
            data.decode()
            assert len(spans) <= 2
            for start, stop in spans:
                made += 1
                assert stop - start <= length / 3 + 24 and data[start:stop].decode().strip()[-1] == "."
                if text is turkish and stop < length - 24:
                    assert data[stop : stop + 1] == b" " and own[start : start + 1] == b" "
    assert made > 100 or length < 3 * SHORTEST


def test_the_last_value_told_is_the_answer():
    """Read by a parser of its own, for every language and phrasing: what the statement said last is what is asked."""
    seen = updated = 0
    for task in ("needle", "update"):
        for row in rows(task, 4096, 1.0, count=20):
            for start, stop, _ in row.answers:
                before = row.data[:start].decode(errors="replace")
                for language in LANGUAGES.values():
                    for statement, ends in phrasings(language):
                        asked = ends.search(before[-200:])
                        if not asked:
                            continue
                        who = asked["who"]
                        told = list(re.finditer(_pattern(statement, who), before[: -len(asked[0])]))
                        if not told:
                            continue
                        seen += 1
                        updated += len({match["key"] for match in told}) > 1
                        if stop < 4096:
                            assert told[-1]["key"].encode() == row.data[start:stop]
                        assert row.data[start:stop].decode() == told[-1]["key"][: stop - start]
    assert seen > 100 and updated > 20


def test_keys_are_of_many_kinds_and_words_of_the_text_among_them():
    made = rows("needle", 4096, 1.0)
    keys = [row.data[start:stop].decode() for row in made for start, stop, _ in row.answers]
    own = {"Nehir", "tepelerden", "doğar", "river", "rises", "hills", "reaches", "after", "many", "miles"}
    assert len(own & set(keys)) >= 8
    assert sum(key.isdigit() for key in keys) > len(keys) / 8
    assert len({key for each in LANGUAGES.values() for key in each.keys} & set(keys)) > 8


@pytest.mark.parametrize("task", ["needle", "update", "lines"])
def test_asides_stand_in_the_haystack_and_count_as_nothing_but_are_no_facts(task):
    told = {name: set() for name in LANGUAGES}
    many = rows(task, 8192, 1.0)
    for row in many:
        weights, text = torch.from_numpy(row.weights(8.0, 0.125)), row.data.decode(errors="replace")
        for name, language in LANGUAGES.items():
            for verb in language.asides.verbs:
                for match in re.finditer(rf" {verb}[ .,]", text):
                    at = len(text[: match.start()].encode())
                    if (weights[at : at + 4] == 0).all() and not is_told(weights[at : at + 4]).any():
                        told[name].add(verb)
    # The row's own text has none of these words.
    assert all(len(told[name]) == len(language.asides.verbs) for name, language in LANGUAGES.items())
    # What is told in the middle of an aside parts it.
    assert 400 < max(stop - start for row in many for start, stop in row.asides) < 8192 / 3 + 256
    english = RecallOptions(1.0, languages=("en",))
    assert not any(b"bilmiyor" in row.data for row in rows(task, 8192, 1.0, options=english))


@cache
def phrasings(language):
    """All that may be told and asked: (statement, pattern of its question at the end of a text)."""
    taught = [
        tuple(text.replace("{thing}", thing) for text in texts)
        for texts in language.taught
        for thing in language.things
    ]
    return [(told, re.compile(_pattern(asked) + "$")) for told, asked in (*language.needles, *taught)]


def _pattern(template: str, who: str | None = None) -> str:
    name = r"(?P<who>\w+)" if who is None else re.escape(who)
    parts = re.split(r"(\{who\}|\{key\})", template)
    found, named = "", False
    for part in parts:
        if part == "{who}":
            found += ("(?P=who)" if who is None else name) if named else name
            named = True
        else:
            found += r"(?P<key>\w+?)" if part == "{key}" else re.escape(part)
    return found


def test_pairs_and_lines_against_a_dictionary():
    apart = 0
    for row in rows("pairs", 2048, 1.0):
        found = list(re.finditer(r"(\??)([a-z]+)=(\w+)(;?)", row.data.decode(errors="replace")))
        told, asked = ([each for each in found if each[1] == mark] for mark in ("", "?"))
        assert found == told + asked and all(each[4] for each in found[:-1])
        known = {each[2]: each[3] for each in told}
        assert 1 <= len(known) == len(told) <= 256
        for each in asked:
            assert known[each[2]].startswith(each[3]) and (not each[4] or known[each[2]] == each[3])
        assert [start for start, _, _ in row.answers] == [
            len(row.data.decode(errors="replace")[: each.start(3)].encode()) for each in asked
        ]
        times = [sum(each[2] == key for each in asked) for key in known]
        assert max(times) <= 8 and (max(times) == min(times) or not found[-1][4])
        apart += asked[0].start() - told[-1].end() > 100
    assert 10 < apart < 35  # some are asked for at once, others after text
    again = 0
    for row in rows("lines", 4096, 1.0):
        for start, stop, _ in row.answers:
            name = re.search(r"\n(\w+)( = |: | -> |=|\? )$", row.data[:start].decode(errors="replace"))[1]
            told = re.findall(rf"\n{name}(?: = |: | -> |=)(\w+)\n", row.data[:start].decode(errors="replace"))
            assert told[-1].startswith(row.data[start:stop].decode())
            again += len(set(told)) > 1
    assert again > 20


def test_a_copy_is_the_passage_again():
    for row in rows("copy", 1024, 1.0):
        ((start, stop, _),) = row.answers
        ((_, cue),) = row.inserted
        quoted = row.data[cue:stop]
        assert quoted.startswith(row.data[cue:start]) and start - cue == 12
        assert quoted in row.data[: cue - 4]
        assert stop - start >= 8


@pytest.mark.parametrize("task", TASKS)
def test_what_is_told_and_asked_is_marked_and_weighs_nothing(task):
    """By the spans of a row, and by the bytes themselves where a pattern finds them."""
    facts = {
        "pairs": rb"\n(?:[a-z]+=\w+;)+|\n(?:\?[a-z]+=\w+;)+",
        "lines": rb"\n\w+(?: = |\? |: | -> |=)\w+\n",
        "copy": rb"\n>> ",
        "needle": rb" The secret code of \w+ is \w+\. ",
        "update": rb" The secret code of \w+ is \w+\. ",
    }
    found = 0
    for row in rows(task, 2048, 1.0):
        weights = torch.from_numpy(row.weights(8.0, 0.125))
        told, known = is_told(weights) > 0, torch.zeros(2048, dtype=torch.bool)
        for start, stop, *_ in (*row.inserted, *row.answers):
            known[start:stop] = True
        assert torch.equal(told, known) and not is_text(weights)[told].any()
        for start, stop, _ in row.answers:
            assert (weights[start:stop] > 0).all()
            known[start:stop] = False
        assert (weights[known] == 0).all() and (weights * 7)[known].sum() == 0
        for match in re.finditer(facts[task], row.data):
            found += 1
            assert told[match.start() : match.end()].all(), match[0]
        assert has_tasks(weights.unsqueeze(0)).item() == bool((is_text(weights) == 0).any())
    assert found > 10


@pytest.mark.parametrize("limit", [0.125, 2.0])
def test_weights_are_of_text_answers_and_the_rest(limit):
    options = RecallOptions(0.5, answer_weight=5.0, answer_limit=limit)
    x = batch(8)
    for index in range(10):
        mixed, weights = mix(x, options, difficulty=1.0, seed=3, index=index)
        assert mixed.shape == x.shape and mixed.dtype == torch.uint8 and weights.shape == x.shape
        assert torch.equal(mixed[:4], x[:4]) and (weights[:4] == 1).all()
        assert torch.equal(is_text(weights), (weights == 1).float())
        for row in range(4, 8):
            answers = weights[row][(weights[row] != 0) & (weights[row] != 1)]
            # All alike, and together no more than so much of the row.
            assert len(answers.unique()) <= 1
            assert answers.sum().item() == pytest.approx(min(5.0 * len(answers), 1024 * limit), rel=1e-5)
            # What is text is the row's own, in order; asides stand in its place.
            data, own, at = bytes(mixed[row].tolist()), bytes(x[row].tolist()), 0
            if weights[row].min() == 0 and b"\n>> " not in data:
                for run in re.finditer(b"1+", bytes(48 + int(weight == 1) for weight in weights[row])):
                    part = data[slice(*run.span())]
                    at = own.index(part, at) + len(part)
        assert (weights[4:] != 1).any(1).sum() >= 3


def test_tasks_follow_from_seed_step_rank_and_row_alone():
    x, options = batch(), RecallOptions(0.75)

    def made(**changes):
        return mix(x, options, **({"difficulty": 0.5, "seed": 1, "index": 2, "rank": 0} | changes))[0]

    random.seed(5)
    torch.manual_seed(6)
    first = made()
    assert torch.equal(first, made()) and not torch.equal(first, x)
    for change in ({"seed": 2}, {"index": 3}, {"rank": 1}, {"difficulty": 1.0}):
        assert not torch.equal(first, made(**change))
    more = mix(torch.cat([x, x]), RecallOptions(0.5), difficulty=0.5, seed=1, index=2)[0]
    assert torch.equal(more[:8], x)


def test_a_share_below_a_row_comes_in_some_steps():
    x = batch(4, 256)
    touched = [(mix(x, RecallOptions(0.1), difficulty=0, seed=0, index=i)[1] != 1).any().item() for i in range(300)]
    assert 0.25 < sum(touched) / 300 < 0.5  # 0.4 of the steps, less what found no room


def test_difficulty_is_the_longest_distance():
    for difficulty in (0.0, 0.5, 1.0):
        longest = SHORTEST * (8192 / SHORTEST) ** difficulty
        found = [d for row in rows("needle", 8192, difficulty) for _, _, d in row.answers]
        # What is inserted between a fact and its question makes the way a little longer.
        assert 0.3 * longest < max(found) < 1.6 * longest + 400
        assert min(found) < SHORTEST


def test_short_rows_and_no_share_are_left_as_they_are():
    for x, options in ((batch(4, 127), ALL), (batch(4), RecallOptions(0.0))):
        mixed, weights = mix(x, options, difficulty=1.0, seed=0, index=0)
        assert torch.equal(mixed, x) and (weights == 1).all()


def test_binary_text_is_fine():
    x = torch.randint(0, 256, (6, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mixed, weights = mix(x, ALL, difficulty=1.0, seed=0, index=0)
    assert mixed.shape == x.shape and (weights > 1).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": -0.1}, "share=-0.1: accepted is a number from 0 to 1"),
        ({"share": "x"}, "share='x'"),
        ({"share": True}, "share=True"),
        ({"share": 0.1, "answer_weight": 1.0}, "answer_weight=1.0: accepted is a number above 1"),
        ({"share": 0.1, "answer_limit": 0}, "answer_limit=0: accepted is a number above 0"),
        ({"share": 0.1, "tasks": ["needle", "sing"]}, "tasks=.*sing.*accepted are one or more of needle, update"),
        ({"share": 0.1, "tasks": []}, "tasks="),
        ({"share": 0.1, "languages": ["de"]}, "languages=.*accepted are one or more of en, tr"),
    ],
)
def test_bad_options(values, message):
    with pytest.raises(DataError, match=message):
        RecallOptions(**values)


def test_held_out_phrasings_are_never_learned_from():
    held_out = [pair[0].split("{key}")[0].split("{who}")[-1] for each in LANGUAGES.values() for pair in each.held_out]
    held_out = [part for part in held_out if len(part) > 8]
    assert held_out
    seen = b"".join(row.data for task in ("needle", "update") for row in rows(task, 4096, 1.0))
    for part in held_out:
        assert part.encode() not in seen


def test_a_stage_says_its_tasks(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    stage = '[[stages]]\nname = "s"\nsource = "a.txt"\nshare = 1.0\nplasticity = 1.0\n'
    file = tmp_path / "c.toml"
    file.write_text(stage + "recall = 0.25\n")
    assert load_curriculum(file).stages[0].recall == RecallOptions(0.25)
    assert "recall tasks in 25% of rows" in load_curriculum(file).describe()
    table = 'share = 0.5, tasks = ["pairs"], languages = ["tr"], answer_weight = 4, answer_limit = 2'
    file.write_text(f"{stage}recall = {{ {table} }}\n")
    assert load_curriculum(file).stages[0].recall == RecallOptions(0.5, ("pairs",), ("tr",), 4, 2)
    assert Stage("s", SourceSpec(files=("a",)), 1.0, 1.0).recall.share == 0
    for bad, message in (
        ("recall = 2", "stage s: recall share=2: accepted"),
        ("recall = { tasks = ['pairs'] }", "stage s: recall share=None"),
        ("recall = { share = 0.1, often = 1 }", "stage s: recall: unknown key 'often'"),
    ):
        file.write_text(stage + bad + "\n")
        with pytest.raises(DataError, match=message):
            load_curriculum(file)
