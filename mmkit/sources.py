"""Ways in: lists, tables, folders, hub data sets, COCO and Flickr30k, tar shards.

Each is one function that gives a `MultimodalDataset` with a `report` of what was loaded and what
was not; they differ only in how rows are found. `load_data(source)` picks the function by what it
is given. Walk-through: notebooks/08_your_own_pictures.ipynb.
"""

import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .config import nearest
from .data import MultimodalDataset
from .loading import Found, Options, load, within
from .picture_cache import cache_folder
from .picture_files import Refused
from .shards import ShardIndex, TarMembers, read_index
from .tables import pick_column, read_csv, read_json, read_jsonl, read_lines
from .tar_index import IMAGE_SUFFIXES

PICTURE_SUFFIXES = set(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .avif .jp2 .tga".split()
)


# ---- lists, tables -------------------------------------------------------------------------------


def from_lists(paths: Sequence, texts: Sequence, *, meta=None, **options) -> MultimodalDataset:
    """Pictures by their paths and, for each, a caption or a list of captions.

    options: of `Options`. Unlike `MultimodalDataset(...)` it looks into every picture, can skip bad
    ones, merges rows of one picture, and caches.
    """
    if len(paths) != len(texts):
        raise ValueError(f"{len(paths)} paths but {len(texts)} texts; give one per picture")
    found = Found("the list", "row")
    for row, (path, text) in enumerate(zip(paths, texts, strict=True)):
        found.add(row, path, text, meta[row] if meta else None)
    return load(found, Options(**options))


def from_table(
    path: str | os.PathLike,
    *,
    image: str | None = None,
    text: str | Sequence[str] | None = None,
    meta: Sequence[str] = (),
    root: str | os.PathLike | None = None,
    encoding: str | None = None,
    separator: str | None = None,
    quotes: bool = True,
    **options,
) -> MultimodalDataset:
    """A CSV, TSV, JSON lines or parquet file with a row per picture and caption.

    image, text: names of the columns (None: found by their usual names); several text columns are
    several captions, and so are several rows of one picture. In JSON lines and parquet a text may
    be a list. meta: columns kept in `data.meta`, to split by, say. root: the folder under which the
    pictures are (None: the table's own). encoding, separator, quotes: see `tables.read_csv`.
    """
    path = _file(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return from_hub(path, image=image, text=text, meta=meta, root=root, **options)
    if suffix in (".jsonl", ".ndjson", ".json"):
        columns, rows = read_jsonl(path, encoding=encoding)
    else:
        how: dict = dict(encoding=encoding, separator=separator, quotes=quotes)
        columns, rows = read_csv(path, **how)
    picture_of = pick_column(columns, image, "image", str(path))
    names = [text] if isinstance(text, str) or text is None else list(text)
    text_of = [pick_column(columns, name, "text", str(path)) for name in names]
    for name in meta:
        pick_column(columns, name, "meta", str(path))
    found = Found(str(path))
    for line, row in rows:
        if isinstance(row, Refused):
            found.add(line, row)
        else:
            captions = [caption for name in text_of for caption in _listed(row.get(name))]
            kept = {name: row.get(name) for name in meta}
            found.add(line, row.get(picture_of), captions, kept)
    return load(found, Options(**options), root=str(root or path.parent))


def _listed(value) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    return path


def _file(path: str | os.PathLike) -> Path:
    path = _existing(path)
    if not path.is_file():  # to read from a pipe would wait for ever
        raise ValueError(f"{path} is not a file; for a folder take load_data")
    return path


# ---- folders -------------------------------------------------------------------------------------


def _pictures_under(folder: Path) -> list[str]:
    """Paths of files with a picture's ending under a folder, relative to it, sorted; no hidden."""
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.relpath(os.path.join(base, name), folder)
            for name in names
            if os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES and not name.startswith(".")
        ]
    return sorted(found)


