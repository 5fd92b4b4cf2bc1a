"""Batches of worker processes, also without room for shared memory; what counts as a data set."""

import subprocess
import sys

import pytest
import torch

import mmkit as mm
from mmkit import MultimodalDataset
from mmkit.data.loader import load_batches
from tests.data.two_colours import TEXTS


def test_workers_give_the_same_batches(files):
    data = MultimodalDataset(files, TEXTS, image_size=13)
    keys = [(torch.tensor([0, 5, 3]), torch.rand(3)), (torch.tensor([6, 1]), torch.rand(2))]
    for here, there in zip(
        load_batches(data, keys, 0, False), load_batches(data, keys, 2, False), strict=True
    ):
        assert torch.equal(here.pixel_values, there.pixel_values)
        assert torch.equal(here.input_ids, there.input_ids)


NO_SHARED_MEMORY = """
import resource, sys, torch
from pathlib import Path
from mmkit.data.loader import load_batches
from tests.train_small import data_in_files

data = data_in_files(Path(sys.argv[1]), 23)
data.transform = lambda image: torch.full((3, 223, 227), float(sum(image.size)))
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
keys = [(torch.arange(i, i + 7), torch.rand(7)) for i in (0, 7, 13)]
found = list(load_batches(data, keys, 2, False))
for batch, key in zip(found, keys, strict=True):
    wanted = data.batch(*key)
    for part in ("pixel_values", "input_ids", "valid", "sample_ids"):
        assert torch.equal(getattr(batch, part), getattr(wanted, part)), part
print("all batches came")
"""


def test_workers_without_room_for_shared_memory_send_their_batches_all_the_same(tmp_path):
    """No file of more than 1 MB, as in a full /dev/shm: a batch of 4 MB still arrives."""
    command = [sys.executable, "-c", NO_SHARED_MEMORY, str(tmp_path / "images")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "all batches came\n", done.stderr[-2000:]


def test_a_torch_subset_of_ours_is_a_data_set(make_trainer, make_data, make_model):
    """The rows of a subset, and of a subset of it; anything else is an error with a remedy."""
    data, model = make_data(53), make_model()
    first, second = torch.utils.data.random_split(
        data, [37, 16], generator=torch.Generator().manual_seed(0)
    )
    val = torch.utils.data.Subset(second, range(3, 14))
    trainer = make_trainer(model, data=first, val=val, max_steps=1)
    assert trainer.train.sample_ids.tolist() == list(first.indices)
    assert trainer.val.sample_ids.tolist() == [second.indices[i] for i in range(3, 14)]
    trainer.fit()
    whole = data.subset(second.indices)
    assert mm.evaluate(model, second) == mm.evaluate(model, whole)
    assert mm.Index(model, second).dataset.texts == whole.texts
    assert mm.inspect(second).rows == 16
    assert mm.overlap(first, second, near=False).images == 16


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda d: torch.utils.data.DataLoader(d), r"is a DataLoader, .* \({}=loader\.dataset\)"),
        (lambda d: [(d[0]["image"], "a dog")], r"is a list, .* give mm\.MultimodalDataset\("),
        (
            lambda d: torch.utils.data.TensorDataset(torch.zeros(7)),
            "is a TensorDataset, not a data",
        ),
        (lambda d: torch.utils.data.Subset([1, 2, 3], [0]), "is a list, not a data set"),
        (lambda d: (d, d), "is a tuple, .* give one of the data sets in it"),
        (lambda d: "pairs.csv", r"is a str, .* mm\.load_data\('pairs\.csv'\)"),
    ],
)
def test_what_is_no_data_set_is_named(make_config, make_model, make_data, wrong, words):
    data, model = make_data(53), make_model()
    given = wrong(data)
    with pytest.raises(ValueError, match="train " + words.format("train")):
        mm.train_model(make_config(), given, None, model)
    with pytest.raises(ValueError, match="val " + words.format("val")):
        mm.train_model(make_config(), data, given, model)
    for call in (mm.evaluate, mm.embed, mm.evaluate_reconstruction, mm.Index):
        shown = (
            model if call is not mm.evaluate_reconstruction else make_model().add_decoder(width=32)
        )
        with pytest.raises(ValueError, match="dataset " + words.format("dataset")):
            call(shown, given)
