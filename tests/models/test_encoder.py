"""The towers are transformers' own; what is masked does not change the features."""

import math

import pytest
import torch

import mmkit as mm
from mmkit import Masking, MultimodalEncoder, mask_noise
from mmkit.masking.image import IMAGE_MASKERS, random_mask
from mmkit.masking.plan import caption_of
from mmkit.masking.text import TEXT_MASKERS, Caption, random_text_mask
from mmkit.models.decoder import ForwardSpec
from mmkit.models.patches import patchify, unpatchify
from tests.masking.drawn import draw
from tests.models.images import images
from tests.train_small import other_model


def mask_some(model, texts, ratio):
    """A random text `Masking`."""
    input_ids, valid = texts
    maskable = valid & ~torch.isin(input_ids, model.special_ids)
    noise = mask_noise(0, 0, torch.arange(len(input_ids)), input_ids.shape[1], "text")
    return random_text_mask(noise, ratio, Caption(valid, maskable))


def test_unmasked_images_equal_transformers(model):
    pixels = model.normalize(images())
    assert pixels.min() >= -1 and pixels.max() <= 1
    expected = model.vit(pixels).last_hidden_state
    torch.testing.assert_close(model.image_tokens(images()), expected)


def test_unmasked_texts_equal_transformers(model, texts):
    input_ids, valid = texts
    expected = model.bert(input_ids, attention_mask=valid.long()).last_hidden_state
    tokens, kept = model.text_tokens(input_ids, valid)
    torch.testing.assert_close(tokens[kept], expected[valid])


def test_an_empty_mask_changes_nothing(model):
    masking = random_mask(torch.rand(3, 9), 0.0)
    for mode in ("drop", "replace"):
        close = model.encode_image(images(), masking, mode)
        torch.testing.assert_close(close, model.encode_image(images()))


# -- masked means masked ---------------------------------------------------------------------

IMAGE_MODES = ("drop", "replace")
TEXT_MODES = ("drop", "replace", "80/10/10")
# One ratio for all, and one per sample, so that dropping needs padding.
RATIOS = (0.5, torch.linspace(0.05, 0.9, 7, dtype=torch.float64))


@pytest.fixture
def batch(make_data):
    return make_data(7).batch(range(7))


@pytest.fixture
def every_model(make_model):
    """Each attention implementation with each pooling."""

    def models():
        for pooling in ("mean", "cls"):
            model = make_model(pooling=pooling).eval()
            for kind in ("eager", "sdpa"):
                model.vit.set_attn_implementation(kind)
                model.bert.set_attn_implementation(kind)
                yield model

    return models


def repaint(pixels, where):
    """Other random pixels in the patches `where` (B, 9)."""
    return unpatchify(
        torch.where(where[..., None], patchify(images(len(where), seed=7), 5), patchify(pixels, 5)),
        5,
        (3, 3),
    )


def reword(model, input_ids, where):
    """Other tokens at the positions `where` (B, L)."""
    ids = model.word_ids
    return torch.where(where, ids[(input_ids + 3) % len(ids)], input_ids)


def one_visible(allowed):
    """(B, L) bool: the first allowed position of each row."""
    return allowed & (allowed.cumsum(1) == 1)


@pytest.mark.parametrize("mode", IMAGE_MODES)
@pytest.mark.parametrize("name", IMAGE_MASKERS)
def test_masked_pixels_cannot_be_seen(every_model, batch, name, mode):
    """Other pixels in all masked patches, also in padding: the same features to the bit.

    Other pixels in a single visible patch: other features for each image.
    """
    pixels = batch.pixel_values
    painted = mask_noise(0, 0, batch.sample_ids, 9, "painted").unflatten(1, (3, 3)) < 0.5
    for model in every_model():
        for ratio in RATIOS:
            masking = draw(batch, model, name, ratio=ratio, painted=painted)[0]
            assert masking.mask.any()
            features = model.encode_image(pixels, masking, mode)
            others = repaint(pixels, masking.mask)
            assert torch.equal(features, model.encode_image(others, masking, mode))
            visible = repaint(pixels, one_visible(~masking.mask))
            assert (features != model.encode_image(visible, masking, mode)).any(1).all()


