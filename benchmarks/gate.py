"""What the gate costs, and whether anything gets through it.

    python benchmarks/gate.py                                   # bytes/s with 0, 100 and 10,000 phrases, a new nano
    python benchmarks/gate.py --checkpoint best_model_curriculum.safetensors --device cuda --json
    python benchmarks/gate.py --fuzz 100000                     # temperature 2, 10,000 phrases: matches in the text

Phrases are drawn at random: letters of English and Turkish, 2 to 12 of them, some of two words, some of one emoji or
Chinese character. The fuzz looks for them with Python's re in the folded text, by code that shares nothing with the
gate, in the text of the gate and in one generated without rules from the same random numbers.
"""

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
import unicodedata
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.agiformer import AGIFormer
from model.cli import Parser, guarded, positive
from model.config import AGIFormerConfig
from model.evaluation.report import text_table
from model.genesis.gate.automaton import ByteAutomaton
from model.genesis.gate.policy import Policy, load_policy
from model.inference.generate import generate
from model.training.checkpoint import find_checkpoint, load_checkpoint
from model.training.distributed import join_workers

SIZES = (0, 100, 10_000)
LETTERS = "abcdefghijklmnopqrstuvwxyzçğıöşü"
OTHERS = "😀😂🔥👍漢字愛人人日"
PROMPTS = ["", "a", "Bir varmış", "kötü ", "x\u200b", "(1", "漢"]


