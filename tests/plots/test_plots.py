"""Every plot runs on real images and runs, and shows what it was given, with labelled axes."""

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

import mmkit as mm
from mmkit import plots
from mmkit.data.report import Report
from mmkit.models.patches import patchify
from mmkit.training.run import Run
from tests.train_small import DEFAULTS


@pytest.fixture(scope="module")
def emoji():
    """23 of the built-in images."""
    return mm.openmoji(64)[1].subset(range(23))


@pytest.fixture(scope="module")
def model(emoji):
    torch.manual_seed(0)
    return mm.MultimodalEncoder.preset("tiny", tokenizer=emoji.tokenizer)


@pytest.fixture
def run(tmp_path, make_model, make_data):
    config = mm.TrainingConfig(**DEFAULTS | dict(num_epochs=2, output_dir=str(tmp_path)))
    return mm.train_model(config, make_data(23), make_data(11, seed=1), make_model())


def masked(data, count, ratio=0.5):
    noise = mm.mask_noise(0, 0, data.sample_ids[:count], 64)
    return noise, mm.masking.random_mask(noise, ratio)


def shown(figure, axes):
    """The visible axes of a finished figure; it must draw without an error, and none of its text
    may be too small to read."""
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # a closed figure's canvas draws nothing
    small = {t.get_text() for t in figure.findobj(Text) if t.get_text() and t.get_fontsize() < 8}
    assert not small
    assert all(ax.title.get_fontsize() >= 9 for ax in figure.axes if ax.images and ax.get_title())
    visible = [ax for ax in figure.axes if ax.axison]
    assert len(visible) == axes
    return visible


def labels(ax):
    return ax.get_xlabel(), ax.get_ylabel()


def test_images_and_their_captions(emoji):
    axes = shown(plots.images(emoji, range(5), columns=3, caption="take-away"), 5)
    assert axes[2].get_title().replace("\n", " ") == emoji[2]["text"]
    assert np.array_equal(axes[4].images[0].get_array(), emoji[4]["image"].permute(1, 2, 0))
    framed = plots.image_grid([emoji[0]["image"]], ["x"], frames=[plots.RED], title_lines=1)
    assert shown(framed, 1)[0].spines["top"].get_linewidth() == 2.5


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


def test_training_curves_have_their_reference_line(run):
    left, right = shown(plots.training_curves({"a": run}, chance_negatives=11), 2)
    assert labels(left) == ("step", "loss (nats)") and "R@1" in right.get_ylabel()
    assert [text.get_text() for text in left.texts] == [f"guessing: ln(11) = {math.log(11):.2f}"]
    shown(plots.training_curves({"a": run}, x="minutes", k=5), 2)


def test_bars_show_their_numbers():
    (ax,) = shown(plots.bars({"a": 12.34, "b": 5}, "R@1 (%)", chance=1), 1)
    assert [text.get_text() for text in ax.texts] == ["5.0", "12.3"]
    given = plots.bars({"a": 12.34, "b": 5}, "R@1 (%)", intervals={"a": (10, 15), "b": (4, 7)})
    assert [text.get_text() for text in shown(given, 1)[0].texts][-1] == "12.3 [10.0, 15.0]"
    beyond = {"a": (80, 107), "b": (-2, 7)}
    (ax,) = shown(plots.bars({"a": 97.0, "b": 3}, "R@1 (%)", intervals=beyond), 1)
    assert [text.get_text() for text in ax.texts] == ["3.0 [0.0, 7.0]", "97.0 [80.0, 100.0]"]
    assert max(ax.get_xticks()) == 100
    (ax,) = shown(plots.bars({"a": 97.0}, "step (ms)", intervals={"a": (80, 107)}), 1)
    assert ax.texts[0].get_text() == "97.0 [80.0, 107.0]" and max(ax.get_xticks()) > 100
    groups = {"x": {"a": 1, "b": 2}, "y": {"a": 3, "b": 4}, "z": {"a": 5, "b": 6}}
    (ax,) = shown(plots.grouped_bars(groups, "fraction (%)"), 1)
    assert [text.get_text() for text in ax.texts] == list("135246")


