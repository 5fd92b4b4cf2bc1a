"""Words for errors: the nearest known name, and a row that cannot be used."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Words for an error about an unknown name: the nearest known name, then all of them."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


class Refused(ValueError):
    """A row that cannot be used.

    reason: two or three words under which a report counts it; the message says the rest.
    """

    def __init__(self, reason: str, message: str):
        # file names may hold bytes that are no text; a message can always be printed
        message = message.encode("utf-8", "backslashreplace").decode("utf-8")
        super().__init__(reason, message)
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1]
