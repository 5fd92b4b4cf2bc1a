"""Figures of masking show what was masked, and what it costs."""

import numpy as np
import pytest
import torch

import mmkit as mm
from mmkit import plots
from mmkit.models.patches import patchify
from tests.plots.drawn import labels, masked, shown


def test_a_painted_mask_covers_exactly_the_masked_patches(emoji):
    pixels = emoji.batch(range(5)).pixel_values
    mask = masked(emoji, 5)[1].mask
    painted, old = (patchify(x, 8) for x in (plots.paint_mask(pixels, mask, 8), pixels))
    assert (painted[mask] == plots.MASKED).all() and torch.equal(painted[~mask], old[~mask])


def test_masked_images_have_a_row_per_masking(emoji):
    pixels = emoji.batch(range(5)).pixel_values
    rows = {"half": masked(emoji, 5)[1], "all": None}
    axes = shown(plots.masked_images(pixels, rows, 8, "take-away"), 10)
    assert [ax.get_ylabel() for ax in axes[::5]] == ["half", "all"]


@pytest.mark.parametrize("mode", ["drop", "replace"])
def test_masked_captions_strike_out_or_replace(mode):
    figure = plots.masked_captions(
        [["[CLS]", "red", "cat"], ["[CLS]", "a"]], [[0, 1, 0], [0, 0]], mode
    )
    shown(figure, 0)
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words == ["[CLS]", "red" if mode == "drop" else "[mask]", "cat", "[CLS]", "a"]
    assert len(figure.axes[0].lines) == (mode == "drop")


def test_a_caption_under_several_maskers_has_a_named_row_each(emoji):
    """Masked tokens are struck out; under 80/10/10 the drawn token is shown, in green."""
    ids = torch.tensor(emoji.tokenizer("red cat dog")["input_ids"])
    n = len(ids)
    mask = torch.zeros(1, n, dtype=torch.bool)
    mask[0, 1:3] = True
    masking = mm.masking.keep_visible(mask, torch.ones(1, n, dtype=torch.bool))
    maskings = {"nothing": None, "two": masking}
    figure = plots.masked_caption(emoji.tokenizer, ids, maskings, "drop", "take-away")
    shown(figure, 0)
    assert len(figure.axes[0].lines) == 2
    assert [t.get_text() for t in figure.axes[0].texts][:: n + 1] == ["nothing", "two"]
    masking.substitute = torch.full((1, n), -1)
    masking.substitute[0, 2] = ids[3]
    figure = plots.masked_caption(emoji.tokenizer, ids, {"two": masking}, "replace")
    shown(figure, 0)
    first, second = figure.axes[0].texts[2:4]
    tokens = emoji.tokenizer.convert_ids_to_tokens(ids)
    assert [first.get_text(), second.get_text()] == ["[mask]", tokens[3]]
    assert first.get_bbox_patch().get_facecolor() != second.get_bbox_patch().get_facecolor()


def test_the_gallery_shows_every_masker_at_every_ratio(emoji, model):
    """Rows are maskers, groups of columns are ratios; each image is masked as drawn."""
    batch = emoji.batch(range(2))
    every = len(mm.masking.IMAGE_MASKERS) - 1  # painted needs an array
    figure = plots.masking_gallery(batch, model, layers=emoji.layers, caption="take-away")
    figure.draw_without_rendering()  # a closed figure's canvas draws nothing
    assert len(figure.axes) == every * 2 * 2
    figure = plots.masking_gallery(batch, model, ["grid", "block"], [0.25, 0.5, 0.75], epoch=3)
    assert len(figure.axes) == 2 * 3 * 2
    masking, _ = mm.masking.draw_maskings(
        batch, model.token_info, seed=0, epoch=3, image=("block", 0.75)
    )
    expected = plots.paint_mask(batch.pixel_values, masking.mask, 8)[1]
    assert np.array_equal(figure.axes[-1].images[0].get_array(), expected.permute(1, 2, 0))


