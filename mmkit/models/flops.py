"""Operations of a step, counted before it runs.

A multiply-add counts as two operations; only matrix products are counted (norms, softmax and
activations are a few per cent). Shapes: N tokens, D width, I width of the MLP.
Walk-through: notebooks/09_speed.ipynb.
"""

from ..config import TrainingConfig
from .encoder import MultimodalEncoder


def tower_flops(config, num_tokens: float, attended: float | None = None) -> float:
    """Forward FLOPs of one sample through a transformer tower of `num_tokens` tokens.

    8 D^2 + 4 D I per token, and 4 N^2 D for attention. attended: the N of the attention where it is
    padded, the longest caption of the batch; None = num_tokens.
    """
    return config.num_hidden_layers * _layer_flops(config, num_tokens, attended)


def _layer_flops(config, num_tokens: float, attended: float | None = None) -> float:
    width, inner = config.hidden_size, config.intermediate_size
    per_token = 8 * width**2 + 4 * width * inner
    attended = num_tokens if attended is None else attended
    return num_tokens * per_token + 4 * attended**2 * width


def sample_flops(
    model: MultimodalEncoder, num_patches: float, num_words: float, padded: float | None = None
) -> float:
    """Forward FLOPs of one picture-text pair with so many visible patches and text tokens.

    padded: tokens of the longest caption of the batch, over which attention runs; None = num_words.
    """
    vit, bert = model.vit.config, model.bert.config
    heads = 2 * model.embed_dim * (vit.hidden_size + bert.hidden_size)
    towers = tower_flops(vit, num_patches + 1) + tower_flops(bert, num_words, padded)
    return _patch_flops(model, num_patches) + towers + heads


def _patch_flops(model: MultimodalEncoder, num_patches: float) -> float:
    return 2 * 3 * model.patch_size**2 * model.vit.config.hidden_size * num_patches


def put_back_flops(
    model: MultimodalEncoder,
    num_patches: float,
    num_words: float,
    all_words: float,
    config: TrainingConfig,
    all_patches: int | None = None,
) -> float:
    """Forward FLOPs of one pair through the decoder's heads that the terms of a run need.

    num_patches, num_words: as encoded, for the other modality to look at; a head's own tokens are
    all patches (None = the model's), or all words of the caption. Matching fuses two wrong pairs
    for each that looks across. The words' logits are left out.
    """
    if (decoder := model.decoder) is None:
        return 0.0
    across, flops = decoder.across, 0.0
    all_patches = model.num_patches if all_patches is None else all_patches
    if "pixels" in config.terms and decoder.pixel_head is not None:
        flops += _head_flops(decoder.pixel_layers, all_patches + 1, num_words * across)
        flops += 2 * decoder.pixel_head.weight.numel() * all_patches
    if "words" in config.terms or "matching" in config.terms:
        pairs = 1 + 2 * config.cross_modal_ratio * ("matching" in config.terms)
        flops += pairs * _head_flops(decoder.word_layers, all_words, (num_patches + 1) * across)
    return flops


def _head_flops(layers, own: float, other: float) -> float:
    """A `TokenDecoder` over so many own tokens, and those of the other modality behind them."""
    if layers is None:
        return 0.0
    entry = 2 * layers.embed.weight.numel() * own
    if layers.other is not None:
        entry += 2 * layers.other.weight.numel() * other
    return entry + len(layers.layers) * _layer_flops(layers.config, own + other)


def step_flops(
    model: MultimodalEncoder,
    num_patches: float,
    num_words: float,
    replay: float,
    padded: float | None = None,
) -> float:
    """Training FLOPs of one pair: forward once, backward twice that, and the forwards of a replay.

    replay: share of the pairs that go forward once more, (k - 1) / k in k micro-batches. Nothing is
    sent back to the pixels, so that the patch projection's way back is one product.
    """
    forward = sample_flops(model, num_patches, num_words, padded)
    return (3 + replay) * forward - _patch_flops(model, num_patches)


def objective_flops(
    config: TrainingConfig,
    model: MultimodalEncoder,
    encoded: tuple[float, float],
    whole: tuple[int, float],
    padded: float | None = None,
) -> float:
    """Training FLOPs of one pair: both towers, as often as the terms need them, and the decoder.

    encoded: patches and words of the masked view; whole: of the unmasked one. A tower that no term
    needs rests; what is contrasted runs forward once more in all micro-batches but the last.
    """
    (patches, words), (all_patches, all_words), terms = encoded, whole, config.terms
    contrast = "contrastive" in terms
    beside = contrast and config.contrastive_view == "unmasked"
    both = config.cross_modal or (contrast and not beside)
    pieces = config.gradient_accumulation_steps
    replay = (pieces - 1) / pieces if config.accumulation == "exact" else 0.0
    flops = step_flops(
        model,
        patches if both or "pixels" in terms else 0.0,
        words if both or "words" in terms else 0.0,
        replay if contrast and not beside else 0.0,
        padded if both or "words" in terms else 0.0,
    )
    if beside:
        flops += step_flops(model, all_patches, all_words, replay, padded)
    if config.gradient_checkpointing:  # layers compute once more what they did not keep
        flops += tower_flops(model.vit.config, patches + 1)
        flops += tower_flops(model.bert.config, words, padded)
    if padded is not None:  # the decoder has padding in all of its products
        words, all_words = padded, max(all_words, padded)
    return flops + 3 * put_back_flops(model, patches, words, all_words, config, all_patches)


def logit_flops(config: TrainingConfig, embed_dim: int, candidates: float, again: bool) -> float:
    """Training FLOPs of one pair's rows of the similarity matrix against so many candidates.

    One matrix for "sigmoid", one each way for "info_nce"; again: computed anew on the way back.
    """
    matrices = 2 if config.loss == "info_nce" else 1
    return (4 if again else 3) * matrices * 2 * candidates * embed_dim


def muon_flops(height: int, width: int, steps: int = 5) -> float:
    """Operations that orthogonalise the update of one matrix: three products per iteration."""
    short, long = sorted((height, width))
    return steps * 2 * short**2 * (2 * long + short)
