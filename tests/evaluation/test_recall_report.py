import math

import pytest
import torch

from model.data.haystack import KEY_BYTES, LANGUAGES
from model.evaluation.ablation import attention_reach, without_memory
from model.evaluation.answers import CARRIES, NOTHING, PIECE, Contribution
from model.evaluation.needles import DEPTHS, make_needles
from model.evaluation.recall import PASS_ACCURACY, needle_accuracy
from model.inference.stream import ByteStream
from tests.evaluation.oracles import CERTAIN, Oracle, forgetful, remembering


def share(values):
    values = list(values)
    return pytest.approx(sum(values) / len(values)) if values else None


def recalled(needle, window):
    """Whether the last `window` bytes still hold the whole key when its last byte has to be written."""
    return len(needle.prompt) + KEY_BYTES - 1 - needle.prompt.index(needle.answer) <= window


def test_an_oracle_recalls_everything(fresh_model):
    report = needle_accuracy(fresh_model, [250, 5000], samples=4, batch_size=3, stream=Oracle)
    assert [cell.length for cell in report.cells] == [250, 5000]
    for cell in report.cells:
        assert cell.accuracy == cell.trained == cell.held_out == cell.without_memory == 1.0
        assert cell.languages == {"en": 1.0, "tr": 1.0} and cell.samples == 20
        expected = -KEY_BYTES * math.log2(1 + 255 * math.exp(-CERTAIN))
        assert cell.log2_probability == pytest.approx(expected, abs=1e-6) == cell.log2_without_memory
        assert [each.depth for each in cell.depths] == list(DEPTHS)
        assert all(each.accuracy == each.without_memory == 1.0 for each in cell.depths)
    assert report.passed and report.verdict().startswith("PASS")


@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_forgetful_oracle_shows_its_window(fresh_model, batch_size):
    window, lengths, depths = 300, [200, 400, 1200], [0.0, 0.4, 0.9]
    report = needle_accuracy(
        fresh_model, lengths, 8, 7, depths, batch_size=batch_size, ablation=False, stream=forgetful(Oracle, window)
    )
    for cell, length in zip(report.cells, lengths):
        needles = list(make_needles(length, 8, 7, depths))
        hits = [(needle, recalled(needle, window)) for needle in needles]
        assert cell.accuracy == share(hit for _, hit in hits)
        assert cell.languages == {
            name: share(hit for needle, hit in hits if needle.language == name) for name in LANGUAGES
        }
        assert cell.trained == share(hit for needle, hit in hits if not needle.held_out)
        assert cell.held_out == share(hit for needle, hit in hits if needle.held_out)
        for each, depth in zip(cell.depths, depths):
            own = [hit for needle, hit in hits if needle.depth == depth and not needle.held_out]
            assert each.accuracy == share(own) and each.samples == len(own) > 0
            assert each.depth == depth and each.without_memory is None
        assert cell.without_memory is cell.log2_without_memory is None
        reach = attention_reach(fresh_model)
        assert cell.beyond == share(length - needle.prompt.index(needle.answer) > reach for needle in needles)
    assert report.cells[0].accuracy == 1.0 and not report.passed
    assert [each.accuracy for each in report.cells[-1].depths] == [0.0, 0.0, 1.0]
    assert report.contribution is None and "without it" in report.describe()


def test_what_memory_contributes(fresh_model):
    reach = attention_reach(fresh_model)
    report = needle_accuracy(fresh_model, [150, 600], samples=8, stream=remembering(Oracle, reach))
    for cell in report.cells:
        needles = list(make_needles(cell.length, 8))
        assert cell.accuracy == 1.0 and cell.without_memory == share(recalled(each, reach) for each in needles)
        for each in cell.depths:
            own = [needle for needle in needles if needle.depth == each.depth and not needle.held_out]
            assert each.accuracy == 1.0 and each.without_memory == share(recalled(needle, reach) for needle in own)
        # A byte whose key has left the window costs 8 bits, and the others nothing.
        lost = [sum(each.distance + i > reach for i in range(KEY_BYTES)) for each in needles]
        assert cell.log2_without_memory == pytest.approx(-8 * sum(lost) / len(lost), abs=1e-4)
    assert 0 < report.cells[0].without_memory < 1
    expected = [
        needle
        for length in (150, 600)
        for needle in make_needles(length, 8)
        if length - needle.prompt.index(needle.answer) > reach and not needle.held_out
    ]
    assert report.contribution == Contribution(len(expected), 1.0, 0.0)
    assert report.contribution.verdict == "memory carries it"
    assert f"{len(expected)} answers" in report.describe() and str(reach) in report.reach_line()


