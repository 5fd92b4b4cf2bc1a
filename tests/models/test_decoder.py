"""The decoder equals MAE and BERT, does not see what is masked, and learns from that alone."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import mmkit as mm
from mmkit.evaluation.reconstruction import (
    evaluate_reconstruction,
    mean_patches,
    partners,
    reconstruct,
)
from mmkit.masking.core import mask_largest
from mmkit.masking.plan import draw_maskings, mask_ratios
from mmkit.models.decoder import ForwardSpec, MultimodalDecoder, hard_negatives, sin_cos_2d
from mmkit.models.patches import patchify
from mmkit.objective import num_pairs, term_sums
from mmkit.training.optim import build_optimizers, set_learning_rate

HEADS = dict(pixels=True, words=True, width=32, pixel_depth=1, word_depth=1)
PAINTED = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 1]])
# Which captions (columns) are correct for which images: rows 0 and 2 show the same image, and the
# caption of row 4 is correct for image 3, too, but not that of row 3 for image 4.
IDS = torch.tensor([0, 1, 2, 3, 4])
TABLE = torch.tensor([[0, 2], [1, -1], [2, 0], [3, 4], [4, -1]])
CORRECT = torch.eye(5, dtype=torch.bool)
CORRECT[0, 2] = CORRECT[2, 0] = CORRECT[3, 4] = True


@pytest.fixture
def make_decoding(make_model):
    """The small encoder with a decoder, every parameter moved away from its initial value."""

    def make(dropout=0.0, **heads):
        model = make_model(dropout=dropout).add_decoder(**HEADS | heads)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model.to_device("cpu").eval()

    return make


def draw(model, batch, masks="constant", text_mode="replace", seed=0):
    """Maskings of a batch: one ratio for all, one for each sample, or painted."""
    ratio = 0.6
    if masks == "uniform":
        ratio = mask_ratios("uniform", 0.2, 0.8, 0.0, batch.sample_ids, seed=seed, epoch=0)
    image = ("painted", PAINTED) if masks == "painted" else ("random", ratio)
    text = ("random", ratio)
    options = dict(seed=seed, epoch=0, text_mode=text_mode, predict_tokens=True)
    return draw_maskings(batch, model.token_info, image=image, text=text, **options)


def wanted(**values):
    return ForwardSpec(**dict(contrast=False, pixels=True, tokens=True) | values)


def other_words(batch, where, model):
    """The batch with another token at each of these positions."""
    ids = model.word_ids
    index = (batch.input_ids[..., None] == ids).long().argmax(-1)
    ids = torch.where(where, ids[(index + 1) % len(ids)], batch.input_ids)
    assert (ids != batch.input_ids)[where].all()
    return dataclasses.replace(batch, input_ids=ids)


def other_pixels(batch, patches, patch_size=5):
    """The batch with every pixel of these patches (B, N) changed."""
    grid = batch.pixel_values.shape[2] // patch_size
    where = patches.unflatten(1, (grid, grid))
    for axis in (1, 2):
        where = where.repeat_interleave(patch_size, axis)
    pixels = torch.where(where[:, None], 255 - batch.pixel_values, batch.pixel_values)
    return dataclasses.replace(batch, pixel_values=pixels)


# -- parity ----------------------------------------------------------------------------------


def mae_and_ours(make_model, norm_pix_loss):
    """transformers' MAE, and our model with the same weights."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(3)
    tower = dict(hidden_size=22, num_hidden_layers=2, num_attention_heads=2, intermediate_size=31)
    decoder = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    mae = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=15, patch_size=5, mask_ratio=0.75, norm_pix_loss=norm_pix_loss, **tower,
            **{f"decoder_{name}": value for name, value in decoder.items()},
            decoder_intermediate_size=256,
        )
    )  # fmt: skip
    mae.decoder.initialize_weights(9)  # a new model does not set its positions
    with torch.no_grad():
        for parameter in mae.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    ours = make_model().add_decoder(
        words=False, width=64, pixel_depth=2, norm_pix_loss=norm_pix_loss
    )
    ours.vit.load_state_dict(mae.vit.state_dict())
    theirs, layers, head = mae.decoder, ours.decoder.pixel_layers, ours.decoder.pixel_head
    layers.embed.load_state_dict(theirs.decoder_embed.state_dict())
    layers.layers.load_state_dict(theirs.decoder_layers.state_dict())
    layers.norm.load_state_dict(theirs.decoder_norm.state_dict())
    layers.mask_token.data = theirs.mask_token.data.flatten().clone()
    order = ours_from_theirs(5)
    head.weight.data = theirs.decoder_pred.weight.data[order].clone()
    head.bias.data = theirs.decoder_pred.bias.data[order].clone()
    return mae.train(), ours.to_device("cpu").train()


