"""The README of a shared model: what it is, what it was trained on, how to load it.

It is written from the model itself and what is known of its training (`Run.metadata`).
Walk-through: notebooks/05_checkpoints.ipynb.
"""

import json

from ..data.openmoji.images import ATTRIBUTION
from ..older_names import current_keys

# What a hub reads in a card, for its search and for the button that says how to load the model.
_HEADER = """---
library_name: mmkit
pipeline_tag: zero-shot-image-classification
tags:
- mmkit
- image-text-retrieval
- masked-training
---
"""
# fields of TrainingConfig that a card names, in this order
_CHOICES = (
    "num_epochs max_steps batch_size optimizer learning_rate loss image_mask image_mask_ratio "
    "image_mask_mode image_mask_schedule image_mask_final_ratio text_mask text_mask_ratio "
    "text_mask_mode text_mask_schedule text_mask_final_ratio contrastive_weight mim_weight "
    "mlm_weight itm_weight contrastive_view cross_modal pixel_error norm_pix_loss "
    "unmasked_epochs ema_decay seed"
).split()


def training_metadata(metadata: dict | None) -> dict:
    """What a card and config.json keep of a checkpoint or `Run.metadata`: plain values, no paths.

    Keys, each only if known: "data" (name of the data set), "config" (settings), "epoch" (from 0),
    "best" (the validation record for which the weights were saved).
    """
    metadata = metadata or {}
    config, data = current_keys(metadata.get("config") or {}), metadata.get("data") or {}
    known = {
        "data": data.get("name") if isinstance(data, dict) else data,
        "config": {name: config[name] for name in _CHOICES if config.get(name) is not None},
        "epoch": metadata.get("epoch"),
        "best": {k: v for k, v in (metadata.get("best") or {}).items() if k != "path"},
    }
    return json.loads(json.dumps({k: v for k, v in known.items() if v not in (None, "", {})}))


def model_card(model, name: str, training: dict) -> str:
    """The text of README.md. name: the name that `from_pretrained` is called with."""
    parts = [
        f"{_HEADER}\n# {name}",
        "A ViT and a BERT that share one space for images and texts, trained with mmkit. The "
        "cosine of two\nunit-length features says how well an image and a text go together.",
        f"## Load it\n\n{_example(model, name)}",
        f"## What it is\n\n{_sizes(model)}",
        f"## What it learned from\n\n{_training(training)}",
        f"## Files\n\n{_FILES}",
        f"## Licences\n\n{_licences(training)}",
    ]
    return "\n\n".join(parts) + "\n"


def _example(model, name: str) -> str:
    return (
        "```python\n"
        "import mmkit as mm\n\n"
        f'model = mm.MultimodalEncoder.from_pretrained("{name}")\n'
        f'mm.embed_texts(model, ["a red house"])  # features (1, {model.embed_dim})\n'
        "```\n\n"
        "`model.encode_image` takes uint8 images (B, 3, "
        f"{model.image_size}, {model.image_size}); `mm.zero_shot`, `mm.Index` and `mm.evaluate` "
        "take the model as it is."
    )


def _sizes(model) -> str:
    vit, bert = model.vit.config, model.bert.config
    count = sum(parameter.numel() for parameter in model.parameters())
    pooling = {"mean": "mean of all tokens", "cls": "the first token"}[model.pooling]
    rows = {
        "image": f"{model.image_size} x {model.image_size} pixels, patches of "
        f"{model.patch_size}: {model.num_patches}",
        "ViT": _tower(vit),
        "BERT": f"{_tower(bert)}; captions of up to {model.max_length} tokens, "
        f"{len(model.tokenizer):,} known in all",
        "common space": f"{model.embed_dim} numbers",
        "pooling": pooling,
        "parameters": f"{count:,}",
    }
    return _table(rows)


def _tower(config) -> str:
    return (
        f"width {config.hidden_size}, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} heads"
    )


def _training(training: dict) -> str:
    """Tables of what is known, or a sentence that nothing is."""
    if not training:
        return "Nothing was recorded with this model."
    rows = {"data": training["data"]} if "data" in training else {}
    rows |= {f"`{name}`": value for name, value in training.get("config", {}).items()}
    if "epoch" in training:
        rows["weights of epoch"] = training["epoch"] + 1
    best = training.get("best", {})
    for way in ("image_to_text", "text_to_image"):
        if (recall := best.get(f"{way}_R@1")) is not None:
            rows[f"{way.replace('_', ' ')} R@1, validation"] = f"{100 * recall:.1f} %"
    return (
        _table(rows)
        + "\n\nPatches and tokens are masked in training only, not when the model encodes."
    )


def _table(rows: dict) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


_FILES = """- `model.safetensors`: `vit.*` are the tensors of transformers' `ViTModel` and `bert.*`
  those of `BertModel` (both with `add_pooling_layer=False`); `image_projection.*` and
  `text_projection.*` a layer norm (`0`) and a matrix without bias (`2`) into the common space;
  `image_mask_token` and `text_mask_token` replace masked tokens; `logit_scale` is the log of the
  inverse temperature, `logit_bias` that of the sigmoid loss; `pixel_stats` the mean and deviation
  of each channel, of pixels in [0, 1]; `decoder.*`, if present, reconstructs what is masked.
- `config.json`: under `architecture`, `vit` and `bert` are what `ViTConfig` and `BertConfig` take.
- `tokenizer.json`, `tokenizer_config.json`: a fast tokenizer, for `tokenizers` and transformers.

None of them can hold code."""


def _licences(training: dict) -> str:
    text = "The code, mmkit, is under the MIT licence."
    if str(training.get("data", "")).startswith("openmoji"):
        text += f"\n\nThe training images are OpenMoji's, CC BY-SA 4.0: {ATTRIBUTION}"
    return text
