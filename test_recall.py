"""Needle in a haystack: can a checkpoint recall a key that it read thousands of bytes ago?

    python test_recall.py best_model_curriculum.safetensors
    python test_recall.py best_model_curriculum.safetensors --lengths 200,1000,4000 --samples 20 --json recall.json

Prompts are read through the streaming state, so memory does not grow with length. The table and the verdict go to
stdout; a pass means at least half of the keys exactly right at every length (docs/diagnostics.md). Exit codes: 0 pass,
1 fail, 2 bad arguments or a missing or damaged file, 130 stopped by Ctrl-C.
"""

import argparse
import sys

from model.cli import Parser, guarded, positive


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    return guarded("test_recall.py", lambda: run(options))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="test_recall.py", description=__doc__)
    parser.add_argument("checkpoint", help="a file, or the bare name of one in checkpoints/")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--lengths", type=lengths, default=[200, 1000, 4000, 16000], metavar="N,N", help="bytes (200,1000,4000,16000)"
    )
    prompts.add_argument("--samples", type=positive, default=20, help="prompts a length (20)")
    prompts.add_argument("--depth", type=share, help="place of the needle, 0 first, 1 last (spread evenly)")
    prompts.add_argument("--language", choices=("en", "tr", "both"), default="both")
    prompts.add_argument("--seed", type=int, default=0)
    running = parser.add_argument_group("running")
    running.add_argument("--batch-size", type=positive, default=16, help="prompts read side by side (16)")
    running.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    running.add_argument("--json", metavar="FILE", help="write the numbers there too")
    return parser.parse_args(argv)


def lengths(text: str) -> list[int]:
    return [positive(part.strip()) for part in text.split(",")]


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
    from model.evaluation.recall import PASS_ACCURACY, make_needles, needle_accuracy
    from model.evaluation.report import json_text, pick_device
    from model.files import write_atomically
    from model.training.checkpoint import find_checkpoint, load_checkpoint

    device = pick_device(options.device)
    languages = tuple(LANGUAGES) if options.language == "both" else (options.language,)
    make_needles(min(options.lengths), 1, languages=languages)  # too short is said before anything is loaded
    path = find_checkpoint(options.checkpoint)
    model = load_checkpoint(path, device)
    total = sum(options.lengths) * options.samples
    with tqdm(total=total, desc="recall", unit="B", unit_scale=True, file=sys.stderr) as bar:
        report = needle_accuracy(
            model,
            options.lengths,
            options.samples,
            options.seed,
            options.depth,
            languages=languages,
            batch_size=options.batch_size,
            progress=bar.update,
        )
    print(report.table())
    worst = min(cell.accuracy for cell in report.cells)
    verdict = "PASS" if report.passed else "FAIL"
    print(f"{verdict}: at least {100 * worst:.0f}% exact at every length; a pass needs {100 * PASS_ACCURACY:.0f}%")
    if options.json:
        settings = {"checkpoint": str(path), "seed": options.seed, "depth": options.depth}
        write_atomically(options.json, json_text(settings | report.to_dict()).encode())
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
