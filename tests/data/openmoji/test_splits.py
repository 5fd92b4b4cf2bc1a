"""The table of splits can be derived again, and nothing leaks from training to test."""

from collections import Counter

import numpy as np
import pytest

from mmkit.data.openmoji.images import _emoji_of, named_drawings, openmoji
from mmkit.data.openmoji.names import characters, names, tones
from mmkit.data.openmoji.splits import derive_splits, near_identical
from mmkit.data.splits import overlap
from tests.data.openmoji.table import PARTS, TABLE


def combination(meta):
    return meta["family"], meta["gender"], meta["tone"]


def test_no_image_is_in_the_table_twice(pixels):
    assert len({image.tobytes() for image in pixels}) == len(TABLE)


def test_wrong_labels_are_gone_and_nothing_else():
    """40 two-toned "people" are drawn without tone; every other named drawing is in the table."""
    used = {stem for entry in TABLE for stem in _emoji_of(entry)}
    dropped = set(named_drawings()) - used
    assert len(dropped) == 40
    for stem in dropped:
        assert len(tones(stem)) == 2
        assert names("en")[characters(stem)].startswith(("people wrestling", "people with bunny"))


def test_the_committed_table_can_be_derived_again(cache):
    assert derive_splits(cache) == TABLE


def test_near_identical_images_never_straddle_a_boundary(pixels):
    pairs = near_identical(pixels)
    assert len(pairs) > 50
    assert [(a, b) for a, b in pairs if TABLE[a]["split"] != TABLE[b]["split"]] == []


@pytest.mark.parametrize("size", [32, 37, 64])
@pytest.mark.parametrize("split", ["compose", "concept"])
def test_no_image_looks_like_one_of_another_part(split, size, cache):
    """At the sizes that the table was made from and at others, by the users' own measure."""
    train, val, test = openmoji(size, split, cache_dir=cache)
    for one, other in ((train, val), (train, test), (val, test)):
        found = overlap(one, other)
        assert (found.exact, found.near, found.captions) == (0, 0, 0), str(found)


def test_near_identical_agrees_with_comparing_all_pairs(pixels):
    some = np.array(pixels[1140:1300:2]).astype(int)  # women in many tones
    limit = 1.5
    slow = [
        (a, b)
        for a in range(len(some))
        for b in range(a + 1, len(some))
        if np.abs(some[a] - some[b]).mean() <= limit
    ]
    assert len(slow) > 5
    fast = near_identical(some.astype(np.uint8), limit)
    assert [tuple(pair) for pair in fast] == slow


def test_compose_tests_new_combinations_of_known_parts(sets):
    train = [combination(meta) for meta in sets["compose"]["train"].meta]
    seen = [set(part) for part in zip(*train, strict=True)]  # families, genders, tones
    for part in ("val", "test"):
        for meta in sets["compose"][part].meta:
            new = combination(meta)
            assert new not in train and meta["tone"]
            assert all(value in known for value, known in zip(new, seen, strict=True))


def test_concept_tests_families_that_are_never_seen(sets):
    train = {meta["family"] for meta in sets["concept"]["train"].meta}
    held = [{meta["family"] for meta in sets["concept"][part].meta} for part in ("val", "test")]
    assert not train & (held[0] | held[1]) and not held[0] & held[1]
    assert len(held[1]) > 100
    groups = Counter(
        meta["group"] for part in ("val", "test") for meta in sets["concept"][part].meta
    )
    assert not {"Flags", "Symbols", "Component"} & set(groups)


def test_no_caption_is_in_training_and_test(sets):
    for split in ("compose", "concept"):
        texts = [{text for texts in sets[split][part].texts for text in texts} for part in PARTS]
        assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_the_built_in_splits_are_what_they_say():
    """Only "random" leaks; most of its near-duplicates differ in a gender, a tone or a hand."""
    leak = {}
    for name in ("random", "compose", "concept"):
        train, _, test = openmoji(split=name, device="cpu")
        found = overlap(train, test)
        assert found.exact == found.captions == 0 and bool(found) == (name == "random"), str(found)
        leak[name] = found.near
    assert leak["random"] > 30 and leak["compose"] == leak["concept"] == 0
