"""Figures of a data source: skipped rows, image sizes, caption lengths, duplicates.

Used by notebooks/08_your_own_images.ipynb and `python -m mmkit inspect`.
"""

from collections.abc import Sequence

import numpy as np

from ..data.dataset import MultimodalDataset
from ..data.report import Report
from .figures import BLUE, GREEN, ORANGE, RED, new_figure, plain_axes, show_image, take_away, wrap

ASPECTS = (0.05, 0.1, 0.2, 0.33, 0.5, 0.75, 1, 1.33, 2, 3, 5, 10, 20)  # marked on their axis


def source_report(report: Report, caption: str = ""):
    """Summarise a `Report`: rows by outcome, image sizes, aspect ratios and caption lengths.

    Args:
        report: what `mm.inspect` returns.
        caption: text below the figure.
    Returns:
        A Figure.
    """
    figure = new_figure(9.5, 5.4)
    axes = figure.subplots(2, 2)
    _rows(axes[0, 0], report)
    _histogram(axes[0, 1], np.minimum(report.widths, report.heights), "shorter side (px)", BLUE)
    _histogram(axes[1, 0], report.aspects, "width / height", GREEN, log=True)
    ax = axes[1, 1]
    if len(report.caption_tokens):
        _whole_numbers(
            ax, report.caption_tokens, "caption length (tokens, [CLS] and [SEP] included)", ORANGE
        )
        ax.axvline(report.max_length + 0.5, color=RED, linestyle=":")
        text = f" limit {report.max_length}: {report.cut_captions:,} are cut "
        right = report.max_length > np.mean(ax.get_xlim())
        where = dict(rotation=90, va="top", ha="right" if right else "left", fontsize=8, color=RED)
        ax.text(report.max_length + 0.5, ax.get_ylim()[1], text, **where)
    else:
        _whole_numbers(ax, report.caption_words, "caption length (words)", ORANGE)
    take_away(figure, caption)
    return figure


def _rows(ax, report: Report):
    """A bar for the loaded rows and for each reason of skipping."""
    kinds = {"loaded": report.loaded} | dict(
        sorted(report.skipped.items(), key=lambda pair: -pair[1])[:8]
    )
    names = list(kinds)[::-1]
    counts = [kinds[name] for name in names]
    colours = [BLUE if name == "loaded" else RED for name in names]
    ax.barh(names, counts, color=colours, height=0.65)
    for y, count in enumerate(counts):
        ax.annotate(f"{count:,}", (count, y), (3, 0), textcoords="offset points", va="center",
                    fontsize=8)  # fmt: skip
    ax.margins(x=0.15)
    plain_axes(ax)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("rows (red: skipped, by reason)")


def _histogram(ax, values, label: str, colour: str, log: bool = False):
    values = np.asarray(values, float)
    if len(values):
        low, high = values.min(), values.max()
        low, high = (low * 0.95, high * 1.05) if low == high else (low, high)
        bins = np.geomspace(low, high, 31) if log else np.linspace(low, high, 31)
        ax.hist(values, bins=bins, color=colour)
    if log and len(values):
        ax.set_xscale("log")
        ticks = [tick for tick in ASPECTS if low <= tick <= high]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
    ax.set(xlabel=label, ylabel="images")
    plain_axes(ax)


def _whole_numbers(ax, values, label: str, colour: str):
    values = np.asarray(values, int)
    counts = np.bincount(values) if len(values) else np.zeros(1)
    ax.bar(np.arange(len(counts)), counts, width=0.9, color=colour)
    ax.set(xlabel=label, ylabel="captions")
    plain_axes(ax)


def same_images(
    dataset: MultimodalDataset, groups: Sequence[Sequence[int]], caption: str = "", most: int = 6
):
    """Show groups of rows with the same or nearly the same image, a line per group.

    Args:
        dataset: the images.
        groups: rows of each group.
        caption: text below the figure.
        most: images shown of a group, at most.
    Returns:
        A Figure.
    """
    figure = new_figure(1.6 * most, 1.9 * max(1, len(groups)))
    axes = figure.subplots(max(1, len(groups)), most, squeeze=False)
    for ax in axes.ravel():
        ax.axis("off")
    for line, rows in zip(axes, groups, strict=False):
        for ax, row in zip(line, rows, strict=False):
            ax.axis("on")
            item = dataset[int(row)]
            show_image(ax, item["image"], wrap(item["text"], 24, most=2))
    take_away(figure, caption)
    return figure
