"""Learning without gradients: loss by evaluation against other ways to learn, what the locks keep, and the folder.

    python benchmarks/sgm.py                       # loss by evaluation, 25 tasks under each strategy, times of a store
    python benchmarks/sgm.py --only search --evaluations 3000 --json

One evaluation is one forward pass of one version of the model on the task. A step by gradient counts as three: its
backward pass costs two forward passes.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.cli import Parser, guarded, positive
from model.evaluation.report import json_text, text_table
from model.sgm.demonstration import demonstration_model
from model.sgm.directions import Directions
from model.sgm.learner import Learner
from model.sgm.lifelong_options import LifelongOptions
from model.sgm.mutations import LearnerOptions, Places
from model.sgm.population import Population, place_losses
from model.sgm.runs import LENGTH, RETENTION, VARIANTS, run_tasks
from model.sgm.storage import WeightStore
from model.sgm.tasks import Task, micro_tasks, stack

PARTS = ("search", "retention", "storage")
LEARNS = "head.output.weight"
ALL, SPAN, PLACES = "all weights", "head's output, within its inputs' span", "the same, credit by place"
HEAD = 128  # of the model of the searches: 0.35 M weights
SEARCHES = {
    "(1+λ), dense": {"recombine": False, "perturbation": "dense"},
    "(1+λ), low-rank": {"recombine": False},
    "antithetic pairs, low-rank": {"antithetic": True},
    "dense": {"perturbation": "dense"},
    "low-rank (the default)": {},
}


def at_budgets(trace: list[tuple[int, float]], budgets: list[int]) -> list[float]:
    """The last loss of (evaluations, loss) pairs within each budget."""
    return [[loss for evaluations, loss in trace if evaluations <= budget][-1] for budget in budgets]


def by_search(tasks: list[Task], options: LearnerOptions, budgets: list[int], where: str, seed: int) -> list[float]:
    """Losses of the tasks, learned together from nothing, after so many evaluations; `where`: ALL, SPAN, PLACES."""
    population = Population(demonstration_model(HEAD), place_losses)
    learner = Learner(population, options, seed=seed)
    x, counts = stack(tasks, LENGTH)
    free = basis = places = None
    if where != ALL:
        free = torch.zeros(population.size, dtype=torch.bool)
        free[population.spans[LEARNS]] = True
        directions = Directions(population, [LEARNS])
        read = directions.inputs(learner.values, x, counts)
        basis = directions.within(read, learner.locked)
        if where == PLACES:
            places = {LEARNS: Places(read[LEARNS], counts.flatten().nonzero().flatten())}

    def loss() -> float:
        return population.losses(learner.values.unsqueeze(0), x, counts).mean().item()

    trace = [(0, loss())]
    learner.learn(
        x, counts, evaluations=budgets[-1], free=free, within=basis, places=places,
        on_accept=lambda: trace.append((learner.evaluations, loss())),
    )  # fmt: skip
    return at_budgets(trace, budgets)


def by_gradient(tasks: list[Task], budgets: list[int], lr: float) -> list[float]:
    """The same by Adam, for as many forward passes."""
    model = demonstration_model(HEAD)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    x, counts = stack(tasks, LENGTH)
    trace = []
    for step in range(budgets[-1] // 3 + 1):
        optimizer.zero_grad()
        each = F.cross_entropy(model(x).flatten(0, 1), x.flatten().long(), reduction="none").view(x.shape)
        loss = ((each * counts).sum(1) / counts.sum(1)).mean()
        loss.backward()
        trace.append((3 * step, loss.item()))  # what the steps before it came to
        optimizer.step()
    return at_budgets(trace, budgets)


def search(arguments: argparse.Namespace) -> list[dict[str, float | str]]:
    """Rows: a way to learn, and the loss after a fraction of the evaluations, the median of the seeds."""
    tasks = micro_tasks(arguments.together)
    budgets = [arguments.evaluations // 10, arguments.evaluations // 3, arguments.evaluations]
    rows = []

    def add(name: str, learn) -> None:
        start = time.perf_counter()
        found = zip(*(learn(seed) for seed in range(arguments.seeds)))
        row: dict[str, float | str] = {"way": name}
        row |= {str(budget): statistics.median(losses) for budget, losses in zip(budgets, found)}
        rows.append(row | {"seconds": time.perf_counter() - start})
        print(rows[-1], file=sys.stderr, flush=True)

    for name, changes in SEARCHES.items():
        options = LearnerOptions(**changes)
        add(name, lambda seed, options=options: by_search(tasks, options, budgets, ALL, seed))
    for where in (SPAN, PLACES):
        add(where, lambda seed, where=where: by_search(tasks, LearnerOptions(), budgets, where, seed))
    for lr in (1e-3, 1e-2):
        add(f"gradient, Adam {lr:g}", lambda seed, lr=lr: by_gradient(tasks, budgets, lr))
    return rows


def storage(repeats: int = 20) -> list[dict[str, float | str]]:
    """Rows: what a store does with the demonstration model's weights, and its median milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in ("commit", "lock of 512", "snapshot", "open")}
    generator = torch.Generator().manual_seed(0)

    def timed(name: str, act, *arguments):
        start = time.perf_counter()
        result = act(*arguments)
        times[name].append(1000 * (time.perf_counter() - start))
        return result

    with tempfile.TemporaryDirectory() as folder:
        store = WeightStore.from_module(Path(folder) / "store", demonstration_model(512))
        for _ in range(repeats):
            noise = torch.randn(len(store), generator=generator).masked_fill(store.locked, 0)
            timed("commit", store.commit, store.values + noise)
            mask = torch.zeros(len(store), dtype=torch.bool)
            mask[torch.randperm(len(store), generator=generator)[:512]] = True
            timed("lock of 512", store.lock, "task", mask)
            timed("snapshot", store.snapshot, "now")
            store.close()
            store = timed("open", WeightStore.open, Path(folder) / "store")
        size = len(store)
        store.close()
    print(f"{size} float32 weights, up to {repeats} locks", file=sys.stderr)
    return [{"what": name, "ms": statistics.median(each)} for name, each in times.items()]


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one of the three (default: all)")
    parser.add_argument("--evaluations", type=positive, default=3000, help="of the longest search (default: 3000)")
    parser.add_argument("--together", type=positive, default=4, help="tasks learned at once in it (default: 4)")
    parser.add_argument("--seeds", type=positive, default=3, help="medians of so many (default: 3)")
    parser.add_argument("--tasks", type=positive, default=25, help="of the retention table (default: 25)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    return guarded("sgm.py", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    found: dict[str, object] = {}
    if arguments.only in (None, "search"):
        rows = found["search"] = search(arguments)
        if not arguments.json:
            header = [key for key in rows[0] if key != "seconds"]
            print(text_table([*header, "seconds"], [
                [str(row["way"]), *(f"{row[key]:.3f}" for key in header[1:]), f"{row['seconds']:.0f}"] for row in rows
            ]))  # fmt: skip
    if arguments.only in (None, "retention"):
        kept = {}
        strategies = VARIANTS | {"guard": {"directions": False, "locks": False, "guard": 0.004}}
        for name, changes in strategies.items():
            kept[name] = run_tasks(arguments.tasks, options=LifelongOptions(**changes))
            print(name, kept[name].row(), file=sys.stderr, flush=True)
        found["retention"] = {name: vars(row) for name, row in kept.items()}
        if not arguments.json:
            print(text_table(["strategy", *RETENTION], [[name, *row.row()] for name, row in kept.items()]))
    if arguments.only in (None, "storage"):
        found["storage"] = storage()
        if not arguments.json:
            print(text_table(["what", "ms"], [[str(row["what"]), f"{row['ms']:.1f}"] for row in found["storage"]]))
    if arguments.json:
        print(json.dumps(json.loads(json_text(found)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
