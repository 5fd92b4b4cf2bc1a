"""An encoder's architecture as plain values, and the encoder that they describe.

Walk-through: notebooks/05_checkpoints.ipynb.
"""

import json
import math
from typing import Any

import torch

from ..data.tokenizer import tokenizer_from_state, tokenizer_state
from .layers import dropouts
from .presets import PRESETS


def architecture_of(model: Any) -> dict:
    """What `build` needs to build the same encoder: plain values only."""
    frequency = model.token_frequency
    return {
        "vit": _plain(model.vit.config),
        "bert": _plain(model.bert.config),
        "embed_dim": model.embed_dim,
        "dropout": model.dropout,
        "pooling": model.pooling,
        "tokenizer": tokenizer_state(model.tokenizer),
        **({} if model.loss == "info_nce" else {"loss": model.loss}),
        **({} if frequency is None else {"token_frequency": frequency.tolist()}),
        **({} if model.decoder is None else {"decoder": model.decoder.spec}),
    }


def build(model_class: Any, spec: dict):
    """The encoder of an architecture; its weights are loaded later."""
    from transformers import BertConfig, ViTConfig

    spec = dict(spec)
    heads, frequency = spec.pop("decoder", None), spec.pop("token_frequency", None)
    vit = ViTConfig(**_known(ViTConfig, spec.pop("vit")))
    bert = BertConfig(**_known(BertConfig, spec.pop("bert")))
    with torch.random.fork_rng(devices=[]):  # the initial weights, soon replaced, use no draws
        model = model_class(vit, bert, tokenizer_from_state(spec.pop("tokenizer")), **spec)
        model.token_frequency = None if frequency is None else torch.tensor(frequency)
        return model if heads is None else model.add_decoder(**heads)


def settings_of(model: Any) -> dict[str, Any]:
    """The fields of `TrainingConfig` that describe a model; see `MultimodalEncoder.settings`."""

    def tower(config) -> tuple[int, int, int]:
        return config.hidden_size, config.num_hidden_layers, config.num_attention_heads

    sizes = dict(image=model.image_size, patch=model.patch_size, vit=tower(model.vit.config))
    sizes |= dict(bert=tower(model.bert.config), length=model.max_length)
    sizes |= dict(embed_dim=model.embed_dim)
    scale = model.logit_scale.item()
    return {
        "preset": next((name for name, size in PRESETS.items() if size == sizes), "own"),
        "dropout": max(dropouts(model)),
        "temperature": round(math.exp(-scale), 6) if math.isfinite(scale) else None,
    }


def _plain(config) -> dict:
    """A transformers config as plain values that differ from the defaults."""
    return json.loads(json.dumps({k: v for k, v in config.to_diff_dict().items() if v is not None}))


def _known(config_class, values: dict) -> dict:
    """The values that the class itself knows, without any others in a file.

    With some of those, transformers would fetch and run code, such as an attention kernel.
    """
    known = config_class().to_dict()
    return {k: v for k, v in values.items() if k in known and "implementation" not in k}
