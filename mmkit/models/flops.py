"""Floating-point operations (FLOPs) of a step, counted before it runs.

A multiply-add counts as two operations, and only matrix products count (norms, softmax and
activations are a few per cent). Shapes: N tokens, D width, I width of the MLP.
Walk-through: notebooks/09_speed.ipynb.
"""

from ..config import TrainingConfig
from ..older_names import older_arguments
from .encoder import MultimodalEncoder


def tower_flops(config, num_tokens: float, attended: float | None = None) -> float:
    """Forward FLOPs of one sample in a transformer tower.

    Per layer 8 D^2 + 4 D I for each token, and 4 N^2 D for attention.

    Args:
        config: transformers' config of the tower.
        num_tokens: tokens of the sample, or their mean.
        attended: N of the attention if it is padded, that of the longest caption of the batch;
            None = num_tokens.

    Returns:
        FLOPs.
    """
    return config.num_hidden_layers * _layer_flops(config, num_tokens, attended)


def _layer_flops(config, num_tokens: float, attended: float | None = None) -> float:
    width, inner = config.hidden_size, config.intermediate_size
    per_token = 8 * width**2 + 4 * width * inner
    attended = num_tokens if attended is None else attended
    return num_tokens * per_token + 4 * attended**2 * width


@older_arguments(num_words="num_tokens")
def sample_flops(
    model: MultimodalEncoder, num_patches: float, num_tokens: float, padded: float | None = None
) -> float:
    """Forward FLOPs of one image-text pair in both towers.

    Args:
        model: the encoder.
        num_patches: visible patches, or their mean.
        num_tokens: encoded text tokens, or their mean.
        padded: tokens of the longest caption of the batch, over which attention runs; None =
            num_tokens.

    Returns:
        FLOPs.
    """
    vit, bert = model.vit.config, model.bert.config
    heads = 2 * model.embed_dim * (vit.hidden_size + bert.hidden_size)
    towers = tower_flops(vit, num_patches + 1) + tower_flops(bert, num_tokens, padded)
    return _patch_flops(model, num_patches) + towers + heads


def _patch_flops(model: MultimodalEncoder, num_patches: float) -> float:
    return 2 * 3 * model.patch_size**2 * model.vit.config.hidden_size * num_patches


def reconstruction_flops(
    model: MultimodalEncoder,
    num_patches: float,
    num_tokens: float,
    all_tokens: float,
    config: TrainingConfig,
    all_patches: int | None = None,
) -> float:
    """Forward FLOPs of one pair in the decoder's heads that the terms of a run need.

    Matching fuses two wrong pairs for each pair that attends to the other modality. The logits over
    the vocabulary are left out.

    Args:
        model: the encoder with its decoder; 0 FLOPs without one.
        num_patches: encoded patches, to which the text decoder attends.
        num_tokens: encoded tokens, to which the image decoder attends.
        all_tokens: all tokens of the caption, in the text decoder.
        config: configuration of the run.
        all_patches: all patches, in the image decoder; None = the model's.

    Returns:
        FLOPs.
    """
    if (decoder := model.decoder) is None:
        return 0.0
    across, flops = decoder.across, 0.0
    all_patches = model.num_patches if all_patches is None else all_patches
    if "mim" in config.terms and decoder.pixel_head is not None:
        flops += _head_flops(decoder.pixel_layers, all_patches + 1, num_tokens * across)
        flops += 2 * decoder.pixel_head.weight.numel() * all_patches
    if "mlm" in config.terms or "itm" in config.terms:
        pairs = 1 + 2 * config.cross_modal_ratio * ("itm" in config.terms)
        flops += pairs * _head_flops(decoder.word_layers, all_tokens, (num_patches + 1) * across)
    return flops


def _head_flops(layers, own: float, other: float) -> float:
    """A `TokenDecoder` over so many own tokens, followed by those of the other modality."""
    if layers is None:
        return 0.0
    entry = 2 * layers.embed.weight.numel() * own
    if layers.other is not None:
        entry += 2 * layers.other.weight.numel() * other
    return entry + len(layers.layers) * _layer_flops(layers.config, own + other)


