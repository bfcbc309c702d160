"""HiddenStateGate: a small classifier on the model's own latents, which tells what generation is to steer away from.

    gate, report = train_gate(model, texts, labels)             # python -m model.genesis train-classifier
    gate.save(gate_path(checkpoint), model)
    generate(model, prompt, max_bytes=200, classifier=HiddenStateGate.load(gate_path(checkpoint), model))

For the latents z_t that the byte head receives, and a window of W patches (seed 000, section 5):

    u_t = w · layer_norm(z_t) + b           evidence of patch t, logistic regression
    r_t = (1 − 1/W) · r_{t−1} + u_t / W     risk: log-odds that the text is of the kind to avoid; r before a text is 0

Notable: the average starts at 0, undecided, so that a few patches weigh little. Because u is linear, averaging u is
averaging the latents, and all that a stream carries is one number a row. A text fires the gate when its risk passes
the threshold at any patch: that is what the threshold is calibrated for, because that is what generation meets.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor
from tqdm import tqdm

from model.agiformer import AGIFormer
from model.files import write_atomically
from model.inference.stream import PIECE

FORMAT = "agiformer.gate"
VERSION = 1
WINDOW = 10.0  # patches
POSITIONS = 8  # patches of a text that training sees, evenly spaced
BATCH = 32  # texts read together
RIDGE = 1e-3  # weight of the squared norm, which makes the regression's solution unique


@dataclass
class HiddenStateGate:
    """The classifier.

    weight [D] and bias [] act on layer-normed latents of width D; all float32. `threshold` is the risk, in log-odds,
    above which a text is to be avoided; `window` is W, in patches, ≥ 1.
    """

    weight: Tensor
    bias: Tensor
    threshold: float
    window: float

    def to(self, device: torch.device | str) -> "HiddenStateGate":
        """The same gate on another device."""
        return HiddenStateGate(self.weight.to(device), self.bias.to(device), self.threshold, self.window)

    def update(self, risk: Tensor, latents: Tensor) -> Tensor:
        """Go on reading: risk [B] so far (0 before a text), latents [B, T, D] that follow → risk after each, [B, T]."""
        evidence = F.linear(_normed(latents), self.weight, self.bias)
        return _average(evidence.unsqueeze(-1), risk.unsqueeze(-1), self.window).squeeze(-1)

    def save(self, path: str | os.PathLike, model: AGIFormer) -> Path:
        """Write the gate atomically, with the SHA-256 of the model that it was trained on."""
        tensors = {"weight": self.weight.cpu().contiguous(), "bias": self.bias.cpu().contiguous()}
        values = {"threshold": self.threshold, "window": self.window, "model": weights_hash(model)}
        return write_atomically(path, serialise(tensors, {FORMAT: json.dumps({"version": VERSION} | values)}))

    @classmethod
    def load(cls, path: str | os.PathLike, model: AGIFormer) -> "HiddenStateGate":
        """The gate saved at `path`, on the device of its model.

        Raises:
            ValueError: the file is missing, damaged or no gate, or was trained on another model.
        """
        if not Path(path).is_file():
            raise ValueError(f"gate {path}: no such file (train one: python -m model.genesis train-classifier)")
        if not is_gate(path):
            raise ValueError(f"gate {path}: damaged, or not written by train-classifier")
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[FORMAT])
            if header["version"] != VERSION:
                raise ValueError(f"gate {path}: version {header['version']}, accepted is {VERSION}")
            gate = cls(file.get_tensor("weight"), file.get_tensor("bias"), header["threshold"], header["window"])
        if header["model"] != weights_hash(model):
            raise ValueError(f"gate {path}: it was trained on other weights than the checkpoint's; train it again")
        return gate.to(model.start.device)


def gate_path(checkpoint: str | os.PathLike) -> Path:
    """Where the gate of a checkpoint lies."""
    return Path(f"{os.fspath(checkpoint)}.gate.safetensors")


def is_gate(path: str | os.PathLike) -> bool:
    """Whether a whole file that `HiddenStateGate.save` wrote is there."""
    try:
        with safe_open(path, framework="pt") as file:
            return FORMAT in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def weights_hash(model: AGIFormer) -> str:
    """SHA-256 of what the latents depend on: config, parameters and plasticity, wherever the model is."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in [*sorted(model.named_parameters()), ("plasticity", model.plasticity)]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _normed(latents: Tensor) -> Tensor:
    return F.layer_norm(latents.float(), latents.shape[-1:])