def test_probes_are_bars_with_their_chance():
    """Per cent of balanced accuracy; one chance line fits one number of classes only."""
    scores = {"balanced_accuracy": 0.5, "interval": [0.4, 0.625], "chance": 0.25}
    read = {"linear": scores, "knn": scores | {"balanced_accuracy": 0.45}}
    results = {"tuned": {"by": "group", "rows": {"whole": read, "half": read}}}
    results["pixels"] = {"by": "group", "rows": {"whole": read}}
    (ax,) = shown(plots.probes(results, caption="take-away"), 1)
    assert [text.get_text() for text in ax.texts] == ["50.0 [40.0, 62.5]"] * 3
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["pixels, whole", "tuned, half", "tuned, whole"]
    assert labels(ax)[0] == "balanced accuracy of group, linear probe (%), 95 % interval"
    assert ax.get_legend().get_texts()[0].get_text() == "chance 25.0"
    (ax,) = shown(plots.probes(results, "knn"), 1)
    assert ax.texts[0].get_text() == "45.0 [40.0, 62.5]"
    results["pixels"]["rows"]["whole"] = {"linear": scores | {"chance": 0.5}}
    with pytest.raises(ValueError, match=r"results with \[2, 4\] classes"):
        plots.probes(results)


def test_a_histogram_is_in_per_cent_of_each_set():
    (ax,) = shown(plots.histogram({"a": [1, 1, 1, 3], "b": [2]}, "words"), 1)
    assert labels(ax) == ("words", "fraction of the set (%)")
    assert max(patch.get_xy()[:, 1].max() for patch in ax.patches) == 100


def test_lines_have_a_legend_for_all_of_them():
    data = {"a": ([1, 2], [3, 4]), "b": ([1, 2], [5, 6])}
    figure = plots.lines(data, "x", "y", ("level", 2), reference={"old": ([1, 2], [1, 1])})
    (ax,) = shown(figure, 1)
    names = {text.get_text() for text in ax.get_legend().get_texts()}
    assert names == {"a", "b", "level", "old"} and ax.get_ylim()[0] == 0


def test_lines_have_reference_lines_and_areas():
    """Each reference line is named on its level; an interval is an area from low to high."""
    data = {"with": ([25, 75], [3, 4]), "without": ([25, 75], [5, 7])}
    levels = {"mean patch": 6.0, "mean colour": 8.0}
    given = dict(intervals={"without": ([4, 6], [6, 9])}, references=levels)
    (ax,) = shown(plots.lines(data, "masked (%)", "error", **given, bands=True), 1)
    assert {text.get_text(): text.xy[1] for text in ax.texts} == levels
    assert [list(line.get_ydata()) for line in ax.lines] == [[3, 4], [5, 7], [6, 6], [8, 8]]
    (area,) = ax.collections
    corners = {tuple(corner) for corner in area.get_paths()[0].vertices}
    assert corners == {(25, 4), (25, 6), (75, 6), (75, 9)}
    (ax,) = shown(plots.lines(data, "masked (%)", "error", **given), 1)
    (bars,) = ax.collections
    assert [tuple(bar[:, 1]) for bar in bars.get_segments()] == [(4, 6), (6, 9)]
    given = dict(intervals={"without": ([-3, 6], [6, 103])})
    (ax,) = shown(plots.lines(data, "masked (%)", "R@1 (%)", **given), 1)
    (bars,) = ax.collections
    assert [tuple(bar[:, 1]) for bar in bars.get_segments()] == [(0, 6), (6, 100)]


def test_repeats_draw_every_measurement():
    values = {"masked": [[1, 2, 3], [4, 5]], "visible": [[1], [2]]}
    (ax,) = shown(plots.repeats([10, 100], values, "images", "R@1 (%)", [1, 2], log_x=True), 1)
    assert sum(line.get_marker() == "_" for line in ax.lines) == 3 + 1
    assert {"2", "4"} <= {text.get_text() for text in ax.texts}


def test_retrieval_images(emoji, model):
    features = mm.embed(model, emoji)
    matrix, _ = shown(plots.similarity_matrix(features, range(7), "abcdefg"), 2)
    assert matrix.images[0].get_array().shape == (7, 7) and labels(matrix) == (
        "caption",
        "image of",
    )
    index = mm.Index(model, emoji)
    queries = [emoji[0]["text"], emoji[1]["image"]]
    shown(plots.search_results(index, queries, k=5), 2 * 5 + 1)
    counts = torch.tensor([[5, 2], [0, 3]])
    (ax, _) = shown(plots.confusion_matrix(counts, ["cat", "dog"]), 2)
    assert [text.get_text() for text in ax.texts] == ["5", "2", "0", "3"]


def test_two_computations_are_compared():
    arrays = {"x": torch.zeros(5, 7), "y": torch.ones(5, 7)}
    axes = shown(plots.differences(arrays, "column", "row"), 3)
    assert "largest 1" in axes[1].get_title()


