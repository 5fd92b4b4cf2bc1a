"""Maskers by name, ratios by schedule, and the masks of a batch as a pure function."""

import math
import re

import pytest
import torch

from mmkit.config import TrainingConfig
from mmkit.masking.image import ATTENTION_MASKERS, IMAGE_MASKERS
from mmkit.masking.plan import caption_of, draw_maskings, find_masker, mask_ratios
from mmkit.masking.text import TEXT_MASKERS
from mmkit.noise import mask_noise
from mmkit.schedules import RATIO_SCHEDULES
from tests.masking.drawn import PAINTED, draw, same, tokens_of

# -- names -----------------------------------------------------------------------------------


def test_every_masker_has_its_name_and_says_whom_it_follows():
    """The names of the papers; each docstring cites its paper or says that there is none."""
    image = "random block inverse_block grid gaussian cluster attentive inattentive layers painted"
    assert list(IMAGE_MASKERS) == image.split()
    assert list(TEXT_MASKERS) == ["random", "block", "truncate", "whole_word", "frequency"]
    assert set(ATTENTION_MASKERS) <= set(IMAGE_MASKERS)
    own = {"layers", "painted", "inattentive", "truncate"}
    for name, masker in {**TEXT_MASKERS, **IMAGE_MASKERS}.items():
        assert name in own or re.search(r"\b20[12]\d\b", masker.__doc__), name
    assert "of no paper" in IMAGE_MASKERS["layers"].__doc__


@pytest.mark.parametrize(
    "maskers, name, nearest",
    [
        (IMAGE_MASKERS, "randon", "random"),
        (IMAGE_MASKERS, "inverse-block", "inverse_block"),
        (TEXT_MASKERS, "whole_words", "whole_word"),
        (TEXT_MASKERS, "gaussian", None),
    ],
)
def test_an_unknown_masker_is_told_the_known_ones(maskers, name, nearest):
    with pytest.raises(ValueError) as error:
        find_masker(name, maskers)
    assert f"masker {name!r} is not known" in str(error.value)
    assert f"known: {', '.join(sorted(maskers))}" in str(error.value)
    assert nearest is None or f"did you mean {nearest!r}?" in str(error.value)
    for known, masker in maskers.items():
        assert find_masker(known, maskers) is masker


# -- schedules of the ratio ------------------------------------------------------------------


def test_uniform_ratios_are_drawn_for_each_sample():
    """Anywhere between the two; a pure function of seed, epoch, sample and stream."""
    ids = torch.arange(1009)

    def ratios(ids=ids, seed=0, epoch=0, stream="image", start=0.3, final=0.9):
        return mask_ratios("uniform", start, final, 0.0, ids, seed=seed, epoch=epoch, stream=stream)

    first = ratios()
    assert first.shape == (1009,) and 0.3 <= first.min() < 0.31 and 0.89 < first.max() < 0.9
    counts = torch.histc(first, 6, 0.3, 0.9)
    assert (counts - 1009 / 6).abs().max() < 5 * (1009 * 5 / 36) ** 0.5
    assert torch.equal(ratios(ids.flip(0)), first.flip(0)) and ratios(ids[7:8]) == first[7]
    for other in (ratios(epoch=1), ratios(seed=1), ratios(stream="text")):
        assert (other == first).sum() < 7
        assert torch.corrcoef(torch.stack([other, first]))[0, 1].abs() < 0.15
    torch.testing.assert_close(ratios(start=0.9, final=0.3), 1.2 - first)
    # not the noise of the mask itself
    own = mask_noise(0, 0, ids, 1)[:, 0]
    assert torch.corrcoef(torch.stack([own, first.float()]))[0, 1].abs() < 0.15


def test_schedules_are_those_of_the_config():
    """What the config accepts, the function knows; an error names the nearest known one."""
    for name in RATIO_SCHEDULES:
        final = None if name == "constant" else 0.7
        TrainingConfig(image_mask_schedule=name, image_mask_final_ratio=final)
    with pytest.raises(ValueError, match="known: " + ", ".join(sorted(RATIO_SCHEDULES))):
        TrainingConfig(image_mask_schedule="other")
    with pytest.raises(ValueError, match="schedule 'cosin' is not known; did you mean 'cosine'"):
        mask_ratios("cosin", 0.2, 0.8, 0.5, torch.arange(3), seed=0, epoch=0)


# -- the masks of a batch --------------------------------------------------------------------