def ours_from_theirs(p):
    """Index of value (c, row, column) of our patch in theirs, which is (row, column, c)."""
    return torch.arange(3 * p * p).reshape(p, p, 3).permute(2, 0, 1).flatten()


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_equal_to_transformers_mae(make_model, make_data, norm_pix_loss):
    """With the same weights, pixels and noise: loss, predictions, gradients of shared weights."""
    mae, ours = mae_and_ours(make_model, norm_pix_loss)
    batch, noise = make_data(7).batch(range(7)), torch.rand(7, 9)
    pixels = ours.normalize(batch.pixel_values)
    masking = mask_largest(noise, 0.75)  # int(2.25) == round(2.25)
    out = ours(batch, masking, None, "drop", wanted=wanted(tokens=False))
    loss = term_sums(ours, out, batch, (masking, None))["mim"] / masking.mask.sum()
    theirs = mae(pixels, noise=noise)
    torch.testing.assert_close(masking.mask.float(), theirs.mask)
    torch.testing.assert_close(
        out.pixels, theirs.logits[..., ours_from_theirs(5)], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-5, atol=0)
    loss.backward()
    theirs.loss.backward()
    pairs = [
        (ours.vit.get_parameter(name), parameter) for name, parameter in mae.vit.named_parameters()
    ]
    layers = ours.decoder.pixel_layers
    pairs += zip(layers.layers.parameters(), mae.decoder.decoder_layers.parameters(), strict=True)
    pairs += [(layers.embed.weight, mae.decoder.decoder_embed.weight)]
    assert torch.allclose(layers.mask_token.grad, mae.decoder.mask_token.grad[0, 0], atol=1e-6)
    for mine, other in pairs:
        if other.grad is not None:
            off = (mine.grad - other.grad).norm()
            assert off <= 1e-5 * max(other.grad.norm(), 1e-2)


@pytest.mark.parametrize("side, channels", [(3, 64), (7, 32)])
def test_fixed_positions_are_those_of_mae(side, channels):
    """As in transformers' MAE decoder: columns in the first half, rows in the second."""
    from transformers import ViTMAEConfig
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder

    decoder = ViTMAEDecoder(ViTMAEConfig(decoder_hidden_size=channels), side**2)
    decoder.initialize_weights(side**2)
    theirs = decoder.decoder_pos_embed[0]
    assert not theirs[0].any()  # of the class token
    torch.testing.assert_close(sin_cos_2d(side, side, channels), theirs[1:], rtol=0, atol=1e-6)


