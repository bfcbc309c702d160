"""Train an AGIFormer from scratch through a curriculum.

    python train_curriculum.py                                    # a first model: nano on a CPU, small on a GPU
    python train_curriculum.py --curriculum my_texts/             # your own file or folder
    python train_curriculum.py --preset small --curriculum local --steps 876
    python train_curriculum.py --resume                           # go on where the last run in --out stopped
    torchrun --nproc-per-node 2 train_curriculum.py --preset small --curriculum local

Writes best_model_curriculum.safetensors, last_model_curriculum.safetensors, metrics_curriculum.json,
log_curriculum.jsonl and curriculum.png into --out. Ctrl-C and SIGTERM save and exit; --resume goes on exactly.
"""

import argparse
import signal
import sys

from model.cli import Parser, guarded


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="train_curriculum.py", description=__doc__)

    what = parser.add_argument_group("what to train, on what")
    what.add_argument("--preset", help="nano, small, base or large (default: small on CUDA, else nano)")
    what.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the model")
    what.add_argument(
        "--curriculum",
        help="pydoc, english, turkish, local, recall, a .toml file, your own file or folder (default: pydoc)",
    )
    what.add_argument(
        "--locks", metavar="FOLDER", help="go on with the model of python -m model.sgm; what it has locked stays"
    )
    what.add_argument("--cache-dir", help="folder of encoded corpora (default: $AGIFORMER_CACHE or ~/.cache/agiformer)")
    what.add_argument("--seed", type=int, help="of weights and data order (default: 0)")

    how = parser.add_argument_group("how long and how (defaults depend on the preset: see docs/training.md)")
    how.add_argument("--steps", type=int, help="optimization steps of the whole curriculum")
    how.add_argument("--batch-size", type=int, help="sequences per step, on each device")
    how.add_argument("--seq-len", type=int, help="bytes per sequence, where a stage does not say")
    how.add_argument("--optimizer", help="muon or adamw (default: muon)")
    how.add_argument("--lr", type=float, help="peak learning rate")
    how.add_argument("--weight-decay", type=float, help="decoupled weight decay of matrices (default: 0.1)")
    how.add_argument("--warmup", type=float, help="share of the steps with a rising learning rate (default: 0.02)")
    how.add_argument("--decay", type=float, help="share of the steps with a falling one (default: 0.3)")
    how.add_argument("--clip", type=float, help="largest gradient norm (default: 1)")
    how.add_argument(
        "--amp", help="auto, bf16, fp16 or off (default: auto, which is bf16 or fp16 on CUDA, off on a CPU)"
    )

    how.add_argument(
        "--recall",
        type=float,
        metavar="SHARE",
        help="of the rows of every stage that get recall tasks (default: each stage's own, as the curriculum says)",
    )
    how.add_argument(
        "--write-price",
        type=float,
        metavar="NATS",
        help="a byte, of writing all text into a long head of the byte memory, where there are tasks (default: 4)",
    )

    how.add_argument(
        "--ponder-cost", type=float, metavar="NATS", help="of 1 − p_halt, the mean over all thinking steps (default: 0)"
    )

    petals = parser.add_argument_group("petals and growth (docs/petals.md, docs/growth.md)")
    petals.add_argument("--hull", help="kind of the petals: convex or swiglu (default: convex)")
    petals.add_argument("--petals", type=int, metavar="N", help="petals of a hull, at equal weights (default: 4)")
    petals.add_argument(
        "--viscosity", help="damp weights by their history: auto, off, resistance or ema (default: auto)"
    )
    petals.add_argument(
        "--freeze", help="what becomes of petals that have set: off, cryogenic, chrysalis (default: off)"
    )
    petals.add_argument("--freeze-at", help="when they may set: evaluations, or STEP,STEP,... (default: evaluations)")
    petals.add_argument("--freeze-rule", help="pressure or kl: how a petal is found to have set (default: pressure)")
    petals.add_argument("--freeze-threshold", type=float, help="of the rule (default: 0.6 for pressure, 0.01 for kl)")
    petals.add_argument(
        "--grow", help="off, auto or STEP[:blocks|petals|petals=N|thaw|widen=D|BOB+BOB],... (default: off)"
    )
    petals.add_argument("--grow-rule", help="student-t or phi: when auto adds petals (default: student-t)")
    petals.add_argument("--grow-by", help="petals or blocks: what auto adds (default: petals)")
    petals.add_argument("--grow-left", help="frozen or thawed: whether grown trees go on learning (default: frozen)")

    genesis = parser.add_argument_group("GENESIS: keeping what was learned (docs/genesis.md)")
    genesis.add_argument(
        "--genesis", help="what auto means below: off, on (what has earned its place) or all (default: on)"
    )
    genesis.add_argument("--replay", help="rehearse earlier stages: auto, off, recomputed or stored (default: auto)")
    genesis.add_argument("--replay-rows", type=int, metavar="N", help="sequences a step (default: 1/16 of the batch)")
    genesis.add_argument("--replay-size", type=int, metavar="N", help="sequences remembered in all (default: 8192)")
    genesis.add_argument("--replay-weight", type=float, help="of their loss (default: as if they were the batch's)")
    genesis.add_argument("--replay-priority", help="even, or loss: what costs more is drawn more (default: even)")
    genesis.add_argument(
        "--replay-depth", type=int, metavar="N", help="blocks that the replay point moves to (default: 0)"
    )
    genesis.add_argument(
        "--replay-mixed", action="store_const", const=True, help="one memory of all stages: usual experience replay"
    )
    genesis.add_argument(
        "--amplifier",
        help="of units: anchor, rate or both; of recurring bytes: surprise; all, off or auto (default: auto)",
    )
    genesis.add_argument("--persistence", help="protect what feeds important units: auto, off or on (default: auto)")
    genesis.add_argument("--persistence-strength", type=float, help="λ of its pull (default: 0.5)")
    genesis.add_argument("--learning-curve", help="slow start and boom, by novelty: auto, off or on (default: auto)")
    genesis.add_argument("--balance", help="GradNorm of main and replay loss: auto, off or on (default: auto)")

    where = parser.add_argument_group("where, and what it leaves")
    where.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    where.add_argument("--no-graph", action="store_true", help="do not capture the step as a CUDA graph")
    where.add_argument("--out", default="checkpoints", help="folder for everything written (default: checkpoints)")
    where.add_argument("--eval-every", type=int, help="steps between validations (default: a tenth of the run)")
    where.add_argument("--save-every", type=int, help="steps between saves (default: a tenth of the run)")
    where.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="go on from a last_model_curriculum.safetensors (default: the one in --out; afresh if there is none)",
    )
    where.add_argument(
        "--sample-bytes", type=int, default=400, help="length of the text sample at the end (default: 400)"
    )
    where.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()

    def run() -> int:
        # Imported after parsing: --help should not wait for torch.
        from model.training.run import run_curriculum

        return run_curriculum(arguments, install_signal_handlers)

    return guarded("train_curriculum.py", run)


def install_signal_handlers(request_stop):
    """The first Ctrl-C or SIGTERM asks the run to save and stop, a second ends it at once. Returns what undoes this."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]

    def restore() -> None:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)

    def handle(number, frame):
        restore()
        request_stop()

    for number in numbers:
        signal.signal(number, handle)
    return restore


if __name__ == "__main__":
    sys.exit(main())
