"""A wrong value never starts a run; the learning rate follows its schedule."""

import json
import math

import numpy as np
import pytest
import torch

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
        (dict(text_mask_mode="80-10-10"), "did you mean '80/10/10'"),
        (dict(image_mask_mode="80/10/10"), "known: drop, replace"),
        (dict(image_mask_schedule="cosin"), "did you mean 'cosine'"),
        (dict(text_mask_schedule="step"), "known: constant, cosine, linear, uniform"),
        (dict(image_mask_schedule="linear"), "image_mask_final_ratio=None must be given with a s"),
        (dict(text_mask_schedule="uniform"), "text_mask_final_ratio=None must be given with a s"),
        (dict(image_mask_final_ratio=0.9), "image_mask_final_ratio=0.9 must be given with a sch"),
        (dict(text_mask_final_ratio=0.9), "text_mask_final_ratio=0.9 must be given with a sched"),
        (
            dict(image_mask_schedule="linear", image_mask_final_ratio=1.0),
            r"image_mask_final_ratio=1.0 must be None or in \[0, 1\)",
        ),
        (
            dict(text_mask_schedule="cosine", text_mask_final_ratio=-0.5),
            r"text_mask_final_ratio=-0.5 must be None or in \[0, 1\)",
        ),
        (dict(ema_momentum=1.0), r"ema_momentum=1.0 must be in \[0, 1\)"),
        (dict(ema_momentum=-0.1), r"ema_momentum=-0.1 must be in \[0, 1\)"),
        (dict(image_mask="painted"), "painted_mask=None must be given with image_mask='painted'"),
        (dict(image_mask="painted", painted_mask=[0, 1]), "must be rows of equal length"),
        (dict(image_mask="painted", painted_mask=[[0, 1], [0]]), "must be rows of equal length"),
        (dict(image_mask="painted", painted_mask="0101"), "must be rows of equal length"),
        (
            dict(image_mask="layers", image_mask_schedule="linear", image_mask_final_ratio=0.5),
            "'layers' goes by no ratio; use 'constant'",
        ),
        (dict(painted_mask=[[0, 1]]), "must be given with image_mask='painted', and only then"),
        (dict(image_mask="layers", augment="shift"), "augment='shift' moves .* use augment='none'"),
        (dict(emma_momentum=0.9), "did you mean 'ema_momentum'"),
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


def test_what_is_hidden_by_default():
    """Random half of the patches dropped, all the time; words seen; hidden ones by a token."""
    config = TrainingConfig()
    image = (config.image_mask, config.image_mask_ratio, config.image_mask_mode)
    text = (config.text_mask, config.text_mask_ratio, config.text_mask_mode)
    assert image == ("random", 0.5, "drop") and text == ("random", 0.0, "replace")
    assert config.image_mask_schedule == config.text_mask_schedule == "constant"
    assert config.image_mask_final_ratio is config.text_mask_final_ratio is None
    assert config.painted_mask is None and config.ema_momentum == 0.996


@pytest.mark.parametrize("schedule", ["linear", "cosine", "uniform"])
def test_a_schedule_takes_a_final_ratio(schedule):
    """0 is a ratio like others, not a missing one."""
    options = dict(image_mask_schedule=schedule, text_mask_schedule=schedule)
    config = TrainingConfig(image_mask_final_ratio=0, text_mask_final_ratio=0.9, **options)
    assert (config.image_mask_final_ratio, config.text_mask_final_ratio) == (0, 0.9)
    assert TrainingConfig(text_mask_mode="80/10/10").text_mask_mode == "80/10/10"


@pytest.mark.parametrize(
    "painted",
    [
        [[0, 1, 0], [1, 1, 0]],
        np.array([[0, 255, 0], [7, 1, 0]], dtype=np.uint8),
        torch.tensor([[False, True, False], [True, True, False]]),
        ((0.0, 0.5, 0.0), (1.0, 1.0, 0.0)),
    ],
)
def test_a_painted_mask_becomes_plain_values(painted):
    """Whatever stands for true: rows of 0 and 1, which a file takes and gives back."""
    config = TrainingConfig(image_mask="painted", painted_mask=painted)
    assert config.painted_mask == [[0, 1, 0], [1, 1, 0]]
    again = TrainingConfig(**json.loads(json.dumps(config.to_dict())))
    assert again == config


def test_to_dict_is_plain():
    config = TrainingConfig(schedule=math.sin)
    assert json.loads(json.dumps(config.to_dict()))["schedule"] == "function sin"