def test_equal_to_bert_for_masked_words(make_decoding, make_data):
    """Linear head, tied embeddings, 80/10/10: loss and gradients; -100 where nothing is masked."""
    from transformers import BertForMaskedLM

    model = make_decoding(pixels=False, word_depth=0)
    tokenizer, head = model.tokenizer, model.decoder.word_head
    theirs = BertForMaskedLM(model.bert.config)
    theirs.bert.load_state_dict(model.bert.state_dict())
    transform = theirs.cls.predictions.transform
    transform.dense.load_state_dict(head.dense.state_dict())
    transform.LayerNorm.load_state_dict(head.norm.state_dict())
    theirs.cls.predictions.bias.data = head.bias.data.clone()
    theirs.cls.predictions.decoder.bias = theirs.cls.predictions.bias
    embedding = theirs.bert.embeddings.word_embeddings.weight
    assert theirs.cls.predictions.decoder.weight is embedding
    model.text_mask_token.data = embedding.data[tokenizer.mask_token_id].clone()

    batch = make_data(23).batch(range(23))
    _, masking = draw(model, batch, text_mode="80/10/10")
    drawn = masking.substitute[masking.mask]
    same = drawn == batch.input_ids[masking.mask]
    assert (drawn < 0).any() and same.any() and (~same & (drawn >= 0)).any()  # all three kinds
    instead = torch.where(masking.substitute < 0, tokenizer.mask_token_id, masking.substitute)
    ids = torch.where(masking.mask, instead, batch.input_ids)
    labels = batch.input_ids.masked_fill(~masking.mask, -100)
    reference = theirs.train()(ids, attention_mask=batch.valid.long(), labels=labels).loss
    reference.backward()

    out = model(batch, None, masking, "drop", "80/10/10", wanted(pixels=False))
    loss = term_sums(model, out, batch, (None, masking))["mlm"] / masking.mask.sum()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    loss.backward()
    rows = model.bert.embeddings.word_embeddings.weight.grad.clone()
    rows[tokenizer.mask_token_id] += model.text_mask_token.grad  # the mask token is a row there
    torch.testing.assert_close(rows, embedding.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.bias.grad, theirs.cls.predictions.bias.grad)
    for name, parameter in theirs.bert.named_parameters():
        if "word_embeddings" not in name:
            mine = model.bert.get_parameter(name).grad
            assert (mine - parameter.grad).norm() <= 1e-5 * max(parameter.grad.norm(), 1e-2), name


# -- nothing leaks ---------------------------------------------------------------------------


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("masks", ["constant", "uniform", "painted"])
@pytest.mark.parametrize("mode", ["drop", "replace"])
def test_masked_pixels_change_the_target_and_no_prediction(
    make_decoding, make_data, mode, masks, across
):
    """No bit of a predicted patch, token or pair changes, with padding too; the loss does."""
    model = make_decoding(across=across, matching=across)
    batch = make_data(7).batch(range(7))
    maskings = draw(model, batch, masks)
    if masks == "uniform" and mode == "drop":
        assert not maskings[0].keep_valid.all()
    changed = other_pixels(batch, maskings[0].mask)
    asked = wanted(matching=torch.rand(7, 2) if across else None)
    one, other = (model(x, *maskings, mode, "replace", asked) for x in (batch, changed))
    for name in ("pixels", "token_logits") + (("matching",) if across else ()):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    sums = [term_sums(model, one, x, maskings)["mim"] for x in (batch, changed)]
    assert abs(sums[0] - sums[1]) > 1e-3 * sums[0]
    visible = other_pixels(batch, ~maskings[0].mask)  # what is visible does change it
    assert not torch.equal(one.pixels, model(visible, *maskings, mode, "replace", asked).pixels)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("masks", ["constant", "uniform"])
@pytest.mark.parametrize("mode", ["drop", "replace", "80/10/10"])
def test_masked_words_change_the_target_and_no_prediction(
    make_decoding, make_data, mode, masks, across
):
    """Masks are drawn again for the changed tokens; with 80/10/10 unchanged ones are visible."""
    model, batch = make_decoding(across=across), make_data(23).batch(range(23))
    image, text = draw(model, batch, masks, mode)
    masked = text.mask
    stays = torch.zeros_like(masked)
    if mode == "80/10/10":
        stays = masked & (text.substitute == batch.input_ids)
        masked = masked & ~stays
    assert masked.sum() > 23
    changed = other_words(batch, masked, model)
    again = draw(model, changed, masks, mode)[1]
    assert torch.equal(again.mask, text.mask)
    one = model(batch, image, text, "drop", mode, wanted())
    other = model(changed, image, again, "drop", mode, wanted())
    assert torch.equal(one.token_logits, other.token_logits)
    assert torch.equal(one.pixels, other.pixels)
    sums = [term_sums(model, one, x, (image, text))["mlm"] for x in (batch, changed)]
    assert abs(sums[0] - sums[1]) > 1e-3 * sums[0]
    visible = other_words(batch, (batch.valid & ~text.mask & ~special(model, batch)) | stays, model)
    again = draw(model, visible, masks, mode)[1]
    out = model(visible, image, again, "drop", mode, wanted())
    assert not torch.equal(one.token_logits, out.token_logits)
    assert torch.equal(one.pixels, out.pixels) == (not across)


