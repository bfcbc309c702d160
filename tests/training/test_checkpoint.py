"""Checkpoints: they go round, are atomic, and refuse everything that is not one in one line."""

import json
import os

import pytest
import torch
from safetensors import safe_open

from model import AGIFormerConfig, CheckpointError, load_checkpoint, save_checkpoint
from model.config import PRESETS
from model.files import write_atomically
from model.training.checkpoint import find_checkpoint, load_training_state, load_training_values
from tests.conftest import make_random_model


@pytest.fixture
def model():
    model = make_random_model()
    model.set_plasticity(0.37)
    return model


def same_weights(a, b) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(x, theirs[name]) for name, x in a.state_dict().items())


def test_weights_buffers_config_and_training_state_go_round(model, tmp_path):
    path = tmp_path / "new" / "model.safetensors"
    moments = {"optimizer.first": torch.arange(5.0)}
    save_checkpoint(model, path, tensors=moments, values={"step": 7, "türkçe": "ığ"})
    loaded = load_checkpoint(path)
    assert same_weights(model, loaded)
    assert loaded.plasticity.item() == pytest.approx(0.37)
    assert loaded.config == model.config
    assert not loaded.training
    tensors, values = load_training_state(path)
    assert torch.equal(tensors["optimizer.first"], moments["optimizer.first"])
    assert values == {"step": 7, "türkçe": "ığ"}
    assert load_training_values(path) == values


def test_the_file_is_plain_safetensors_with_its_shape_in_the_header(model, tmp_path):
    path = save_checkpoint(model, tmp_path / "m.safetensors")
    with safe_open(path, "pt") as file:
        assert AGIFormerConfig.from_dict(json.loads(file.metadata()["agiformer"])["config"]) == model.config
        assert torch.equal(file.get_tensor("model.start"), model.start)


def test_parameters_that_are_views_of_one_buffer_are_saved_whole(model, tmp_path):
    from model.training.optimizer import MuonAdamW

    expected = {name: x.clone() for name, x in model.state_dict().items()}
    MuonAdamW(model)
    loaded = load_checkpoint(save_checkpoint(model, tmp_path / "m.safetensors"))
    assert all(torch.equal(x, expected[name]) for name, x in loaded.state_dict().items())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".file.abc.tmp").write_bytes(b"half")
    (tmp_path / ".other.abc.tmp").write_bytes(b"half")
    write_atomically(tmp_path / "file", b"new")
    assert sorted(os.listdir(tmp_path)) == [".other.abc.tmp", "file"]


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_weights_only_state_dicts(model, tmp_path, suffix):
    torch.save({"config": model.config.to_dict(), "model": model.state_dict()}, tmp_path / f"a{suffix}")
    assert same_weights(model, load_checkpoint(tmp_path / f"a{suffix}"))
    torch.save(model.state_dict(), tmp_path / f"b{suffix}")
    assert same_weights(model, load_checkpoint(tmp_path / f"b{suffix}", config=model.config))
    with pytest.raises(CheckpointError, match="fit no preset"):
        load_checkpoint(tmp_path / f"b{suffix}")


def test_a_bare_state_dict_finds_its_preset(tmp_path):
    from model import AGIFormer

    nano = AGIFormer(PRESETS["nano"])
    torch.save(nano.state_dict(), tmp_path / "nano.pth")
    assert load_checkpoint(tmp_path / "nano.pth").config == PRESETS["nano"]


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil-was-here",))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="weights-only"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_files_are_refused_in_one_line(model, tmp_path, keep):
    whole = save_checkpoint(model, tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: damaged") as error:
        load_checkpoint(tmp_path / "cut.safetensors")
    assert "\n" not in str(error.value)


def test_other_files_are_refused(model, tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "missing.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not written by this project"):
        load_checkpoint(tmp_path / "other.safetensors")
    weights = model.state_dict()
    del weights["start"]
    torch.save({"config": model.config.to_dict(), "model": weights}, tmp_path / "partial.pth")
    with pytest.raises(CheckpointError, match="start"):
        load_checkpoint(tmp_path / "partial.pth")


def test_bare_names_are_found_in_the_checkpoints_folder(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(model, "checkpoints/m.safetensors")
    assert find_checkpoint("m.safetensors").as_posix() == "checkpoints/m.safetensors"
    save_checkpoint(model, "m.safetensors")
    assert find_checkpoint("m.safetensors").as_posix() == "m.safetensors"
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors: no such file"):
        find_checkpoint("nothing.safetensors")
