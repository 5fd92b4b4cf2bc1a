"""Zero-shot classification: classes described by text alone.

Walk-through: notebooks/04_retrieval.ipynb.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..losses import similarity
from ..models.encoder import MultimodalEncoder
from .features import Features, embed_texts


def zero_shot(
    model: MultimodalEncoder, features: Features, prompts: Mapping[str, str | Sequence[str]]
) -> tuple[Tensor, Tensor]:
    """Classify images by text alone: each class is the mean of its prompts' features.

    Args:
        model: the encoder of the prompts.
        features: the N images, from `embed`.
        prompts: class name -> its prompts; a single prompt may be given as it is.
    Returns:
        (N,) int64, the predicted class by its position in `prompts`, and all cosines
        (N, classes) float32.
    Raises:
        ValueError: there are no classes, or a class has no prompt or an empty one.
    Example:
        >>> classes, scores = mm.zero_shot(
        ...     model, mm.embed(model, data), {"cat": ["a cat", "old cat"], "boat": "a boat"})
        >>> classes.shape, scores.shape
        (torch.Size([23]), torch.Size([23, 2]))
    """
    if not isinstance(prompts, Mapping) or not prompts:
        raise ValueError(f"prompts={prompts!r}: give a dict, {{class: its prompts}}")
    lists = [[texts] if isinstance(texts, str) else list(texts) for texts in prompts.values()]
    means = [embed_texts(model, texts).mean(0) for texts in lists]
    classes = torch.nn.functional.normalize(torch.stack(means), dim=-1)
    scores = similarity(features.image_features, classes)
    return scores.argmax(1), scores
