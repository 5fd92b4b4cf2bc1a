"""Captions as the data set stores them: one line each, of Unicode in its composed form.

Which captions are correct for which images: partners.py.
Walk-through: notebooks/01_data.ipynb.
"""

import re
import unicodedata
from collections.abc import Iterable

from ..errors import Refused

# Control characters, and U+200B, which separates the words of Khmer and Thai, become a space.
# Invisible marks (byte order, soft hyphen) are removed; joiners of letters or emoji are kept.
_UNSEEN = re.compile("[\u0000-\u001f\u007f-\u009f\u2028\u2029\u200b]+")
_NOTHING = re.compile("[\ufeff\u2060\u00ad]")
_BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs by category, but blank


def is_visible(letter: str) -> bool:
    """Is it a letter, digit or sign, not a space, a control or a combining mark?"""
    return unicodedata.category(letter)[0] in "LNPS" and letter not in _BLANK_LETTERS


def clean_caption(text: str) -> str:
    """The caption as one line in NFC; control characters and runs of white space become a space.

    A lone surrogate (half a letter, from a broken file) becomes the replacement character. The
    result is "" if nothing visible is left, only marks of direction and joiners, for example.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = " ".join(_NOTHING.sub("", _UNSEEN.sub(" ", text)).split())
    text = unicodedata.normalize("NFC", text)  # last: letters and marks may now be adjacent
    return text if any(map(is_visible, text)) else ""


def clean_captions(where: str, text) -> list[str]:
    """The captions of a row, given as one or a list: without repeats, without blank ones.

    Raises Refused if no text is left (None, white space, an empty list), and for a caption that is
    not a string.
    """
    raw = _listed(text)
    strings = [c for c in raw if not _is_nothing(c)]
    captions = [clean_caption(c) if isinstance(c, str) else None for c in strings]
    if None in captions or not any(captions):
        shown = repr(text) if len(repr(text)) < 80 else repr(text)[:77] + "..."
        raise Refused(
            "no caption", f"the text of {where} is empty or not a string: {shown}; give a caption"
        )
    return list(dict.fromkeys(caption for caption in captions if caption))


def count_blank(text) -> int:
    """The number of captions of a row without text: None, NaN, white space."""
    captions = [c for c in _listed(text) if not (isinstance(c, str) and clean_caption(c))]
    return sum(isinstance(c, str) or _is_nothing(c) for c in captions)


def _listed(text) -> list:
    listed = isinstance(text, Iterable) and not isinstance(text, dict | set)  # these have no order
    return [text] if isinstance(text, str) else list(text) if listed else []


def _is_nothing(caption) -> bool:
    """An empty cell: None, or the NaN that pandas makes of it."""
    return caption is None or (isinstance(caption, float) and caption != caption)
