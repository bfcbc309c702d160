"""The classifier on latents, against a plain recurrence; and generation that it guards, against generation alone."""

import csv
import json
import math
import random
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import AGIFormer, AGIFormerConfig, save_checkpoint
from model.genesis.automaton import compile_policy
from model.genesis.byte_gate import ByteGate
from model.genesis.classifier import (
    GuardedStream,
    HiddenStateGate,
    PatchWriter,
    _held_out,
    calibrated_threshold,
    gate_path,
    peak_risks,
    read_labelled,
    roc_auc,
    train_gate,
)
from model.genesis.folding import fold
from model.genesis.policy import load_policy
from model.inference.sampling import sample
from model.inference.stream import PIECE
from model.inference.text import Utf8Constraint, unfinished
from tests.conftest import TINY, make_random_model

SAFE = [word.encode() for word in ("sun", "tea", "leaf", "çay", "göl", "🌱")]
UNSAFE = [word.encode() for word in ("war", "kan", "stab", "ölü", "blood", "🔪")]
MIXED = ("Iğdır'da çay 🌱 İçtik. " * 300).encode() + bytes(range(256)) * 8


def as_bytes(*texts):
    return torch.tensor([list(text) for text in texts], dtype=torch.long)


def words(rng, count, unsafe=None):
    """Words of one kind; for None the kind changes every seventh word or so."""
    kind = rng.random() < 0.5 if unsafe is None else unsafe
    chosen = []
    for _ in range(count):
        chosen.append(rng.choice(UNSAFE if kind else SAFE))
        kind ^= unsafe is None and rng.random() < 0.15
    return b" ".join(chosen) + b" "


def labelled_texts(seed, count, share):
    rng, texts = random.Random(seed), {}
    while len(texts) < count:
        unsafe = len(texts) < share * count
        texts.setdefault(words(rng, rng.randrange(4, 20), unsafe), unsafe)
    return list(texts), list(texts.values())


@pytest.fixture(scope="module")
def writer_model():
    """A tiny model that has learned to write both kinds of words, in runs."""
    torch.manual_seed(0)
    model = AGIFormer(AGIFormerConfig(**TINY))
    steps, length = 100, 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    text = as_bytes(words(random.Random(1), 20_000))[0]
    for _ in range(steps):
        batch = torch.stack([text[i : i + length] for i in torch.randint(len(text) - length, (16,)).tolist()])
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def word_gate(writer_model):
    texts, labels = labelled_texts(2, 300, 0.3)
    return train_gate(writer_model, texts, labels, false_positive_rate=0.05, window=3)[0]


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


# ── generation ───────────────────────────────────────────────────────────────────────────────────────────────────────


def make_writer(model, gate, prompts, *, tries, temperature=0.8):
    stream = GuardedStream(model, gate, len(prompts))
    stream.feed(as_bytes(*prompts))
    draws = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        draws.append(lambda logits, generator=generator: sample(logits, temperature, generator=generator))
    return PatchWriter(stream, *draws, constraints=[Utf8Constraint(prompts)], tries=tries)


def write_patches(writer, count):
    patches = [writer.write() for _ in range(count)]
    return patches, [bytes(row) for row in torch.cat([patch.data for patch in patches], 1).tolist()]


def unsafe_share(texts):
    unsafe, safe = (sum(text.count(word) for text in texts for word in kind) for kind in (UNSAFE, SAFE))
    assert unsafe + safe > 300
    return unsafe / (unsafe + safe)


def test_guarded_generation_says_less_that_is_unsafe(writer_model, word_gate):
    prompts = [b"sun tea "] * 24
    alone = write_patches(make_writer(writer_model, word_gate, prompts, tries=0), 40)
    guarded = write_patches(make_writer(writer_model, word_gate, prompts, tries=4), 40)
    assert unsafe_share(alone[1]) > 0.35
    assert unsafe_share(guarded[1]) < 0.8 * unsafe_share(alone[1])
    rejected = [torch.stack([patch.rejected for patch in patches]).float().mean() for patches, _ in (alone, guarded)]
    assert rejected[1] < 0.2 * rejected[0]
    for text in guarded[1]:
        text[: len(text) - len(unfinished(text)[0])].decode()  # the constraint holds through all tries


def test_rows_that_pass_say_what_they_would_say_alone(writer_model, word_gate):
    prompts = [b"sun tea "] * 24
    gate = HiddenStateGate(word_gate.weight, word_gate.bias, 2.0, word_gate.window)
    patches, guarded = write_patches(make_writer(writer_model, gate, prompts, tries=3), 8)
    alone = write_patches(make_writer(writer_model, gate, prompts, tries=0), 8)[1]
    passed = ~torch.stack([patch.banned.any(1) for patch in patches]).any(0)
    assert 2 <= passed.sum() <= 22
    assert all(guarded[row] == alone[row] for row in passed.nonzero().flatten().tolist())
    assert guarded != alone


