"""Checks and preparations before a training run starts.

Walk-through: notebooks/03_training.ipynb.
"""

import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import TrainingConfig
from ..data.dataset import MultimodalDataset
from ..errors import nearest
from ..losses import check_loss
from ..masking.image import IMAGE_MASKERS
from ..masking.plan import find_masker
from ..masking.text import TEXT_MASKERS
from ..models.encoder import MultimodalEncoder
from ..models.presets import PRESETS
from .run import newest_run


def check_arguments(config: Any, model: Any = None, callbacks: Any = (), resume: Any = False):
    """Check types and names of the arguments of `train_model`; ValueError where one is wrong."""
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
    check_loss(config.loss)


def check_batches(config: TrainingConfig, count: int, processes: int):
    """Check the batches of an epoch of `count` images; ValueError where one has no negatives.

    A matching pair without a mismatched one has loss 0 and no gradient. ValueError also where a
    batch is too small for the processes and micro-batches.
    """
    cut = config.gradient_accumulation_steps
    smallest = _smallest(count, config.batch_size)
    if smallest < processes * cut:
        raise ValueError(
            f"batches of {smallest} pairs cannot be divided among {processes} processes and "
            f"{cut} micro-batches; take a larger batch_size"
        )
    parts = {  # number of parts of a batch, in each of which the term has its own negatives
        "contrastive": 1 if config.accumulation == "exact" else cut,
        "itm": processes * cut,
    }
    for term in filter(parts.get, config.terms):
        if smallest < 2 * parts[term]:
            sizes = range(config.batch_size + 1, count + 1)
            enough = [size for size in sizes if _smallest(count, size) >= 2 * parts[term]]
            remedy = f"batch_size={enough[0]}" if enough else "more images"
            remedy += ", or fewer micro-batches" if parts[term] > 1 else ""
            raise ValueError(
                f"batch_size={config.batch_size} leaves {term} a single pair at a time ({count} "
                f"images, micro-batches: {cut}, processes: {processes}): without a mismatched pair "
                f"there is nothing to learn; take {remedy}"
            )


def _smallest(count: int, batch_size: int) -> int:
    """The smallest batch of an epoch: all are of nearly equal size."""
    return count // math.ceil(count / batch_size)


def check_sets(config: TrainingConfig, train: MultimodalDataset, val: MultimodalDataset | None):
    """Check the data against the configuration; ValueError where they do not fit."""
    if config.batch_size > len(train):
        raise ValueError(
            f"batch_size={config.batch_size} is larger than the training set ({len(train)} "
            f"images); take at most {len(train)}"
        )
    check_maskers(config, train, val)
    check_restarts(config)


def float32_model(
    config: TrainingConfig, model: MultimodalEncoder | None, tokenizer
) -> MultimodalEncoder:
    """The given model, or a new one of the preset; ValueError unless its weights are float32."""
    if model is None:
        return MultimodalEncoder.preset(
            config.preset,
            tokenizer=tokenizer,
            dropout=config.dropout,
            temperature=config.temperature,
        )
    if odd := {p.dtype for p in model.parameters()} - {torch.float32}:
        raise ValueError(
            f"the model has weights of type {', '.join(map(str, odd))}; training needs float32 "
            "weights and computes in mixed_precision: call model.float()"
        )
    return model


def encoded_for(model: MultimodalEncoder, data: MultimodalDataset, name: str) -> MultimodalDataset:
    """The data, tokenized for the model; ValueError where it was given another tokenizer."""
    ours, theirs = model.tokenizer, data.tokenizer
    if data.given_tokenizer and theirs is not ours and theirs.get_vocab() != ours.get_vocab():
        raise ValueError(
            f"the {name} set was given another tokenizer than the model has; build both "
            "with the same one (tokenizer=model.tokenizer)"
        )
    return data.encoded_by(ours, model.max_length)


def prepare_layers(model: MultimodalEncoder, config: TrainingConfig, device: torch.device):
    """Turn on gradient checkpointing and compilation of the layers where they are asked for.

    Raises RuntimeError where compile=True finds no C++ compiler on a CPU.
    """
    if config.gradient_checkpointing:
        for tower in (model.vit, model.bert):
            tower.config.use_cache = False  # else transformers warns
            # Newer versions of transformers warn about the older name.
            older = tower.gradient_checkpointing_enable
            enable = getattr(tower, "activation_checkpointing_enable", older)
            enable({"use_reentrant": False})
    if config.compile:
        compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
        if device.type == "cpu" and not any(map(shutil.which, compilers)):
            raise RuntimeError(
                "compile=True needs a C++ compiler on a CPU and there is none; install g++, or "
                "train with compile=False"
            )
        for block in (*model.vit.layers, *model.bert.encoder.layer):
            block.compile()


def run_name(config: TrainingConfig, resume: bool, processes: int) -> str:
    """The name of the run's folder: the configured one, the newest run's, or date and time."""
    name, root = config.run_name, Path(config.output_dir).expanduser()
    if not name and resume:
        name = newest_run(root)
    if not name:
        name, number = time.strftime("%Y%m%d-%H%M%S"), 1
        while (root / name).exists():
            number += 1
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{number}"
    if processes > 1:  # the clocks of two processes differ
        from accelerate.utils import broadcast_object_list

        name = broadcast_object_list([name])[0]
    return name


def max_restarts() -> int:
    """The number of times torchrun may restart its workers (--max-restarts); 0 without torchrun."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def check_restarts(config: TrainingConfig):
    """Check that restarted workers could resume the run; ValueError where they could not."""
    if max_restarts() and not config.run_name:
        raise ValueError(
            "run_name='' is the time of the start, which workers that torchrun restarts cannot "
            "know; give a run_name, or no --max-restarts"
        )
    # They would find the keys of the dead workers in the store and wait for these
    # (https://github.com/pytorch/pytorch/issues/135712).
    if max_restarts() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"--max-restarts={max_restarts()} with the store that torchrun keeps over restarts: "
            "restarted workers would hang in it; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
            "before torchrun (docs/cluster.md), or give no --max-restarts"
        )


def check_maskers(
    config: TrainingConfig, train: MultimodalDataset, val: MultimodalDataset | None = None
):
    """Check that the images have what the masker needs; ValueError where they have not."""
    masked = [train] if val is None or "mim" not in config.terms else [train, val]
    if config.image_mask == "layers" and any(data.layers is None for data in masked):
        raise ValueError(
            "image_mask='layers' needs drawings with layers, and these images have none; "
            "use the built-in ones (mm.openmoji), or another of "
            f"{', '.join(name for name in IMAGE_MASKERS if name != 'layers')}"
        )
