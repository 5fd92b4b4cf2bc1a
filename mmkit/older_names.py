"""Older names of public functions, which answer for one release, with a word."""

import functools
import warnings
from collections.abc import Callable
from typing import TypeVar, cast

Function = TypeVar("Function", bound=Callable)


def renamed(function: Function, old: str, new: str = "") -> Function:
    """The function under its older name: it warns, then does the same."""
    new = new or old.rpartition(".")[0] + "." * ("." in old) + function.__name__

    @functools.wraps(function)
    def older(*args, **kwargs):
        warnings.warn(f"{old} is called {new} now", FutureWarning, stacklevel=2)
        return function(*args, **kwargs)

    older.__name__ = older.__qualname__ = old.rpartition(".")[2]
    return cast(Function, older)
