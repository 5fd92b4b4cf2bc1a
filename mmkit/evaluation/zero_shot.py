"""Classes and words told by text alone: zero-shot classification, patches beside words.

Walk-through: notebooks/04_retrieval.ipynb.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..losses import similarity
from ..models.encoder import MultimodalEncoder
from .retrieval import Features, embed_texts


def zero_shot(
    model: MultimodalEncoder, features: Features, prompts: Mapping[str, str | Sequence[str]]
) -> tuple[Tensor, Tensor]:
    """Classify pictures by texts alone: each class is the mean of its prompts' features.

    A class of one prompt may give it as it is. Returns the winning class's number (N,) in the order
    of `prompts`, and all cosines (N, classes). Raises ValueError for a class without a prompt.
    """
    if not isinstance(prompts, Mapping) or not prompts:
        raise ValueError(f"prompts={prompts!r}: give a dict, {{class: its prompts}}")
    lists = [[texts] if isinstance(texts, str) else list(texts) for texts in prompts.values()]
    means = [embed_texts(model, texts).mean(0) for texts in lists]
    classes = torch.nn.functional.normalize(torch.stack(means), dim=-1)
    scores = similarity(features.image_features, classes)
    return scores.argmax(1), scores
