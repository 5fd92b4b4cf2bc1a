"""The towers are transformers' own; what is hidden cannot be seen."""

import math

import pytest
import torch

from mmkit import MultimodalEncoder, mask_noise
from mmkit.encoder import patchify, unpatchify
from mmkit.masking import maskable_words, random_mask, random_text_mask
from mmkit.tokenizer import encode_texts


@pytest.fixture
def model(make_model):
    return make_model().eval()


@pytest.fixture
def texts(tokenizer):
    return encode_texts(tokenizer, ["old red cat", "dog", "small blue boat and big green tree"], 17)


def pictures(count=3, size=15, seed=0):
    torch.manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def test_patchify_and_back():
    x = torch.randn(2, 3, 10, 15)
    patches = patchify(x, 5)
    assert patches.shape == (2, 6, 75)
    assert torch.equal(patches[0, 4].reshape(3, 5, 5), x[0, :, 5:10, 5:10])
    assert torch.equal(unpatchify(patches, 5, (2, 3)), x)


def test_unmasked_pictures_equal_transformers(model):
    pixels = model.normalize(pictures())
    assert pixels.min() >= -1 and pixels.max() <= 1
    expected = model.vit(pixels).last_hidden_state
    torch.testing.assert_close(model.image_tokens(pictures()), expected)


def test_unmasked_texts_equal_transformers(model, texts):
    input_ids, valid = texts
    expected = model.bert(input_ids, attention_mask=valid.long()).last_hidden_state
    tokens, kept = model.text_tokens(input_ids, valid)
    torch.testing.assert_close(tokens[kept], expected[valid])


def test_a_mask_that_hides_nothing_changes_nothing(model):
    masking = random_mask(torch.rand(3, 9), 0.0)
    for mode in ("drop", "replace"):
        close = model.encode_image(pictures(), masking, mode)
        torch.testing.assert_close(close, model.encode_image(pictures()))


@pytest.mark.parametrize("mode", ["drop", "replace"])
def test_hidden_pixels_cannot_be_seen(model, mode):
    """Changing hidden pixels leaves the features as they are, to the bit; visible ones do not."""
    masking = random_mask(mask_noise(0, 0, torch.arange(3), 9), 0.6)
    one, other = patchify(pictures(seed=1), 5), patchify(pictures(seed=2), 5)
    mixed = torch.where(masking.mask[..., None], other, one)
    seen = [
        model.encode_image(unpatchify(x, 5, (3, 3)), masking, mode) for x in (one, mixed, other)
    ]
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2])


@pytest.mark.parametrize("mode", ["drop", "replace"])
def test_hidden_words_cannot_be_seen(model, texts, mode):
    input_ids, valid = texts
    words = maskable_words(input_ids, valid, model.special_ids)
    masking = random_text_mask(torch.rand(input_ids.shape), 0.5, valid, words)
    assert masking.mask.any()
    other = torch.where(masking.mask, (input_ids + 3) % len(model.tokenizer), input_ids)
    a, b = (model.encode_text(ids, valid, masking, mode) for ids in (input_ids, other))
    assert torch.equal(a, b)
    assert not torch.allclose(a, model.encode_text(input_ids, valid))


def test_order_of_kept_patches_does_not_matter(model):
    """Positions travel with the patches: shuffling the kept ones gives the same features."""
    masking = random_mask(torch.rand(3, 9), 0.3)
    shuffled = random_mask(torch.rand(3, 9), 0.3)
    shuffled.mask, order = masking.mask, torch.randperm(6)
    shuffled.ids_keep = masking.ids_keep[:, order]
    a, b = (model.encode_image(pictures(), m) for m in (masking, shuffled))
    torch.testing.assert_close(a, b)
    shuffled.ids_keep = masking.ids_keep.sort(1).values.roll(1, 0)  # another sample's patches
    assert not torch.allclose(a, model.encode_image(pictures(), shuffled))


def test_dropping_and_keeping_positions_of_words(model, texts):
    """A dropped word leaves a gap: the words after it keep their positions."""
    input_ids, valid = texts
    words = maskable_words(input_ids, valid, model.special_ids)
    masking = random_text_mask(torch.rand(input_ids.shape), 0.4, valid, words)
    row = 2
    keep = masking.ids_keep[row][masking.keep_valid[row]]
    embeds = model.bert.embeddings.word_embeddings(input_ids[row, keep])[None]
    expected = model.bert(inputs_embeds=embeds, position_ids=keep[None]).last_hidden_state[0]
    tokens, kept = model.text_tokens(input_ids, valid, masking, "drop")
    torch.testing.assert_close(tokens[row][kept[row]], expected, rtol=1e-4, atol=1e-5)


def test_padding_cannot_change_features(model, texts):
    input_ids, valid = texts
    padded = torch.cat([input_ids, torch.full((3, 4), 9)], 1)
    longer = torch.cat([valid, torch.zeros(3, 4, dtype=torch.bool)], 1)
    torch.testing.assert_close(
        model.encode_text(padded, longer), model.encode_text(input_ids, valid)
    )


def test_captions_of_any_length_go_together(model, make_data):
    """In a large batch short captions run apart from long ones; the features do not change."""
    batch = make_data(71).batch(range(71))
    together = model.encode_text(batch.input_ids, batch.valid)
    ones = [batch[i : i + 1] for i in range(71)]
    alone = [model.encode_text(one.input_ids, one.valid) for one in ones]
    torch.testing.assert_close(together, torch.cat(alone))
    masking = random_text_mask(torch.rand(batch.valid.shape), 0.4, batch.valid, batch.valid)
    dropped = model.encode_text(batch.input_ids, batch.valid, masking, "drop")
    part = torch.arange(0, 71, 3)
    apart = model.encode_text(batch.input_ids[part], batch.valid[part], masking[part], "drop")
    torch.testing.assert_close(dropped[part], apart)


