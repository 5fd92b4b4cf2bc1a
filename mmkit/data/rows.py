"""The common part of all loaders: make a data set and a report of the rows of a source.

The captions, the path and the image of every row are checked before anything is trained. A problem
is a `Refused`, raised or counted. The loaders themselves are in sources.py.
Walk-through: notebooks/08_your_own_images.ipynb.
"""

import contextlib
import functools
import inspect
import itertools
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch

from ..errors import Refused, as_type, nearest
from ..files import as_path
from .captions import clean_captions, count_blank
from .dataset import HASH_BYTES, MultimodalDataset
from .image_files import Cells, Files, ImageStore
from .image_headers import Reading
from .images import check_image
from .report import Report, count_captions
from .tables import Row, listed, written_list

# For an image that can be decoded now, but failed with all others (a full disk or memory).
TRY_AGAIN = "the image could not be decoded at first; load the data once more"


@dataclass
class Options:
    """The options of every loader, beside its source; see also `MultimodalDataset`."""

    image_size: int = 64  # side of the images, pixels
    transform: Callable | None = None  # in place of the square of `image_size`
    tokenizer: Any = None
    device: str | torch.device | None = None
    # "raise" stops at the first bad row, naming file and line; "skip" leaves bad rows out, and
    # stops if they are more than the fraction `max_skipped` of all
    on_error: str = "raise"
    max_skipped: float = 0.1
    # "head" checks the head and the end of each image, "decode" decodes it, which also finds damage
    # in the middle, "none" does neither; None = "decode" with on_error="skip", since the skipped
    # rows must be known beforehand, else "head"
    check: str | None = None
    # background of transparent pixels, and limits of images
    reading: Reading = field(default_factory=Reading)
    cache_gigabytes: float = 20.0  # largest size of the files of decoded images; 0 = none
    cache_dir: str | os.PathLike | None = None
    num_workers: int = 2  # processes that decode

    @classmethod
    def named(cls, way: Callable, options: dict[str, Any]) -> "Options":
        """The options of these names; ValueError for one that the loader `way` does not have."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                parameters = inspect.signature(way).parameters.values()
                own = [p.name for p in parameters if p.default is not p.empty]
                hint = nearest(name, [*own, *known])
                raise ValueError(f"{way.__name__} has no option {name!r}; {hint}")
        return cls(**options)

    def __post_init__(self):
        choices = {"on_error": ("raise", "skip"), "check": (None, "none", "head", "decode")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                names = ", ".join(map(repr, known))
                raise ValueError(f"{name}={getattr(self, name)!r} is not a choice; take {names}")
        numbers = {"max_skipped": float, "cache_gigabytes": float, "num_workers": int}
        for name, kind in numbers.items():
            value = as_type(name, getattr(self, name), kind)
            if value < 0:
                raise ValueError(f"{name}={value!r} must be 0 or more")
            setattr(self, name, value)
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(
                f"max_skipped={self.max_skipped!r} must be in [0, 1]; it is a fraction of the rows"
            )
        if not isinstance(self.reading, Reading):
            raise ValueError(
                f"reading={self.reading!r} is not an mm.Reading; give mm.Reading(max_aspect=50)"
            )
        if self.check is None:
            self.check = "decode" if self.on_error == "skip" else "head"


@dataclass
class Found:
    """The rows that a loader found, one entry each; a row may be `Refused` instead of an image."""

    source: str
    unit: str = "line"  # name of a row: "line" of a table, "image" of a folder, "sample" of shards
    lines: list[int] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)  # a path, a number in a store, or Refused
    texts: list[Any] = field(default_factory=list)
    meta: list[dict] = field(default_factory=list)
    hint: str = ""  # the probable cause if an image does not exist
    lists: int = 0  # rows whose captions were written as a list in one cell

    def add(self, line: int, image, text=None, meta: dict | None = None) -> None:
        """Add one row."""
        self.lines.append(line)
        self.images.append(image)
        self.texts.append(text)
        self.meta.append(meta or {})

    def add_rows(self, rows: Iterable[Row], image: str, text: list[str], meta: list[str]) -> None:
        """Add the rows of a table, by the columns of image, captions and metadata."""
        for line, row in rows:
            if isinstance(row, Refused):
                self.add(line, row)
                continue
            cells = [row.get(column) for column in text]
            lists = [written_list(cell) for cell in cells]
            self.lists += any(lists)
            each = zip(lists, cells, strict=True)
            captions = [caption for many, cell in each for caption in many or listed(cell)]
            self.add(line, row.get(image), captions, {column: row.get(column) for column in meta})


# ---- paths that are given ------------------------------------------------------------------------


def _existing(path: str | os.PathLike) -> Path:
    path = Path(as_path(path)).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    return path


def existing_file(path: str | os.PathLike) -> Path:
    """The path of an existing file; otherwise FileNotFoundError or ValueError."""
    path = _existing(path)
    if not path.is_file():  # reading from a pipe might never end
        raise ValueError(f"{path} is not a file; for a folder take load_data")
    return path


def existing_folder(path: str | os.PathLike) -> Path:
    """The path of an existing folder; otherwise FileNotFoundError or ValueError."""
    folder = _existing(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; for a table take from_table")
    return folder


# ---- files within a folder -----------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _real_folder(path: str) -> str:
    return os.path.realpath(path)


def _limit(root: str) -> str:
    """The folder that holds all images of a root.

    In a cache of the hub, …/snapshots/REVISION has links to …/blobs.
    """
    real = _real_folder(root)
    repository, below, _ = real.partition(f"{os.sep}snapshots{os.sep}")
    return repository if below and os.path.isdir(os.path.join(repository, "blobs")) else real


def within(root: str, written, where: str, beside: str = "", remedy: str = "") -> str:
    """The real path of the image that a row names, under the folder `root`.

    beside: a second folder from which the path may start, that of a table. remedy: what a caller
    with a `root` says of a path that leads out. Raises Refused if it is not a path, does not exist,
    is not a file, or leads out of the folder (by "..", an absolute path or a link).
    """
    if not isinstance(written, str | os.PathLike) or not str(written).strip():
        raise Refused("no image", f"{where} names no image: {_short(repr(written))}")
    text = os.fspath(written)
    if any(ord(c) < 32 for c in text):
        raise Refused("not a path", f"{where}: {_short(repr(text))} holds control characters")
    if text.strip().lower().startswith(("http://", "https://", "s3://", "gs://", "data:")):
        raise Refused(
            "a web address", f"{where}: {text[:80]} is not a file; download first (img2dataset)"
        )
    if text.strip().lower().startswith("file://"):
        text = unquote(text.strip()[7:])
    starts = [root, beside] if beside else [root]
    for start, variant in itertools.product(starts, _variants(text)):
        folder, name = os.path.split(_as_on_disk(os.path.join(start, variant)))
        try:
            path = os.path.join(_real_folder(folder), name)
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode) or name in ("", ".", ".."):
                path = os.path.realpath(path)
                status = os.stat(path)
        except (OSError, ValueError):
            continue
        limit = _limit(root)
        if path != limit and not path.startswith(limit.rstrip(os.sep) + os.sep):
            if remedy:
                folder = os.path.dirname(path)
                common = os.path.commonpath([limit, folder])
                common = folder if common == os.path.dirname(common) else common
                remedy = f", or {remedy}, for example root={common!r}"
            raise Refused(
                "outside the folder",
                f"{where}: {_short(text)} leads to {path}, outside {limit}; move it there{remedy}",
            )
        if not stat.S_ISREG(status.st_mode):
            raise Refused("not a file", f"{where}: {path} is not a file")
        return path
    raise Refused("missing", f"{where}: {_short(os.path.join(root, text), 500)} does not exist")


def _variants(text: str) -> list[str]:
    """A path as it is written, and as other systems may have meant it."""
    return list(dict.fromkeys([text, text.strip(), text.strip().replace("\\", "/")]))


def _as_on_disk(path: str) -> str:
    """The path with its names as the disk has them, whose letters may be composed otherwise."""
    if path.isascii() or os.path.lexists(path):
        return path
    folder, name = os.path.split(path)
    folder = folder if folder == path else _as_on_disk(folder)
    with contextlib.suppress(OSError, ValueError):
        if not os.path.lexists(os.path.join(folder, name)):
            composed = {unicodedata.normalize("NFC", one): one for one in os.listdir(folder)}
            name = composed.get(unicodedata.normalize("NFC", name), name)
    return os.path.join(folder, name)


def _short(text: str, most: int = 100) -> str:
    return text if len(text) <= most else text[:most] + "..."


# ---- loading -------------------------------------------------------------------------------------


def load(
    found: Found, options: Options, store: ImageStore | None = None, root: str | None = None,
    beside: str = "", remedy: str = "",
) -> MultimodalDataset:  # fmt: skip
    """The data set of the rows that were found: each is checked, merged by image, and counted.

    store: the store of images given as numbers; without one they are paths under `root` (None:
    anywhere), see `within`.
    """
    _real_folder.cache_clear()  # a link may have changed since the last call
    report = Report(found.source, rows=len(found.lines), checked=options.check or "")
    report.list_cells = found.lists
    refuse = functools.partial(_refuse, report, options)
    place = functools.partial(_path, root, beside=beside, remedy=remedy)
    if store is None and not all(_names_file(image) for image in found.images):
        store = Cells(found.images, found.source, place)  # the images themselves
        given = enumerate(found.images)
        found.images = [x if isinstance(x, Refused) else row for row, x in given]
    kept: dict[Any, int] = {}  # image -> its index in `texts`
    texts: list[list[str]] = []
    meta, lines, rows_of, sizes = [], [], [], []
    for line, image, text, metadata in zip(
        found.lines, found.images, found.texts, found.meta, strict=True
    ):
        where = f"{found.source}, {found.unit} {line}"
        try:
            if isinstance(image, Refused):
                raise image
            captions = clean_captions(where, text)
            if store is None:
                image = place(image, where)
            if image not in kept:
                sizes.append(_look(store, image, where, options))
                kept[image] = len(texts)
                texts.append([])
                meta.append(metadata)
                lines.append(line)
                rows_of.append(0)
            index = kept[image]
            report.blank_captions += 0 if isinstance(text, str) else count_blank(text)
            texts[index] += [caption for caption in captions if caption not in texts[index]]
            rows_of[index] += 1
        except (Refused, FileNotFoundError) as error:
            refuse(_hinted(error, found.hint))
    if not texts:
        raise ValueError(f"{found.source}: {_nothing(report)}")
    if store is None:
        store, keep = Files(list(kept)), None
    else:
        keep = np.array(list(kept), np.int64)
    data = _dataset(store, keep, texts, meta, np.array(lines), found, options, report)
    return _decoded(data, rows_of, np.array(sizes), options, report, refuse)


def _hinted(error: Exception, hint: str) -> Exception:
    """The error, with the probable cause if an image does not exist."""
    if hint and isinstance(error, Refused) and error.reason == "missing":
        return Refused(error.reason, f"{error}; {hint}")
    return error


def _refuse(report: Report, options: Options, error: Exception, rows: int = 1) -> None:
    """Raise or count the error of a row; `_decoded` raises another one if there are too many."""
    if options.on_error == "raise":
        raise error
    reason = getattr(error, "reason", "missing")
    for _ in range(rows):
        report.skip(Refused(reason, str(error)))


def _nothing(report: Report) -> str:
    """The message for a source without usable rows."""
    if not report.rows:
        return "no row was found; is it the right file or folder?"
    reasons = "; ".join(messages[0] for messages in report.examples.values())
    return f"none of {report.rows:,} rows can be loaded: {reasons}"


def _names_file(image) -> bool:
    """Is it a path, or nothing at all, and not bytes or an image?"""
    return image is None or isinstance(image, str | os.PathLike | Refused | int | float)


def _path(root: str | None, written, where: str, **options: str) -> str:
    named = isinstance(written, str | os.PathLike) and str(written).strip()
    if root is None and named and not str(written).strip().lower().startswith("file://"):
        written = os.path.abspath(os.path.expanduser(written))
        root = os.path.splitdrive(written)[0] + os.sep
    return within(root or os.path.abspath(os.sep), written, where, **options)


def _look(store: ImageStore | None, image, where: str, options: Options) -> tuple[int, int, int]:
    """(width, height, bytes) of an image from its head; zeros with check="none"."""
    reading = options.reading
    if options.check == "none":
        return 0, 0, 0
    if store is None:
        width, height = check_image(image, where, reading=reading)
        return width, height, os.path.getsize(image)
    with store.open(image) as file:
        width, height = check_image(file, where, reading=reading, name=store.name(image))
        return width, height, file.seek(0, os.SEEK_END)


def _dataset(store, keep, texts, meta, lines, found, options, report) -> MultimodalDataset:
    """The data set of the rows that have passed the checks."""
    data = MultimodalDataset.from_store(
        store,
        texts,
        rows=keep,
        transform=options.transform,
        image_size=options.image_size,
        tokenizer=options.tokenizer,
        meta=meta,
    )
    data.name = _name(found.source)
    data.places = (f"{found.source}, {found.unit}", lines)
    data.reading, data.report = options.reading, report
    data.cache_dir, data.cache_gigabytes = options.cache_dir, options.cache_gigabytes
    return data


def _name(source: str) -> str:
    """The last part of a path; of a pattern ("cc3m/*.tar") the last two."""
    path = Path(source)
    return "/".join(path.parts[-2:]) if path.name.startswith(("*", "?", "[", "{")) else path.name


def _decoded(
    data: MultimodalDataset, rows_of: list[int], sizes: np.ndarray, options: Options,
    report: Report, refuse: Callable,
) -> MultimodalDataset:  # fmt: skip
    """The data set, with check="decode" without undecodable images; fills in the report."""
    failed: dict[int, Exception] = {}
    if options.check == "decode":
        for row in data.rows_that_fail(options.num_workers):
            error: Exception = Refused("damaged", f"{data.place(row)}: {TRY_AGAIN}")
            try:
                data._decoder.decode(row)
            except (Refused, OSError) as why:
                error = why
            failed[row] = error
            refuse(error, rows_of[row])
    good = [row for row in range(len(data)) if row not in failed]
    if not good:
        raise ValueError(f"{report.source}: {_nothing(report)}")
    tokenizer_given = data.given_tokenizer
    if failed:
        data._tokenizer = (
            data._tokenizer if tokenizer_given else False
        )  # train one on the good rows only
        data = data.subset(good)
        data._tokenizer = data._tokenizer or None
        data.report = report  # of all rows, not only of the subset
        sizes, rows_of = sizes[good], [rows_of[row] for row in good]
    report.loaded, report.images = sum(rows_of), len(data)
    assert report.loaded + sum(report.skipped.values()) == report.rows
    if options.check != "none":
        report.widths, report.heights = sizes[:, 0].tolist(), sizes[:, 1].tolist()
    report.file_sizes = sizes[:, 2].tolist()
    count_captions(report, data.texts)
    if options.check != "none" and report.bytes <= HASH_BYTES:
        hashes = data.content_hashes()
        report.identical_images = len(hashes) - len(set(hashes))
        data.same_images(hashes)
    if report.skipped_fraction > options.max_skipped:
        raise ValueError(
            f"{report.source}: {sum(report.skipped.values()):,} of {report.rows:,} rows "
            f"({100 * report.skipped_fraction:.1f} %) cannot be loaded, more than max_skipped="
            f"{options.max_skipped:g}. {'; '.join(m[0] for m in report.examples.values())}"
        )
    return data if options.device is None else data.keep_on(options.device)
