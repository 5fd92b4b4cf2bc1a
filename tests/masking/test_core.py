"""A score becomes a mask of the exact size, and so does what a user's masker returns."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.masking.core import check_ratio, count_kept, keep_visible, mask_largest
from mmkit.masking.image import IMAGE_MASKERS
from mmkit.masking.plan import caption_of, draw_maskings
from mmkit.masking.text import TEXT_MASKERS
from mmkit.noise import mask_noise
from tests.masking.any_masking import RATIOS, consistent


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


# -- a user's maskers --------------------------------------------------------------------------


@pytest.fixture
def own(make_model, make_data, monkeypatch):
    """Draw a masking with this function as the masker."""
    batch, model = make_data(13).batch(range(7)), make_model()

    def draw_with(kind: str, masker, **options):
        known = {"image": IMAGE_MASKERS, "text": TEXT_MASKERS}[kind]
        monkeypatch.setitem(known, "own", masker)
        options = dict(seed=3, epoch=2, **{kind: ("own", 0.5)}) | options
        return draw_maskings(batch, model.token_info, **options)[kind == "text"], batch, model

    return draw_with


def test_a_bool_mask_of_a_users_image_masker_becomes_a_masking(own):
    """From a tensor or an array: its visible tokens, padded if their number differs."""
    for masker in (lambda n, ratio, scene: n > 0.4, lambda n, ratio, scene: (n > 0.4).numpy()):
        masking, batch, model = own("image", masker)
        expected = mask_noise(3, 2, batch.sample_ids, 9, "image") > 0.4
        assert torch.equal(masking.mask, expected) and masking.keep_valid.any(1).all()
        for row in range(7):
            kept = masking.ids_keep[row][masking.keep_valid[row]]
            assert kept.tolist() == (~expected[row]).nonzero()[:, 0].tolist()
        assert torch.isfinite(model(batch, masking, None).image_features).all()
    masking, _, _ = own("image", lambda noise, ratio, scene: noise.argsort(1).argsort(1) >= 4)
    assert masking.keep_valid is None and masking.ids_keep.shape == (7, 4)


def test_a_bool_mask_of_a_users_text_masker_spares_special_tokens(own):
    """[CLS], [SEP] and padding are never masked, whatever the function returns."""
    for mode in ("drop", "replace"):
        first = lambda noise, ratio, caption: caption.maskable.cumsum(1) <= 1  # noqa: E731
        masking, batch, model = own("text", first, text_mode=mode)
        maskable = caption_of(batch.input_ids, batch.valid, model.token_info).maskable
        assert torch.equal(masking.mask, maskable & (maskable.cumsum(1) == 1))
        assert torch.isfinite(model(batch, None, masking, text_mode=mode).text_features).all()


def other(masking, **parts):
    return dataclasses.replace(masking, **parts)


def dropped_padding(noise, ratio, caption):
    masking = TEXT_MASKERS["random"](noise, ratio, caption)
    return other(masking, mask=masking.mask | ~caption.valid)


RANDOM = IMAGE_MASKERS["random"]


def keeping(noise, ratio, change):
    """A random `Masking` with changed kept tokens (7, 4)."""
    masking = RANDOM(noise, ratio)
    return other(masking, ids_keep=change(masking.ids_keep))


@pytest.mark.parametrize(
    "kind, masker, message",
    [
        ("image", lambda n, r, s: None, "gave NoneType for 7 samples of 9 tokens; give a"),
        ("image", lambda n, r, s: n[:, :8] > 0.5, r"gave \(7, 8\) torch.bool for 7 samples of 9"),
        ("image", lambda n, r, s: (n > 0.5).float(), r"gave \(7, 9\) torch.float32 for 7"),
        ("image", lambda n, r, s: n >= 0, "leaves no token visible, in sample 0"),
        ("image", lambda n, r, s: RANDOM(n[:, :8], r), r"gave \(7, 8\) torch.bool"),
        ("image", lambda n, r, s: keeping(n, r, lambda ids: ids[:, :3]), "keeps other tokens"),
        ("image", lambda n, r, s: keeping(n, r, lambda ids: ids[:, [0, 0, 1, 2]]),
         "keeps a token twice"),
        ("image", lambda n, r, s: keeping(n, r, lambda ids: ids + 9), "keeps"),
        ("image", lambda n, r, s: keeping(n, r, lambda ids: ids[0]), r"ids_keep \(4,\)"),
        ("image", lambda n, r, s: other(RANDOM(n, r), ids_restore=RANDOM(n, r).ids_restore.flip(1)),
         "ids_restore that does not restore the order"),
        ("image", lambda n, r, s: other(RANDOM(n, r), mask=~RANDOM(n, r).mask), "keeps other"),
        ("text", lambda n, r, c: n >= 0, "leaves no token visible"),
        ("text", lambda n, r, c: n[:, 1:-1] > 0.5, r"gave \(7, 6\) torch.bool for 7 samples of 8"),
        ("text", dropped_padding, "masks what may not be masked"),
    ],
)  # fmt: skip
def test_a_users_masker_that_returns_no_mask_is_refused(own, kind, masker, message):
    with pytest.raises(ValueError, match=f"masker 'own' .*{message}"):
        own(kind, masker)
