"""Rates are found again from the times that they made, and measuring leaves the run as it was."""

import dataclasses

import pytest

import mmkit as mm
from mmkit import cost


def predictions():
    """Of nine steps: each ratio with each batch."""
    return [
        cost.predict(
            mm.TrainingConfig(batch_size=size, image_mask_ratio=ratio, mixed_precision="no"),
            "tiny",
            caption_length=11,
        )
        for ratio in (0.0, 0.5, 0.75)
        for size in (17, 41, 97)
    ]


def test_rates_that_made_the_times_are_found():
    found = predictions()
    rates = cost.Rates(0.03, 0.004, 0.05)
    fitted = cost.fit_rates(found, [p.time(rates) for p in found])
    for name in ("seconds_per_step", "seconds_per_gflop", "seconds_per_gigabyte"):
        assert getattr(fitted, name) == pytest.approx(getattr(rates, name), rel=1e-3)
    assert fitted.seconds_per_exchanged_gigabyte == 0
    assert rates.gflop_per_second == pytest.approx(250)


def test_no_rate_is_below_zero_and_too_few_times_are_refused():
    """If times FALL with the bytes moved, that rate is left out and the others are fitted."""
    found = predictions()
    times = [p.time(cost.Rates(0.5, 0.004, -0.02)) for p in found]
    assert min(times) > 0
    fitted = cost.fit_rates(found, times)
    assert min(dataclasses.astuple(fitted)) >= 0
    with pytest.raises(ValueError, match="at least 6"):
        cost.fit_rates(found[:5], times[:5])
    with pytest.raises(ValueError, match="cannot be fitted"):
        cost.fit_rates(found, times[:7])


def test_measured_rates_leave_the_run_as_it_was(trainer_of):
    trainer = trainer_of(image_mask_ratio=0.5, image_mask="grid")
    before = trainer.config.to_dict()
    rates = cost.measure_rates(trainer, rounds=1)
    assert trainer.config.to_dict() == before
    assert max(dataclasses.astuple(rates)) > 0
    batch = trainer.first_batch()
    assert 0.0001 < cost.predict_batch(trainer, batch, rates).seconds < 5
    with pytest.raises(ValueError, match="29 is more than the 23"):
        cost.measure_rates(trainer, batches=[29])
    assert trainer.config.to_dict() == before


def test_crossover_is_where_hiding_begins_to_pay():
    """One patch less is too small; where only the number of steps costs, it never pays."""
    config, rates = mm.TrainingConfig(image_mask_ratio=0.5), cost.Rates(0.05, 0.004, 0.0)
    side = cost.crossover(config, "tiny", rates, caption_length=11, gain=1.5)
    assert side is not None and side % 8 == 0

    def gain(image_size, **changed):
        times = [
            cost.predict(
                dataclasses.replace(config, image_mask_ratio=ratio, **changed),
                "tiny",
                caption_length=11,
                rates=rates,
                image_size=image_size,
            ).seconds
            for ratio in (0.0, 0.5)
        ]
        return times[0] / times[1]

    assert gain(side) >= 1.5 > gain(side - 8)
    dearer = cost.crossover(config, "tiny", rates, caption_length=11, gain=1.8)
    assert dearer is not None and dearer > side
    replaced = dataclasses.replace(config, image_mask_mode="replace")
    given = dict(caption_length=11, gain=1.1, largest=96)
    assert cost.crossover(replaced, "tiny", rates, **given) is None
    with pytest.raises(ValueError, match="above 1"):
        cost.crossover(config, "tiny", rates, caption_length=11, gain=1.0)
    with pytest.raises(ValueError, match="mim_weight=0"):
        back = dataclasses.replace(config, mim_weight=1.0)
        cost.crossover(back, "tiny", rates, caption_length=11, gain=1.5)