def test_the_sequence_is_what_is_kept_in_its_order(emoji, model):
    batch = emoji.batch(range(3))
    image, text = mm.masking.draw_maskings(
        batch, model.token_info, seed=0, epoch=0, image=("random", 0.8), text=("random", 0.5)
    )
    figure = plots.what_the_model_sees(batch, model, image, text, row=1, caption="take-away")
    *_, ax = shown(figure, 2), figure.axes[2]
    ids = image.ids_keep[1].tolist()
    words = [t.get_text() for t in ax.texts]
    assert words[:13] == [f"{i // 8},{i % 8}" for i in ids] and len(ax.images) == 13
    kept = text.ids_keep[1][text.keep_valid[1]].tolist()
    assert words[14::2] == [str(i) for i in kept]
    patches = patchify(batch.pixel_values[1:2], 8)[0, ids[5]].reshape(3, 8, 8)
    assert np.array_equal(ax.images[5].get_array(), patches.permute(1, 2, 0))
    everything = plots.what_the_model_sees(batch, model)
    assert len(everything.axes[2].images) == 64


def test_cost_over_the_ratio(emoji, model):
    """Tokens and operations are counted, times measured: less for a larger fraction."""
    costs = mm.cost.measure_ratios(model, emoji.batch(range(5)), (0, 0.5, 0.9), rounds=2)
    assert [round(c["tokens"] - costs[-1]["tokens"]) for c in costs] == [64 - 6, 32 - 6, 0]
    assert costs[0]["gflop"] > costs[1]["gflop"] > costs[2]["gflop"] > 0
    assert all(c["quartiles"][0] <= c["milliseconds"] <= c["quartiles"][1] for c in costs)
    assert all(p.grad is None for p in model.parameters())
    axes = shown(plots.ratio_vs_cost(costs, "take-away"), 3)
    assert [labels(ax)[0] for ax in axes] == ["masked patches (%)"] * 3
    assert (
        axes[2].texts[2].get_text() == f"÷{costs[0]['milliseconds'] / costs[2]['milliseconds']:.1f}"
    )


def test_attention_and_tokens_on_the_image(emoji, model):
    """One map per row and per token, the value of each patch on its pixels."""
    pixels = emoji.batch(range(3)).pixel_values
    attention = model.class_attention(pixels)
    figure = plots.attention_maps(pixels, {"full": attention, "again": attention}, 8, "take-away")
    axes = shown(figure, 3 * 3 + 2)
    heat = axes[3 + 1].images[1].get_array()
    np.testing.assert_allclose(heat[::8, ::8].ravel(), 64 * attention[1], rtol=1e-5)
    tokens, cosines = mm.retrieval.patch_token_similarity(model, pixels[0], "red cat")
    assert cosines.shape == (len(tokens), 64) and cosines.abs().max() <= 1 + 1e-5
    assert "[CLS]" not in tokens
    figure = plots.patch_token_map(pixels[0], tokens, cosines, 8, "take-away")
    shown_axes = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_title() for ax in shown_axes[1 : 1 + len(tokens)]] == tokens
    heat = shown_axes[1].images[1].get_array()
    np.testing.assert_allclose(heat[::8, ::8].ravel(), cosines[0], rtol=1e-5)


def test_a_token_table_has_a_cell_per_token(emoji):
    batch = emoji.batch(range(5))
    tokens = [emoji.tokenizer.convert_ids_to_tokens(ids) for ids in batch.input_ids]
    (ax,) = shown(plots.token_table(tokens, batch.valid), 1)
    assert len(ax.patches) == len(ax.texts) == batch.valid.numel()
    empty = [patch.get_facecolor()[:3] == (1, 1, 1) for patch in ax.patches]
    assert empty == (~batch.valid).flatten().tolist()


def test_mask_statistics_are_those_of_the_mask(emoji):
    noise, masking = masked(emoji, 23, 0.75)
    left, right, _ = shown(plots.mask_statistics(noise, masking.mask), 3)
    assert sum(bar.get_height() for bar in left.patches if bar.get_width() < 0.1) == pytest.approx(
        100
    )
    often = 100 * masking.mask.float().mean(0).reshape(8, 8)
    np.testing.assert_allclose(right.images[0].get_array(), often)


def test_the_shuffle_is_drawn_with_two_arrows_per_patch():
    noise = torch.tensor([[0.4, 0.9, 0.1, 0.7, 0.3, 0.8, 0.2]])
    masking = mm.masking.random_mask(noise, 0.5)
    (ax,) = shown(plots.shuffle_diagram(noise[0].tolist(), masking), 1)
    words = [text.get_text() for text in ax.texts if text.get_text()]
    assert words[7:14] == [f"patch {i}" for i in (2, 6, 4, 0, 3, 5, 1)]
    assert len(ax.texts) == 7 * 5
