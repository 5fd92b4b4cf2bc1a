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

from .data import MultimodalDataset
from .masks import Masking
from .patches import patchify, unpatchify
from .retrieval import Features, Index

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY)
HIDDEN = 208  # the grey of a hidden patch


def _figure(width: float, height: float):
    """An empty figure in inches that pyplot does not keep, so that it is displayed exactly once."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(figure)
    return figure


def _take_away(figure, words: str):
    if words:
        figure.supxlabel(words, fontsize=9, style="italic", color="0.3", wrap=True)


def _plain_axes(ax):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)


def _wrap(words: str, width: int = 22, most: int = 3) -> str:
    import textwrap

    lines = textwrap.wrap(words, width)
    return "\n".join(lines[:most] + (["…"] if len(lines) > most else []))


def _show(ax, picture: Tensor, title: str = "", frame: str | None = None):
    """One picture (3, H, W) uint8 on an axis without ticks."""
    ax.imshow(np.asarray(picture).transpose(1, 2, 0), interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_edgecolor(frame or "0.85")
        spine.set_linewidth(2.5 if frame else 0.5)
    ax.set_title(title, fontsize=8)


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
    figure = _figure(1.55 * columns, (1.63 + 0.14 * title_lines) * lines)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(images) :]:
        ax.axis("off")
    for ax, image, title, frame in zip(
        axes, images, titles, frames or [None] * len(images), strict=False
    ):
        _show(ax, image, _wrap(title, most=title_lines), frame)
    _take_away(figure, caption)
    return figure


def pictures(dataset: MultimodalDataset, rows: Sequence[int], columns: int = 6, caption: str = ""):
    """Pictures of a data set with their canonical captions."""
    items = [dataset[int(row)] for row in rows]
    return picture_grid(
        [i["image"] for i in items], [i["text"] for i in items], columns, None, caption
    )


def paint_mask(pixels: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """Pictures (B, 3, H, W) uint8 with the hidden patches grey; mask (B, N) True = hidden."""
    grid = (pixels.shape[2] // patch_size, pixels.shape[3] // patch_size)
    patches = patchify(pixels, patch_size)
    return unpatchify(patches.masked_fill(mask[..., None], HIDDEN), patch_size, grid)


def masked_pictures(
    pixels: Tensor, maskings: dict[str, Masking | None], patch_size: int, caption: str = ""
):
    """Rows: what the encoder is given under each masking (None = everything); columns: pictures."""
    count = len(pixels)
    figure = _figure(1.35 * count + 0.6, 1.4 * len(maskings) + 0.4)
    axes = np.atleast_2d(figure.subplots(len(maskings), count, squeeze=False))
    for line, (name, masking) in zip(axes, maskings.items(), strict=True):
        seen = pixels if masking is None else paint_mask(pixels, masking.mask, patch_size)
        for ax, picture in zip(line, seen, strict=True):
            _show(ax, picture)
        line[0].set_ylabel(name, fontsize=9)
    _take_away(figure, caption)
    return figure


def masked_captions(
    pieces: Sequence[Sequence[str]],
    masks: Sequence[Sequence[bool]],
    mode: str = "replace",
    caption="",
):
    """Captions as rows of word pieces; hidden ones struck out ("drop") or replaced ("replace")."""
    figure = _figure(8, 0.36 * len(pieces) + 0.5)
    ax = figure.subplots()
    ax.set_xlim(0, 100)
    ax.set_ylim(len(pieces), 0)
    ax.axis("off")
    for y, (words, hidden) in enumerate(zip(pieces, masks, strict=True)):
        x = 0.0
        for word, gone in zip(words, hidden, strict=True):
            shown = "[mask]" if gone and mode == "replace" else word
            colour = ORANGE if gone else "0.93" if word.startswith("[") else SKY
            box = dict(boxstyle="round,pad=0.25", facecolor=colour, edgecolor="none", alpha=0.75)
            style = dict(fontsize=9, family="monospace", va="center", bbox=box)
            ax.text(x + 0.5, y + 0.5, shown, **style, alpha=0.35 if gone and mode == "drop" else 1)
            wide = 1.05 * len(shown)
            if gone and mode == "drop":
                ax.plot([x + 0.2, x + wide + 0.6], [y + 0.5, y + 0.5], color=RED, linewidth=1.4)
            x += wide + 2.0
    _take_away(figure, caption)
    return figure


def training_curves(
    runs: dict, x: str = "step", k: int = 1, chance_negatives: int | None = None, caption: str = ""
):
    """Loss and Recall@K of runs ({name: Run}) beside their yardsticks: ln(negatives) and chance.

    x: "step" or "minutes". chance_negatives: pairs in a training batch; its logarithm is the loss
    of guessing. Thin: training loss; thick: validation (one pool, so its chance line is another).
    """
    figure = _figure(9, 3.6)
    left, right = figure.subplots(1, 2)

    def xs(records):
        return [r["seconds"] / 60 if x == "minutes" else r["step"] for r in records]

    for colour, (name, run) in zip(COLOURS, runs.items(), strict=False):
        train = [r for r in run.history if r["split"] == "train"]
        val = [r for r in run.history if r["split"] == "val"]
        left.plot(xs(train), [r["loss"] for r in train], color=colour, linewidth=0.8, alpha=0.55)
        left.plot(xs(val), [r["loss"] for r in val], color=colour, linewidth=2, label=name)
        if val and f"image_to_text_R@{k}" in val[0]:
            recall = [50 * (r[f"image_to_text_R@{k}"] + r[f"text_to_image_R@{k}"]) for r in val]
            right.plot(xs(val), recall, color=colour, linewidth=2, marker=".", label=name)
    if chance_negatives:
        chance = math.log(chance_negatives)
        left.axhline(chance, color="0.5", linestyle=":", linewidth=1)
        where = dict(xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        left.annotate(f"guessing: ln({chance_negatives}) = {chance:.2f}", (0.99, chance), **where)
    left.set(
        xlabel=x, ylabel="loss (nats)", title="thin: training, thick: validation", ylim=(0, None)
    )
    right.set(
        xlabel=x, ylabel=f"R@{k}, mean of both directions (%)", title="validation", ylim=(0, None)
    )
    for ax in (left, right):
        _plain_axes(ax)
        ax.title.set_fontsize(9)
    right.legend(fontsize=8, loc="lower right")
    _take_away(figure, caption)
    return figure


def bars(
    values: dict[str, float],
    label: str,
    chance: float | None = None,
    caption: str = "",
    intervals: dict[str, tuple[float, float]] | None = None,
):
    """Named values as horizontal bars, each with its number; chance as a dotted line.

    intervals: (low, high) of each name, drawn as a line over its bar and written beside it.
    """
    figure = _figure(7, 0.42 * len(values) + 0.9)
    ax = figure.subplots()
    names = list(values)[::-1]
    widths = [values[n] for n in names]
    if intervals:
        low, high = np.array([intervals[n] for n in names]).T
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
    _plain_axes(ax)
    _take_away(figure, caption)
    return figure


def histogram(values: dict[str, Sequence[float]], label: str, caption: str = ""):
    """Whole-number values of one or several sets as step histograms (share of each set)."""
    figure = _figure(6.5, 3)
    ax = figure.subplots()
    top = int(max(max(v) for v in values.values()))
    for colour, (name, numbers) in zip(COLOURS, values.items(), strict=False):
        share = np.full(len(numbers), 100 / len(numbers))
        ax.hist(numbers, np.arange(-0.5, top + 1.5), weights=share, histtype="step",
                linewidth=1.8, color=colour, label=f"{name} ({len(numbers):,})")  # fmt: skip
    ax.set(xlabel=label, ylabel="share of the set (%)")
    ax.legend(fontsize=8)
    _plain_axes(ax)
    _take_away(figure, caption)
    return figure


def similarity_matrix(
    features: Features, rows: Sequence[int], texts: Sequence[str], caption: str = ""
):
    """Cosines between pictures (rows) and their canonical captions (columns)."""
    picked = torch.as_tensor(rows)
    captions = features.text_features[features.first_caption[picked]]
    scores = (features.image_features[picked] @ captions.T).numpy()
    side = 0.32 * len(rows) + 2.6
    figure = _figure(side + 1.2, side)
    ax = figure.subplots()
    drawn = ax.imshow(scores, cmap="cividis")
    ticks = range(len(rows))
    ax.set_xticks(ticks, [_wrap(t, 40) for t in texts], rotation=90, fontsize=7)
    ax.set_yticks(ticks, [_wrap(t, 40) for t in texts], fontsize=7)
    ax.set(xlabel="caption", ylabel="picture of")
    figure.colorbar(drawn, ax=ax, label="cosine", shrink=0.7)
    _take_away(figure, caption)
    return figure


def search_results(index: Index, queries: Sequence, k: int = 6, caption: str = ""):
    """One line per query: the query, then its k best pictures; green frame = a correct caption.

    A query is a text, or a picture (uint8 tensor (3, H, W)).
    """
    figure = _figure(1.2 * (k + 1.6), 1.5 * len(queries))
    axes = figure.subplots(len(queries), k + 1, squeeze=False, width_ratios=[1.6] + [1] * k)
    for line, query in zip(axes, queries, strict=True):
        if isinstance(query, str):
            line[0].text(0.98, 0.5, _wrap(f"“{query}”", 20, 6), ha="right", va="center", fontsize=9)
            line[0].axis("off")
        else:
            _show(line[0], query, "query")
        for ax, hit in zip(line[1:], index.search(query, k), strict=True):
            right = isinstance(query, str) and query in index.dataset.texts[hit.row]
            title = f"{hit.score:.2f} {_wrap(hit.text, 19)}"
            _show(ax, index.dataset[hit.row]["image"], title, GREEN if right else None)
            ax.title.set_fontsize(6)
    _take_away(figure, caption)
    return figure


def grouped_bars(values: dict[str, dict[str, float]], label: str, caption: str = ""):
    """One cluster of bars per outer name, one bar per inner name, each with its number."""
    figure = _figure(7.2, 3.3)
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
    _plain_axes(ax)
    ax.grid(visible=False, axis="x")
    _take_away(figure, caption)
    return figure


def token_table(pieces: Sequence[Sequence[str]], valid: Tensor, caption: str = ""):
    """A batch of captions as the table that it is: one row per caption, one column per position.

    pieces: the word pieces of each row, padding included; valid (B, L) True = a real token. Blue:
    words; grey: the two ends; empty: padding; orange: unknown.
    """
    count, length = valid.shape
    figure = _figure(0.66 * length + 1, 0.34 * count + 0.9)
    ax = figure.subplots()
    for y, (line, real) in enumerate(zip(pieces, valid.tolist(), strict=True)):
        for x, (piece, is_real) in enumerate(zip(line, real, strict=True)):
            special = ORANGE if piece == "[UNK]" else "0.88"
            colour = (special if piece.startswith("[") else SKY) if is_real else "white"
            box = dict(facecolor=colour, edgecolor="0.75", linewidth=0.8, alpha=0.8)
            ax.add_patch(_rectangle(x + 0.03, y + 0.08, 0.94, 0.84, **box))
            words = dict(ha="center", va="center", fontsize=7, color="0.1" if is_real else "0.6")
            ax.text(x + 0.5, y + 0.5, piece, **words)
    ax.set(
        xlim=(0, length),
        ylim=(count, 0),
        xlabel="position in the caption",
        ylabel="row of the batch",
    )
    ax.set_xticks(np.arange(length) + 0.5, range(length), fontsize=8)
    ax.set_yticks(np.arange(count) + 0.5, range(count), fontsize=8)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    _take_away(figure, caption)
    return figure


def _rectangle(x: float, y: float, width: float, height: float, **style):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, **style)


def mask_statistics(noise: Tensor, mask: Tensor, caption: str = ""):
    """Is the noise uniform, and is every patch hidden equally often?

    noise (B, N) in [0, 1), mask (B, N) True = hidden, of many samples. Left: share of the draws in
    20 bins, and the band that 19 of 20 bins of a perfect die stay in. Right: how often each patch
    is hidden, on the (square) picture.
    """
    figure = _figure(8.2, 3.2)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    bins, count = 20, noise.numel()
    share = 100 * np.histogram(noise.numpy(), bins, (0, 1))[0] / count
    band = 2 * 100 * math.sqrt((1 / bins) * (1 - 1 / bins) / count)
    left.bar(np.arange(bins) / bins, share, 0.9 / bins, align="edge", color=BLUE)
    left.axhspan(
        100 / bins - band, 100 / bins + band, color=ORANGE, alpha=0.6, label="expected, ± 2 s.d."
    )
    left.set(xlabel="noise", ylabel=f"share of {count:,} draws (%)", ylim=(0, 1.35 * 100 / bins))
    left.legend(fontsize=8, loc="upper right")
    _plain_axes(left)
    side = math.isqrt(mask.shape[1])
    often = 100 * mask.float().mean(0).reshape(side, side).numpy()
    middle, spread = 100 * mask.float().mean().item(), 5.0
    drawn = right.imshow(often, cmap="cividis", vmin=middle - spread, vmax=middle + spread)
    right.set(xlabel="column of the patch", ylabel="row of the patch")
    figure.colorbar(drawn, ax=right, label="hidden (% of samples)", shrink=0.9)
    _take_away(figure, caption)
    return figure


def shuffle_diagram(noise: Sequence[float], masking: Masking, caption: str = ""):
    """`ids_keep` and `ids_restore` of ONE sample as arrows: in place → [kept | hidden] → in place.

    noise: its N numbers; masking: a `Masking` of one row.
    """
    hidden, back = masking.mask[0].tolist(), masking.ids_restore[0].tolist()
    kept, count = masking.ids_keep.shape[1], len(hidden)
    shuffled = masking.ids_restore[0].argsort().tolist()
    figure = _figure(1.05 * count + 1.6, 3.5)
    ax = figure.subplots()
    lines = [
        [f"{i}\nnoise {noise[i]:.2f}" for i in range(count)],
        [f"patch {i}" for i in shuffled],
        [f"{i}\nids_restore {back[i]}" for i in range(count)],
    ]
    gone = [hidden, [hidden[i] for i in shuffled], hidden]
    for y, (line, grey) in enumerate(zip(lines, gone, strict=True)):
        for x, (words, is_hidden) in enumerate(zip(line, grey, strict=True)):
            box = dict(facecolor="0.82" if is_hidden else SKY, edgecolor="white")
            ax.add_patch(_rectangle(x + 0.06, 2 * y, 0.88, 0.9, **box))
            ax.text(x + 0.5, 2 * y + 0.45, words, ha="center", va="center", fontsize=8)
    style = dict(arrowstyle="-|>", linewidth=1.1)
    for i in range(count):
        colour = dict(color="0.6" if hidden[i] else BLUE)
        for start, end in (((i, 0.9), (back[i], 2)), ((back[i], 2.9), (i, 4))):
            ends = ((start[0] + 0.5, start[1]), (end[0] + 0.5, end[1]))
            ax.annotate("", ends[1], ends[0], arrowprops=style | colour)
    ax.axvline(kept, 0.36, 0.64, color=RED, linewidth=1.6)
    ax.set(xlim=(-0.05, count + 0.05), ylim=(5, -0.1))
    ax.set_xticks([])
    ax.set_yticks([0.45, 2.45, 4.45], ["in the picture", "kept | hidden", "put back"], fontsize=9)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    _take_away(figure, caption)
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
    figure = _figure(6.5, 3.4)
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
    _plain_axes(ax)
    _take_away(figure, caption)
    return figure


def confusion_matrix(counts: Tensor, names: Sequence[str], caption: str = ""):
    """Counts (true class, predicted class): colours are shares of the row, numbers pictures."""
    counts = torch.as_tensor(counts)
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = _figure(6.6, 5)
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
    _take_away(figure, caption)
    return figure


def differences(arrays: dict[str, Tensor], xlabel: str, ylabel: str, caption: str = ""):
    """|difference| of two computations, each (rows, columns), side by side on one colour scale."""
    figure = _figure(4.2 * len(arrays) + 0.6, 2.9)
    axes = figure.subplots(1, len(arrays), squeeze=False)[0]
    top = max(float(array.abs().max()) for array in arrays.values()) or 1.0
    for ax, (name, array) in zip(axes, arrays.items(), strict=True):
        drawn = ax.imshow(array.abs().numpy(), cmap="cividis", vmin=0, vmax=top, aspect="auto")
        ax.set_title(f"{name}\nlargest {float(array.abs().max()):.2g}", fontsize=9)
        ax.set(xlabel=xlabel, ylabel=ylabel)
    figure.colorbar(drawn, ax=axes, label="|difference|")
    _take_away(figure, caption)
    return figure


def same_or_not(
    reference: tuple[str, Sequence[int], Sequence[float]],
    others: dict[str, tuple[Sequence[int], Sequence[float]]],
    ylabel: str = "training loss (nats)",
    events: dict[str, float] | None = None,
    caption: str = "",
):
    """Curves over steps on top of each other (left), and how far they are from the first (right).

    reference: (name, steps, values); others: name -> (steps, values) at some of the same steps.
    events: steps to mark with a vertical line, by name.
    """
    figure = _figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    name, steps, values = reference
    left.plot(steps, values, color="0.75", linewidth=6, label=name)
    at = dict(zip(steps, values, strict=True))
    for colour, (name, (x, y)) in zip((BLUE, RED, PURPLE), others.items(), strict=False):
        left.plot(x, y, color=colour, linewidth=1.4, label=name)
        gaps = [value - at[step] for step, value in zip(x, y, strict=True)]
        right.plot(x, gaps, color=colour, linewidth=1.4,
                   label=f"{name}: at most {max(map(abs, gaps), default=0):.2g}")  # fmt: skip
    for ax in (left, right):
        for event, step in (events or {}).items():
            ax.axvline(step, color="0.4", linestyle=":", linewidth=1)
            ax.annotate(event, (step, 0.98), xycoords=("data", "axes fraction"), rotation=90,
                        ha="right", va="top", fontsize=7, color="0.4")  # fmt: skip
        ax.set_xlabel("step")
        ax.legend(fontsize=8)
        _plain_axes(ax)
    left.set(ylabel=ylabel)
    right.set(ylabel="difference (nats)")
    _take_away(figure, caption)
    return figure


def save(figure, path: str | Path) -> Path:
    """Write a figure (PNG, 130 dots per inch); returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def lines(
    curves: dict[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    level: tuple[str, float] | None = None,
    caption: str = "",
    from_zero: bool = True,
    reference: dict[str, tuple[Sequence[float], Sequence[float]]] | None = None,
):
    """Named curves {name: (xs, ys)} on one pair of axes.

    level: a named dotted yardstick. reference: curves to compare with, dotted and grey.
    """
    figure = _figure(6.5, 3.2)
    ax = figure.subplots()
    for shade, (name, (xs, ys)) in zip(("0.2", "0.55"), (reference or {}).items(), strict=False):
        ax.plot(xs, ys, color=shade, linewidth=1.6, linestyle=":", label=name)
    for colour, (name, (xs, ys)) in zip(COLOURS, curves.items(), strict=False):
        marker = "." if len(xs) < 30 else None
        ax.plot(xs, ys, color=colour, linewidth=1.8, marker=marker, label=name)
    if level:
        ax.axhline(level[1], color="0.5", linestyle=":", label=level[0])
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if from_zero:
        ax.set_ylim(bottom=0)
    if len(curves) > 1 or level or reference:
        ax.legend(fontsize=8)
    _plain_axes(ax)
    _take_away(figure, caption)
    return figure