def test_the_verdict_on_memory_has_its_thresholds():
    assert (CARRIES, NOTHING) == (0.5, 0.05)  # docs/diagnostics.md names them
    for accuracy, without, verdict in (
        (CARRIES, 0.0, "memory carries it"),
        (1.0, 1 - CARRIES, "memory carries it"),
        (CARRIES - 0.01, 0.0, "memory carries part of it"),
        (NOTHING, 0.0, "memory carries part of it"),
        (NOTHING - 0.01, 0.0, "memory contributes nothing"),
        (1.0, 1.0, "memory contributes nothing"),
        (0.2, 0.9, "memory contributes nothing"),
    ):
        contribution = Contribution(100, accuracy, without)
        assert contribution.verdict == verdict and contribution.line(65).startswith(verdict)
    assert Contribution(0, None, None).line(65).startswith("not measured")


def test_nothing_beyond_the_reach_is_not_measured(tiny_model):
    report = needle_accuracy(tiny_model(window=64), [250], samples=1)
    assert report.contribution == Contribution(0, None, None) and report.cells[0].beyond == 0


def blind_to(*questions):
    class Blind(Oracle):
        def next(self, text):
            return None if any(question in text for question in questions) else super().next(text)

    return Blind


def parts(phrasings):
    return [part.encode() for _, question in phrasings for part in question.split("{who}") if len(part) > 6]


def test_held_out_phrasings_do_not_decide(fresh_model):
    unknown = [part for language in LANGUAGES.values() for part in parts(language.held_out)]
    (cell,) = (report := needle_accuracy(fresh_model, [400], samples=16, stream=blind_to(*unknown))).cells
    assert (cell.trained, cell.held_out, cell.accuracy) == (1.0, 0.0, 0.75) and report.passed
    assert all(each.accuracy == 1.0 and each.samples == 12 for each in cell.depths)


def test_a_trained_phrasing_does_and_at_every_length(fresh_model):
    class Blind(Oracle):  # to one trained phrasing of 12, in long prompts
        def next(self, text):
            return None if len(text) > 500 and "Where does" in text.decode(errors="ignore") else super().next(text)

    report = needle_accuracy(fresh_model, [300], samples=16, depths=[0.5, 0.7], ablation=False, stream=Blind)
    assert report.passed
    report = needle_accuracy(fresh_model, [300, 600], samples=16, depths=[0.5, 0.7], ablation=False, stream=Blind)
    assert [cell.trained for cell in report.cells] == [1.0, pytest.approx(11 / 12)] and report.passed

    class Blinder(Blind):  # to two
        def next(self, text):
            return None if len(text) > 500 and "Which badge" in text.decode(errors="ignore") else super().next(text)

    report = needle_accuracy(fresh_model, [300, 600], samples=16, depths=[0.5, 0.7], ablation=False, stream=Blinder)
    assert [cell.trained for cell in report.cells] == [1.0, pytest.approx(10 / 12)] and not report.passed
    assert report.verdict().startswith("FAIL") and "83.3%" in report.verdict() and "600 bytes" in report.verdict()
    assert PASS_ACCURACY == 0.9  # docs/diagnostics.md names it


def test_one_wrong_byte_is_not_exact(fresh_model):
    for wrong in range(KEY_BYTES):

        class Slip(Oracle):
            def feed(self, x, wrong=wrong):
                super().feed(x)
                self.answered = self.answered + 1 if x.shape[1] == 1 else 0
                self.slips = self.answered == wrong

            def next(self, text):
                return super().next(text) ^ self.slips

        (cell,) = needle_accuracy(fresh_model, [300], 4, depths=[0.5], ablation=False, stream=Slip).cells
        assert cell.accuracy == 0
        assert cell.log2_probability == pytest.approx(-CERTAIN / math.log(2), abs=1e-3)  # one byte's


def test_languages_are_counted_apart(fresh_model):
    class English(Oracle):
        def next(self, text):
            return super().next(text) if b" the " in text else None

    (cell,) = needle_accuracy(fresh_model, [400], 4, ablation=False, stream=English).cells
    assert cell.languages == {"en": 1.0, "tr": 0.0} and cell.accuracy == 0.5


def test_a_uniform_model_recalls_nothing(fresh_model):
    read = []
    report = needle_accuracy(fresh_model, [200, 300], 2, depths=[0.0, 0.7], batch_size=3, progress=read.append)
    for cell in report.cells:
        assert cell.accuracy == cell.without_memory == 0
        assert cell.log2_probability == pytest.approx(-8 * KEY_BYTES, abs=1e-4)
    assert not report.passed and sum(read) == 2 * 2 * 2 * 500
    assert report.contribution.verdict == "memory contributes nothing"


