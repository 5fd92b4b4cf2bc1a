"""The report of a source: rows loaded and skipped, reasons, sizes, captions, duplicates.

`loaded + sum(skipped.values()) == rows`, always. Walk-through:
notebooks/08_your_own_images.ipynb.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import Refused
from ..older_names import older_attributes
from .clusters import number
from .partners import CorrectCaptions

CHECKS = {"decode": "each decoded", "head": "heads and ends checked"}  # as it is printed
EXAMPLES = 5  # messages kept for each reason
_PLAIN = (  # fields that go to JSON as they are
    "source rows loaded skipped examples images captions checked why_unchecked bytes "
    "identical_images shared_captions common_captions left_out list_cells blank_captions "
    "max_length unknown blank dark"
).split()


@older_attributes(
    pictures="images",
    identical_pictures="identical_images",
    caption_pieces="caption_tokens",
    skipped_share="skipped_fraction",
)
@dataclass(repr=False)
class Report:
    """What became of the rows of a source; `str()` is a table, `to_dict()` is JSON's."""

    source: str
    rows: int = 0  # rows of a table, images of a folder, samples of shards
    loaded: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first messages
    images: int = 0  # different ones; rows of one image are its captions
    captions: int = 0
    checked: str = ""  # how every image was checked: "decode", "head" (and end) or "none"
    why_unchecked: str = ""  # the reason for "none" where nobody asked for it
    file_sizes: Sequence[int] = ()  # of each image, bytes; 0 = not known
    widths: Sequence[int] = ()  # of each image, pixels
    heights: Sequence[int] = ()
    caption_words: Sequence[int] = ()  # of each caption
    identical_images: int | None = None  # equal to an earlier one, byte for byte; None = unknown
    shared_captions: int = 0  # captions that more than one image has
    # very common captions (`partners.very_common`) -> number of images; left_out: the fraction of
    # a batch's other captions that are correct and therefore not negatives
    common_captions: dict[str, int] = field(default_factory=dict)
    left_out: float = 0.0
    list_cells: int = 0  # rows with a list of captions written in one cell, which was divided
    blank_captions: int = 0  # without text, in rows that have other captions
    # what `mm.inspect` adds
    caption_tokens: Sequence[int] = ()  # of each caption, ends included
    max_length: int = 0  # tokens that a model reads
    unknown: float = 0.0  # fraction of the captions' letters that the tokenizer does not know
    blank: list[str] = field(default_factory=list)  # names of images of nearly one colour
    dark: list[str] = field(default_factory=list)  # names of others that are nearly black
    dark_white: int = 0  # their probable white: 4095 for 12 bits stored in 16; 0 = unknown
    duplicates: Any = None  # duplicates.Duplicates

    def skip(self, refused: Refused) -> None:
        """Count one row that is left out."""
        self.skipped[refused.reason] = self.skipped.get(refused.reason, 0) + 1
        kept = self.examples.setdefault(refused.reason, [])
        if len(kept) < EXAMPLES:
            kept.append(str(refused))

    @property
    def bytes(self) -> int:
        """Size of all image files; 0 = not known."""
        return sum(self.file_sizes)

    def part(self, rows: Sequence[int], texts: Sequence[Sequence[str]]) -> "Report":
        """The report of some of the loaded images, with their captions `texts`."""
        part = Report(f"a part of {self.source}", len(rows), len(rows), images=len(rows))
        part.checked, part.why_unchecked = self.checked, self.why_unchecked
        for name in ("widths", "heights", "file_sizes"):
            values = getattr(self, name)
            setattr(part, name, [values[row] for row in rows] if len(values) else [])
        count_captions(part, texts)
        return part

    @property
    def skipped_fraction(self) -> float:
        """Fraction of the rows that were skipped."""
        return sum(self.skipped.values()) / self.rows if self.rows else 0.0

    @property
    def cut_captions(self) -> int:
        """Number of captions that are longer than `max_length` tokens and lose their end."""
        return sum(n > self.max_length for n in self.caption_tokens)

    def lines(self) -> list[tuple[str, str]]:
        """(name, text) of each row of the table."""
        rows = [("rows", f"{self.rows:,} = {self.loaded:,} loaded + {self._skipped():,} skipped")]
        for reason, count in sorted(self.skipped.items(), key=lambda pair: -pair[1]):
            rows.append((f"  {reason}", f"{count:,}; {self.examples[reason][0]}"))
        why = f": {self.why_unchecked}" if self.why_unchecked else ""
        checked = CHECKS.get(self.checked, f"not checked{why}")
        size = f", {self.bytes / 1e6:,.1f} MB" if self.bytes else ""
        rows.append(("images", f"{self.images:,}{size}; {checked}"))
        if len(self.widths):
            short = np.minimum(self.widths, self.heights)
            rows.append(("  shorter side", _spread(short, "px")))
            rows.append(("  width / height", _spread(self.aspects, "", 2)))
        if self.blank:
            rows.append(("  nearly one colour", f"{len(self.blank):,}; {self.blank[0]}"))
        if self.dark:
            remedy = (
                f"; give reading=mm.Reading(white={self.dark_white})" if self.dark_white else ""
            )
            rows.append(("  nearly black", f"{len(self.dark):,}; {self.dark[0]}{remedy}"))
        if self.identical_images is None:
            rows.append(("  identical", "not looked for"))
        elif self.identical_images:
            rows.append(("  identical", f"{self.identical_images:,} equal an earlier one"))
        rows.append(("captions", f"{self.captions:,}; {self.shared_captions:,} of several images"))
        if self.common_captions:
            rows.append(("  very common", self.common_in_words()))
        if self.list_cells:
            rows.append(("  written as a list", f"{self.list_cells:,} rows, divided"))
        if self.blank_captions:
            rows.append(("  blank", f"{self.blank_captions:,} of rows with others, left out"))
        if len(self.caption_words):
            rows.append(("  words", _spread(self.caption_words, "")))
        if len(self.caption_tokens):
            cut = f"; {self.cut_captions:,} are longer than {self.max_length} and are cut"
            rows.append(("  tokens", _spread(self.caption_tokens, "") + cut))
            rows.append(("  unknown letters", f"{100 * self.unknown:.1f} %"))
        if self.duplicates is not None:
            rows += [("duplicates", line) for line in str(self.duplicates).splitlines()]
        return rows

    def common_in_words(self) -> str:
        """The very common captions, and the fraction of negatives that they cost."""
        named = [f"“{c}” of {n:,}" for c, n in list(self.common_captions.items())[:EXAMPLES]]
        more = len(self.common_captions) - len(named)
        return (
            f"{', '.join(named)}{f' and {more:,} more' if more else ''} of {self.images:,} "
            f"images; {100 * self.left_out:.1f} % of a batch's other captions are correct, too, "
            "and so not negatives"
        )

    def _skipped(self) -> int:
        return sum(self.skipped.values())

    @property
    def aspects(self) -> np.ndarray:
        """Width over height of each image."""
        return np.asarray(self.widths, float) / np.maximum(1, np.asarray(self.heights))

    def __str__(self) -> str:
        return "\n".join([self.source, *(f"{name:18} {text}" for name, text in self.lines())])

    __repr__ = __str__  # the lists of sizes are too long to be shown

    def _repr_html_(self) -> str:
        from html import escape

        cells = "".join(
            f"<tr><td style='text-align:left;white-space:pre'>{escape(name)}</td>"
            f"<td style='text-align:left'>{escape(text)}</td></tr>"
            for name, text in self.lines()
        )
        return f"<table><caption>{escape(self.source)}</caption>{cells}</table>"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with quantiles instead of all sizes and lengths."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        spreads = {
            "width": self.widths,
            "height": self.heights,
            "aspect": self.aspects if len(self.widths) else (),
            "caption_words": self.caption_words,
            "caption_tokens": self.caption_tokens,
        }
        values |= {name: quantiles(x) for name, x in spreads.items()}
        values["cut_captions"] = self.cut_captions
        if self.duplicates is not None:
            values["duplicates"] = dataclasses.asdict(self.duplicates)
        return values

    def save(self, path) -> Path:
        """Write `to_dict()` as a JSON file."""
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, "utf-8", "backslashreplace")  # file names may not be text
        return path


