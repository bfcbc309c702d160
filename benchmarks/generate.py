"""How fast a model reads and writes, by rows at once and by length of what it has read.

    python benchmarks/generate.py --json generate.json                  # 1, 16 and 256 rows after 1 KB and 1 MB
    python benchmarks/generate.py --device cpu --threads 2 --preset nano
    python benchmarks/generate.py --batch-size 1 --contexts 1024,65536,1048576 --what stream
    python benchmarks/generate.py --quick                               # seconds on a CPU; its numbers say nothing

`stream` is a ByteStream that is fed what is drawn from it, with nothing else in the way; `graphs` are the fused steps,
drawing included, as CUDA graphs, on a card; `generate` is model.inference.generate as a user calls it: valid UTF-8, the
default policy's gate, bytes given out as they come. Read is random text, and a new model is as fast as a trained one.
docs/performance.md explains the columns.
"""

import argparse
import random
import string
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import machine
from benchmarks.machine import Report, Row
from model.agiformer import AGIFormer
from model.cli import Parser, guarded, positive
from model.genesis.gate.automaton import compile_policy
from model.genesis.gate.byte_gate import ByteGate
from model.genesis.gate.policy import Policy
from model.inference import draw
from model.inference.generate import generate
from model.inference.sampling import sample
from model.inference.stream import ByteStream
from model.inference.write import Draws, Writers, refused
from model.training.checkpoint import find_checkpoint, load_checkpoint

WHAT = ("stream", "graphs", "generate")
TEMPERATURE = 0.8
PIECE = 2**16  # bytes of a row that are fed at once while reading
SEED = 0

DEFAULTS = {"repeats": 10, "contexts": (2**10, 2**20), "bytes": 256}
QUICK = {"repeats": 3, "contexts": (64, 256), "bytes": 8, "batch_size": (1, 2)}


def words(size: int) -> bytes:
    """Random letters and spaces."""
    return "".join(random.Random(SEED).choices(string.ascii_lowercase + "    ", k=size)).encode()


def measure_stream(model: AGIFormer, batch: int, context: int, arguments: argparse.Namespace) -> Row:
    """Reading, writing, and the two kinds of step of a ByteStream."""
    device = model.start.device
    x = torch.frombuffer(bytearray(words(context)), dtype=torch.uint8).expand(batch, -1)
    stream = ByteStream(model, batch)

    def read() -> None:
        for piece in x.split(PIECE, 1):
            stream.feed(piece)
        machine.synchronize(device)

    ByteStream(model, batch).feed(x[:, :PIECE])  # what is set up once is not the reading's
    machine.synchronize(device)
    machine.start_peak(device)
    (reading,) = machine.seconds(read, 1)
    row: Row = {"reading_seconds": reading, "read_bytes_per_second": batch * context / reading}
    generator = torch.Generator(device).manual_seed(SEED)

    def write() -> None:
        drawn = []
        for _ in range(arguments.bytes):
            drawn.append(sample(stream.logits(), temperature=TEMPERATURE, generator=generator))
            stream.feed(drawn[-1].unsqueeze(1))
        torch.stack(drawn).cpu()  # to be shown

    times = machine.seconds(write, arguments.repeats, warm_up=1)
    row |= {"seconds": times, "bytes_per_second": machine.speeds(batch * arguments.bytes, times)}
    row |= steps(stream, arguments.repeats)
    return row | {"state_bytes": stream.state_bytes() / batch, "peak_bytes": machine.peak_bytes(device)}


def steps(stream: ByteStream, repeats: int) -> Row:
    """Milliseconds of feeding a byte that completes a patch, and one that does not, each waited for."""
    P, took = stream.model.config.patch_size, {"patch": [], "byte": []}
    byte = torch.full((stream.batch_size, 1), ord("e"), device=stream.device)

    def feed() -> None:
        stream.feed(byte)
        machine.synchronize(stream.device)

    for _ in range(P * repeats):
        took["byte" if (stream.position + 1) % P else "patch"] += machine.seconds(feed, 1)
    # Patches of one byte have no steps in between.
    return {f"{kind}_step_ms": [1000 * t for t in machine.quartiles(times)] for kind, times in took.items() if times}


def measure_graphs(model: AGIFormer, batch: int, context: int, arguments: argparse.Namespace) -> Row:
    """Writing in graphs: any bytes, no gate, and nothing given out."""
    device = model.start.device
    x = torch.frombuffer(bytearray(words(context)), dtype=torch.uint8).expand(batch, -1)
    stream = ByteStream(model, batch)
    for piece in x.split(PIECE, 1):
        stream.feed(piece)
    machine.start_peak(device)
    rows = [draw.Row(i, b"", sys.maxsize, (), False) for i in range(batch)]
    part = draw.RowStream(stream, rows, torch.arange(batch, device=device))
    if (reason := refused([part])) is not None:
        raise ValueError(f"--what graphs: {reason}")
    draws = Draws(TEMPERATURE, None, None, torch.Generator(device).manual_seed(SEED))
    writers = Writers([part], [ByteGate(compile_policy(Policy()), batch, device)], draws, batch, None)
    begun = 0

    def write() -> None:
        nonlocal begun
        end = begun + arguments.bytes
        while begun < end:
            last = min(begun + writers.ahead, end)
            run = writers.begin(begun, last)
            begun = last
        run.wait()

    times = machine.seconds(write, arguments.repeats, warm_up=1)
    row = {"seconds": times, "bytes_per_second": machine.speeds(batch * arguments.bytes, times)}
    return row | {"peak_bytes": machine.peak_bytes(device)}