def test_dropped_pixels_are_never_computed_with(every_model, batch):
    """NaN in the masked patches, also in padding, would show even if it were multiplied by 0."""
    for model in every_model():
        masking = draw(batch, model, ratio=RATIOS[1])[0]
        pixels = model.normalize(batch.pixel_values)
        patches = patchify(pixels, 5).masked_fill(masking.mask[..., None], float("nan"))
        features = model.encode_image(unpatchify(patches, 5, (3, 3)), masking)
        assert torch.equal(features, model.encode_image(pixels, masking))


@pytest.mark.parametrize("mode", TEXT_MODES)
@pytest.mark.parametrize("name", TEXT_MASKERS)
def test_masked_words_cannot_be_seen(every_model, batch, name, mode):
    """Other tokens in all masked positions: the same features to the bit; in a visible one: others.

    With 80/10/10 a tenth of the masked tokens is unchanged; as the `Masking` is the same, the model
    gets the token that was there when it was drawn.
    """
    ids, valid = batch.input_ids, batch.valid
    for model in every_model():
        maskable = caption_of(ids, valid, model.token_info).maskable
        for ratio in RATIOS:
            masking = draw(batch, model, text=name, ratio=ratio, text_mode=mode)[1]
            assert masking.mask.any() and (mode == "80/10/10") == (masking.substitute is not None)
            features = model.encode_text(ids, valid, masking, mode)
            others = reword(model, ids, masking.mask)
            assert ((others != ids) == masking.mask).all()
            assert torch.equal(features, model.encode_text(others, valid, masking, mode))
            visible = reword(model, ids, one_visible(maskable & ~masking.mask))
            assert (features != model.encode_text(visible, valid, masking, mode)).any(1).all()


def test_masked_words_cannot_be_seen_in_a_large_batch(make_model, make_data):
    """Also if short captions run apart from long ones: their sorting leaks nothing."""
    model, batch = make_model().eval(), make_data(71).batch(range(71))
    for mode in TEXT_MODES:
        masking = draw(batch, model, text_mode=mode)[1]
        others = reword(model, batch.input_ids, masking.mask)
        a, b = (
            model.encode_text(ids, batch.valid, masking, mode) for ids in (batch.input_ids, others)
        )
        assert torch.equal(a, b)


def test_a_forward_pass_depends_on_what_is_visible_alone(every_model, batch):
    """Both at once, as in training: the features of each encoder, without anything masked."""
    for model in every_model():
        for modes in zip(IMAGE_MODES, TEXT_MODES, strict=False):
            maskings = draw(batch, model, "block", "whole_word", RATIOS[1])
            out = model(batch, *maskings, *modes)
            image = model.encode_image(batch.pixel_values, maskings[0], modes[0])
            text = model.encode_text(batch.input_ids, batch.valid, maskings[1], modes[1])
            assert torch.equal(out.image_features, image) and torch.equal(out.text_features, text)
            others = batch[:]
            others.pixel_values = repaint(batch.pixel_values, maskings[0].mask)
            others.input_ids = reword(model, batch.input_ids, maskings[1].mask)
            again = model(others, *maskings, *modes)
            assert torch.equal(out.image_features, again.image_features)
            assert torch.equal(out.text_features, again.text_features)


def test_features_do_not_depend_on_padding(every_model, batch):
    """Rows of different length have the same features together and alone, without padding."""
    for model in every_model():
        image, text = draw(batch, model, "inverse_block", "block", RATIOS[1])
        assert not image.keep_valid.all() and not text.keep_valid.all()
        ids, valid = batch.input_ids, batch.valid
        images_together = model.encode_image(batch.pixel_values, image)
        texts_together = model.encode_text(ids, valid, text)
        for row in range(7):
            rows = slice(row, row + 1)

            def alone(masking, rows=rows):
                kept = masking.ids_keep[rows][masking.keep_valid[rows]][None]
                return Masking(masking.mask[rows], kept, masking.ids_restore[rows])

            close = dict(rtol=1e-5, atol=1e-6)
            features = model.encode_image(batch.pixel_values[rows], alone(image))
            torch.testing.assert_close(images_together[rows], features, **close)
            features = model.encode_text(ids[rows], valid[rows], alone(text))
            torch.testing.assert_close(texts_together[rows], features, **close)


