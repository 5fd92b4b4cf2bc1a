"""Every text masker hides the stated number of pieces, never an end or padding, in its manner."""

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
    num_hidden,
)
from mmkit.noise import mask_noise
from tests.masking.test_core import RATIOS

# A caption is a list of words, a word the number of its pieces.
WORDS = st.lists(st.integers(1, 4), max_size=19)
CAPTIONS = st.lists(WORDS, min_size=1, max_size=5)
EXACT = [name for name in TEXT_MASKERS if name != "whole_word"]


def made(captions, padding=0, least_hidden=0) -> Caption:
    """[CLS] pieces [SEP], padded to the longest and by `padding` more; frequencies are made up."""
    lengths = torch.tensor([sum(words) for words in captions])[:, None]
    place = torch.arange(int(lengths.max()) + 2 + padding)
    valid, maskable = place < lengths + 2, (place >= 1) & (place <= lengths)
    word_start = torch.zeros_like(maskable)
    for row, words in enumerate(captions):
        for number in range(len(words)):
            word_start[row, 1 + sum(words[:number])] = True
    frequency = 10 ** (-5 * mask_noise(9, 0, torch.arange(len(captions)), len(place), "frequency"))
    return Caption(valid, maskable, word_start, frequency, least_hidden)


def draw(name, captions, ratio, padding=0, least_hidden=0, ids=None, epoch=0):
    ids = torch.arange(len(captions)) if ids is None else ids
    caption = made(captions, padding, least_hidden)
    noise = mask_noise(0, epoch, ids, caption.valid.shape[1], "text")
    return TEXT_MASKERS[name](noise, ratio, caption), caption, noise


def asked_for(count, ratio, least_hidden=0):
    """How many of `count` pieces are to be hidden."""
    return max(0, min(max(round(count * ratio), least_hidden), count - 1))


def check_masking(masking, caption):
    """Only words are hidden, at least one stays, and the kept are what is visible, in order."""
    assert not (masking.mask & ~caption.maskable).any()
    left = (caption.maskable & ~masking.mask).sum(1)
    assert (left >= caption.maskable.sum(1).clamp(max=1)).all()
    visible = caption.valid & ~masking.mask
    assert torch.equal(masking.keep_valid.sum(1), visible.sum(1))
    assert masking.ids_keep.shape[1] == visible.sum(1).max()
    for row, seen in enumerate(visible):  # [CLS] first
        kept = masking.ids_keep[row][masking.keep_valid[row]]
        assert torch.equal(kept, seen.nonzero()[:, 0]) and kept[0] == 0
    everything = torch.arange(visible.shape[1]).expand_as(visible)
    assert torch.equal(masking.ids_restore.sort(1).values, everything)


# -- what all of them promise ----------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT_MASKERS)
@given(captions=CAPTIONS, data=st.data(), least_hidden=st.sampled_from([0, 1]))
@settings(max_examples=60, deadline=None)
def test_words_are_hidden_by_number_and_ends_never(name, captions, data, least_hidden):
    """One ratio or one per caption; rounded, at least one piece stays, padding does not count."""
    ratios = data.draw(st.lists(RATIOS, min_size=len(captions), max_size=len(captions)))
    each = torch.tensor(ratios, dtype=torch.float64)
    together, caption, _ = draw(name, captions, each, 3, least_hidden)
    check_masking(together, caption)
    for row, (words, ratio) in enumerate(zip(captions, ratios, strict=True)):
        masking, caption, _ = draw(name, captions, ratio, 3, least_hidden)
        check_masking(masking, caption)
        assert torch.equal(masking.mask[row], together.mask[row])
        hidden, number = int(masking.mask[row].sum()), asked_for(sum(words), ratio, least_hidden)
        if name in EXACT:
            assert hidden == number
        elif least_hidden and number and len(words) > 1:
            assert 1 <= hidden <= max(number, min(words), max(words) if number < min(words) else 0)
        else:
            assert hidden <= number


def test_the_number_is_that_of_pythons_arithmetic():
    """45 pieces at 0.7 are 31.499999999999996, so 31; in float32 they would be 31.5, so 32."""
    caption = made([[1] * count for count in range(1, 78)])
    for ratio in (thousandth / 1000 for thousandth in range(0, 1000, 5)):
        expected = [asked_for(count, ratio) for count in range(1, 78)]
        assert num_hidden(ratio, caption).tolist() == expected
        each = torch.full((77,), ratio, dtype=torch.float64)
        assert num_hidden(each, caption).tolist() == expected


