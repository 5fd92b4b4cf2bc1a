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
from mmkit.masking.plan import draw_maskings
from mmkit.models.decoder import ForwardSpec, MultimodalDecoder, hard_negatives, sin_cos_2d
from mmkit.objective import num_pairs, term_sums
from mmkit.training.optim import build_optimizers, set_learning_rate
from tests.models.decoding import (
    CORRECT,
    IDS,
    TABLE,
    draw,
    mae_and_ours,
    other_pixels,
    other_words,
    ours_from_theirs,
    special,
    wanted,
)

# -- parity ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("own", [True, False])
def test_a_decoder_of_a_caption_of_padding_alone_stays_finite(make_model, make_data, own):
    model, batch = make_model(), make_data(5).batch(range(5))
    model.add_decoder(pixels=True, words=True, across=True, width=32)
    model.to_device("cpu") if own else model
    image, text = mm.masking.draw_maskings(
        batch, model.token_info, seed=0, epoch=0, image=("random", 0.5), text=("random", 0.4)
    )
    batch.valid[2] = text.mask[2] = False
    out = model(batch, image, text, "drop", "replace", ForwardSpec(pixels=True, tokens=True))
    total = out.image_features.sum() + out.text_features.sum() + out.pixels.sum()
    (total + out.token_logits.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


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
