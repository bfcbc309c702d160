"""What the external memory finds, whom its router understands, how well trust is calibrated, and what each costs.

    python benchmarks/external_memory.py                        # all tables; three minutes on one core
    python benchmarks/external_memory.py --facts 10 1000 --json
    python benchmarks/external_memory.py --router router.safetensors        # trained and saved there when missing

Messages, facts and questions are generated (model.sgm.patterns, model.sgm.facts); all that is measured, what is
remembered too, is phrased by templates that training never shows. Hits of "BM25" are those of
`ExternalMemory.retrieve`, of "trust" the same candidates in the router's order. Milliseconds are of one process on a
file, with the fsync of each write.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.cli import Parser, guarded, positive
from model.evaluation.report import json_text, text_table
from model.sgm.facts import Fact, ask, draw_facts
from model.sgm.memory import ExternalMemory
from model.sgm.patterns import messages
from model.sgm.phrases import LANGUAGES
from model.sgm.routed import STORE_PROBABILITY
from model.sgm.router import ACTIONS, Decision, MemoryRouter, train_router
from model.sgm.trust import CANDIDATES, Judged, judged_queries

SIZES = (10, 1_000, 100_000)


def action_rows(router: MemoryRouter, seed: int) -> list[dict]:
    """Precision and recall on held-out templates: as generated, and with the noise of hurried typing."""
    rows = []
    for noise in (False, True):
        texts = messages("held_out", 10, seed=seed, noise=noise)
        decisions = router.decide_all([each.text for each in texts])
        for language in LANGUAGES:
            pairs = [(m.action, acted(d)) for m, d in zip(texts, decisions) if m.language == language]
            for action in ACTIONS:
                hits, said = pairs.count((action, action)), sum(s == action for _, s in pairs)
                true = sum(t == action for t, _ in pairs)
                templates = {m.template for m in texts if (m.language, m.action) == (language, action)}
                rows.append({
                    "typing": "hurried" if noise else "clean", "language": language, "action": action,
                    "templates": len(templates), "messages": true,
                    "precision": hits / max(said, 1), "recall": hits / true,
                })  # fmt: skip
    return rows


def acted(decision: Decision) -> str:
    """What is done: a store that is too doubtful is not."""
    doubtful = decision.action == "store" and decision.probability < STORE_PROBABILITY
    return "neither" if doubtful else decision.action


def trust_rows(
    router: MemoryRouter, judged: dict[str, list[Judged]], threshold: float
) -> tuple[list[dict], list[dict]]:
    """By language: ECE over ten bins, precision and recall at the threshold; and the reliability table of all."""
    rows, everything = [], []
    for name, queries in judged.items():
        pairs = [(p, a) for each in queries for p, a in zip(router.trust(each.query, each.matches), each.answers)]
        everything += pairs
        trust, right = (np.array(column) for column in zip(*pairs))
        accepted, answerable = trust >= threshold, sum(any(each.answers) for each in queries)
        rows.append({
            "language": name, "queries": len(queries), "matches": len(pairs), "ece": ece(trust, right),
            "ece_accepted": abs(trust[accepted].mean() - right[accepted].mean()),
            "precision": right[accepted].mean(), "recall": right[accepted].sum() / answerable,
        })  # fmt: skip
    trust, right = (np.array(column) for column in zip(*everything))
    bins = bin_of(trust)
    table = [
        {"trust": f"{b / 10:.1f}-{(b + 1) / 10:.1f}", "matches": int((bins == b).sum()),
         "mean_trust": trust[bins == b].mean(), "answers": right[bins == b].mean()}
        for b in sorted(set(bins.tolist()))
    ]  # fmt: skip
    return rows, table


def bin_of(trust: np.ndarray) -> np.ndarray:
    return np.minimum((trust * 10).astype(int), 9)


def ece(trust: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error (Naeini et al. 2015) over ten bins of equal width."""
    bins = bin_of(trust)
    return sum(abs(trust[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in set(bins.tolist()))


def retrieval_rows(
    router: MemoryRouter, size: int, language: str, queries: int, threshold: float
) -> tuple[list[dict], dict]:
    """Hit rates by form of fact, and milliseconds, among `size` facts."""
    rng = random.Random(size)
    facts = draw_facts(size, language, seed=1, held_out=True)
    asked: list[Fact] = []
    for form in ("attribute", "episode", "reworded"):
        of_form = [fact for fact in facts if fact.form == form]
        asked += rng.sample(of_form, min(queries, len(of_form)))
    own = [fact for fact in asked if not fact.owner]
    with tempfile.TemporaryDirectory() as folder, ExternalMemory(Path(folder, "m.db"), daily_budget=None) as memory:
        ids = dict(
            zip(((fact.owner, fact.about) for fact in facts), memory.remember_all([fact.text for fact in facts]))
        )
        ranks, spent = {}, []
        for fact in asked:
            query = ask(fact, rng, held_out=True)
            began = time.perf_counter()
            matches = memory.retrieve(query, touch=False)
            spent.append(time.perf_counter() - began)
            wide = memory.retrieve(query, limit=CANDIDATES, touch=False)
            trust = router.trust(query, wide)
            ranked = sorted(range(len(wide)), key=lambda k: -trust[k])
            found = [match.entry.id for match in matches]
            best = [wide[k].entry.id for k in ranked]
            answer = ids[fact.owner, fact.about]
            given = trust[ranked[0]] >= threshold if ranked else False
            ranks[fact.owner, fact.about] = (
                found[:1] == [answer], answer in found, best[:1] == [answer], answer in best[:5],
                given and best[0] == answer,
            )  # fmt: skip
        writes = []
        for i in range(100):
            began = time.perf_counter()
            memory.remember(f"{facts[i % size].text} {i}")
            writes.append(time.perf_counter() - began)
    rows = []
    groups = {form: [f for f in asked if f.form == form] for form in ("attribute", "episode", "reworded")}
    for form, group in (groups | {"the speaker's own": own, "all": asked}).items():
        if group:
            mean = np.mean([ranks[fact.owner, fact.about] for fact in group], axis=0)
            names = ("bm25_hit_1", "bm25_hit_5", "trust_hit_1", "trust_hit_5", "answered")
            rows.append({"facts": size, "language": language, "questions": form, "count": len(group)}
                        | dict(zip(names, mean.tolist())))  # fmt: skip
    return rows, {"facts": size, "language": language} | times("retrieve", spent) | times("remember", writes)


def times(name: str, seconds: list[float]) -> dict:
    """Median and 95th percentile in milliseconds."""
    return {f"{name}_ms": 1000 * float(np.median(seconds)), f"{name}_95_ms": 1000 * float(np.quantile(seconds, 0.95))}


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--facts", type=positive, nargs="+", default=list(SIZES), help="default: 10 1000 100000")
    parser.add_argument("--queries", type=positive, default=200, help="of each form of fact, at most (default: 200)")
    parser.add_argument("--threshold", type=float, default=0.5, help="of trust (default: 0.5)")
    parser.add_argument("--router", metavar="FILE", help="of a trained router (default: train one)")
    parser.add_argument("--seed", type=int, default=1, help="of what is measured (default: 1)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    return guarded("external_memory.py", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    if not 0 <= arguments.threshold <= 1:
        raise ValueError(f"--threshold {arguments.threshold}: accepted is a number from 0 to 1")
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    router = MemoryRouter.load_or_train(arguments.router) if arguments.router else train_router()
    result = {
        "parameters": sum(p.numel() for p in router.parameters()),
        "training_s": time.perf_counter() - began,
        "actions": action_rows(router, arguments.seed),
    }
    judged = judged_queries((4, 12, 40, 120, 400, 1200) * 5, held_out=True, seed=arguments.seed + 6, queries=20)
    by_language = {
        language: [each for i, each in enumerate(judged) if i // 20 % len(LANGUAGES) == n]
        for n, language in enumerate(LANGUAGES)
    }
    result["trust"], result["reliability"] = trust_rows(router, by_language, arguments.threshold)
    result["retrieval"], result["times"] = [], []
    for size in arguments.facts:
        for language in LANGUAGES:
            rows, row = retrieval_rows(router, size, language, arguments.queries, arguments.threshold)
            result["retrieval"] += rows
            result["times"].append(row)
    spent = []
    for each in messages("held_out", 1, seed=arguments.seed):
        began = time.perf_counter()
        router.decide(each.text)
        spent.append(time.perf_counter() - began)
    result["decision"] = times("decide", spent)
    if arguments.json:
        print(json_text(result), end="")
        return 0
    print(f"router: {result['parameters']} parameters, ready after {result['training_s']:.1f} s")
    for name in ("actions", "trust", "reliability", "retrieval", "times"):
        print(f"\n{name}\n{table(result[name])}")
    median, most = result["decision"].values()
    print(f"\na decision: median {median:.2f} ms, 95% {most:.2f} ms")
    return 0


def table(rows: list[dict]) -> str:
    """Rows of one kind as text."""
    cells = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    return text_table(list(rows[0]), cells)


if __name__ == "__main__":
    sys.exit(main())
