"""The validated loss is the weighted sum of its terms, and something is always masked."""

import pytest
import torch

import mmkit as mm
from mmkit.evaluation.reconstruction import evaluate_reconstruction
from tests.terms_by_hand import ALL, BESIDE


def test_the_validated_loss_is_the_weighted_sum(make_terms_trainer, make_data):
    """Each term counts with its full weight, whatever the schedules say."""
    val = make_data(17, seed=1)
    trainer = make_terms_trainer(val, **ALL | dict(mim_schedule="last_fifth", num_epochs=6))
    records = [r for r in trainer.fit().history if r["split"] == "val"]
    for record in records:
        weights = dict(contrastive=1.0, mim=0.7, mlm=0.3, itm=0.4)
        weighted = 0.0
        for term, weight in weights.items():  # in this order: the same bits in any process
            weighted += weight * record[f"{term}_loss"]
        assert record["loss"] == weighted
    assert record["contrastive_loss"] == pytest.approx(mm.evaluate(trainer.model, val)["loss"])
    again = evaluate_reconstruction(
        trainer.model, val, image_mask=("random", 0.6), text_mask=("random", 0.3)
    )
    assert {k: record[k] for k in again} == again


def test_a_ratio_that_rises_from_zero_is_validated_with_something_masked(
    make_terms_trainer, make_data
):
    """Otherwise the term would be 0 at the start, and the first model would stay the best."""
    values = dict(image_mask_ratio=0.0, image_mask_schedule="linear", image_mask_final_ratio=0.75)
    trainer = make_terms_trainer(make_data(7, seed=1), **BESIDE | values, num_epochs=2)
    records = [r for r in trainer.fit().history if r["split"] == "val"]
    assert all(r["mim_loss"] > 0 for r in records)


def test_a_strip_of_a_ratio_that_rises_masks_something(make_terms_trainer, make_data):
    """Its masks are those of validation."""
    from mmkit.evaluation.reconstruction import example_images

    rising = dict(image_mask_ratio=0.0, image_mask_schedule="linear", image_mask_final_ratio=0.6)
    trainer = make_terms_trainer(contrastive_weight=1, mim_weight=1, num_epochs=3, **rising)
    original, masked, back = example_images(trainer.model, make_data(9), trainer.config)
    assert not torch.equal(original, masked) and not torch.equal(original, back)
