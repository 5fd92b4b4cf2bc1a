"""Encoders of preset sizes, with new weights.

Walk-through: notebooks/03_training.ipynb.
"""

from typing import Any

import torch

from ..errors import nearest

# image side and patch in pixels; width, depth, heads of each tower; text length; common space
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(image=64, patch=8, vit=(192, 6, 3), bert=(192, 4, 3), length=32, embed_dim=192),
    "small": dict(
        image=224, patch=16, vit=(384, 12, 6), bert=(384, 6, 6), length=64, embed_dim=256
    ),
    "base": dict(
        image=224, patch=16, vit=(768, 12, 12), bert=(768, 12, 12), length=77, embed_dim=512
    ),
}


def build_preset(
    model_class: Any, name: str, tokenizer, dropout: float, temperature: float, pooling: str
):
    """See `MultimodalEncoder.preset`."""
    from transformers import BertConfig

    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not known; {nearest(name, PRESETS)}")
    size = PRESETS[name]
    vit = _preset_vit(name, dropout)
    vocab = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    tower = _tower(*size["bert"]) | _drop(dropout)
    bert = BertConfig(max_position_embeddings=size["length"], **vocab, **tower)
    width = size["embed_dim"]
    model = model_class(vit, bert, tokenizer, width, dropout, temperature, pooling)
    parts = model.bert.embeddings
    with torch.no_grad():  # what all captions share must not outweigh their differences
        for part in (parts.position_embeddings, parts.token_type_embeddings):
            part.weight.mul_(0.25)
    return model


def new_vit(backbone, dropout: float):
    """The config of a new ViT: a preset's, or a given one; None if backbone is a checkpoint.

    For a folder with the name of a preset, write "./tiny".
    """
    from transformers import ViTConfig

    if isinstance(backbone, ViTConfig):
        return backbone
    return _preset_vit(backbone, dropout) if backbone in PRESETS else None


def _preset_vit(name: str, dropout: float):
    """The ViTConfig of a preset."""
    from transformers import ViTConfig

    size = PRESETS[name]
    sides = dict(image_size=size["image"], patch_size=size["patch"])
    tower = _tower(*size["vit"])
    # The usual 0.02 is for width 768: narrower towers would hardly change their input at first.
    start = dict(initializer_range=tower["hidden_size"] ** -0.5)
    return ViTConfig(**sides, **tower, **start, **_drop(dropout))


def _tower(width: int, depth: int, heads: int) -> dict:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (width, depth, heads, 4 * width), strict=True))


def _drop(dropout: float) -> dict:
    return dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
