"""Ways in: lists, tables, folders, hub data sets, COCO and Flickr30k, tar shards.

Each is one function that gives a `MultimodalDataset` with a `report` of what was loaded and what
was not; they differ only in how rows are found. `load_data(source)` picks the function by what it
is given. Walk-through: notebooks/08_your_own_pictures.ipynb.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import Refused, nearest
from .dataset import MultimodalDataset
from .folders import (
    PICTURE_SUFFIXES,
    Tree,
    existing_file,
    from_class_folders,
    from_folder,
    look_through,
)
from .hub import from_hub
from .rows import Found, Options, load
from .shard_index import ShardIndex, name_of, read_index
from .shards import TarMembers
from .tables import TABLES, Row, listed, pick_column, read_table
from .tar_index import IMAGE_SUFFIXES

# ---- lists, tables -------------------------------------------------------------------------------


def from_lists(paths: Sequence, texts: Sequence, *, meta=None, **options) -> MultimodalDataset:
    """Pictures by their paths and, for each, a caption or a list of captions.

    meta: of each picture a dict of facts, kept in `data.meta`. options: of `Options`. Unlike
    `MultimodalDataset(...)` it looks into every picture, can skip bad ones, merges rows of one
    picture, and caches.
    """
    options_ = Options.named(from_lists, options)
    if len(paths) != len(texts):
        raise ValueError(f"{len(paths)} paths but {len(texts)} texts; give one per picture")
    if meta and len(meta) != len(paths):
        raise ValueError(f"{len(paths)} paths but {len(meta)} meta; give a dict per picture")
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
    quotes: bool = True,
    **options,
) -> MultimodalDataset:
    """A CSV, TSV, JSON or parquet file, or a data frame, with a row per picture and caption.

    image, text: names of the columns (None: found by their usual names); several text columns are
    several captions, and so are several rows of one picture. In JSON (an object per line, or an
    array of objects) and parquet a text may be a list. meta: columns kept in `data.meta`, to split
    by, say. root: the folder under which the pictures are (None: the table's own; a frame's may be
    anywhere). encoding, separator, quotes: see `tables.read_csv`.
    """
    frame = path if _is_frame(path) else None
    file = Path() if frame is not None else existing_file(path)
    if file.suffix.lower() == ".parquet":
        return from_hub(file, image=image, text=text, meta=meta, root=root, **options)
    options_, hint = Options.named(from_table, options), ""
    if frame is not None:
        columns, rows, unit = [str(name) for name in frame.columns], _rows_of(frame), "row"
    else:
        how: dict = dict(encoding=encoding, separator=separator, quotes=quotes)
        columns, rows, unit, hint = read_table(file, **how)
    name, meta = "the data frame" if frame is not None else str(file), listed(meta)
    picture_of = pick_column(columns, image, "image", name, hint)
    text_of = [pick_column(columns, wanted, "text", name, hint) for wanted in listed(text)]
    for wanted in meta:
        pick_column(columns, wanted, "meta", name)
    found = Found(name, unit, hint="is root='…' the folder of the pictures?")
    for line, row in rows:
        if isinstance(row, Refused):
            found.add(line, row)
        else:
            captions = [caption for column in text_of for caption in listed(row.get(column))]
            kept = {column: row.get(column) for column in meta}
            found.add(line, row.get(picture_of), captions, kept)
    anywhere = frame is not None and root is None
    return load(found, options_, root=None if anywhere else str(root or file.parent))


def _is_frame(source) -> bool:
    """A data frame of pandas or polars, neither of which is imported for it."""
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
    """WebDataset tar shards: files, globs, a folder, "00{000..331}.tar", "pipe:command".

    image: suffixes of pictures, the first that a sample has (None: the usual ones). text: suffixes
    of captions; "json.caption" is a key of the .json member (None: that and "txt"). meta: keys of
    the .json kept in `data.meta`, to split by, say. Sample ids are those that `write_shards` wrote,
    where every sample has one and all differ, else the numbers of the rows.

    Every shard is indexed once. An epoch then goes through a few shards at a time, each process and
    each worker reading its own samples, every sample once; nothing is cached unless cache_gigabytes
    is given. spool_gigabytes: disk for what commands and .tar.gz give.
    """
    options_ = Options.named(from_shards, {"cache_gigabytes": 0.0} | options)
    meta = listed(meta)
    where: dict = dict(cache_dir=options_.cache_dir, spool_gigabytes=spool_gigabytes)
    suffixes: dict = dict(image=image or IMAGE_SUFFIXES, text=text or ("txt", "json.caption"))
    index = read_index(urls, meta=meta, on_error=options_.on_error, **suffixes, **where)
    _known_facts(index, meta, name_of(urls))
    spooled = sum(shard.size for shard in index.shards if shard.spooled) / 1e9
    unchecked = options.get("check") is None and spooled > spool_gigabytes
    if unchecked:
        options_.check = "none"  # each look at a picture would fetch its shard once more
    found = Found(name_of(urls), "sample")
    for line, captions in enumerate(index.captions):
        facts = {"key": index.keys[line]} | {key: index.meta[line].get(key) for key in meta}
        found.add(line + 1, line, captions, facts)
    for line, refused in enumerate(index.refused, len(found.lines) + 1):
        found.add(line, refused)
    data = load(found, options_, store=TarMembers(index, **where))
    if unchecked:
        data.report.why_unchecked = (
            f"the shards fill {spooled:,.1f} GB, more than spool_gigabytes={spool_gigabytes:g}, so "
            "that each look would fetch them again; a broken picture will stop the training, "
            "whatever on_error says; raise spool_gigabytes, or give check='decode'"
        )
    ids = [index.ids[i] for i in data._rows]
    if None not in ids and len(set(ids)) == len(ids):
        data.sample_ids = torch.tensor(ids)
    return data


def _known_facts(index: ShardIndex, meta: Sequence[str], name: str) -> None:
    """ValueError for a key that no sample has: it is misspelt."""
    for key in meta:
        if len(index) and not any(key in facts for facts in index.meta):
            hint = nearest(key, index.fields) if index.fields else "no sample has a .json"
            raise ValueError(f"{name}: no .json has the key {key!r}; {hint}")


# ---- any of them ---------------------------------------------------------------------------------

_TARS = re.compile(r"\.(tar|tgz|txz|tbz2?)(\.(gz|xz|bz2|zst))?$", re.IGNORECASE)
# Endings by which a name is one of a file that is not there, and not one of a hub's data set.
_FILES = {*TABLES, *PICTURE_SUFFIXES, ".txt", ".zip", ".gz", ".xlsx", ".xls", ".arrow", ".npz"}
_SPLITS = re.compile(r"(train|training|val|valid|validation|test|testing|dev)[-_ ]?\d*")
_NO_CLASSES = re.compile(r"(images?|imgs?|pictures?|pics?|photos?|data|jpe?gs?|pngs?)[-_ ]?\d*")
Way = tuple[Callable[..., MultimodalDataset], Any]
FORMS = (
    "a folder may have a .txt beside each picture, a folder of pictures per class, tar shards, or "
    "parquet files; captions in a table are loaded by mm.from_table(table, root=folder)"
)


def load_data(source, **options) -> MultimodalDataset:
    """The data set of a source, by what it is: a table, a folder, shards, a hub data set.

    A folder with shards or parquet files at its top, with data saved by `datasets`, with a .txt
    beside each picture, or with a folder per class is told by its content; where it could be
    several of these, or folders are no classes (train and test, pictures beside a table of
    captions), a ValueError names the calls to choose from. A list is one of shards; a data frame
    is a table. options: of that way in. For COCO and Flickr30k, which are two paths each, there are
    `from_coco` and `from_flickr30k`; for a list of paths and one of texts, `from_lists`.
    """
    way, source = way_in(source)
    return way(source, **options)


def way_in(source) -> Way:
    """(the way in that reads a source, what it is given), for whoever asks which options it has.

    Raises FileNotFoundError for what is not there, ValueError for what could be several things.
    """
    if not isinstance(source, str | os.PathLike):
        return _of_object(source)
    text, path = os.fspath(source), Path(source).expanduser()
    if text.startswith("pipe:"):
        return from_shards, text
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
    """The way in of what is no path."""
    if _is_frame(source):
        return from_table, source
    if not isinstance(source, list | tuple):
        return from_hub, source
    others = [name for name in source if not isinstance(name, str | os.PathLike)]
    if others:
        raise ValueError(
            f"a {type(source).__name__} of {type(others[0]).__name__} is no list of shards; for a "
            "list of paths and one of texts take mm.from_lists(paths, texts)"
        )
    if source and all(Path(name).suffix.lower() in PICTURE_SUFFIXES for name in source):
        raise ValueError(
            f"{name_of(source)} are pictures without captions; take mm.from_lists(paths, texts)"
        )
    return from_shards, source


def _of_file(path: Path) -> Way:
    """The way in of a file, by its ending."""
    if _TARS.search(path.name):
        return from_shards, path
    if path.suffix.lower() in PICTURE_SUFFIXES:
        raise ValueError(
            f"{path} is one picture; give the folder that it is in, or take "
            f"mm.from_lists([{str(path)!r}], ['its caption'])"
        )
    if path.suffix == ".token":
        raise ValueError(
            f"{path} has the form of Flickr30k; take mm.from_flickr30k({str(path)!r}, folder)"
        )
    return from_table, path


def _of_folder(folder: Path) -> Way:
    """The way in of a folder, by what lies in it; ValueError where that could be several."""
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return from_hub, folder
    tree = look_through(folder)
    shards, parquet = _at_top(tree)
    pictures = [picture for picture, refused in tree.pictures if not refused]
    kinds: dict[Callable, str] = {  # way in -> what there is for it
        from_shards: _some(shards, "tar shard"),
        from_hub: _some(parquet, "parquet file"),
        from_folder: _some(pictures, "picture"),
    }
    there = {way: words for way, words in kinds.items() if words}
    if len(there) > 1:
        calls = " or ".join(f"mm.{way.__name__}({str(folder)!r})" for way in there)
        raise ValueError(f"{folder} holds {' and '.join(there.values())}; choose: take {calls}")
    if shards or parquet:
        return next(iter(there)), folder
    if any(tree.words_of(picture) for picture in pictures):
        return from_folder, folder
    if pictures:
        _check_classes(folder, tree, pictures)
        return from_class_folders, folder
    return _of_no_pictures(folder, tree)


def _at_top(tree: Tree) -> tuple[list[str], list[str]]:
    """The tar shards and parquet files in a folder itself.

    img2dataset writes 00000.parquet beside 00000.tar: those are facts about a shard.
    """
    top = [name for name in tree.others if os.sep not in name]
    shards = [name for name in top if _TARS.search(name)]
    about = {_TARS.sub("", name) for name in shards}
    parquet = [n for n in top if n.lower().endswith(".parquet") and Path(n).stem not in about]
    return shards, parquet


def _some(names: list[str], what: str) -> str:
    """ "3 pictures (a.png, ...)"; "" for none."""
    more, plural = (", ...", "s") if len(names) > 1 else ("", "")
    return f"{len(names):,} {what}{plural} ({names[0]}{more})" if names else ""


def _check_classes(folder: Path, tree: Tree, pictures: list[str]) -> None:
    """Raise ValueError where the folders in a folder are unlikely to be classes."""
    inside = os.path.commonpath([os.path.dirname(picture) for picture in pictures])
    tables = [name for name in [*tree.others, *tree.words.values()] if _is_captions(name)]
    if tables:
        best = min(tables, key=lambda name: ("caption" not in name.lower(), name.count(os.sep)))
        raise ValueError(
            f"{folder} holds {_some(pictures, 'picture')} and {best}, which may have their "
            f"captions: take {_call_for(folder / best, folder / inside)}; or, if folders are "
            f"classes, mm.from_class_folders({str(folder)!r})"
        )
    classes = sorted({picture.partition(os.sep)[0] for picture in pictures if os.sep in picture})
    if not classes:
        raise ValueError(f"{folder} holds {_some(pictures, 'picture')} and no captions; {FORMS}")
    names = [name.lower() for name in classes]
    splits = [name for name in classes if _SPLITS.fullmatch(name.lower())]
    if len(classes) > 1 and not splits and not all(map(_NO_CLASSES.fullmatch, names)):
        return
    shown = ", ".join(map(repr, classes[:5]))
    below = folder / (splits or classes)[0]
    raise ValueError(
        f"the pictures in {folder} lie in {shown}: no names of classes, or only one; if there are "
        f"folders of classes below, take mm.from_class_folders({str(below)!r}); if not, "
        f"mm.from_class_folders({str(folder)!r}) takes these for classes, and {FORMS}"
    )


def _is_captions(name: str) -> bool:
    """A table in a folder or the folders in it; a .txt only if its name says so."""
    path = Path(name.lower())
    words = path.suffix == ".txt" and ("caption" in path.stem or path.stem.endswith(".token"))
    return len(path.parts) <= 2 and (words or path.suffix in TABLES)


def _call_for(table: Path, folder: Path) -> str:
    """The call that reads a table whose pictures are under a folder."""
    # Hugging Face's metadata.jsonl names the pictures in its own folder
    name, where = repr(str(table)), repr(str(table.parent if table.stem == "metadata" else folder))
    if table.name.lower().endswith((".token", ".token.txt")) or "dataset_" in table.name:
        return f"mm.from_flickr30k({name}, {where})"
    if table.suffix.lower() == ".json":
        return f"mm.from_coco({name}, {where}) or mm.from_table({name}, root={where})"
    if table.suffix.lower() == ".parquet":
        return f"mm.from_hub({name}, root={where})"
    return f"mm.from_table({name}, root={where})"


def _of_no_pictures(folder: Path, tree: Tree) -> Way:
    """Of a folder with no pictures and nothing at its top: parquet below, or words about it."""
    if any(name.lower().endswith(".parquet") for name in tree.others):
        return from_hub, folder
    shards = [name for name in tree.others if _TARS.search(name)]
    if shards:
        pattern = str(folder / os.path.dirname(shards[0]) / "*.tar")
        raise ValueError(
            f"{folder} holds {_some(shards, 'tar shard')} in folders of its own; take "
            f"mm.from_shards({pattern!r})"
        )
    tables = [name for name in tree.others if _is_captions(name)]
    if tables:
        call = f"mm.load_data({str(folder / tables[0])!r})"
        raise ValueError(f"{folder} holds no pictures but {tables[0]}; take {call}")
    if tree.pictures:
        return from_folder, folder  # which says why each is not read
    raise ValueError(f"{folder} holds no pictures; {FORMS}")
