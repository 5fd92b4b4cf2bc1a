"""The prediction of a trainer's next step."""

from mmkit import cost


def predicted(trainer) -> cost.Prediction:
    """By the caption lengths of its first batch."""
    valid = trainer.first_batch().valid
    lengths = dict(caption_length=valid.sum(1).float().mean().item())
    return cost.predict(trainer.config, trainer.model, longest_caption=valid.shape[1], **lengths)
