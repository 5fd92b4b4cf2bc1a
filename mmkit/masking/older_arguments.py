"""The arguments that `draw_maskings` took in an earlier release."""

import dataclasses
import functools
import warnings
from collections.abc import Callable

from .core import TokenInfo


def with_older_arguments(draw: Callable) -> Callable:
    """`draw_maskings` with the arguments that it took before `TokenInfo`."""

    @functools.wraps(draw)
    def wrapped(batch, tokens=None, *, model=None, attend=None, frequency=None, **options):
        tokens = model if tokens is None else tokens
        changed = {"frequency": frequency, "attend": attend and (lambda _: attend())}
        changed = {name: value for name, value in changed.items() if value is not None}
        if changed or not isinstance(tokens, TokenInfo):
            warnings.warn(
                "draw_maskings takes a TokenInfo with frequency and attend: give model.token_info "
                "(dataclasses.replace changes it); a model will not be accepted for long",
                FutureWarning,
                stacklevel=2,
            )
            tokens = dataclasses.replace(getattr(tokens, "token_info", tokens), **changed)
        return draw(batch, tokens, **options)

    return wrapped
