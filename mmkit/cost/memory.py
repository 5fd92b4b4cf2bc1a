"""Bytes of a step, counted before it runs: kept for the backward pass, and sent between processes.

What a layer keeps is what layers.py lets autograd keep; transformers' own layers on a GPU differ in
attention, whose fused kernels keep no attention weights. Shapes: B batch, K encoded tokens, D
width, W processes. Walk-through: notebooks/09_speed.ipynb.
"""

from typing import NamedTuple

import torch

from ..config import TrainingConfig
from ..device import pick_precision
from ..models.encoder import MultimodalEncoder


class Numbers(NamedTuple):
    """The number format of a device."""

    size: int  # bytes of a number in matrix products: 2 or 4
    cpu: bool  # computed by layers.py, not by fused kernels


def numbers_of(config: TrainingConfig, device: torch.device) -> Numbers:
    """The numbers of a run's precision; a missing GPU is assumed to have bf16 or fp16."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return Numbers(4 if config.mixed_precision == "no" else 2, False)
    size = 2 if pick_precision(config.mixed_precision, device) else 4
    return Numbers(size, device.type == "cpu")


def kept_by_layers(
    config, tokens: float, attended: float, numbers: Numbers, least: bool, own: bool
) -> float:
    """Bytes that the layers of a tower keep per sample for the backward pass.

    Of each token: the inputs of the two norms, in float32; the inputs of the matrix products, in
    their type (the output of both norms, queries, keys and values, the output of attention, and the
    MLP before and after its activation); and each head's row of attention (fused kernels keep
    none).

    Args:
        config: of a tower.
        tokens: encoded tokens of the sample.
        attended: tokens to which attention is padded.
        numbers: number format of the device.
        least: keep only the input of each layer, and one layer in full (gradient checkpointing).
        own: computed by layers.py, whose MLP keeps only the values before its activation.
    Returns:
        Bytes.
    """
    width, inner, size = config.hidden_size, config.intermediate_size, numbers.size
    lean = own and config.hidden_act == "gelu"
    linear = tokens * (2 * width * 4 + ((3 - lean) * width + (2 - lean) * inner) * size)
    if lean and config.model_type == "bert":  # its norms come last: the MLP has another input
        linear += tokens * width * 4
    attention = config.num_attention_heads * attended * numbers.cpu
    layer = linear + attended * (3 * width + attention) * size
    ends = tokens * 2 * width * 4  # input of the last (or first) norm, and the states
    if least:
        return ends + layer + config.num_hidden_layers * tokens * width * 4
    return ends + config.num_hidden_layers * layer


def kept_by_pair(
    config: TrainingConfig,
    model: MultimodalEncoder,
    encoded: tuple[float, float],
    whole: tuple[int, float],
    padded: float,
    numbers: Numbers,
    masked_tokens: float,
) -> float:
    """Bytes of one pair whose graph is kept, including its pixels and the decoder's layers."""
    vit, bert, least = model.vit.config, model.bert.config, config.gradient_checkpointing
    pixels, views = 3 * model.patch_size**2, [(encoded, padded)]
    if config.contrastive_view == "unmasked" and "contrastive" in config.terms:
        views.append((whole, whole[1]))
    kept = whole[0] * pixels  # one byte each
    for (patches, tokens), longest in views:
        kept += patches * pixels * numbers.size
        lean = numbers.cpu and not config.compile
        kept += kept_by_layers(vit, patches + 1, patches + 1, numbers, least, lean)
        kept += kept_by_layers(bert, tokens, longest, numbers, least, lean)
        if numbers.cpu and not least:  # queries, keys and values once more, before padding
            kept += bert.num_hidden_layers * tokens * 3 * bert.hidden_size * numbers.size
    if (decoder := model.decoder) is None:
        return kept
    (patches, tokens), (all_patches, all_tokens) = encoded, whole
    fusions = 1 + 2 * config.cross_modal_ratio * ("itm" in config.terms)
    text = "mlm" in config.terms or "itm" in config.terms
    for layers, own, other, times in (
        (decoder.pixel_layers, all_patches + 1, tokens, float("mim" in config.terms)),
        (decoder.word_layers, all_tokens, patches + 1, fusions * text),
    ):
        if layers is not None:
            joined, depth = own + other * decoder.across, len(layers.layers)
            one = kept_by_layers(layers.config, joined, joined, numbers, False, False)
            kept += times * one * depth / layers.config.num_hidden_layers
    if "mim" in config.terms:
        kept += 3 * 4 * all_patches * pixels  # prediction, target, and their difference
    if "mlm" in config.terms:
        kept += 3 * 4 * masked_tokens * bert.vocab_size
    return kept


def weight_copies(model: MultimodalEncoder, numbers: Numbers) -> float:
    """Bytes of the copies of the layers' weights in the type of the products; see layers.py."""
    total, size = 0.0, numbers.size
    for config in (model.vit.config, model.bert.config):
        width, inner = config.hidden_size, config.intermediate_size
        joined = 3 * width**2  # queries, keys and values as one matrix, on a CPU always a copy
        rest = (width**2 + 2 * width * inner) * (size == 2)
        total += config.num_hidden_layers * size * (joined * (size == 2 or numbers.cpu) + rest)
    return total


def working_bytes(model: MultimodalEncoder, pairs: int, patches: float, numbers: Numbers) -> float:
    """Bytes of the backward pass through the last ViT layer, when everything else is still kept."""
    config, tokens = model.vit.config, patches + 1
    return pairs * tokens * numbers.size * (2 * config.intermediate_size + config.hidden_size)


def exchanged_bytes(
    config: TrainingConfig, embed_dim: int, gradients: float, matrices: float, processes: int
) -> float:
    """Bytes that a process receives in a step.

    A gradient is summed in a ring: 2 (W - 1) / W of its size. Features are sent once and their
    gradients return: hop by hop in a ring of neighbours, or else gathered and summed. With Muon,
    each process sends the new weights of its matrices to all others.
    """
    fraction = (processes - 1) / processes
    features, group_ids = 4.0 * config.batch_size * embed_dim, 8 * config.batch_size
    sent = 2 * fraction * gradients + fraction * matrices + fraction * group_ids
    if "contrastive" not in config.terms:
        return sent
    if config.exchange == "neighbours":
        return sent + 2 * fraction * features
    times = 6 if config.loss == "info_nce" else 4  # no gradient at the other images for "sigmoid"
    return sent + times * fraction * features
