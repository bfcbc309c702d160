import struct
import warnings

import numpy as np
import pytest

from model.evaluation.plots import plot_curriculum, smooth

METRICS = {
    "stages": [
        {"name": "words", "plasticity": 0.1, "start": 0, "end": 15},
        {"name": "cost $x_1$ and a very long name", "plasticity": 0.5, "start": 15, "end": 40},
        {"name": "_続き", "plasticity": 0.99, "start": 40, "end": 100},
    ],
    "train": [{"step": step, "bpc": 8 - step / 20 if step != 7 else float("nan")} for step in range(100)],
    "evaluations": [
        {"step": 15, "bpc": {"words": 5.0, "_続き": None}},
        {"step": 100, "bpc": {"words": 4.0, "_続き": 3.0, "cost $x_1$ and a very long name": 3.5}},
    ],
}


@pytest.mark.parametrize(
    "metrics",
    [
        METRICS,
        {},
        {"stages": METRICS["stages"], "train": [], "evaluations": []},
        {"train": [{"step": 0, "bpc": 8.0}]},
        {"evaluations": [{"step": 3, "bpc": {"a": None}}]},
    ],
)
def test_a_whole_png_without_warnings(tmp_path, metrics):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = plot_curriculum(metrics, tmp_path / "new" / "curriculum.png")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1200 and height == 660
    assert [file.name for file in path.parent.iterdir()] == ["curriculum.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError):
        plot_curriculum({}, tmp_path / "folder.png")
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]


def test_smoothing_is_a_trailing_mean():
    values = np.random.default_rng(0).normal(size=173)
    expected = [values[max(0, i - 2) : i + 1].mean() for i in range(173)]
    np.testing.assert_allclose(smooth(values), expected)
    np.testing.assert_allclose(smooth(values[:49]), values[:49])
