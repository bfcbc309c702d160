import copy
import struct
import sys
import warnings

import numpy as np
import pytest

from model.evaluation import plots
from model.evaluation.associative import pair_accuracy
from model.evaluation.plots import plot_recall
from model.evaluation.recall import needle_accuracy
from tests.evaluation.oracles import Oracle, PairOracle, forgetful


@pytest.fixture(scope="module")
def results(fresh_model):
    short = forgetful(Oracle, 500)
    needle = needle_accuracy(fresh_model, [400, 2048], 8, depths=[0.0, 0.5, 1.0], stream=short).to_dict()
    for cell in needle["cells"]:  # so that the panels differ
        for each in cell["depths"]:
            each["without_memory"] = each["accuracy"] / 4
    needle["cells"][0]["depths"][1]["accuracy"] = None
    pairs = pair_accuracy(fresh_model, [4, 64], 2, ablation=False, stream=forgetful(PairOracle, 100)).to_dict()
    return {"needle": needle, "pairs": pairs}


@pytest.fixture
def figure(monkeypatch):
    """The axes that a call draws, instead of a file."""
    drawn = []
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: drawn.append(figure))

    def draw(results):
        plot_recall(results, "unused.png")
        return drawn.pop().axes

    return draw


@pytest.mark.parametrize(
    "keep, panels",
    [(("needle", "pairs"), 3), (("needle",), 2), (("pairs",), 1), ((), 1)],
)
def test_a_whole_png_of_its_size(tmp_path, results, keep, panels):
    shown = {name: results[name] if name in keep else None for name in results}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = plot_recall(shown, tmp_path / "new" / "recall.png")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    assert struct.unpack(">II", data[16:24]) == (660 * panels, 540)
    assert [file.name for file in path.parent.iterdir()] == ["recall.png"]


def test_equal_results_are_equal_files(tmp_path, results):
    first, again = (plot_recall(results, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    results = copy.deepcopy(results)
    results["needle"]["cells"][1]["depths"][1]["accuracy"] = 0.37
    assert first == again != plot_recall(results, tmp_path / "c.png").read_bytes()


def test_heat_maps_show_the_values_by_depth_and_length(results, figure):
    with_memory, without, _ = figure(results)
    cells = results["needle"]["cells"]
    for axes, name in ((with_memory, "accuracy"), (without, "without_memory")):
        values = axes.images[0].get_array()
        assert values.shape == (3, 2) and axes.images[0].get_clim() == (0, 1)
        written = {text.get_position(): text.get_text() for text in axes.texts}
        assert len(written) == 6
        for j, cell in enumerate(cells):
            for i, each in enumerate(cell["depths"]):
                if each[name] is None:
                    assert np.ma.getmaskarray(values)[i, j] and written[j, i] == "–"
                else:
                    assert values[i, j] == each[name] and written[j, i] == f"{100 * each[name]:.0f}"
        assert [label.get_text() for label in axes.get_xticklabels()] == ["400", "2 KiB"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "0.5", "1"]
        # The first depth is on top.
        assert axes.get_ylim()[0] > axes.get_ylim()[1]
    # The oracle remembers 500 bytes: all of the short prompts, and the end of the long ones.
    assert [text.get_text() for text in with_memory.texts] == ["100", "0", "–", "0", "100", "100"]


def test_written_numbers_stand_out_from_their_cell():
    axes = plots.new_figure(4, 4).add_subplot()
    shares = [[0.0, 0.3, 0.59, 0.61, 0.9, 1.0, None]]
    plots.heat_map(axes, shares, ["a"], list("bcdefgh"))
    image = axes.images[0]
    for text, share in zip(axes.texts, shares[0]):
        r, g, b, _ = (0.9, 0.9, 0.9, 1.0) if share is None else image.cmap(image.norm(share))
        light = 0.2126 * r + 0.7152 * g + 0.0722 * b
        assert abs({"white": 1.0, "black": 0.0}[text.get_color()] - light) > 0.35


def test_pairs_are_drawn_by_number(results, figure):
    *_, axes = figure(results)
    cells = results["pairs"]["cells"]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["with the memory", "a value at random"]  # it was not ablated
    for label, name in (("with the memory", "accuracy"), ("a value at random", "chance")):
        assert lines[label].get_xdata().tolist() == [4, 64]
        assert lines[label].get_ydata() == pytest.approx([100 * cell[name] for cell in cells])
    assert axes.get_xscale() == "log"


def test_no_ablation_no_panel(results, figure, fresh_model):
    needle = needle_accuracy(fresh_model, [300], 1, depths=[0.5], ablation=False, stream=Oracle).to_dict()
    assert len(figure({"needle": needle})) == 1


def test_no_global_backend_is_needed(tmp_path, monkeypatch, results):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would be an error
    plot_recall({"needle": results["needle"]}, tmp_path / "recall.png")


def test_a_failed_write_leaves_the_old_file(tmp_path, results):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError):
        plot_recall({}, tmp_path / "folder.png")
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]
