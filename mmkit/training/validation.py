"""Validation of a run: retrieval from the whole validation set, and reconstruction.

For the contrastive term nothing is masked. Pixels and tokens are masked as in training, with the
same masks at each validation (except "attentive" ones, which depend on the validated model).
Walk-through: notebooks/03_training.ipynb, 07_reconstruction.
"""

from typing import Any

from ..config import TrainingConfig
from ..data.dataset import MultimodalDataset
from ..evaluation.features import embed
from ..evaluation.reconstruction import evaluate_reconstruction
from ..evaluation.retrieval import score
from ..masking.plan import validation_masks
from ..models.encoder import MultimodalEncoder


def validate(
    model: MultimodalEncoder, dataset: MultimodalDataset, config: TrainingConfig
) -> dict[str, Any]:
    """Validate a model and return the record.

    Args:
        model: the encoder, with its decoder where a term needs one.
        dataset: the validation set.
        config: the terms, their weights and the masks.
    Returns:
        "loss", the sum of the terms, each with its full weight whatever the schedules say, so that
        the epochs of a run can be compared; Recall@K where there is a contrastive term; and the
        result of `evaluate_reconstruction` where something is reconstructed.
    """
    record: dict[str, Any] = {"loss": 0.0}
    if "contrastive" in config.terms:
        features = embed(model, dataset, mixed_precision=config.mixed_precision)
        found = _flat(score(model, features, config.loss))
        record |= found | {"loss": config.contrastive_weight * found["loss"]}
        if len(config.terms) > 1:
            record["contrastive_loss"] = found["loss"]
    if set(config.terms) - {"contrastive"}:
        masks: dict[str, Any] = validation_masks(config)
        found = evaluate_reconstruction(
            model,
            dataset,
            **masks,
            view=config.contrastive_view,
            image_mode=config.image_mask_mode,
            text_mode=config.text_mask_mode,
            seed=config.seed,
            mixed_precision=config.mixed_precision,
            pixel_error=config.pixel_error,
        )
        record |= found
        for term in config.terms:  # in this order: a sum of floats depends on it
            if term != "contrastive":
                record["loss"] += getattr(config, f"{term}_weight") * found.get(f"{term}_loss", 0)
    return record


def _flat(result: dict) -> dict:
    """{"image_to_text": {1: x}} -> {"image_to_text_R@1": x}."""
    flat = {"loss": result["loss"]}
    for way in ("image_to_text", "text_to_image"):
        flat |= {f"{way}_R@{k}": value for k, value in result[way].items()}
    return flat
