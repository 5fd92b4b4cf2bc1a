"""Bytes of a step, counted before it runs: kept for the way back, and sent between processes.

What a layer keeps is what layers.py lets autograd keep; transformers' own layers on a GPU differ in
the attention, whose fused kernels keep no shares. Shapes: B batch, K encoded tokens, D width, W
processes. Walk-through: notebooks/09_speed.ipynb.
"""

from typing import NamedTuple

import torch

from ..config import TrainingConfig
from ..device import pick_precision
from ..models.encoder import MultimodalEncoder


class Numbers(NamedTuple):
    """What a device computes with."""

    size: int  # bytes of a number in matrix products: 2 or 4
    cpu: bool  # layers.py computes, not fused kernels


def numbers_of(config: TrainingConfig, device: torch.device) -> Numbers:
    """By the run's precision; a GPU that is not here is taken for one that has bf16 or fp16."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return Numbers(4 if config.mixed_precision == "no" else 2, False)
    size = 2 if pick_precision(config.mixed_precision, device) else 4
    return Numbers(size, device.type == "cpu")


def kept_by_layers(
    config, tokens: float, attended: float, numbers: Numbers, least: bool, own: bool
) -> float:
    """Bytes that the layers of a tower keep of one sample for the way back.

    Of each token what enters the two norms, in float32; as products compute, what enters them: two
    norms' output, queries, keys and values, what was attended to, and the MLP before and after its
    activation; and each head's row of attention (fused kernels keep none). own: layers.py computes,
    whose MLP keeps what is before its activation alone. least: only what enters a layer, and one
    layer in full (gradient checkpointing).
    """
    width, inner, size = config.hidden_size, config.intermediate_size, numbers.size
    lean = own and config.hidden_act == "gelu"
    linear = tokens * (2 * width * 4 + ((3 - lean) * width + (2 - lean) * inner) * size)
    if lean and config.model_type == "bert":  # its norm comes last: what enters the MLP is another
        linear += tokens * width * 4
    shares = config.num_attention_heads * attended * numbers.cpu
    layer = linear + attended * (3 * width + shares) * size
    ends = tokens * 2 * width * 4  # what enters the last (or first) norm, and the states
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
    hidden_words: float,
) -> float:
    """Bytes of one pair whose graph is kept, its pixels and the decoder's layers among them."""
    vit, bert, least = model.vit.config, model.bert.config, config.gradient_checkpointing
    pixels, views = 3 * model.patch_size**2, [(encoded, padded)]
    if config.contrastive_view == "unmasked" and "contrastive" in config.terms:
        views.append((whole, whole[1]))
    kept = whole[0] * pixels  # one byte each
    for (patches, words), longest in views:
        kept += patches * pixels * numbers.size
        lean = numbers.cpu and not config.compile
        kept += kept_by_layers(vit, patches + 1, patches + 1, numbers, least, lean)
        kept += kept_by_layers(bert, words, longest, numbers, least, lean)
        if numbers.cpu and not least:  # queries, keys and values once more, before padding
            kept += bert.num_hidden_layers * words * 3 * bert.hidden_size * numbers.size
    if (decoder := model.decoder) is None:
        return kept
    (patches, words), (all_patches, all_words) = encoded, whole
    fusions = 1 + 2 * config.cross_modal_ratio * ("matching" in config.terms)
    text = "words" in config.terms or "matching" in config.terms
    for layers, own, other, times in (
        (decoder.pixel_layers, all_patches + 1, words, float("pixels" in config.terms)),
        (decoder.word_layers, all_words, patches + 1, fusions * text),
    ):
        if layers is not None:
            tokens, depth = own + other * decoder.across, len(layers.layers)
            one = kept_by_layers(layers.config, tokens, tokens, numbers, False, False)
            kept += times * one * depth / layers.config.num_hidden_layers
    if "pixels" in config.terms:
        kept += 3 * 4 * all_patches * pixels  # put back, wanted, and their difference
    if "words" in config.terms:
        kept += 3 * 4 * hidden_words * bert.vocab_size
    return kept


def weight_copies(model: MultimodalEncoder, numbers: Numbers) -> float:
    """Bytes of the layers' weights in the type that computes; see layers.py."""
    total, size = 0.0, numbers.size
    for config in (model.vit.config, model.bert.config):
        width, inner = config.hidden_size, config.intermediate_size
        joined = 3 * width**2  # queries, keys and values side by side, on a CPU always a copy
        rest = (width**2 + 2 * width * inner) * (size == 2)
        total += config.num_hidden_layers * size * (joined * (size == 2 or numbers.cpu) + rest)
    return total


def working_bytes(model: MultimodalEncoder, pairs: int, patches: float, numbers: Numbers) -> float:
    """Bytes on the way back through the last ViT layer, when all else is still kept."""
    config, tokens = model.vit.config, patches + 1
    return pairs * tokens * numbers.size * (2 * config.intermediate_size + config.hidden_size)


def exchanged_bytes(
    config: TrainingConfig, embed_dim: int, gradients: float, matrices: float, processes: int
) -> float:
    """Bytes that a process receives in a step.

    A gradient is summed in a ring: 2 (W - 1) / W of its size. Features come once and their
    gradients go back: in a ring of neighbours hop by hop, else gathered and summed. Muon's owners
    send the new weights of their matrices to all.
    """
    share = (processes - 1) / processes
    features = 4.0 * config.batch_size * embed_dim
    sent = 2 * share * gradients + share * matrices + share * 8 * config.batch_size  # group ids
    if "contrastive" not in config.terms:
        return sent
    if config.exchange == "neighbours":
        return sent + 2 * share * features
    modalities = 2 if config.loss == "info_nce" else 1
    return sent + modalities * 3 * share * features
