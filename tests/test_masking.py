"""Masks are a pure function, hide what they say, and never what they must not."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmkit.masking import (
    IMAGE_MASKERS,
    find_masker,
    mask_noise,
    maskable_words,
    random_mask,
    random_text_mask,
)
from mmkit.tokenizer import encode_texts, special_ids


def test_noise_depends_on_nothing_but_its_arguments():
    """A sample's noise is the same alone, in any batch, in any order."""
    ids = torch.tensor([3, 11, 7, 2**40 + 5])
    noise = mask_noise(5, 2, ids, 13)
    for row, sample in enumerate(ids):
        assert torch.equal(mask_noise(5, 2, sample[None], 13)[0], noise[row])
    assert torch.equal(mask_noise(5, 2, ids.flip(0), 13), noise.flip(0))
    assert torch.equal(mask_noise(5, 2, ids, 7), noise[:, :7])


def test_noise_differs_in_every_argument():
    ids = torch.arange(11)
    noise = mask_noise(0, 0, ids, 13)
    others = [mask_noise(1, 0, ids, 13), mask_noise(0, 1, ids, 13), mask_noise(0, 0, ids + 11, 13)]
    others.append(mask_noise(0, 0, ids, 13, stream="text"))
    for other in others:
        assert (other == noise).float().mean() < 0.01
    assert len(noise.unique()) == noise.numel()


def test_noise_is_uniform_and_uncorrelated():
    """Chi-square over 100 bins and the correlation of neighbours, on a million draws."""
    noise = mask_noise(0, 0, torch.arange(1000), 1000).numpy()
    assert noise.min() >= 0 and noise.max() < 1
    counts = np.histogram(noise, 100, (0, 1))[0]
    chi_square = ((counts - 1e4) ** 2 / 1e4).sum()
    assert 60 < chi_square < 150  # 99 degrees of freedom: mean 99, standard deviation 14
    for a, b in ((noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.005


def test_noise_is_the_number_it_was():
    """Frozen values: a change of the hash would silently change every published mask."""
    noise = mask_noise(1, 2, torch.tensor([3, 5]), 3)
    assert (noise * 2**24).long().tolist() == [
        [3150303, 6990156, 4812679],
        [11246803, 13568918, 12627434],
    ]


@pytest.mark.parametrize(
    "tokens, ratio, kept", [(100, 0.9, 10), (64, 0.5, 32), (30, 0.9, 3), (7, 0.0, 7)]
)
def test_random_mask_rounds_and_keeps_one(tokens, ratio, kept):
    """MAE truncates: 100 tokens at 0.9 keep 9 there."""
    masking = random_mask(mask_noise(0, 0, torch.arange(5), tokens), ratio)
    assert masking.ids_keep.shape == (5, kept)
    assert (masking.mask.sum(1) == tokens - kept).all()
    assert random_mask(torch.rand(2, 7), 0.99).ids_keep.shape == (2, 1)


def test_random_mask_ids_agree():
    """Kept tokens are the visible ones, and ids_restore puts [kept | hidden] back in place."""
    noise = mask_noise(3, 1, torch.arange(5), 17)
    m = random_mask(noise, 0.6)
    assert (~m.mask.gather(1, m.ids_keep)).all()
    hidden = m.ids_restore.argsort(1)[:, m.ids_keep.shape[1] :]
    shuffled = torch.cat([m.ids_keep, hidden], 1)
    assert torch.equal(shuffled.gather(1, m.ids_restore), torch.arange(17).expand(5, -1))
    assert not torch.equal(m.mask[0], m.mask[1])  # per sample, not per batch
    assert (
        noise[~m.mask].max() <= 1
        and (noise.masked_fill(m.mask, 0).amax(1) < noise.masked_fill(~m.mask, 1).amin(1)).all()
    )


def test_text_mask_spares_special_tokens_and_padding(tokenizer):
    """Ratio over real words, rounded; at least one stays; [CLS], [SEP], [PAD] always."""
    texts = ["red", "red cat", "old red cat and dog", "small blue boat and big green tree"]
    input_ids, valid = encode_texts(tokenizer, texts, 32)
    words = maskable_words(input_ids, valid, special_ids(tokenizer))
    noise = mask_noise(0, 0, torch.arange(4), input_ids.shape[1], "text")
    for ratio in (0.0, 0.15, 0.5, 0.9, 0.99):
        m = random_text_mask(noise, ratio, valid, words)
        assert not (m.mask & ~words).any()
        count = words.sum(1)
        expected = torch.minimum((count * ratio).round().long(), count - 1)
        assert torch.equal(m.mask.sum(1), expected)
        assert torch.equal(m.keep_valid.sum(1), valid.sum(1) - expected)
        for row in range(4):  # the kept ids are the visible real tokens, in reading order
            kept = m.ids_keep[row][m.keep_valid[row]]
            assert torch.equal(kept, (valid[row] & ~m.mask[row]).nonzero()[:, 0])


def test_text_mask_of_a_caption_does_not_depend_on_its_batch(tokenizer):
    """A longer neighbour pads the caption; its hidden words stay the same."""
    alone = encode_texts(tokenizer, ["old red cat and dog"], 32)
    both = encode_texts(tokenizer, ["old red cat and dog", "a " * 12], 32)
    masks = []
    for input_ids, valid in (alone, both):
        words = maskable_words(input_ids, valid, special_ids(tokenizer))
        noise = mask_noise(0, 0, torch.arange(len(valid)), valid.shape[1], "text")
        masks.append(random_text_mask(noise, 0.5, valid, words).mask[0])
    assert torch.equal(masks[0], masks[1][: len(masks[0])])


@given(tokens=st.integers(1, 300), ratio=st.floats(0, 0.999), samples=st.integers(1, 5))
def test_random_mask_holds_its_promises(tokens, ratio, samples):
    """Any grid, any ratio: the exact number hidden, at least one kept, ids that fit together."""
    noise = mask_noise(0, 0, torch.arange(samples), tokens)
    masking = random_mask(noise, ratio)
    kept = max(1, round(tokens * (1 - ratio)))
    assert masking.ids_keep.shape == (samples, kept)
    assert (masking.mask.sum(1) == tokens - kept).all()
    everything = masking.ids_restore.sort(1).values
    assert torch.equal(everything, torch.arange(tokens).expand(samples, -1))
    place = masking.ids_restore.gather(1, masking.ids_keep)
    assert torch.equal(place, torch.arange(kept).expand(samples, -1))


@given(lengths=st.lists(st.integers(0, 19), min_size=1, max_size=6), ratio=st.floats(0, 0.999))
def test_random_text_mask_holds_its_promises(lengths, ratio):
    """Any lengths, captions without a word included: ends stay, at least one word stays."""
    real = torch.tensor(lengths)[:, None]
    place = torch.arange(22)
    valid, words = place < real + 2, (place >= 1) & (place <= real)
    noise = mask_noise(0, 0, torch.arange(len(lengths)), 22, "text")
    masking = random_text_mask(noise, ratio, valid, words)
    assert not (masking.mask & ~words).any()
    assert ((words & ~masking.mask).sum(1) >= real[:, 0].clamp(max=1)).all()
    assert torch.equal(masking.keep_valid.sum(1), (valid & ~masking.mask).sum(1))


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 75])
def test_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        random_mask(torch.rand(2, 7), ratio)


def test_unknown_masker_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'random'"):
        find_masker("randon", IMAGE_MASKERS)
