"""Charts and image grids show what they were given, with labelled axes."""

import numpy as np
import pytest
import torch

import mmkit as mm
from mmkit import plots
from tests.plots.drawn import labels, shown


def test_images_and_their_captions(emoji):
    axes = shown(plots.images(emoji, range(5), columns=3, caption="take-away"), 5)
    assert axes[2].get_title().replace("\n", " ") == emoji[2]["text"]
    assert np.array_equal(axes[4].images[0].get_array(), emoji[4]["image"].permute(1, 2, 0))
    framed = plots.image_grid([emoji[0]["image"]], ["x"], frames=[plots.RED], title_lines=1)
    assert shown(framed, 1)[0].spines["top"].get_linewidth() == 2.5


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


def test_a_figure_is_saved(tmp_path):
    path = plots.save(plots.bars({"a": 1}, "x"), tmp_path / "new" / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")
