"""Captions are one line of visible text; what nobody can see is no caption."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mmkit as mm
from mmkit.data.captions import clean_caption
from tests.data.hypothesis_settings import bounded

INVISIBLE = [
    "\u200e\u200f",
    "\u202e \u2066\u2069",
    "\u200d",
    "\u3164",
    "\u2800\u2800",
    "\ufe0f",
    "\U000e0041",
]


@pytest.mark.parametrize("caption", INVISIBLE)
def test_captions_that_nobody_can_see_are_blank(caption, tmp_path):
    """Blank captions are refused alone, but left out and counted beside others."""
    with pytest.raises(ValueError, match="is empty or not a string"):
        mm.MultimodalDataset.from_pixels(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [caption])
    for name in "ab":
        Image.new("RGB", (11, 13), (5, 7, 250)).save(tmp_path / f"{name}.png")
    paths, texts = [tmp_path / "a.png", tmp_path / "b.png"], [["a cat", caption], [caption]]
    data = mm.from_lists(paths, texts, on_error="skip", max_skipped=1.0, num_workers=0)
    assert data.texts == [["a cat"]] and data.report.blank_captions == 1
    assert data.report.skipped == {"no caption": 1}
    model = mm.MultimodalEncoder.preset("tiny", tokenizer=data.tokenizer)
    with pytest.raises(ValueError, match="none of them empty"):
        mm.embed_texts(model, [caption])


def test_marks_within_words_stay():
    """Joiners and marks of direction have a meaning between letters and emoji."""
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for text in (
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\U0001f469\u200d\U0001f680",
        "7",
        "\u200eabc",
        "\u2764\ufe0f",
    ):
        assert mm.MultimodalDataset.from_pixels(pixels, [text]).texts == [[text]]


@bounded
@given(st.text())
def test_a_clean_caption_is_one_line_and_stays_as_it_is(text):
    clean = clean_caption(text)
    assert clean == clean_caption(clean) and clean == " ".join(clean.split())
    clean.encode("utf-8")  # no lone surrogates
