"""What the terms of the loss need: heads of the model, and steps in which they can learn.

Walk-through: notebooks/07_reconstruction.ipynb.
"""

import functools

from ..config import TrainingConfig
from ..masking.plan import MaskPlan
from ..models.encoder import MultimodalEncoder
from ..objective import HEADS

PREDICTED = (("mim", "image"), ("mlm", "text"))  # terms that predict what was masked, and of what


def prepare_heads(model: MultimodalEncoder, config: TrainingConfig) -> None:
    """Give the model the heads that the terms need; ValueError if its own do not fit."""
    decoder = model.decoder
    needed = {head: bool(getattr(config, f"{term}_weight")) for term, head in HEADS.items()}
    if not any(needed.values()):
        return
    if decoder is None:
        depth, across = config.decoder_depth, config.cross_modal
        model.add_decoder(
            **needed,
            across=across,
            width=config.decoder_width,
            pixel_depth=depth if across or config.image_mask_mode == "drop" else 0,
            word_depth=depth if across or config.text_mask_mode == "drop" else 0,
            norm_pix_loss=config.norm_pix_loss,
            dropout=model.dropout,
        )
        return
    missing = [head for head in needed if needed[head] and not decoder.spec[head]]
    if missing:
        raise ValueError(
            f"the model's decoder has no head for {', '.join(missing)}; call "
            "model.add_decoder(...) with all heads, or set model.decoder = None for a new one"
        )
    fields = {"across": "cross_modal"}
    if needed["pixels"]:
        fields["norm_pix_loss"] = "norm_pix_loss"
    for name, option in fields.items():
        wanted = getattr(config, option)
        if decoder.spec[name] != wanted:
            raise ValueError(
                f"{option}={wanted} is not what the model's decoder was built for; give "
                f"{option}={decoder.spec[name]}, or set model.decoder = None for a new one"
            )
    for term, kind in PREDICTED:
        dropped, head = getattr(config, f"{kind}_mask_mode") == "drop", HEADS[term]
        if needed[head] and dropped and not decoder.spec[f"{head[:-1]}_depth"]:
            raise ValueError(
                f"{kind}_mask_mode='drop' needs layers in the model's head for {head}, and it "
                "has none; take 'replace', or set model.decoder = None for a new one"
            )


def check_steps(
    config: TrainingConfig, total_steps: int, steps_per_epoch: int, plan: MaskPlan
) -> list[str]:
    """Evaluate the schedules for all steps of the run; return the terms that never learn.

    Raises ValueError if a schedule leaves its range, or if a step has nothing to learn.
    """
    plan.check_ratios()
    masks, learns = functools.cache(plan.masks), set()
    for step in range(total_steps):
        config.lr_fraction(step, total_steps)  # raises outside [0, 1]
        terms, epoch = set(config.term_weights(step, total_steps)), step // steps_per_epoch
        idle = {term for term, kind in PREDICTED if term in terms and not masks(kind, epoch)}
        learns |= terms - idle
        if not terms - idle:
            masked = " (nothing is masked in it)" if idle else ""
            raise ValueError(
                f"step {step} of {total_steps} has no term to learn from{masked}; change the "
                "terms' schedules, those of the masks, or unmasked_epochs"
            )
    return [term for term in config.terms if term not in learns]
