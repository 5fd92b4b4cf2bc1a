"""Noise is a pure function and looks random; a score becomes a mask of the exact size."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.masking.core import Masking, check_ratio, count_kept, keep_visible, mask_largest
from mmkit.masking.image import random_mask
from mmkit.noise import mask_noise, more_noise, then_noise

# -- noise -----------------------------------------------------------------------------------


def test_noise_depends_on_nothing_but_its_arguments():
    """A sample's noise is the same alone, in any batch and in any order."""
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


def test_noise_is_the_number_it_was():
    """Frozen values: a change of the hash would silently change every published mask."""
    noise = mask_noise(1, 2, torch.tensor([3, 5]), 3)
    assert (noise * 2**24).long().tolist() == [
        [3150303, 6990156, 4812679],
        [11246803, 13568918, 12627434],
    ]


TOKENS = 17
# (1021, 59, 17): a million draws whose first axis is tested
ALONG = {
    "samples": lambda: [mask_noise(0, 0, torch.arange(59) + 59 * i, TOKENS) for i in range(1021)],
    "epochs": lambda: [mask_noise(0, i, torch.arange(59), TOKENS) for i in range(1021)],
    "seeds": lambda: [mask_noise(i, 0, torch.arange(59), TOKENS) for i in range(1021)],
    "streams": lambda: [mask_noise(0, 0, torch.arange(59), TOKENS, f"{i}") for i in range(1021)],
    "tokens": lambda: list(mask_noise(0, 0, torch.arange(59 * 17), 1021).T.reshape(1021, 59, 17)),
    "seed and epoch": lambda: [
        mask_noise(i, 1020 - i, torch.arange(59), TOKENS) for i in range(1021)
    ],
}


def chi_square(draws: np.ndarray) -> float:
    """For 1009 equal bins: mean 1008, standard deviation 45."""
    counts = np.histogram(draws, 1009, (0, 1))[0]
    expected = draws.size / 1009
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("axis", ALONG)
def test_noise_is_uniform_and_uncorrelated_at_every_lag(axis):
    """Chi-square, and the correlation at every lag along three axes at once, on a million draws.

    All 1021 x 59 x 17 (circular) lags come from one Fourier transform; each is a standard normal
    number where draws are independent, so the largest of half a million stays near 5.
    """
    noise = torch.stack(ALONG[axis]()).double().numpy()
    assert noise.shape == (1021, 59, 17)
    assert noise.min() >= 0 and noise.max() < 1
    assert 1008 - 5 * 45 < chi_square(noise) < 1008 + 5 * 45
    spectrum = np.fft.rfftn(noise - 0.5)
    correlation = (
        np.fft.irfftn(np.abs(spectrum) ** 2, noise.shape, (0, 1, 2)) * 12 / np.sqrt(noise.size)
    )
    correlation[0, 0, 0] = 0  # of each draw with itself
    assert np.abs(correlation).max() < 6


def test_more_noise_is_uniform_and_independent_of_what_it_is_made_of():
    """Every new draw against every old one, by value and square, over 31 thousand samples."""
    noise = mask_noise(0, 0, torch.arange(30011), 13)
    more = more_noise(noise, 31)
    assert more.shape == (30011, 31) and more.dtype == torch.float32
    assert 0 <= more.min() and more.max() < 1
    assert 1008 - 5 * 45 < chi_square(more.numpy()) < 1008 + 5 * 45
    columns = torch.cat([noise, noise**2, more, more**2, (noise - 0.5).abs()], 1).double()
    columns = (columns - columns.mean(0)) / columns.std(0)
    correlation = columns.T @ columns / len(columns) ** 0.5  # standard normal where independent
    old, new = [*range(26), *range(88, 101)], range(26, 88)
    assert correlation[old][:, new].abs().max() < 5.5
    among_new = correlation[26:57, 26:57].fill_diagonal_(0)
    assert among_new.abs().max() < 5.5


def test_more_noise_is_a_function_of_a_row():
    """Alone, in any order, more or fewer: the same draws; another row has others."""
    noise = mask_noise(0, 0, torch.arange(7), 5)
    more = more_noise(noise, 11)
    assert torch.equal(more_noise(noise.flip(0), 11), more.flip(0))
    assert torch.equal(more_noise(noise[3:4], 5), more[3:4, :5])
    assert len(more.unique()) == more.numel()
    for column in range(3):  # one draw of 24 bits alone would repeat among many samples
        other = noise.clone()
        other[:, column] = noise[:, 3]
        assert (more_noise(other, 11) != more).all()
    for tokens in (1, 2):  # grids of fewer patches than three
        few = more_noise(noise[:, :tokens], 11)
        assert len(few.unique()) == few.numel()


