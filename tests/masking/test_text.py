"""Every text masker masks the stated number of tokens in its manner, never special ones."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.data.tokenizer import encode_texts, special_ids
from mmkit.masking.text import (
    FREQUENCY_THRESHOLD,
    TEXT_MASKERS,
    Caption,
    maskable_tokens,
    num_masked,
)
from mmkit.noise import mask_noise
from tests.masking.any_masking import RATIOS

# A caption is a list of words, each given as its number of tokens.
WORDS = st.lists(st.integers(1, 4), max_size=19)
CAPTIONS = st.lists(WORDS, min_size=1, max_size=5)
EXACT = [name for name in TEXT_MASKERS if name != "whole_word"]


def made(captions, padding=0, min_masked=0) -> Caption:
    """[CLS] tokens [SEP], padded to the longest plus `padding`; frequencies are made up."""
    lengths = torch.tensor([sum(words) for words in captions])[:, None]
    position = torch.arange(int(lengths.max()) + 2 + padding)
    valid, maskable = position < lengths + 2, (position >= 1) & (position <= lengths)
    word_start = torch.zeros_like(maskable)
    for row, words in enumerate(captions):
        for number in range(len(words)):
            word_start[row, 1 + sum(words[:number])] = True
    ids = torch.arange(len(captions))
    frequency = 10 ** (-5 * mask_noise(9, 0, ids, len(position), "frequency"))
    return Caption(valid, maskable, word_start, frequency, min_masked)


def draw(name, captions, ratio, padding=0, min_masked=0, ids=None, epoch=0):
    ids = torch.arange(len(captions)) if ids is None else ids
    caption = made(captions, padding, min_masked)
    noise = mask_noise(0, epoch, ids, caption.valid.shape[1], "text")
    return TEXT_MASKERS[name](noise, ratio, caption), caption, noise


def asked_for(count, ratio, min_masked=0):
    """The number of `count` tokens to mask."""
    return max(0, min(max(round(count * ratio), min_masked), count - 1))


def check_masking(masking, caption):
    """Only words are masked, at least one stays visible, and kept tokens are the visible ones."""
    assert not (masking.mask & ~caption.maskable).any()
    left = (caption.maskable & ~masking.mask).sum(1)
    assert (left >= caption.maskable.sum(1).clamp(max=1)).all()
    visible = caption.valid & ~masking.mask
    assert torch.equal(masking.keep_valid.sum(1), visible.sum(1))
    assert masking.ids_keep.shape[1] == visible.sum(1).max()
    for row, allowed in enumerate(visible):  # [CLS] first
        kept = masking.ids_keep[row][masking.keep_valid[row]]
        assert torch.equal(kept, allowed.nonzero()[:, 0]) and kept[0] == 0
    everything = torch.arange(visible.shape[1]).expand_as(visible)
    assert torch.equal(masking.ids_restore.sort(1).values, everything)


# -- properties of all maskers ---------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT_MASKERS)
@given(captions=CAPTIONS, data=st.data(), min_masked=st.sampled_from([0, 1]))
@settings(max_examples=60, deadline=None)
def test_words_are_masked_by_number_and_ends_never(name, captions, data, min_masked):
    """One ratio or one per caption: rounded, at least one token stays, padding does not count."""
    ratios = data.draw(st.lists(RATIOS, min_size=len(captions), max_size=len(captions)))
    each = torch.tensor(ratios, dtype=torch.float64)
    together, caption, _ = draw(name, captions, each, 3, min_masked)
    check_masking(together, caption)
    for row, (words, ratio) in enumerate(zip(captions, ratios, strict=True)):
        masking, caption, _ = draw(name, captions, ratio, 3, min_masked)
        check_masking(masking, caption)
        assert torch.equal(masking.mask[row], together.mask[row])
        masked, number = int(masking.mask[row].sum()), asked_for(sum(words), ratio, min_masked)
        if name in EXACT:
            assert masked == number
        elif min_masked and number and len(words) > 1:
            assert 1 <= masked <= max(number, min(words), max(words) if number < min(words) else 0)
        else:
            assert masked <= number


def test_the_number_is_that_of_pythons_arithmetic():
    """0.7 of 45 tokens is 31.499999999999996, so 31; in float32 it would be 31.5, so 32."""
    caption = made([[1] * count for count in range(1, 78)])
    for ratio in (thousandth / 1000 for thousandth in range(0, 1000, 5)):
        expected = [asked_for(count, ratio) for count in range(1, 78)]
        assert num_masked(ratio, caption).tolist() == expected
        each = torch.full((77,), ratio, dtype=torch.float64)
        assert num_masked(each, caption).tolist() == expected


@pytest.mark.parametrize("name", TEXT_MASKERS)
@given(captions=CAPTIONS, ratio=RATIOS, padding=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_mask_does_not_depend_on_the_batch(name, captions, ratio, padding):
    """Longer captions pad a caption; alone or with others, the same of its words are masked."""
    caption = made(captions, padding)
    ids = torch.arange(len(captions)) + 3
    noise = mask_noise(0, 0, ids, caption.valid.shape[1], "text")
    together = TEXT_MASKERS[name](noise, ratio, caption)
    for row, words in enumerate(captions):
        length = sum(words) + 2
        parts = (caption.valid, caption.maskable, caption.word_start, caption.frequency)
        one = Caption(*(part[row, None, :length] for part in parts))
        alone = TEXT_MASKERS[name](noise[row, None, :length], ratio, one)
        assert torch.equal(alone.mask[0], together.mask[row, :length])
        kept = together.ids_keep[row][together.keep_valid[row]]
        assert torch.equal(alone.ids_keep[0], kept)
        assert alone.keep_valid.all()


@pytest.mark.parametrize("name", TEXT_MASKERS)
def test_every_sample_and_epoch_has_a_mask_of_its_own(name):
    """Except with `truncate`, which is not random."""
    captions = [[1] * 17] * 23
    first, second = (draw(name, captions, 0.5, epoch=epoch)[0].mask for epoch in (0, 1))
    if name == "truncate":
        assert torch.equal(first, second) and len(first.unique(dim=0)) == 1
    else:
        assert (first != second).any(1).sum() > 17 and len(first.unique(dim=0)) > 7


@pytest.mark.parametrize("name", TEXT_MASKERS)
@pytest.mark.parametrize("ratio", [-0.1, 1.0, 15])
def test_a_ratio_outside_its_range_is_refused(name, ratio):
    for bad in (ratio, torch.tensor([0.5, ratio])):
        with pytest.raises(ValueError, match=rf"mask_ratio={ratio:g} must be in \[0, 1\)"):
            draw(name, [[1, 2], [3]], bad)


@pytest.mark.parametrize("name", TEXT_MASKERS)
def test_a_caption_that_is_all_padding_is_refused(name):
    caption = made([[1, 2], [3]])
    caption.valid[1] = caption.maskable[1] = False
    with pytest.raises(ValueError, match="caption 1 is all padding: it has no valid token; give"):
        TEXT_MASKERS[name](torch.rand(caption.valid.shape), 0.5, caption)


@pytest.mark.parametrize("name", TEXT_MASKERS)
def test_a_caption_of_one_word_stays_whole(name):
    """A single token always; a single word of several tokens if whole words are masked."""
    for min_masked in (0, 1):
        masking, caption, _ = draw(name, [[1], [], [3]], 0.9, 0, min_masked)
        check_masking(masking, caption)
        assert not masking.mask[:2].any()
        assert masking.mask[2].sum() == (0 if name == "whole_word" else 2)


# -- which words -----------------------------------------------------------------------------


def slow(name, words, ratio, noise, frequency, min_masked):
    """The masked tokens (from 0) of one caption, by loops; noise and frequency of each token."""
    count = sum(words)
    number = asked_for(count, ratio, min_masked)
    tokens = list(range(count))
    if name == "truncate":
        return tokens[count - number :]
    if name == "random":
        return sorted(tokens, key=lambda i: -noise[i])[:number]
    if name == "frequency":  # CLIPF: p = max(0, 1 - sqrt(t / f)); the largest U - p are kept
        drop = [max(0.0, 1 - math.sqrt(FREQUENCY_THRESHOLD / f)) for f in frequency]
        return sorted(tokens, key=lambda i: (1 - noise[i]) - drop[i])[:number]
    starts = [sum(words[:i]) for i in range(len(words))]
    masked, left = [], number
    for i in sorted(range(len(words)), key=lambda i: -noise[starts[i]]):
        if words[i] <= left:
            masked += range(starts[i], starts[i] + words[i])
            left -= words[i]
    if not masked and min_masked and number and len(words) > 1:
        i = max(range(len(words)), key=lambda i: noise[starts[i]])
        masked = list(range(starts[i], starts[i] + words[i]))
    return masked


@pytest.mark.parametrize("name", ["random", "truncate", "whole_word", "frequency"])
@given(
    captions=CAPTIONS, ratio=RATIOS, min_masked=st.sampled_from([0, 1]), epoch=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_equals_a_slow_loop(name, captions, ratio, min_masked, epoch):
    """Token by token and word by word, by the definition in the docstring."""
    masking, caption, noise = draw(name, captions, ratio, 2, min_masked, epoch=epoch)
    for row, words in enumerate(captions):
        inside = slice(1, 1 + sum(words))
        values = noise[row, inside].tolist(), caption.frequency[row, inside].tolist()
        expected = slow(name, words, ratio, *values, min_masked)
        assert masking.mask[row, inside].nonzero()[:, 0].tolist() == sorted(expected)


@given(captions=CAPTIONS, ratio=RATIOS)
@settings(max_examples=60, deadline=None)
def test_block_keeps_one_run(captions, ratio):
    """The visible tokens are adjacent."""
    masking, caption, _ = draw("block", captions, ratio)
    visible = (caption.maskable & ~masking.mask).long()
    zero = visible[:, :1] * 0
    edges = (visible.diff(dim=1, prepend=zero, append=zero) == 1).sum(1)
    assert torch.equal(edges, visible.amax(1))


def test_block_starts_anywhere_equally_often():
    """Chi-square over all 8 positions of a run of 4 in 11 tokens."""
    masking, _, _ = draw("block", [[1] * 11] * 8009, 7 / 11)
    assert (masking.mask.sum(1) == 7).all()
    first = (~masking.mask[:, 1:12]).long().argmax(1)
    counts = first.bincount(minlength=8)
    assert len(counts) == 8
    chi_square = ((counts - 8009 / 8) ** 2 / (8009 / 8)).sum()
    assert chi_square < 24  # 7 degrees of freedom: 1 in 1000


def test_truncate_keeps_the_first_tokens():
    masking, _, _ = draw("truncate", [[1] * 10, [1] * 3], 0.7)
    assert masking.ids_keep[0][masking.keep_valid[0]].tolist() == [0, 1, 2, 3, 11]
    assert masking.ids_keep[1][masking.keep_valid[1]].tolist() == [0, 1, 4]


@given(captions=CAPTIONS, ratio=RATIOS, min_masked=st.sampled_from([0, 1]))
@settings(max_examples=60, deadline=None)
def test_whole_words_are_masked_whole(captions, ratio, min_masked):
    """All tokens of a word, or none; no other word would have fitted."""
    masking, _, _ = draw("whole_word", captions, ratio, 1, min_masked)
    for row, words in enumerate(captions):
        number = asked_for(sum(words), ratio, min_masked)
        start, sizes, visible = 1, [], []
        for tokens in words:
            masked = masking.mask[row, start : start + tokens]
            assert masked.all() or not masked.any()
            (sizes if masked.all() else visible).append(tokens)
            start += tokens
        assert not visible or sum(sizes) + min(visible) > number or len(words) == 1
        if min_masked and len(words) > 1:
            assert sizes


def test_whole_words_take_turns():
    """Over many samples every word is masked, a long one too."""
    masking, _, _ = draw("whole_word", [[1, 3, 2, 1]] * 499, 0.5)
    fraction = masking.mask[:, 1:8].double().mean(0)
    assert 0.15 < fraction.min() and fraction.max() < 0.85
    # a caption without word_start at its first token (cut off there) still begins with a word
    caption = made([[2, 2]])
    caption.word_start[0, 1] = False
    masked = TEXT_MASKERS["whole_word"](torch.rand(1, 6), 0.5, caption).mask[0, 1:5].tolist()
    assert masked in ([True, True, False, False], [False, False, True, True])


def test_frequent_words_are_masked_more_often():
    """Above all "a" (one word in ten); rare words as rarely as their noise demands."""
    caption = made([[1] * 8] * 4001)
    caption.frequency[:] = 5e-4  # below the threshold: p = 0
    caption.frequency[:, 3], caption.frequency[:, 5] = 0.1, 0.003
    noise = mask_noise(0, 0, torch.arange(4001), caption.valid.shape[1], "text")
    for ratio in (0.25, 0.5):
        fraction = TEXT_MASKERS["frequency"](noise, ratio, caption).mask.double().mean(0)[1:9]
        rare = fraction[[0, 1, 3, 5, 6, 7]]
        assert (
            fraction[2] > 0.9 and fraction[2] > fraction[4] + 0.1 and fraction[4] > rare.max() + 0.1
        )
        assert rare.max() - rare.min() < 0.05
    caption.frequency[:] = 5e-4  # all rare: the same as `random`
    ours, theirs = (TEXT_MASKERS[name](noise, 0.5, caption) for name in ("frequency", "random"))
    assert torch.equal(ours.mask, theirs.mask)


@pytest.mark.parametrize(
    "name, lacks, message",
    [
        ("whole_word", "word_start", r"'whole_word' needs word_start \(B, L\): where words begin"),
        (
            "frequency",
            "frequency",
            "'frequency' needs the frequency of the tokens .*set .* = train.token",
        ),
    ],
)
def test_a_masker_says_what_it_lacks(name, lacks, message):
    caption = dataclasses.replace(made([[1, 2]]), **{lacks: None})
    with pytest.raises(ValueError, match="text masker " + message):
        TEXT_MASKERS[name](torch.rand(caption.valid.shape), 0.5, caption)


def test_special_tokens_are_not_maskable(tokenizer):
    """[CLS], [SEP] and [PAD] are not, by id and by position; an unknown word is."""
    input_ids, valid = encode_texts(tokenizer, ["old red cat", "dog 🦖"], 17)
    maskable = maskable_tokens(input_ids, valid, special_ids(tokenizer)).tolist()
    assert maskable == [[False, True, True, True, False], [False, True, True, False, False]]
    assert input_ids[1, 2] == tokenizer.unk_token_id


def test_a_ratio_in_a_tensor_masks_as_many_as_the_same_plain_number():
    """For 5 to 47 tokens, in tenths: a float32 0.1 is a little more than 0.1, and ties round."""
    counts = [5, 15, 25, 35, 45, 47]
    maskable = torch.arange(47) < torch.tensor(counts)[:, None]
    for tenth in range(1, 10):
        plain = num_masked(tenth / 10, Caption(maskable, maskable))
        for ratio in (torch.tensor(tenth / 10), torch.full((6,), tenth / 10)):
            assert torch.equal(num_masked(ratio, Caption(maskable, maskable)), plain)