def draw_phrases(count: int, seed: int = 0) -> list[str]:
    """Different phrases; the first are the shortest, so that even a few of them occur in random text."""
    rng, found = random.Random(seed), {}
    for c in OTHERS[: count // 10]:
        found[c] = None
    while len(found) < count:
        length = rng.choice([2, 2, 3, 3, 4, 5, 6, 8, 10, 12])
        phrase = "".join(rng.choices(LETTERS, k=length))
        if rng.random() < 0.1:
            phrase += " " + "".join(rng.choices(LETTERS, k=2))
        found[phrase] = None
    return list(found)


def policy_of(phrases: list[str], word_boundaries: bool, default: bool = False) -> Policy:
    """As a user would write it, through a file."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "phrases.txt").write_text("\n".join(phrases), "utf-8")
        policy = Path(folder, "policy.toml")
        policy.write_text(
            f'[c]\nword_boundaries = {str(word_boundaries).lower()}\nphrases_file = "phrases.txt"\n', "utf-8"
        )
        return load_policy(policy, default=default)


# ── speed ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(model: AGIFormer, arguments: argparse.Namespace) -> list[dict]:
    """One row for each policy: compiling, sizes, and bytes/s in rounds that alternate between the policies."""
    rows, policies = [], []
    cases = [(0, True), *((n, bounded) for n in SIZES[1:] for bounded in (True, False)), (None, True)]
    for count, bounded in cases:
        began = time.perf_counter()
        policy = load_policy() if count is None else policy_of(draw_phrases(count), bounded)
        automaton = ByteAutomaton(policy)
        rows.append(
            {
                "policy": "default" if count is None else f"{count} phrases{'' if bounded else ', inside words'}",
                "compile_s": time.perf_counter() - began,
                "states": len(automaton),
                "nodes": automaton.nodes,
                "table_mb": automaton.table_bytes() / 1e6,
            }
        )
        policies.append(policy)
    speeds = {size: [[] for _ in policies] for size in arguments.batch}
    for _ in range(arguments.rounds + 1):
        for size in arguments.batch:
            for i, policy in enumerate(policies):
                speeds[size][i].append(bytes_per_second(model, policy, size, arguments.bytes))
    for i, row in enumerate(rows):
        for size in arguments.batch:
            row[f"bytes_per_s_batch_{size}"] = statistics.median(speeds[size][i][1:])  # the first round warms up
    return rows


def bytes_per_second(model: AGIFormer, policy: Policy, batch: int, n: int) -> float:
    pieces = generate(model, b"The ", max_bytes=n, seed=1, batch=batch, policy=policy)
    began = time.perf_counter()
    for _ in pieces:
        pass
    return batch * n / (time.perf_counter() - began)


# ── fuzz ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def folded(c: str) -> str:
    """NFKC, full case folding, no marks, nothing of no width, ı as i, digits of all scripts as 0-9, to a fixpoint."""
    before = None
    while c != before:
        before = c
        c = "".join(x for x in unicodedata.normalize("NFKD", c) if not is_ignored(x))
        c = unicodedata.normalize("NFKC", c).casefold().replace("ı", "i")
        c = "".join(str(unicodedata.decimal(x, x)) for x in c)
    return unicodedata.normalize("NFKD", c)


def is_ignored(c: str) -> bool:
    if unicodedata.category(c) in ("Mn", "Me", "Cf") or unicodedata.combining(c):
        return True
    return c in "\u115f\u1160\u3164\uffa0\u2065" or "\ufff0" <= c <= "\ufff8" or "\U000e0000" <= c <= "\U000e0fff"


def fold_text(data: bytes) -> str:
    return "".join(map(folded, data.decode("utf-8", "replace")))


def regexes(phrases: list[str], word_boundaries: bool) -> dict[str, str]:
    """For each word that phrases begin with, a regular expression of these phrases."""
    found: dict[str, list[str]] = {}
    for phrase in phrases:
        words = "".join(map(folded, phrase)).split()
        after = r"(?!\w)" if word_boundaries and re.match(r"\w", words[-1][-1]) else ""
        found.setdefault(words[0], []).append(r"\s+".join(map(re.escape, words)) + after)
    return {word: "|".join(sorted(set(each))) for word, each in found.items()}


def count_matches(prompt: bytes, data: bytes, by_word: dict[str, str], word_boundaries: bool) -> int:
    """Places of the folded text where a match begins that ends after the prompt."""
    # What the prompt begins of a character belongs to what follows.
    text, known, count = fold_text(prompt + data), len(fold_text(prompt.decode("utf-8", "ignore").encode())), 0
    longest = max(map(len, by_word), default=0)
    for start in range(len(text)):
        if word_boundaries and start and re.match(r"\w\w", text[start - 1 : start + 1]):
            continue
        for length in range(1, min(longest, len(text) - start) + 1):
            if regex := by_word.get(text[start : start + length]):
                match = re.compile(regex).match(text, start)
                count += bool(match) and match.end() > known
    return count


def fuzz(model: AGIFormer, arguments: argparse.Namespace) -> list[dict]:
    """One row for each kind of text: bytes, matches through the gate, matches without rules."""
    phrases, rows = draw_phrases(arguments.phrases), []
    prompts = [text.encode() for text in PROMPTS] + [b"\xe2\x80", b"\xf0\x9f\x98", b"\xff"]
    batch = -(-arguments.rows // len(prompts))
    for bounded in (True, False):
        policy, by_word = policy_of(phrases, bounded), regexes(phrases, bounded)
        for any_bytes in (False, True):
            row = {"word_boundaries": bounded, "any_bytes": any_bytes, "bytes": 0}
            for name, rules in (("through", policy), ("without", Policy())):
                row[name], seed, written = 0, 0, 0
                while written < arguments.fuzz / 4:
                    data = [b""] * (batch * len(prompts))
                    for piece in generate(
                        model, prompts, max_bytes=arguments.bytes, temperature=2.0, seed=seed, batch=batch,
                        any_bytes=any_bytes, policy=rules,
                    ):  # fmt: skip
                        data[piece.row] += piece.data
                    row[name] += sum(
                        count_matches(prompts[i // batch], text, by_word, bounded) for i, text in enumerate(data)
                    )
                    written += sum(map(len, data))
                    seed += 1
                if name == "through":
                    row["bytes"] = written
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", help="default: a new model of --preset, drawn with seed 0")
    parser.add_argument("--preset", default="nano", help="nano, small, base or large (default: nano)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--bytes", type=positive, default=200, help="of a row (default: 200)")
    parser.add_argument("--rounds", type=positive, default=5, help="speeds are medians of so many (default: 5)")
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=[1], help="rows whose speed is measured (default: 1)"
    )
    parser.add_argument("--fuzz", type=positive, metavar="BYTES", help="generate so many and count matches instead")
    parser.add_argument("--phrases", type=positive, default=SIZES[-1], help="of the fuzz (default: 10000)")
    parser.add_argument("--rows", type=positive, default=256, help="generated together in the fuzz (default: 256)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    return guarded("gate.py", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when the fuzz finds a match, or too few without the gate to mean anything."""
    _, device = join_workers(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.checkpoint:
        model = load_checkpoint(find_checkpoint(arguments.checkpoint), device)
    else:
        torch.manual_seed(0)
        model = AGIFormer(AGIFormerConfig.preset(arguments.preset)).to(device)
    model.eval()
    rows = fuzz(model, arguments) if arguments.fuzz else measure(model, arguments)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        print(
            text_table(
                list(rows[0]), [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
            )
        )
    return int(bool(arguments.fuzz) and any(row["through"] or not row["without"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