def special(model, batch):
    return torch.isin(batch.input_ids, model.special_ids)


@pytest.mark.parametrize("mode", ["drop", "replace"])
def test_padding_never_matters(make_decoding, make_data, mode):
    """Neither its contents nor its length matters, for patches, tokens and pairs."""
    model, batch = make_decoding(across=True, matching=True), make_data(7).batch(range(7))
    maskings, asked = draw(model, batch, text_mode=mode), wanted(matching=torch.rand(7, 2))
    one = model(batch, *maskings, "drop", mode, asked)
    ids = batch.input_ids.masked_fill(~batch.valid, int(model.word_ids[3]))
    nonsense = dataclasses.replace(batch, input_ids=ids)
    other = model(nonsense, *maskings, "drop", mode, asked)
    longer = dataclasses.replace(
        batch, input_ids=F.pad(batch.input_ids, (0, 3)), valid=F.pad(batch.valid, (0, 3))
    )
    more = model(longer, *draw(model, longer, text_mode=mode), "drop", mode, asked)
    for name in ("pixels", "token_logits", "matching"):
        value = getattr(one, name)
        torch.testing.assert_close(getattr(other, name), value, rtol=0, atol=1e-6)
        torch.testing.assert_close(getattr(more, name), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["drop", "replace"])
def test_a_row_depends_on_the_image_it_attends_to_alone(make_decoding, make_data, mode):
    """Row 0 has its own image, 1 none, 2 that of row 4: all other gradients are exactly zero."""
    model, batch = make_decoding(across=True), make_data(5).batch(range(5))
    image, text = draw(model, batch, text_mode=mode)
    pixels = model.normalize(batch.pixel_values).requires_grad_()
    batch = dataclasses.replace(batch, pixel_values=pixels)
    asked = wanted(context=torch.tensor([0, -1, 4, 3, -1]))
    logits = model(batch, image, text, "drop", mode, asked).token_logits
    row_of = text.mask.nonzero()[:, 0]
    for row, context in enumerate(asked.context.tolist()):
        gradient = torch.autograd.grad(logits[row_of == row].square().sum(), pixels,
                                       retain_graph=True)[0]  # fmt: skip
        reached = gradient.flatten(1).abs().sum(1).nonzero()[:, 0].tolist()
        assert reached == ([] if context < 0 else [context])


@pytest.mark.parametrize("mode", ["drop", "replace"])
def test_patches_depend_on_the_caption_that_is_attended_to(make_decoding, make_data, mode):
    """A changed caption changes the patches of the rows that attend to it, and no others."""
    model, batch = make_decoding(across=True), make_data(5).batch(range(5))
    maskings, context = draw(model, batch), [0, -1, 4, 3, -1]
    asked = wanted(context=torch.tensor(context))
    before = model(batch, *maskings, mode, "replace", asked).pixels
    for caption in range(5):
        where = batch.valid & ~special(model, batch) & ~maskings[1].mask
        where &= torch.arange(5)[:, None] == caption
        changed = other_words(batch, where, model)
        after = model(changed, *maskings, mode, "replace", asked).pixels
        moved = [row for row in range(5) if not torch.equal(before[row], after[row])]
        assert moved == [row for row in range(5) if context[row] == caption]


