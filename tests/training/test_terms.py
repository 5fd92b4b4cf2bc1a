"""A model has the heads that its terms need, and each step has something to learn."""

import math

import pytest

from mmkit.schedules import RATIO_SCHEDULES
from tests.terms_by_hand import BESIDE, CASES


@pytest.mark.parametrize(
    "values, message",
    [
        (BESIDE | dict(contrastive_weight=0.0, mlm_weight=0.0, mim_schedule="last_half"),
         "step 0 of 5 has no term to learn from; change"),
        (CASES["BERT"] | dict(mlm_schedule=lambda p: float(p < 0.7)), "step 3 of 5 has no term"),
        (CASES["MAE"] | dict(unmasked_epochs=1), r"step 4 of 5 .*\(nothing is masked in it\)"),
        (CASES["MAE"] | dict(image_mask_schedule="linear", image_mask_final_ratio=0.0),
         r"step 4 of 5 .*\(nothing is masked in it\)"),
        (CASES["BERT"] | dict(text_mask_schedule="cosine", text_mask_ratio=0.0,
                              text_mask_final_ratio=0.3),
         r"step 0 of 5 .*\(nothing is masked in it\)"),
    ],
)  # fmt: skip
def test_a_step_with_nothing_to_learn_is_refused_before_the_run(
    make_terms_trainer, values, message
):
    with pytest.raises(ValueError, match=message):
        make_terms_trainer(**dict(num_epochs=5) | values)


def test_a_model_with_another_decoder_is_refused(make_terms_trainer, make_model):
    """The message names the missing heads, or the setting that the decoder was built for."""
    model = make_model().add_decoder(words=False, width=32)
    with pytest.raises(ValueError, match=r"no head for words; call model\.add_decoder"):
        make_terms_trainer(model=model, **BESIDE)
    model = make_model().add_decoder(width=32)
    with pytest.raises(ValueError, match=r"cross_modal=True is not what .* give cross_modal=False"):
        make_terms_trainer(model=model, **BESIDE, cross_modal=True)
    with pytest.raises(ValueError, match="norm_pix_loss=True is not what"):
        make_terms_trainer(model=model, **BESIDE, norm_pix_loss=True)
    decoder = model.decoder
    assert make_terms_trainer(model=model, **BESIDE).model.decoder is decoder  # one that fits stays


def test_a_fraction_outside_0_to_1_is_refused(make_terms_trainer):
    """Below 0 a term would be maximised, above 1 exceed its weight, and NaN is no number."""
    for fraction in (-0.5, 50, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"mim_schedule gives .* at step 1 of 3"):
            make_terms_trainer(
                **BESIDE, mim_schedule=lambda p, x=fraction: x if p else 1.0, max_steps=3
            )


@pytest.mark.parametrize("value", [-0.5, 50, math.nan])
def test_a_learning_rate_out_of_range_is_refused_before_the_run(make_trainer, value):
    words = r"schedule gives .* at step 4 of 7; it must give a number in \[0, 1\]"
    with pytest.raises(ValueError, match=words):
        make_trainer(max_steps=7, warmup_steps=1, schedule=lambda p: value if p == 0.6 else 1.0)
    assert not list(make_trainer().path.parent.iterdir())


@pytest.mark.parametrize("value", [-0.5, 1.0, 50, math.nan])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_ratio_out_of_range_is_refused_before_the_run(make_trainer, monkeypatch, kind, value):
    """From a user's schedule, for all samples or one of them, in a late epoch."""
    for late in (lambda noise: value, lambda noise: noise * 0 + value):
        late_one = lambda s, f, p, noise, late=late: late(noise) if p == 1 else s  # noqa: E731
        monkeypatch.setitem(RATIO_SCHEDULES, "late", late_one)
        values = {f"{kind}_mask_schedule": "late", f"{kind}_mask_final_ratio": 0.5}
        words = rf"{kind}_mask_schedule='late' in epoch 3: mask_ratio=.* must be in \[0, 1\)"
        with pytest.raises(ValueError, match=words):
            make_trainer(num_epochs=3, **values)
