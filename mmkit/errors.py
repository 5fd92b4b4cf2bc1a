"""Checks of settings, and parts of errors: the nearest known name, a row that cannot be used."""

import difflib
import math
import os
from collections.abc import Iterable
from types import NoneType
from typing import Any, get_args


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, then all of them."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


class Refused(ValueError):
    """A row that cannot be used.

    Args:
        reason: two or three words under which a report counts the row.
        message: the complete message, with file and line.
    """

    def __init__(self, reason: str, message: str):
        # file names may hold bytes that are not text; a message must always be printable
        message = message.encode("utf-8", "backslashreplace").decode("utf-8")
        super().__init__(reason, message)
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1]


_KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}


def as_type(name: str, given: Any, annotation: Any) -> Any:
    """A setting converted to the type of its annotation: int, float, bool or str, or None.

    NumPy and torch scalars, whole numbers written as floats, and paths become plain values. Raises
    ValueError for a value of another type and for numbers that are not finite.
    """
    kinds = get_args(annotation) or (annotation,)
    kind, value, none = kinds[0], given, "None or " if NoneType in kinds else ""
    if none and value is None:
        return value
    if getattr(value, "ndim", None) == 0:
        short = "float32" in str(value.dtype)  # 0.1 is meant, not 0.10000000149
        value = float(f"{value.item():.7g}") if short else value.item()
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        hint = " (without quotes)" if isinstance(value, str) else ""
        raise ValueError(f"{name}={given!r} must be {none}{_KINDS[kind]}{hint}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name}={given!r} must be {none}a finite number")
    return value
