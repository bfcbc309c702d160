"""BPC of a checkpoint on a curriculum or a file, one line a stage.

python -m model.evaluation checkpoints/best_model_curriculum.safetensors pydoc
python -m model.evaluation best_model_curriculum.safetensors notes.txt --split all --stream
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from model.cli import Parser, guarded
from model.evaluation.bpc import BPCResult, bits_per_byte
from model.evaluation.report import json_text, number, pick_device, text_table

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for bad arguments and unreadable input."""
    options = _parse(argv)
    return guarded("evaluation", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    results = _evaluate(options)
    if options.json:
        stages = [{"stage": name, "split": options.split, **asdict(result)} for name, result in results]
        print(json_text({"checkpoint": options.checkpoint, "source": options.source, "stages": stages}), end="")
        return 0
    rows = [[name, options.split, f"{result.bytes}", number(result.bpc, 4)] for name, result in results]
    print(text_table(["stage", "split", "bytes", "BPC"], rows))
    for rule in dict.fromkeys(result.context for _, result in results):
        print(f"context: {rule}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m model.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a file, or the bare name of one in checkpoints/")
    parser.add_argument("source", help="a curriculum's name or path, or a file of text")
    parser.add_argument("--split", choices=("val", "all"), default="val", help="the held-out text, or everything")
    parser.add_argument("--context", type=int, default=1024, help="bytes in a window (default 1024)")
    parser.add_argument("--stream", action="store_true", help="carry the state instead of cutting windows")
    parser.add_argument("--max-bytes", type=int, help="read at most so many bytes of a stage, evenly spaced")
    parser.add_argument("--batch-size", type=int, default=16, help="windows or lanes read together (default 16)")
    parser.add_argument("--amp", choices=AMP, default="off", help="autocast (default off: float32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of the table")
    return parser.parse_args(argv)


def _evaluate(options: argparse.Namespace) -> list[tuple[str, BPCResult]]:
    # The package's own name is asked for, not the trainer's module: this folder does not depend on training.
    from model import find_checkpoint, load_checkpoint

    device = pick_device(options.device)
    model = load_checkpoint(find_checkpoint(options.checkpoint), device)
    return [
        (
            name,
            bits_per_byte(
                model,
                text,
                context=options.context,
                batch_size=options.batch_size,
                stream=options.stream,
                max_bytes=options.max_bytes,
                amp_dtype=AMP[options.amp],
                progress=sys.stderr.isatty(),
            ),
        )
        for name, text in _texts(options.source, options.split)
    ]


def _texts(source: str, split: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, uint8 [n]) of every stage; with "all" a plain text file is taken as it is, without a store."""
    from model.data import load_curriculum, open_store
    from model.data.readers import file_kind

    path = Path(source)
    if split == "all" and path.is_file() and path.suffix.lower() != ".toml" and file_kind(path) == ("text", ""):
        if not path.stat().st_size:
            raise ValueError(f"file {path}: it is empty; at least one byte is needed")
        yield path.name, np.memmap(path, np.uint8, "r")
        return
    for stage in load_curriculum(source).stages:
        store = open_store(stage.source)
        yield stage.name, store.val if split == "val" else store.data


if __name__ == "__main__":
    sys.exit(main())
