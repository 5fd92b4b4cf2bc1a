"""Worker processes give the same batches, also without room for shared memory."""

import subprocess
import sys

import torch

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