def test_the_whole_and_the_resumed_run_are_compared():
    steps = [1, 2, 3]
    reference = ("whole", steps, [3.0, 2.0, 1.0])
    others = {"resumed": (steps, [3.0, 2.0, 1.0]), "other": (steps, [3.0, 2.0, 1.5])}
    axes = shown(plots.same_or_not(reference, others, events={"killed": 2}), 2)
    names = [text.get_text() for text in axes[1].get_legend().get_texts()]
    assert names == ["resumed: at most 0", "other: at most 0.5"]
    axes = shown(plots.same_or_not(reference, others, log=True), 2)
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == names
    equal, other = (line.get_ydata() for line in axes[1].lines)
    assert axes[1].get_yscale() == "log" and np.isnan(equal).all()
    np.testing.assert_array_equal(other, [math.nan, math.nan, 0.5])


def test_gradients_are_compared_with_the_true_one():
    """Half as long in the same direction, `logit_scale` four times as large."""
    torch.manual_seed(0)
    true = {"a": torch.randn(3, 5), "b": torch.randn(7), "logit_scale": torch.tensor(-0.25)}
    half = {n: g / 2 if n != "logit_scale" else 4 * g for n, g in true.items()}
    figure = plots.gradient_agreement(true, {"same": true, "half": half}, caption="take-away")
    left, right = shown(figure, 2)
    assert [text.get_text() for text in right.texts] == ["1", "1", "1", "1", "0.5", "4"]
    heights = [bar.get_height() for bar in right.patches]
    assert heights == pytest.approx([1, 1, 1, 1, 0.5, 4]) and right.get_ylim()[1] > 4
    same, star, other, other_star = left.lines[:4]
    sizes = [float(true[n].norm()) for n in "ab"]
    np.testing.assert_allclose(other.get_xdata(), sizes, rtol=1e-6)
    np.testing.assert_allclose(other.get_ydata(), np.array(sizes) / 2, rtol=1e-6)
    assert float(other_star.get_ydata()[0]) == pytest.approx(0.75)
    floor = 1e-10 * max(sizes)
    np.testing.assert_allclose([*same.get_ydata(), *star.get_ydata()], floor)
    unused = plots.gradient_agreement(true, {"no b": {n: true[n] for n in ("a", "logit_scale")}})
    ratio = sizes[0] / math.hypot(*sizes)
    words = [text.get_text() for text in shown(unused, 2)[1].texts]
    assert words == [f"{ratio:.3g}", f"{ratio:.3g}", "1"]


@pytest.fixture(scope="module")
def reconstructed(emoji):
    """Five images, the same masked by half, and stand-ins for their reconstructions."""
    pixels = emoji.batch(range(5)).pixel_values
    left = plots.paint_mask(pixels, masked(emoji, 5)[1].mask, 8)
    return pixels, left, 255 - pixels


def test_reconstructions_stand_beside_the_originals(reconstructed):
    """Row by row: each version of the image, its title on top, its number below."""
    columns = dict(zip(["original", "masked", "reconstructed"], reconstructed, strict=True))
    errors = torch.tensor([0.5, 0.25, 0.125, 1.0, 2.0])
    texts = [f"caption {i}" for i in range(5)]
    figure = plots.reconstruction_grid(
        columns, texts, {"reconstructed": errors}, "error {:.3f}", "take-away"
    )
    axes = np.reshape(shown(figure, 5 * 3), (5, 3))
    for row in range(5):
        for ax, images in zip(axes[row], reconstructed, strict=True):
            assert np.array_equal(ax.images[0].get_array(), images[row].permute(1, 2, 0))
    assert [ax.get_title() for ax in axes[0]] == list(columns)
    assert [ax.get_title() for ax in axes[1:].ravel()] == [""] * 12
    assert [ax.get_ylabel() for ax in axes[:, 0]] == texts
    numbers = [[ax.get_xlabel() for ax in line] for line in axes]
    assert numbers[2] == ["", "", "error 0.125"] and numbers[4][2] == "error 2.000"
    shown(plots.reconstruction_grid({"only": reconstructed[0][:1]}), 1)