def shuffled(masking, first=0):
    """The kept tokens and padding of each row, from index `first` on, in another order."""
    order = mask_noise(1, 0, torch.arange(7), masking.ids_keep.shape[1])
    order[:, :first] = -1
    order = order.argsort(1)
    kept, valid = masking.ids_keep.gather(1, order), masking.keep_valid.gather(1, order)
    return Masking(masking.mask, kept, masking.ids_restore, valid)


def test_positions_travel_with_what_is_kept(every_model, batch):
    """Permuted kept tokens give the same features; contents that change positions do not."""
    ids, valid = batch.input_ids, batch.valid
    for model in every_model():
        image, text = draw(batch, model, "random", "random", torch.linspace(0.1, 0.6, 7))
        assert not torch.equal(shuffled(image).ids_keep, image.ids_keep)
        features = model.encode_image(batch.pixel_values, image)
        again = model.encode_image(batch.pixel_values, shuffled(image))
        torch.testing.assert_close(features, again, rtol=1e-5, atol=1e-6)
        patches, rows = patchify(batch.pixel_values, 5), torch.arange(7)
        a, b = image.ids_keep[:, 0], image.ids_keep[:, 1]  # two kept patches
        patches[rows, a], patches[rows, b] = patches[rows, b], patches[rows, a]
        swapped = model.encode_image(unpatchify(patches, 5, (3, 3)), image)
        assert ((swapped - features).abs().amax(1) > 1e-4).all()

        features = model.encode_text(ids, valid, text)
        again = model.encode_text(ids, valid, shuffled(text, first=1))  # [CLS] stays the first
        torch.testing.assert_close(features, again, rtol=1e-5, atol=1e-6)


def test_a_dropped_token_leaves_a_gap(model, texts):
    """The tokens after it keep their positions: against transformers with position_ids."""
    input_ids, valid = texts
    masking = mask_some(model, texts, 0.4)
    row = 2
    keep = masking.ids_keep[row][masking.keep_valid[row]]
    assert keep.max() + 1 > len(keep)
    embeds = model.bert.embeddings.word_embeddings(input_ids[row, keep])[None]
    expected = model.bert(inputs_embeds=embeds, position_ids=keep[None]).last_hidden_state[0]
    tokens, kept = model.text_tokens(input_ids, valid, masking, "drop")
    torch.testing.assert_close(tokens[row][kept[row]], expected, rtol=1e-4, atol=1e-5)


def test_dropped_patches_equal_a_tower_that_never_had_them(model):
    """Against transformers' own blocks with the embeddings of the kept patches alone."""
    pixels, masking = images(), random_mask(mask_noise(0, 0, torch.arange(3), 9), 0.6)
    embedded = model.vit.embeddings(model.normalize(pixels))  # (3, 10, D), with positions
    kept = torch.cat([torch.zeros(3, 1, dtype=torch.int64), 1 + masking.ids_keep], 1)
    x = embedded[torch.arange(3)[:, None], kept]
    for block in model.vit.layers:
        x = block(x)
    torch.testing.assert_close(model.image_tokens(pixels, masking), model.vit.layernorm(x))


def test_mask_tokens_learn_where_they_are_used(make_model, batch):
    """With "replace" and "80/10/10" they get a gradient; with "drop" they get none."""
    for text_mode, learns in (("replace", True), ("80/10/10", True), ("drop", False)):
        model = make_model()
        maskings = draw(batch, model, text_mode=text_mode)
        out = model(batch, *maskings, "drop" if text_mode == "drop" else "replace", text_mode)
        (out.image_features + out.text_features)[:, 0].sum().backward()
        for token in (model.image_mask_token, model.text_mask_token):
            assert (token.grad is not None and token.grad.abs().min() > 0) == learns
        assert model.vit.embeddings.patch_embeddings.projection.weight.grad.any()