# -- the loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["mse", "l1"])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_loss_is_of_masked_patches_alone(make_decoding, make_data, error, norm_pix_loss):
    """Against a slow loop over rows with 2, 3, … masked patches; no gradient at visible ones."""
    model, batch = make_decoding(norm_pix_loss=norm_pix_loss), make_data(7).batch(range(7))
    image, _ = draw(model, batch, "uniform")
    assert len(image.mask.sum(1).unique()) > 2
    out = model(batch, image, None, wanted=wanted(tokens=False))
    out.pixels.retain_grad()
    found = term_sums(model, out, batch, (image, None), error)["mim"]
    target, total = patchify(model.normalize(batch.pixel_values), 5), 0.0
    for row, position in image.mask.nonzero().tolist():
        true = target[row, position]
        if norm_pix_loss:
            true = (true - true.mean()) / (true.var() + 1e-6) ** 0.5
        off = out.pixels[row, position] - true
        total = total + (off.abs() if error == "l1" else off**2).mean()
    torch.testing.assert_close(found, total)
    found.backward()
    assert torch.equal(out.pixels.grad.abs().sum(-1) > 0, image.mask)


def test_the_loss_is_of_masked_words_alone(make_decoding, make_data):
    """In the order of `mask.nonzero()`, for captions of 2 to 6 words."""
    model, batch = make_decoding(), make_data(7).batch(range(7))
    _, text = draw(model, batch)
    assert len(text.mask.sum(1).unique()) > 2
    out = model(batch, None, text, wanted=wanted(pixels=False), text_mode="replace")
    found = term_sums(model, out, batch, (None, text))["mlm"]
    total = 0.0
    positions = text.mask.nonzero().tolist()
    for logits, (row, position) in zip(out.token_logits, positions, strict=True):
        total = total - logits.log_softmax(0)[batch.input_ids[row, position]]
    torch.testing.assert_close(found, total)


# -- wrong partners --------------------------------------------------------------------------


def made_features(count=5, width=11):
    torch.manual_seed(2)
    return [F.normalize(torch.randn(count, width), dim=1) for _ in range(2)]


def test_wrong_partners_follow_the_softmax_of_what_is_wrong():
    """Over 1,009 even draws, each is as frequent as its probability, a correct one never."""
    image, text = made_features()
    scale, times = torch.tensor(5.0), 1009
    drawn = torch.zeros(2, 5, 5)
    for k in range(times):
        noise = torch.full((5, 2), (k + 0.5) / times)
        other_caption, other_image, has_one = hard_negatives(image, text, scale, CORRECT, noise)
        assert has_one.all()
        for found, rows in zip((other_caption, other_image), drawn, strict=True):
            rows[torch.arange(5), found] += 1
    scores = (scale * image @ text.T, scale * text @ image.T)
    for counts, logits, same in zip(drawn, scores, (CORRECT, CORRECT.T), strict=True):
        assert counts[same].sum() == 0 and (counts[~same] > 0).all()
        fraction = logits.masked_fill(same, float("-inf")).softmax(1)
        assert (counts / times - fraction).abs().max() < 2 / times


def test_wrong_partners_at_the_ends_of_the_noise():
    """With draws of 0 and of the largest value, and scores of probability 0 or 1, none is correct;
    the same noise gives the same partners."""
    image, text = made_features()
    for scale in (0.0, 1.0, 1e4):
        for draw_ in (0.0, 1 - 2**-24):
            args = image, text, torch.tensor(scale), CORRECT, torch.full((5, 2), draw_)
            other_caption, other_image, _ = hard_negatives(*args)
            assert (
                not CORRECT[range(5), other_caption].any()
                and not CORRECT[other_image, range(5)].any()
            )
            assert all(map(torch.equal, hard_negatives(*args)[:2], (other_caption, other_image)))