def test_a_strip_is_three_rows_with_gaps(reconstructed):
    """Every pixel is at its position, and the rest is gap."""
    pixels, gap = plots.strip(*reconstructed), 2
    assert pixels.shape == (3, 3 * 64 + 2 * gap, 5 * 64 + 4 * gap) and pixels.dtype == torch.uint8
    gaps = torch.ones(pixels.shape, dtype=torch.bool)
    for y, images in enumerate(reconstructed):
        for x, image in enumerate(images):
            down, right = y * (64 + gap), x * (64 + gap)
            inside = (slice(None), slice(down, down + 64), slice(right, right + 64))
            assert torch.equal(pixels[inside], image)
            gaps[inside] = False
    assert (pixels[gaps] == 128).all() and gaps[0, 64].all() and gaps[0, :, 64].all()


def test_images_that_cannot_be_compared_are_refused(reconstructed):
    pixels, left, back = reconstructed
    with pytest.raises(ValueError, match=r"'masked' are \(3, 3, 64, 64\), the first .*5, 3, 64"):
        plots.strip(pixels, left[:3], back)
    with pytest.raises(ValueError, match=r"'reconstructed' are torch.float32, not uint8"):
        plots.strip(pixels, left, back / 255)
    with pytest.raises(ValueError, match="name at least one"):
        plots.reconstruction_grid({})


def test_training_is_shown_from_top_to_bottom(reconstructed):
    """One named row for each moment, at the middle of its images."""
    names = ["original", "masked", "epoch 1", "epoch 2"]
    strips = dict(zip(names, [*reconstructed, reconstructed[0]], strict=True))
    (ax,) = shown(plots.over_training(strips, "take-away"), 1)
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    whole = ax.images[0].get_array()
    assert np.array_equal(whole[: 3 * 66 - 2], plots.strip(*reconstructed).permute(1, 2, 0))
    assert np.array_equal(whole[3 * 66 :], whole[:64])
    np.testing.assert_allclose(ax.get_yticks(), [31.5 + 66 * row for row in range(4)])


GUESSES = [("dog", 0.5), ("cat", 0.25), ("man", 0.1), ("sun", 0.05), ("hat", 0.001)]


def test_the_right_guess_is_marked(reconstructed):
    """By a sign and by weight, not by colour alone; a truth that was not guessed is named."""
    tokens = [("[CLS]", "end"), ("[mask]", "mask"), ("and", "visible"), ("sky", "dropped")]
    guesses = [
        {"position": 1, "truth": "cat", "top": GUESSES},
        {"position": 3, "truth": "sky", "top": GUESSES},
    ]
    entries = [{"tokens": tokens, "guesses": guesses}, {"tokens": tokens[:1], "guesses": []}]
    figure = plots.token_guesses(entries, caption="take-away")
    shown(figure, 0)
    ax = figure.axes[0]
    words = [text.get_text() for text in ax.texts]
    assert words[:5] == [*(token for token, _ in tokens), "1"]  # and the position of the first
    first, second = words.index("1: “cat”"), words.index("3: “sky”, not among them")
    percent = ["50 %", "25 %", "10 %", "5 %", "<1 %"]
    plain = [w for (token, _), p in zip(GUESSES, percent, strict=True) for w in (token, p)]
    assert words[first + 1 : second] == [*plain[:2], "✓", *plain[2:], "3"]
    assert words[second + 1 :] == plain
    bold = [text.get_text() for text in ax.texts if text.get_weight() == "bold"]
    assert bold == ["✓", "cat", "25 %"]
    assert len(ax.lines) == 1  # the dropped token is struck out
    widths = np.array([bar.get_width() for bar in ax.patches]).reshape(2, 5, 2)  # track, bar
    np.testing.assert_allclose(widths[..., 1] / widths[..., 0], [[p for _, p in GUESSES]] * 2)
    colours = {bar.get_facecolor() for bar in ax.patches[1::2]}
    assert len(colours) == 2 and ax.patches[3].get_facecolor() != ax.patches[1].get_facecolor()
    beside = plots.token_guesses(entries, reconstructed[0][:2])
    images = [ax for ax in shown(beside, 2) if ax.images]
    assert np.array_equal(images[1].images[0].get_array(), reconstructed[0][1].permute(1, 2, 0))
    guesses[0]["position"] = 4
    with pytest.raises(ValueError, match="position 4, but the caption has tokens 0-3"):
        plots.token_guesses(entries)


