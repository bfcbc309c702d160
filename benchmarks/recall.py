"""What carries a fact past attention's window? Models of one size on the same recall tasks, mixed into the same text.

    python benchmarks/recall.py --corpus encyclopedia.txt --json recall.json
    python benchmarks/recall.py --variants bytes,window,full --steps 5000 --seq-len 8192
    python benchmarks/recall.py --quick                  # seconds a variant on a CPU; its numbers say nothing

Every variant starts from the same seed and reads the same batches; tasks become harder over the first 40% of the
steps, and the price of writing rises with them, as in a run of the trainer. Plasticity is 1: nothing but the model's
own decay forgets. One table, a line a variant: parameters, all and those in use; needles exactly right by length of the
prompt, in trained phrasings; values exactly right by number of pairs; BPC of held-out text; bytes/s of the training
step and of reading the longest prompts; the streaming state of one row after them. Of a corpus of several stages the
last one is read. docs/diagnostics.md explains the columns.
"""

import argparse
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import several
from model.agiformer import AGIFormer
from model.cli import Parser, guarded, positive
from model.config import AGIFormerConfig
from model.data import ByteStore, CropSampler, load_curriculum, open_store
from model.data.haystack import KEY_BYTES, LANGUAGES
from model.data.recall import MIN_LENGTH, RecallOptions, mix
from model.evaluation.ablation import without_memory
from model.evaluation.answers import percent
from model.evaluation.associative import PAIR_BYTES, PAIRS, check_pairs, pair_accuracy
from model.evaluation.bpc import bits_per_byte
from model.evaluation.needles import DEPTHS, check_needles
from model.evaluation.recall import needle_accuracy
from model.evaluation.report import json_text, number, text_table
from model.files import write_atomically
from model.layers.memory import HebbianMemory
from model.training.distributed import join_workers
from model.training.optimizer import MuonAdamW
from model.training.options import TrainingOptions
from model.training.schedule import learning_rate
from model.training.step import EAGER_STEPS, TrainingStep
from model.training.trainer import DIFFICULT_FROM, amp_dtype

LR = 4e-3
WINDOW = 64  # patches that attention sees in every variant but `full`
HEAD = 64  # channels of a head in the blocks
CONTEXT = 1024  # bytes of a window of held-out text
WARM_UP = EAGER_STEPS + 2  # steps whose time does not count: the eager ones, the capture, the first replay

