"""The user's own images on the command line: flags, and the loader that takes them.

The arguments of `mm.load_data` are flags here, the same for train, evaluate and search.
Walk-through: notebooks/08_your_own_images.ipynb.
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

ALL = ("on_error", "max_skipped")  # flags that every loader takes
NOT_COLUMNS = ("near", "content", "caption")  # groups of `split` that are not columns of meta


@dataclasses.dataclass
class Source:
    """Images of your own, as `mm.load_data` takes them."""

    # A table, a folder, tar shards or a hub data set; "" = the built-in images.
    data: str = ""
    # Column of the images in a table, suffix in shards; None = found by its usual names.
    image: str | None = None
    # Column of the texts in a table, suffix in shards; None = found by its usual names.
    text: str | None = None
    # Folder of the images of a table (None = the table's own), of COCO or of Flickr30k.
    root: str | None = None
    # Split of a hub data set or of Karpathy's JSON.
    data_split: str | None = None
    # Text encoding of a table; None = UTF-8, or what its byte order mark says.
    encoding: str | None = None
    # Character between a table's columns; None = found from its content.
    separator: str | None = None
    # Groups that stay in one part: "near" (near-duplicates) | "content" (equal images) |
    # "caption" (equal captions), or a column (rows of equal value).
    group: str = "near"
    # A bad row stops the command ("raise"), or is left out and counted ("skip").
    on_error: Literal["raise", "skip"] = "raise"
    # Fraction of the rows that may be left out, in [0, 1].
    max_skipped: float = 0.1

    def load(self, **options) -> MultimodalDataset:
        """Load the data set; ValueError for a flag that its loader does not take."""
        way, source = published(self.data) or way_in(self.data)
        takes = inspect.signature(way).parameters
        known = {flag: name for flag, name in _FLAGS if name in takes}
        for flag, value in self.given(without=("data", "group")).items():
            if flag not in known and flag not in ALL:
                hint = f"; {way.__name__} takes {_listed([*known])}" if known else ""
                raise ValueError(
                    f"{_flag(flag)} {value} has no meaning for {self.data}, which is read by "
                    f"mm.{way.__name__}; leave it out{hint}"
                )
            options.setdefault(known.get(flag, flag), value)
        if "images" in takes and "images" not in options:
            raise ValueError(
                f"{self.data} is read by mm.{way.__name__}, and does not say where its images "
                "are; give --root FOLDER"
            )
        if self.group not in NOT_COLUMNS and "meta" in takes:  # others have their own metadata
            options["meta"] = [self.group]
        try:
            return way(source, **options)
        except ValueError as error:  # it names an argument, not a flag
            raise ValueError(str(error).replace("give split=", "give --data-split ")) from None

    def divide(self, dataset: MultimodalDataset, seed: int) -> Parts:
        """(train, val, test), divided as the command `train` does."""
        try:
            return split(dataset, by=self.group, seed=seed)
        except ValueError as error:  # it names arguments, not flags
            message = re.sub(r"\bby='([^']*)'", r"--group \1", str(error))
            message = message.replace("a larger fraction, another seed than", "another --seed than")
            raise ValueError(message) from None

    def given(self, without: tuple[str, ...] = ()) -> dict:
        """The flags that differ from their defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in without and getattr(self, f.name) != f.default
        }

    def words(self, without: tuple[str, ...] = ()) -> list[str]:
        """These flags as arguments of a command."""
        return [text for f, value in self.given(without).items() for text in (_flag(f), str(value))]

    def refuse_without_data(self) -> None:
        """ValueError for flags about the user's own images where the built-in ones are used."""
        if not self.data and (given := self.given()):
            raise ValueError(
                f"{_listed([*given])} is for images of your own; give --data, too, or leave it out"
            )


# (flag, name of a loader's argument)
_FLAGS = [(name, name) for name in ("image", "text", "root", "encoding", "separator")]
_FLAGS += [("root", "images"), ("data_split", "split")]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _listed(names: list[str]) -> str:
    return ", ".join(map(_flag, names))


def published(data: str) -> tuple[Callable, Path] | None:
    """(`from_coco` or `from_flickr30k`, the file) where a file is in one of their formats."""
    path = Path(data).expanduser()
    if path.name.endswith((".token", ".token.txt")) and path.is_file():
        return from_flickr30k, path
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    try:
        value = read_json(path)
    except ValueError:  # JSON lines, for example; the loader reports what is wrong
        return None
    images = value.get("images") if isinstance(value, dict) else None
    if not isinstance(images, list):
        return None
    if "annotations" in value:
        return from_coco, path
    first = images[0] if images else None
    return (from_flickr30k, path) if isinstance(first, dict) and "sentences" in first else None
