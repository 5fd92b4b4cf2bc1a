"""Names of the built-in images: English captions from the table, other languages from `emoji`.

The captions were derived from the names of the packages by tests/openmoji_names.py.
Walk-through: notebooks/01_data.ipynb.
"""

from functools import cache

import emoji

from .drawings import read_table

LANGUAGES = tuple(emoji.LANGUAGES)


def characters(stem: str) -> str:
    """The emoji of code points such as "1F469-200D-1F692", without variation selectors.

    U+FE0F requests a colour image; packages disagree on when to write it.
    """
    return "".join(chr(int(code, 16)) for code in stem.split("-") if code != "FE0F")


def emoji_of(entry: dict[str, str]) -> list[str]:
    """All emoji that have the image of this row of the table, the canonical one first."""
    return [entry["codepoints"], *entry["same_as"].split()]


@cache
def names(language: str) -> dict[str, str]:
    """Names of all emoji in one language: {characters without FE0F: "woman firefighter"}."""
    if language != "en":
        emoji.config.load_language(language)
    found: dict[str, str] = {}
    for sequence, entry in emoji.EMOJI_DATA.items():
        if language in entry:
            name = entry[language].strip(":").replace("_", " ").replace("’", "'").strip()
            found.setdefault(sequence.replace("\ufe0f", ""), name)
    return found


@cache
def _english() -> dict[str, str]:
    """{code points: the caption in the table}."""
    return {
        stem: text
        for entry in read_table()
        for stem, text in zip(emoji_of(entry), entry["captions"].split("|"), strict=True)
    }


def caption(stem: str, language: str = "en") -> str:
    """A caption of an emoji, given by code points; in other languages than English its plain name.

    >>> caption("1F469-1F3FD-200D-1F692")
    'a woman firefighter with medium skin tone'
    """
    return _english()[stem] if language == "en" else names(language)[characters(stem)]
