"""Records say what a step was, and an error names the likely cause of skipped steps."""

import math

import pytest
import torch

from tests.terms_by_hand import BESIDE


def test_too_many_skipped_steps_stop_the_run_and_name_the_cause(make_trainer, make_model):
    trainer = make_trainer(max_skipped_steps=3)
    batch = trainer.first_batch()
    broken = batch[torch.arange(len(batch))]
    broken.pixel_values = torch.zeros(len(batch), 3, 15, 15)
    broken.pixel_values[4] = math.nan
    with pytest.raises(RuntimeError, match=rf"3 steps .* \(sample ids {batch.sample_ids[4]}\)"):
        for _ in range(3):
            trainer.train_step(broken, 0)
    assert trainer.skipped == 3
    spoilt = make_model()
    with torch.no_grad():
        spoilt.text_projection[2].weight[0, 0] = math.inf
    trainer = make_trainer(spoilt, max_skipped_steps=2)
    with pytest.raises(RuntimeError, match=r"not finite from the start \(text_projection\.2"):
        trainer.fit()


def test_skipped_steps_stand_in_the_metrics(make_fp16_trainer):
    """The first scale is too high for this model, as it may be for a real one."""
    trainer = make_fp16_trainer()
    records = [r for r in trainer.fit().history if r["split"] == "train"]
    overflowed = [r["grad_norm"] is None for r in records]
    assert 0 < sum(overflowed) < 10 and overflowed[0]
    assert [r["skipped_steps"] for r in records] == [sum(overflowed[: i + 1]) for i in range(20)]
    assert trainer.scaler.get_scale() == 2.0 ** (16 - sum(overflowed))


def test_a_term_that_masks_nothing_is_not_logged(make_terms_trainer, make_data):
    """In unmasked epochs there are no patches and no tokens to predict."""
    values = dict(batch_size=11, num_epochs=2, unmasked_epochs=1, log_every=1)
    run = make_terms_trainer(val=make_data(9, seed=1), **BESIDE | values).fit()
    steps = [r for r in run.history if r["split"] == "train"]
    assert len(steps) == 6
    assert all("mim_loss" in r and "mlm_loss" in r for r in steps[:3])
    assert all("mim_loss" not in r and "mlm_loss" not in r for r in steps[3:])
    assert all(r["loss"] == pytest.approx(r["contrastive_loss"]) for r in steps[3:])