def _average(values: Tensor, before: Tensor, window: float) -> Tensor:
    """Exponential moving average of values [B, T, C] that follow an average `before` [B, C] → [B, T, C]."""
    keep, averages = 1 - 1 / window, []
    for part in values.split(PIECE, 1):
        t = torch.arange(part.shape[1], device=part.device)
        age = t.unsqueeze(1) - t
        weights = torch.where(age >= 0, keep ** age.clamp_min(0).to(part.dtype), 0) / window
        averages.append(weights @ part + (keep ** (t + 1.0)).unsqueeze(-1) * before.unsqueeze(1))
        before = averages[-1][:, -1]
    return torch.cat(averages, 1)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class GateReport:
    """What a gate does on texts that it has not learned from; rates in [0, 1], NaN where there is nothing to divide."""

    training_texts: int
    validation_texts: int
    validation_positives: int
    accuracy: float
    precision: float
    recall: float
    false_positive_rate: float
    roc_auc: float
    threshold: float  # log-odds


def train_gate(
    model: AGIFormer,
    texts: Sequence[bytes],
    labels: Sequence[bool],
    *,
    false_positive_rate: float = 0.01,
    validation_share: float = 0.2,
    window: float = WINDOW,
    epochs: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> tuple[HiddenStateGate, GateReport]:
    """Learn a gate from texts, True for those to avoid.

    Both kinds weigh the same, however many there are of each. The threshold lets at most the wanted rate of the
    held-out other texts fire at any of their patches; the report's rates are at this threshold.

    Args:
        texts: no two alike, each of at least one patch.
        false_positive_rate, validation_share: in (0, 1].
        window: W in patches, ≥ 1; a longer one tells texts apart better, a shorter one reacts sooner.
        epochs: passes of L-BFGS over the features, at most.
        seed: of the split, which depends on it and the texts alone.

    Raises:
        ValueError: fewer than two texts of a kind.
    """
    for name, value in (("false_positive_rate", false_positive_rate), ("validation_share", validation_share)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value!r}: accepted is a number above 0 and up to 1")
    if not 1 <= window < math.inf:
        raise ValueError(f"window={window!r}: accepted is a number of patches ≥ 1")
    if short := sum(len(text) < model.config.patch_size for text in texts):
        raise ValueError(
            f"texts: {short} are shorter than a patch; accepted are {model.config.patch_size} bytes or more"
        )
    held_out = _held_out(texts, labels, validation_share, seed)
    training = [i for i in range(len(texts)) if i not in held_out]
    validation = sorted(held_out)
    with tqdm(total=sum(map(len, texts)), unit="B", unit_scale=True, leave=False, disable=not progress) as bar:
        features = _features(model, [texts[i] for i in training], window, bar.update)
        targets = torch.tensor([labels[i] for i in training], device=features.device)
        gate = HiddenStateGate(*_fit(features, targets, epochs), threshold=math.inf, window=window)
        risks = peak_risks(gate, model, [texts[i] for i in validation], bar.update)
    positive = torch.tensor([labels[i] for i in validation])
    gate.threshold = calibrated_threshold(risks[~positive], false_positive_rate)
    fired = risks > gate.threshold
    true, false = (fired & positive).sum().item(), (fired & ~positive).sum().item()
    report = GateReport(
        training_texts=len(training),
        validation_texts=len(validation),
        validation_positives=int(positive.sum()),
        accuracy=(fired == positive).float().mean().item(),
        precision=true / (true + false) if true + false else math.nan,
        recall=true / positive.sum().item(),
        false_positive_rate=false / (~positive).sum().item(),
        roc_auc=roc_auc(risks, positive),
        threshold=gate.threshold,
    )
    return gate, report


def _held_out(texts: Sequence[bytes], labels: Sequence[bool], share: float, seed: int) -> set[int]:
    """Of each kind, those texts whose hashes are the smallest; at least one, and one is left."""
    chosen: set[int] = set()
    for kind in (False, True):
        members = [i for i, label in enumerate(labels) if label == kind]
        if len(members) < 2:
            word = "to avoid" if kind else "of the other kind"
            raise ValueError(f"labels: {len(members)} texts {word}; accepted are at least 2 of each kind")
        members.sort(key=lambda i: hashlib.sha256(b"%d " % seed + texts[i]).digest())
        chosen.update(members[: min(max(1, round(share * len(members))), len(members) - 1)])
    return chosen


def read_latents(model: AGIFormer, x: Tensor) -> Iterator[Tensor]:
    """Latents of bytes x [B, n·P], in pieces [B, T, D], n + 1 in all: the first has read nothing, the last all of x."""
    z, state = model.trunk(model.start_latents(x.shape[0]))
    yield model.think(z, state)
    P, overlap, tail = model.config.patch_size, model.config.patch_overlap, None
    for piece in x.split(PIECE * P, 1):
        if piece.shape[1]:
            z, state = model.trunk(model.encoder(piece, tail), state)
            tail = piece[:, piece.shape[1] - overlap :]
            yield model.think(z, state)


def _read(model: AGIFormer, texts: Sequence[bytes], done: Callable[[int], object]) -> Iterator[tuple]:
    """Batches of texts of similar length: (their indices, their whole patches [B], pieces of latents).

    Shorter texts are filled up; what fills them comes after the patches that count, and no latent reads ahead.
    """
    P = model.config.patch_size
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    was_training = model.training
    model.eval()  # routers would draw samples
    try:
        for begin in range(0, len(order), BATCH):
            index = order[begin : begin + BATCH]
            patches = [len(texts[i]) // P for i in index]
            longest = max(patches) * P
            data = b"".join(texts[i][:longest].ljust(longest, b"\0") for i in index)
            x = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(len(index), -1).to(model.start.device)
            yield index, torch.tensor(patches, device=x.device), read_latents(model, x.long())
            done(sum(len(texts[i]) for i in index))
    finally:
        model.train(was_training)


@torch.no_grad()
def _features(model: AGIFormer, texts: Sequence[bytes], window: float, done: Callable[[int], object]) -> Tensor:
    """Averaged latents and, as the last channel, the averaged 1: [texts, POSITIONS, D + 1] float32."""
    features = torch.empty(len(texts), POSITIONS, model.width + 1, device=model.start.device)
    for index, patches, pieces in _read(model, texts, done):
        share = torch.arange(1, POSITIONS + 1, device=patches.device) / POSITIONS
        wanted = (share * patches.unsqueeze(1)).ceil().long()  # [B, POSITIONS] in 1 … patches; some twice
        average, first = features.new_zeros(len(index), model.width + 1), 0
        rows = torch.tensor(index, device=patches.device)
        for piece in pieces:
            averages = _average(F.pad(_normed(piece), (0, 1), value=1.0), average, window)
            row, k = ((wanted >= first) & (wanted < first + piece.shape[1])).nonzero(as_tuple=True)
            features[rows[row], k] = averages[row, wanted[row, k] - first]
            average, first = averages[:, -1], first + piece.shape[1]
    return features


def _fit(features: Tensor, positive: Tensor, epochs: int) -> tuple[Tensor, Tensor]:
    """Logistic regression of positive [N] on features [N, POSITIONS, D + 1] → weight [D] and bias [].

    Both kinds weigh the same.
    """
    x, started = features.flatten(0, 1).split((features.shape[-1] - 1, 1), -1)
    mean = x.mean(0) / started.mean()
    deviation = (x / started - mean).std(0) + 1e-6
    x = torch.cat([(x - started * mean) / deviation, started], -1)
    balance = torch.where(positive, 0.5 / positive.sum(), 0.5 / (~positive).sum()) / POSITIONS
    target, balance = (each.repeat_interleave(POSITIONS).float() for each in (positive, balance))
    weight = torch.zeros(x.shape[-1], device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=epochs, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        losses = F.binary_cross_entropy_with_logits(x @ weight, target, reduction="none")
        total = (balance * losses).sum() + RIDGE * weight[:-1].square().sum()
        total.backward()
        return total

    solver.step(loss)
    scaled = weight.detach()[:-1] / deviation
    return scaled, weight.detach()[-1] - scaled @ mean


@torch.no_grad()
def peak_risks(
    gate: HiddenStateGate, model: AGIFormer, texts: Sequence[bytes], done: Callable[[int], object] = lambda n: None
) -> Tensor:
    """The greatest risk of each text after any of its patches, [len(texts)] on the CPU."""
    peaks = torch.empty(len(texts))
    for index, patches, pieces in _read(model, texts, done):
        risk, first = gate.weight.new_zeros(len(index)), 0
        peak = torch.full_like(risk, -math.inf)
        for piece in pieces:
            risks = gate.update(risk, piece)
            position = first + torch.arange(piece.shape[1], device=risk.device)
            counts = (position > 0) & (position <= patches.unsqueeze(1))
            peak = torch.maximum(peak, risks.masked_fill(~counts, -math.inf).amax(1))
            risk, first = risks[:, -1], first + piece.shape[1]
        peaks[index] = peak.cpu()
    return peaks


def calibrated_threshold(negatives: Tensor, false_positive_rate: float) -> float:
    """The smallest of these risks [N ≥ 1] that at most the wanted share of them exceeds."""
    ordered = negatives.sort(descending=True).values
    return ordered[min(math.floor(false_positive_rate * len(ordered)), len(ordered) - 1)].item()


def roc_auc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores above a negative, ties counting half: scores [N], positive [N] bool."""
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts - 1) / 2)[inverse]  # mean rank of equal scores, from 1
    n = positive.sum().item()
    return ((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n))).item()


def read_labelled(
    path: str | os.PathLike, positive: str, text_column: str = "text", label_column: str = "label"
) -> tuple[list[bytes], list[bool], dict[str, int]]:
    """The texts of a jsonl, csv, tsv or parquet file, and which of them have the label `positive`.

    A text comes once, however often the file has it; one with labels of both kinds is left out. Tables other than
    jsonl are read through `datasets`.

    Returns:
        UTF-8 texts, labels, and how many rows were left out for which reason.

    Raises:
        ValueError: the file cannot be read, is no table or empty, lacks a column, or a row lacks its text or label.
    """
    from model.data.readers import expand_files, file_kind, table_rows

    if file_kind(path)[0] == "text":
        raise ValueError(f"file {path}: accepted are jsonl, json, csv, tsv and parquet files, by their names")
    kinds: dict[bytes, set[bool]] = {}
    seen: dict[str, int] = {}
    rows = 0
    (path, _), *_ = expand_files([os.fspath(path)])
    for rows, row in enumerate(table_rows(path), 1):
        for column in (text_column, label_column):
            if column not in row:
                found = ", ".join(map(str, row)) or "none"
                raise ValueError(f"file {path}: row {rows} has no column {column!r}; its columns are {found}")
        text, label = row[text_column], row[label_column]
        if not isinstance(text, str) or label is None:
            name, value = (label_column, label) if isinstance(text, str) else (text_column, text)
            raise ValueError(f"file {path}: row {rows}: {name}={value!r}; accepted is a text and a label in every row")
        word = _label(label)
        seen[word] = seen.get(word, 0) + 1
        kinds.setdefault(text.encode("utf-8", "surrogatepass"), set()).add(word == positive)
    if not rows:
        raise ValueError(f"file {path}: it holds no rows; accepted are rows with {text_column} and {label_column}")
    if positive not in seen or len(seen) == 1:
        labels = ", ".join(sorted(seen)[:10])
        raise ValueError(
            f"file {path}: its labels are {labels}; accepted are {positive!r} (--positive) and another one"
        )
    texts = [text for text, both in kinds.items() if len(both) == 1]
    left_out = {"repeated": rows - len(kinds), "with both kinds of labels": len(kinds) - len(texts)}
    return texts, [True in kinds[text] for text in texts], left_out


def _label(value: object) -> str:
    """A label as one writes it on a command line: 1 and 1.0 are 1, True is true."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)
