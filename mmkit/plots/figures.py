"""The parts that all figures share: colours, an empty figure, an image on its axis.

Colours are safe for colour-blind readers (Okabe & Ito 2008).
"""

from collections.abc import Iterable

import numpy as np
from torch import Tensor

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY)
# colours of tokens: visible, [CLS] and [SEP], dropped, the mask token, what 80/10/10 drew
KINDS = {"visible": SKY, "end": "#e8e8e8", "dropped": "#f9e0b0", "mask": ORANGE, "other": GREEN}


def new_figure(width: float, height: float):
    """An empty figure, in inches, that pyplot does not keep, so that it is displayed only once."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(figure)
    return figure


def take_away(figure, words: str):
    """Write a caption below a figure, if there is one."""
    if words:
        figure.supxlabel(words, fontsize=9, style="italic", color="0.3", wrap=True)


def plain_axes(ax):
    """Remove two of the spines and add a light grid."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)


def reference_lines(ax, references: dict[str, float] | None):
    """Draw dotted lines {name: value} with their names on them, right and left in turn."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2, foreground="white")]  # covers less of a curve than a box
    for i, (name, value) in enumerate((references or {}).items()):
        ax.axhline(value, color="0.45", linestyle=":", linewidth=1.2, zorder=1)
        x, side = ((0.99, "right"), (0.01, "left"))[i % 2]
        where = dict(xycoords=("axes fraction", "data"), textcoords="offset points", ha=side)
        style = dict(va="bottom", fontsize=8, color="0.3", path_effects=halo, zorder=4)
        ax.annotate(name, (x, value), (0, 1), **where, **style)


def of_a_whole(label: str, values: Iterable[float]) -> bool:
    """Whether the values are per cent of a whole, so that nothing on their axis exceeds 100."""
    return "%" in label and all(0 <= value <= 100 for value in values)


def wrap(words: str, width: int = 20, most: int = 3) -> str:
    """Break a text into lines of `width` characters, at most `most` of them."""
    import textwrap

    lines = textwrap.wrap(words, width)
    return "\n".join(lines[:most] + (["…"] if len(lines) > most else []))


def show_image(ax, image: Tensor, title: str = "", frame: str | None = None):
    """Show an image (3, H, W) uint8 on an axis without ticks."""
    ax.imshow(np.asarray(image).transpose(1, 2, 0), interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_edgecolor(frame or "0.85")
        spine.set_linewidth(2.5 if frame else 0.5)
    ax.set_title(title, fontsize=9)


def rectangle(x: float, y: float, width: float, height: float, **style):
    """A matplotlib Rectangle with a corner at (x, y)."""
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, **style)
