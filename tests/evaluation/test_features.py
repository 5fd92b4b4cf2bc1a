"""Features are those of all images and all captions, in any batches and under any masker."""

import pytest
import torch

import mmkit as mm
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


@pytest.mark.parametrize("name", ["painted", "layers", "attentive", "block"])
def test_evaluation_under_any_masker(name):
    """Masked scores need a masker by name; painted masks may differ from image to image."""
    val = mm.openmoji(64)[1].subset(range(37))
    torch.manual_seed(0)
    model = mm.MultimodalEncoder.preset("tiny", tokenizer=val.tokenizer)
    argument = torch.rand(37, 8, 8) < 0.5 if name == "painted" else 0.5
    features = mm.embed(model, val, image_mask=(name, argument), batch_size=11)
    plain = mm.embed(model, val, batch_size=11)
    assert not torch.allclose(features.image_features, plain.image_features)
    assert torch.equal(features.text_features, plain.text_features)
    if name == "painted":
        one = mm.embed(model, val.subset([17]), image_mask=(name, argument[17]))
        torch.testing.assert_close(one.image_features[0], features.image_features[17])
        with pytest.raises(ValueError, match="5 painted masks for 37 images"):
            mm.embed(model, val, image_mask=(name, argument[:5]))