def test_long_captions_and_many_guesses_stay_on_the_page():
    """All text lies inside its axes, and no two texts overlap."""
    tokens = [(word, "visible") for word in "a ##ridiculously longish caption of words".split() * 6]
    guesses = [{"position": i, "truth": "a", "top": GUESSES} for i in range(0, 36, 4)]
    figure = plots.token_guesses([{"tokens": tokens, "guesses": guesses}])
    shown(figure, 0)
    (ax,) = figure.axes
    page = ax.get_window_extent()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert all(page.x0 <= b.x0 and b.x1 <= page.x1 for b in boxes)
    assert all(page.y0 <= b.y0 and b.y1 <= page.y1 for b in boxes)
    assert [b for i, b in enumerate(boxes) if any(b.overlaps(o) for o in boxes[:i])] == []


def gradient_records(count):
    """Image tower: two terms; text tower: one, at every other step. Validation has none."""
    for step in range(count):
        record = {"step": 10 * step, "split": "train"}
        record |= {f"gradient_norm/image/{t}": n + step for t, n in (("mim", 1), ("mlm", 2))}
        record |= {"gradient_cosine/image/mim·mlm": 0.02 - 0.4 * (step % 2)}
        yield record | ({"gradient_norm/text/mlm": 3.0} if step % 2 else {})
        yield {"step": 10 * step, "split": "val", "loss": 1.0}


def test_the_terms_of_the_loss_conflict_below_zero():
    """A row for each tower that was measured; norms on a logarithmic axis, zero marked."""
    axes = shown(plots.term_gradients(list(gradient_records(5)), "take-away"), 4)
    (mim, mlm), (cosine, zero) = axes[0].lines, axes[1].lines
    assert list(mlm.get_xdata()) == [0, 10, 20, 30, 40]
    assert list(mim.get_ydata()) == [1, 2, 3, 4, 5] and mim.get_label() == "mim"
    assert axes[0].get_yscale() == "log" and labels(axes[0])[1].startswith("image tower")
    np.testing.assert_allclose(cosine.get_ydata(), [0.02, -0.38, 0.02, -0.38, 0.02])
    assert list(zero.get_ydata()) == [0, 0] and sum(axes[1].get_ylim()) == 0
    assert "below 0: the terms conflict" in [text.get_text() for text in axes[1].texts]
    (line,) = axes[2].lines
    assert list(line.get_xdata()) == [10, 30] and labels(axes[2])[1].startswith("text tower")
    assert line.get_color() == mlm.get_color() != mim.get_color()
    with pytest.raises(ValueError, match="gradient_norm/<tower>/<term>"):
        plots.term_gradients([{"step": 1, "loss": 2.0}])


def test_many_gradients_are_averaged_in_the_middle_of_their_window():
    axes = shown(plots.term_gradients(list(gradient_records(75))), 4)
    raw, mean = axes[0].lines[:2]
    assert len(raw.get_ydata()) == 75 and axes[0].get_title() == "thick: mean of 3 values"
    np.testing.assert_allclose(mean.get_ydata(), raw.get_ydata()[1:-1])  # a straight line
    np.testing.assert_allclose(mean.get_xdata(), raw.get_xdata()[1:-1])


def test_each_term_of_the_loss_has_its_panel():
    """Training thin, validation with points; a key that no run has is left out."""

    def made(scale):
        train = [{"split": "train", "step": s, "loss": scale * s, "mlm_loss": 7} for s in (1, 2)]
        val = {"split": "val", "step": 2, "loss": 9 * scale, "mlm_accuracy": scale / 10}
        return Run(Path("x"), [*train, val], {})

    runs = {"one": made(1), "three": made(3)}
    keys = ["loss", "mim_loss", "mlm_loss", "mlm_accuracy"]
    figure = plots.loss_terms(runs, keys, {"loss": {"chance": 5}}, "take-away")
    axes = shown(figure, 3)
    assert [labels(ax) for ax in axes] == [
        ("step", "loss, all terms"),
        ("step", "token loss (nats)"),
        ("step", "accuracy on masked tokens (fraction)"),
    ]
    curves = [list(line.get_ydata()) for line in axes[0].lines]
    assert curves == [[1, 2], [9], [3, 6], [27], [5, 5]]
    assert [text.get_text() for text in axes[0].texts] == ["chance"]
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["one", "three", "training", "validation"]
    assert labels(shown(plots.loss_terms(runs, {"loss": "sum (nats)"}), 1)[0])[1] == "sum (nats)"
    with pytest.raises(ValueError, match="no record has any of"):
        plots.loss_terms(runs, ["loss/mim"])


