"""Learning without gradients, and memory outside the weights.

python -m model.sgm tasks --quick                    # 25 tasks one after the other; without --quick a hundred
python -m model.sgm tasks --out runs/sgm             # keeps the folder; the same line goes on with it
python -m model.sgm stress --fast                    # every strategy: retention, storage, timing
python -m model.sgm improve --iterations 50 --out runs/improve
python -m model.sgm infer "As a pirate: "            # by what runs/sgm has learned
python -m model.sgm export-model pirate.safetensors  # what runs/sgm has learned, as a checkpoint for generate.py
python -m model.sgm import-model checkpoints/last_model_curriculum.safetensors  # trained with its locks (--locks)
python -m model.sgm recover --out runs/sgm           # from its last snapshot, when a file is damaged
python -m model.sgm remember "My sister lives in İzmir" --memory memory.sqlite
python -m model.sgm retrieve "Where does my sister live?" --memory memory.sqlite
python -m model.sgm forget 3 --memory memory.sqlite
python -m model.sgm list --memory memory.sqlite
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace

from model.cli import Parser, guarded, positive

MEMORY, IN_RAM = "memory.sqlite", ":memory:"  # a file by default; SQLite's name for none


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parse(argv)
    return guarded("sgm", lambda: _ACTIONS[options.action](options))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m model.sgm", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar=" | ".join(_ACTIONS))

    tasks = actions.add_parser("tasks", help="learn micro-tasks in sequence, and see what is left of the first")
    add = tasks.add_argument
    add("--quick", action="store_true", help="25 tasks instead of 100")
    add("--checkpoint", help="learn on this model instead of a small one that knows nothing")
    what = tasks.add_mutually_exclusive_group()
    what.add_argument(
        "--learns", metavar="NAMES", help="linear layers' weights that learn, by commas (default: head.output.weight)"
    )
    what.add_argument(
        "--modules",
        metavar="NAMES",
        help="modules that learn, such as attention,head; by strategy nothing or locks",
    )
    add("--strategy", default="both", help="nothing, locks, directions or both (default: both)")
    add("--dtype", default="float32", help="of the stored weights: float32 or float16 (default: float32)")
    add("--evaluations", type=positive, default=500, help="of a task, at most (default: 500)")
    add("--out", help="folder to keep, and to go on with (default: a temporary one)")
    add("--seed", type=int, default=0, help="of the mutations (default: 0)")
    add("--json", action="store_true", help="print JSON")

    stress = actions.add_parser("stress", help="train, retention, storage and timing, strategy by strategy")
    stress.add_argument("--fast", action="store_true", help="5 tasks instead of 20")

    improve = actions.add_parser("improve", help="the self-improvement loop over five categories")
    add = improve.add_argument
    add("--iterations", type=positive, default=100, help="of the loop (default: 100)")
    add("--checkpoint", help="improve this model instead of a small one that knows nothing")
    add("--evaluations", type=positive, default=64, help="of an iteration (default: 64)")
    add("--out", default="runs/sgm-improve", help="folder to keep, and to go on with (default: runs/sgm-improve)")

    infer = actions.add_parser("infer", help="let a folder's model go on with a text")
    add = infer.add_argument
    add("text", help="what it goes on with")
    add("--out", default="runs/sgm", help="the folder of tasks or improve (default: runs/sgm)")
    add("--max-bytes", type=positive, default=32, help="to write (default: 32)")

    export = actions.add_parser("export-model", help="write what a folder has learned as an ordinary checkpoint")
    export.add_argument("file", help="to write, .safetensors")
    take = actions.add_parser("import-model", help="go on with a checkpoint that was trained with the folder's locks")
    take.add_argument("file", help="the checkpoint")
    recover = actions.add_parser("recover", help="put a damaged folder back to its last snapshot")
    for action in (export, take, recover):
        action.add_argument("--out", default="runs/sgm", help="the folder of tasks or improve (default: runs/sgm)")

    for action in (tasks, stress, improve, infer, export, take, recover):
        action.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")

    for name, what, takes in (
        ("remember", "store a text", "text"),
        ("retrieve", "find what answers a question", "text"),
        ("forget", "forget by number, or the only entry with all words of a text", "text"),
        ("list", "what is remembered", None),
        ("export", "write everything to a JSON file", "file"),
        ("import", "read such a file", "file"),
    ):
        memory = actions.add_parser(name, help=what)
        if takes:
            memory.add_argument(takes)
        memory.add_argument("--memory", default=MEMORY, help=f"the database (default: {MEMORY})")
        if name in ("remember", "list"):
            memory.add_argument("--kind", help="fact, episode or skill")
    return parser.parse_args(argv)


def _tasks(options: argparse.Namespace) -> int:
    from model.evaluation.report import json_text, pick_device, text_table
    from model.sgm.lifelong_options import LifelongOptions
    from model.sgm.runs import FULL, QUICK, RETENTION, VARIANTS, run_tasks

    if options.strategy not in VARIANTS:
        raise ValueError(f"--strategy {options.strategy}: accepted are {', '.join(VARIANTS)}")
    settings = LifelongOptions(dtype=options.dtype, seed=options.seed, **VARIANTS[options.strategy])
    if options.learns is not None:
        settings = replace(settings, learns=tuple(options.learns.split(",")))
    result = run_tasks(
        QUICK if options.quick else FULL,
        folder=options.out,
        model=_model(options.checkpoint),
        options=settings,
        parts=tuple(options.modules.split(",")) if options.modules is not None else (),
        evaluations=options.evaluations,
        device=pick_device(options.device),
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if options.json:
        print(json_text(vars(result)))
        return 0
    print(text_table(["strategy", *RETENTION], [[options.strategy, *result.row()]]))
    for count, milliseconds in result.latency.items():
        print(f"a forward pass after {count} task{'s' if count != 1 else ''}: {milliseconds:.2f} ms")
    print(f"locks that changed: {', '.join(result.changed) or 'none'}")
    return 0


def _stress(options: argparse.Namespace) -> int:
    from model.evaluation.report import pick_device, text_table
    from model.sgm.runs import RETENTION, stress

    rows = stress(
        5 if options.fast else 20,
        device=pick_device(options.device),
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    table = []
    for row in rows:
        times = [f"{row.retention.latency[count]:.1f}" for count in (0, row.retention.tasks)]
        table.append([row.name, *row.retention.row(), f"{row.store_bytes / 1e6:.1f}", *times])
    print(text_table(["strategy", *RETENTION, "MB", "ms before", "ms after"], table))
    print("ms before, ms after: a forward pass by the model before the first task and after the last")
    return 0


def _improve(options: argparse.Namespace) -> int:
    from model.evaluation.report import pick_device
    from model.sgm.runs import ImproveOptions, improve

    def say(iteration) -> None:
        end = "rolled back" if iteration.rolled_back else f"{iteration.locked} weights locked"
        print(
            f"{iteration.number} {iteration.category}: {iteration.before:.3f} -> {iteration.after:.3f}, "
            f"total {iteration.total:.3f}, best {iteration.best:.3f}, {end}",
            flush=True,
        )

    improve(
        options.out,
        options.iterations,
        model=_model(options.checkpoint),
        options=ImproveOptions(evaluations=options.evaluations),
        device=pick_device(options.device),
        progress=say,
    )
    return 0


def _infer(options: argparse.Namespace) -> int:
    from model.evaluation.report import pick_device
    from model.inference.generate import generate
    from model.sgm.lifelong import LifelongLearner

    with LifelongLearner.open(options.out, read_only=True, device=pick_device(options.device)) as learner:
        text = options.text.encode(errors="surrogateescape")
        for piece in generate(learner.model, text, max_bytes=options.max_bytes, temperature=0.0):
            sys.stdout.buffer.write(piece.data)
            sys.stdout.buffer.flush()
    print()
    return 0


def _export_model(options: argparse.Namespace) -> int:
    from model.evaluation.report import pick_device
    from model.sgm.lifelong import LifelongLearner

    with LifelongLearner.open(options.out, read_only=True, device=pick_device(options.device)) as learner:
        print(f"{learner.export(options.file)}: the model of {options.out} after {len(learner.records)} tasks")
    return 0


def _import_model(options: argparse.Namespace) -> int:
    from model.evaluation.report import pick_device
    from model.sgm.lifelong import LifelongLearner

    with LifelongLearner.open(options.out, device=pick_device(options.device)) as learner:
        learner.take(_model(options.file).to(learner.device))
        for record in learner.records:
            print(f"{record.task.name}: {record.after:.3f}")
    return 0


def _recover(options: argparse.Namespace) -> int:
    from model.evaluation.report import pick_device
    from model.sgm.lifelong import LifelongLearner
    from model.sgm.storage import StoreBusy

    device = pick_device(options.device)
    try:
        LifelongLearner.open(options.out, device=device).store.close()
    except StoreBusy:
        raise
    except (ValueError, OSError) as damage:
        learner, snapshot = LifelongLearner.recover(options.out, device=device)
        with learner:
            print(f"{damage}\n{options.out}: put back to its snapshot {snapshot!r}, {len(learner.records)} tasks")
        return 0
    print(f"{options.out}: nothing is damaged")
    return 0


def _model(checkpoint: str | None):
    if checkpoint is None:
        return None
    from model.training.checkpoint import find_checkpoint, load_checkpoint

    return load_checkpoint(find_checkpoint(checkpoint))


def _remember(options: argparse.Namespace) -> int:
    from model.sgm.memory import BudgetExceeded

    try:
        print(_line(_written(options.memory, lambda memory: memory.remember(options.text, options.kind or "fact"))))
    except BudgetExceeded as error:
        raise ValueError(str(error)) from None
    return 0


def _retrieve(options: argparse.Namespace) -> int:
    from model.sgm.router import MemoryRouter

    with _existing(options.memory) as memory:
        router = MemoryRouter.load_or_train(f"{options.memory}.router.safetensors")
        matches = memory.retrieve(options.text)
        for match, trust in zip(matches, router.trust(options.text, matches)):
            print(f"{trust:.2f}  {_line(match.entry)}")
    return 0


def _forget(options: argparse.Namespace) -> int:
    from model.sgm.commands import forget

    with _existing(options.memory) as memory:
        forgotten, matching = forget(memory, options.text)
        for entry in forgotten or matching:
            print(_line(entry))
        several = f": {len(matching)} have these words; `forget NUMBER` forgets one" if matching else ""
        print(f"{len(forgotten)} forgotten{several}")
    return 0


def _list(options: argparse.Namespace) -> int:
    with _existing(options.memory) as memory:
        for entry in memory.list(options.kind, limit=None):
            print(_line(entry))
    return 0


def _export(options: argparse.Namespace) -> int:
    with _existing(options.memory) as memory:
        memory.export_json(options.file)
        print(f"{len(memory)} written to {options.file}")
    return 0


def _import(options: argparse.Namespace) -> int:
    count = _written(options.memory, lambda memory: memory.import_json(options.file))
    print(f"{count} read from {options.file}")
    return 0


def _written(path: str, write: Callable):
    """What `write` says of the memory at `path`; a new one is tried in RAM first, so that a refusal leaves no file."""
    from model.sgm.memory import ExternalMemory

    if path == IN_RAM:
        raise ValueError(f"--memory {path}: keeps nothing; accepted is a file")
    if not os.path.exists(path):
        with ExternalMemory(IN_RAM) as trial:
            write(trial)
    with ExternalMemory(path) as memory:
        return write(memory)


def _existing(path: str):
    from model.sgm.memory import ExternalMemory

    if not os.path.exists(path):
        raise ValueError(f"--memory {path}: there is none; `remember` makes it")
    return ExternalMemory(path)


def _line(entry) -> str:
    from model.sgm.memory_text import one_line, shown

    return f"#{entry.id} {entry.kind} ({entry.confidence:.2f}): {shown(one_line(entry.text))}"


_ACTIONS = {
    "tasks": _tasks, "stress": _stress, "improve": _improve, "infer": _infer, "export-model": _export_model,
    "import-model": _import_model, "recover": _recover, "remember": _remember,
    "retrieve": _retrieve, "forget": _forget, "list": _list, "export": _export, "import": _import,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
