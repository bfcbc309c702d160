"""Reviewing the gate's log, and training its classifier.

python -m model.genesis review gate.jsonl
python -m model.genesis review gate.jsonl --list --category privacy --limit 50
python -m model.genesis review gate.jsonl --mark 3,7-9=false --mark-rule privacy/phone=true
python -m model.genesis review gate.jsonl --interactive
python -m model.genesis review gate.jsonl --apply policy.toml --false-share 0.5 --min-marks 3
python -m model.genesis train-classifier best_model_curriculum.safetensors labelled.jsonl --positive unsafe
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from model.cli import Parser, guarded, positive

if TYPE_CHECKING:
    from model.genesis.gate.interventions import Intervention, Marks, Review

NAMED = 10  # damaged lines that are named; of more, how many
QUESTION = "t true, f false, s skip, q quit: "


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for bad arguments and unreadable input."""
    options = _parse(argv)
    return guarded("genesis", lambda: _review(options) if options.action == "review" else _train(options))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m model.genesis", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="review | train-classifier")

    review = actions.add_parser("review", help="count and mark the gate's interventions, and adjust its policy")
    review.add_argument("log", metavar="LOG", help="the JSONL file that the gate has written")
    add = review.add_argument_group("showing").add_argument
    add("--list", action="store_true", help="single interventions, with their numbers, instead of the table")
    add("--category", metavar="C", help="of this category alone")
    add("--limit", type=positive, default=20, metavar="N", help="of --list, the latest N (default 20)")
    add = review.add_argument_group(
        "marking", "false: it should not have been; true: it was right; the last mark of an intervention holds"
    ).add_argument
    add("--mark", type=_assignment, action="append", default=[], metavar="N[,N-M...]=false|true", help="by number")
    add("--mark-rule", type=_assignment, action="append", default=[], metavar="RULE=false|true", help="all of a rule")
    add("--interactive", action="store_true", help="show each unmarked one and read a key: t, f, s (skip), q (quit)")
    add = review.add_argument_group("adjusting the policy").add_argument
    add("--apply", metavar="OUT.toml", help="write a policy without the rules whose marks are false")
    add("--policy", default="default", metavar="POLICY.toml", help="the policy it builds upon (default: the shipped)")
    add("--false-share", type=_share, default=0.5, metavar="S", help="false marks of a rule's, at least (default 0.5)")
    add("--min-marks", type=positive, default=3, metavar="N", help="marks of a rule, at least (default 3)")
    add("--dry-run", action="store_true", help="print that policy instead of writing it")

    train = actions.add_parser("train-classifier", help="learn from labelled texts which states to steer away from")
    add = train.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a file, or the bare name of one in checkpoints/")
    add("labelled", metavar="LABELLED", help="a jsonl, csv, tsv or parquet file of texts with labels")
    add("--text-column", default="text", metavar="NAME", help="default text")
    add("--label-column", default="label", metavar="NAME", help="default label")
    add("--positive", default="unsafe", metavar="LABEL", help="the label to steer away from (default unsafe)")
    add("--false-positive-rate", type=_share, default=0.01, metavar="R", help="of other texts, at most (default 0.01)")
    add("--validation-share", type=_share, default=0.2, metavar="S", help="of the texts, held out (default 0.2)")
    add("--window", type=positive, default=10, metavar="W", help="patches to average; fewer react sooner (default 10)")
    add("--epochs", type=positive, default=100, metavar="N", help="passes over the features, at most (default 100)")
    add("--seed", type=int, default=0, metavar="N", help="of the split (default 0)")
    add("--out", metavar="FILE", help="default: CHECKPOINT.gate.safetensors, where generation finds it")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    return parser.parse_args(argv)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: accepted is a number above 0 and up to 1")
    return value


def _assignment(text: str) -> tuple[str, str]:
    from model.genesis.gate.interventions import VERDICTS

    what, _, verdict = text.rpartition("=")
    if not what or verdict not in VERDICTS:
        raise argparse.ArgumentTypeError(f"{text!r}: accepted is what to mark, then =false or =true")
    return what, verdict


