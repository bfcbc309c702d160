"""What the thinking loop and the memory of a checkpoint really do: step by step, byte by byte, layer by layer.

    python inspect_reasoning.py
    python inspect_reasoning.py last_model_curriculum.safetensors --text story.txt --json inside.json --plot inside.png
    python inspect_reasoning.py --steps 8 --top 20 --max-bytes 16384 --device cpu

Without a checkpoint, checkpoints/best_model_curriculum.safetensors is taken; without --text, a short text in several
languages. Tables go to stdout, and under them a verdict a line, on the loop and on each memory
(docs/diagnostics.md). Exit codes: 0 measured, 2 bad arguments or a missing or damaged file, 130 stopped by Ctrl-C.
"""

import argparse
import sys
from pathlib import Path

from model.cli import Parser, guarded, positive

DEFAULT_CHECKPOINT = "best_model_curriculum.safetensors"


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    return guarded("inspect_reasoning.py", lambda: run(options))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="inspect_reasoning.py", description=__doc__)
    parser.add_argument(
        "checkpoint", nargs="?", default=DEFAULT_CHECKPOINT, help="a file, or the bare name of one in checkpoints/"
    )
    parser.add_argument("--text", metavar="FILE", help="the text to think about (a short one of this project)")
    parser.add_argument("--steps", type=positive, help="thinking steps to look at (twice the configured number)")
    parser.add_argument(
        "--max-bytes",
        type=positive,
        default=65536,
        help="bytes of the text: evenly spaced for the loop, the first ones for the layers (65536)",
    )
    parser.add_argument("--top", type=positive, default=10, help="bytes to show that gain or lose most (10)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--plot", metavar="FILE", help="draw a page of plots there (PNG)")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> int:
    # Only now: importing PyTorch takes seconds, which --help and a mistyped option need not.
    from model.evaluation.inspection import inspect_layers
    from model.evaluation.reasoning import DEFAULT_TEXT, measure_reasoning
    from model.evaluation.report import json_text, pick_device
    from model.files import write_atomically
    from model.training.checkpoint import find_checkpoint, load_checkpoint

    device = pick_device(options.device)
    path = find_checkpoint(options.checkpoint)
    text = read(options.text) if options.text else DEFAULT_TEXT
    model = load_checkpoint(path, device)
    reasoning = measure_reasoning(model, text, steps=options.steps, max_bytes=options.max_bytes, top=options.top)
    layers = inspect_layers(model, text, importance=find_importance(path), max_bytes=options.max_bytes)
    show(reasoning, layers)
    results = {"checkpoint": str(path), **reasoning.to_dict(), "inspection": layers.to_dict()}
    if options.json:
        write_atomically(options.json, json_text(results).encode())
    if options.plot:
        from model.evaluation.inspection_plots import plot_inspection

        plot_inspection(results, options.plot)
    return 0


def show(reasoning, layers) -> None:
    """All tables, then the verdicts."""
    tables = [
        ("Thinking, step by step", f"{reasoning.bytes} bytes; {reasoning.context}", reasoning.table()),
        ("", "", reasoning.halting_table()),
        ("", "", reasoning.gate_table()),
        ("The loop in the long run", "from the same latents; medians over positions", reasoning.dynamics.table()),
        ("What thinking is worth", "bits before minus bits after", reasoning.gains.table()),
        ("", "", reasoning.gains.extremes_table()),
        ("Layers and memories", f"the first {layers.bytes} bytes as one stream", layers.layers_table()),
        ("", "", layers.heads_table()),
        ("", "", layers.points_table()),
        ("", "", layers.nodes_table()),
        ("", "", layers.blocks_table()),
    ]
    for title, rule, table in tables:
        if title:
            print(f"── {title}: {rule}")
        if table:
            print(f"{table}\n")
    print("── Verdicts")
    print(f"thinking: {reasoning.verdict}: {reasoning.reason}")
    print(f"in the long run: {reasoning.dynamics.kind}: {reasoning.dynamics.reason}")
    for name, (verdict, reason) in layers.verdicts().items():
        print(f"{name}: {verdict}: {reason}")


def find_importance(path: Path):
    """GENESIS's importance [blocks, d_model] of a run's last checkpoint; None where there is none."""
    from model.training.checkpoint import load_training_state

    if path.suffix in (".pth", ".pt"):
        return None
    return load_training_state(path)[0].get("genesis.importance")


def read(name: str) -> bytes:
    text = Path(name).read_bytes()
    if not text:
        raise ValueError(f"--text {name}: it is empty; at least one byte is needed")
    return text


if __name__ == "__main__":
    # The text may have characters that the terminal's encoding lacks.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
