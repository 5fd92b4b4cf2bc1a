"""Features are those of all images and all captions, in any batches."""

import torch

from mmkit import embed


def test_embedding_ignores_batches_and_counts_all_captions(make_model, make_data):
    model, data = make_model().eval(), make_data(23)
    data.texts[4].append("an old red bread")
    a, b = embed(model, data), embed(model, data, batch_size=5)
    torch.testing.assert_close(a.image_features, b.image_features)
    torch.testing.assert_close(a.text_features, b.text_features)
    assert a.image_features.shape == (23, 13) and a.text_features.shape == (24, 13)
    assert a.caption_ids[5] in a.image_captions[4] and a.first_caption[5] == 6
    assert a.caption_ids[5] not in a.image_captions[5]
