"""Captions as they are kept: one line of Unicode in its composed form each.

Which of them are correct for which images: partners.py.
Walk-through: notebooks/01_data.ipynb.
"""

import re
import unicodedata
from collections.abc import Iterable

from ..errors import Refused

# Controls, and U+200B, which stands between the words of Khmer and Thai, are a space; marks that no
# one sees (byte order, soft hyphen) are nothing; a joiner of letters or emoji has a meaning, stays.
_UNSEEN = re.compile("[\u0000-\u001f\u007f-\u009f\u2028\u2029\u200b]+")
_NOTHING = re.compile("[\ufeff\u2060\u00ad]")
_BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs by name, with no ink


def is_visible(letter: str) -> bool:
    """A letter, digit or sign: no space, no control, no mark that only changes its neighbour."""
    return unicodedata.category(letter)[0] in "LNPS" and letter not in _BLANK_LETTERS


def clean_caption(text: str) -> str:
    """One line: composed letters (NFC), control characters and runs of white space one space.

    Half a letter (a lone surrogate, from a broken file) becomes the replacement mark. "" where
    nothing is left that can be seen: marks of direction and joiners alone are no words.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = " ".join(_NOTHING.sub("", _UNSEEN.sub(" ", text)).split())
    text = unicodedata.normalize("NFC", text)  # last: what was apart may have come together
    return text if any(map(is_visible, text)) else ""


def clean_captions(where: str, text) -> list[str]:
    """The captions of a row: one, or a list of them, each once; blank ones beside others left out.

    Raises Refused where no words are left (None, white space, an empty list), and for what is no
    text, a number say.
    """
    raw = _listed(text)
    strings = [c for c in raw if not _is_nothing(c)]
    captions = [clean_caption(c) if isinstance(c, str) else None for c in strings]
    if None in captions or not any(captions):
        shown = repr(text) if len(repr(text)) < 80 else repr(text)[:77] + "..."
        raise Refused(
            "no caption", f"the text of {where} is empty or not a string: {shown}; give words"
        )
    return list(dict.fromkeys(caption for caption in captions if caption))


def count_blank(text) -> int:
    """How many captions of a row hold no words: None, NaN, white space."""
    captions = [c for c in _listed(text) if not (isinstance(c, str) and clean_caption(c))]
    return sum(isinstance(c, str) or _is_nothing(c) for c in captions)


def _listed(text) -> list:
    listed = isinstance(text, Iterable) and not isinstance(text, dict | set)  # they have no order
    return [text] if isinstance(text, str) else list(text) if listed else []


def _is_nothing(caption) -> bool:
    """An empty cell: None, or the NaN that pandas makes of it."""
    return caption is None or (isinstance(caption, float) and caption != caption)
