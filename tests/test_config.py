"""A wrong value never starts a run; the learning rate follows its schedule."""

import math

import pytest

from mmkit import TrainingConfig


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(bach_size=3), "no field 'bach_size'; did you mean 'batch_size'"),
        (dict(optimizer="mion"), "did you mean 'muon'"),
        (dict(schedule="cosin"), "did you mean 'cosine'"),
        (dict(image_mask_ratio=1.0), r"image_mask_ratio=1.0 must be in \[0, 1\)"),
        (dict(image_mask_ratio=50), "a fraction, not per cent"),
        (dict(text_mask_ratio=-0.1), r"must be in \[0, 1\)"),
        (dict(num_epochs=0), "num_epochs=0 must be at least 1"),
        (dict(batch_size=2.5), "whole number"),
        (dict(learning_rate=-1), "learning_rate=-1 must be 0 or more"),
        (dict(batch_size=4, gradient_accumulation_steps=5), "at most 4"),
        (dict(temperature=0.001), "at least 0.01"),
        (dict(mixed_precision="bf17"), "known: auto, bf16, fp16, no"),
        (dict(max_steps=0), "None or at least 1"),
    ],
)
def test_wrong_values_are_refused_in_words(values, words):
    with pytest.raises(ValueError, match=words):
        TrainingConfig(**values)


def test_warmup_then_cosine():
    """Up in equal steps to the peak, then half a cosine down to the final fraction."""
    config = TrainingConfig(warmup_steps=5, final_lr_fraction=0.1)
    rates = [config.lr_fraction(step, 26) for step in range(26)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1 and rates[25] == pytest.approx(0.1)
    assert rates[15] == pytest.approx(0.55)
    assert rates == sorted(rates[:6]) + sorted(rates[6:], reverse=True)


@pytest.mark.parametrize("schedule", ["linear", "constant", lambda progress: 1 - progress**2])
def test_other_schedules(schedule):
    config = TrainingConfig(warmup_steps=0, schedule=schedule, final_lr_fraction=0.0)
    expected = (
        {"linear": 0.5, "constant": 1.0}.get(schedule, 0.75) if isinstance(schedule, str) else 0.75
    )
    assert config.lr_fraction(10, 21) == pytest.approx(expected)
    assert math.isfinite(config.lr_fraction(0, 1))


def test_to_dict_is_plain():
    import json

    config = TrainingConfig(schedule=math.sin)
    assert json.loads(json.dumps(config.to_dict()))["schedule"] == "function sin"
