"""What the thinking loop of a checkpoint really does, step by step: size, direction, halting, and bits saved.

    python inspect_reasoning.py
    python inspect_reasoning.py last_model_curriculum.safetensors --text story.txt --steps 8 --json reasoning.json

Without a checkpoint, checkpoints/best_model_curriculum.safetensors is taken; without --text, a short text in several
languages. The table and the verdict (dormant, active or unstable: docs/diagnostics.md) go to stdout. Exit codes:
0 measured, 2 bad arguments or a missing or damaged file, 130 stopped by Ctrl-C.
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
    parser.add_argument("--max-bytes", type=positive, default=65536, help="bytes of the text, evenly spaced (65536)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> int:
    # Only now: importing PyTorch takes seconds, which --help and a mistyped option need not.
    from model.evaluation.reasoning import DEFAULT_TEXT, measure_reasoning
    from model.evaluation.report import json_text, pick_device
    from model.files import write_atomically
    from model.training.checkpoint import find_checkpoint, load_checkpoint

    device = pick_device(options.device)
    path = find_checkpoint(options.checkpoint)
    text = read(options.text) if options.text else DEFAULT_TEXT
    model = load_checkpoint(path, device)
    report = measure_reasoning(model, text, steps=options.steps, max_bytes=options.max_bytes)
    print(report.table())
    print(f"{report.bytes} bytes; {report.context}")
    print(f"{report.verdict}: {report.reason}")
    if options.json:
        write_atomically(options.json, json_text({"checkpoint": str(path), **report.to_dict()}).encode())
    return 0


def read(name: str) -> bytes:
    text = Path(name).read_bytes()
    if not text:
        raise ValueError(f"--text {name}: it is empty; at least one byte is needed")
    return text


if __name__ == "__main__":
    sys.exit(main())
