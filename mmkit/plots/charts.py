"""Charts and image grids: functions of data that return a Figure.

Colours are safe for colour-blind readers (Okabe & Ito 2008). A figure is returned, never shown: in
a notebook the last expression of a cell displays it, elsewhere `figure.savefig(...)` writes it. The
argument `caption` is a text below the figure. Used by every notebook.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import MultimodalDataset
from ..evaluation.features import Features
from ..evaluation.search import Index
from ..older_names import older_arguments
from .figures import (
    BLUE,
    COLOURS,
    GREEN,
    RED,
    SKY,
    new_figure,
    of_a_whole,
    plain_axes,
    reference_lines,
    show_image,
    take_away,
    wrap,
)


def image_grid(
    images: Sequence[Tensor],
    titles: Sequence[str],
    columns: int = 6,
    frames: Sequence[str | None] | None = None,
    caption: str = "",
    title_lines: int = 3,
):
    """Show images in a grid, each with a title.

    Args:
        images: tensors (3, H, W) uint8.
        titles, title_lines: a text per image, and how many lines of it are shown.
        columns: images per row.
        frames: a colour or None per image; None: no frames.
        caption: text below the figure.
    Returns:
        A Figure.
    Example:
        >>> batch = data.batch(range(7))
        >>> figure = mm.plots.image_grid(batch.pixel_values, [f"row {i}" for i in range(7)])
        >>> path = mm.plots.save(figure, "images.png")
    """
    lines = math.ceil(len(images) / columns)
    figure = new_figure(1.55 * columns, (1.63 + 0.14 * title_lines) * lines)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(images) :]:
        ax.axis("off")
    for ax, image, title, frame in zip(
        axes, images, titles, frames or [None] * len(images), strict=False
    ):
        show_image(ax, image, wrap(title, most=title_lines), frame)
    take_away(figure, caption)
    return figure


def images(dataset: MultimodalDataset, rows: Sequence[int], columns: int = 6, caption: str = ""):
    """Show images of a data set with their canonical captions.

    Args:
        dataset, rows: which images.
        columns, caption: as in `image_grid`.
    Returns:
        A Figure.
    """
    items = [dataset[int(row)] for row in rows]
    return image_grid(
        [i["image"] for i in items], [i["text"] for i in items], columns, None, caption
    )


def bars(
    values: dict[str, float],
    label: str,
    chance: float | None = None,
    caption: str = "",
    intervals: dict[str, tuple[float, float]] | None = None,
):
    """Draw named values as horizontal bars, each with its number.

    Args:
        values: name -> value, from top to bottom.
        label: of the axis, with the unit. Where it says % and all values are within 0 and 100,
            intervals and axis end at 100.
        chance: the level of a dotted line, or None.
        caption: text below the figure.
        intervals: name -> (low, high), drawn as a line over its bar and written beside it, or None.
    Returns:
        A Figure.
    """
    figure = new_figure(7, 0.42 * len(values) + 0.9)
    ax = figure.subplots()
    names = list(values)[::-1]
    widths = [values[n] for n in names]
    whole = of_a_whole(label, widths)
    if intervals:
        edges = np.array([intervals[n] for n in names])
        low, high = (edges.clip(0, 100) if whole else edges).T
        ax.barh(names, widths, color=SKY, height=0.65)
        ax.errorbar(widths, names, xerr=[widths - low, high - widths], fmt="none", color="0.2",
                    capsize=3)  # fmt: skip
        for name, width, a, b in zip(names, widths, low, high, strict=True):
            number = f"{width:.1f} [{a:.1f}, {b:.1f}]"
            ax.annotate(number, (b, name), (6, 0), textcoords="offset points", va="center",
                        fontsize=8)  # fmt: skip
    else:
        drawn = ax.barh(names, widths, color=BLUE, height=0.65)
        ax.bar_label(drawn, fmt="%.1f", padding=3, fontsize=8)
    if chance is not None:
        ax.axvline(chance, color=RED, linestyle=":", label=f"chance {chance:.1f}")
        ax.legend(fontsize=8, loc="lower right")
    ax.set_xlabel(label)
    ax.margins(x=0.3 if intervals else 0.1)
    ax.set_xlim(left=0)
    if whole:
        ax.set_xticks([tick for tick in ax.get_xticks() if tick <= 100], minor=False)
    plain_axes(ax)
    take_away(figure, caption)
    return figure


def probes(results: dict[str, dict], method: str = "linear", caption: str = ""):
    """Draw the balanced accuracy of probes with its 95 % interval, a bar per model and mask.

    Args:
        results: name of a model -> what `probe.probe` returned.
        method: "linear" or "knn".
        caption: text below the figure.
    Returns:
        A Figure; the dotted line is the accuracy of always giving one answer.
    Raises:
        ValueError: the results have different numbers of classes, so that no chance line fits all.
    """
    rows = {
        f"{model}, {name}": read[method]
        for model, result in results.items()
        for name, read in result["rows"].items()
    }
    chances = {row["chance"] for row in rows.values()}
    if len(chances) != 1:
        counts = sorted(round(1 / chance) for chance in chances)
        raise ValueError(f"results with {counts} classes; draw those of one test set and one label")
    classes = " / ".join(sorted({result["by"] for result in results.values()}))
    figure = bars(
        {name: 100 * row["balanced_accuracy"] for name, row in rows.items()},
        f"balanced accuracy of {classes}, {method} probe (%), 95 % interval",
        100 * chances.pop(),
        caption,
        {name: (100 * row["interval"][0], 100 * row["interval"][1]) for name, row in rows.items()},
    )
    above = dict(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)  # clear of the numbers
    figure.axes[0].legend(fontsize=8, **above)
    return figure


def histogram(values: dict[str, Sequence[float]], label: str, caption: str = ""):
    """Draw integer values of one or several sets as step histograms.

    Args:
        values: name of a set -> its values; the histogram is in per cent of the set.
        label: of the horizontal axis, with the unit.
        caption: text below the figure.
    Returns:
        A Figure.
    """
    figure = new_figure(6.5, 3)
    ax = figure.subplots()
    top = int(max(max(v) for v in values.values()))
    for colour, (name, numbers) in zip(COLOURS, values.items(), strict=False):
        fraction = np.full(len(numbers), 100 / len(numbers))
        ax.hist(numbers, np.arange(-0.5, top + 1.5), weights=fraction, histtype="step",
                linewidth=1.8, color=colour, label=f"{name} ({len(numbers):,})")  # fmt: skip
    ax.set(xlabel=label, ylabel="fraction of the set (%)")
    ax.legend(fontsize=8)
    plain_axes(ax)
    take_away(figure, caption)
    return figure


def similarity_matrix(
    features: Features, rows: Sequence[int], texts: Sequence[str], caption: str = ""
):
    """Show the cosines between images (rows) and their canonical captions (columns).

    Args:
        features: of a data set, from `embed`.
        rows, texts: which images, and their names on both axes.
        caption: text below the figure.
    Returns:
        A Figure.
    """
    picked = torch.as_tensor(rows)
    captions = features.text_features[features.first_caption[picked]]
    scores = (features.image_features[picked] @ captions.T).numpy()
    side = 0.36 * len(rows) + 2.8
    figure = new_figure(side + 1.2, side)
    ax = figure.subplots()
    drawn = ax.imshow(scores, cmap="cividis")
    ticks = range(len(rows))
    ax.set_xticks(ticks, [wrap(t, 40) for t in texts], rotation=90, fontsize=8)
    ax.set_yticks(ticks, [wrap(t, 40) for t in texts], fontsize=8)
    ax.set(xlabel="caption", ylabel="image of")
    figure.colorbar(drawn, ax=ax, label="cosine", shrink=0.7)
    take_away(figure, caption)
    return figure


def search_results(index: Index, queries: Sequence, k: int = 6, caption: str = ""):
    """Show each query and, beside it, its k best images with their cosines.

    Args:
        index: the images that are searched.
        queries: texts or images (uint8 tensors (3, H, W)).
        k: results per query.
        caption: text below the figure.
    Returns:
        A Figure; an image has a green frame where the query is one of its captions.
    """
    figure = new_figure(1.45 * (k + 1.4), 1.95 * len(queries))
    axes = figure.subplots(len(queries), k + 1, squeeze=False, width_ratios=[1.4] + [1] * k)
    for line, query in zip(axes, queries, strict=True):
        if isinstance(query, str):
            line[0].text(0.98, 0.5, wrap(f"“{query}”", 20, 6), ha="right", va="center", fontsize=9)
            line[0].axis("off")
        else:
            show_image(line[0], query, "query")
        for ax, hit in zip(line[1:], index.search(query, k), strict=True):
            own = [caption.casefold() for caption in index.dataset.texts[hit.row]]
            correct = isinstance(query, str) and query.casefold() in own
            title = wrap(f"{hit.score:.2f} {hit.text}", 20)
            show_image(ax, index.dataset[hit.row]["image"], title, GREEN if correct else None)
    take_away(figure, caption)
    return figure


def grouped_bars(values: dict[str, dict[str, float]], label: str, caption: str = ""):
    """Draw groups of bars, each bar with its number.

    Args:
        values: name of a group -> {name of a bar: value}.
        label: of the vertical axis, with the unit.
        caption: text below the figure.
    Returns:
        A Figure.
    """
    figure = new_figure(7.2, 3.3)
    ax = figure.subplots()
    names = list(next(iter(values.values())))
    width = 0.8 / len(names)
    for i, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        x = np.arange(len(values)) + (i - (len(names) - 1) / 2) * width
        heights = [inner[name] for inner in values.values()]
        drawn = ax.bar(x, heights, width * 0.92, color=colour, label=name)
        ax.bar_label(drawn, fmt="%.0f", padding=2, fontsize=8)
    ax.set_xticks(range(len(values)), list(values))
    ax.set_ylabel(label)
    ax.legend(
        fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(names), frameon=False
    )
    plain_axes(ax)
    ax.grid(visible=False, axis="x")
    take_away(figure, caption)
    return figure


def repeats(
    x: Sequence[float], values: dict[str, Sequence[Sequence[float]]], xlabel: str, ylabel: str,
    chance: Sequence[float] | None = None, log_x: bool = False, caption: str = "",
):  # fmt: skip
    """Draw quantities measured several times at each x, and a line through their means.

    Args:
        x, values: positions, and name -> one sequence of measurements per position.
        xlabel, ylabel, log_x: of the axes, with the unit; a logarithmic horizontal axis.
        chance: the reference line at each x, or None.
        caption: text below the figure.
    Returns:
        A Figure.
    """
    figure = new_figure(6.5, 3.4)
    ax = figure.subplots()
    for colour, (name, columns) in zip(COLOURS, values.items(), strict=False):
        means = [float(np.mean(column)) for column in columns]
        for position, column in zip(x, columns, strict=True):
            ax.plot([position] * len(column), column, "_", color=colour, alpha=0.4, markersize=13)
        ax.plot(x, means, "-o", color=colour, linewidth=1.8, markersize=4, label=name)
        for position, mean in zip(x, means, strict=True):
            ax.annotate(f"{mean:.0f}", (position, mean), (5, 5), textcoords="offset points",
                        fontsize=8, color=colour)  # fmt: skip
    if chance is not None:
        ax.plot(x, chance, ":", color=RED, label="chance")
    if log_x:
        ax.set_xscale("log")
        ax.minorticks_off()
    ax.set_xticks(x, [f"{position:,}" for position in x])
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    ax.legend(fontsize=8)
    plain_axes(ax)
    take_away(figure, caption)
    return figure


def confusion_matrix(counts: Tensor, names: Sequence[str], caption: str = ""):
    """Draw a confusion matrix: the numbers are images, the colours fractions of the row.

    Args:
        counts: (C, C), true class by predicted class.
        names: of the C classes.
        caption: text below the figure.
    Returns:
        A Figure.
    """
    counts = torch.as_tensor(counts)
    fractions = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = new_figure(6.6, 5)
    ax = figure.subplots()
    drawn = ax.imshow(fractions.numpy(), cmap="cividis", vmin=0, vmax=100)
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            colour = "black" if fractions[i, j] > 55 else "white"
            ax.text(j, i, f"{count:.0f}", ha="center", va="center", fontsize=8, color=colour)
    ticks = range(len(names))
    ax.set_xticks(ticks, names, rotation=35, ha="right", fontsize=8)
    sizes = counts.sum(1).tolist()
    ax.set_yticks(ticks, [f"{n} ({s:.0f})" for n, s in zip(names, sizes, strict=True)], fontsize=8)
    ax.set(xlabel="predicted", ylabel="true (images)")
    figure.colorbar(drawn, ax=ax, label="fraction of the row (%)", shrink=0.8)
    take_away(figure, caption)
    return figure


def differences(arrays: dict[str, Tensor], xlabel: str, ylabel: str, caption: str = ""):
    """Show absolute differences of computations side by side, on one colour scale.

    Args:
        arrays: name -> differences (rows, columns).
        xlabel, ylabel: of the axes.
        caption: text below the figure.
    Returns:
        A Figure.
    """
    figure = new_figure(4.2 * len(arrays) + 0.6, 2.9)
    axes = figure.subplots(1, len(arrays), squeeze=False)[0]
    top = max(float(array.abs().max()) for array in arrays.values()) or 1.0
    for ax, (name, array) in zip(axes, arrays.items(), strict=True):
        drawn = ax.imshow(array.abs().numpy(), cmap="cividis", vmin=0, vmax=top, aspect="auto")
        ax.set_title(f"{name}\nlargest {float(array.abs().max()):.2g}", fontsize=9)
        ax.set(xlabel=xlabel, ylabel=ylabel)
    figure.colorbar(drawn, ax=axes, label="|difference|")
    take_away(figure, caption)
    return figure


def save(figure, path: str | Path) -> Path:
    """Write a figure as a file, at 130 dots per inch.

    Args:
        figure, path: what to write, and where; missing folders are made.
    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


