"""Load Hugging Face data sets: an object, a folder, a parquet file, a name on the hub.

Nothing is copied: images are read from the table when they are needed.
Walk-through: notebooks/08_your_own_images.ipynb.
"""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import nearest
from ..files import cache_folder
from .dataset import MultimodalDataset
from .image_files import Cells
from .rows import Found, Options, existing_folder, load, within
from .tables import listed, pick_column


def from_hub(
    source,
    *,
    image: str | None = None,
    text: str | Sequence[str] | None = None,
    meta: str | Sequence[str] = (),
    split: str | None = None,
    root: str | os.PathLike | None = None,
    **options,
) -> MultimodalDataset:
    """Load a Hugging Face data set: an object, a local folder or parquet file, a name on the hub.

    Needs `pip install "mmkit[data]"`. Images are bytes, PIL images or paths; a text is a string or
    a list of strings.

    Args:
        source: an object of `datasets`, the path of a folder or parquet file, or a name on the hub.
        image: the column of the images (None: found by its usual names).
        text: the columns of the captions, one or several (None: found by their usual names).
        meta: columns kept in `data.meta`.
        split: the split to load, for a data set with several.
        root: the folder of images given as paths (None: that of the file, else the current one).
        **options: of `Options`, see `load_data`.

    Returns:
        MultimodalDataset with a `report`.

    Raises:
        ImportError: the `datasets` library is not installed.
        ValueError: unknown split or column, not a data set, or a row that cannot be loaded (see
            `load_data`).
    """
    options_ = Options.named(from_hub, options)
    datasets = _datasets()
    table, name = _hub_table(datasets, source, split, options_)
    table = _one_table(table, name)
    image_of = pick_column(table.column_names, image, "image", name)
    text_of = [pick_column(table.column_names, wanted, "text", name) for wanted in listed(text)]
    meta = listed(meta)
    for wanted in meta:
        pick_column(table.column_names, wanted, "meta", name)
    if isinstance(table.features[image_of], datasets.Image):
        table = table.cast_column(image_of, datasets.Image(decode=False))
    found = Found(name, "row", hint="is root='…' the folder of the images?")
    named = _named_classes(table.select_columns([*{*text_of, *meta}]))
    rows = ((line, row | {image_of: line}) for line, row in enumerate(named))
    found.add_rows(rows, image_of, text_of, meta)
    beside = os.path.dirname(name) if os.path.exists(name) else ""
    inside = str(existing_folder(root or beside or "."))
    find = functools.partial(within, inside, remedy="give a root that holds all images")
    return load(found, options_, store=Cells(table[image_of], f"{name}, {image_of}", find))


def _named_classes(table) -> Iterator[dict]:
    """The rows of a table, with the names of classes in place of their numbers."""
    kinds = {name: kind for name, kind in table.features.items() if hasattr(kind, "int2str")}
    for row in table:
        classes = {name: kind for name, kind in kinds.items() if row[name] is not None}
        yield row | {name: kind.int2str(row[name]) for name, kind in classes.items()}


def _one_table(table, name: str):
    """The only split, with plain values; ValueError if it is not a data set with a length."""
    if hasattr(table, "keys") and len(table) == 1:
        table = next(iter(table.values()))
    if hasattr(table, "keys"):
        raise ValueError(f"{name} has splits {', '.join(map(str, table))}; give split='…'")
    if not hasattr(table, "select_columns"):
        raise ValueError(f"{name} is {type(table).__name__}, not a data set of `datasets`")
    if not hasattr(table, "__len__"):
        raise ValueError(f"{name} is a stream; give a data set with a length (streaming=False)")
    return table.with_format(None)  # whatever format was set


def _datasets():
    try:
        import datasets
    except ImportError:
        raise ImportError(
            "Hugging Face data sets and parquet files need the datasets library: "
            'pip install "mmkit[data]"'
        ) from None
    return datasets


class UnknownSplit(ValueError):
    """A split that a data set does not have."""


def known_split(split: str | Sequence[str] | None, known: Iterable | None, name: str) -> None:
    """Raise UnknownSplit for a split that is not known; known: None = there are no splits."""
    if split is not None and known is None:
        raise UnknownSplit(f"{name} has no splits; leave split={split!r} out")
    for one in [] if split is None else listed(split):
        if known is not None and one not in known:
            raise UnknownSplit(f"{name} has no split {one!r}; {nearest(one, known)}")


def _name(table) -> str:
    """The name of a data set object in messages: the one that it was loaded by, if known."""
    info = getattr(table, "info", None)
    return getattr(info, "dataset_name", None) or "the data set"


def _part(table, split: str | None, name: str):
    """The split that is asked for; without one all of the data."""
    known_split(split, table if hasattr(table, "keys") else None, name)
    return table if split is None else table[split]


def _hub_table(datasets, source, split: str | None, options: Options) -> tuple[Any, str]:
    """(the table or its splits, its name in messages)."""
    if not isinstance(source, str | os.PathLike):
        return _part(source, split, name := _name(source)), name
    path, name = Path(source), str(source)
    cache = str(cache_folder(options.cache_dir) / "datasets")
    try:
        if path.suffix.lower() == ".parquet":
            known_split(split, None, name)
            return datasets.Dataset.from_parquet(name, cache_dir=cache), name
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _part(datasets.load_from_disk(name), split, name), name
        return datasets.load_dataset(name, split=split, cache_dir=cache), name
    except (FileNotFoundError, UnknownSplit):
        raise
    except Exception as error:  # of many kinds, from many libraries
        below = error.__cause__ or error  # the wrapped error says more
        lines = str(below).strip().splitlines() or [type(below).__name__]
        raise ValueError(f"{name} cannot be read as a data set: {lines[-1]}") from None