def test_probability_equals_the_full_forward(random_model):
    needles = list(make_needles(260, 3, seed=9, depths=[0.2]))

    def expected() -> float:
        bits = 0.0
        for needle in needles:
            x = torch.tensor([list(needle.prompt + needle.answer)])
            with torch.no_grad():
                log_p = random_model(x).double().log_softmax(-1)[0, -KEY_BYTES:]
            bits += float(log_p.gather(1, x[0, -KEY_BYTES:, None]).sum()) / math.log(2)
        return bits / 3

    (cell,) = needle_accuracy(random_model, [260], 3, 9, [0.2], batch_size=2).cells
    assert cell.log2_probability == pytest.approx(expected(), abs=1e-3)
    with without_memory(random_model):
        assert cell.log2_without_memory == pytest.approx(expected(), abs=1e-3)
    assert cell.log2_probability != pytest.approx(cell.log2_without_memory, abs=1e-2)


def test_the_model_is_left_as_it_was(random_model):
    random_model.train()
    try:
        needle_accuracy(random_model, [200], samples=1, depths=[0.0])
        needle_accuracy(random_model, [200], samples=1, depths=[0.0], stream=Oracle)
        assert all(module.training and not module._forward_hooks for module in random_model.modules())
    finally:
        random_model.eval()


def test_reading_costs_the_same_memory_at_every_length(random_model):
    lengths = [400, 1200, 4800]
    report = needle_accuracy(random_model, lengths, samples=3, depths=[0.5], ablation=False)
    stream = ByteStream(random_model, 1)
    stream.feed(torch.zeros(1, 800 + KEY_BYTES, dtype=torch.uint8))
    for cell in report.cells:
        assert cell.cost.state_bytes == stream.state_bytes()
        assert cell.cost.bytes_per_second * cell.cost.seconds == pytest.approx(3 * cell.length)
        assert cell.cost.peak_bytes > 2**24  # an interpreter with PyTorch in it
    peaks = [cell.cost.peak_bytes for cell in report.cells]
    assert peaks == sorted(peaks) and peaks[-1] - peaks[0] < 2**26
    assert [line.split()[0] for line in report.costs().splitlines()] == ["bytes", *map(str, lengths)]


def test_prompts_are_fed_in_pieces(fresh_model):
    made = []

    class Watched(Oracle):
        def __init__(self, model, batch_size):
            super().__init__(model, batch_size)
            made.append(self)

    needle_accuracy(fresh_model, [3 * PIECE], samples=1, depths=[0.5], stream=Watched)
    assert [stream.largest_piece for stream in made] == [PIECE, PIECE]  # with the memory and without


def test_chance_is_that_of_the_kind_of_key(fresh_model):
    (cell,) = needle_accuracy(fresh_model, [200], samples=2, depths=[0.5], languages=["en"], ablation=False).cells
    keys = len(LANGUAGES["en"].keys)
    assert cell.chance == pytest.approx(-(math.log2(10_000) + math.log2(keys)) / 2)
    # What docs/diagnostics.md says of guessing: far below the threshold.
    worst = max((1e-4 + 1 / len(language.keys)) / 2 for language in LANGUAGES.values())
    assert worst < 0.02 < PASS_ACCURACY


def test_tables_name_lengths_depths_and_what_was_not_measured(fresh_model):
    report = needle_accuracy(fresh_model, [200, 300], 1, 0, [0.0, 0.25], ablation=False)
    first, *lines = report.table().splitlines()
    assert first.split()[:4] == ["bytes", "prompts", "exact", "%"]
    assert [line.split()[:5] for line in lines] == [[n, "2", "0.0", "-", "0.0"] for n in ("200", "300")]
    grid = [line.split() for line in report.grid().splitlines()]
    assert grid == [["depth", "\\", "bytes", "200", "300"], *([d, *(["0.0", "/", "-"] * 2)] for d in ("0", "0.25"))]


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"lengths": [20]}, "length=20"),
        ({"lengths": []}, "lengths=\\[\\]"),
        ({"lengths": [0]}, "length=0"),
        ({"lengths": [200, 300.5]}, "length=300.5"),
        ({"samples": 0}, "samples=0"),
        ({"depths": [0.5, 1.5]}, "depths=\\[0.5, 1.5\\]"),
        ({"depths": [math.nan]}, "depths=\\[nan\\]"),
        ({"depths": []}, "depths=\\[\\]"),
        ({"languages": ["de"]}, "languages="),
        ({"languages": []}, "languages="),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_arguments_are_named(fresh_model, arguments, named):
    with pytest.raises(ValueError, match=named) as error:
        needle_accuracy(fresh_model, **({"lengths": [200], "samples": 1} | arguments))
    assert "accepted" in str(error.value)