@older_arguments(yardsticks="references")
def lines(  # noqa: PLR0913 (by name)
    curves: dict[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    level: tuple[str, float] | None = None,
    caption: str = "",
    *,
    from_zero: bool = True,
    reference: dict[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    intervals: dict[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    references: dict[str, float] | None = None,
    bands: bool = False,
):
    """Draw named curves on one pair of axes.

    Args:
        curves: name -> (xs, ys).
        xlabel, ylabel, from_zero: of the axes, with the unit; the vertical axis begins at 0.
        level, references: a dotted horizontal line (name, value) in the legend, or several with
            their names on them.
        caption: text below the figure.
        reference: curves to compare with, dotted and grey.
        intervals, bands: name of a curve -> (low, high), drawn as bars or as areas; parts of a
            whole in per cent end at 100.
    Returns:
        A Figure.
    """
    many = len(curves) > 6
    figure = new_figure(8 if many else 6.5, 4 if many else 3.2)
    ax = figure.subplots()
    for shade, (name, (xs, ys)) in zip(("0.2", "0.55"), (reference or {}).items(), strict=False):
        ax.plot(xs, ys, color=shade, linewidth=1.6, linestyle=":", label=name)
    whole = of_a_whole(ylabel, [y for _, ys in curves.values() for y in ys])
    for i, (name, (xs, ys)) in enumerate(curves.items()):
        colour = (*COLOURS, "black", "0.55")[i % 8]  # the last two are dashed as well
        style: dict = dict(color=colour, linestyle="-" if i % 8 < 6 else "--", label=name)
        style |= dict(linewidth=1.8, marker="." if len(xs) < 30 else None)
        aside = 0.006 * (max(xs) - min(xs)) * (i - len(curves) / 2)
        interval = (intervals or {}).get(name)
        _curve(ax, xs, ys, interval, bands, aside, whole, style)
    if level:
        ax.axhline(level[1], color="0.5", linestyle=":", label=level[0])
    reference_lines(ax, references)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if from_zero:
        ax.set_ylim(bottom=0)
    if len(curves) > 1 or level or reference:
        beside = dict(loc="center left", bbox_to_anchor=(1, 0.5), handlelength=3) if many else {}
        ax.legend(fontsize=8, **beside)
    plain_axes(ax)
    take_away(figure, caption)
    return figure


def _curve(ax, xs, ys, interval, bands: bool, aside: float, whole: bool, style: dict) -> None:
    """One curve; its interval (low, high) as an area, or as bars shifted by `aside`."""
    if interval is None:
        ax.plot(xs, ys, **style)
        return
    low, high = np.clip(interval, 0, 100) if whole else np.asarray(interval)
    if bands:
        ax.plot(xs, ys, **style)
        ax.fill_between(xs, low, high, color=style["color"], alpha=0.2, linewidth=0)
        return
    spread = np.array([np.asarray(ys) - low, high - np.asarray(ys)])
    ax.errorbar(np.asarray(xs) + aside, ys, spread, capsize=2, **style)
