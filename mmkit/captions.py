"""Captions as they are kept, and which pairs are correct for each other.

A caption is one line of Unicode in its composed form. Walk-through: notebooks/01_data.ipynb.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .picture_files import Refused

# Controls, and the marks that no one sees (zero width, byte order, direction); a joiner between
# letters or emoji has a meaning and stays.
_UNSEEN = re.compile("[\u0000-\u001f\u007f-\u009f\u2028\u2029]+")
_NOTHING = re.compile("[\u200b\ufeff\u2060\u00ad]")


def clean_caption(text: str) -> str:
    """One line: composed letters (NFC), control characters and runs of white space one space.

    Half a letter (a lone surrogate, from a broken file) becomes the replacement mark. "" where
    nothing is left.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = " ".join(_NOTHING.sub("", _UNSEEN.sub(" ", text)).split())
    return unicodedata.normalize("NFC", text)  # last: what was apart may have come together


def clean_captions(where: str, text) -> list[str]:
    """The captions of a row: one, or a list of them, each once.

    Raises Refused for what holds no words: None, a number, white space, an empty list.
    """
    listed = isinstance(text, Iterable) and not isinstance(text, dict | set)  # they have no order
    raw = [text] if isinstance(text, str) else list(text) if listed else []
    captions = [clean_caption(c) if isinstance(c, str) else "" for c in raw]
    if not captions or not all(captions):
        shown = repr(text) if len(repr(text)) < 80 else repr(text)[:77] + "..."
        raise Refused(
            "no caption", f"the text of {where} is empty or not a string: {shown}; give words"
        )
    return list(dict.fromkeys(captions))


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
