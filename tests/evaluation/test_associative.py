import math
import random
import re

import pytest
import torch

from model.data.recall import RecallOptions, make_row
from model.evaluation.ablation import attention_reach, without_memory
from model.evaluation.answers import Contribution
from model.evaluation.associative import MAX_PAIRS, PAIR_BYTES, QUERIES, make_pairs, pair_accuracy
from model.inference.stream import ByteStream
from tests.evaluation.oracles import CERTAIN, PairOracle, forgetful, remembering


@pytest.mark.parametrize("count", [1, 8, 100, MAX_PAIRS])
def test_lists_have_the_stated_shape(count):
    for each in make_pairs(count, 2):
        assert re.fullmatch(rb"(?:[a-z]{3}=[0-9]{3};)+", each.text) and len(each.text) == count * PAIR_BYTES
        pairs = dict(pair.split(b"=") for pair in each.text[:-1].split(b";"))
        assert len(pairs) == count and len(each.queries) == min(count, QUERIES)
        assert len({question for question, _, _ in each.queries}) == len(each.queries)
        for question, answer, distance in each.queries:
            key = re.fullmatch(rb"\?([a-z]{3})=", question)[1]
            assert pairs[key] == answer
            assert (each.text + question + answer)[-distance - 3 : -distance] == answer  # the value in the list
            assert distance > 4


def test_lists_depend_on_seed_count_and_number_alone():
    assert list(make_pairs(9, 3, seed=1)) == list(make_pairs(9, 5, seed=1))[:3]
    texts = {each.text for seed in (1, 2) for each in make_pairs(9, 3, seed)}
    assert len(texts) == 6


def test_the_format_is_the_one_that_is_taught():
    """What the training task writes is read by the same rules, where its keys and values have those sizes."""
    formats = set()
    for seed in range(60):
        row = make_row(b" " * 400, "pairs", RecallOptions(1.0), 0.5, random.Random(seed)).data
        if re.search(rb"\n[a-z]{3}=[0-9]{3};", row):
            formats.add(bool(re.search(rb"\n(?:[a-z]{3}=[0-9]{3};)+ *\n(?:\?[a-z]{3}=[0-9]{3};)+", row)))
    assert formats == {True}


def test_an_oracle_recalls_everything(fresh_model):
    report = pair_accuracy(fresh_model, [3, 8, 300], samples=5, batch_size=2, stream=PairOracle)
    assert [(cell.pairs, cell.samples, cell.queries) for cell in report.cells] == [(3, 5, 15), (8, 5, 40), (300, 5, 40)]
    for cell in report.cells:
        assert cell.accuracy == cell.without_memory == 1.0
        expected = -3 * math.log2(1 + 255 * math.exp(-CERTAIN))
        assert cell.log2_probability == cell.log2_without_memory == pytest.approx(expected, abs=1e-6)
        # Picking one of n values that were read: it is the right one, or another that happens to be equal.
        assert cell.chance == pytest.approx(1 / cell.pairs + (1 - 1 / cell.pairs) / 1000)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_forgetful_oracle_shows_its_window(fresh_model, batch_size):
    window = 200
    report = pair_accuracy(fresh_model, [4, 40, 90], 6, 3, batch_size=batch_size, stream=forgetful(PairOracle, window))
    accuracies = []
    for cell in report.cells:
        hits = []
        for each in make_pairs(cell.pairs, 6, 3):
            for question, answer, _ in each.queries:
                # When the last digit is due, the window has to begin at or before the pair.
                read = len(each.text) + len(question) + len(answer) - 1
                hits.append(each.text.index(question[1:]) >= read - window)
        assert cell.accuracy == cell.without_memory == pytest.approx(sum(hits) / len(hits))
        accuracies.append(cell.accuracy)
    assert accuracies[0] == 1 > accuracies[1] > accuracies[2] > 0


def test_what_memory_contributes(fresh_model):
    reach = attention_reach(fresh_model)
    report = pair_accuracy(fresh_model, [2, 64], 4, stream=remembering(PairOracle, reach))
    beyond = {
        n: [
            len(each.text) + len(question) - each.text.index(question[1:]) - 4 > reach
            for each in make_pairs(n, 4)
            for question, _, _ in each.queries
        ]
        for n in (2, 64)
    }
    for cell in report.cells:
        assert cell.beyond == pytest.approx(sum(beyond[cell.pairs]) / len(beyond[cell.pairs]))
        assert cell.accuracy == 1.0
    assert report.cells[0].without_memory == 1.0 > report.cells[1].without_memory
    assert report.contribution == Contribution(sum(beyond[2]) + sum(beyond[64]), 1.0, 0.0)
    assert pair_accuracy(fresh_model, [2], 1, ablation=False).contribution is None


def test_queries_are_branches_of_the_stream(random_model):
    """Every answer is what the model says after the list and its own question, whatever was asked before."""
    (each,) = make_pairs(6, 1, seed=4)

    def expected() -> float:
        bits = 0.0
        for question, answer, _ in each.queries:
            x = torch.tensor([list(each.text + question + answer)])
            with torch.no_grad():
                log_p = random_model(x).double().log_softmax(-1)[0, -3:]
            bits += float(log_p.gather(1, x[0, -3:, None]).sum()) / math.log(2)
        return bits / len(each.queries)

    (cell,) = pair_accuracy(random_model, [6], 1, 4).cells
    assert cell.log2_probability == pytest.approx(expected(), abs=1e-3)
    with without_memory(random_model):
        assert cell.log2_without_memory == pytest.approx(expected(), abs=1e-3)
    assert cell.log2_probability != pytest.approx(cell.log2_without_memory, abs=1e-2)


def test_the_model_is_left_as_it_was(random_model):
    random_model.train()
    try:
        pair_accuracy(random_model, [2], samples=1, stream=PairOracle)
        assert all(module.training and not module._forward_hooks for module in random_model.modules())
    finally:
        random_model.eval()


def test_cost_and_progress(random_model):
    read = []
    report = pair_accuracy(random_model, [8, 64], 3, queries=2, batch_size=2, progress=read.append)
    assert sum(read) == 2 * 3 * 8 * (8 + 64)
    for cell in report.cells:
        asked = 3 * (cell.pairs * PAIR_BYTES + 2 * len("?abc=731"))
        assert cell.cost.bytes_per_second * cell.cost.seconds == pytest.approx(asked)
        stream = ByteStream(random_model, 1).feed(torch.zeros(1, cell.pairs * PAIR_BYTES, dtype=torch.uint8))
        assert cell.cost.state_bytes == stream.state_bytes()
    table = [line.split() for line in report.table().splitlines()]
    assert [row[:3] for row in table[1:]] == [["8", "64", "6"], ["64", "512", "6"]]


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"pairs": []}, "pairs=\\[\\]"),
        ({"pairs": [8, 0]}, "pairs=0"),
        ({"pairs": [MAX_PAIRS + 1]}, f"pairs={MAX_PAIRS + 1}"),
        ({"samples": 0}, "samples=0"),
        ({"queries": 0}, "queries=0"),
        ({"batch_size": True}, "batch_size=True"),
    ],
)
def test_bad_arguments_are_named(fresh_model, arguments, named):
    with pytest.raises(ValueError, match=named) as error:
        pair_accuracy(fresh_model, **({"pairs": [8], "samples": 1} | arguments))
    assert "accepted" in str(error.value)