def test_a_report_at_a_glance():
    """A bar for what was loaded and for each reason, a mark at the model's limit."""
    report = Report("pairs.csv", rows=13, loaded=8, skipped={"missing": 3, "truncated": 2})
    report.widths, report.heights = [200, 100, 50], [100, 100, 100]
    report.caption_words, report.caption_tokens, report.max_length = [2, 5, 5], [4, 7, 9], 7
    axes = shown(plots.source_report(report, "take-away"), 4)
    assert [bar.get_width() for bar in axes[0].patches] == [2, 3, 8]  # from below
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["truncated", "missing", "loaded"]
    assert "red: skipped" in labels(axes[0])[0] and labels(axes[1]) == (
        "shorter side (px)",
        "images",
    )
    assert sum(bar.get_height() for bar in axes[1].patches) == 3
    assert axes[2].get_xscale() == "log" and labels(axes[2])[0] == "width / height"
    assert "1 are cut" in axes[3].texts[0].get_text()
    assert {b.get_x() + b.get_width() / 2 for b in axes[3].patches if b.get_height()} == {4, 7, 9}
    report.caption_tokens = []
    bars = shown(plots.source_report(report), 4)[3].patches
    assert [b.get_height() for b in bars if b.get_height()] == [1, 2]  # words


def test_groups_of_images_stand_in_lines(emoji):
    figure = plots.same_images(emoji, [[3, 4, 5], [7, 8]], "take-away", most=3)
    axes = shown(figure, 5)
    assert np.array_equal(axes[3].images[0].get_array(), emoji[7]["image"].permute(1, 2, 0))
    assert axes[1].get_title().split("\n")[0] in emoji[4]["text"]
    assert axes[1].get_title() != axes[2].get_title()
    shown(plots.same_images(emoji, []), 0)  # nothing occurs twice


def test_the_colours_are_there_for_readers():
    """Notebooks frame images in them."""
    names = "BLUE ORANGE GREEN RED PURPLE SKY".split()
    assert {getattr(plots, name) for name in names} == set(plots.COLOURS)


def test_a_figure_is_saved(tmp_path):
    path = plots.save(plots.bars({"a": 1}, "x"), tmp_path / "new" / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_plot_is_without_a_test():
    """Each public function of mm.plots is named in this file, and pyplot keeps no figure."""
    import matplotlib.pyplot as plt

    with open(__file__, encoding="utf-8") as file:
        source = file.read()
    functions = inspect.getmembers(plots, inspect.isfunction)
    own = [n for n, f in functions if n[0] != "_" and f.__module__.startswith("mmkit.plots.")]
    assert len(own) > 30
    assert [name for name in own if f"plots.{name}(" not in source] == []
    assert plt.get_fignums() == []


def test_strips_that_a_run_kept_are_read_back(tmp_path):
    """Bit for bit: the first two rows once, the third at steps spread over the run."""
    from PIL import Image

    torch.manual_seed(0)
    kept = {step: torch.randint(0, 256, (3, 5, 3, 7, 7), dtype=torch.uint8) for step in range(9)}
    (tmp_path / "reconstructions").mkdir()
    for step, parts in kept.items():
        image = Image.fromarray(plots.strip(*parts).permute(1, 2, 0).numpy())
        image.save(tmp_path / "reconstructions" / f"{step:08d}.png")
    strips = plots.read_strips(tmp_path, 3)
    assert [*strips] == ["original", "masked", "step 0", "step 4", "step 8"]
    assert torch.equal(strips["step 4"], kept[4][2]) and torch.equal(strips["masked"], kept[8][1])
    with pytest.raises(FileNotFoundError, match="no strips in"):
        plots.read_strips(tmp_path / "nowhere")


def test_terms_of_a_real_run_have_their_panels(make_model, make_data, tmp_path):
    """The figures read the keys that a trainer writes, and leave None out."""
    values = dict(mim_weight=1.0, mlm_weight=0.5, decoder_width=32, term_gradients_every=1)
    config = mm.TrainingConfig(**DEFAULTS | values, max_steps=3, output_dir=str(tmp_path))
    run = mm.train_model(config, make_data(23), make_data(9, seed=1), make_model())
    axes = plots.loss_terms({"run": run}).axes
    assert {ax.get_ylabel() for ax in axes} >= {
        "loss, all terms", "contrastive loss (nats)", "token loss (nats)"
    }  # fmt: skip
    records = [r for r in run.history if r["split"] == "terms"]
    assert len(records) == 3
    for key in records[1]:
        if key.startswith("gradient_"):
            records[1][key] = None
    curves = shown(plots.term_gradients(records), 4)[0].lines
    assert all(len(curve.get_xdata()) == 2 for curve in curves)
