"""Figures of training runs, of their loss terms and of their gradients.

Each is a function of data that returns a Figure; `mm.plots` has them all. The argument `caption` is
a text below the figure. Used by notebooks/03_training.ipynb, 05_checkpoints and 06_many_processes.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..older_names import older_arguments
from .figures import (
    BLUE,
    COLOURS,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    new_figure,
    plain_axes,
    reference_lines,
    take_away,
)

TOWERS = ("image", "text")
TERMS = {"contrastive": BLUE, "mim": ORANGE, "mlm": GREEN, "itm": PURPLE}
LABELS = {  # of the axes of loss_terms
    "loss": "loss, all terms",
    "contrastive_loss": "contrastive loss (nats)",
    "mim_loss": "pixel loss (squared error, normalised)",
    "mlm_loss": "token loss (nats)",
    "itm_loss": "matching loss (nats)",
    "pixel_error": "squared error of masked pixels",
    "mlm_accuracy": "accuracy on masked tokens (fraction)",
}


def training_curves(
    runs: dict, x: str = "step", k: int = 1, chance_negatives: int | None = None, caption: str = ""
):
    """Draw the loss (left) and Recall@K (right) of training runs.

    Thin: training loss; thick: validation loss, over one pool, so that its chance level differs.

    Args:
        runs: name -> Run.
        x: "step" or "minutes".
        k: the K of Recall@K.
        chance_negatives: pairs in a training batch; its logarithm, the loss of guessing, is marked.
        caption: text below the figure.
    Returns:
        A Figure.
    """
    figure = new_figure(9, 3.6)
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
        plain_axes(ax)
        ax.title.set_fontsize(9)
    right.legend(fontsize=8, loc="lower right")
    take_away(figure, caption)
    return figure


def same_or_not(
    reference: tuple[str, Sequence[int], Sequence[float]],
    others: dict[str, tuple[Sequence[int], Sequence[float]]],
    ylabel: str = "training loss (nats)",
    events: dict[str, float] | None = None,
    caption: str = "",
    log: bool = False,
):
    """Draw curves over steps (left) and their differences from a reference (right).

    Args:
        reference: (name, steps, values).
        others: name -> (steps, values), at some of the same steps.
        ylabel: of the left axis, with the unit.
        events: name -> step to mark with a vertical line, or None.
        caption: text below the figure.
        log: draw absolute differences on a logarithmic axis, which cannot show equal values.
    Returns:
        A Figure.
    """
    figure = new_figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    name, steps, values = reference
    left.plot(steps, values, color="0.75", linewidth=6, label=name)
    if not log:
        right.axhline(0, color="0.75", linewidth=3)
    at = dict(zip(steps, values, strict=True))
    colours = (BLUE, RED, PURPLE, GREEN, ORANGE)
    for colour, (name, (x, y)) in zip(colours, others.items(), strict=False):
        left.plot(x, y, color=colour, linewidth=1.4, label=name)
        gaps = [value - at[step] for step, value in zip(x, y, strict=True)]
        gaps = [abs(gap) or math.nan for gap in gaps] if log else gaps
        right.plot(x, gaps, color=colour, linewidth=1.4,
                   label=f"{name}: at most {np.nanmax(np.abs([*gaps, 0])):.2g}")  # fmt: skip
    for ax in (left, right):
        for event, step in (events or {}).items():
            ax.axvline(step, color="0.4", linestyle=":", linewidth=1)
            ax.annotate(event, (step, 0.98), xycoords=("data", "axes fraction"), rotation=90,
                        ha="right", va="top", fontsize=8, color="0.4")  # fmt: skip
        ax.set_xlabel("step")
        ax.legend(fontsize=8)
        plain_axes(ax)
    left.set(ylabel=ylabel)
    right.set(ylabel="difference (nats)")
    if log:
        right.set(yscale="log", ylabel="absolute difference (nats)")
        right.set_ylim(bottom=right.get_ylim()[0] / 100)  # room for the legend
    take_away(figure, caption)
    return figure


def gradient_agreement(
    reference: dict[str, Tensor],
    others: dict[str, dict[str, Tensor]],
    mark: str = "logit_scale",
    caption: str = "",
):
    """Compare gradients with a reference: for each parameter (left) and overall (right).

    Left: each point is a parameter, the norm of its error over the norm of its gradient; dotted:
    errors of 1, 1e-3 and 1e-6 of the gradient; errors below 1e-10 of the largest gradient are drawn
    at that floor. The parameter `mark` is a star. Right: cosine with the reference and length (a
    multiple of the reference's), both without `mark`, and `mark` as a multiple of the reference's.

    Args:
        reference: parameter name -> gradient.
        others: name -> {parameter name: gradient}; a missing gradient is zero.
        mark: name of a scalar parameter.
        caption: text below the figure.
    Returns:
        A Figure.
    """
    figure = new_figure(9.8, 3.7)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    size = {name: float(grad.norm()) for name, grad in reference.items()}
    top = max(size.values())
    floor = 1e-10 * top
    width, tallest = 0.84 / len(others), 1.8
    for i, (colour, (way, grads)) in enumerate(zip(COLOURS, others.items(), strict=False)):
        grads = {n: grads.get(n, torch.zeros_like(g)) for n, g in reference.items()}
        error = {n: max(floor, float((grads[n] - g).norm())) for n, g in reference.items()}
        names = [n for n in reference if n != mark]
        xs, ys = [max(floor, size[n]) for n in names], [error[n] for n in names]
        left.plot(xs, ys, "o", color=colour, markersize=3.5, alpha=0.5, markeredgewidth=0)
        star = dict(color=colour, markersize=13, markeredgecolor="black", zorder=3)
        left.plot(size[mark], error[mark], "*", **star)
        values = _agreement(reference, grads, mark)
        positions = np.arange(3) + (i - (len(others) - 1) / 2) * width
        drawn = right.bar(positions, values, 0.94 * width, color=colour, label=way)
        right.bar_label(drawn, [f"{v:.3g}" for v in values], fontsize=8, padding=2)
        tallest = max(tallest, *values)
    for fraction in (1, 1e-3, 1e-6):
        left.plot([floor, top], [fraction * floor, fraction * top], ":", color="0.5", linewidth=1)
        left.annotate(
            f" × {fraction:g}", (top, fraction * top), fontsize=8, color="0.4", va="center"
        )
    left.set(xscale="log", yscale="log", ylim=(floor / 2, 20 * top),
             xlabel="norm of a parameter's gradient", ylabel="norm of its error")  # fmt: skip
    left.set_title(f"star: {mark}", fontsize=9)
    right.set_xticks(range(3), ["cosine", "length", mark])
    right.set(ylabel="relative to the reference", ylim=(0, 1.1 * tallest))
    for ax in (left, right):
        plain_axes(ax)
    figure.legend(loc="outside upper center", ncols=len(others), fontsize=8, frameon=False)
    take_away(figure, caption)
    return figure


def _agreement(reference: dict[str, Tensor], grads: dict[str, Tensor], mark: str) -> list[float]:
    """(cosine, length, marked parameter) of gradients, the last two relative to the reference."""
    names = [name for name in reference if name != mark]
    true, ours = (torch.cat([g[n].flatten().double() for n in names]) for g in (reference, grads))
    cosine = torch.cosine_similarity(true, ours, dim=0)
    return [float(x) for x in (cosine, ours.norm() / true.norm(), grads[mark] / reference[mark])]


@older_arguments(yardsticks="references")
def loss_terms(
    runs: dict,
    keys: Sequence[str] | dict[str, str] = tuple(LABELS)[:5],
    references: dict[str, dict[str, float]] | None = None,
    caption: str = "",
):
    """Draw each term of the loss over the steps, in a panel of its own.

    Thin: training; thick, with points: validation.

    Args:
        runs: name -> Run.
        keys: keys of the records, or {key: label of its axis, with the unit}. A key that no run
            has is left out.
        references: key -> {name: value} of dotted reference lines, or None.
        caption: text below the figure.
    Returns:
        A Figure.
    Raises:
        ValueError: no record has any of the keys.
    """
    labels = keys if isinstance(keys, dict) else {key: LABELS.get(key, key) for key in keys}
    given = [k for k in labels if any(k in r for run in runs.values() for r in run.history)]
    if not given:
        raise ValueError(f"no record has any of {list(labels)}; see the keys in run.history[-1]")
    wide = 2 if len(given) in (2, 4) else min(3, len(given))
    lines = -(-len(given) // wide)
    figure = new_figure(3.3 * wide, 2.5 * lines + 0.6)
    axes = figure.subplots(lines, wide, squeeze=False, sharex=True).ravel()
    for ax in axes[len(given) :]:
        ax.axis("off")
    for ax, key in zip(axes, given, strict=False):
        _draw_term(ax, runs, key)
        reference_lines(ax, (references or {}).get(key))
        ax.set(xlabel="step", ylabel=labels[key])
        ax.tick_params(labelbottom=True)
        plain_axes(ax)
    _run_legend(figure, runs)
    take_away(figure, caption)
    return figure


def _draw_term(ax, runs: dict, key: str) -> None:
    for colour, run in zip(COLOURS, runs.values(), strict=False):
        ax.plot(*run.curve(key, "train"), color=colour, linewidth=0.8, alpha=0.55)
        ax.plot(*run.curve(key, "val"), color=colour, linewidth=2, marker=".")


def _run_legend(figure, runs: dict) -> None:
    """A legend above all panels: colours of the runs, line styles of the splits."""
    from matplotlib.lines import Line2D

    named = zip(COLOURS, runs, strict=False)
    runs_as = [Line2D([], [], color=c, label=n, linewidth=4) for c, n in named if len(runs) > 1]
    shade = BLUE if len(runs) == 1 else "0.3"
    train = Line2D([], [], color=shade, linewidth=0.8, label="training")
    val = Line2D([], [], color=shade, linewidth=2, marker=".", label="validation")
    handles = [*runs_as, train, val]
    above = dict(loc="outside upper center", frameon=False, fontsize=8)
    figure.legend(handles=handles, ncols=min(6, len(handles)), **above)


def term_gradients(records: Sequence[dict], caption: str = ""):
    """Draw how large the gradients of the loss terms are, and whether they agree, for each tower.

    Args:
        records: lines of a run's metrics.jsonl, with "gradient_norm/<tower>/<term>" (left) and
            "gradient_cosine/<tower>/<term>·<term>" (right, -1 to 1) at "step". With more than 60
            values the running mean is drawn as well, thick.
        caption: text below the figure.
    Returns:
        A Figure, a row of panels for each tower.
    Raises:
        ValueError: no record has such a key.
    """
    towers = [t for t in TOWERS if any(f"/{t}/" in key for r in records for key in r)]
    if not towers:
        raise ValueError("no record has a key gradient_norm/<tower>/<term>; were they measured?")
    figure = new_figure(9, 2.4 * len(towers) + 0.4)
    axes = figure.subplots(len(towers), 2, squeeze=False, sharex=True)
    pairs = dict.fromkeys(n for t in towers for n in _curves_of(records, f"gradient_cosine/{t}/"))
    for (left, right), tower in zip(axes, towers, strict=True):
        norms = _curves_of(records, f"gradient_norm/{tower}/")
        _draw_terms(left, norms, TERMS)
        left.set(yscale="log", ylabel=f"{tower} tower: gradient norm (log)")
        cosines = _curves_of(records, f"gradient_cosine/{tower}/")
        _draw_terms(right, cosines, dict(zip(pairs, COLOURS, strict=False)))
        _mark_opposition(right, cosines)
        right.set(ylabel=f"{tower} tower: cosine of gradients")
    for ax in axes.ravel():
        ax.set_xlabel("step")
        ax.tick_params(labelbottom=True)
        plain_axes(ax)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    take_away(figure, caption)
    return figure


def _curves_of(records: Sequence[dict], prefix: str) -> dict[str, tuple[list, list]]:
    """{the key without the prefix: (steps, values)}."""
    names = dict.fromkeys(k.removeprefix(prefix) for r in records for k in r if prefix in k)
    # The value is None where a gradient is zero (no angle) or not finite (no length).
    held = {name: [r for r in records if r.get(prefix + name) is not None] for name in names}
    return {n: ([r["step"] for r in rs], [r[prefix + n] for r in rs]) for n, rs in held.items()}


def _draw_terms(ax, curves: dict[str, tuple[list, list]], colours: dict[str, str]) -> None:
    """Curves with points; with more than 60 values thin lines under their running mean."""
    for name, (steps, values) in curves.items():
        colour, width = colours.get(name, RED), len(values) // 25
        if len(values) <= 60:
            ax.plot(steps, values, ".-", color=colour, linewidth=1.6, label=name)
            continue
        ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.4)
        mean = np.convolve(values, np.full(width, 1 / width), "valid")
        begin = (width - 1) // 2
        middle = steps[begin : begin + len(mean)]
        ax.plot(middle, mean, color=colour, linewidth=2, label=name)
        ax.set_title(f"thick: mean of {width} values", fontsize=9)


def _mark_opposition(ax, cosines: dict[str, tuple[list, list]]) -> None:
    """Draw the zero line, shade what is below it, and make the limits symmetric."""
    largest = max((abs(v) for _, values in cosines.values() for v in values), default=0.0)
    top = min(1.05, max(0.1, 1.25 * largest))
    ax.axhspan(-top, 0, color="0.93", zorder=0)
    ax.axhline(0, color="0.2", linewidth=1.2, zorder=1.5)
    style = dict(xycoords="axes fraction", ha="left", fontsize=8, color="0.35")
    ax.annotate("below 0: the terms conflict", (0.01, 0.02), va="bottom", **style)
    ax.annotate("above 0: the terms agree", (0.01, 0.98), va="top", **style)
    ax.set_ylim(-top, top)