@pytest.mark.parametrize("image", IMAGE_MASKERS)
def test_an_images_mask_does_not_depend_on_its_batch(model, data, image):
    """In another order or in micro-batches each image has the same mask: masks can be replayed."""
    batch = data.batch(range(29))
    whole = draw(batch, model, image)[0]
    order = torch.randperm(29, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(batch[order], model, image)[0].mask, whole.mask[order])
    parts = [draw(part, model, image)[0].mask for part in batch.split(3)]
    assert torch.equal(torch.cat(parts), whole.mask)
    same(draw(batch, model, image)[0], whole)
    assert whole.mask.any(1).all() and not whole.mask.all(1).any()
    if image not in (*ATTENTION_MASKERS, "painted"):
        assert (draw(batch, model, image, epoch=1)[0].mask != whole.mask).any()
        assert (draw(batch, model, image, seed=4)[0].mask != whole.mask).any()


@pytest.mark.parametrize("mode", ["drop", "80/10/10"])
@pytest.mark.parametrize("text", TEXT_MASKERS)
def test_a_captions_mask_does_not_depend_on_its_batch(model, data, text, mode):
    """The substitutes of masked tokens, too."""
    batch = data.batch(range(29))
    whole = draw(batch, model, text=text, text_mode=mode)[1]
    order = torch.randperm(29, generator=torch.Generator().manual_seed(0))
    again = draw(batch[order], model, text=text, text_mode=mode)[1]
    assert torch.equal(again.mask, whole.mask[order])
    if mode == "80/10/10":
        assert torch.equal(again.substitute, whole.substitute[order])
        one = draw(data.batch([5]), model, text=text, text_mode=mode)[1]
        length = one.mask.shape[1]
        assert torch.equal(one.substitute[0], whole.substitute[5, :length])
        assert torch.equal(one.mask[0], whole.mask[5, :length])
    else:
        assert whole.substitute is None
    same(draw(batch, model, text=text, text_mode=mode)[1], whole)
    if text != "truncate":
        assert (draw(batch, model, text=text, text_mode=mode, epoch=1)[1].mask != whole.mask).any()


def test_a_maskers_batch_is_its_masker(model, data):
    """draw_maskings equals the maskers with this noise and scene."""
    batch = data.batch(range(7))
    noise = mask_noise(3, 2, batch.sample_ids, 9, "image")
    attention = model.class_attention(batch.pixel_values)
    image, text = draw(batch, model, "attentive", "whole_word", epoch=2)
    keep = attention.topk(4, dim=1).indices
    assert torch.equal(image.ids_keep.sort(1).values, keep.sort(1).values)
    given = draw(batch, model, "attentive", epoch=2, attend=lambda _: -attention + 1)[0]
    assert torch.equal(given.ids_keep.sort(1).values, (-attention).topk(4).indices.sort(1).values)
    same(draw(batch, model, epoch=2)[0], IMAGE_MASKERS["random"](noise, 0.5))
    noise = mask_noise(3, 2, batch.sample_ids, batch.input_ids.shape[1], "text")
    same(
        text,
        TEXT_MASKERS["whole_word"](
            noise, 0.5, caption_of(batch.input_ids, batch.valid, model.token_info)
        ),
    )
    painted = draw(batch, model, "painted")[0]
    assert torch.equal(painted.mask, (torch.tensor(PAINTED) > 0).flatten().expand(7, -1))


def test_nothing_is_drawn_at_ratio_zero(model, data):
    """The result is None, and nothing is computed; one ratio above 0 is enough to draw."""
    batch = data.batch(range(5))
    assert draw_maskings(batch, model.token_info, seed=0, epoch=0) == (None, None)
    assert draw(batch, model, "attentive", "frequency", ratio=torch.zeros(5)) == (None, None)
    some = torch.tensor([0.0, 0.5, 0.0, 0.9, 0.0], dtype=torch.float64)
    image, text = draw(batch, model, ratio=some)
    assert image.mask.sum(1).tolist() == [0, 9 - round(4.5), 0, 8, 0]
    assert (text.mask.any(1) <= (some > 0)).all() and text.mask.any()