def _review(options: argparse.Namespace) -> int:
    from model.genesis.gate.interventions import Marks, review, select, select_rule

    marks = Marks(options.log)
    # All that is named is looked up before the first mark is written: a bad number marks nothing.
    chosen = [(select(options.log, numbers), verdict) for numbers, verdict in options.mark]
    chosen += [(select_rule(options.log, rule), verdict) for rule, verdict in options.mark_rule]
    for interventions, verdict in chosen:
        print(f"marked {verdict}: {marks.add(interventions, verdict)}")
    if options.interactive:
        _ask(options, marks)
    if options.list:
        _list(options, marks)
    found = review(options.log, marks)
    if not options.list:
        _table(options, found)
    _tell_damage(found.damaged, "intervention", options.log)
    _tell_damage(marks.damaged, "mark", marks.path)
    if found.stale:
        print(f"{found.stale} marks of {marks.path} fit no line of the log, which has been changed: left out")
    if options.apply:
        _apply(options, found)
    return 0


def _table(options: argparse.Namespace, found: "Review") -> None:
    from model.evaluation.report import number, text_table

    rows, counts = [], [0, 0, 0, 0]
    for rule in found.rules:
        if options.category not in (None, rule.category):
            continue
        shown = [rule.count, rule.marks["true"], rule.marks["false"], rule.count - rule.marked]
        counts = [a + b for a, b in zip(counts, shown)]
        count, *marks = map(str, shown)
        times = [f"{time:%Y-%m-%d %H:%M:%S}" for time in (rule.first, rule.last)]
        mass = number(rule.mass / rule.count)
        rows.append(
            [_printable(rule.category), _printable(rule.rule), count, mass, f"{len(rule.runs)}", *times, *marks]
        )
    if not rows:
        print(f"{options.log}: no interventions" + (f" of category {options.category}" if options.category else ""))
        return
    rows.append(["all", "", str(counts[0]), "", "", "", "", *map(str, counts[1:])])
    header = ["category", "rule", "count", "mean mass", "runs", "first", "last", "true", "false", "unmarked"]
    print(text_table(header, rows))


def _list(options: argparse.Namespace, marks: "Marks") -> None:
    from collections import deque

    from model.evaluation.report import text_table

    latest: deque[Intervention] = deque(maxlen=options.limit)
    count = 0
    for each in _interventions(options):
        latest.append(each)
        count += 1
    if not latest:
        print(f"{options.log}: no interventions" + (f" of category {options.category}" if options.category else ""))
        return
    header = ["number", "time", "run", "row", "position", "rule", "byte", "mass", "mark", "text"]
    rows = [[*_cells(each), marks.of(each) or "-", _printable(each.text or "-")] for each in latest]
    print(text_table(header, rows))
    if count > len(latest):
        print(f"the latest {len(latest)} of {count}: --limit shows more")


def _interventions(options: argparse.Namespace) -> "Iterator[Intervention]":
    from model.genesis.gate.interventions import Intervention, read_log

    for each in read_log(options.log):
        if isinstance(each, Intervention) and options.category in (None, each.category):
            yield each


def _cells(each: "Intervention") -> list[str]:
    byte = f"{each.byte:#04x}" + (f" {chr(each.byte)}" if 0x20 < each.byte < 0x7F else "")
    time = f"{each.time:%Y-%m-%d %H:%M:%S}"
    names = [_printable(each.run), f"{each.row}", f"{each.position}", _printable(each.rule_id)]
    return [f"{each.number}", time, *names, byte, f"{each.mass:.3f}"]


def _printable(text: str) -> str:
    """Control characters escaped: what a log holds must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _ask(options: argparse.Namespace, marks: "Marks") -> None:
    """Show each unmarked intervention and mark it by the key pressed, at once."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ValueError("--interactive: accepted is a terminal; without one, use --list and --mark")
    with _keys() as read_key:
        for each in _interventions(options):
            if marks.of(each):
                continue
            print("  ".join(_cells(each)), _printable(each.text or ""))
            print(QUESTION, end="", flush=True)
            key = ""
            while key not in ("t", "f", "s", "q"):
                key = read_key().lower() or "q"  # the terminal was closed
            print(key)
            if key == "q":
                return
            if key != "s":
                marks.add([each], "true" if key == "t" else "false")


@contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """A function that reads one key of the terminal, without waiting for the end of its line or showing it."""
    try:
        import termios
        import tty
    except ImportError:  # Windows
        import msvcrt

        yield msvcrt.getwch
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal, termios.TCSADRAIN)  # its default would drop keys that were pressed already
    try:
        yield lambda: sys.stdin.read(1)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _tell_damage(damaged: list, what: str, path: str | Path) -> None:
    if damaged:
        named = "; ".join(f"line {each.number}: {each.reason}" for each in damaged[:NAMED])
        more = f"; and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        lines = (
            "1 line of {} is no {} and was"
            if len(damaged) == 1
            else f"{len(damaged)} lines of {{}} are no {{}}s and were"
        )
        print(f"{lines.format(path, what)} left out: {named}{more}")


def _apply(options: argparse.Namespace, found: "Review") -> None:
    from model.genesis.gate.interventions import policy_text, write_policy
    from model.genesis.gate.policy import DEFAULT, load_policy

    policy = load_policy(*([] if options.policy == DEFAULT else [options.policy]))
    known = {rule.id for rule in policy.rules}
    wrong = []
    for rule in found.rules:
        if not rule.marked:
            continue
        word = "kept"
        if rule.is_wrong(options.false_share, options.min_marks):
            word = "disabled" if rule.rule_id in known else "left alone, for the policy has no such rule"
        if word == "disabled":
            wrong.append(rule)
        print(f"{_printable(rule.rule_id)}: {rule.marks['true']} true, {rule.marks['false']} false: {word}")
    if not wrong:
        least = f"{options.min_marks} marks, {options.false_share:g} of them false"
        print(f"no rule of the policy has at least {least}: {options.apply} is not written")
    elif options.dry_run:
        print(policy_text(_extended(options), wrong), end="")
    else:
        print(f"policy: {write_policy(options.apply, _extended(options), wrong)}")


def _extended(options: argparse.Namespace) -> str:
    """The source policy as the new one names it: the shipped one, or a path from the new file's folder."""
    from model.genesis.gate.policy import DEFAULT

    if options.policy == DEFAULT:
        return options.policy
    source, folder = Path(options.policy).resolve(), Path(options.apply).resolve().parent
    return source.relative_to(folder).as_posix() if source.is_relative_to(folder) else source.as_posix()


def _train(options: argparse.Namespace) -> int:
    from model.evaluation.report import number, pick_device
    from model.genesis.gate.classifier import gate_path, is_gate, read_labelled, train_gate
    from model.training.checkpoint import find_checkpoint, load_checkpoint

    device = pick_device(options.device)
    checkpoint = find_checkpoint(options.checkpoint)
    out = Path(options.out) if options.out else gate_path(checkpoint)
    if out.exists() and not is_gate(out):
        raise ValueError(f"--out {out}: the file is there and no gate; accepted is a new file, or a gate to replace")
    texts, labels, left_out = read_labelled(
        options.labelled, options.positive, options.text_column, options.label_column
    )
    model = load_checkpoint(checkpoint, device)
    whole = [len(text) >= model.config.patch_size for text in texts]
    left_out["shorter than a patch"] = whole.count(False)
    gate, report = train_gate(
        model,
        [text for text, long in zip(texts, whole) if long],
        [label for label, long in zip(labels, whole) if long],
        false_positive_rate=options.false_positive_rate,
        validation_share=options.validation_share,
        window=options.window,
        epochs=options.epochs,
        seed=options.seed,
        progress=sys.stderr.isatty(),
    )
    for reason, count in left_out.items():
        if count:
            print(f"left out: {count} {reason}")
    positives, others = report.validation_positives, report.validation_texts - report.validation_positives
    print(f"trained on {report.training_texts} texts, held out {positives} {options.positive} and {others} others")
    print(f"accuracy {number(report.accuracy)}  precision {number(report.precision)}  recall {number(report.recall)}")
    print(f"ROC-AUC {number(report.roc_auc)}")
    print(f"threshold {report.threshold:.4g}: false-positive rate {number(report.false_positive_rate, 4)}")
    if options.false_positive_rate * others < 1:
        print(
            f"a rate of {options.false_positive_rate:g} cannot be seen in {others} texts: none may pass the threshold"
        )
    print(f"gate: {gate.save(out, model)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
