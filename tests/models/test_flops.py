"""Operations are those that torch counts, product by product."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.cost.predicted import predicted


def counted(trainer) -> int:
    """Operations of a whole training step as torch counts them, product by product."""
    batch, threads = trainer.first_batch(), torch.get_num_threads()
    torch.set_num_threads(1)  # the counter sees only its own thread
    try:
        with FlopCounterMode(display=False) as counter:
            trainer.train_step(batch, 0)
    finally:
        torch.set_num_threads(threads)
    return counter.get_total_flops()


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
def test_operations_are_those_that_torch_counts(trainer_of, ratio, micro_batches):
    """Nothing, half and most masked; all micro-batches but the last go forward twice."""
    trainer = trainer_of(image_mask_ratio=ratio, gradient_accumulation_steps=micro_batches)
    expected = counted(trainer)
    prediction = predicted(trainer)
    assert prediction.flops == pytest.approx(expected, rel=1e-6 if micro_batches == 1 else 0.02)


@pytest.mark.parametrize(
    ("settings", "within"),
    [
        (dict(loss="sigmoid"), 1e-6),
        (dict(optimizer="adamw"), 1e-6),
        (dict(accumulation="naive", gradient_accumulation_steps=3), 1e-4),
        (dict(image_mask_mode="replace"), 1e-6),
        (
            dict(text_mask_ratio=0.3, text_mask_mode="drop"),
            0.02,
        ),  # masked tokens are rounded
        (dict(image_mask="attentive"), 0.04),  # 9 patches have no half resolution
        (dict(gradient_checkpointing=True), 0.02),
        (dict(mim_weight=1.0, cross_modal=True), 0.02),
        (dict(text_mask_ratio=0.3, mlm_weight=1.0), 0.04),
        (dict(mim_weight=1.0, contrastive_view="unmasked"), 0.02),
    ],
    ids=str,
)
def test_operations_of_every_kind_of_step(trainer_of, settings, within):
    trainer = trainer_of(**settings)
    expected = counted(trainer)
    prediction = predicted(trainer)
    assert prediction.flops == pytest.approx(expected, rel=within)
