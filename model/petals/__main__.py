"""The petals of a checkpoint: what each is, and freezing and unfreezing by hand.

python -m model.petals list last_model_curriculum.safetensors
python -m model.petals unfreeze last_model_curriculum.safetensors --petal 'blocks.0.*' --petal blocks.1.hull.groups.0:3
python -m model.petals freeze last_model_curriculum.safetensors --petal all --mode cryogenic --out frozen.safetensors

Training goes on from the changed file with train_curriculum.py --resume.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from model.cli import Parser, guarded

if TYPE_CHECKING:
    from torch import Tensor

    from model.agiformer import AGIFormer
    from model.layers.hull import PetalGroup

STATE_DICTS = (".pth", ".pt")  # weights alone, and never written


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for bad arguments and unreadable input."""
    options = _parse(argv)
    return guarded("petals", lambda: _list(options) if options.action == "list" else _change(options))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m model.petals", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="list | unfreeze | freeze")
    listing = actions.add_parser("list", help="a table of all petals")
    thawing = actions.add_parser("unfreeze", help="make solid petals fluid again, and warm")
    freezing = actions.add_parser("freeze", help="make petals solid")
    for action in (listing, thawing, freezing):
        action.add_argument("checkpoint", help="a file, or the bare name of one in checkpoints/")
    for action in (thawing, freezing):
        action.add_argument(
            "--petal",
            action="append",
            required=True,
            metavar="PATTERN",
            help="ids as `list` shows them, with * and ? as in a shell, or all; repeatable",
        )
        action.add_argument("--out", help="write there instead of changing the checkpoint")
    freezing.add_argument(
        "--mode", choices=("cryogenic", "chrysalis"), default="cryogenic", help="slowed down, or without gradients"
    )
    return parser.parse_args(argv)


def _list(options: argparse.Namespace) -> int:
    from model.evaluation.report import number, text_table
    from model.petals.crystallization import STATUSES, learning_weights, petal_groups, petal_id

    _, model, tensors, _ = _load(options)
    words = {status: word for word, status in STATUSES.items()}
    rows, solid = [], 0
    for path, group in petal_groups(model).items():
        temperatures = _temperatures(model, group, tensors)
        shares = tensors.get(f"crystallization.share.{path}")
        weights = sum(weight[0].numel() for weight in group.petal_parameters().values())
        asleep = "" if learning_weights(group) else ", in a frozen tree"
        for i, status in enumerate(group.status.tolist()):
            share = None if shares is None or shares[i] < 0 else shares[i].item()  # below 0: never observed
            temperature = None if temperatures is None else temperatures[i].item()
            word = words.get(status, f"status {status}") + asleep
            rows.append([petal_id(path, i), word, number(temperature), number(share), f"{weights}"])
            solid += status != STATUSES["fluid"]
    print(text_table(["petal", "status", "temperature", "crystallized", "weights"], rows))
    print(f"{solid} of {len(rows)} petals solid")
    return 0


def _temperatures(model: "AGIFormer", group: "PetalGroup", tensors: dict[str, "Tensor"]) -> "Tensor | None":
    """Mean temperature of each petal's weights, [n]; None when the checkpoint has none of the group."""
    import torch

    from model.kernels.viscoelastic import DEGREES

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = []
    for weight in group.petal_parameters().values():
        name = names[id(weight)]
        if (stored := tensors.get(f"optimizer.temperature.{name}")) is not None:
            part = stored.double()
        elif (stored := tensors.get(f"optimizer.coldness.{name}")) is not None:
            part = 1 - stored.double() / (1 if stored.is_floating_point() else DEGREES)
        else:
            continue
        if part.shape != weight.shape:
            raise ValueError(f"training state of {name}: found {tuple(part.shape)}, accepted is {tuple(weight.shape)}")
        parts.append(part.reshape(group.petals, -1))
    return torch.cat(parts, 1).mean(1) if parts else None


def _change(options: argparse.Namespace) -> int:
    from model.petals.crystallization import freeze, match_petals, unfreeze, warm
    from model.training.checkpoint import save_checkpoint

    path, model, tensors, values = _load(options)
    out = Path(options.out) if options.out else path
    if out.suffix in STATE_DICTS:
        raise ValueError(f"--out {out}: accepted is a .safetensors file, {' and '.join(STATE_DICTS)} are only read")
    petals = match_petals(model, options.petal)
    warmed = ""
    if options.action == "freeze":
        changed = freeze(model, petals, options.mode)
    else:
        changed = unfreeze(model, petals)
        warmed = ", and warmed" if warm(tensors, model, changed) else ""
    # A file that stays what it is need not be written, unless it is to be somewhere else.
    if changed or out != path:
        save_checkpoint(model, out, tensors=tensors, values=values)
    count, matched = (sum(map(len, chosen.values())) for chosen in (changed, petals))
    word = options.mode if options.action == "freeze" else "fluid"
    print(f"{count} of {matched} petals changed to {word}{warmed}: {out}")
    return 0


def _load(options: argparse.Namespace) -> tuple[Path, "AGIFormer", dict[str, "Tensor"], dict]:
    """The checkpoint's path, its model, and its training state; a state dict has none."""
    # The command stands above the package as a script does: the mechanisms that it calls know nothing of training.
    from model.training.checkpoint import find_checkpoint, load_checkpoint, load_training_state

    path = find_checkpoint(options.checkpoint)
    model = load_checkpoint(path)
    tensors, values = ({}, {}) if path.suffix in STATE_DICTS else load_training_state(path)
    return path, model, tensors, values


if __name__ == "__main__":
    sys.exit(main())
