"""The masking lab shows of a decoder what `mm.reconstruct` returns for the same masks."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.evaluation.reconstruction import Reconstruction, reconstruct
from mmkit.widgets.decoder_view import another_row, guesses_html, image_words, masked_tokens
from mmkit.widgets.mask_lab import MaskLab

HEADS = dict(pixels=True, words=True, across=True, width=32, pixel_depth=1, word_depth=1)


@pytest.fixture
def make_lab(make_data, make_model):
    def make(**heads):
        lab = MaskLab(make_data(23), make_model().add_decoder(**HEADS | heads))
        lab.row.value, lab.text_percent.value = 4, 50
        return lab

    return make


def sent(lab):
    return np.asarray(Image.open(io.BytesIO(lab.decoder.canvas.image))).transpose(2, 0, 1)


def same(back: Reconstruction, other: Reconstruction):
    for name, value in vars(other).items():
        torch.testing.assert_close(getattr(back, name), value, msg=name)


@pytest.mark.parametrize("context", ["matched", "none"])
@pytest.mark.parametrize("modes", [("drop", "drop"), ("replace", "replace"), ("drop", "80/10/10")])
def test_what_is_shown_is_what_reconstruct_returns(make_lab, context, modes):
    lab = make_lab()
    lab.image_mode.value, lab.text_mode.value = modes
    lab.context.value = context
    masked = lab.batch, lab.masking, lab.text_masking
    by_hand = reconstruct(
        lab.model, *masked, image_mode=modes[0], text_mode=modes[1], context=context
    )
    same(lab.back, by_hand)
    assert np.array_equal(sent(lab), by_hand.images[0])
    assert f"{float(by_hand.pixel_errors[0]):.4f}" in lab.decoder.canvas.words
    assert f"{float(by_hand.pixel_errors[0]):.4f}" in repr(lab)
    best = by_hand.token_log_probs.exp().max(1).values
    for entry, chance in zip(lab.decoder.found, best.tolist(), strict=True):
        assert entry["top"][0][1] == pytest.approx(chance)


def test_a_mismatched_partner_is_another_row_with_masks_of_its_own(make_lab):
    lab = make_lab()
    right = lab.back
    lab.context.value = "mismatched"
    assert another_row(lab.dataset, 4) == 15
    assert lab.dataset.texts[15][0] in lab.decoder.canvas.words
    assert (
        "mismatched caption" in lab.decoder.canvas.words and "row 15" in lab.decoder.guesses.value
    )
    masked = lab._masked([4, 15])
    by_hand = reconstruct(
        lab.model, *masked, image_mode="drop", text_mode="drop", context="mismatched"
    )
    torch.testing.assert_close(lab.back.predictions, by_hand.predictions[:1])
    first = by_hand.token_positions[:, 0] == 0
    torch.testing.assert_close(lab.back.token_log_probs, by_hand.token_log_probs[first])
    assert len(lab.back.token_labels) == len(right.token_labels) < len(first)
    assert not torch.allclose(lab.back.predictions, right.predictions)
    assert not torch.allclose(lab.back.token_log_probs, right.token_log_probs)
    wrong = lab.back
    lab.context.value = "none"
    assert not torch.allclose(lab.back.predictions, wrong.predictions)
    assert "sees no caption" in lab.decoder.canvas.words
    assert "sees no image" in lab.decoder.guesses.value


def test_a_row_that_is_partly_correct_is_no_mismatched_partner(make_data):
    data = make_data(23)
    data.texts[15].append(data.texts[4][0])
    data.texts[4].append(data.texts[16][0])
    assert another_row(data, 4) == 17


def test_without_a_mismatched_row_the_context_is_none(make_lab):
    lab = make_lab()
    lab.dataset.same_images([0] * 23)
    lab.context.value = "none"
    none = lab.back
    lab.context.value = "mismatched"
    same(lab.back, none)
    assert "there is no mismatched one" in lab.decoder.canvas.words


def test_painting_and_each_control_reconstruct_anew(make_lab):
    lab = make_lab()
    before = lab.back.images
    mask = bytearray(lab.canvas.mask)
    mask[0] ^= 1
    lab.canvas.set_state({"mask": memoryview(bytes(mask))})
    assert not torch.equal(lab.back.images, before)
    masked = lab.batch, lab.masking, lab.text_masking
    same(lab.back, reconstruct(lab.model, *masked, text_mode="drop"))
    for name, value in dict(row=9, seed=3, epoch=2, image_percent=70, image_mode="replace").items():
        before = lab.back.images
        getattr(lab, name).value = value
        assert not torch.equal(lab.back.images, before), name
    for name, value in dict(text_percent=80, text_mode="replace").items():
        before = lab.decoder.guesses.value
        getattr(lab, name).value = value
        assert lab.decoder.guesses.value != before, name


def test_one_image_is_one_message(make_lab, monkeypatch):
    lab, messages = make_lab(), []
    monkeypatch.setattr(
        lab.decoder.canvas, "send_state", lambda keys=None: messages.append(set(keys))
    )
    lab.image_percent.value = 70
    assert messages == [{"image", "words"}]


def test_where_nothing_is_masked_the_image_itself_is_shown(make_lab):
    lab = make_lab()
    lab.image_percent.value = lab.text_percent.value = 0
    assert np.array_equal(sent(lab), lab.dataset[4]["image"])
    assert "this is the image itself" in lab.decoder.canvas.words
    assert "No token is masked" in lab.decoder.guesses.value
    lab.figure()
    lab.paint(np.zeros((3, 3)))
    assert np.array_equal(sent(lab), lab.dataset[4]["image"])
    assert "this is the image itself" in lab.decoder.canvas.words and "nan" not in repr(lab)


def test_a_linear_head_that_cannot_says_so_and_the_other_goes_on(make_lab):
    lab = make_lab(across=False, pixel_depth=0)
    assert lab.context is None and len(lab.controls) == 9
    assert "cannot reconstruct dropped patches" in lab.decoder.canvas.words
    assert np.array_equal(sent(lab), lab.still()) and lab.back.images is None
    assert "sees no image (it has no cross-attention)" in lab.decoder.guesses.value
    assert len(lab.decoder.found) == 3
    lab.figure()
    lab.image_mode.value = "replace"
    assert "Reconstructed" in lab.decoder.canvas.words and lab.back.images is not None
    lab = make_lab(across=False, word_depth=0)
    assert "cannot reconstruct dropped tokens" in lab.decoder.guesses.value
    assert "Reconstructed" in lab.decoder.canvas.words and lab.decoder.found == []
    lab.figure()
    lab.text_mode.value = "replace"
    assert "<table>" in lab.decoder.guesses.value


def test_a_missing_head_has_no_part_in_the_lab(make_lab):
    lab = make_lab(words=False)
    assert lab.decoder.guesses.layout.display == "none" and lab.back.token_labels is None
    assert lab.context.options[0] == ("its own caption (matched)", "matched")
    lab.figure()
    lab = make_lab(pixels=False)
    assert lab.decoder.canvas is None and lab.back.images is None and lab.decoder.found
    lab.figure()


def test_norm_pix_loss_is_mentioned(make_lab):
    assert "norm_pix_loss" in make_lab(norm_pix_loss=True).decoder.canvas.words
    assert "norm_pix_loss" not in make_lab().decoder.canvas.words


def test_without_a_decoder_nothing_is_there(make_data, make_model):
    model = make_model()
    for lab in (MaskLab(make_data(5), patch_size=5), MaskLab(make_data(5), model)):
        assert lab.back is None and lab.context is None and lab.decoder is None
        assert [type(part).__name__ for part in lab.view.children[1].children] == [
            "MaskCanvas", "HTML", "HTML",
        ]  # fmt: skip
        assert len(lab.figure().axes) == 3
        assert "reconstructed" not in repr(lab)


def test_a_normalised_image_is_shown_in_the_range_of_the_reconstructed_one(make_lab, make_data):
    whole = make_lab()
    data = make_data(23)
    data._decoded.pixels = whole.model.normalize(data._decoded.pixels)
    lab = MaskLab(data, whole.model)
    lab.row.value = 4
    assert torch.equal(lab.image(), whole.image())


def test_tokens_are_text_and_not_markup(make_lab):
    found = [dict(truth="<u>", rank=1, chance=0.5, top=[("<u>", 0.5), ("<i>", 0.004)])]
    html = guesses_html(found, 'sees "<b>"')
    assert not re.search("<[ui]>", html) and html.count("&lt;u&gt;") == 2 and "&lt;b&gt;" in html
    assert "✓ &lt;u&gt;<br>50 %" in html and html.count("✓ &lt;") == 1 and "0.4 %" in html
    lab = make_lab()
    lab.dataset.texts[15] = ["<b>cat</b> $x_$"]
    lab.context.value = "mismatched"
    assert "&lt;b&gt;cat" in lab.decoder.guesses.value and "<b>cat" not in lab.decoder.guesses.value
    lab.figure().canvas.draw()


def test_the_rank_of_the_true_token_is_its_position_among_all(make_lab):
    lab = make_lab()
    log_probs = lab.back.token_log_probs
    for i, entry in enumerate(masked_tokens(lab.model, lab.batch, lab.back)):
        order = log_probs[i].argsort(descending=True).tolist()
        assert entry["rank"] == 1 + order.index(int(lab.back.token_labels[i]))


def test_a_saved_page_has_the_reconstructed_image_and_the_guesses(make_lab):
    lab = make_lab()
    figure = lab.figure()
    assert len(figure.axes) == 5 and figure.axes[2].get_title() == "reconstructed"
    shown = figure.axes[2].images[0].get_array()
    assert np.array_equal(shown.transpose(2, 0, 1), lab.back.images[0])
    table = " ".join(text.get_text() for text in figure.axes[4].texts)
    assert all(entry["truth"] in table for entry in lab.decoder.found)
    assert "mean squared error" in table and "✓" not in lab.decoder.canvas.words


def test_one_patch_is_not_patches():
    back = Reconstruction(None, None, torch.tensor([0.25]), None, None, None)
    assert "0.2500 of 1 masked patch (" in image_words(back, 1, "sees no caption", False)
