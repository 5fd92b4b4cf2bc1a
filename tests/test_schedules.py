"""Rates, weights and ratios follow their schedules, within 0 and 1."""

import math
import re

import pytest
import torch

from mmkit import TrainingConfig
from mmkit.masking.plan import mask_ratios


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.2, 0.2, 0.2, 0.2]),
        ("linear", [0.2, 0.35, 0.5, 0.8]),
        ("cosine", [0.2, 0.2 + 0.6 * (1 - math.cos(math.pi / 4)) / 2, 0.5, 0.8]),
    ],
)
def test_a_ratio_goes_from_start_to_final(schedule, expected):
    """At the start, a quarter, the middle and the end; up or down."""
    for start, final, sign in ((0.2, 0.8, 1), (0.8, 0.2, -1)):
        ratios = [
            mask_ratios(schedule, start, final, progress, torch.arange(5), seed=0, epoch=0)
            for progress in (0.0, 0.25, 0.5, 1.0)
        ]
        assert ratios == pytest.approx([start + sign * (ratio - 0.2) for ratio in expected])


@pytest.mark.parametrize("value", [-0.1, 50, math.nan, math.inf, "half", None, [0.5, 0.5]])
def test_a_schedule_that_leaves_its_range_names_step_and_value(value):
    """For the learning rate and for the weight of a term; rounding at 0 and 1 is accepted."""
    message = rf"gives {re.escape(repr(value))} at step 3 of 7; it must give a number in \[0, 1\]"
    own = dict(warmup_steps=0, schedule=lambda p: value if p == 0.5 else 1 + 1e-12)
    own |= dict(mim_weight=0.5, mim_schedule=own["schedule"])
    config = TrainingConfig(**own)
    assert config.lr_fraction(2, 7) == 1 and config.term_weights(2, 7)["mim"] == 0.5
    for evaluate in (config.lr_fraction, config.term_weights):
        with pytest.raises(ValueError, match=message):
            evaluate(3, 7)


def test_warmup_then_cosine():
    """It rises in equal steps to the peak, then falls by half a cosine to the final fraction."""
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