def _folder(path: str | os.PathLike) -> Path:
    folder = _existing(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; for a table take from_table")
    return folder


def from_folder(path: str | os.PathLike, **options) -> MultimodalDataset:
    """A folder with a .txt beside each picture; each of its lines is a caption."""
    folder = _folder(path)
    found = Found(str(folder), "picture")
    for line, picture in enumerate(_pictures_under(folder), 1):
        words = folder / (os.path.splitext(picture)[0] + ".txt")
        try:
            inside = within(str(folder), os.path.relpath(words, folder), picture)
            found.add(line, picture, read_lines(inside), {"file": picture})
        except Refused as error:
            why = Refused("no caption", f"{folder / picture} has no {words.name} beside it")
            found.add(line, why if error.reason == "missing" else error)
        except ValueError as error:
            found.add(line, Refused("no caption", str(error)))
    return load(found, Options(**options), root=str(folder))


def from_class_folders(
    path: str | os.PathLike,
    templates: Sequence[str] = ("a photo of a {}",),
    names: dict[str, str] | None = None,
    **options,
) -> MultimodalDataset:
    """A folder of folders, one per class, as torchvision's ImageFolder has it.

    templates: each is a caption, with the class's name in place of {}. names: what a folder's class
    is called (None: the folder's name, _ and - as spaces). `meta` has the class.
    """
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates or any("{}" not in template for template in templates):
        raise ValueError(f"templates={templates!r}: each needs {{}} for the name of the class")
    folder = _folder(path)
    found = Found(str(folder), "picture")
    for line, picture in enumerate(_pictures_under(folder), 1):
        kind, _, rest = picture.partition(os.sep)
        if not rest:
            why = "it lies beside the folders of the classes, in none of them"
            found.add(line, Refused("no class", f"{folder / picture}: {why}"))
            continue
        name = (names or {}).get(kind, kind.replace("_", " ").replace("-", " "))
        captions = [template.replace("{}", name) for template in templates]
        found.add(line, picture, captions, {"class": name, "file": picture})
    return load(found, Options(**options), root=str(folder))


# ---- Hugging Face data sets, parquet -------------------------------------------------------------


class Column:
    """Pictures in a column of a Hugging Face data set: bytes, or paths of files."""

    def __init__(self, dataset, column: str, root: str):
        self.dataset, self.column, self.root = dataset.select_columns([column]), column, root

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, i: int) -> str:
        return f"{self.column} of row {i}"

    def stamp(self, i: int) -> str:
        return ""

    def open(self, i: int) -> BinaryIO:
        value = self.dataset[i][self.column]
        path = value
        if isinstance(value, dict):
            path, value = value.get("path"), value.get("bytes")
        if isinstance(value, bytes):
            return io.BytesIO(value)
        if path is None:
            raise Refused("no picture", f"{self.name(i)} is empty")
        if isinstance(path, str):
            return open(within(self.root, path, self.name(i)), "rb")
        raise Refused("no picture", f"{self.name(i)} holds {type(value).__name__}, not a picture")


def from_hub(
    source,
    *,
    image: str | None = None,
    text: str | Sequence[str] | None = None,
    meta: Sequence[str] = (),
    split: str | None = None,
    root: str | os.PathLike | None = None,
    **options,
) -> MultimodalDataset:
    """A Hugging Face data set: an object of `datasets`, a local folder or parquet file, a hub name.

    Pictures are bytes, PIL images or paths (under `root`; None: the current folder); a text is a
    string or a list of them. split: of a set that has several. Needs `pip install "mmkit[data]"`.
    """
    datasets = _datasets()
    options_ = Options(**options)
    table, name = _hub_table(datasets, source, split, options_)
    if hasattr(table, "keys"):
        raise ValueError(f"{name} has splits {', '.join(map(str, table))}; give split='…'")
    if not hasattr(table, "select_columns"):
        raise ValueError(f"{name} is {type(table).__name__}, not a data set of `datasets`")
    if not hasattr(table, "__len__"):
        raise ValueError(f"{name} is a stream; give a data set with a length (streaming=False)")
    table = table.with_format(None)  # plain values, whatever format was set
    picture_of = pick_column(table.column_names, image, "image", name)
    names = [text] if isinstance(text, str) or text is None else list(text)
    text_of = [pick_column(table.column_names, wanted, "text", name) for wanted in names]
    for wanted in meta:
        pick_column(table.column_names, wanted, "meta", name)
    if isinstance(table.features[picture_of], datasets.Image):
        table = table.cast_column(picture_of, datasets.Image(decode=False))
    found = Found(name, "row")
    for line, row in enumerate(table.select_columns([*{*text_of, *meta}])):
        captions = [caption for column in text_of for caption in _listed(row[column])]
        found.add(line, line, captions, {column: row[column] for column in meta})
    store = Column(table, picture_of, str(root or (os.path.dirname(name) or ".")))
    return load(found, options_, store=store)


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


def _known_split(split: str | None, known: Iterable, name: str) -> None:
    if split is not None and split not in known:
        raise UnknownSplit(f"{name} has no split {split!r}; {nearest(split, known)}")


def _hub_table(datasets, source, split: str | None, options: Options) -> tuple[Any, str]:
    """(the table or its splits, what messages call it)."""
    if not isinstance(source, str | os.PathLike):
        if split is not None and hasattr(source, "keys"):
            _known_split(split, source, "the data set")
            source = source[split]
        return source, "the data set"
    path, name = Path(source), str(source)
    cache = str(cache_folder(options.cache_dir) / "datasets")
    try:
        if path.suffix.lower() == ".parquet":
            return datasets.Dataset.from_parquet(name, cache_dir=cache), name
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(name)
            return _hub_table(datasets, table, split, options)[0], name
        return datasets.load_dataset(name, split=split, cache_dir=cache), name
    except (FileNotFoundError, UnknownSplit):
        raise
    except Exception as error:  # of many kinds, from many libraries
        below = error.__cause__ or error  # what datasets wraps says more than the wrapping
        lines = str(below).strip().splitlines() or [type(below).__name__]
        raise ValueError(f"{name} cannot be read as a data set: {lines[-1]}") from None


