"""Captions that occur twice are found, and all counts equal those of slow loops."""

import itertools
import time

import pytest
import torch

from mmkit import MultimodalDataset
from mmkit.data.duplicates import (
    caption_key,
    count_duplicates,
    find_duplicates,
    near_caption_groups,
)
from mmkit.data.image_duplicates import image_signature
from tests.data.photographs import as_pixels, brighter, jpeg, photographs

# ---- captions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("A dog, running!", "a dog  running", True),
        ("ＣＡＴ", "cat", True),
        ("Straße", "STRASSE", True),
        ("it’s a “cat”", "it's a cat", True),
        ("keycap #", "keycap *", False),
        ("C", "C#", False),
        ("!", "?", False),
        ("a dog", "a cat", False),
    ],
)
def test_a_key_keeps_what_a_caption_means(a, b, same):
    assert (caption_key(a) == caption_key(b)) == same


def test_near_captions_have_the_same_words_or_one_more():
    texts = [
        "a dog runs over the wet grass",  # 0
        "Over the wet grass, a dog runs.",  # the same words
        "a brown dog runs over the wet grass",  # one more
        "a small brown dog runs over the wet grass",  # two more: connected by the one before
        "a cat runs over the wet grass",  # one replaced: different
        "a woman with medium skin tone waving her hand",
        "a woman with medium-dark skin tone waving her hand",  # one word differs
        "a dog",
        "a wet dog",  # too short for one word more
        "a woman with dark skin tone",
        "a woman with dark skin tone swimming",  # two extend one caption: no copies
        "a woman with dark skin tone surfing",
    ]
    assert near_caption_groups(texts).tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]


# ---- the report ----------------------------------------------------------------------------------


def test_the_numbers_are_those_of_a_slow_loop():
    """Pairs of an image and another row's correct caption, by key or by a copy's captions.

    Returns all of them and those that are not known as partners.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 3, 32, 32), generator=generator, dtype=torch.uint8)
    which = [0, 1, 2, 0, 3, 1, 4, 0]
    texts = [["red", "one"], ["two"], ["Two!"], ["red"], ["four"], ["five"], ["six"], ["seven"]]
    # the same image is known for rows 0 and 3, and "red" as one caption; "Two!" is another
    data = MultimodalDataset.from_pixels(pixels[range(5)][which], texts)
    data.same_images([0, 1, 2, 0, 4, 5, 6, 7])
    found = count_duplicates(texts, which, image_signature(pixels[which]), data.partners())
    every, unknown = 0.0, 0.0
    known = [[c for j in range(8) if {i, j} <= {0, 3} or i == j for c in texts[j]]
             for i in range(8)]  # fmt: skip
    for i, j in itertools.permutations(range(8), 2):
        keys = {caption_key(c) for k in range(8) if which[k] == which[i] for c in texts[k]}
        for caption in texts[j]:
            if caption_key(caption) in keys:
                every += 1 / len(texts[j]) / 2
                unknown += (caption not in known[i]) / len(texts[j]) / 2
    assert (found.pairs, found.unknown_pairs) == (every, unknown) == (5.5, 4.5)
    assert (found.exact_images, found.near_images, found.near_clusters) == (5, 5, 2)
    assert (found.captions, found.exact_captions, found.near_captions) == (9, 4, 4)
    assert found.examples == [[0, 3, 7], [1, 5]]


def test_false_negatives_per_batch_are_the_mean_over_all_batches():
    texts, hashes = [[f"word {i}"] for i in range(7)], [0, 0, 0, 1, 1, 2, 3]
    generator = torch.Generator().manual_seed(0)  # noise: no two are near-duplicates
    signature = image_signature(torch.randint(0, 256, (7, 3, 16, 16), generator=generator).byte())
    found = count_duplicates(texts, hashes, signature)
    batches = list(itertools.combinations(range(7), 3))
    equal = sum(hashes[a] == hashes[b] for x in batches for a, b in itertools.combinations(x, 2))
    assert found.per_batch(3) == pytest.approx(equal / len(batches))
    assert "5 have an exact copy" in str(found) and "batch of 7: 4.00 pairs" in str(found)
    with pytest.raises(ValueError, match="batch_size=8 must be between 1 and 7"):
        found.per_batch(8)


def test_a_data_set_with_planted_copies_is_reported(tokenizer):
    originals = photographs(96)
    pixels = as_pixels([*originals, originals[2], jpeg(originals[4]), brighter(originals[5])])
    texts = [f"photograph {i}" for i in range(len(pixels))]
    found = find_duplicates(MultimodalDataset.from_pixels(pixels, texts, tokenizer=tokenizer))
    # the exact copy is known as the same image, the near-duplicate is not
    assert (found.exact_images, found.near_images, found.unknown_pairs) == (2, 6, 2)
    assert found.examples == [[2, 7], [4, 8], [5, 9]]


def test_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match="2 texts, 1 hashes and 2 signatures"):
        count_duplicates([["a"], ["b"]], [0], torch.zeros(2, 771))


def test_a_caption_of_many_words_is_compared_in_time_in_proportion():
    """100,000 words and one more in another order are near; with one word replaced they are not."""
    words = [f"w{i % 7919}" for i in range(100_003)]
    texts = [" ".join(words), " ".join([*words[::-1], "more"]), " ".join([*words[1:], "other"])]
    started = time.process_time()
    assert near_caption_groups(texts).tolist() == [0, 0, 1]
    assert time.process_time() - started < 3