# -- sizes, checkpoints, errors ----------------------------------------------------------------


def test_contents_of_padding_do_not_change_features(model, texts):
    input_ids, valid = texts
    padded = torch.cat([input_ids, torch.full((3, 4), 9)], 1)
    longer = torch.cat([valid, torch.zeros(3, 4, dtype=torch.bool)], 1)
    torch.testing.assert_close(
        model.encode_text(padded, longer), model.encode_text(input_ids, valid)
    )


def test_captions_of_any_length_go_together(model, make_data):
    """Features are the same if short captions of a large batch run apart from long ones."""
    batch = make_data(71).batch(range(71))
    together = model.encode_text(batch.input_ids, batch.valid)
    ones = [batch[i : i + 1] for i in range(71)]
    alone = [model.encode_text(one.input_ids, one.valid) for one in ones]
    torch.testing.assert_close(together, torch.cat(alone))
    masking = mask_some(model, (batch.input_ids, batch.valid), 0.4)
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


def test_wrong_sizes_are_refused_with_a_message(model, make_model, tokenizer):
    with pytest.raises(ValueError, match="16 x 16 pixels, the encoder takes 15 x 15"):
        model.encode_image(images(size=16))
    with pytest.raises(ValueError, match="height 16 is not a multiple of patch_size 5; try 15"):
        patchify(torch.zeros(1, 3, 16, 15), 5)
    long = torch.ones(1, 18, dtype=torch.int64)
    with pytest.raises(ValueError, match="18 tokens long, the encoder takes 17"):
        model.encode_text(long, long.bool())
    from transformers import BertConfig, ViTConfig

    with pytest.raises(ValueError, match="image size 64 is not a multiple of patch_size 7; try 63"):
        MultimodalEncoder(ViTConfig(image_size=64, patch_size=7), BertConfig(), tokenizer)
    with pytest.raises(ValueError, match="vocab_size is 9"):
        MultimodalEncoder(ViTConfig(), BertConfig(vocab_size=9), tokenizer)


def test_fast_attention_on_a_cpu_gives_the_same_features(model, texts):
    a = model.encode_image(images()), model.encode_text(*texts)
    model.to_device("cpu")
    b = model.encode_image(images()), model.encode_text(*texts)
    torch.testing.assert_close(a, b)


