"""A small ViT whose attention differs between patches, layers and heads."""

import torch


def make_vit(size=(15, 20), seed=0, dropout=0.0):
    """3 layers, 2 heads, width 22, patches of 5 pixels."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=size,
        patch_size=5,
        hidden_size=22,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=31,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="eager",
    )
    vit = ViTModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():  # attention that differs between patches, layers and heads
        for parameter in vit.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return vit
