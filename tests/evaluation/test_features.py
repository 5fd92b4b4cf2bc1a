"""Features under any masker."""

import pytest
import torch

import mmkit as mm


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