@pytest.mark.parametrize("count", [1, 5])
def test_where_all_is_correct_there_is_no_wrong_pair(make_decoding, make_data, count):
    """With all captions correct, or a batch of one, there are true pairs only."""
    image, text = made_features(count)
    noise = torch.rand(count, 2)
    all_correct = torch.ones(count, count, dtype=torch.bool)
    found = hard_negatives(image, text, torch.tensor(1.0), all_correct, noise)
    assert not found[2].any() and (found[0] < count).all()

    model = make_decoding(across=True, matching=True)
    batch = make_data(count).batch(range(count))
    batch.caption_ids = torch.zeros(count, dtype=torch.int64)
    batch.image_captions = batch.caption_ids[:, None]
    asked = wanted(matching=noise)
    out = model(batch, *draw(model, batch), "drop", "replace", asked)
    assert out.match.tolist() == [1.0] * count and num_pairs(all_correct, asked) == count
    torch.testing.assert_close(
        term_sums(model, out, batch, (None, None))["itm"], F.softplus(-out.matching).sum()
    )


def test_pairs_are_the_true_ones_then_a_wrong_image_and_a_wrong_caption(make_decoding, make_data):
    """Against single pairs; a row that does not attend to the other modality has no pair."""
    model, batch = make_decoding(across=True, matching=True), make_data(5).batch(range(5))
    batch.caption_ids, batch.image_captions = IDS, TABLE
    assert torch.equal(batch.correct(), CORRECT)
    asked = wanted(matching=torch.rand(5, 2), context=torch.tensor([0, -1, 2, 3, -1]))
    maskings = draw(model, batch)
    out = model(batch, *maskings, "drop", "replace", asked)
    assert out.match.tolist() == [1.0] * 3 + [0.0] * 6
    assert num_pairs(CORRECT, asked) == 9

    features = (model(batch, *maskings, "drop", "replace", ForwardSpec()), model.logit_scale.exp())
    caption, image, _ = hard_negatives(
        features[0].image_features, features[0].text_features, features[1], CORRECT, asked.matching
    )
    rows = [0, 2, 3]
    pairs = [(i, i) for i in rows]
    pairs += [(i, int(image[i])) for i in rows] + [(int(caption[i]), i) for i in rows]
    for logit, (of_text, of_image) in zip(out.matching, pairs, strict=True):
        pick = torch.tensor([of_text])
        alone = batch[pick]
        alone.pixel_values = batch.pixel_values[[of_image]]
        masks = (maskings[0][torch.tensor([of_image])], maskings[1][pick])
        # A batch of one has no wrong pair: this is the only one.
        one = model(alone, *masks, "drop", "replace", wanted(matching=torch.rand(1, 2)))
        torch.testing.assert_close(one.matching[0], logit, rtol=1e-4, atol=1e-5)