def test_gradients_of_dropped_patches_are_the_same_bits_with_several_threads(tokenizer):
    """If threads added in no fixed order, a resumed run would differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    try:
        torch.manual_seed(0)
        model = MultimodalEncoder.preset("tiny", tokenizer=tokenizer)
        pixels = torch.randint(0, 256, (61, 3, 64, 64), dtype=torch.uint8)
        masking = random_mask(mask_noise(0, 0, torch.arange(61), 64), 0.5)
        weight = torch.randn(61, 33, 192)  # another gradient for every token

        def gradient():
            positions = model.vit.embeddings.position_embeddings
            return torch.autograd.grad(
                (model._patches(pixels, masking, "drop") * weight).sum(), positions
            )

        first = gradient()[0]
        assert all(torch.equal(first, gradient()[0]) for _ in range(5))
    finally:
        torch.set_num_threads(before)


def test_a_caption_of_padding_alone_has_no_feature_and_spoils_no_gradient(make_model, make_data):
    """With our layers and transformers': the other captions learn as without it."""
    data = make_data(7)
    batch = data.batch(range(7))
    for own in (True, False):
        for pooling in ("mean", "cls"):
            model = make_model(pooling=pooling).to_device("cpu").train()
            if not own:
                model.bert.encoder.layer[0].register_forward_hook(lambda *_: None)
            valid = batch.valid.clone()
            valid[3] = False
            features = model.encode_text(batch.input_ids, valid)
            assert not features[3].any()
            rest = [0, 1, 2, 4, 5, 6]
            found = []
            for part in (features, model.encode_text(batch.input_ids[rest], valid[rest])):
                model.zero_grad()
                (part[part.any(1)].cos().sum() + part.square().sum()).backward()
                found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            for name, gradient in found[1].items():
                assert gradient.isfinite().all(), name
                torch.testing.assert_close(found[0][name], gradient, msg=name, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_type_encodes(make_model, make_data, dtype):
    model, batch = make_model().to_device("cpu").eval(), make_data(7).batch(range(7))
    masking, text = mm.masking.draw_maskings(
        batch, model.token_info, seed=0, epoch=0, image=("random", 0.5), text=("random", 0.4)
    )
    with torch.no_grad():
        exact = model(batch, masking, text)
        other = model.to(dtype)(batch, masking, text)
        whole = model.encode_image(batch.pixel_values), model.class_attention(batch.pixel_values)
    for name in ("image_features", "text_features"):
        a, b = getattr(exact, name), getattr(other, name)
        assert b.dtype == torch.float32
        assert (a - b).norm() < (0.05 if dtype == torch.bfloat16 else 1e-5) * a.norm()
    assert all(x.isfinite().all() for x in whole)


def test_an_unknown_loss_is_named(make_model):
    with pytest.raises(ValueError, match="'siglip' is not known; did you mean 'sigmoid'"):
        make_model(loss="siglip")
    assert "loss" not in make_model().architecture()
    spec = make_model(loss="sigmoid").architecture()
    assert mm.MultimodalEncoder.from_architecture(spec).loss == "sigmoid"


def test_another_image_size_interpolates_positions_and_nothing_else(
    make_model, make_data, tmp_path
):
    """A linear plane of positions stays linear; files, decoder and masks follow."""
    model = make_model().add_decoder(pixels=True, words=True, width=32).to_device("cpu")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.resize(15).vit.embeddings.position_embeddings.shape == (1, 10, 22)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], msg=name)
    with torch.no_grad():
        steps = torch.arange(3.0)
        plane = (7 * steps[:, None] + 2 * steps).flatten()[None, :, None]
        model.vit.embeddings.position_embeddings[:, 1:] = plane.expand(-1, -1, 22)
    assert model.resize(35) is model and (model.image_size, model.num_patches) == (35, 49)
    found = model.vit.embeddings.position_embeddings[0, 1:, 3].unflatten(0, (7, 7))
    torch.testing.assert_close(found[3, 3], torch.tensor(9.0))  # the centre stays the centre
    assert (found.diff(dim=0) > 0).all() and (found.diff(dim=1) > 0).all()
    torch.testing.assert_close(found + found.flip(0, 1), torch.full((7, 7), 18.0))
    batch = make_data(5, size=35).batch(range(5))
    masking, text = mm.masking.draw_maskings(
        batch, model.token_info, seed=0, epoch=0, image=("random", 0.5), text=("random", 0.4)
    )
    model.eval()
    wanted = ForwardSpec(pixels=True)
    with torch.no_grad():
        out = model(batch, masking, text, wanted=wanted)
    assert out.pixels.shape == (5, 49, 75)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = mm.load(tmp_path)(batch, masking, text, wanted=wanted)
    torch.testing.assert_close(again.pixels, out.pixels)
    torch.testing.assert_close(again.image_features, out.image_features)
    with pytest.raises(ValueError, match="image_size=36 is not a multiple of patch_size 5; try 35"):
        model.resize(36)
    with pytest.raises(
        ValueError, match=r"15 x 15 pixels, .*image_size=35, or call model\.resize\(15"
    ):
        model.encode_image(make_data(5).batch(range(5)).pixel_values)


def test_what_an_encoder_says_of_long_captions_is_a_remedy(make_data):
    model, data = other_model(make_data), make_data(23)
    with pytest.raises(ValueError, match="the encoder takes 5") as error:
        model(data.batch(range(23)))
    remedy = str(error.value).split("take batches of ")[1]
    view = eval(remedy, {"dataset": data, "model": model})
    assert model(view.batch(range(23))).text_features.shape == (23, 13)
