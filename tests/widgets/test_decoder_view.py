"""What the masking lab shows of a decoder is what `put_back` returns when it is called by hand."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit.evaluation.reconstruction import PutBack, put_back
from mmkit.widgets.decoder_view import another_row, guesses_html, hidden_words, picture_words
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
    return np.asarray(Image.open(io.BytesIO(lab.decoder.canvas.picture))).transpose(2, 0, 1)


def same(back: PutBack, other: PutBack):
    for name, value in vars(other).items():
        torch.testing.assert_close(getattr(back, name), value, msg=name)


@pytest.mark.parametrize("sees", ["right", "none"])
@pytest.mark.parametrize("modes", [("drop", "drop"), ("replace", "replace"), ("drop", "80/10/10")])
def test_what_is_shown_is_what_put_back_returns(make_lab, sees, modes):
    lab = make_lab()
    lab.image_mode.value, lab.text_mode.value = modes
    lab.sees.value = sees
    masked = lab.batch, lab.masking, lab.text_masking
    by_hand = put_back(lab.model, *masked, image_mode=modes[0], text_mode=modes[1], sees=sees)
    same(lab.back, by_hand)
    assert np.array_equal(sent(lab), by_hand.pictures[0])
    assert f"{float(by_hand.pixel_errors[0]):.4f}" in lab.decoder.canvas.words
    assert f"{float(by_hand.pixel_errors[0]):.4f}" in repr(lab)
    best = by_hand.word_log_probs.exp().max(1).values
    for word, chance in zip(lab.decoder.found, best.tolist(), strict=True):
        assert word["top"][0][1] == pytest.approx(chance)


def test_a_wrong_partner_is_another_row_with_masks_of_its_own(make_lab):
    lab = make_lab()
    right = lab.back
    lab.sees.value = "wrong"
    assert another_row(lab.dataset, 4) == 15
    assert lab.dataset.texts[15][0] in lab.decoder.canvas.words
    assert "wrong caption" in lab.decoder.canvas.words and "row 15" in lab.decoder.guesses.value
    masked = lab._masked([4, 15])
    by_hand = put_back(lab.model, *masked, image_mode="drop", text_mode="drop", sees="wrong")
    torch.testing.assert_close(lab.back.predictions, by_hand.predictions[:1])
    words = by_hand.word_places[:, 0] == 0
    torch.testing.assert_close(lab.back.word_log_probs, by_hand.word_log_probs[words])
    assert len(lab.back.word_labels) == len(right.word_labels) < len(words)
    assert not torch.allclose(lab.back.predictions, right.predictions)
    assert not torch.allclose(lab.back.word_log_probs, right.word_log_probs)
    wrong = lab.back
    lab.sees.value = "none"
    assert not torch.allclose(lab.back.predictions, wrong.predictions)
    assert "sees no caption" in lab.decoder.canvas.words
    assert "sees no picture" in lab.decoder.guesses.value


def test_a_row_that_is_partly_right_is_no_wrong_partner(make_data):
    data = make_data(23)
    data.texts[15].append(data.texts[4][0])
    data.texts[4].append(data.texts[16][0])
    assert another_row(data, 4) == 17


def test_without_a_wrong_one_a_wrong_partner_is_none(make_lab):
    lab = make_lab()
    lab.dataset.same_pictures([0] * 23)
    lab.sees.value = "none"
    none = lab.back
    lab.sees.value = "wrong"
    same(lab.back, none)
    assert "there is no other one" in lab.decoder.canvas.words


def test_painting_and_each_control_put_back_anew(make_lab):
    lab = make_lab()
    before = lab.back.pictures
    mask = bytearray(lab.canvas.mask)
    mask[0] ^= 1
    lab.canvas.set_state({"mask": memoryview(bytes(mask))})
    assert not torch.equal(lab.back.pictures, before)
    masked = lab.batch, lab.masking, lab.text_masking
    same(lab.back, put_back(lab.model, *masked, text_mode="drop"))
    for name, value in dict(row=9, seed=3, epoch=2, image_percent=70, image_mode="replace").items():
        before = lab.back.pictures
        getattr(lab, name).value = value
        assert not torch.equal(lab.back.pictures, before), name
    for name, value in dict(text_percent=80, text_mode="replace").items():
        before = lab.decoder.guesses.value
        getattr(lab, name).value = value
        assert lab.decoder.guesses.value != before, name


def test_one_picture_is_one_message(make_lab, monkeypatch):
    lab, messages = make_lab(), []
    monkeypatch.setattr(
        lab.decoder.canvas, "send_state", lambda keys=None: messages.append(set(keys))
    )
    lab.image_percent.value = 70
    assert messages == [{"picture", "words"}]


def test_where_nothing_is_hidden_the_picture_itself_is_shown(make_lab):
    lab = make_lab()
    lab.image_percent.value = lab.text_percent.value = 0
    assert np.array_equal(sent(lab), lab.dataset[4]["image"])
    assert "this is the picture itself" in lab.decoder.canvas.words
    assert "No word is hidden" in lab.decoder.guesses.value
    lab.figure()
    lab.paint(np.zeros((3, 3)))
    assert np.array_equal(sent(lab), lab.dataset[4]["image"])
    assert "this is the picture itself" in lab.decoder.canvas.words and "nan" not in repr(lab)


def test_a_linear_head_that_cannot_says_so_and_the_other_goes_on(make_lab):
    lab = make_lab(across=False, pixel_depth=0)
    assert lab.sees is None and len(lab.controls) == 9
    assert "no place for dropped patches" in lab.decoder.canvas.words
    assert np.array_equal(sent(lab), lab.still()) and lab.back.pictures is None
    assert "sees no picture (it does not look across)" in lab.decoder.guesses.value
    assert len(lab.decoder.found) == 3
    lab.figure()
    lab.image_mode.value = "replace"
    assert "Put back" in lab.decoder.canvas.words and lab.back.pictures is not None
    lab = make_lab(across=False, word_depth=0)
    assert "no place for dropped words" in lab.decoder.guesses.value
    assert "Put back" in lab.decoder.canvas.words and lab.decoder.found == []
    lab.figure()
    lab.text_mode.value = "replace"
    assert "<table>" in lab.decoder.guesses.value


def test_a_head_that_is_not_there_has_no_place(make_lab):
    lab = make_lab(words=False)
    assert lab.decoder.guesses.layout.display == "none" and lab.back.word_labels is None
    assert lab.sees.options[0] == ("its own caption (right)", "right")
    lab.figure()
    lab = make_lab(pixels=False)
    assert lab.decoder.canvas is None and lab.back.pictures is None and lab.decoder.found
    lab.figure()


def test_norm_pix_loss_is_told(make_lab):
    assert "norm_pix_loss" in make_lab(norm_pix_loss=True).decoder.canvas.words
    assert "norm_pix_loss" not in make_lab().decoder.canvas.words


def test_without_a_decoder_nothing_is_there(make_data, make_model):
    model = make_model()
    for lab in (MaskLab(make_data(5), patch_size=5), MaskLab(make_data(5), model)):
        assert lab.back is None and lab.sees is None and lab.decoder is None
        assert [type(part).__name__ for part in lab.view.children[1].children] == [
            "MaskCanvas", "HTML", "HTML",
        ]  # fmt: skip
        assert len(lab.figure().axes) == 3
        assert "put back" not in repr(lab)


def test_a_normalised_picture_is_shown_in_the_range_of_the_one_put_back(make_lab, make_data):
    whole = make_lab()
    data = make_data(23)
    data._decoded.pixels = whole.model.normalize(data._decoded.pixels)
    lab = MaskLab(data, whole.model)
    lab.row.value = 4
    assert torch.equal(lab.picture(), whole.picture())


def test_words_are_text_and_not_markup(make_lab):
    found = [dict(truth="<u>", rank=1, chance=0.5, top=[("<u>", 0.5), ("<i>", 0.004)])]
    html = guesses_html(found, 'sees "<b>"')
    assert not re.search("<[ui]>", html) and html.count("&lt;u&gt;") == 2 and "&lt;b&gt;" in html
    assert "✓ &lt;u&gt;<br>50 %" in html and html.count("✓ &lt;") == 1 and "0.4 %" in html
    lab = make_lab()
    lab.dataset.texts[15] = ["<b>cat</b> $x_$"]
    lab.sees.value = "wrong"
    assert "&lt;b&gt;cat" in lab.decoder.guesses.value and "<b>cat" not in lab.decoder.guesses.value
    lab.figure().canvas.draw()


def test_the_rank_of_the_right_word_is_its_place_among_all(make_lab):
    lab = make_lab()
    log_probs = lab.back.word_log_probs
    for i, word in enumerate(hidden_words(lab.model, lab.batch, lab.back)):
        order = log_probs[i].argsort(descending=True).tolist()
        assert word["rank"] == 1 + order.index(int(lab.back.word_labels[i]))


def test_a_saved_page_has_the_picture_put_back_and_the_guesses(make_lab):
    lab = make_lab()
    figure = lab.figure()
    assert len(figure.axes) == 5 and figure.axes[2].get_title() == "put back"
    shown = figure.axes[2].images[0].get_array()
    assert np.array_equal(shown.transpose(2, 0, 1), lab.back.pictures[0])
    words = " ".join(text.get_text() for text in figure.axes[4].texts)
    assert all(word["truth"] in words for word in lab.decoder.found)
    assert "mean squared error" in words and "✓" not in lab.decoder.canvas.words


def test_one_patch_is_not_patches():
    back = PutBack(None, None, torch.tensor([0.25]), None, None, None)
    assert "0.2500 of 1 hidden patch (" in picture_words(back, 1, "sees no caption", False)
