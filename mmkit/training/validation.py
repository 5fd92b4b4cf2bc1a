"""What a run is judged by: the whole validation set as one pool, and what is put back of it.

Contrast sees everything; pixels and words are hidden as in training, by masks that are the same at
each validation (but "attentive" ones, which go by the model that is validated).
Walk-through: notebooks/03_training.ipynb, 07_reconstruction.
"""

from typing import Any

from ..config import TrainingConfig
from ..data.dataset import MultimodalDataset
from ..evaluation.reconstruction import evaluate_reconstruction
from ..evaluation.retrieval import embed, score
from ..masking.plan import validation_masks
from ..models.encoder import MultimodalEncoder


def validate(
    model: MultimodalEncoder, dataset: MultimodalDataset, config: TrainingConfig
) -> dict[str, Any]:
    """The record of a validation.

    "loss" is the sum of the terms, each with its full weight whatever the schedules say, so that
    the epochs of a run can be compared; Recall@K where there is contrast; what
    `evaluate_reconstruction` gives where something is put back.
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
        for term in config.terms:  # in their order: a sum of floats goes by it
            if term != "contrastive":
                record["loss"] += getattr(config, f"{term}_weight") * found.get(f"{term}_loss", 0)
    return record


def _flat(result: dict) -> dict:
    """{"image_to_text": {1: x}} -> {"image_to_text_R@1": x}."""
    flat = {"loss": result["loss"]}
    for way in ("image_to_text", "text_to_image"):
        flat |= {f"{way}_R@{k}": value for k, value in result[way].items()}
    return flat
