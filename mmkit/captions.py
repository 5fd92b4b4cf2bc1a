"""Captions as they are kept, and which pairs are correct for each other.

A caption is one line of Unicode in its composed form. Walk-through: notebooks/01_data.ipynb.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .picture_files import Refused

# Controls, and U+200B, which stands between the words of Khmer and Thai, are a space; marks that no
# one sees (byte order, soft hyphen) are nothing; a joiner of letters or emoji has a meaning, stays.
_UNSEEN = re.compile("[\u0000-\u001f\u007f-\u009f\u2028\u2029\u200b]+")
_NOTHING = re.compile("[\ufeff\u2060\u00ad]")


def clean_caption(text: str) -> str:
    """One line: composed letters (NFC), control characters and runs of white space one space.

    Half a letter (a lone surrogate, from a broken file) becomes the replacement mark. "" where
    nothing is left.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = " ".join(_NOTHING.sub("", _UNSEEN.sub(" ", text)).split())
    return unicodedata.normalize("NFC", text)  # last: what was apart may have come together


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


def groups_of(keys_of: Sequence[Sequence]) -> Tensor:
    """Rows that share a key, directly or through others, get one id (union-find)."""
    parent = list(range(len(keys_of)))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict = {}
    for row, keys in enumerate(keys_of):
        for key in keys:
            a, b = root(first.setdefault(key, row)), root(row)
            parent[max(a, b)] = min(a, b)
    return torch.tensor([root(i) for i in range(len(keys_of))], dtype=torch.int64)
