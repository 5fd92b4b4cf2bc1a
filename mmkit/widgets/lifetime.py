"""Lifetime of widgets: handlers that hold no reference, and closing a widget with all its parts.

ipywidgets keeps every widget that is not closed, for as long as the kernel runs.
Walk-through: notebooks/02_masking.ipynb.
"""

import weakref
from collections.abc import Callable
from typing import Any


def weakly(method: Callable[[dict], None]) -> Callable[[dict], None]:
    """Make a handler of a bound method that does not keep its object alive."""
    held = weakref.WeakMethod(method)

    def handle(change: dict):
        if (alive := held()) is not None:
            alive(change)

    return handle


def close_all(widget: Any):
    """Close a widget and all its children, with their layouts and styles."""
    for child in getattr(widget, "children", ()):
        close_all(child)
    for part in (getattr(widget, "layout", None), getattr(widget, "style", None), widget):
        if part is not None:
            part.unobserve_all()
            type(part).close(part)