def test_a_caption_is_described_to_the_maskers(model, data):
    """Special tokens and padding are not maskable, "##" continues a word, frequency follows ids."""
    tokenizer = model.tokenizer
    data = type(data).from_pixels(
        torch.zeros(2, 3, 15, 15, dtype=torch.uint8), ["old boats", "cat"], tokenizer=tokenizer
    )
    batch = data.batch([0, 1])
    tokens = [tokenizer.convert_ids_to_tokens(row.tolist()) for row in batch.input_ids]
    assert tokens[0] == ["[CLS]", "old", "boat", "##s", "[SEP]"]
    frequency = torch.arange(len(tokenizer)) / 100
    caption = caption_of(batch.input_ids, batch.valid, tokens_of(model, frequency))
    assert caption.maskable.tolist() == [
        [False, True, True, True, False],
        [False, True, False, False, False],
    ]
    assert caption.word_start[0, 1:4].tolist() == [True, True, False]
    assert torch.equal(caption.frequency, frequency[batch.input_ids])
    assert caption_of(batch.input_ids, batch.valid, model.token_info).frequency is None


# -- 80/10/10 --------------------------------------------------------------------------------


def test_masked_tokens_become_80_10_10(model, make_data):
    """Mask token, random token, own token: fractions are within 4 standard deviations."""
    batch = make_data(2003).batch(range(2003))
    masking = draw(batch, model, text_mode="80/10/10")[1]
    instead, own = masking.substitute[masking.mask], batch.input_ids[masking.mask]
    count, ids = len(instead), len(model.word_ids)
    assert count > 2500
    kept = 0.1 + 0.1 / ids  # a random token is sometimes the token itself
    for fraction, found in ((0.8, instead == -1), (kept, instead == own)):
        spread = math.sqrt(fraction * (1 - fraction) / count)
        assert abs(found.double().mean() - fraction) < 4 * spread
    assert not torch.isin(instead, model.special_ids).any()
    drawn = instead[(instead != -1) & (instead != own)]
    assert torch.isin(drawn, model.word_ids).all()
    assert len(drawn.unique()) > 0.6 * min(ids, len(drawn) / 2)  # from the whole vocabulary


@pytest.mark.parametrize("text", TEXT_MASKERS)
def test_at_least_one_token_is_masked_to_be_predicted(model, data, text):
    """At any ratio, unless it is the only one; not in the other modes."""
    batch = data.batch(range(29))
    count = caption_of(batch.input_ids, batch.valid, model.token_info).maskable.sum(1)
    masking = draw(batch, model, text=text, ratio=0.01, text_mode="80/10/10")[1]
    assert count.min() == 2 and (masking.mask.sum(1) >= 1).all()
    if text != "whole_word":
        assert (masking.mask.sum(1) == 1).all()
    for mode in ("drop", "replace"):
        assert not draw(batch, model, text=text, ratio=0.01, text_mode=mode)[1].mask.any()
    one = type(data).from_pixels(
        torch.zeros(1, 3, 15, 15, dtype=torch.uint8), ["cat"], tokenizer=model.tokenizer
    )
    lone = draw(one.batch([0]), model, text=text, ratio=0.9, text_mode="80/10/10")[1]
    assert not lone.mask.any()


# -- bad input -------------------------------------------------------------------------------


def test_bad_input_is_refused_with_a_message(model, data):
    """Unknown names (at any ratio), ratios, what a data set does not have, painted masks."""
    batch = data.batch(range(3))

    def refuses(message, image=("random", 0.0), text=("random", 0.0)):
        with pytest.raises(ValueError, match=message):
            draw_maskings(batch, model.token_info, seed=0, epoch=0, image=image, text=text)

    for ratio in (0.5, 0.0):
        refuses("masker 'cluser' is not known; did you mean 'cluster'", image=("cluser", ratio))
        refuses("masker 'trunkate' is not known; did you mean 'truncate'", text=("trunkate", ratio))
    for ratio in (-0.5, 1.0, 75, torch.tensor([0.5, 0.5, 1.5])):
        refuses(r"mask_ratio=.* must be in \[0, 1\)", image=("random", ratio))
        refuses(r"mask_ratio=.* must be in \[0, 1\)", text=("random", ratio))
    refuses("'layers' needs regions: give the built-in images", image=("layers", 0.5))
    refuses("'frequency' needs .*token_frequency", text=("frequency", 0.5))
    refuses(r"is \(2, 3\), the images are 3 x 3 patches", image=("painted", [[0, 1, 0]] * 2))
    refuses("masks all 9 patches of image 0", image=("painted", [[1, 1, 1]] * 3))
    refuses("'painted' needs painted: give an array", image=("painted", None))
    batch.valid[1] = False
    refuses("caption 1 is all padding", text=("random", 0.5))