@pytest.mark.parametrize("name", TEXT_MASKERS)
@given(captions=CAPTIONS, ratio=RATIOS, padding=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_mask_does_not_depend_on_the_batch(name, captions, ratio, padding):
    """Longer neighbours pad a caption; alone or among others, the same of its words are hidden."""
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
    """Except `truncate`, which is not random at all."""
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
    with pytest.raises(ValueError, match="caption 1 is all padding: no real token; give it a text"):
        TEXT_MASKERS[name](torch.rand(caption.valid.shape), 0.5, caption)


@pytest.mark.parametrize("name", TEXT_MASKERS)
def test_a_caption_of_one_word_stays_whole(name):
    """One piece always; one word of several pieces where whole words are hidden."""
    for least_hidden in (0, 1):
        masking, caption, _ = draw(name, [[1], [], [3]], 0.9, 0, least_hidden)
        check_masking(masking, caption)
        assert not masking.mask[:2].any()
        assert masking.mask[2].sum() == (0 if name == "whole_word" else 2)


# -- which words -----------------------------------------------------------------------------


def slow(name, words, ratio, noise, frequency, least_hidden):
    """The hidden pieces (from 0) of one caption, by plain loops; noise and frequency of each."""
    count = sum(words)
    number = asked_for(count, ratio, least_hidden)
    pieces = list(range(count))
    if name == "truncate":
        return pieces[count - number :]
    if name == "random":
        return sorted(pieces, key=lambda i: -noise[i])[:number]
    if name == "frequency":  # CLIPF: p = max(0, 1 - sqrt(t / f)); the largest U - p are kept
        drop = [max(0.0, 1 - math.sqrt(FREQUENCY_THRESHOLD / f)) for f in frequency]
        return sorted(pieces, key=lambda i: (1 - noise[i]) - drop[i])[:number]
    starts = [sum(words[:i]) for i in range(len(words))]
    hidden, left = [], number
    for i in sorted(range(len(words)), key=lambda i: -noise[starts[i]]):
        if words[i] <= left:
            hidden += range(starts[i], starts[i] + words[i])
            left -= words[i]
    if not hidden and least_hidden and number and len(words) > 1:
        i = max(range(len(words)), key=lambda i: noise[starts[i]])
        hidden = list(range(starts[i], starts[i] + words[i]))
    return hidden


@pytest.mark.parametrize("name", ["random", "truncate", "whole_word", "frequency"])
@given(
    captions=CAPTIONS, ratio=RATIOS, least_hidden=st.sampled_from([0, 1]), epoch=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_equals_a_slow_loop(name, captions, ratio, least_hidden, epoch):
    """Piece by piece, word by word, from the definition in the docstring."""
    masking, caption, noise = draw(name, captions, ratio, 2, least_hidden, epoch=epoch)
    for row, words in enumerate(captions):
        inside = slice(1, 1 + sum(words))
        values = noise[row, inside].tolist(), caption.frequency[row, inside].tolist()
        expected = slow(name, words, ratio, *values, least_hidden)
        assert masking.mask[row, inside].nonzero()[:, 0].tolist() == sorted(expected)


@given(captions=CAPTIONS, ratio=RATIOS)
@settings(max_examples=60, deadline=None)
def test_block_keeps_one_run(captions, ratio):
    """What stays are neighbours."""
    masking, caption, _ = draw("block", captions, ratio)
    seen = (caption.maskable & ~masking.mask).long()
    edges = (seen.diff(dim=1, prepend=seen[:, :1] * 0, append=seen[:, :1] * 0) == 1).sum(1)
    assert torch.equal(edges, seen.amax(1))


def test_block_starts_anywhere_alike_often():
    """Chi-square over all 8 places of a run of 4 in 11 pieces."""
    masking, _, _ = draw("block", [[1] * 11] * 8009, 7 / 11)
    assert (masking.mask.sum(1) == 7).all()
    first = (~masking.mask[:, 1:12]).long().argmax(1)
    counts = first.bincount(minlength=8)
    assert len(counts) == 8
    chi_square = ((counts - 8009 / 8) ** 2 / (8009 / 8)).sum()
    assert chi_square < 24  # 7 degrees of freedom: 1 in 1000


def test_truncate_keeps_the_first_words():
    masking, _, _ = draw("truncate", [[1] * 10, [1] * 3], 0.7)
    assert masking.ids_keep[0][masking.keep_valid[0]].tolist() == [0, 1, 2, 3, 11]
    assert masking.ids_keep[1][masking.keep_valid[1]].tolist() == [0, 1, 4]


@given(captions=CAPTIONS, ratio=RATIOS, least_hidden=st.sampled_from([0, 1]))
@settings(max_examples=60, deadline=None)
def test_whole_words_go_whole(captions, ratio, least_hidden):
    """All pieces of a word, or none; not one word more would have fitted."""
    masking, _, _ = draw("whole_word", captions, ratio, 1, least_hidden)
    for row, words in enumerate(captions):
        number = asked_for(sum(words), ratio, least_hidden)
        start, sizes, seen = 1, [], []
        for pieces in words:
            hidden = masking.mask[row, start : start + pieces]
            assert hidden.all() or not hidden.any()
            (sizes if hidden.all() else seen).append(pieces)
            start += pieces
        assert not seen or sum(sizes) + min(seen) > number or len(words) == 1
        if least_hidden and len(words) > 1:
            assert sizes


def test_whole_words_take_turns():
    """Over samples every word is hidden, a long one too."""
    masking, _, _ = draw("whole_word", [[1, 3, 2, 1]] * 499, 0.5)
    share = masking.mask[:, 1:8].double().mean(0)
    assert 0.15 < share.min() and share.max() < 0.85
    # a caption without word_start at its first piece (cut on the left) still begins with a word
    caption = made([[2, 2]])
    caption.word_start[0, 1] = False
    hidden = TEXT_MASKERS["whole_word"](torch.rand(1, 6), 0.5, caption).mask[0, 1:5].tolist()
    assert hidden in ([True, True, False, False], [False, False, True, True])


def test_frequent_words_are_hidden_more_often():
    """ "a" (one word in ten) above all, a rare one as rarely as its noise asks for."""
    caption = made([[1] * 8] * 4001)
    caption.frequency[:] = 5e-4  # below the threshold: p = 0
    caption.frequency[:, 3], caption.frequency[:, 5] = 0.1, 0.003
    noise = mask_noise(0, 0, torch.arange(4001), caption.valid.shape[1], "text")
    for ratio in (0.25, 0.5):
        share = TEXT_MASKERS["frequency"](noise, ratio, caption).mask.double().mean(0)[1:9]
        rare = share[[0, 1, 3, 5, 6, 7]]
        assert share[2] > 0.9 and share[2] > share[4] + 0.1 and share[4] > rare.max() + 0.1
        assert rare.max() - rare.min() < 0.05
    caption.frequency[:] = 5e-4  # all rare: the same as `random`
    ours, theirs = (TEXT_MASKERS[name](noise, 0.5, caption) for name in ("frequency", "random"))
    assert torch.equal(ours.mask, theirs.mask)


@pytest.mark.parametrize(
    "name, lacks, words",
    [
        ("whole_word", "word_start", r"'whole_word' needs word_start \(B, L\): where words begin"),
        (
            "frequency",
            "frequency",
            "'frequency' needs the pieces' frequency .*set .* = train.token",
        ),
    ],
)
def test_what_a_masker_needs_is_said(name, lacks, words):
    caption = dataclasses.replace(made([[1, 2]]), **{lacks: None})
    with pytest.raises(ValueError, match="text masker " + words):
        TEXT_MASKERS[name](torch.rand(caption.valid.shape), 0.5, caption)


def test_specials_of_a_tokenizer_are_no_words(tokenizer):
    """[CLS], [SEP] and [PAD] by id and by place; an unknown word may be hidden."""
    input_ids, valid = encode_texts(tokenizer, ["old red cat", "dog 🦖"], 17)
    words = maskable_tokens(input_ids, valid, special_ids(tokenizer))
    assert words.tolist() == [[False, True, True, True, False], [False, True, True, False, False]]
    assert input_ids[1, 2] == tokenizer.unk_token_id


def test_a_ratio_in_a_tensor_masks_as_many_as_the_same_plain_number():
    """Of 5 to 47 pieces, by tenths: a float32 of 0.1 is a little more than 0.1, and ties round."""
    counts = [5, 15, 25, 35, 45, 47]
    maskable = torch.arange(47) < torch.tensor(counts)[:, None]
    for tenth in range(1, 10):
        plain = num_hidden(tenth / 10, Caption(maskable, maskable))
        for ratio in (torch.tensor(tenth / 10), torch.full((6,), tenth / 10)):
            assert torch.equal(num_hidden(ratio, Caption(maskable, maskable)), plain)