# ---- as COCO and Flickr30k are published ---------------------------------------------------------


def from_coco(
    annotations: str | os.PathLike, images: str | os.PathLike, **options
) -> MultimodalDataset:
    """COCO captions as published: captions_train2017.json and the folder train2017."""
    found, value = Found(str(annotations), "entry"), read_json(_file(annotations))
    try:
        captions: dict[Any, list[str]] = {}
        for one in value["annotations"]:
            captions.setdefault(one["image_id"], []).append(one["caption"])
        for line, picture in enumerate(value["images"], 1):
            facts = {"image_id": picture["id"]}
            found.add(line, picture["file_name"], captions.pop(picture["id"], []), facts)
        for line, (number, texts) in enumerate(captions.items(), len(found.lines) + 1):
            why = f"{annotations}: no picture has the id {number!r} of {texts[0]!r}"
            found.add(line, Refused("no picture", why))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{annotations} is not in the form of COCO captions (images with id and file_name, "
            f"annotations with image_id and caption): {error!r}"
        ) from None
    return load(found, Options(**options), root=str(_folder(images)))


def from_flickr30k(
    annotations: str | os.PathLike,
    images: str | os.PathLike,
    split: str | None = None,
    **options,
) -> MultimodalDataset:
    """Flickr30k as published: dataset_flickr30k.json (Karpathy's splits; dataset_coco.json and
    dataset_flickr8k.json, too) or results_20130124.token, and the folder of its pictures.

    split: "train", "val", "test" of the JSON file (None: all).
    """
    path, found = _file(annotations), Found(str(annotations))
    if path.suffix == ".token" or path.name.endswith(".token.txt"):
        for line, words in enumerate(read_lines(path, blank=True), 1):
            if not words:
                continue
            name, tab, caption = words.partition("\t")
            why = Refused("no caption", f"{path}, line {line}: no tab in {words[:60]!r}")
            found.add(line, name.rpartition("#")[0] or name if tab else why, caption)
        return load(found, Options(**options), root=str(_folder(images)))
    try:
        pictures = read_json(path)["images"]
        _known_split(split, {picture.get("split") for picture in pictures}, str(path))
        for line, picture in enumerate(pictures, 1):
            if split is None or picture.get("split") == split:
                name = os.path.join(picture.get("filepath", ""), picture["filename"])
                texts = [sentence["raw"] for sentence in picture["sentences"]]
                found.add(line, name, texts, {"split": picture.get("split")})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not in the form of Karpathy's splits (images with filename and sentences "
            f"with raw): {error!r}"
        ) from None
    return load(found, Options(**options), root=str(_folder(images)))


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
    options_ = Options(**({"cache_gigabytes": 0.0} | options))
    where: dict = dict(cache_dir=options_.cache_dir, spool_gigabytes=spool_gigabytes)
    suffixes: dict = dict(image=image or IMAGE_SUFFIXES, text=text or ("txt", "json.caption"))
    index = read_index(urls, meta=meta, on_error=options_.on_error, **suffixes, **where)
    _known_facts(index, meta, str(urls))
    spooled = sum(shard.size for shard in index.shards if shard.spooled) / 1e9
    unchecked = options.get("check") is None and spooled > spool_gigabytes
    if unchecked:
        options_.check = "none"  # each look at a picture would fetch its shard once more
    found = Found(str(urls), "sample")
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


def load_data(source, **options) -> MultimodalDataset:
    """The data set of a source, by what it is: a table, a folder, shards, a hub data set.

    A folder with shards, with data saved by `datasets`, with a .txt beside each picture, or with a
    folder per class is told by its content. options: of that way in. For COCO and Flickr30k, which
    are two paths each, there are `from_coco` and `from_flickr30k`.
    """
    way, source = way_in(source)
    return way(source, **options)


def way_in(source) -> tuple[Callable[..., MultimodalDataset], Any]:
    """(the way in that reads a source, what it is given); FileNotFoundError for what is not there.

    For whoever asks what options a source has.
    """
    if not isinstance(source, str | os.PathLike):
        return from_shards if isinstance(source, list | tuple) else from_hub, source
    text, path = os.fspath(source), Path(source).expanduser()
    if text.startswith("pipe:") or re.search(r"\.(tar|tgz)\b", text):
        return from_shards, text
    if path.is_file():
        return from_table, path
    if not path.is_dir():
        if text.count("/") == 1 and not text.startswith((".", "/", "~")):
            return from_hub, text
        raise FileNotFoundError(f"{source} does not exist; check the path")
    names = {name for _, _, names in os.walk(path) for name in names}
    if any(name.endswith((".tar", ".tar.gz", ".tgz")) for name in names):
        return from_shards, path
    if names & {"state.json", "dataset_dict.json"} or any(n.endswith(".parquet") for n in names):
        return from_hub, path
    pictures = [os.path.splitext(path / name)[0] for name in _pictures_under(path)]
    if pictures and not any(os.path.isfile(f"{picture}.txt") for picture in pictures):
        return from_class_folders, path
    return from_folder, path
