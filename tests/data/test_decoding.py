"""A transform draws by the noise of its image, and its errors are raised as they are."""

import random

import numpy as np
import pytest
import torch

import mmkit as mm
from mmkit import MultimodalDataset
from mmkit.data.loader import load_batches
from tests.data import two_colours
from tests.data.seven_images import NAMES, TEXTS

pytestmark = pytest.mark.usefixtures("cache")


def test_a_transform_that_fails_says_so_in_its_own_words(root):
    """The error is raised here, not as the traceback of a worker process."""

    def transform(image):
        raise TypeError("my own mistake")

    paths = [root / name for name in NAMES]
    with pytest.raises(TypeError, match=r"^my own mistake$"):
        mm.from_lists(paths, TEXTS, transform=transform, on_error="skip", num_workers=2)
    from mmkit.data.loader import load_batches

    data = mm.from_lists(paths, TEXTS, transform=transform, num_workers=2)
    keys = [(torch.arange(7), torch.zeros(7))]
    with pytest.raises(TypeError, match=r"^my own mistake$"):
        list(load_batches(data, keys, 2, False))


def test_a_random_transform_draws_by_the_noise_of_its_image(files):
    """Draws depend on image and epoch, not on the batch; the process's own draws do not change."""

    def transform(image):
        drawn = torch.tensor([torch.rand(()), random.random(), np.random.rand()])
        return drawn[:, None, None].expand(3, 5, 5)

    data = MultimodalDataset(files, two_colours.TEXTS, transform=transform)
    rows, noise = torch.tensor([2, 0, 1]), torch.tensor([0.3, 0.7, 0.1])
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    drawn = data.batch(rows, noise).pixel_values[..., 0, 0]
    assert len(drawn.unique()) == 9
    for workers in (0, 1):
        _, batch = load_batches(data, [([0], noise[:1]), (rows, noise)], workers, False)
        assert torch.equal(batch.pixel_values[..., 0, 0], drawn)
    assert torch.equal(data.batch([0], torch.tensor([0.7])).pixel_values[0, :, 0, 0], drawn[1])
    assert not torch.equal(data.batch([0], torch.tensor([0.6])).pixel_values[0, :, 0, 0], drawn[1])
    after = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    data.batch(rows)  # without noise they are not reproducible
    assert not torch.equal(before[0], torch.get_rng_state())
