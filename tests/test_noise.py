"""Noise is a pure function and looks random."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.noise import mask_noise, more_noise, then_noise


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
