"""Whether a byte costs the same in a long sequence as in a short one: time and memory at equal bytes a step.

    python benchmarks/scaling.py --json scaling.json                    # 1 KB to 256 KB, 256 KB a step
    python benchmarks/scaling.py --seq-len 1024,16384 --bytes 65536 --what genesis
    python benchmarks/scaling.py --quick                                # seconds on a CPU; its numbers say nothing

The trainer is that of benchmarks/train.py. Without GENESIS by default: a step rehearses one row at least, which is
nothing beside 256 short rows and as much again beside one long one. docs/performance.md explains the columns.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, train
from benchmarks.machine import Report, Row
from model.cli import Parser, guarded, positive

DEFAULTS = {"repeats": 20, "seq_len": tuple(2**n for n in range(10, 19)), "bytes": 2**18}
QUICK = {"repeats": 3, "seq_len": (32, 64, 128), "bytes": 128}


COLUMNS: machine.Columns = {
    "bytes a row": machine.text("seq_len"),
    "rows": machine.text("batch_size"),
    "ms/step": machine.cell("step_ms"),
    "MB/s": machine.middle("bytes_per_second", 1e-6),
    "ns/byte": machine.middle("seconds_per_byte", 1e9),
    "quartiles": machine.spread("seconds_per_byte", 1e9),
    "time ratio": machine.fixed("time_ratio", 3),
    "peak GiB": machine.fixed("peak_bytes", 2, 2**-30),
    "peak kB/byte": machine.cell("peak_per_byte", 1e-3),
    "memory ratio": machine.fixed("memory_ratio", 3),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="scaling.py", description=__doc__)
    train.add_model_arguments(parser)
    add = parser.add_argument
    add("--what", default="plain", metavar="A", help=f"one of {', '.join(train.WHAT)} (default: plain)")
    add("--seq-len", type=machine.several, metavar="N,N", help="bytes of a row (default: 1024 to 262144, doubling)")
    add("--bytes", type=positive, metavar="N", help="of a step (default: 262144)")
    return machine.read_arguments(parser, argv, DEFAULTS, QUICK)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    return guarded("scaling.py", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    what = machine.chosen("--what", arguments.what, list(train.WHAT))
    if len(what) > 1:
        raise ValueError(f"--what {arguments.what}: accepted is one of {', '.join(train.WHAT)}")
    for length in arguments.seq_len:
        if arguments.bytes % length or length < 2:
            raise ValueError(f"--seq-len {length}: accepted is a divisor of --bytes, {arguments.bytes}, from 2 on")
    device = machine.set_up(arguments)
    report = Report(arguments, device, COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        shape = argparse.Namespace(**vars(arguments) | {"seq_len": max(arguments.seq_len)})
        base = train.base_setting(shape, device, folder, what[0], arguments.bytes // max(arguments.seq_len))
        arguments.preset = shape.preset
        report.more = {"config": base.config.to_dict()}
        for length in arguments.seq_len:
            setting = replace(base, seq_len=length, batch_size=arguments.bytes // length)
            found, told = machine.attempt(partial(train.measure, setting, device, arguments.repeats))
            machine.release()
            row = {"what": what[0], "seq_len": length, "batch_size": setting.batch_size}
            report.add(compared(row | (found or {}) | told, report.rows, arguments.bytes))
    report.notes = [
        f"{machine.model_name(arguments)}, {what[0]}, {arguments.bytes} bytes a step, amp {base.amp}; "
        "ratios are to the first line that was measured"
    ]
    return report.finish()


def compared(row: Row, before: list[Row], size: int) -> Row:
    """A row with what a byte costs in it, and how many times as much that is as in the first one measured."""
    if "step_seconds" not in row:
        return row
    row["seconds_per_byte"] = [time / size for time in machine.quartiles(row["step_seconds"])]
    if row["peak_bytes"] is not None:
        row["peak_per_byte"] = row["peak_bytes"] / size
    first = next((other for other in before if "step_seconds" in other), row)
    row["time_ratio"] = row["seconds_per_byte"][1] / first["seconds_per_byte"][1]
    if "peak_per_byte" in row:
        row["memory_ratio"] = row["peak_per_byte"] / first["peak_per_byte"]
    return row


if __name__ == "__main__":
    sys.exit(main())