def quantiles(values) -> dict[str, float] | None:
    """Smallest value, 5 %, median, 95 % and largest; None without values."""
    if not len(values):
        return None
    names = ("min", "5%", "median", "95%", "max")
    found = np.quantile(np.asarray(values, float), (0, 0.05, 0.5, 0.95, 1))
    return {name: round(float(x), 4) for name, x in zip(names, found, strict=True)}


def _spread(values, unit: str, digits: int = 0) -> str:
    found = quantiles(values)
    assert found is not None
    low, middle, high = (f"{found[k]:,.{digits}f}" for k in ("min", "median", "max"))
    return f"{low} to {high}{' ' + unit if unit else ''}, median {middle}"


def count_captions(report: Report, texts: Sequence[Sequence[str]]) -> None:
    """Fill in the fields that depend only on the captions."""
    report.captions = sum(map(len, texts))
    report.caption_words = [len(caption.split()) for captions in texts for caption in captions]
    flat = [caption for captions in texts for caption in captions]
    images_of = Counter(caption for captions in texts for caption in set(captions))
    report.shared_captions = sum(count > 1 for count in images_of.values())
    counts = torch.tensor([len(captions) for captions in texts])
    correct = CorrectCaptions(torch.arange(len(texts)), counts, number(flat))
    report.common_captions = {flat[row]: count for row, count in correct.common()}
    report.left_out = correct.left_out()
