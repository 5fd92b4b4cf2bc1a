"""Names of before, which answer for one release, with a word."""

import functools
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any


def say_renamed(old: str, new: str) -> None:
    """Warn, at the line that called the caller, that a name is an older one."""
    warnings.warn(f"{old} is called {new} now", FutureWarning, stacklevel=3)


def older_functions(module: str, shown: str, **names: str) -> Callable[[str], Any]:
    """A module's `__getattr__`: older name -> today's. shown: the module as users write it."""

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        say_renamed(f"{shown}.{name}", f"{shown}.{names[name]}")
        return getattr(sys.modules[module], names[name])

    return __getattr__


def older_attributes(**names: str) -> Callable[[type], type]:
    """A class decorator: older attribute or method -> the one that it is now."""

    def add(cls: type) -> type:
        for old, new in names.items():

            def get(self: Any, old: str = old, new: str = new) -> Any:
                say_renamed(f"{cls.__name__}.{old}", new)
                return getattr(self, new)

            setattr(cls, old, property(get))
        return cls

    return add


def older_arguments(**names: str) -> Callable:
    """A decorator: older keyword argument -> the one that it is now."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            for old in names.keys() & given.keys():
                say_renamed(
                    f"{function.__qualname__.removesuffix('.__init__')}({old}=…)", names[old]
                )
                given[names[old]] = given.pop(old)
            return function(*args, **given)

        return call

    return decorate


# what the terms of the loss were called
_TERMS = {"pixels": "mim", "words": "mlm", "matching": "itm"}
_TERM = re.compile(
    r"(?:(?<=[/·])|^)(pixels|words|matching)"
    r"(?=_(?:weight|schedule|loss|accuracy|perplexity)$|·|$)"
)


OLDER_FIELDS = {
    f"{old}_{what}": f"{new}_{what}"
    for old, new in _TERMS.items()
    for what in ("weight", "schedule")
}


def current_keys(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration or record that an earlier release wrote, terms of the loss named as now."""
    return {_TERM.sub(lambda found: _TERMS[found[1]], key): value for key, value in values.items()}