# -- from an order to a mask -----------------------------------------------------------------


def consistent(masking: Masking):
    """ids_keep, ids_restore, keep_valid and mask are consistent."""
    tokens, kept = masking.mask.shape[1], masking.ids_keep.shape[1]
    everything = torch.arange(tokens).expand_as(masking.mask)
    assert torch.equal(masking.ids_restore.sort(1).values, everything)
    order = masking.ids_restore.argsort(1)  # kept, then masked
    assert torch.equal(order[:, :kept], masking.ids_keep)
    visible = ~masking.mask.gather(1, masking.ids_keep)
    if masking.keep_valid is None:
        assert visible.all() and ((~masking.mask).sum(1) == kept).all()
    else:
        assert torch.equal(visible, masking.keep_valid)
        count = (~masking.mask).sum(1)
        assert torch.equal(masking.keep_valid, torch.arange(kept) < count[:, None])
        assert kept == count.max()


RATIOS = st.one_of(st.floats(0, 0.999), st.sampled_from([0.0, 0.5, 0.75, 0.9, 0.999]))


@given(tokens=st.integers(1, 300), ratios=st.lists(RATIOS, min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_mask_largest_holds_its_promises(tokens, ratios):
    """One ratio or one per sample: exact, rounded, the largest are masked, at least one stays."""
    score = mask_noise(0, 0, torch.arange(len(ratios)), tokens)
    expected = [max(1, round(tokens * (1 - ratio))) for ratio in ratios]
    each = mask_largest(score, torch.tensor(ratios, dtype=torch.float64))
    assert (~each.mask).sum(1).tolist() == expected
    assert each.keep_valid.sum(1).tolist() == expected
    consistent(each)
    for row, ratio in enumerate(ratios):
        one = mask_largest(score, ratio)
        consistent(one)
        assert one.keep_valid is None and one.ids_keep.shape == (len(ratios), expected[row])
        assert torch.equal(one.mask[row], each.mask[row])
        assert torch.equal(one.ids_keep[row], each.ids_keep[row, : expected[row]])
        smallest = score[row].sort(stable=True).indices[: expected[row]]
        assert torch.equal(one.ids_keep[row], smallest)  # MAE's order: by score


@pytest.mark.parametrize(
    "tokens, ratio, kept", [(100, 0.9, 10), (64, 0.5, 32), (30, 0.9, 3), (7, 0.0, 7), (7, 0.99, 1)]
)
def test_kept_tokens_are_rounded_not_truncated(tokens, ratio, kept):
    """MAE truncates: of 100 tokens at 0.9 it keeps 9, of 30 it keeps 2."""
    masking = mask_largest(mask_noise(0, 0, torch.arange(5), tokens), ratio)
    assert masking.ids_keep.shape == (5, kept)
    assert (masking.mask.sum(1) == tokens - kept).all()
    if (tokens, ratio) in ((100, 0.9), (30, 0.9)):
        assert int(tokens * (1 - ratio)) == kept - 1  # the trap


def test_random_masking_is_vit_maes():
    """The same noise gives transformers' ViTMAE the same kept tokens, mask and ids_restore."""
    from transformers import ViTMAEConfig
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

    tower = dict(hidden_size=12, num_attention_heads=1, num_hidden_layers=1, image_size=40)
    for ratio, kept in ((0.75, 16), (0.5, 32), (0.25, 48), (0.0, 64)):
        noise = mask_noise(0, 0, torch.arange(11), 64)
        theirs = ViTMAEEmbeddings(ViTMAEConfig(mask_ratio=ratio, patch_size=5, **tower))
        position = torch.arange(64.0)[None, :, None].expand(11, -1, 1)  # as the tokens' content
        tokens, mask, ids_restore = theirs.random_masking(position, noise)
        ours = random_mask(noise, ratio)
        assert ours.ids_keep.shape == (11, kept)
        assert torch.equal(ours.ids_keep, tokens[..., 0].long())
        assert torch.equal(ours.mask, mask.bool())
        assert torch.equal(ours.ids_restore, ids_restore)


@given(data=st.data(), tokens=st.integers(1, 23), samples=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_keep_visible_keeps_what_is_real_and_not_masked(data, tokens, samples):
    """For any mask and padding: the visible valid tokens in reading order, then padding."""
    rows = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    mask, valid = (
        torch.tensor(data.draw(st.lists(rows, min_size=samples, max_size=samples)))
        for _ in range(2)
    )
    masking = keep_visible(mask, valid)
    assert torch.equal(masking.mask, mask)
    for row in range(samples):
        expected = [i for i in range(tokens) if valid[row, i] and not mask[row, i]]
        assert masking.ids_keep[row][masking.keep_valid[row]].tolist() == expected
        assert masking.keep_valid[row, : len(expected)].all()
    assert masking.ids_keep.shape[1] == max(1, int((valid & ~mask).sum(1).max()))
    assert torch.equal(masking.ids_restore.sort(1).values, torch.arange(tokens).expand(samples, -1))


def test_rows_of_a_masking():
    """A slice or an index picks the same rows of every part; missing parts stay missing."""
    noise = mask_noise(0, 0, torch.arange(7), 11)
    full = mask_largest(noise, torch.linspace(0.2, 0.8, 7))
    full.substitute = torch.arange(77).reshape(7, 11)
    for rows in (slice(2, 5), torch.tensor([6, 0])):
        part = full[rows]
        for name in ("mask", "ids_keep", "ids_restore", "keep_valid", "substitute"):
            assert torch.equal(getattr(part, name), getattr(full, name)[rows]), name
    plain = mask_largest(noise, 0.5)[1:3]
    assert plain.keep_valid is None and plain.substitute is None and len(plain.mask) == 2


@given(
    scores=st.lists(st.integers(0, 2**24 - 1) | st.integers(0, 3), min_size=1, max_size=19),
    scale=st.sampled_from([1.0, 2.0**-20, 2.0**-140]),
)
@settings(max_examples=150, deadline=None)
def test_then_noise_orders_by_score_and_then_by_noise(scores, scale):
    """Against Python's sort of pairs, with tiny numbers and zeros of either sign."""
    score = torch.tensor([scores], dtype=torch.float64).mul(scale).float()
    score[:, ::2] *= 1 - 2 * (score[:, ::2] == 0).float()  # every other 0 becomes -0.0
    noise = mask_noise(0, 0, torch.arange(1), len(scores))
    pairs = list(zip(score[0].tolist(), noise[0].tolist(), strict=True))
    expected = sorted(range(len(scores)), key=pairs.__getitem__)
    assert then_noise(score, noise)[0].argsort().tolist() == expected
    whole = torch.tensor([scores])  # int64 passes too
    pairs = list(zip(scores, noise[0].tolist(), strict=True))
    expected = sorted(range(len(scores)), key=pairs.__getitem__)
    assert then_noise(whole, noise)[0].argsort().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_ratio_in_a_tensor_counts_as_the_same_plain_number(dtype):
    """Ratios of two and three digits and fractions of a power of two, for any number of tokens, one
    or one per sample. In float32, 0.1 of 15 patches would mask 2, not 1."""
    digits = 2 if dtype == torch.bfloat16 else 3
    ratios = [i / 10**digits for i in range(0, 10**digits, 7)] + [1 / 3, 2 / 3]
    ratios += [i / 128 for i in range(0, 128, 3)]
    if dtype in (torch.float16, torch.bfloat16):
        ratios = ratios[: -2 - 43]  # they do not represent a third as float64 does
    if dtype == torch.bfloat16:
        ratios = [ratio for ratio in ratios if float(torch.tensor(ratio, dtype=dtype)) < 1]
    for tokens in (5, 15, 30, 35, 64, 196, 251):
        score = torch.zeros(len(ratios), tokens)
        plain = [count_kept(score, ratio) for ratio in ratios]
        each = torch.tensor(ratios, dtype=torch.float64).to(dtype)
        assert count_kept(score, each).tolist() == plain
        assert [count_kept(score, one) for one in each] == plain


def test_ratios_of_another_number_of_samples_are_refused():
    """One number (a tensor, too), or one per sample."""
    score = torch.rand(3, 7)
    assert torch.equal(mask_largest(score, torch.tensor(0.5)).mask, mask_largest(score, 0.5).mask)
    for wrong in (torch.rand(2), torch.rand(3, 1)):
        with pytest.raises(ValueError, match=r"mask_ratio has shape .*each of the 3 samples"):
            mask_largest(score, wrong)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 75, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio):
    """One for all or one of several: the message names value, rule and remedy."""
    message = rf"mask_ratio={ratio:g} must be in \[0, 1\).*not per cent"
    with pytest.raises(ValueError, match=message):
        check_ratio(ratio, 3)
    with pytest.raises(ValueError, match=message):
        count_kept(torch.rand(3, 7), torch.tensor([0.5, ratio, 0.3]))
    with pytest.raises(ValueError, match=message):
        mask_largest(torch.rand(2, 7), ratio)
