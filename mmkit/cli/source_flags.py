"""Pictures of one's own on the command line: flags, and which way in takes them.

What `mm.load_data` is given in a notebook are flags here, the same for train, evaluate and search.
Walk-through: notebooks/08_your_own_pictures.ipynb.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ..data.dataset import MultimodalDataset
from ..data.published import from_coco, from_flickr30k
from ..data.sources import way_in
from ..data.splits import Parts, split
from ..data.tables import read_json

ALL = ("on_error", "max_skipped")  # flags that every way in takes
NOT_COLUMNS = ("near", "content", "caption")  # what `split` can go by without meta


@dataclasses.dataclass
class Source:
    """Pictures of your own, as `mm.load_data` takes them."""

    # A table, a folder, tar shards or a hub data set; "" = the built-in images.
    data: str = ""
    # Column of the images in a table, their suffix in shards; None = found by its usual names.
    image: str | None = None
    # Column of the texts in a table, their suffix in shards; None = found by its usual names.
    text: str | None = None
    # Folder of the images of a table (None = the table's own), of COCO or of Flickr30k.
    root: str | None = None
    # Split of a hub data set or of Karpathy's JSON.
    data_split: str | None = None
    # Encoding of a table's letters; None = UTF-8, or what its byte order mark says.
    encoding: str | None = None
    # Character between a table's columns; None = the one that fits.
    separator: str | None = None
    # What is never divided between the parts: "near" (near-duplicates) | "content" (equal
    # images) | "caption" (equal captions), or a column, whose every value stays in one part.
    group: str = "near"
    # A bad row stops everything ("raise"), or is left out and counted ("skip").
    on_error: Literal["raise", "skip"] = "raise"
    # Fraction of the rows that may be left out, in [0, 1].
    max_skipped: float = 0.1

    def load(self, **options) -> MultimodalDataset:
        """The data set; ValueError for a flag that its way in does not take."""
        way, source = published(self.data) or way_in(self.data)
        takes = inspect.signature(way).parameters
        known = {flag: name for flag, name in _FLAGS if name in takes}
        for flag, value in self.given(without=("data", "group")).items():
            if flag not in known and flag not in ALL:
                hint = f"; {way.__name__} takes {_listed([*known])}" if known else ""
                raise ValueError(
                    f"{_flag(flag)} {value} means nothing for {self.data}, which is read by "
                    f"mm.{way.__name__}; leave it out{hint}"
                )
            options.setdefault(known.get(flag, flag), value)
        if "images" in takes and "images" not in options:
            raise ValueError(
                f"{self.data} is read by mm.{way.__name__}, and says nothing of where its pictures "
                "are; give --root FOLDER"
            )
        if self.group not in NOT_COLUMNS and "meta" in takes:  # others have facts of their own
            options["meta"] = [self.group]
        try:
            return way(source, **options)
        except ValueError as error:  # in the words of a notebook
            raise ValueError(str(error).replace("give split=", "give --data-split ")) from None

    def divide(self, dataset: MultimodalDataset, seed: int) -> Parts:
        """(train, val, test), as `train` does it."""
        try:
            return split(dataset, by=self.group, seed=seed)
        except ValueError as error:  # in the words of a notebook
            words = re.sub(r"\bby='([^']*)'", r"--group \1", str(error))
            words = words.replace("a larger share, another seed than", "another --seed than")
            raise ValueError(words) from None

    def given(self, without: tuple[str, ...] = ()) -> dict:
        """The flags that are not as they are by default."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in without and getattr(self, f.name) != f.default
        }

    def words(self, without: tuple[str, ...] = ()) -> list[str]:
        """These flags, to be typed again."""
        return [word for f, value in self.given(without).items() for word in (_flag(f), str(value))]

    def refuse_without_data(self) -> None:
        """ValueError for flags of one's own pictures where the built-in ones are taken."""
        if not self.data and (given := self.given()):
            raise ValueError(
                f"{_listed([*given])} is about pictures of your own; give --data, too, or leave it "
                "out"
            )


# (flag, what a way in calls it)
_FLAGS = [(name, name) for name in ("image", "text", "root", "encoding", "separator")]
_FLAGS += [("root", "images"), ("data_split", "split")]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _listed(names: list[str]) -> str:
    return ", ".join(map(_flag, names))


def published(data: str) -> tuple[Callable, Path] | None:
    """(`from_coco` or `from_flickr30k`, the file) where a file is in one of their forms."""
    path = Path(data).expanduser()
    if path.name.endswith((".token", ".token.txt")) and path.is_file():
        return from_flickr30k, path
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    try:
        value = read_json(path)
    except ValueError:  # JSON lines, say; whoever reads it says what is wrong
        return None
    pictures = value.get("images") if isinstance(value, dict) else None
    if not isinstance(pictures, list):
        return None
    if "annotations" in value:
        return from_coco, path
    first = pictures[0] if pictures else None
    return (from_flickr30k, path) if isinstance(first, dict) and "sentences" in first else None
