"""Captions describe the drawings, in good English."""

from collections import Counter

import numpy as np
import pytest

from mmkit.data.openmoji.images import render
from mmkit.data.openmoji.names import caption, gender, tones, wording
from tests.data.openmoji.table import TABLE


@pytest.mark.parametrize(
    "stem, expected",
    [
        ("1F469-1F3FD-200D-1F692", "a woman firefighter with medium skin tone"),
        ("1F64B-1F3FF", "a person raising a hand with dark skin tone"),
        ("1F9D1-200D-1F692", "a firefighter"),
        ("1F469-1F3FF-200D-1F9B3", "a woman with white hair and dark skin tone"),
        ("1F468-200D-1F9BC-200D-27A1-FE0F", "a man facing right in a motorized wheelchair"),
        ("1F3C3-200D-2640-FE0F-200D-27A1-FE0F", "a woman running facing right"),
        ("1F91D", "a handshake"),
        ("1F91D-1F3FE", "a handshake between two hands with medium-dark skin tone"),
        ("1F46D", "two women holding hands"),
        ("1F46B-1F3FC", "a woman and a man with medium-light skin tone holding hands"),
        ("1F468-200D-1F469-200D-1F467-200D-1F466", "a family of a man, a woman, a girl and a boy"),
        ("1F469-200D-1F469-200D-1F467-200D-1F467", "a family of two women and two girls"),
        ("1F9D1-200D-1F9D1-200D-1F9D2", "a family of two adults and a child"),
        ("1F1EB-1F1F7", "the flag of France"),
        ("1F1F3-1F1F1", "the flag of the Netherlands"),
        ("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", "the flag of Scotland"),
        ("1F34E", "a red apple"),
        ("2702", "scissors"),
        ("1F567", "a clock showing twelve-thirty"),
        ("1F912", "a face with a thermometer"),
        ("1F618", "a face blowing a kiss"),
        ("1F48B", "a kiss mark"),
    ],
)  # fmt: skip
def test_a_name_becomes_an_english_caption(stem, expected):
    assert caption(stem) == expected


def test_two_people_are_told_from_left_to_right_as_they_are_drawn(cache):
    """The name says "woman, man", the drawing has the man on the left, the tones left to right."""
    stem = "1F469-1F3FB-200D-2764-FE0F-200D-1F48B-200D-1F468-1F3FF"
    assert caption(stem) == (
        "a kiss between a man with light skin tone and a woman with dark skin tone"
    )
    assert gender(stem) == "man+woman" and tones(stem) == ["light", "dark"]
    light, dark = np.array([0xFA, 0xDC, 0xBC]), np.array([0x6A, 0x46, 0x2F])
    image = render([stem], 64, cache)[0].astype(int)
    for colour, side in ((light, "left"), (dark, "right")):
        close = np.abs(image - colour[:, None, None]).max(0) <= 3
        columns = np.nonzero(close)[1]
        assert len(columns) > 20
        assert (columns.mean() < 32) == (side == "left")


def test_every_tone_word_of_a_caption_stands_in_the_code_points():
    for entry in TABLE:
        expected = Counter(tones(entry["codepoints"]))
        said = caption(entry["codepoints"]).split(" skin tone")[:-1]
        assert Counter(part.split()[-1] for part in said) == expected


@pytest.mark.parametrize(
    "one, other",
    [
        ("1F469-200D-1F692", "1F9D1-1F3FF-200D-1F692"),  # who, and in which tone
        ("1F6B6", "1F6B6-200D-2642-FE0F-200D-27A1-FE0F"),  # which way
        ("1F448", "1F447"),  # pointing left, pointing down
        ("1F550", "1F567"),  # what time
        ("1F30D", "1F30E"),  # which side of the globe
        ("1F9DC-200D-2640-FE0F", "1F9DC-200D-2642-FE0F"),  # mermaid, merman
    ],
)
def test_variants_are_one_family(one, other):
    assert wording(one) == wording(other) != wording("1F34E")
