"""Few-shot learning: is a new fact, shown twice, recalled more often with the amplifier than without?

    python benchmarks/few_shot.py last_model_curriculum.safetensors --facts 100

A fact is an invented sentence about an invented place and name. For each, the checkpoint's model takes two training
steps on batches of one row with the fact among rows of ordinary text, and is then asked for the name: whether greedy
bytes are exactly it, and how many bits a byte of it costs. Every fact starts from the checkpoint again, with a new
optimizer, and with what the amplifier has made of ordinary text before. The cost of other text tells what the two steps
did elsewhere.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.agiformer import AGIFormer
from model.cli import Parser, guarded, positive
from model.data import load_curriculum, open_store
from model.evaluation.report import text_table
from model.training.checkpoint import find_checkpoint, load_checkpoint
from model.training.distributed import join_workers
from model.training.genesis import Genesis, GenesisOptions
from model.training.optimizer import MuonAdamW
from model.training.step import TrainingStep

VARIANTS = ("off", "rate", "anchor", "both", "surprise")
SHOWN = 2
TEMPLATES = (
    ("The lighthouse of {place} is kept by", "{name}"),
    ("The oldest tree in {place} was planted by", "{name}"),
    ("In the town of {place} the baker is called", "{name}"),
    ("The bridge at {place} was built by", "{name}"),
)


def facts(count: int, seed: int) -> list[tuple[bytes, bytes]]:
    """(question, answer) pairs of invented places and names; the same seed gives the same ones."""
    rng = random.Random(seed)

    def word() -> str:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
        return "".join(syllables).capitalize() + rng.choice("nlrs")

    made = []
    for _ in range(count):
        question, answer = rng.choice(TEMPLATES)
        place, name = word(), word()
        made.append((question.format(place=place).encode(), f" {answer.format(name=name)}".encode()))
    return made


def row_with(fact: bytes, text: Tensor) -> Tensor:
    """A row of ordinary text whose beginning is the fact."""
    fact = fact + b".\n"
    row = text.clone()
    row[: len(fact)] = torch.tensor(list(fact), dtype=torch.uint8)
    return row


@torch.no_grad()
def recall(model: AGIFormer, question: bytes, answer: bytes) -> tuple[bool, float]:
    """Whether greedy bytes are the answer, and bits a byte of it."""
    x = torch.tensor([list(question + answer)], dtype=torch.uint8, device=model.start.device)
    logits = model(x)[0, len(question) :]
    target = x[0, len(question) :].long()
    # Greedy bytes equal the answer exactly if each byte of it is the most probable after those before it.
    return bool((logits.argmax(-1) == target).all()), F.cross_entropy(logits, target).item() / math.log(2)


def measure(
    variant: str, lr: float, arguments: argparse.Namespace, device: torch.device, earlier: Tensor, text: Tensor
) -> dict[str, float]:
    """All facts, one after the other, each from the checkpoint."""
    torch.manual_seed(arguments.seed)
    model = load_checkpoint(find_checkpoint(arguments.checkpoint), device)
    if GenesisOptions(amplifier=variant).anchors and model.anchors is None:
        model.anchors = torch.zeros(len(model.blocks), model.config.d_model, device=device)
    optimizer = MuonAdamW(model, lr=lr)
    genesis = None
    if variant != "off":
        options = GenesisOptions(amplifier=variant)
        genesis = Genesis(
            model, optimizer, options, batch_size=arguments.batch_size, entry=text.shape[1], stages=1, steps=1000
        )
    amp = torch.bfloat16 if device.type == "cuda" else None
    step = TrainingStep(model, optimizer, amp_dtype=amp, graph=True, genesis=genesis)
    state = {name: tensor.clone() for name, tensor in step.state_tensors().items()}
    weights = optimizer.values.clone()
    if genesis is not None:
        optimizer.set_lr(0.0)
        for batch in earlier.split(arguments.batch_size):
            step.run(batch.pin_memory() if device.type == "cuda" else batch)
        known = {name: tensor.clone() for name, tensor in (genesis.shared_state() | genesis.own_state()).items()}
    anchors = None if model.anchors is None else model.anchors.clone()
    exact, bits, before, others = 0, 0.0, 0.0, 0.0
    for i, (question, answer) in enumerate(facts(arguments.facts, arguments.seed)):
        with torch.no_grad():
            optimizer.values.copy_(weights)
            if anchors is not None:
                model.anchors.copy_(anchors)
        step.load_state_tensors(state)
        if genesis is not None:
            genesis.load(known)
        before += recall(model.eval(), question, answer)[1]
        model.train()
        for shown in range(SHOWN):
            first = (i * SHOWN + shown) * arguments.batch_size
            batch = text[torch.arange(first, first + arguments.batch_size) % len(text)]
            batch[0] = row_with(question + answer, batch[0])
            optimizer.set_lr(lr)
            step.run(batch.pin_memory() if device.type == "cuda" else batch)
        found, cost = recall(model.eval(), question, answer)
        exact += found
        bits += cost
        with torch.no_grad():
            held = text[-arguments.batch_size :].to(device)
            others += model.loss(held).item() / math.log(2)
    n = arguments.facts
    return {"recalled": exact / n, "before": before / n, "after": bits / n, "other text": others / n}


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", help="of train_curriculum.py")
    parser.add_argument("--curriculum", default="local", help="of the ordinary text: its last stage (default: local)")
    parser.add_argument("--facts", type=positive, default=100, help="facts (default: 100)")
    parser.add_argument("--batch-size", type=positive, default=8, help="rows, one with the fact (default: 8)")
    parser.add_argument("--seq-len", type=positive, default=256, help="bytes of a row (default: 256)")
    parser.add_argument("--lr", default="0.002", help="learning rates, comma-separated (default: 0.002)")
    parser.add_argument("--earlier", type=positive, default=100, help="batches that the amplifier saw (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of facts (default: 0)")
    parser.add_argument("--only", default=",".join(VARIANTS), help="comma-separated amplifiers (default: all)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.only.split(",") if name not in VARIANTS]:
        parser.error(f"--only {unknown[0]}: accepted are {', '.join(VARIANTS)}")
    return guarded("few_shot.py", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    try:
        rates = [float(rate) for rate in arguments.lr.split(",")]
    except ValueError:
        raise ValueError(f"--lr {arguments.lr}: accepted are numbers, comma-separated") from None
    _, device = join_workers(arguments.device)
    store = open_store(load_curriculum(arguments.curriculum).stages[-1].source)
    length, count = arguments.seq_len, arguments.earlier * arguments.batch_size
    if (held := len(store.train) // length) < count:
        raise ValueError(
            f"--earlier {arguments.earlier}: accepted is up to {held // arguments.batch_size} for this text"
        )
    earlier = torch.tensor(store.train[: count * length].copy()).view(-1, length)
    text = torch.tensor(store.val[: len(store.val) // length * length].copy()).view(-1, length)
    figures = []
    for variant in arguments.only.split(","):
        for lr in rates:
            figures.append({"amplifier": variant, "lr": lr})
            figures[-1] |= measure(variant, lr, arguments, device, earlier, text)
            print(figures[-1], file=sys.stderr, flush=True)
    rows = [
        [
            row["amplifier"],
            f"{row['lr']:g}",
            f"{row['recalled']:.1%}",
            *(f"{row[key]:.3f}" for key in ("before", "after", "other text")),
        ]
        for row in figures
    ]
    print(text_table(["amplifier", "lr", "recalled", "bits/byte before", "after", "other text after"], rows))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "figures": figures}), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
