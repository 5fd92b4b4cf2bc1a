"""Checkpoints that are damaged, foreign or hold code are refused, and never run code."""

import os
import pickle
import random
import subprocess
from pathlib import Path

import pytest
import torch

import mmkit as mm
from mmkit.files import write_atomically
from mmkit.models.checkpoint import load_weights, read_checkpoint
from tests.models.hostile import Hostile


def as_zip(content, path):
    torch.save(content, path)


def as_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(content, path):
    path.write_bytes(pickle.dumps(content, 2))


@pytest.mark.parametrize("writer", [as_zip, as_legacy, as_pickle])
def test_a_file_with_code_is_refused_and_not_run(tmp_path, writer):
    path, trace = tmp_path / "best_model.pth", tmp_path / "it_ran"
    writer({"model_state_dict": Hostile(trace)}, path)
    with pytest.raises(ValueError, match="is refused") as refused:
        mm.load(path)
    assert not trace.exists()
    assert "weights_only" not in str(refused.value)  # torch's advice: read it unsafely
    assert "it asks for io.open" in str(refused.value) or writer is not as_zip


@pytest.mark.parametrize("writer", [as_zip, as_legacy, as_pickle])
def test_a_state_with_code_is_not_resumed_from(tmp_path, writer, make_model, make_data):
    """The same in last/state.pth, among the entries that belong there."""
    values = dict(output_dir=str(tmp_path), run_name="run", max_steps=2, batch_size=11)
    config = mm.TrainingConfig(**values)
    mm.train_model(config, make_data(53), None, make_model())
    path, trace = tmp_path / "run/last/state.pth", tmp_path / "it_ran"
    state = read_checkpoint(path)
    for entry in ("random", "scaler", "step"):
        writer(state | {entry: Hostile(trace)}, path)
        with pytest.raises(ValueError, match=r"state\.pth is refused.*nothing in it was run"):
            mm.train_model(config, make_data(53), None, make_model(), resume=True)
        assert not trace.exists()
    torch.save({name: state[name] for name in state if name not in ("random", "step")}, path)
    with pytest.raises(ValueError, match=r"state\.pth has no random, step"):
        mm.train_model(config, make_data(53), None, make_model(), resume=True)


@pytest.mark.parametrize(
    "content, asks", [(eval, "eval"), (os.system, "system"), (subprocess.Popen, "Popen"),
                      (torch.nn.Linear(2, 3), "Linear"), (Path("x"), "PosixPath")],
)  # fmt: skip
def test_what_is_no_plain_value_is_named(tmp_path, content, asks):
    """Functions, modules and other objects, harmless or not, are refused and named."""
    torch.save({"step": content}, tmp_path / "state.pth")
    with pytest.raises(ValueError, match=rf"it asks for \S*{asks}"):
        read_checkpoint(tmp_path / "state.pth")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, make_model):
    model, path = make_model(), tmp_path / "best_model.pth"
    whole = {"architecture": model.architecture(), "model_state_dict": model.state_dict()}
    write_atomically(whole, path)
    mm.load(path)
    content = path.read_bytes()
    short = [content[: len(content) * part // 16] for part in range(16)]
    zeros = [cut + bytes(len(content) - len(cut)) for cut in short]  # a crash may leave these
    for damaged in (*short, *zeros, content[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is refused: it is damaged"):
            mm.load(path)


def test_a_changed_byte_is_never_read_as_a_weight(tmp_path):
    """torch.load reads it without an error; the checksums in the file reveal it."""
    path, state = tmp_path / "state.pth", {"w": torch.arange(1009.0), "b": torch.ones(7, 11)}
    write_atomically(state, path)
    content, generator = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged, position = bytearray(content), generator.randrange(len(content))
        damaged[position] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            read = read_checkpoint(path)
            assert read.keys() == state.keys()
            assert all(torch.equal(read[name], state[name]) for name in state)  # in unused bytes
        except ValueError as error:
            assert "is refused" in str(error)
            refused += 1
    assert refused > 150


def test_damaged_and_foreign_files_are_refused_with_a_message(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*gone\.pth"):
        mm.load(tmp_path / "gone.pth")
    whole = tmp_path / "whole.pth"
    torch.save({"weights": torch.zeros(1000)}, whole)
    with pytest.raises(ValueError, match="is no mmkit model"):
        mm.load(whole)
    for name, content in (("empty", b""), ("text", b"hello\n" * 9)):
        path = tmp_path / f"{name}.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is refused"):
            mm.load(path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pth")


def test_another_architecture_is_refused_by_name(make_model):
    model = make_model()
    weights = model.state_dict()
    weights["image_projection.2.weight"] = torch.zeros(17, 22)
    with pytest.raises(
        ValueError, match=r"image_projection\.2\.weight' is \(17, 22\) in the file, \(13, 22\)"
    ):
        load_weights(model, weights)
    del weights["image_projection.2.weight"]
    with pytest.raises(ValueError, match=r"the file has no 'image_projection\.2\.weight'"):
        load_weights(model, weights)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "inside"])
def test_names_as_ddp_and_compile_write_them_are_read(make_model, tmp_path, prefix):
    """Also if only a layer was compiled, and into a model that is wrapped itself."""
    model = make_model(seed=1)
    weights = model.state_dict()
    if prefix == "inside":
        named = {
            n.replace("vit.layers.1.", "vit.layers.1._orig_mod."): w for n, w in weights.items()
        }
    else:
        named = {prefix + name: value for name, value in weights.items()}
    assert named.keys() != weights.keys()
    state = {"model_state_dict": named, "architecture": model.architecture()}
    write_atomically(state, tmp_path / "best_model.pth")
    loaded = mm.load(tmp_path / "best_model.pth")
    wrapped = torch.nn.ModuleDict({"module": make_model(seed=2)})
    load_weights(wrapped, named)
    for name, value in weights.items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert torch.equal(wrapped["module"].state_dict()[name], value)


def test_a_checkpoint_is_loaded_for_another_image_size(make_model, tmp_path):
    model = make_model(seed=1)
    state = {"model_state_dict": model.state_dict(), "architecture": model.architecture()}
    write_atomically(state, tmp_path / "best_model.pth")
    model.save_pretrained(tmp_path / "shared")
    expected = model.resize(25).state_dict()
    for path in ("best_model.pth", "shared"):
        larger = mm.load(tmp_path / path, image_size=25)
        assert larger.image_size == 25
        for name, value in larger.state_dict().items():
            assert torch.equal(value, expected[name])
    with pytest.raises(
        ValueError, match=r"position_embeddings' is .*mm\.load\(path\).*image_size=…"
    ):
        load_weights(make_model().resize(25), state["model_state_dict"])
