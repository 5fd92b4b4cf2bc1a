"""Load data: lists, tables, folders, hub data sets, COCO and Flickr30k, tar shards.

Each loader is a function that returns a `MultimodalDataset` with a `report` of what was loaded and
what was not; they differ only in how they find rows. `load_data(source)` chooses the loader by the
kind of the source. Walk-through: notebooks/08_your_own_images.ipynb.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import nearest
from .dataset import MultimodalDataset
from .folders import (
    IMAGE_SUFFIXES,
    Tree,
    from_class_folders,
    from_folder,
    look_through,
)
from .hub import from_hub
from .rows import Found, Options, existing_file, existing_folder, load
from .shard_index import ShardIndex, name_of, read_index
from .shards import TarMembers
from .tables import TABLES, Row, listed, pick_column, read_table
from .tar_index import DAMAGED, SHARD_IMAGE_SUFFIXES

# ---- lists, tables -------------------------------------------------------------------------------


def from_lists(paths: Sequence, texts: Sequence, *, meta=None, **options) -> MultimodalDataset:
    """Load images from a list of paths and a list of their captions.

    Unlike `MultimodalDataset(...)` it checks every image, can skip bad ones, merges rows of the
    same image, and caches decoded images.

    Args:
        paths: one file per row (or its bytes, or a PIL image).
        texts: for each row a caption or a list of captions.
        meta: for each row a dict of metadata, kept in `data.meta`.
        **options: of `Options`, see `load_data`.

    Returns:
        MultimodalDataset with a `report`.

    Raises:
        ValueError: unequal numbers, or a row that cannot be loaded (see `load_data`).

    Example:
        >>> from PIL import Image
        >>> Image.new("RGB", (40, 30), "red").save("red.png")
        >>> mm.from_lists(["red.png"], [["a red image", "red"]], image_size=32)
        MultimodalDataset(the list: 1 images (3, 32, 32), 2 captions)
    """
    options_ = Options.named(from_lists, options)
    if len(paths) != len(texts):
        raise ValueError(f"{len(paths)} paths but {len(texts)} texts; give one per image")
    if meta and len(meta) != len(paths):
        raise ValueError(f"{len(paths)} paths but {len(meta)} meta; give a dict per image")
    found = Found("the list", "row")
    for row, (path, text) in enumerate(zip(paths, texts, strict=True)):
        found.add(row, path, text, meta[row] if meta else None)
    return load(found, options_)


def from_table(
    path,
    *,
    image: str | None = None,
    text: str | Sequence[str] | None = None,
    meta: str | Sequence[str] = (),
    root: str | os.PathLike | None = None,
    encoding: str | None = None,
    separator: str | None = None,
    quotes: bool | str = True,
    **options,
) -> MultimodalDataset:
    r"""Load a CSV, TSV, JSON or parquet file, or a data frame, with a row per image and caption.

    Args:
        path: the file (JSON: an object per line, or an array of objects), or a data frame.
        image: the column of the image paths (None: found by its usual names).
        text: columns of captions, or of lists of them (None: usual names); equal images are merged.
        meta: columns kept in `data.meta`, for example to split by them.
        root: folder that holds all images, from which their paths start (or from the table's);
            None: that of the table; with a frame they may be anywhere.
        encoding: of a text file (None: by its byte order mark, else UTF-8).
        separator: of a CSV file (None: recognises comma, semicolon, tab and bar).
        quotes: whether double quotes enclose fields of a CSV file; False treats them as letters,
            "backslash" reads \" within a field as a quote.
        **options: of `Options`, see `load_data`.

    Returns:
        MultimodalDataset with a `report`. For errors see `load_data`.

    Example:
        >>> from PIL import Image
        >>> Image.new("RGB", (40, 30), "red").save("red.png")
        >>> with open("pairs.jsonl", "w") as file:
        ...     _ = file.write('{"image": "red.png", "text": ["a red image", "red"]}')
        >>> mm.from_table("pairs.jsonl").texts
        [['a red image', 'red']]
    """
    frame = path if _is_frame(path) else None
    file = Path() if frame is not None else existing_file(path)
    if file.suffix.lower() == ".parquet":
        return from_hub(file, image=image, text=text, meta=meta, root=root, **options)
    options_, hint = Options.named(from_table, options), ""
    if frame is not None:
        columns, rows, unit = [str(name) for name in frame.columns], _rows_of(frame), "row"
    else:
        columns, rows, unit, hint = read_table(file, encoding, separator, quotes)
    name, meta = "the data frame" if frame is not None else str(file), listed(meta)
    image_of = pick_column(columns, image, "image", name, hint)
    text_of = [pick_column(columns, wanted, "text", name, hint) for wanted in listed(text)]
    for wanted in meta:
        pick_column(columns, wanted, "meta", name)
    found = Found(name, unit, hint="is root='…' the folder of the images?")
    found.add_rows(rows, image_of, text_of, meta)
    beside = "" if frame is not None else str(file.parent)
    inside = str(existing_folder(root)) if root is not None else beside or None
    remedy = "give a root that holds all images"
    return load(found, options_, root=inside, beside=beside, remedy=remedy)


def _is_frame(source) -> bool:
    """Is it a data frame of pandas or polars? Neither is imported."""
    module = type(source).__module__.partition(".")[0]
    return module in ("pandas", "polars") and type(source).__name__ == "DataFrame"


def _rows_of(frame) -> Iterator[Row]:
    """The rows of a data frame, as those of a table."""
    rows = frame.to_dicts() if hasattr(frame, "to_dicts") else frame.to_dict("records")
    return enumerate({str(name): value for name, value in row.items()} for row in rows)


# ---- tar shards ----------------------------------------------------------------------------------


def from_shards(
    urls: str | os.PathLike | Sequence[str],
    *,
    image: str | Sequence[str] | None = None,
    text: str | Sequence[str] | None = None,
    meta: Sequence[str] = (),
    spool_gigabytes: float = 10.0,
    **options,
) -> MultimodalDataset:
    """Load WebDataset tar shards.

    Every shard is indexed once. An epoch then reads a few shards at a time, every sample once, each
    process and worker its own. Nothing is cached unless cache_gigabytes is given. Sample ids are
    those that `write_shards` wrote, if every sample has one and all differ, else row numbers.

    Args:
        urls: files, globs, a folder, "00{000..331}.tar", addresses, or a list of these.
        image: suffixes of images; the first that a sample has is its image (None: usual ones).
        text: suffixes of captions; "json.caption" is a key of the .json member (None: that and
            "txt").
        meta: keys of the .json kept in `data.meta`, for example to split by them.
        spool_gigabytes: disk space for copies of addresses (https://, s3://, hf://) and of .tar.gz.
        **options: of `Options`, see `load_data`.

    Returns:
        MultimodalDataset with a `report`.

    Raises:
        FileNotFoundError: a shard does not exist.
        ValueError: a file that is not a tar, an unknown key, or a sample that cannot be loaded
            (see `load_data`).
        OSError: an address cannot be fetched.
    """
    options_ = Options.named(from_shards, {"cache_gigabytes": 0.0} | options)
    meta = listed(meta)
    where: dict = dict(cache_dir=options_.cache_dir, spool_gigabytes=spool_gigabytes)
    suffixes: dict = dict(image=image or SHARD_IMAGE_SUFFIXES, text=text or ("txt", "json.caption"))
    index = read_index(urls, meta=meta, on_error=options_.on_error, **suffixes, **where)
    _known_metadata(index, meta, name_of(urls))
    _check_lost_shards(index, options_.max_skipped, name_of(urls))
    spooled = sum(shard.size for shard in index.shards if shard.spooled) / 1e9
    if unchecked := options.get("check") is None and spooled > spool_gigabytes:
        options_.check = "none"  # each check of an image would fetch its shard again
    found = Found(name_of(urls), "sample")
    for line, captions in enumerate(index.captions):
        metadata = {"key": index.keys[line]} | {key: index.meta[line].get(key) for key in meta}
        found.add(line + 1, line, captions, metadata)
    for line, refused in enumerate(index.refused, len(found.lines) + 1):
        found.add(line, refused)
    data = load(found, options_, store=TarMembers(index, **where))
    if unchecked:
        data.report.why_unchecked = (
            f"the shards fill {spooled:,.1f} GB, more than spool_gigabytes={spool_gigabytes:g}, so "
            "that each check would fetch them again; a broken image will stop the training run, "
            "whatever on_error is; raise spool_gigabytes, or give check='decode'"
        )
    ids = [index.ids[i] for i in data._rows]
    if None not in ids and len(set(ids)) == len(ids):
        data.sample_ids = torch.tensor(ids)
    return data


def _known_metadata(index: ShardIndex, meta: Sequence[str], name: str) -> None:
    """Raise ValueError for a key that no sample has, since it must be misspelt."""
    for key in meta:
        if len(index) and not any(key in metadata for metadata in index.meta):
            hint = nearest(key, index.fields) if index.fields else "no sample has a .json"
            raise ValueError(f"{name}: no .json has the key {key!r}; {hint}")


def _check_lost_shards(index: ShardIndex, most: float, name: str) -> None:
    """Raise ValueError if too many shards are damaged, since nobody knows what was in them."""
    lost = [refused for refused in index.refused if refused.reason in DAMAGED]
    count = len(index.shards) + sum(refused.reason == "not a tar" for refused in lost)
    if len(lost) > most * count:
        raise ValueError(
            f"{name}: {len(lost)} of {count} shards are cut off or damaged, more than max_skipped="
            f"{most:g} of them, and how many samples that loses is not known. {lost[0]}"
        )


# ---- any source ----------------------------------------------------------------------------------

_TARS = re.compile(r"\.(tar|tgz|txz|tbz2?)(\.(gz|xz|bz2|zst))?$", re.IGNORECASE)
# Suffixes by which a name is that of a missing file, not of a data set on the hub.
_FILES = {*TABLES, *IMAGE_SUFFIXES, ".txt", ".zip", ".gz", ".xlsx", ".xls", ".arrow", ".npz"}
_SPLITS = re.compile(r"(train|training|val|valid|validation|test|testing|dev)[-_ ]?\d*")
_NO_CLASSES = re.compile(r"(images?|imgs?|pictures?|pics?|photos?|data|jpe?gs?|pngs?)[-_ ]?\d*")
Way = tuple[Callable[..., MultimodalDataset], Any]
FORMS = (
    "a folder may have a .txt beside each image, a folder of images per class, tar shards, or "
    "parquet files; captions in a table are loaded by mm.from_table(table, root=folder)"
)


def load_data(source, **options) -> MultimodalDataset:
    """Load a data set from a table, a folder, shards or a hub data set, whatever the source is.

    A folder is recognised by its content: shards or parquet files at its top, data saved by
    `datasets`, a .txt beside each image, or a folder per class. A list is one of shards; a data
    frame is a table. For COCO and Flickr30k, which are two paths each, use `from_coco` and
    `from_flickr30k`; for a list of paths and one of texts, `from_lists`.

    Args:
        source: the path of a table, a folder or shards, a data frame, an object of `datasets`, or
            the name of a data set on the hub.
        **options: arguments of the function for this source, and those of all of them: image_size,
            transform, tokenizer and device as in `MultimodalDataset`; on_error="raise" stops at
            the first bad row, "skip" leaves bad rows out, up to the fraction max_skipped (0.1);
            check="head", "decode" or "none" of each image; reading, an `mm.Reading`;
            cache_gigabytes (20; 0 = none) and cache_dir of decoded images; num_workers (2).

    Returns:
        MultimodalDataset with a `report`.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: a source that could be several things or is none of them (the message names the
            calls to choose from), an unknown option, a bad row, or too many skipped ones.

    Example:
        >>> from PIL import Image
        >>> Image.new("RGB", (40, 30), "red").save("red.png")
        >>> with open("pairs.csv", "w") as file:
        ...     print("image,text", "red.png,red", "blue.png,blue", sep=chr(10), file=file)
        >>> mm.load_data("pairs.csv", on_error="skip", max_skipped=0.5).report.skipped
        {'missing': 1}
    """
    way, source = way_in(source)
    return way(source, **options)


def way_in(source) -> Way:
    """(the loader of a source, its argument), for callers that need the loader's options.

    Raises FileNotFoundError if the source does not exist, ValueError if it could be several things.
    """
    if not isinstance(source, str | os.PathLike):
        return _of_object(source)
    text, path = os.fspath(source), Path(source).expanduser()
    if text.startswith("pipe:"):
        return from_shards, text  # which says that commands are no longer run
    if path.is_dir():
        return _of_folder(path)
    if path.exists():
        return _of_file(path)
    if re.search(r"\.(tar|tgz)\b", text) if "://" in text else _TARS.search(text.rstrip("}]")):
        return from_shards, text
    if "://" in text:
        raise ValueError(f"{text} is a web address; download it first, then give its path")
    may_be_hub = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    if may_be_hub and path.suffix.lower() not in _FILES and not path.parent.exists():
        return from_hub, text
    hub = "" if "/" in text or path.suffix else f", or take mm.from_hub({text!r})"
    raise FileNotFoundError(f"{source} does not exist; check the path{hub}")


def _of_object(source) -> Way:
    """The loader of an object that is not a path."""
    if _is_frame(source):
        return from_table, source
    if not isinstance(source, list | tuple):
        return from_hub, source
    others = [name for name in source if not isinstance(name, str | os.PathLike)]
    if others:
        raise ValueError(
            f"a {type(source).__name__} of {type(others[0]).__name__} is not a list of shards; for "
            "a list of paths and one of texts take mm.from_lists(paths, texts)"
        )
    if source and all(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in source):
        raise ValueError(
            f"{name_of(source)} are images without captions; take mm.from_lists(paths, texts)"
        )
    return from_shards, source


def _of_file(path: Path) -> Way:
    """The loader of a file, by its suffix."""
    if _TARS.search(path.name):
        return from_shards, path
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(
            f"{path} is one image; give the folder that it is in, or take "
            f"mm.from_lists([{str(path)!r}], ['its caption'])"
        )
    if path.suffix == ".token":
        raise ValueError(
            f"{path} has the form of Flickr30k; take mm.from_flickr30k({str(path)!r}, folder)"
        )
    return from_table, path


def _of_folder(folder: Path) -> Way:
    """The loader of a folder, by its content; ValueError if that could be several."""
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return from_hub, folder
    tree = look_through(folder)
    shards, parquet = _at_top(tree)
    images = [image for image, refused in tree.images if not refused]
    kinds: dict[Callable, str] = {  # loader -> the files that it would read
        from_shards: _some(shards, "tar shard"),
        from_hub: _some(parquet, "parquet file"),
        from_folder: _some(images, "image"),
    }
    there = {way: files for way, files in kinds.items() if files}
    if len(there) > 1:
        calls = " or ".join(f"mm.{way.__name__}({str(folder)!r})" for way in there)
        raise ValueError(f"{folder} holds {' and '.join(there.values())}; choose: take {calls}")
    if shards or parquet:
        return next(iter(there)), folder
    if any(tree.words_of(image) for image in images):
        return from_folder, folder
    if images:
        _check_classes(folder, tree, images)
        return from_class_folders, folder
    return _of_no_images(folder, tree)


def _at_top(tree: Tree) -> tuple[list[str], list[str]]:
    """The tar shards and parquet files in a folder itself.

    img2dataset writes 00000.parquet beside 00000.tar: these are metadata of a shard.
    """
    top = [name for name in tree.others if "/" not in name]
    shards = [name for name in top if _TARS.search(name)]
    about = {_TARS.sub("", name) for name in shards}
    parquet = [n for n in top if n.lower().endswith(".parquet") and Path(n).stem not in about]
    return shards, parquet


def _some(names: list[str], what: str) -> str:
    """Number and first name, as in "3 images (a.png, ...)"; "" for none."""
    more, plural = (", ...", "s") if len(names) > 1 else ("", "")
    return f"{len(names):,} {what}{plural} ({names[0]}{more})" if names else ""


def _check_classes(folder: Path, tree: Tree, images: list[str]) -> None:
    """Raise ValueError if the folders in a folder are unlikely to be classes."""
    inside = os.path.commonpath([os.path.dirname(image) for image in images])
    tables = [name for name in [*tree.others, *tree.words.values()] if _is_captions(name)]
    if tables:
        best = min(tables, key=lambda name: ("caption" not in name.lower(), name.count("/")))
        raise ValueError(
            f"{folder} holds {_some(images, 'image')} and {best}, which may have their "
            f"captions: take {_call_for(folder / best, folder / inside)}; or, if folders are "
            f"classes, mm.from_class_folders({str(folder)!r})"
        )
    classes = sorted({image.partition("/")[0] for image in images if "/" in image})
    if not classes:
        raise ValueError(f"{folder} holds {_some(images, 'image')} and no captions; {FORMS}")
    names = [name.lower() for name in classes]
    splits = [name for name in classes if _SPLITS.fullmatch(name.lower())]
    if len(classes) > 1 and not splits and not all(map(_NO_CLASSES.fullmatch, names)):
        return
    shown = ", ".join(map(repr, classes[:5]))
    below = folder / (splits or classes)[0]
    raise ValueError(
        f"the images in {folder} are in {shown}: no names of classes, or only one; if there are "
        f"folders of classes below, take mm.from_class_folders({str(below)!r}); if not, "
        f"mm.from_class_folders({str(folder)!r}) takes these for classes, and {FORMS}"
    )


def _is_captions(name: str) -> bool:
    """Is it a table in a folder or one level below? A .txt is one only if its name says so."""
    path = Path(name.lower())
    text = path.suffix == ".txt" and ("caption" in path.stem or path.stem.endswith(".token"))
    return len(path.parts) <= 2 and (text or path.suffix in TABLES)


def _call_for(table: Path, folder: Path) -> str:
    """The call that reads a table whose images are under a folder."""
    # Hugging Face's metadata.jsonl names the images in its own folder
    name, where = repr(str(table)), repr(str(table.parent if table.stem == "metadata" else folder))
    if table.name.lower().endswith((".token", ".token.txt")) or "dataset_" in table.name:
        return f"mm.from_flickr30k({name}, {where})"
    if table.suffix.lower() == ".json":
        return f"mm.from_coco({name}, {where}) or mm.from_table({name}, root={where})"
    if table.suffix.lower() == ".parquet":
        return f"mm.from_hub({name}, root={where})"
    return f"mm.from_table({name}, root={where})"


def _of_no_images(folder: Path, tree: Tree) -> Way:
    """The loader of a folder without images or other data at its top, or a helpful ValueError."""
    if any(name.lower().endswith(".parquet") for name in tree.others):
        return from_hub, folder
    shards = [name for name in tree.others if _TARS.search(name)]
    if shards:
        pattern = str(folder / os.path.dirname(shards[0]) / "*.tar")
        raise ValueError(
            f"{folder} holds {_some(shards, 'tar shard')} in folders below it; take "
            f"mm.from_shards({pattern!r})"
        )
    tables = [name for name in tree.others if _is_captions(name)]
    if tables:
        call = f"mm.load_data({str(folder / tables[0])!r})"
        raise ValueError(f"{folder} holds no images but {tables[0]}; take {call}")
    if tree.images:
        return from_folder, folder  # which reports why each is not read
    raise ValueError(f"{folder} holds no images; {FORMS}")
