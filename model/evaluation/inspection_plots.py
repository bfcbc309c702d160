"""The page of plots of inspect_reasoning.py: the thinking loop in the upper half, the layers in the lower."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from model.evaluation.plots import heat_map, new_figure, write_figure

LISTED = 12  # memories named in a legend; more would cover the lines


def plot_inspection(results: dict[str, Any], path: str | os.PathLike) -> Path:
    """One PNG page: BPC, size and direction by thinking step, halting, gates, the long run, gains by kind of byte; by
    layer the fusion gate, by memory lengths, effective rank and norm of M along the text; and the verdicts.

    Args:
        results: the JSON of inspect_reasoning.py: `ReasoningReport.to_dict()`, and under "inspection"
            `InspectionReport.to_dict()`. Numbers that are None or not finite are left out.
        path: the file, replaced atomically.

    Raises:
        OSError: when it cannot be written.
    """
    layers, memories = results["inspection"]["layers"], results["inspection"]["memories"]
    figure = new_figure(16, 19)
    if "checkpoint" in results:
        figure.suptitle(str(results["checkpoint"]), parse_math=False)
    panels = [
        ("bits per byte, decoded after a step", _draw_bpc, results),
        ("size", _draw_sizes, results["steps"]),
        ("direction: cosine of Δz", _draw_directions, results["steps"]),
        ("p_halt: % of positions", _draw_halting, results["steps"]),
        ("channel gate g", _draw_gates, results["steps"]),
        ("the long run", _draw_dynamics, results["dynamics"]),
        ("bits saved by thinking, by kind of byte", _draw_gains, results["gains"]),
        ("fusion gate γ (1: attention alone)", _draw_fusion, layers),
        ("memory length 1/(1 − λ) by head, patches", _draw_lengths, memories),
        ("effective rank of M / full rank", _draw_ranks, memories),
        ("Frobenius norm of M", _draw_norms, memories),
    ]
    for i, (title, draw, what) in enumerate(panels):
        axes = figure.add_subplot(4, 3, i + 1, title=title)
        draw(axes, what)
    _write_verdicts(figure.add_subplot(4, 3, 12, title="verdicts"), results)
    return write_figure(figure, path)


def _draw_bpc(axes, results: dict[str, Any]) -> None:
    steps = results["steps"]
    axes.plot([step["step"] for step in steps], _column(steps, "bpc"), "o-")
    axes.axvline(results["thinking_steps"], color="0.3", linestyle=":", label="K")
    axes.set_xlabel("steps")
    axes.grid(alpha=0.25)
    axes.legend()


def _draw_sizes(axes, steps: list[dict[str, Any]]) -> None:
    _draw_columns(axes, steps, {"z_rms": "rms z", "delta_rms": "rms Δz", "relative": "|Δz| / |z|"})
    axes.set_ylim(bottom=0)


def _draw_directions(axes, steps: list[dict[str, Any]]) -> None:
    _draw_columns(axes, steps, {"cosine": "to the step before", "cosine_z": "to z"})
    axes.set_ylim(-1.05, 1.05)


def _draw_gates(axes, steps: list[dict[str, Any]]) -> None:
    _draw_columns(axes, steps, {"gate_mean": "mean", "gate_closed": "share < 0.1", "gate_open": "share ≥ 0.9"})
    seen = [step for step in steps if step["gate_quantiles"]]
    if seen:
        low, _, high = _values([step["gate_quantiles"] for step in seen]).T
        axes.fill_between([step["step"] for step in seen], low, high, alpha=0.15, linewidth=0, label="5 to 95%")
    axes.set_ylim(0, 1)
    axes.legend()


def _draw_columns(axes, steps: list[dict[str, Any]], names: dict[str, str]) -> None:
    for name, label in names.items():
        axes.plot([step["step"] for step in steps], _column(steps, name), "o-", markersize=4, label=label)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.legend()


def _draw_halting(axes, steps: list[dict[str, Any]]) -> None:
    seen = [step for step in steps if step["halt_histogram"]]
    if not seen:
        axes.text(0.5, 0.5, "no thinking step", ha="center", transform=axes.transAxes)
        return
    bins = len(seen[0]["halt_histogram"])
    labels = [f"{i / bins:.1f}" for i in range(bins)]
    heat_map(axes, [step["halt_histogram"] for step in seen], [str(step["step"]) for step in seen], labels)
    axes.set(xlabel="p_halt from", ylabel="step")


def _draw_dynamics(axes, dynamics: dict[str, Any]) -> None:
    for name, first, label in (
        ("step_size", 1, "|Δz| / |z|"),
        ("distance_two", 2, "|z − z two steps back| / |z|"),
        ("z_rms", 0, "rms z"),
    ):
        values = _values(dynamics[name])
        axes.plot(first + np.arange(len(values)), np.where(values > 0, values, np.nan), ".-", label=label)
    _make_log(axes)
    axes.set_xlabel(f"step (mostly: {dynamics['kind']})")
    axes.grid(alpha=0.25)
    axes.legend()


def _draw_gains(axes, gains: dict[str, Any]) -> None:
    groups = gains["groups"]
    values = np.nan_to_num(_column(groups, "gain"), nan=0.0)
    axes.barh(range(len(groups)), values, color=["C2" if value >= 0 else "C3" for value in values])
    axes.set_yticks(range(len(groups)), [group["name"] for group in groups])
    axes.invert_yaxis()
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_xlabel("bits per byte")


def _draw_fusion(axes, layers: list[dict[str, Any]]) -> None:
    seen = [(i, layer) for i, layer in enumerate(layers) if layer["gate_quantiles"]]
    for i, layer in seen:
        low, _, high = layer["gate_quantiles"]
        axes.plot([i, i], [low, high], color="C0", linewidth=5, alpha=0.3, solid_capstyle="butt")
    axes.plot(range(len(layers)), _column(layers, "gate_mean"), "o", color="C0", label="mean, 5 to 95%")
    axes.set_ylim(0, 1)
    _name_layers(axes, layers)
    axes.legend()


def _draw_lengths(axes, memories: list[dict[str, Any]]) -> None:
    for i, memory in enumerate(memories):
        heads = memory["heads"]
        for h, head in enumerate(heads):
            at = i + (h - (len(heads) - 1) / 2) * 0.7 / len(heads)
            low, _, high = _values(head["length_quantiles"])
            axes.plot([at, at], [low, high], color="C0", linewidth=2, alpha=0.3)
            axes.plot(at, _values([head["length"]]), "o", color="C0", markersize=3)
    _make_log(axes)
    _name_layers(axes, memories)


def _draw_ranks(axes, memories: list[dict[str, Any]]) -> None:
    for memory, line in _lines(axes, memories):
        values = _column(memory["points"], "effective_rank") / memory["full_rank"]
        axes.plot(_column(memory["points"], "bytes"), values, ".-", **line)
    axes.set_ylim(0, 1)
    _finish_lines(axes, memories)


def _draw_norms(axes, memories: list[dict[str, Any]]) -> None:
    for memory, line in _lines(axes, memories):
        values = _column(memory["points"], "norm")
        axes.plot(_column(memory["points"], "bytes"), np.where(values > 0, values, np.nan), ".-", **line)
    _make_log(axes)
    _finish_lines(axes, memories)


def _lines(axes, memories: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every memory with the label and the colour of its line, dark to bright from first to last."""
    from matplotlib import colormaps

    colours = colormaps["viridis"](np.linspace(0, 0.9, len(memories)))
    for memory, colour in zip(memories, colours):
        yield memory, {"color": colour, "label": memory["name"]}


