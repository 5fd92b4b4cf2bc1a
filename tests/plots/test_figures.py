"""The colours of all figures; no figure is without a test."""

import inspect
from pathlib import Path

from mmkit import plots


def test_the_colours_are_there_for_readers():
    """Notebooks frame images in them."""
    names = "BLUE ORANGE GREEN RED PURPLE SKY".split()
    assert {getattr(plots, name) for name in names} == set(plots.COLOURS)


def test_no_plot_is_without_a_test():
    """Each public function of mm.plots is named in this folder, and pyplot keeps no figure."""
    import matplotlib.pyplot as plt

    files = Path(__file__).parent.glob("test_*.py")
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    functions = inspect.getmembers(plots, inspect.isfunction)
    own = [n for n, f in functions if n[0] != "_" and f.__module__.startswith("mmkit.plots.")]
    assert len(own) > 30
    assert [name for name in own if f"plots.{name}(" not in source] == []
    assert plt.get_fignums() == []
