"""Figures of a data source show its rows, sizes and duplicates."""

import numpy as np

from mmkit import plots
from mmkit.data.report import Report
from tests.plots.drawn import labels, shown


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