def _finish_lines(axes, memories: list[dict[str, Any]]) -> None:
    axes.set_xlabel("bytes read")
    axes.grid(alpha=0.25)
    if len(memories) <= LISTED:
        axes.legend(fontsize=7)


def _name_layers(axes, layers: list[dict[str, Any]]) -> None:
    axes.set_xticks(range(len(layers)), [layer["name"] for layer in layers], rotation=90, fontsize=7)
    axes.grid(alpha=0.25, axis="y")


def _write_verdicts(axes, results: dict[str, Any]) -> None:
    axes.set_axis_off()
    dynamics = results["dynamics"]
    lines = [f"thinking: {results['verdict']}", f"in the long run: {dynamics['kind']}"]
    lines += [f"{memory['name']}: {memory['verdict']}" for memory in results["inspection"]["memories"]]
    shown = lines if len(lines) <= 24 else [*lines[:23], f"and {len(lines) - 23} more"]
    axes.text(0, 1, "\n".join(shown), va="top", family="monospace", fontsize=9, transform=axes.transAxes)


def _make_log(axes) -> None:
    """A logarithmic scale, where something is drawn that has one."""
    if any(np.isfinite(np.asarray(line.get_ydata(), float)).any() for line in axes.lines):
        axes.set_yscale("log")


def _column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    return _values([row[name] for row in rows])


def _values(values: list) -> np.ndarray:
    """Floats; NaN, which is not drawn, for None and what is not finite."""
    values = np.array(values, float)
    return np.where(np.isfinite(values), values, np.nan)