@pytest.mark.parametrize("prompt", [b"sun tea ", b"sun tea \xc3", b"sun t", b""])
def test_the_state_after_a_patch_is_that_of_its_bytes(writer_model, word_gate, prompt):
    """Also for a prompt that ends inside a patch, and inside a character."""
    gate = HiddenStateGate(word_gate.weight, word_gate.bias, -1.0, word_gate.window)
    writer = make_writer(writer_model, gate, [prompt] * 8, tries=3, temperature=1.5)
    patches, texts = write_patches(writer, 5)
    assert any(patch.banned.any() for patch in patches)
    assert {patch.data.shape[1] for patch in patches[1:]} == {4} and patches[0].data.shape[1] == 4 - len(prompt) % 4
    whole = [prompt + text for text in texts]
    fresh = GuardedStream(writer_model, gate, 8)
    fresh.feed(as_bytes(*whole))
    assert torch.allclose(writer.stream.logits(), fresh.logits(), atol=1e-4)
    scored = GuardedStream(writer_model, gate, 8).score(as_bytes(*whole))[:, len(prompt) :]
    assert torch.allclose(torch.cat([patch.logits for patch in patches], 1), scored, atol=1e-4)
    assert torch.allclose(patches[-1].risk, fresh.risk, atol=1e-4) and torch.equal(patches[-1].risk, writer.stream.risk)
    assert torch.equal(patches[-1].rejected, patches[-1].risk > gate.threshold)
    zeros = torch.zeros(8, 256)
    assert torch.equal(writer.constraints[0].mask(zeros), Utf8Constraint(whole).mask(zeros))


def test_of_rejected_tries_the_least_risky_stays(writer_model, word_gate):
    gate = HiddenStateGate(word_gate.weight, word_gate.bias, -math.inf, word_gate.window)
    tried = []

    class Watched(PatchWriter):
        def _patch(self, *arguments):
            written = super()._patch(*arguments)
            tried.append((written[0], self.stream.risk))
            return written

    stream = GuardedStream(writer_model, gate, 6)
    generator = torch.Generator().manual_seed(3)
    patch = Watched(stream, lambda logits: sample(logits, 1.5, generator=generator), tries=5).write()
    risks = torch.stack([risk for _, risk in tried])
    assert len(tried) == 6 and patch.rejected.all()
    assert torch.equal(patch.risk, risks.amin(0))
    for row, best in enumerate(risks.argmin(0).tolist()):
        assert torch.equal(patch.data[row], tried[best][0][row])
    firsts = torch.stack([data[:, 0] for data, _ in tried])
    for row in range(6):  # no first byte twice, and all but the last are reported
        assert len(set(firsts[:, row].tolist())) == 6
        assert set(patch.banned[row].nonzero().flatten().tolist()) == set(firsts[:-1, row].tolist())
    probability = GuardedStream(writer_model, gate, 6).logits().softmax(-1)
    assert torch.allclose(patch.mass, (probability * patch.banned).sum(1))


def test_a_greedy_choice_is_drawn_otherwise(writer_model, word_gate):
    prompts = [b"war kan "] * 4
    alone = write_patches(make_writer(writer_model, word_gate, prompts, tries=0, temperature=0), 30)[1]
    guarded = write_patches(make_writer(writer_model, word_gate, prompts, tries=4, temperature=0), 30)[1]
    assert len(set(alone)) == len(set(guarded)) == 1 and alone != guarded


def test_no_try_completes_what_the_byte_gate_blocks(writer_model, word_gate, tmp_path):
    (tmp_path / "policy.toml").write_text('[words]\nword_boundaries = false\nphrases = ["kan", "çay"]\n', "utf-8")
    automaton = compile_policy(load_policy(tmp_path / "policy.toml", default=False))
    writer = make_writer(writer_model, word_gate, [b"sun k", b"war \xc3"] * 12, tries=4)
    writer.constraints.append(ByteGate(automaton, 24).read([b"sun k", b"war \xc3"] * 12))
    patches, texts = write_patches(writer, 20)
    assert any(patch.banned.any() for patch in patches)
    for text, beginning in zip(texts, (b"sun k", b"war \xc3") * 12):
        folded = fold((beginning + text).decode("utf-8", "replace"))
        assert "kan" not in folded and fold("çay") not in folded


def test_where_the_constraint_leaves_one_byte_the_ban_gives_way(writer_model, word_gate):
    class OnlyX:
        def mask(self, logits):
            return logits.masked_fill(torch.arange(256) != 120, -torch.inf)

        def advance(self, chosen):
            pass

    gate = HiddenStateGate(word_gate.weight, word_gate.bias, -math.inf, 3)
    writer = PatchWriter(GuardedStream(writer_model, gate, 2), lambda logits: sample(logits), constraints=[OnlyX()])
    patch = writer.write()
    assert (patch.data == 120).all() and patch.rejected.all()


def test_a_risk_that_is_no_number_is_rejected(writer_model, word_gate):
    gate = HiddenStateGate(word_gate.weight * math.nan, word_gate.bias, 1e9, 3)
    patch = PatchWriter(GuardedStream(writer_model, gate), sample, tries=1).write()
    assert patch.rejected.all() and patch.banned.any()


def test_patch_writer_refuses(writer_model, word_gate):
    for tries in (-1, 1.5, True):
        with pytest.raises(ValueError, match="tries="):
            PatchWriter(GuardedStream(writer_model, word_gate), sample, tries=tries)
