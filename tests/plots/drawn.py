"""What tests of figures share: masks to draw, and a look at what was drawn."""

from matplotlib.figure import Figure
from matplotlib.text import Text

import mmkit as mm


def masked(data, count, ratio=0.5):
    noise = mm.mask_noise(0, 0, data.sample_ids[:count], 64)
    return noise, mm.masking.random_mask(noise, ratio)


def shown(figure, axes):
    """The visible axes of a finished figure; it must draw without an error, none of its text may
    be too small to read, and pyplot may not keep it."""
    import matplotlib.pyplot as plt

    assert isinstance(figure, Figure)
    assert plt.get_fignums() == []
    figure.draw_without_rendering()  # a closed figure's canvas draws nothing
    small = {t.get_text() for t in figure.findobj(Text) if t.get_text() and t.get_fontsize() < 8}
    assert not small
    assert all(ax.title.get_fontsize() >= 9 for ax in figure.axes if ax.images and ax.get_title())
    visible = [ax for ax in figure.axes if ax.axison]
    assert len(visible) == axes
    return visible


def labels(ax):
    return ax.get_xlabel(), ax.get_ylabel()
