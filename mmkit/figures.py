"""The parts that all pictures share: colours, an empty figure, one picture on its axis.

Colours are safe for colour-blind readers (Okabe & Ito 2008).
"""

import numpy as np
from torch import Tensor

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY)


def new_figure(width: float, height: float):
    """An empty figure in inches that pyplot does not keep, so that it is displayed exactly once."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(figure)
    return figure


def take_away(figure, words: str):
    if words:
        figure.supxlabel(words, fontsize=9, style="italic", color="0.3", wrap=True)


def plain_axes(ax):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)


def wrap(words: str, width: int = 22, most: int = 3) -> str:
    import textwrap

    lines = textwrap.wrap(words, width)
    return "\n".join(lines[:most] + (["…"] if len(lines) > most else []))


def show_picture(ax, picture: Tensor, title: str = "", frame: str | None = None):
    """One picture (3, H, W) uint8 on an axis without ticks."""
    ax.imshow(np.asarray(picture).transpose(1, 2, 0), interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_edgecolor(frame or "0.85")
        spine.set_linewidth(2.5 if frame else 0.5)
    ax.set_title(title, fontsize=8)


def rectangle(x: float, y: float, width: float, height: float, **style):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, **style)
