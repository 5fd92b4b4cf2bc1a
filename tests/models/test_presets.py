"""Presets have the sizes of the table, and start by their width."""

import pytest

from mmkit import MultimodalEncoder


def test_presets_have_the_tabled_sizes(tokenizer):
    """Image, patch, width, depth and heads of both towers, length, common space."""
    tiny = (64, 8, (192, 6, 3), (192, 4, 3), 32, 192)
    small = (224, 16, (384, 12, 6), (384, 6, 6), 64, 256)
    base = (224, 16, (768, 12, 12), (768, 12, 12), 77, 512)
    for name, expected in (("tiny", tiny), ("small", small), ("base", base)):
        model = MultimodalEncoder.preset(name, tokenizer=tokenizer)
        towers = [
            (c.hidden_size, c.num_hidden_layers, c.num_attention_heads)
            for c in (model.vit.config, model.bert.config)
        ]
        sizes = (model.image_size, model.patch_size, *towers, model.max_length, model.embed_dim)
        assert sizes == expected
    with pytest.raises(ValueError, match="did you mean 'small'"):
        MultimodalEncoder.preset("smal", tokenizer=tokenizer)


def test_presets_start_by_their_width(tokenizer):
    """Deviations: width ** -0.5 in the ViT, 0.02 in the BERT, a quarter of it for its positions."""
    model = MultimodalEncoder.preset("tiny", tokenizer=tokenizer)

    def deviations(tower):
        return [p.std().item() for p in tower.parameters() if p.ndim > 1 and p.numel() > 1000]

    assert deviations(model.vit) == pytest.approx([192**-0.5] * 38, rel=0.1)
    embeddings = model.bert.embeddings
    for part in (embeddings.position_embeddings, embeddings.token_type_embeddings):
        assert part.weight.std().item() == pytest.approx(0.005, rel=0.15)
    assert deviations(model.bert.encoder) == pytest.approx([0.02] * 24, rel=0.05)
