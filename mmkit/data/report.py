"""What was loaded from a source and what was not: counts, reasons, sizes, captions, duplicates.

`loaded + sum(skipped.values()) == rows`, always. Walk-through:
notebooks/08_your_own_pictures.ipynb.
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
from .clusters import number
from .partners import CorrectCaptions

CHECKS = {"decode": "each decoded", "head": "heads and ends looked at"}  # in words
EXAMPLES = 5  # messages kept for each reason
_PLAIN = (  # fields that go to JSON as they are
    "source rows loaded skipped examples pictures captions checked why_unchecked bytes "
    "identical_pictures shared_captions common_captions left_out blank_captions max_length unknown "
    "blank dark"
).split()


@dataclass(repr=False)
class Report:
    """What became of the rows of a source; `str()` is a table, `to_dict()` is JSON's."""

    source: str
    rows: int = 0  # of a table; pictures, of a folder; samples, of shards
    loaded: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first messages
    pictures: int = 0  # different ones; rows of one picture are its captions
    captions: int = 0
    checked: str = ""  # how every picture was looked at: "decode", "head" (and end) or "none"
    why_unchecked: str = ""  # where "none" was nobody's wish
    file_sizes: Sequence[int] = ()  # of each picture, bytes; 0 = not known
    widths: Sequence[int] = ()  # of each picture, pixels
    heights: Sequence[int] = ()
    caption_words: Sequence[int] = ()  # of each caption
    identical_pictures: int | None = None  # that equal an earlier one byte for byte; None = unknown
    shared_captions: int = 0  # captions that more than one picture has
    # captions that very many have (`captions.very_common`) -> how many; the share of a batch's
    # other captions that are then no negatives, because they are correct
    common_captions: dict[str, int] = field(default_factory=dict)
    left_out: float = 0.0
    blank_captions: int = 0  # without words, left out of rows that have others
    # what `mm.inspect` adds
    caption_pieces: Sequence[int] = ()  # of each caption, ends included
    max_length: int = 0  # pieces that a model reads
    unknown: float = 0.0  # share of the captions' letters that the tokenizer does not know
    blank: list[str] = field(default_factory=list)  # names of pictures of nearly one colour
    dark: list[str] = field(default_factory=list)  # names of others that are nearly black
    dark_white: int = 0  # what may be white in them: 4095 of 12 bits kept in 16; 0 = unknown
    duplicates: Any = None  # duplicates.Duplicates

    def skip(self, refused: Refused) -> None:
        """Count one row that is left out."""
        self.skipped[refused.reason] = self.skipped.get(refused.reason, 0) + 1
        kept = self.examples.setdefault(refused.reason, [])
        if len(kept) < EXAMPLES:
            kept.append(str(refused))

    @property
    def bytes(self) -> int:
        """Of all picture files; 0 = not known."""
        return sum(self.file_sizes)

    def part(self, rows: Sequence[int], texts: Sequence[Sequence[str]]) -> "Report":
        """The report of some of the pictures that were loaded, with their captions `texts`."""
        part = Report(f"a part of {self.source}", len(rows), len(rows), pictures=len(rows))
        part.checked, part.why_unchecked = self.checked, self.why_unchecked
        for name in ("widths", "heights", "file_sizes"):
            values = getattr(self, name)
            setattr(part, name, [values[row] for row in rows] if len(values) else [])
        count_captions(part, texts)
        return part

    @property
    def skipped_share(self) -> float:
        return sum(self.skipped.values()) / self.rows if self.rows else 0.0

    @property
    def cut_captions(self) -> int:
        """Captions longer than `max_length` pieces, which lose their end."""
        return sum(n > self.max_length for n in self.caption_pieces)

    def lines(self) -> list[tuple[str, str]]:
        """(what, words): the rows of the table."""
        rows = [("rows", f"{self.rows:,} = {self.loaded:,} loaded + {self._skipped():,} skipped")]
        for reason, count in sorted(self.skipped.items(), key=lambda pair: -pair[1]):
            rows.append((f"  {reason}", f"{count:,}; {self.examples[reason][0]}"))
        why = f": {self.why_unchecked}" if self.why_unchecked else ""
        looked = CHECKS.get(self.checked, f"not looked at{why}")
        size = f", {self.bytes / 1e6:,.1f} MB" if self.bytes else ""
        rows.append(("pictures", f"{self.pictures:,}{size}; {looked}"))
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
        if self.identical_pictures is None:
            rows.append(("  identical", "not looked for"))
        elif self.identical_pictures:
            rows.append(("  identical", f"{self.identical_pictures:,} equal an earlier one"))
        rows.append(
            ("captions", f"{self.captions:,}; {self.shared_captions:,} of several pictures")
        )
        if self.common_captions:
            rows.append(("  very common", self.common_in_words()))
        if self.blank_captions:
            rows.append(("  blank", f"{self.blank_captions:,} of rows with others, left out"))
        if len(self.caption_words):
            rows.append(("  words", _spread(self.caption_words, "")))
        if len(self.caption_pieces):
            cut = f"; {self.cut_captions:,} are longer than {self.max_length} and are cut"
            rows.append(("  pieces", _spread(self.caption_pieces, "") + cut))
            rows.append(("  unknown letters", f"{100 * self.unknown:.1f} %"))
        if self.duplicates is not None:
            rows += [("duplicates", line) for line in str(self.duplicates).splitlines()]
        return rows

    def common_in_words(self) -> str:
        """The captions that very many pictures share, and what they cost."""
        named = [f"“{c}” of {n:,}" for c, n in list(self.common_captions.items())[:EXAMPLES]]
        more = len(self.common_captions) - len(named)
        return (
            f"{', '.join(named)}{f' and {more:,} more' if more else ''} of {self.pictures:,} "
            f"pictures; {100 * self.left_out:.1f} % of a batch's other captions are correct, too, "
            "and so no negatives"
        )

    def _skipped(self) -> int:
        return sum(self.skipped.values())

    @property
    def aspects(self) -> np.ndarray:
        """Width over height of each picture."""
        return np.asarray(self.widths, float) / np.maximum(1, np.asarray(self.heights))

    def __str__(self) -> str:
        return "\n".join([self.source, *(f"{name:18} {words}" for name, words in self.lines())])

    __repr__ = __str__  # sizes of 50,000 pictures are no sight

    def _repr_html_(self) -> str:
        from html import escape

        cells = "".join(
            f"<tr><td style='text-align:left;white-space:pre'>{escape(name)}</td>"
            f"<td style='text-align:left'>{escape(words)}</td></tr>"
            for name, words in self.lines()
        )
        return f"<table><caption>{escape(self.source)}</caption>{cells}</table>"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; of sizes and lengths their quantiles, not each one."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        spreads = {
            "width": self.widths,
            "height": self.heights,
            "aspect": self.aspects if len(self.widths) else (),
            "caption_words": self.caption_words,
            "caption_pieces": self.caption_pieces,
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
        path.write_text(text, "utf-8", "backslashreplace")  # of file names that are no text
        return path


def quantiles(values) -> dict[str, float] | None:
    """Smallest, 5 %, median, 95 %, largest; None of nothing."""
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
    """Fill in what the captions alone say."""
    report.captions = sum(map(len, texts))
    report.caption_words = [len(caption.split()) for captions in texts for caption in captions]
    flat = [caption for captions in texts for caption in captions]
    pictures_of = Counter(caption for captions in texts for caption in set(captions))
    report.shared_captions = sum(count > 1 for count in pictures_of.values())
    counts = torch.tensor([len(captions) for captions in texts])
    correct = CorrectCaptions(torch.arange(len(texts)), counts, number(flat))
    report.common_captions = {flat[row]: count for row, count in correct.common()}
    report.left_out = correct.left_out()
