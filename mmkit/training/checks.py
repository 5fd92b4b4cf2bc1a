"""What a training is refused for before it starts, in words.

Walk-through: notebooks/03_training.ipynb.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

from ..config import TrainingConfig
from ..errors import nearest
from ..masking.draw import find_masker
from ..masking.image import IMAGE_MASKERS
from ..masking.text import TEXT_MASKERS
from ..models.encoder import PRESETS, MultimodalEncoder


def check_arguments(config: Any, model: Any = None, callbacks: Any = (), resume: Any = False):
    """ValueError for an argument of another kind than `train_model` takes, or an unknown name."""
    if not isinstance(config, TrainingConfig):
        hint = "TrainingConfig(**config)" if isinstance(config, dict) else "TrainingConfig(...)"
        raise ValueError(f"config is a {type(config).__name__}; give mm.{hint}")
    if not (model is None or isinstance(model, MultimodalEncoder)):
        remedy = "give a mm.MultimodalEncoder, or None for a new one of config.preset"
        if isinstance(model, str | os.PathLike):
            remedy = f"give what mm.load({str(model)!r}) returns"
        elif isinstance(getattr(model, "module", None), MultimodalEncoder):
            remedy = "give model.module: the trainer wraps it itself"
        raise ValueError(f"model is a {type(model).__name__}; {remedy}")
    if not (isinstance(callbacks, Sequence) and all(map(callable, callbacks))):
        raise ValueError(f"callbacks={callbacks!r} must be a list of functions f(trainer, record)")
    if not (resume is None or isinstance(resume, bool | str | os.PathLike)):
        folder = "its path" if hasattr(resume, "path") else "a run's folder"
        raise ValueError(f"resume is of type {type(resume).__name__}; give True, False or {folder}")
    given = model is not None and config.preset == "own"  # as the files of a run record it
    if not given and config.preset not in PRESETS:
        raise ValueError(
            f"preset={config.preset!r} is not known; {nearest(config.preset, PRESETS)}"
        )
    find_masker(config.image_mask, IMAGE_MASKERS)
    find_masker(config.text_mask, TEXT_MASKERS)


def check_batches(config: TrainingConfig, count: int, processes: int):
    """ValueError where a batch of an epoch of so many images cannot be cut, or has no negatives.

    A true pair without a wrong one beside it has loss 0 and no gradient.
    """
    cut = config.gradient_accumulation_steps
    smallest = _smallest(count, config.batch_size)
    if smallest < processes * cut:
        raise ValueError(
            f"batches of {smallest} pairs cannot be cut for {processes} processes and "
            f"{cut} micro-batches; take a larger batch_size"
        )
    parts = {  # into how many a batch is cut, each of which a term sees by itself
        "contrastive": 1 if config.accumulation == "exact" else cut,
        "matching": processes * cut,
    }
    for term in filter(parts.get, config.terms):
        if smallest < 2 * parts[term]:
            sizes = range(config.batch_size + 1, count + 1)
            enough = [size for size in sizes if _smallest(count, size) >= 2 * parts[term]]
            remedy = f"batch_size={enough[0]}" if enough else "more images"
            remedy += ", or fewer micro-batches" if parts[term] > 1 else ""
            raise ValueError(
                f"batch_size={config.batch_size} leaves {term} a single pair at a time ({count} "
                f"images, micro-batches: {cut}, processes: {processes}): without a wrong pair "
                f"beside it there is nothing to learn; take {remedy}"
            )


def _smallest(count: int, batch_size: int) -> int:
    """The smallest batch of an epoch: all are of nearly equal size."""
    return count // math.ceil(count / batch_size)
