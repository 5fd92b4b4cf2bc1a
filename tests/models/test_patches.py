"""Images become patches and come back; positions are interpolated."""

import torch

from mmkit.models.patches import patchify, unpatchify


def test_patchify_and_back():
    x = torch.randn(2, 3, 10, 15)
    patches = patchify(x, 5)
    assert patches.shape == (2, 6, 75)
    assert torch.equal(patches[0, 4].reshape(3, 5, 5), x[0, :, 5:10, 5:10])
    assert torch.equal(unpatchify(patches, 5, (2, 3)), x)


def test_constant_positions_stay_constant_at_every_size(make_model):
    for size in (5, 10, 25, 55):
        model = make_model()
        with torch.no_grad():
            model.vit.embeddings.position_embeddings.fill_(0.7)
        positions = model.resize(size).vit.embeddings.position_embeddings
        torch.testing.assert_close(positions, torch.full((1, 1 + (size // 5) ** 2, 22), 0.7))
