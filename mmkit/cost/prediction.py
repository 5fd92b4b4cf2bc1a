"""What a step will take, counted from its configuration before it runs: operations and bytes.

Operations as in models/flops.py. What the backward pass keeps, and how long a step takes, depends
on kernels and machine: `cost.measure_step` measures it. Walk-through: notebooks/09_speed.ipynb.
"""

from dataclasses import dataclass

import torch

from ..config import TrainingConfig
from ..data.openmoji.names import names
from ..data.tokenizer import train_wordpiece
from ..masking.image import ATTENTION_MASKERS, IMAGE_MASKERS
from ..masking.plan import find_masker
from ..models.encoder import MultimodalEncoder
from ..models.flops import logit_flops, muon_flops, objective_flops, tower_flops
from ..training.optim import parameter_groups
from ..training.terms import prepare_heads

_SPECIAL = 2  # tokens of a caption that are never masked: its first and its last


@dataclass
class Prediction:
    """What one optimizer step takes: FLOPs, and bytes of one process."""

    flops_per_pair: float  # forward, backward and replays of one pair, with its row of logits
    flops: float  # of the step, all processes together, Muon's products among them
    weights: float
    gradients: float
    optimizer_state: float  # AdamW keeps two numbers per weight, Muon one, shared over processes
    exchanged: float  # received from other processes: gradients, features, Muon's new weights


def predict(
    config: TrainingConfig,
    model_or_preset: MultimodalEncoder | str,
    *,
    caption_length: float,
    longest_caption: float | None = None,
    processes: int = 1,
) -> Prediction:
    """Count operations, bytes of weights and optimizer, and bytes exchanged of an optimizer step.

    Assumes that nothing is frozen, that unmasked epochs are left out, that a changing ratio is at
    the mean of its ends, that a user's optimizer is as large as AdamW, and float32 weights.

    Args:
        config: of the run.
        model_or_preset: an encoder, or "tiny", "small", "base" with the built-in vocabulary.
        caption_length: mean number of valid tokens, both ends included.
        longest_caption: tokens to which attention is padded; None = all captions are equally long.
        processes: number of processes that share `config.batch_size`.
    Returns:
        The `Prediction`.
    Raises:
        ValueError: unknown preset, captions longer than the model reads, or "layers", whose ratio
            is not known before.
    """
    model = _with_heads(config, model_or_preset)
    _check(config, model, caption_length, longest_caption)
    image, text = _ratio(config, "image"), _ratio(config, "text")
    patches, tokens = float(model.num_patches), caption_length
    padded = longest_caption or caption_length
    if config.image_mask_mode == "drop":
        patches = max(1.0, round(patches * (1 - image)))
    if config.text_mask_mode == "drop":
        tokens, padded = (n - text * max(0.0, n - _SPECIAL) for n in (tokens, padded))
    whole = (model.num_patches, caption_length)
    flops = objective_flops(config, model, (patches, tokens), whole, padded)
    if config.image_mask in ATTENTION_MASKERS and image:
        flops += tower_flops(model.vit.config, whole[0] / 4 + 1)  # at half the resolution
    if "contrastive" in config.terms:
        exact = config.accumulation == "exact"
        candidates = config.batch_size / (1 if exact else config.gradient_accumulation_steps)
        again = config.exchange == "neighbours"
        flops += logit_flops(config, model.embed_dim, candidates, again)
    if "mlm" in config.terms:
        assert model.decoder is not None and model.decoder.word_head is not None
        head = model.bert.embeddings.word_embeddings.weight.numel()
        head += model.decoder.word_head.dense.weight.numel()
        flops += 3 * 2 * text * max(0.0, caption_length - _SPECIAL) * head
    muon = config.optimizer == "muon"
    matrices = list(parameter_groups(model)["matrices"].values()) if muon else []
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    of_muon = sum(p.numel() for p in matrices)
    return Prediction(
        flops_per_pair=flops,
        flops=config.batch_size * flops + sum(muon_flops(*p.shape) for p in matrices),
        weights=4.0 * sum(p.numel() for p in model.parameters()),
        gradients=4.0 * learning,
        optimizer_state=8.0 * (learning - of_muon) + 4.0 * of_muon / processes,
        exchanged=_exchanged(config, model.embed_dim, 4.0 * learning, 4.0 * of_muon, processes),
    )


def _exchanged(
    config: TrainingConfig, embed_dim: int, gradients: float, matrices: float, processes: int
) -> float:
    """Bytes that a process receives in a step.

    A gradient is summed in a ring: 2 (W - 1) / W of its size. Features are sent once and their
    gradients return: hop by hop in a ring of neighbours, or else gathered and summed. With Muon,
    each process sends the new weights of its matrices to all others.
    """
    fraction = (processes - 1) / processes
    features, caption_ids = 4.0 * config.batch_size * embed_dim, 8 * config.batch_size
    sent = 2 * gradients + matrices + caption_ids
    if "contrastive" in config.terms:
        gathered = 6 if config.loss == "info_nce" else 4  # "sigmoid": no gradient at the images
        sent += (2 if config.exchange == "neighbours" else gathered) * features
    return fraction * sent


def _with_heads(config: TrainingConfig, model_or_preset) -> MultimodalEncoder:
    """The model with the heads that the terms need; a preset, and heads, without any memory."""
    with torch.device("meta"):
        if isinstance(model_or_preset, str):
            tokenizer = train_wordpiece(list(names("en").values()))
            model = MultimodalEncoder.preset(model_or_preset, tokenizer=tokenizer)
        else:
            model = model_or_preset
        if model.decoder is not None or not {"mim", "mlm", "itm"}.intersection(config.terms):
            return model
        twin = MultimodalEncoder.from_architecture(model.architecture())
        prepare_heads(twin, config)
        return twin


def _check(config: TrainingConfig, model: MultimodalEncoder, length: float, longest: float | None):
    find_masker(config.image_mask, IMAGE_MASKERS)
    if config.image_mask == "layers":
        raise ValueError(
            "image_mask='layers' masks what the images say, not a ratio that is known before; "
            "read it from a trainer: mm.describe(trainer)"
        )
    if not 1 <= length <= (longest or length) <= model.max_length:
        raise ValueError(
            f"captions of {length:g} tokens, at most {longest or length:g}, are not what the "
            f"encoder takes; give 1 to {model.max_length}, and the longest not below the mean"
        )


def _ratio(config: TrainingConfig, kind: str) -> float:
    """The ratio that is masked; the mean of its ends where it changes."""
    if kind == "image" and isinstance(config.painted_mask, list):
        masked = [x for row in config.painted_mask for x in row]
        return sum(masked) / len(masked)
    ends = [getattr(config, f"{kind}_mask_{which}") for which in ("ratio", "final_ratio")]
    ends = [end for end in ends if end is not None]
    return sum(ends) / len(ends)
