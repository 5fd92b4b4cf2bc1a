"""Every picture of the kit, as f(data) -> Figure.

Colours are safe for colour-blind readers (Okabe & Ito 2008). A figure is returned, never shown: in
a notebook the last expression of a cell displays it, elsewhere `figure.savefig(...)` writes it.
Used by every notebook.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import MultimodalDataset
from ..evaluation.retrieval import Features
from ..evaluation.search import Index
from .figures import (
    BLUE,
    COLOURS,
    GREEN,
    RED,
    SKY,
    new_figure,
    of_a_whole,
    plain_axes,
    show_picture,
    take_away,
    wrap,
    yardstick_lines,
)


def picture_grid(
    images: Sequence[Tensor],
    titles: Sequence[str],
    columns: int = 6,
    frames: Sequence[str | None] | None = None,
    caption: str = "",
    title_lines: int = 3,
):
    """Pictures (3, H, W) uint8 with titles; frames: a colour for each, or None."""
    lines = math.ceil(len(images) / columns)
    figure = new_figure(1.55 * columns, (1.63 + 0.14 * title_lines) * lines)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(images) :]:
        ax.axis("off")
    for ax, image, title, frame in zip(
        axes, images, titles, frames or [None] * len(images), strict=False
    ):
        show_picture(ax, image, wrap(title, most=title_lines), frame)
    take_away(figure, caption)
    return figure


def pictures(dataset: MultimodalDataset, rows: Sequence[int], columns: int = 6, caption: str = ""):
    """Pictures of a data set with their canonical captions."""
    items = [dataset[int(row)] for row in rows]
    return picture_grid(
        [i["image"] for i in items], [i["text"] for i in items], columns, None, caption
    )


def bars(
    values: dict[str, float],
    label: str,
    chance: float | None = None,
    caption: str = "",
    intervals: dict[str, tuple[float, float]] | None = None,
):
    """Named values as horizontal bars, each with its number; chance as a dotted line.

    intervals: (low, high) of each name, drawn as a line over its bar and written beside it. Where
    label says % and no value is above 100, intervals and axis end at 100.
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
            words = f"{width:.1f} [{a:.1f}, {b:.1f}]"
            ax.annotate(words, (b, name), (6, 0), textcoords="offset points", va="center",
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
    """Balanced accuracy of probes, {model: what `probe.probe` gave}, a bar with its 95 % interval
    for each way of seeing.

    method: "linear" or "knn". Dotted: always giving one answer. Raises ValueError where results
    tell different numbers of classes apart, so that no one chance line fits them all.
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
    told = " / ".join(sorted({result["by"] for result in results.values()}))
    figure = bars(
        {name: 100 * row["balanced_accuracy"] for name, row in rows.items()},
        f"balanced accuracy of {told}, {method} probe (%), 95 % interval",
        100 * chances.pop(),
        caption,
        {name: (100 * row["interval"][0], 100 * row["interval"][1]) for name, row in rows.items()},
    )
    above = dict(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)  # off the lowest number
    figure.axes[0].legend(fontsize=8, **above)
    return figure


def histogram(values: dict[str, Sequence[float]], label: str, caption: str = ""):
    """Whole-number values of one or several sets as step histograms (share of each set)."""
    figure = new_figure(6.5, 3)
    ax = figure.subplots()
    top = int(max(max(v) for v in values.values()))
    for colour, (name, numbers) in zip(COLOURS, values.items(), strict=False):
        share = np.full(len(numbers), 100 / len(numbers))
        ax.hist(numbers, np.arange(-0.5, top + 1.5), weights=share, histtype="step",
                linewidth=1.8, color=colour, label=f"{name} ({len(numbers):,})")  # fmt: skip
    ax.set(xlabel=label, ylabel="share of the set (%)")
    ax.legend(fontsize=8)
    plain_axes(ax)
    take_away(figure, caption)
    return figure


def similarity_matrix(
    features: Features, rows: Sequence[int], texts: Sequence[str], caption: str = ""
):
    """Cosines between pictures (rows) and their canonical captions (columns)."""
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
    ax.set(xlabel="caption", ylabel="picture of")
    figure.colorbar(drawn, ax=ax, label="cosine", shrink=0.7)
    take_away(figure, caption)
    return figure


def search_results(index: Index, queries: Sequence, k: int = 6, caption: str = ""):
    """One line per query: the query, then its k best pictures; green frame = a correct caption.

    A query is a text, or a picture (uint8 tensor (3, H, W)).
    """
    figure = new_figure(1.45 * (k + 1.4), 1.95 * len(queries))
    axes = figure.subplots(len(queries), k + 1, squeeze=False, width_ratios=[1.4] + [1] * k)
    for line, query in zip(axes, queries, strict=True):
        if isinstance(query, str):
            line[0].text(0.98, 0.5, wrap(f"“{query}”", 20, 6), ha="right", va="center", fontsize=9)
            line[0].axis("off")
        else:
            show_picture(line[0], query, "query")
        for ax, hit in zip(line[1:], index.search(query, k), strict=True):
            own = [caption.casefold() for caption in index.dataset.texts[hit.row]]
            right = isinstance(query, str) and query.casefold() in own
            title = wrap(f"{hit.score:.2f} {hit.text}", 20)
            show_picture(ax, index.dataset[hit.row]["image"], title, GREEN if right else None)
    take_away(figure, caption)
    return figure


def grouped_bars(values: dict[str, dict[str, float]], label: str, caption: str = ""):
    """One cluster of bars per outer name, one bar per inner name, each with its number."""
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
    x: Sequence[float],
    values: dict[str, Sequence[Sequence[float]]],
    xlabel: str,
    ylabel: str,
    chance: Sequence[float] | None = None,
    log_x: bool = False,
    caption: str = "",
):
    """Quantities measured several times at each x: each a short bar, a line through the means.

    values: for each name one sequence of measurements per x. chance: the yardstick at each x.
    """
    figure = new_figure(6.5, 3.4)
    ax = figure.subplots()
    for colour, (name, columns) in zip(COLOURS, values.items(), strict=False):
        means = [float(np.mean(column)) for column in columns]
        for place, column in zip(x, columns, strict=True):
            ax.plot([place] * len(column), column, "_", color=colour, alpha=0.4, markersize=13)
        ax.plot(x, means, "-o", color=colour, linewidth=1.8, markersize=4, label=name)
        for place, mean in zip(x, means, strict=True):
            ax.annotate(f"{mean:.0f}", (place, mean), (5, 5), textcoords="offset points",
                        fontsize=8, color=colour)  # fmt: skip
    if chance is not None:
        ax.plot(x, chance, ":", color=RED, label="chance")
    if log_x:
        ax.set_xscale("log")
        ax.minorticks_off()
    ax.set_xticks(x, [f"{place:,}" for place in x])
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    ax.legend(fontsize=8)
    plain_axes(ax)
    take_away(figure, caption)
    return figure


def confusion_matrix(counts: Tensor, names: Sequence[str], caption: str = ""):
    """Counts (true class, predicted class): colours are shares of the row, numbers pictures."""
    counts = torch.as_tensor(counts)
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = new_figure(6.6, 5)
    ax = figure.subplots()
    drawn = ax.imshow(shares.numpy(), cmap="cividis", vmin=0, vmax=100)
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            colour = "black" if shares[i, j] > 55 else "white"
            ax.text(j, i, f"{count:.0f}", ha="center", va="center", fontsize=8, color=colour)
    ticks = range(len(names))
    ax.set_xticks(ticks, names, rotation=35, ha="right", fontsize=8)
    sizes = counts.sum(1).tolist()
    ax.set_yticks(ticks, [f"{n} ({s:.0f})" for n, s in zip(names, sizes, strict=True)], fontsize=8)
    ax.set(xlabel="predicted", ylabel="true (pictures)")
    figure.colorbar(drawn, ax=ax, label="share of the row (%)", shrink=0.8)
    take_away(figure, caption)
    return figure


def differences(arrays: dict[str, Tensor], xlabel: str, ylabel: str, caption: str = ""):
    """|difference| of two computations, each (rows, columns), side by side on one colour scale."""
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
    """Write a figure (PNG, 130 dots per inch); returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


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
    yardsticks: dict[str, float] | None = None,
    bands: bool = False,
):
    """Named curves {name: (xs, ys)} on one pair of axes.

    level: a named dotted yardstick, in the legend. yardsticks: several, with their names on them.
    reference: curves to compare with, dotted and grey. intervals: (low, high) of the curves of
    these names, drawn as bars, or as areas if `bands`; parts of a whole in per cent end at 100.
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
    yardstick_lines(ax, yardsticks)
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
    """One curve; its interval (low, high) as an area, or as bars `aside`, to be told apart."""
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
