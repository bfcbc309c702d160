"""The classifier on latents, against a plain recurrence; its file, and the labelled files that it learns from."""

import csv
import json
import random
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import save_checkpoint
from model.genesis.gate.classifier import (
    HiddenStateGate,
    _held_out,
    calibrated_threshold,
    gate_path,
    peak_risks,
    read_labelled,
    roc_auc,
    train_gate,
)
from model.genesis.gate.guarded import GuardedStream
from model.inference.stream import PIECE
from tests.conftest import make_random_model

MIXED = ("Iğdır'da çay 🌱 İçtik. " * 300).encode() + bytes(range(256)) * 8


def as_bytes(*texts):
    return torch.tensor([list(text) for text in texts], dtype=torch.long)


def random_gate(model, threshold=0.0):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(model.width, generator=generator)
    return HiddenStateGate(weight, torch.tensor(0.3), threshold, window=7.0)


@torch.no_grad()
def plain_risks(gate, model, text):
    """The recurrence in float64 on the latents of the whole text's patches, one at a time."""
    P, x = model.config.patch_size, as_bytes(text)
    x = x[:, : x.shape[1] // P * P]
    latents = torch.cat([model.start_latents(1), model.encoder(x)], 1) if x.shape[1] else model.start_latents(1)
    z = model.think(model.trunk(latents)[0])[0].double()
    risk, risks = 0.0, []
    for each in z:
        normed = (each - each.mean()) / (each.var(correction=0) + 1e-5).sqrt()
        risk = (1 - 1 / gate.window) * risk + (normed @ gate.weight.double() + gate.bias.double()).item() / gate.window
        risks.append(risk)
    return risks


@pytest.mark.parametrize("changes", [{}, {"patch_size": 1, "patch_overlap": 0}, {"growth": ("widen 64", "grow 0")}])
def test_streamed_risk_is_that_of_the_whole_text(tiny_model, changes):
    model = tiny_model(**changes)
    gate, P, rng = random_gate(model), model.config.patch_size, random.Random(6)
    text = MIXED[-(PIECE + 90) * P - 1 :]  # more than one piece, and not a whole number of patches
    expected = plain_risks(gate, model, text)
    assert max(expected) - min(expected) > 0.5
    stream, read = GuardedStream(model, gate, 2), 0
    assert stream.risk.tolist() == pytest.approx([expected[0]] * 2, abs=1e-4)
    while read < len(text):
        piece = text[read : read + rng.choice([1, 2, 5, 17, 900])]
        stream.feed(as_bytes(piece, piece))
        read += len(piece)
        assert stream.risk.tolist() == pytest.approx([expected[read // P]] * 2, abs=1e-4)
    branch, before = stream.clone(), stream.risk.tolist()
    branch.feed(as_bytes(b"x" * P * 3, b"y" * P * 3))
    assert stream.risk.tolist() == before != branch.risk.tolist()


def test_peak_risks_of_texts_of_different_lengths(tiny_model):
    model = tiny_model()
    gate, rng = random_gate(model), random.Random(7)
    lengths = [4, 5, 7, 8, 1500, 4000] + [rng.randrange(4, 300) for _ in range(60)]
    texts = [MIXED[(start := rng.randrange(2000)) : start + length] for length in lengths]
    expected = [max(plain_risks(gate, model, text)[1:]) for text in texts]
    assert peak_risks(gate, model, texts).tolist() == pytest.approx(expected, abs=1e-4)
    assert len(peak_risks(gate, model, [])) == 0


@pytest.mark.parametrize("positives", [200, 30])
def test_it_separates_byte_distributions_that_it_has_not_seen(tiny_model, positives):
    """On the latents of an untrained model, and when one kind is rare."""
    rng = random.Random(8)

    def text(letters):
        return "".join(rng.choice(letters) for _ in range(rng.randrange(40, 200))).encode()

    kinds = ["qwxz çğ"] * positives + ["aeıo 🌱"] * 200
    labels = [kind[0] == "q" for kind in kinds]
    gate, report = train_gate(tiny_model(), [text(kind) for kind in kinds], labels, false_positive_rate=0.05)
    assert report.roc_auc > 0.95 and report.recall > 0.8 and report.false_positive_rate <= 0.05
    assert report.training_texts + report.validation_texts == len(kinds)
    assert report.validation_positives == positives // 5
    risks = peak_risks(gate, tiny_model(), [text(kind) for kind in kinds])
    labels = torch.tensor(labels)
    assert roc_auc(risks, labels) > 0.95
    assert (risks[labels] > gate.threshold).float().mean() > 0.8
    assert (risks[~labels] > gate.threshold).float().mean() < 0.12


def test_labels_without_meaning_are_not_learned(tiny_model):
    """And a kind that is rare is not thereby improbable: the risk stays about undecided."""
    rng = random.Random(9)
    texts = [rng.randbytes(60) for _ in range(500)]
    gate, report = train_gate(tiny_model(), texts, [i % 10 == 0 for i in range(500)])
    assert 0.2 < report.roc_auc < 0.8
    assert -0.6 < peak_risks(gate, tiny_model(), texts).median() < 1


def test_the_split_depends_on_texts_alone():
    rng = random.Random(10)
    labelled = [(rng.randbytes(20), i % 5 == 0) for i in range(200)]

    def held_out(pairs, seed=0):
        chosen = _held_out([text for text, _ in pairs], [label for _, label in pairs], 0.25, seed)
        return {pairs[i] for i in chosen}

    first = held_out(labelled)
    assert sum(label for _, label in first) == 10 and len(first) == 50
    rng.shuffle(labelled)
    assert held_out(labelled) == first != held_out(labelled, 1)


def test_train_gate_refuses(tiny_model):
    texts = [b"text number %d" % i for i in range(8)]
    for labels in ([True] * 8, [False] * 8, [True] + [False] * 7):
        with pytest.raises(ValueError, match="accepted are at least 2 of each kind"):
            train_gate(tiny_model(), texts, labels)
    with pytest.raises(ValueError, match="1 are shorter than a patch"):
        train_gate(tiny_model(), [*texts[:7], b"abc"], [True, False] * 4)
    for name in ("false_positive_rate", "validation_share", "window"):
        with pytest.raises(ValueError, match=f"{name}=0: accepted"):
            train_gate(tiny_model(), texts, [True, False] * 4, **{name: 0})


def test_metrics_against_counting():
    rng = torch.Generator().manual_seed(11)
    for _ in range(20):
        scores = torch.randint(12, (50,), generator=rng) / 2 - 3  # with ties
        positive = torch.rand(50, generator=rng) < 0.4
        pairs = scores[positive].unsqueeze(1) - scores[~positive]
        assert roc_auc(scores, positive) == pytest.approx(((pairs > 0).double() + (pairs == 0).double() / 2).mean())
        for rate in (0.001, 0.05, 0.3, 1.0):
            threshold = calibrated_threshold(scores, rate)
            accepted = [t for t in scores.tolist() if (scores > t).sum() <= rate * 50]
            assert threshold == min(accepted)


# ── the file beside the checkpoint ───────────────────────────────────────────────────────────────────────────────────


def test_save_and_load(tmp_path):
    model = make_random_model()
    checkpoint = save_checkpoint(model, tmp_path / "run.safetensors")
    path = random_gate(model, threshold=1.25).save(gate_path(checkpoint), model)
    assert path == tmp_path / "run.safetensors.gate.safetensors"
    gate = HiddenStateGate.load(path, make_random_model())
    assert (gate.threshold, gate.window) == (1.25, 7.0)
    assert torch.equal(gate.weight, random_gate(model).weight) and torch.equal(gate.bias, random_gate(model).bias)

    others = [make_random_model(seed=6), make_random_model(thinking_steps=1), make_random_model(), make_random_model()]
    others[2].set_plasticity(0.5)
    with torch.no_grad():
        others[3].blocks[1].hull.groups[0].down.view(-1)[0] += 1e-6
    for other in others:
        with pytest.raises(ValueError, match="trained on other weights than the checkpoint's"):
            HiddenStateGate.load(path, other)


def test_load_refuses(tmp_path):
    model = make_random_model()
    path = random_gate(model).save(tmp_path / "x", model)
    whole, tensors = path.read_bytes(), load_file(path)
    save_file(tensors, tmp_path / "future", {"agiformer.gate": json.dumps({"version": 2})})
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "junk").write_bytes(b"\x80\x04K.")
    save_checkpoint(model, tmp_path / "checkpoint")
    said = {"none": "no such file", "future": "version 2", "cut": "damaged", "junk": "damaged", "checkpoint": "damaged"}
    for name, words_said in said.items():
        with pytest.raises(ValueError, match=words_said) as error:
            HiddenStateGate.load(tmp_path / name, model)
        assert str(error.value).startswith(f"gate {tmp_path / name}: ") and "\n" not in str(error.value)


# ── labelled files ───────────────────────────────────────────────────────────────────────────────────────────────────

ROWS = [("çay 🌱", "0"), ("kan, 🔪", "1"), ("çay 🌱", "0"), ('two\nlines, "quoted"', "0"), ("both", "0"), ("both", "1")]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_read_labelled(tmp_path, kind, monkeypatch):
    path = tmp_path / f"texts.{kind}"
    if kind == "jsonl":
        monkeypatch.setitem(sys.modules, "datasets", None)  # not needed
        path.write_text("".join(json.dumps({"text": t, "label": int(label)}) + "\n" for t, label in ROWS), "utf-8")
    elif kind == "csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *ROWS])
    else:
        from datasets import Dataset

        Dataset.from_dict({"text": [t for t, _ in ROWS], "label": [float(x) for _, x in ROWS]}).to_parquet(path)
    texts, labels, left_out = read_labelled(path, "1")
    assert texts == ["çay 🌱".encode(), "kan, 🔪".encode(), b'two\nlines, "quoted"']
    assert labels == [False, True, False]
    assert left_out == {"repeated": 2, "with both kinds of labels": 1}


GOOD = b'{"text": "a", "label": "unsafe"}\n{"text": "b", "label": "safe"}\n'


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.jsonl", b'{"text": "a"}\n', "row 1 has no column 'label'; its columns are text"),
        ("x.csv", b"body,label\na,unsafe\n", "row 1 has no column 'text'; its columns are body, label"),
        ("x.jsonl", GOOD + b'{"text": null, "label": "safe"}\n', "row 3: text=None"),
        ("x.jsonl", GOOD + b'{"text": "c", "label": null}\n', "row 3: label=None"),
        ("x.jsonl", GOOD[:32], "its labels are unsafe"),
        ("x.jsonl", GOOD[33:], "its labels are safe; accepted are 'unsafe'"),
        ("x.jsonl", b"", "it holds no rows"),
        ("x.csv", b"", "it is empty"),
        ("x.jsonl", b'{"text": "\xff\xfe", "label": "unsafe"}\n', "not valid JSON"),
        ("x.csv", b"text,label\n\xff\xfe,unsafe\n", "cannot be read as csv"),
        ("x.parquet", b"PAR1 cut", "cannot be read as parquet"),
        ("x.jsonl", b"[1, 2", "not valid JSON"),
        ("x.txt", GOOD, "accepted are jsonl, json, csv, tsv and parquet"),
        ("x.jsonl", None, "no such file"),
    ],
)
def test_read_labelled_refuses(tmp_path, name, data, said):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_labelled(path, "unsafe")
    assert said in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_read_labelled_without_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = tmp_path / "x.csv"
    path.write_text("text,label\na,unsafe\n")
    with pytest.raises(ValueError, match="needs the package datasets"):
        read_labelled(path, "unsafe")
