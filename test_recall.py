"""Needle in a haystack: can a checkpoint recall a key that it read thousands of bytes ago, and does its memory do it?

    python test_recall.py best_model_curriculum.safetensors
    python test_recall.py best_model_curriculum.safetensors --lengths 1024,4096 --samples 20 --json recall.json
    python test_recall.py best_model_curriculum.safetensors --tasks pairs --pairs 8,64 --plot recall.png

Two tasks: needles by length of the prompt and depth, and values by their keys, by number of pairs. Prompts are read
through the streaming state, so memory does not grow with length, and once more with the fast weights' output zeroed:
"without memory". Tables and verdict go to stdout; a pass means at least 90% of the needles in trained phrasings exactly
right at every length (docs/diagnostics.md). Exit codes: 0 pass (or needles not asked for), 1 fail, 2 bad arguments or a
missing or damaged file, 130 stopped by Ctrl-C.
"""

import argparse
import sys
import time
from pathlib import Path

from model.cli import Parser, guarded, positive

TASKS = ("needle", "pairs")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    return guarded("test_recall.py", lambda: run(options))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="test_recall.py", description=__doc__)
    parser.add_argument("checkpoint", help="a file, or the bare name of one in checkpoints/")
    add = parser.add_argument_group("prompts", "several values are separated by commas").add_argument
    add("--tasks", type=several(task), default=TASKS, metavar="A,B", help="needle, pairs (both)")
    add(
        "--lengths", type=several(positive), metavar="N,N",
        help="bytes of a needle's prompt (1024,4096,16384,65536,262144)",
    )  # fmt: skip
    add(
        "--depths", type=several(share), metavar="X,X",
        help="places of the needle, 0 first, 1 last (0,0.25,0.5,0.75,1)",
    )  # fmt: skip
    add("--pairs", type=several(positive), metavar="N,N", help="pairs in a list (8,16,32,64,128,256)")
    add("--samples", type=positive, default=10, help="prompts a length and depth, and lists a number of pairs (10)")
    add("--language", choices=("en", "tr", "both"), default="both", help="of the needles (both)")
    add("--seed", type=int, default=0, help="of all random choices (0)")
    add = parser.add_argument_group("running").add_argument
    add("--no-ablation", action="store_true", help="do not read everything again without the memory: half the time")
    add("--batch-size", type=positive, default=16, help="prompts read side by side (16)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add("--json", metavar="FILE", help="write the numbers there too")
    add("--plot", metavar="FILE", help="draw length by depth and accuracy by pairs there, as a PNG")
    return parser.parse_args(argv)


def several(kind):
    """An argparse type: values of that kind, separated by commas."""
    return lambda text: tuple(kind(part.strip()) for part in text.split(","))


def task(text: str) -> str:
    if text not in TASKS:
        raise argparse.ArgumentTypeError(f"{text!r}: accepted are {', '.join(TASKS)}")
    return text


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: accepted is a number from 0 to 1")
    return value


def run(options: argparse.Namespace) -> int:
    # Only now: importing PyTorch takes seconds, which --help and a mistyped option need not.
    from tqdm import tqdm

    from model.data.haystack import LANGUAGES
    from model.evaluation.answers import peak_memory
    from model.evaluation.associative import PAIR_BYTES, PAIRS, check_pairs, pair_accuracy
    from model.evaluation.needles import DEPTHS, LENGTHS, check_needles
    from model.evaluation.recall import needle_accuracy
    from model.evaluation.report import pick_device
    from model.training.checkpoint import find_checkpoint, load_checkpoint

    started = time.perf_counter()
    device = pick_device(options.device)
    lengths, depths, counts = options.lengths or LENGTHS, options.depths or DEPTHS, options.pairs or PAIRS
    languages = tuple(LANGUAGES) if options.language == "both" else (options.language,)
    # What cannot be asked or written is said before anything is loaded.
    check_needles(lengths, options.samples, depths, languages)
    check_pairs(counts)
    for name, file in (("--json", options.json), ("--plot", options.plot)):
        if file is not None and Path(file).is_dir():
            raise ValueError(f"{name} {file}: it is a folder; accepted is a file")
    path = find_checkpoint(options.checkpoint)
    model = load_checkpoint(path, device)

    shared = {
        "samples": options.samples,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "ablation": not options.no_ablation,
    }
    total = sum(lengths) * len(depths) if "needle" in options.tasks else 0
    total += sum(counts) * PAIR_BYTES if "pairs" in options.tasks else 0
    total *= options.samples * (1 + shared["ablation"])
    needles = pairs = None
    with tqdm(total=total, desc="recall", unit="B", unit_scale=True) as bar:
        if "needle" in options.tasks:
            needles = needle_accuracy(model, lengths, depths=depths, languages=languages, progress=bar.update, **shared)
        if "pairs" in options.tasks:
            pairs = pair_accuracy(model, counts, progress=bar.update, **shared)
    seconds, peak = time.perf_counter() - started, peak_memory(device)

    for report in (needles, pairs):
        if report:
            print(report.describe() + "\n")
    print(f"{seconds:.1f} s on {device}" + (f", peak memory {peak / 2**20:.0f} MiB" if peak else ""))
    print(needles.verdict() if needles else "no verdict: needles were not asked for")
    asked = {"tasks": options.tasks, "lengths": lengths, "depths": depths, "pairs": counts, "languages": languages}
    results = {
        "checkpoint": str(path),
        "device": str(device),
        "settings": asked | shared,
        "passed": needles.passed if needles else None,
        "needle": needles.to_dict() if needles else None,
        "pairs": pairs.to_dict() if pairs else None,
        "seconds": seconds,
        "peak_bytes": peak,
    }
    write(options, results)
    return 1 if needles and not needles.passed else 0


def write(options: argparse.Namespace, results: dict) -> None:
    from model.evaluation.plots import plot_recall
    from model.evaluation.report import json_text
    from model.files import write_atomically

    if options.json:
        write_atomically(options.json, json_text(results).encode())
    if options.plot:
        plot_recall(results, options.plot)


if __name__ == "__main__":
    sys.exit(main())
