"""What a step costs, counted before it runs.

A multiply-add counts as two operations. Shapes: N tokens, D width, I width of the MLP.
Walk-through: notebooks/02_masking.ipynb.
"""

from .encoder import MultimodalEncoder


def tower_flops(config, num_tokens: float) -> float:
    """Forward FLOPs of one sample through a transformer tower of `num_tokens` tokens.

    Matrix products only (8 D^2 + 4 D I per token, 4 N^2 D for attention); norms, softmax and
    activations are left out (a few per cent).
    """
    width, inner = config.hidden_size, config.intermediate_size
    per_token = 8 * width**2 + 4 * width * inner
    return config.num_hidden_layers * (num_tokens * per_token + 4 * num_tokens**2 * width)


def sample_flops(model: MultimodalEncoder, num_patches: float, num_words: float) -> float:
    """Forward FLOPs of one picture-text pair with so many visible patches and text tokens."""
    vit, bert = model.vit.config, model.bert.config
    patch = 2 * 3 * model.patch_size**2 * vit.hidden_size * num_patches
    heads = 2 * model.embed_dim * (vit.hidden_size + bert.hidden_size)
    return patch + tower_flops(vit, num_patches + 1) + tower_flops(bert, num_words) + heads


def step_flops(
    model: MultimodalEncoder, num_patches: float, num_words: float, replay: bool
) -> float:
    """Training FLOPs of one pair: forward once, backward twice that; `replay` adds a forward."""
    return (4 if replay else 3) * sample_flops(model, num_patches, num_words)