def test_features_are_unit_length(model, texts, make_data):
    out = model(make_data(5).batch(range(5)))
    for x in (out.image_features, out.text_features):
        assert x.shape == (5, 13)
        torch.testing.assert_close(x.norm(dim=1), torch.ones(5))
    assert out.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert out.logit_bias.item() == -10


def test_presets_have_the_tabled_sizes(tokenizer):
    """Picture, patch, width, depth and heads of both towers, length, common space: as designed."""
    tiny = (64, 8, (192, 6, 3), (192, 4, 3), 32, 192)
    small = (224, 16, (384, 12, 6), (384, 6, 6), 64, 256)
    base = (224, 16, (768, 12, 12), (768, 12, 12), 77, 512)
    for name, expected in (("tiny", tiny), ("small", small), ("base", base)):
        model = MultimodalEncoder.preset(name, tokenizer=tokenizer)
        towers = [
            (c.hidden_size, c.num_hidden_layers, c.num_attention_heads)
            for c in (model.vit.config, model.bert.config)
        ]
        sizes = (model.image_size, model.patch_size, *towers, model.max_length, model.embed_dim)
        assert sizes == expected
    with pytest.raises(ValueError, match="did you mean 'small'"):
        MultimodalEncoder.preset("smal", tokenizer=tokenizer)


def test_from_backbones_reads_saved_checkpoints(model, texts, tmp_path):
    """Towers, tokenizer and pixel statistics come from local folders as from the hub."""
    (tmp_path / "vit").mkdir()
    model.vit.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit/preprocessor_config.json").write_text(
        '{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3],'
        ' "image_processor_type": "ViTImageProcessor"}'
    )
    model.bert.save_pretrained(tmp_path / "bert")
    model.tokenizer.save_pretrained(tmp_path / "bert")
    vit, bert = str(tmp_path / "vit"), str(tmp_path / "bert")
    other = MultimodalEncoder.from_backbones(vit, bert, embed_dim=7, temperature=0.1).eval()
    pixels = torch.randn(2, 3, 15, 15)
    torch.testing.assert_close(other.image_tokens(pixels), model.image_tokens(pixels))
    torch.testing.assert_close(other.text_tokens(*texts)[0], model.text_tokens(*texts)[0])
    assert other.encode_image(pixels).shape == (2, 7)
    white = other.normalize(torch.full((1, 3, 15, 15), 255, dtype=torch.uint8))[0, :, 0, 0]
    torch.testing.assert_close(white, torch.tensor([3.0, 2.0, 4 / 3]))
    model.half().vit.save_pretrained(tmp_path / "vit")
    half = MultimodalEncoder.from_backbones(vit, bert)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    half.encode_image(pixels)
    with pytest.raises(ValueError, match="is a 'bert' checkpoint; give a 'vit' one"):
        MultimodalEncoder.from_backbones(bert, bert)


def test_an_architecture_is_rebuilt_from_plain_values(model, texts):
    import json

    spec = json.loads(json.dumps(model.architecture()))
    other = MultimodalEncoder.from_architecture(spec).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.encode_image(pictures()), model.encode_image(pictures()))
    words = ["old red cat", "small boat"]
    assert other.tokenizer(words)["input_ids"] == model.tokenizer(words)["input_ids"]


def test_wrong_sizes_are_refused_in_words(model, make_model, tokenizer):
    with pytest.raises(ValueError, match="16 x 16 pixels, the encoder takes 15 x 15"):
        model.encode_image(pictures(size=16))
    with pytest.raises(ValueError, match="height 16 is not a multiple of patch_size 5; try 15"):
        patchify(torch.zeros(1, 3, 16, 15), 5)
    long = torch.ones(1, 18, dtype=torch.int64)
    with pytest.raises(ValueError, match="18 pieces long, the encoder takes 17"):
        model.encode_text(long, long.bool())
    from transformers import BertConfig, ViTConfig

    with pytest.raises(ValueError, match="image size 64 is not a multiple of patch_size 7; try 63"):
        MultimodalEncoder(ViTConfig(image_size=64, patch_size=7), BertConfig(), tokenizer)
    with pytest.raises(ValueError, match="vocab_size is 9"):
        MultimodalEncoder(ViTConfig(), BertConfig(vocab_size=9), tokenizer)


def test_fast_attention_on_a_cpu_gives_the_same_features(model, texts):
    a = model.encode_image(pictures()), model.encode_text(*texts)
    model.to_device("cpu")
    b = model.encode_image(pictures()), model.encode_text(*texts)
    torch.testing.assert_close(a, b)


def test_gradients_of_dropped_patches_are_the_same_bits_with_several_threads(tokenizer):
    """Threads that add up in no fixed order would make a resumed run another run."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    try:
        torch.manual_seed(0)
        model = MultimodalEncoder.preset("tiny", tokenizer=tokenizer)
        pixels = torch.randint(0, 256, (61, 3, 64, 64), dtype=torch.uint8)
        masking = random_mask(mask_noise(0, 0, torch.arange(61), 64), 0.5)
        weight = torch.randn(61, 33, 192)  # another gradient for every token

        def gradient():
            place = model.vit.embeddings.position_embeddings
            return torch.autograd.grad(
                (model._patches(pixels, masking, "drop") * weight).sum(), place
            )

        first = gradient()[0]
        assert all(torch.equal(first, gradient()[0]) for _ in range(5))
    finally:
        torch.set_num_threads(before)
