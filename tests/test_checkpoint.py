"""Files are whole or absent, and never run code."""

import pickle

import pytest
import torch

import mmkit as mm
from mmkit.checkpoint import load_weights, read_checkpoint, write_atomically


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pth"
    write_atomically({"step": 1}, path)

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically({"step": 2}, path)
    monkeypatch.undo()
    assert read_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.pth"]


class Hostile:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("writer", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_a_file_with_code_is_refused_and_not_run(tmp_path, writer):
    path, trace = tmp_path / "best_model.pth", tmp_path / "it_ran"
    writer({"model_state_dict": Hostile(trace)}, path)
    with pytest.raises(ValueError, match="is refused") as refused:
        mm.load(path)
    assert not trace.exists()
    assert "weights_only" not in str(refused.value)  # torch's advice: read it unsafely


def test_damaged_and_foreign_files_are_refused_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*gone\.pth"):
        mm.load(tmp_path / "gone.pth")
    whole = tmp_path / "whole.pth"
    torch.save({"weights": torch.zeros(1000)}, whole)
    with pytest.raises(ValueError, match="is no mmkit model"):
        mm.load(whole)
    for name, content in (
        ("cut", whole.read_bytes()[:700]),
        ("empty", b""),
        ("text", b"hello\n" * 9),
    ):
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


def test_random_state_goes_through_a_file(tmp_path):
    """Python, NumPy and torch draw the same numbers after the state went to disk and back."""
    import random

    import numpy as np

    write_atomically(mm.checkpoint.random_state(), tmp_path / "random.pth")
    drawn = random.random(), np.random.rand(), torch.rand(3)
    mm.checkpoint.set_random_state(read_checkpoint(tmp_path / "random.pth"))
    again = random.random(), np.random.rand(), torch.rand(3)
    assert drawn[:2] == again[:2] and torch.equal(drawn[2], again[2])
