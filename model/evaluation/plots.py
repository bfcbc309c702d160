"""Plots of training runs and of recall, drawn without a display and written whole."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from model.files import write_atomically

SMOOTHING = 50  # the smoothed line averages over 1/50 of the run


def plot_curriculum(metrics: dict[str, Any], path: str | os.PathLike) -> Path:
    """BPC by step as a PNG: training (raw and smoothed), every stage's validation text, stages shaded with their α.

    Args:
        metrics: {"stages": [{"name", "plasticity", "start", "end"}], "train": [{"step", "bpc"}],
            "evaluations": [{"step", "bpc": {stage: value}}], "growth": [{"step", "what", "parameters"}],
            "boom": {"step"} or None}; steps from 0, `end` exclusive, BPC in bits per byte.
            Lists may be empty or missing, and values that are None or not finite are left out.
        path: the file, replaced atomically.

    Raises:
        OSError: when it cannot be written.
    """
    figure = new_figure(10, 5.5)
    axes = figure.add_subplot(xlabel="step", ylabel="bits per byte")
    axes.grid(alpha=0.25)
    stages = metrics.get("stages") or []
    _draw_stages(axes, stages)
    _draw_growth(axes, metrics.get("growth") or [])
    if metrics.get("boom"):
        _mark(axes, metrics["boom"]["step"], "boom", color="C3")
    lines = _draw_train(axes, metrics.get("train") or [])
    lines += _draw_evaluations(axes, metrics.get("evaluations") or [], [stage["name"] for stage in stages])
    if lines:
        legend = axes.legend(handles=lines, loc="upper right")
        for text in legend.get_texts():
            text.set_parse_math(False)
    return write_figure(figure, path)


def plot_recall(results: dict[str, Any], path: str | os.PathLike) -> Path:
    """Exact answers as a PNG: depth by length with the memory and without it, and by number of pairs.

    Args:
        results: {"needle": `RecallReport.to_dict()` or None, "pairs": `PairsReport.to_dict()` or None}, as in the JSON
            of test_recall.py. What is None or missing gets no panel.
        path: the file, replaced atomically.

    Raises:
        OSError: when it cannot be written.
    """
    panels = []
    if cells := (results.get("needle") or {}).get("cells"):
        lengths = [_size(cell["length"]) for cell in cells]
        depths = [f"{cell['depth']:g}" for cell in cells[0]["depths"]]
        for name, title in (("accuracy", "with the memory"), ("without_memory", "without the memory")):
            rows = [[cell["depths"][i][name] for cell in cells] for i in range(len(depths))]
            if any(share is not None for row in rows for share in row):
                labels = {"xlabel": "bytes of the prompt", "ylabel": "depth of the needle"}
                panels.append((f"needles, {title}: exact %", labels, heat_map, (rows, depths, lengths)))
    if cells := (results.get("pairs") or {}).get("cells"):
        labels = {"xlabel": "pairs in the list", "ylabel": "exact %"}
        panels.append(("values by their keys", labels, _draw_pairs, (cells,)))
    figure = new_figure(5.5 * max(1, len(panels)), 4.5)
    for i, (title, labels, draw, what) in enumerate(panels):
        draw(figure.add_subplot(1, len(panels), i + 1, title=title, **labels), *what)
    return write_figure(figure, path)


def heat_map(axes, shares: list[list[float | None]], rows: list[str], columns: list[str]) -> None:
    """Shares from 0 to 1 as coloured cells with the percentage written in each; None is an empty cell with a dash."""
    values = np.ma.masked_invalid(np.array(shares, float))
    axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_facecolor("0.9")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for (i, j), masked in np.ndenumerate(np.ma.getmaskarray(values)):
        text, dark = ("–", False) if masked else (f"{100 * values[i, j]:.0f}", values[i, j] < 0.6)
        axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black")


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean of each value and those before it, over at most 1/SMOOTHING of all: [n] → [n]."""
    width = max(1, len(values) // SMOOTHING)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - width, 0)
    return (sums[stop] - sums[start]) / (stop - start)


def new_figure(width: float, height: float):
    """An empty figure, in inches."""
    # The Agg canvas is taken directly: importing this module, or drawing, touches no global backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure, path: str | os.PathLike) -> Path:
    image = io.BytesIO()
    with warnings.catch_warnings():
        # A stage may be named in a script that the font lacks: boxes in a label are no reason to warn.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.canvas.print_figure(image, format="png", dpi=120)
    return write_atomically(path, image.getvalue())


def _draw_pairs(axes, cells: list[dict[str, Any]]) -> None:
    """Exact answers by number of pairs, with the memory, without it, and by chance."""
    for name, style, label in (
        ("accuracy", "o-", "with the memory"),
        ("without_memory", "s--", "without the memory"),
        ("chance", ":", "a value at random"),
    ):
        counts, shares = _finite([(cell["pairs"], cell[name]) for cell in cells])
        if len(counts):
            axes.plot(counts, 100 * shares, style, label=label)
    counts = sorted({cell["pairs"] for cell in cells})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.25)
    axes.legend()


def _size(count: int) -> str:
    """Bytes, in the largest unit that shows them exactly."""
    for unit, name in ((2**20, " MiB"), (2**10, " KiB")):
        if count % unit == 0:
            return f"{count // unit}{name}"
    return str(count)


def _draw_stages(axes, stages: list[dict[str, Any]]) -> None:
    for i, stage in enumerate(stages):
        start, end = stage["start"], stage["end"]
        axes.axvspan(start, end, color=f"C{i + 1}", alpha=0.1, linewidth=0)
        name = stage["name"] if len(stage["name"]) <= 20 else stage["name"][:19] + "…"
        axes.text(
            (start + end) / 2,
            1.01,
            f"{name}\nα {stage['plasticity']:g}",
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=9,
            parse_math=False,
        )


def _draw_growth(axes, events: list[dict[str, Any]]) -> None:
    """A mark where the model grew, with what and to how many parameters."""
    for event in events:
        _mark(axes, event["step"], f"{event['what']}: {event['parameters'] / 1e6:.3g} M")


def _mark(axes, step: int, text: str, color: str = "0.3") -> None:
    """A dotted line at a step, with its text along it."""
    axes.axvline(step, color=color, linestyle=":", linewidth=1.2)
    axes.text(
        step,
        0.02,
        f" {text}",
        transform=axes.get_xaxis_transform(),
        rotation=90,
        va="bottom",
        fontsize=8,
        color=color,
        parse_math=False,
    )


def _draw_train(axes, points: list[dict[str, Any]]) -> list:
    steps, values = _finite([(point["step"], point["bpc"]) for point in points])
    if not len(steps):
        return []
    axes.plot(steps, values, color="C0", alpha=0.25, linewidth=0.8)
    return axes.plot(steps, smooth(values), color="C0", linewidth=1.6, label="training")


def _draw_evaluations(axes, evaluations: list[dict[str, Any]], stages: list[str]) -> list:
    """One line a stage, in the colour of its span."""
    lines = []
    evaluated = {name for evaluation in evaluations for name in evaluation["bpc"]}
    names = [*stages, *sorted(evaluated - set(stages))]
    for i, name in enumerate(names):
        if name not in evaluated:
            continue
        steps, values = _finite([(each["step"], each["bpc"].get(name)) for each in evaluations])
        lines += axes.plot(steps, values, "o-", color=f"C{i + 1}", markersize=4, label=f"validation: {name}")
    return lines


def _finite(points: list[tuple[float, float | None]]) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.array([(step, np.nan if value is None else value) for step, value in points], float).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(1)]
    return pairs[:, 0], pairs[:, 1]
