"""Images are classified by the texts of their classes."""

import pytest
import torch
import torch.nn.functional as F

import mmkit as mm
from mmkit import embed, embed_texts, zero_shot


def test_zero_shot_takes_the_nearest_class(make_model, make_data):
    model, data = make_model().eval(), make_data(23)
    prompts = {"cat": ["a cat", "old cat"], "dog": ["a dog"], "boat": ["boat"]}
    classes, scores = zero_shot(model, embed(model, data), prompts)
    cat = F.normalize(embed_texts(model, prompts["cat"]).mean(0), dim=0)
    torch.testing.assert_close(scores[:, 0], embed(model, data).image_features @ cat)
    assert torch.equal(classes, scores.argmax(1)) and scores.shape == (23, 3)


def test_a_text_is_one_prompt_and_a_loss_must_be_known(make_model, make_data):
    model, data = make_model().eval(), make_data(23)
    features = mm.embed(model, data)
    alone = mm.zero_shot(model, features, {"cat": "a cat", "dog": ["dog", "big dog"]})[1]
    listed = mm.zero_shot(model, features, {"cat": ["a cat"], "dog": ["dog", "big dog"]})[1]
    assert torch.equal(alone, listed)
    for wrong in ({"cat": []}, {"cat": " "}, {}, ["cat"]):
        with pytest.raises(ValueError, match="give a"):
            mm.zero_shot(model, features, wrong)
    with pytest.raises(ValueError, match=r"loss='siglip' is not known; did you mean 'sigmoid'\?"):
        mm.evaluate(model, data, loss="siglip")