@older_arguments(num_words="num_tokens")
def step_flops(
    model: MultimodalEncoder,
    num_patches: float,
    num_tokens: float,
    replay: float,
    padded: float | None = None,
) -> float:
    """Training FLOPs of one pair in both towers: one forward pass, a backward pass, and replays.

    The backward pass costs twice the forward pass, except that no gradient goes to the pixels: that
    of the patch projection is one product.

    Args:
        model: the encoder.
        num_patches: visible patches, or their mean.
        num_tokens: encoded text tokens, or their mean.
        replay: fraction of the pairs with a second forward pass, (k - 1) / k of k micro-batches.
        padded: as in `sample_flops`.

    Returns:
        FLOPs.

    Example:
        >>> whole = mm.cost.step_flops(model, num_patches=9, num_tokens=6, replay=0.0)
        >>> masked = mm.cost.step_flops(model, num_patches=3, num_tokens=6, replay=0.0)
        >>> round(masked / whole, 2)
        0.58
    """
    forward = sample_flops(model, num_patches, num_tokens, padded)
    return (3 + replay) * forward - _patch_flops(model, num_patches)


def objective_flops(
    config: TrainingConfig,
    model: MultimodalEncoder,
    encoded: tuple[float, float],
    whole: tuple[int, float],
    padded: float | None = None,
) -> float:
    """Training FLOPs of one pair: both towers, as often as the terms need them, and the decoder.

    A tower that no term needs does not run; for the contrastive term, all micro-batches but the
    last have a second forward pass.

    Args:
        config: configuration of the run.
        model: the encoder, with the decoder that the terms need.
        encoded: (patches, tokens) of the masked view.
        whole: (patches, tokens) of the unmasked view.
        padded: tokens of the longest caption of the batch; None = no padding.

    Returns:
        FLOPs.
    """
    (patches, tokens), (all_patches, all_tokens), terms = encoded, whole, config.terms
    contrast = "contrastive" in terms
    second = contrast and config.contrastive_view == "unmasked"
    both = config.cross_modal or (contrast and not second)
    micro_batches = config.gradient_accumulation_steps
    replay = (micro_batches - 1) / micro_batches if config.accumulation == "exact" else 0.0
    flops = step_flops(
        model,
        patches if both or "mim" in terms else 0.0,
        tokens if both or "mlm" in terms else 0.0,
        replay if contrast and not second else 0.0,
        padded if both or "mlm" in terms else 0.0,
    )
    if second:
        flops += step_flops(model, all_patches, all_tokens, replay, padded)
    if config.gradient_checkpointing:  # layers recompute what they did not keep
        flops += tower_flops(model.vit.config, patches + 1)
        flops += tower_flops(model.bert.config, tokens, padded)
    if padded is not None:  # the decoder has padding in all of its products
        tokens, all_tokens = padded, max(all_tokens, padded)
    return flops + 3 * reconstruction_flops(model, patches, tokens, all_tokens, config, all_patches)


def logit_flops(config: TrainingConfig, embed_dim: int, candidates: float, again: bool) -> float:
    """Training FLOPs of one pair's rows of the similarity matrix.

    One matrix for "sigmoid", one for each direction for "info_nce".

    Args:
        config: configuration of the run.
        embed_dim: width of the features.
        candidates: columns of the matrix.
        again: whether the backward pass computes the matrix again.

    Returns:
        FLOPs.
    """
    matrices = 2 if config.loss == "info_nce" else 1
    return (4 if again else 3) * matrices * 2 * candidates * embed_dim


def muon_flops(height: int, width: int, steps: int = 5) -> float:
    """FLOPs to orthogonalise the update of one matrix: three products per iteration.

    Args:
        height: rows of the matrix.
        width: columns of the matrix.
        steps: iterations.

    Returns:
        FLOPs.
    """
    short, long = sorted((height, width))
    return steps * 2 * short**2 * (2 * long + short)
