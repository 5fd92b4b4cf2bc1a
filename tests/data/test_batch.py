"""A batch says which of its captions are correct for which images, and can be divided."""

import pytest
import torch

from mmkit import MultimodalDataset, train_wordpiece
from mmkit.data.partners import correct_pairs
from tests.data.two_colours import TEXTS


def test_data_that_is_one_to_one_carries_no_partners(files, make_data):
    batch = make_data(23).batch(range(7))
    assert batch.partners is batch.caption_ids is batch.image_captions is None
    assert torch.equal(batch[2:5].correct(), torch.eye(3, dtype=torch.bool))
    pixels = make_data(3).batch([0, 1, 0]).pixel_values
    data = MultimodalDataset.from_pixels(pixels, ["a", "b", "c"])
    assert data.batch(range(3)).correct().int().tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert data.encoded_by(data.tokenizer, 2).batch([0, 1]).correct().all()  # no text is left
    foreign = train_wordpiece(["b"])  # it reads no other letter: all are unknown, but not all equal
    other = MultimodalDataset.from_pixels(
        pixels[:2], [["xy", "zz"], ["XY", "yx"]], tokenizer=foreign
    )
    assert correct_pairs(*other.partners()[::-1]).int().tolist() == [[1, 1, 1, 0], [1, 0, 1, 1]]
    with pytest.raises(ValueError, match="2 sample_ids for 3 rows"):
        MultimodalDataset.from_pixels(pixels, ["a", "b", "c"], sample_ids=[5, 3])
    with pytest.raises(ValueError, match="sample id 5 occurs in 2 rows"):
        MultimodalDataset.from_pixels(pixels, ["a", "b", "c"], sample_ids=[5, 3, 5])


def test_micro_batches_are_nearly_equal_and_as_many_as_asked_for(files):
    batch = MultimodalDataset(files, TEXTS, image_size=13).batch(range(7))
    for parts, sizes in ((1, [7]), (2, [4, 3]), (5, [2, 2, 1, 1, 1]), (9, [1] * 7)):
        tokens = batch.split(parts)
        assert [len(token) for token in tokens] == sizes
        assert torch.cat([token.sample_ids for token in tokens]).tolist() == list(range(7))
