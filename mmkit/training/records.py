"""What a training run records and prints about a step and an epoch.

Walk-through: notebooks/03_training.ipynb.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from ..device import in_float64
from ..distributed import all_reduce_sum
from ..masking.text import maskable_tokens


def as_json(value: Any) -> Any:
    """The value, or None for a float that JSON cannot express."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def step_record(
    trainer, batch: Batch, loss: Tensor, norm: float, steps_per_second: float, waited: float
) -> dict[str, Any]:
    """The record of the last step, over all processes.

    Args:
        trainer: a MaskedMultimodalTrainer after the step.
        batch: this process's part of the batch.
        loss: this process's part of the loss.
        norm: norm of the gradient before clipping.
        steps_per_second: since the last record.
        waited: fraction of the time spent waiting for data, since the last record.
    Returns:
        Plain values by name.
    """
    model = trainer.model
    maskable = maskable_tokens(batch.input_ids, batch.valid, model.special_ids).sum()
    masked = [
        sum(float(drawn[i].mask.sum()) for drawn in trainer.drawn if drawn[i] is not None)
        for i in (0, 1)
    ]
    sums = [float(loss), *masked, len(batch) * model.num_patches, float(maskable)]
    where = trainer.device if trainer.processes > 1 else "cpu"  # nothing else needs the device
    total, patches_masked, tokens_masked, patches, tokens = all_reduce_sum(
        torch.tensor(sums, dtype=torch.float64, device=where)
    ).tolist()
    return {
        "loss": total,
        **_terms_in_all(trainer),
        "learning_rate": trainer.optimizers[-1].param_groups[0]["lr"],
        "logit_scale": model.logit_scale.item(),
        "image_mask_ratio": patches_masked / patches,
        "text_mask_ratio": tokens_masked / max(1, tokens),
        "grad_norm": norm,
        "skipped_steps": trainer.skipped,
        "samples_per_second": steps_per_second * len(trainer.train) / trainer.steps_per_epoch,
        "waiting_for_data": waited,
    }


def _terms_in_all(trainer) -> dict[str, float]:
    """Each term of the last step, unweighted, over all processes; {} for contrast alone."""
    terms = sorted(trainer.terms)
    if trainer.config.terms == ["contrastive"] or not terms:
        return {}
    total = all_reduce_sum(in_float64(torch.stack([trainer.terms[term] for term in terms])))
    return {f"{term}_loss": x for term, x in zip(terms, total.tolist(), strict=True)}


def likely_cause(model, scaler, batch: Batch) -> str:
    """A message: why no gradient is finite, and what to do."""
    pixels = batch.pixel_values.flatten(1)
    bad = ~torch.isfinite(pixels).all(1) if pixels.is_floating_point() else None
    if bad is not None and bad.any():
        ids = ", ".join(str(int(i)) for i in batch.sample_ids[bad][:5])
        return f"an image has values that are not finite (sample ids {ids}): check the transform"
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the weights were not finite from the start ({name}): take another model"
    if scaler.is_enabled() and scaler.get_scale() < 1:
        return (
            f"fp16 overflows even at a loss scale of {scaler.get_scale():.0e}: take "
            "mixed_precision='bf16' or 'no'"
        )
    return (
        "the learning rate is too high: lower learning_rate, raise warmup_steps, or try "
        "mixed_precision='no'"
    )


def epoch_text(trainer, epoch: int, record: dict, better: bool) -> str:
    """The line that is printed at the end of an epoch."""
    text, train_loss = f"epoch {epoch + 1:3d}/{trainer.num_epochs}  ", record["train_loss"]
    text += "no step applied" if train_loss is None else f"train loss {train_loss:.3f}"
    if trainer.val is not None:
        text += f"  val loss {record['loss']:.3f}"
    if "image_to_text_R@1" in record:
        recalls = [record[f"{way}_R@1"] for way in ("image_to_text", "text_to_image")]
        text += f"  R@1 {50 * sum(recalls):5.1f} %"
    if "pixel_error" in record:
        text += f"  pixel error {record['pixel_error']:.4f}"
    for term in ("mlm", "itm"):
        if f"{term}_accuracy" in record:
            text += f"  {term} {100 * record[f'{term}_accuracy']:4.1f} %"
    waited = f"  waited for data {100 * trainer.epoch_waited:.1f} %"
    return f"{text}  {trainer.seconds:6.1f} s{waited}{'  best' if better else ''}"