# -- error messages --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "heads, message",
    [
        (
            dict(pixels=False, words=False),
            "needs a head: at least one of pixels, words and matching",
        ),
        (dict(width=33), "width=33 must be a multiple of 32"),
        (dict(width=0), "width=0 must be a multiple of 32"),
        (dict(width=-32), "width=-32 must be a multiple of 32"),
        (dict(word_depth=-1), r"word_depth=-1 must be 0 \(a linear head\) or more"),
        (dict(across=True, pixel_depth=0), "across=True needs pixel_depth of at least 1"),
        (dict(across=True, pixel_depth=0, word_depth=0), "pixel_depth and word_depth"),
        (dict(matching=True), "matching=True needs across=True"),
    ],
)
def test_an_impossible_decoder_is_refused(make_model, heads, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        MultimodalDecoder(model.vit.config, model.bert.config, **heads)


def test_a_decoder_says_what_it_cannot_do(make_decoding, make_model, make_data):
    """No decoder, no such head, a linear head where tokens were dropped, no such partner."""
    data = make_data(5)
    batch = data.batch(range(5))
    plain = make_model().eval()
    maskings = draw(plain, batch)
    for call in (
        lambda: reconstruct(plain, batch, *maskings),
        lambda: evaluate_reconstruction(plain, data),
    ):
        with pytest.raises(ValueError, match=r"no decoder.*mim_weight.*model\.add_decoder"):
            call()
    with pytest.raises(ValueError, match=r"no decoder; call model\.add_decoder"):
        plain(batch, *maskings, wanted=wanted())

    tokens_only, pixels_only = make_decoding(pixels=False), make_decoding(words=False)
    cases = [
        (tokens_only, wanted(tokens=False), "drop", r"no pixels; call model\.add_decoder\(pixels"),
        (pixels_only, wanted(pixels=False), "drop", r"no tokens; call model\.add_decoder\(words"),
        (pixels_only, wanted(tokens=False, matching=torch.rand(5, 2)), "drop", "no matching head"),
        (
            make_decoding(pixel_depth=0),
            wanted(tokens=False),
            "drop",
            "cannot reconstruct dropped patches",
        ),
        (
            make_decoding(word_depth=0),
            wanted(pixels=False),
            "drop",
            "cannot reconstruct dropped tokens",
        ),
    ]
    for model, asked, mode, message in cases:
        with pytest.raises(ValueError, match=message):
            model(batch, *maskings, mode, mode, asked)
    with pytest.raises(
        ValueError, match=r"context='mismached' is not known; did you mean 'mismatched'"
    ):
        partners(CORRECT, "mismached")
    found = reconstruct(tokens_only, batch, maskings[0])  # it has no head for what is masked
    assert all(value is None for value in dataclasses.astuple(found))


def test_partners_by_hand():
    """The next row of another group, cyclically; none if there is no other group."""
    assert partners(CORRECT, "matched") is None
    assert partners(CORRECT, "none").tolist() == [-1] * 5
    groups = torch.tensor([0, 0, 1, 2, 0])
    assert partners(groups[:, None] == groups, "mismatched").tolist() == [2, 2, 3, 4, 2]
    assert partners(CORRECT, "mismatched").tolist() == [1, 2, 3, 0, 0]  # 4 matches 3
    assert partners(torch.ones(3, 3, dtype=torch.bool), "mismatched").tolist() == [-1] * 3


# -- learning --------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_batch_overfits():
    """On seven built-in drawings: a tenth of the mean patch's error, and 95 % of the tokens."""
    from transformers import BertConfig, ViTConfig

    train = mm.openmoji(64)[0]
    data = train.subset(range(0, 7 * 101, 101))
    tower = dict(hidden_size=64, num_attention_heads=2, intermediate_size=128)
    torch.manual_seed(0)
    model = mm.MultimodalEncoder(
        ViTConfig(image_size=64, patch_size=8, num_hidden_layers=2, **tower),
        BertConfig(
            vocab_size=len(data.tokenizer),
            max_position_embeddings=32,
            num_hidden_layers=1,
            **tower,
        ),
        data.tokenizer,
        embed_dim=13,
    )
    model.add_decoder(width=64, pixel_depth=1, word_depth=0).to_device("cpu").train()
    batch = data.encoded_by(model.tokenizer, model.max_length).batch(range(7))
    maskings = draw_maskings(batch, model.token_info, seed=0, epoch=0, image=("random", 0.75),
                             text=("random", 0.3), predict_tokens=True)  # fmt: skip
    config = mm.TrainingConfig(learning_rate=1e-2, matrix_learning_rate=3e-2, weight_decay=0.0)
    optimizers = build_optimizers(model, config)
    steps, counts = 250, [int(masking.mask.sum()) for masking in maskings]
    for step in range(steps):
        set_learning_rate(optimizers, min(1.0, (step + 1) / 20, 2 * (1 - step / steps)))
        out = model(batch, *maskings, "drop", "replace", wanted())
        sums = term_sums(model, out, batch, maskings)
        model.zero_grad()
        (sums["mim"] / counts[0] + sums["mlm"] / counts[1]).backward()
        for optimizer in optimizers:
            optimizer.step()
    found = evaluate_reconstruction(model, data, baseline=mean_patches(data, 8))
    assert found["pixel_error"] < found["mean_patch_error"] / 10
    assert found["mlm_accuracy"] > 0.95