# What an option is when it is not given: sized for one H100, and with --quick for a look at whether all of it runs.
DEFAULTS = {
    "steps": 2500, "seq_len": 4096, "batch_size": 8, "d_model": 256, "layers": 4, "samples": 10,
    "lengths": (1024, 4096, 16384, 65536), "pairs": PAIRS, "held_out": 2**20,
}  # fmt: skip
QUICK = {
    "steps": 8, "seq_len": 256, "batch_size": 2, "d_model": 64, "layers": 1, "samples": 1,
    "lengths": (192, 512), "pairs": (2, 8), "held_out": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A way to remember.

    Attributes:
        config: what differs from BASE.
        priced: whether writing into the byte memory costs something in training.
        silenced: trained and read without the blocks' memory.
        full: attention sees everything, in training and in reading.
    """

    config: dict[str, Any] = field(default_factory=dict)
    priced: bool = True
    silenced: bool = False
    full: bool = False


BASE = {"window": WINDOW, "plasticity": 1.0, "memory_rule": "hebbian"}
BYTES = {"recall_heads": 1, "recall_dim": 64, "recall_key_dim": 256, "recall_span": 4, "recall_rule": "delta"}
NO_BYTES = {"recall_heads": 0}
VARIANTS = {
    "bytes": Variant(BYTES),
    "bytes-hebbian": Variant(BYTES | {"recall_rule": "hebbian"}),
    "bytes-span1": Variant(BYTES | {"recall_span": 1}),
    "bytes-2": Variant(BYTES | {"recall_heads": 2}),
    "bytes-square": Variant(BYTES | {"recall_heads": 4, "recall_key_dim": 64}),
    "bytes-text": Variant(BYTES | {"recall_text_heads": 1}),
    "bytes-free": Variant(BYTES, priced=False),
    "blocks": Variant(NO_BYTES),
    "blocks-delta": Variant(NO_BYTES | {"memory_rule": "delta"}),
    "window": Variant(NO_BYTES, silenced=True),
    "full": Variant(NO_BYTES, silenced=True, full=True),
}


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────


def training_config(variant: Variant, arguments: argparse.Namespace) -> AGIFormerConfig:
    """The shape of a variant's model."""
    D = arguments.d_model
    config = AGIFormerConfig(
        d_model=D,
        n_layers=arguments.layers,
        n_heads=max(1, D // HEAD),
        byte_dim=max(4, D // 2),
        ffn_dim=4 * D,
        reasoning_dim=4 * D,
        head_dim=D,
        **(BASE | variant.config),
    )
    return with_everything_in_sight(config, arguments.seq_len) if variant.full else config


def reading_config(variant: Variant, arguments: argparse.Namespace) -> AGIFormerConfig:
    """The same for reading: weights do not depend on the window, so that full attention can go on to see everything."""
    config = training_config(variant, arguments)
    asked = max(arguments.pairs) * PAIR_BYTES + len("?abc=") + len("731")
    longest = max(*measured_lengths(arguments), asked, CONTEXT) + KEY_BYTES
    return with_everything_in_sight(config, longest) if variant.full else config


def with_everything_in_sight(config: AGIFormerConfig, size: int) -> AGIFormerConfig:
    """A window as long as a text of `size` bytes and what stands before its first patch."""
    try:
        return replace(config, window=-(-size // config.patch_size) + 1)
    except ValueError as error:
        raise ValueError(f"variant full, {size} bytes: {error}") from None


def memories(model: AGIFormer) -> list[HebbianMemory]:
    """The blocks' memories."""
    return [module for module in model.modules() if isinstance(module, HebbianMemory)]


def make_model(variant: Variant, arguments: argparse.Namespace, device: torch.device) -> AGIFormer:
    """A new model; what a silenced memory weighs does not learn, nor does weight decay shrink it."""
    torch.manual_seed(arguments.seed)
    model = AGIFormer(training_config(variant, arguments)).to(device)
    if variant.silenced:
        for memory in memories(model):
            memory.requires_grad_(False)
    return model


def silence(variant: Variant, model: AGIFormer):
    """A context in which a silenced variant's memories hand on nothing."""
    return without_memory(model) if variant.silenced else nullcontext()


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Stopwatch:
    """Times of single steps; on CUDA by events, so that the host does not wait for any of them."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        began = self._mark()
        yield
        self.marks.append((began, self._mark()))

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[float]:
        """Of every step."""
        if not self.cuda:
            return [ended - began for began, ended in self.marks]
        torch.cuda.synchronize()
        return [began.elapsed_time(ended) / 1000 for began, ended in self.marks]


def tasks_of(arguments: argparse.Namespace) -> RecallOptions:
    """The tasks of a run that is about recall and not about its text: answers may weigh as much as a row of it."""
    return RecallOptions(arguments.share, answer_limit=1.0)


def train(
    name: str, model: AGIFormer, arguments: argparse.Namespace, store: ByteStore, device: torch.device
) -> dict[str, Any]:
    """Train a model in place → what it cost."""
    variant, steps = VARIANTS[name], arguments.steps
    tasks = tasks_of(arguments)
    sampler = CropSampler(store, arguments.seq_len, arguments.batch_size, arguments.seed)
    price = TrainingOptions.write_price if variant.priced else 0.0
    step = TrainingStep(
        model,
        MuonAdamW(model, weight_decay=TrainingOptions.weight_decay),
        amp_dtype=amp_dtype("auto", device),
        clip_norm=TrainingOptions.clip,
        graph=True,
        priced=price > 0,
    )
    model.train()
    watch, began = Stopwatch(device), time.perf_counter()
    with silence(variant, model):
        for i in tqdm(range(steps), desc=name, unit="step", file=sys.stderr):
            step.optimizer.set_lr(learning_rate(i, steps, LR, TrainingOptions.warmup, TrainingOptions.decay))
            difficulty = min(1.0, i / max(1.0, DIFFICULT_FROM * steps))
            step.write_price.fill_(price * difficulty)
            batch, weights = mix(sampler.next(), tasks, difficulty=difficulty, seed=arguments.seed, index=i)
            if device.type == "cuda":
                batch, weights = batch.pin_memory(), weights.pin_memory()
            with watch.running():
                step.run(batch, weights)
    times = watch.seconds()
    settled = times[min(WARM_UP, steps - 1) :]
    return {
        "write_price": price if step.priced else None,
        "training_bytes_per_second": arguments.batch_size * arguments.seq_len / statistics.median(settled),
        "training_seconds": time.perf_counter() - began,
        "skipped_steps": int(step.optimizer.skipped),
    }


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def measured_lengths(arguments: argparse.Namespace) -> list[int]:
    """Of the prompts: those asked for, and the length that was trained on."""
    return sorted({*arguments.lengths, arguments.seq_len})


def read(
    name: str, model: AGIFormer, arguments: argparse.Namespace, store: ByteStore, device: torch.device
) -> dict[str, Any]:
    """What a trained model recalls, what it has learned of the text, and what reading costs."""
    variant = VARIANTS[name]
    config = reading_config(variant, arguments)
    if config != model.config:
        weights, model = model.state_dict(), AGIFormer(config).to(device)
        model.load_state_dict(weights)
    with silence(variant, model):
        print(f"{name}: reading", file=sys.stderr, flush=True)
        shared = {"samples": arguments.samples, "seed": arguments.seed, "ablation": False}
        needles = needle_accuracy(model, measured_lengths(arguments), **shared)
        pairs = pair_accuracy(model, arguments.pairs, **shared)
        text = bits_per_byte(
            model, store.val, context=CONTEXT, max_bytes=arguments.held_out, amp_dtype=amp_dtype("auto", device)
        )
    longest = needles.cells[-1].cost
    return {
        "bpc": text.bpc,
        "bpc_rule": text.context,
        "reading_bytes_per_second": longest.bytes_per_second,
        "state_bytes": longest.state_bytes - (unused_state_bytes(config) if variant.silenced else 0),
        "reading_window": config.window,
        "needle": needles.to_dict(),
        "pairs": pairs.to_dict(),
    }


def unused_state_bytes(config: AGIFormerConfig) -> int:
    """Of a stream's row, what its silenced memories write: M [H, E, E] and z [H, E] a block, float32."""
    E = config.d_model // config.n_heads
    return 4 * config.n_layers * config.n_heads * E * (E + 1)


def measure(name: str, arguments: argparse.Namespace, store: ByteStore, device: torch.device) -> dict[str, Any]:
    """Train and read one variant → its row, as plain values."""
    variant = VARIANTS[name]
    model = make_model(variant, arguments, device)
    total = model.parameter_count()
    row = {
        "variant": name,
        "parameters": total,
        "parameters_in_use": total - sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "window": model.config.window,
        "config": model.config.to_dict(),
    }
    return row | train(name, model, arguments, store, device) | read(name, model, arguments, store, device)


# ── report ───────────────────────────────────────────────────────────────────────────────────────────────────────


def table(rows: list[dict[str, Any]], seq_len: int) -> str:
    """One line a variant; needles and pairs in percent."""
    needles, pairs = (rows[0][task]["cells"] for task in ("needle", "pairs"))
    header = ["variant", "M parameters", "in use"]
    header += [f"needle {c['length']}" + (" (trained)" if c["length"] == seq_len else "") for c in needles]
    header += [f"pairs {cell['pairs']}" for cell in pairs]
    header += ["BPC", "training MB/s", "reading MB/s", "state kB"]
    return text_table(
        header,
        [
            [
                row["variant"],
                *(number(row[count] / 1e6, 2) for count in ("parameters", "parameters_in_use")),
                *(percent(cell["trained"]) for cell in row["needle"]["cells"]),
                *(percent(cell["accuracy"]) for cell in row["pairs"]["cells"]),
                number(row["bpc"] if math.isfinite(row["bpc"]) else None),
                *(f"{row[f'{what}_bytes_per_second'] / 1e6:.3g}" for what in ("training", "reading")),
                number(row["state_bytes"] / 1000, 0),
            ]
            for row in rows
        ],
    )


def notes(rows: list[dict[str, Any]], arguments: argparse.Namespace, settings: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know, a line each."""
    lines = [
        f"{settings['machine']}; {arguments.steps} steps of {arguments.batch_size} × {arguments.seq_len} bytes, tasks "
        f"in {arguments.share:g} of the rows; BPC in {rows[0]['bpc_rule']}; {settings['corpus']}"
    ]
    if quiet := [row["variant"] for row in rows if VARIANTS[row["variant"]].silenced]:
        lines.append(
            f"the blocks' memory is silenced in {', '.join(quiet)}, in training and in reading: its weights are there "
            "and unused, and the time of its forward pass is in the speeds"
        )
    if full := next((row for row in rows if VARIANTS[row["variant"]].full), None):
        lines.append(
            f"full: a window of {full['window']} patches in training and of {full['reading_window']} in reading, which "
            f"is everything. Prompts of more than {arguments.seq_len} bytes are out of the range that it was trained "
            "on. Its state, all keys and values, grows with the text: "
            f"here it is that after {measured_lengths(arguments)[-1]} bytes"
        )
    lines += [f"{row['variant']}: {row['skipped_steps']} steps skipped" for row in rows if row["skipped_steps"]]
    return lines


def machine(device: torch.device) -> str:
    """What it runs on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU {platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return f"{name}, torch {torch.__version__}"


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    return guarded("recall.py", lambda: run(arguments))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="recall.py", description=__doc__)
    add = parser.add_argument
    add("--variants", metavar="A,B", help=f"of {', '.join(VARIANTS)} (default: all)")
    add("--corpus", default="pydoc", metavar="FILE", help="a text, or a curriculum; its last stage (default: pydoc)")
    add("--share", type=float, default=0.5, help="of a batch's rows that get tasks (default: 0.5)")
    add("--steps", type=positive, help="of training (default: 2500)")
    add("--seq-len", type=positive, help="bytes of a row (default: 4096)")
    add("--batch-size", type=positive, help="rows of a step (default: 8)")
    add("--d-model", type=positive, help="width (default: 256)")
    add("--layers", type=positive, help="blocks (default: 4)")
    add("--lengths", type=several, metavar="N,N", help="bytes of a needle's prompt (default: 1024,4096,16384,65536)")
    add("--pairs", type=several, metavar="N,N", help="pairs in a list (default: 8,16,32,64,128,256)")
    add("--samples", type=positive, help="prompts a length and depth, and lists a number of pairs (default: 10)")
    add("--seed", type=int, default=0, help="of all random choices (default: 0)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--quick", action="store_true", help="small sizes for whatever is not given: to see that all of it runs")
    add("--json", metavar="FILE", help="write the numbers there too, after every variant")
    arguments = parser.parse_args(argv)
    for name, value in (QUICK if arguments.quick else DEFAULTS).items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    return arguments


def run(arguments: argparse.Namespace) -> int:
    names = list(VARIANTS) if arguments.variants is None else arguments.variants.split(",")
    check(names, arguments)
    workers, device = join_workers(arguments.device)
    if workers.size > 1:
        raise ValueError(f"{workers.size} workers: accepted is one, without torchrun")
    if arguments.quick:
        torch.set_num_threads(1)  # threads that share busy cores make tensors this small many times slower
    store = open_store(load_curriculum(arguments.corpus).stages[-1].source)
    settings = {
        "machine": machine(device),
        "corpus": f"{store.meta['name']}, {len(store.train)} bytes to train on, {len(store.val)} held out",
        "settings": vars(arguments),
    }
    rows = []
    for name in names:
        rows.append(measure(name, arguments, store, device))
        print(table(rows[-1:], arguments.seq_len), file=sys.stderr, flush=True)
        if arguments.json:
            write_atomically(arguments.json, json_text(settings | {"rows": rows}).encode())
    print(table(rows, arguments.seq_len) + "\n")
    print("\n".join(notes(rows, arguments, settings)))
    return 0


def check(names: list[str], arguments: argparse.Namespace) -> None:
    """Raise ValueError for what cannot be trained, asked or written, before anything is made."""
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ValueError(f"--variants {unknown[0]}: accepted are {', '.join(VARIANTS)}")
    if arguments.json and Path(arguments.json).is_dir():
        raise ValueError(f"--json {arguments.json}: it is a folder; accepted is a file")
    if arguments.seq_len < MIN_LENGTH:
        raise ValueError(f"--seq-len {arguments.seq_len}: accepted is at least {MIN_LENGTH}, which a task needs")
    if arguments.seed < 0:
        raise ValueError(f"--seed {arguments.seed}: accepted is an integer ≥ 0")
    tasks_of(arguments)
    check_needles(measured_lengths(arguments), arguments.samples, DEPTHS, tuple(LANGUAGES))
    check_pairs(arguments.pairs)
    for name in names:
        reading_config(VARIANTS[name], arguments)


if __name__ == "__main__":
    sys.exit(main())