def measure_generate(model: AGIFormer, batch: int, context: int, arguments: argparse.Namespace) -> Row:
    """Writing by `generate`: bytes are counted as they are given out."""
    machine.start_peak(model.start.device)
    size = batch * arguments.bytes
    rounds = arguments.repeats + 1  # the first warms up
    # A few more: what may begin a character or a match is held back.
    pieces = generate(
        model,
        words(context),
        max_bytes=rounds * arguments.bytes + 64,
        temperature=TEMPERATURE,
        seed=SEED,
        batch=batch,
    )
    given = 0

    def write() -> None:
        nonlocal given
        while given < size:
            given += len(next(pieces).data)
        given -= size

    times = machine.seconds(write, arguments.repeats, warm_up=1)
    row = {"seconds": times, "bytes_per_second": machine.speeds(size, times)}
    return row | {"peak_bytes": machine.peak_bytes(model.start.device)}


MEASURES = {"stream": measure_stream, "graphs": measure_graphs, "generate": measure_generate}


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────


def against_first(row: Row) -> str:
    """By how many percent it is slower or faster than after the first context."""
    change = row.get("change")
    return "-" if change is None else f"{100 * change:+.1f}"


COLUMNS: machine.Columns = {
    "what": machine.text("what"),
    "rows": machine.text("batch_size"),
    "context": machine.text("context"),
    "reading bytes/s": machine.cell("read_bytes_per_second"),
    "bytes/s": machine.middle("bytes_per_second"),
    "quartiles": machine.spread("bytes_per_second"),
    "against first %": against_first,
    "patch step ms": machine.middle("patch_step_ms"),
    "byte step ms": machine.middle("byte_step_ms"),
    "state kB/row": machine.cell("state_bytes", 1e-3),
    "peak GiB": machine.fixed("peak_bytes", 2, 2**-30),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="generate.py", description=__doc__)
    add = parser.add_argument
    add("--what", metavar="A,B", help=f"of {', '.join(WHAT)} (default: all; graphs on CUDA only)")
    add("--checkpoint", help="default: a new model of --preset")
    add("--preset", help="nano, small, base or large (default: small on CUDA, else nano)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of a new model")
    add("--batch-size", type=machine.several, metavar="N,N", help="rows at once (default: 1,16,256; 1 on a CPU)")
    add("--contexts", type=machine.several, metavar="N,N", help="bytes read before (default: 1024,1048576)")
    add("--bytes", type=positive, metavar="N", help="of a row written in each repeat (default: 256)")
    return machine.read_arguments(parser, argv, DEFAULTS, QUICK)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    return guarded("generate.py", lambda: run(arguments))


def make_model(arguments: argparse.Namespace, device: torch.device) -> AGIFormer:
    """The model that is measured."""
    if arguments.checkpoint:
        if arguments.preset or arguments.set:
            raise ValueError("--checkpoint: accepted without --preset and --set, as it has a shape of its own")
        return load_checkpoint(find_checkpoint(arguments.checkpoint), device).eval()
    config = machine.model_config(arguments, device)
    torch.manual_seed(SEED)
    return AGIFormer(config).to(device).eval()


def run(arguments: argparse.Namespace) -> int:
    device = machine.set_up(arguments)
    card = device.type == "cuda"
    what = ",".join(name for name in WHAT if card or name != "graphs")
    machine.fill_in(arguments, {"batch_size": (1, 16, 256) if card else (1,), "what": what})
    names = machine.chosen("--what", arguments.what, list(WHAT))
    model = make_model(arguments, device)
    report = Report(arguments, device, COLUMNS)
    report.more["config"] = model.config.to_dict()
    for what in names:
        for batch in arguments.batch_size:
            first = None
            for context in arguments.contexts:
                row = {"what": what, "batch_size": batch, "context": context}
                found, told = machine.attempt(partial(MEASURES[what], model, batch, context, arguments))
                machine.release()
                row |= (found or {}) | told
                if found:
                    first = first or row
                    row["change"] = row["bytes_per_second"][1] / first["bytes_per_second"][1] - 1
                report.add(row)
    about = arguments.checkpoint or machine.model_name(arguments)
    report.notes = [
        f"{about}, {model.parameter_count() / 1e6:.2f} M parameters; bytes/s of all rows together, in repeats of "
        f"{arguments.bytes} bytes a row"
    ]
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
