"""What all ways in share: rows that were found become a data set and a report.

Every row is checked before anything is trained: its captions, its path, its picture. Whatever is
wrong with it is a `Refused`, raised or counted. The ways in themselves are in sources.py.
Walk-through: notebooks/08_your_own_pictures.ipynb.
"""

import functools
import inspect
import os
import stat
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import Refused, as_type, nearest
from .captions import clean_captions, count_blank
from .dataset import HASH_BYTES, MultimodalDataset
from .image_files import Files, PictureStore
from .image_headers import Reading
from .images import check_picture
from .report import Report, count_captions

# Of a picture that could be decoded now, but not when all were (a disk or memory was at its end).
TRY_AGAIN = "the picture could not be decoded at first; load the data once more"


@dataclass
class Options:
    """What every way in takes beside its source.

    on_error: "raise" stops at the first bad row, naming file and line; "skip" leaves bad rows out,
    and stops where they are more than the share `max_skipped` of all. check: "head" looks at each
    picture's head and end, "decode" decodes it (which also finds damage in the middle), "none" does
    neither; None takes "decode" with on_error="skip", as what is skipped must be known beforehand.
    reading: `mm.Reading`, the background under transparent pixels and what is refused as too large
    or too thin. cache_gigabytes: decoded pictures are kept in files up to this size, decoded at the
    first training; 0 = never. num_workers: processes that decode.
    """

    image_size: int = 64
    transform: Callable | None = None
    tokenizer: Any = None
    device: str | torch.device | None = None
    on_error: str = "raise"
    max_skipped: float = 0.1
    check: str | None = None
    reading: Reading = field(default_factory=Reading)
    cache_gigabytes: float = 20.0
    cache_dir: str | os.PathLike | None = None
    num_workers: int = 2

    @classmethod
    def named(cls, way: Callable, options: dict[str, Any]) -> "Options":
        """The options of these names; ValueError for one that neither they nor the way in have."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                parameters = inspect.signature(way).parameters.values()
                own = [p.name for p in parameters if p.default is not p.empty]
                words = nearest(name, [*own, *known])
                raise ValueError(f"{way.__name__} has no option {name!r}; {words}")
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
                f"max_skipped={self.max_skipped!r} must be in [0, 1]; it is a share of the rows"
            )
        if not isinstance(self.reading, Reading):
            raise ValueError(
                f"reading={self.reading!r} is no mm.Reading; give mm.Reading(max_aspect=50), say"
            )
        if self.check is None:
            self.check = "decode" if self.on_error == "skip" else "head"


@dataclass
class Found:
    """What a way in found, an entry per row; a row that is `Refused` has no picture."""

    source: str
    unit: str = (
        "line"  # what a row is: "line" of a table, "picture" of a folder, "sample" of shards
    )
    lines: list[int] = field(default_factory=list)
    pictures: list[Any] = field(default_factory=list)  # a path, a number in a store, or Refused
    texts: list[Any] = field(default_factory=list)
    meta: list[dict] = field(default_factory=list)
    hint: str = ""  # what may be wrong where a picture is not there

    def add(self, line: int, picture, text=None, meta: dict | None = None) -> None:
        self.lines.append(line)
        self.pictures.append(picture)
        self.texts.append(text)
        self.meta.append(meta or {})


# ---- files within a folder -----------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _real_folder(path: str) -> str:
    return os.path.realpath(path)


def within(root: str, written, where: str) -> str:
    """The real path of the picture that a row names, under the folder `root`.

    Raises Refused for what is no path, is not there, is no file, or leaves the folder (by "..", an
    absolute path or a link).
    """
    if not isinstance(written, str | os.PathLike) or not str(written).strip():
        raise Refused("no picture", f"{where} names no picture: {_short(repr(written))}")
    text = os.fspath(written)
    if any(ord(c) < 32 for c in text):
        raise Refused("not a path", f"{where}: {_short(repr(text))} holds control characters")
    if text.strip().lower().startswith(("http://", "https://", "s3://", "gs://", "data:")):
        raise Refused(
            "a web address", f"{where}: {text[:80]} is not a file; download first (img2dataset)"
        )
    if text.strip().lower().startswith("file://"):
        text = text.strip()[7:]
    for variant in _variants(text):
        folder, name = os.path.split(os.path.join(root, variant))
        try:
            path = os.path.join(_real_folder(folder), name)
            facts = os.lstat(path)
            if stat.S_ISLNK(facts.st_mode) or name in ("", ".", ".."):
                path = os.path.realpath(path)
                facts = os.stat(path)
        except (OSError, ValueError):
            continue
        real_root = _real_folder(root)
        if path != real_root and not path.startswith(real_root.rstrip(os.sep) + os.sep):
            folder = f", root={os.path.dirname(path)!r} say" if os.path.isabs(text) else ""
            raise Refused(
                "outside the folder",
                f"{where}: {_short(text)} leads to {path}, outside {real_root}; move it there, or "
                f"give a root that holds all pictures{folder}",
            )
        if not stat.S_ISREG(facts.st_mode):
            raise Refused("not a file", f"{where}: {path} is not a file")
        return path
    raise Refused("missing", f"{where}: {_short(os.path.join(root, text), 500)} does not exist")


def _variants(text: str) -> list[str]:
    """A path as it is written, and as another system may have meant it."""
    stripped = text.strip()
    variants = [text, stripped, *(unicodedata.normalize(f, stripped) for f in ("NFC", "NFD"))]
    if "\\" in stripped:
        variants.append(stripped.replace("\\", "/"))
    return list(dict.fromkeys(variants))


def _short(text: str, most: int = 100) -> str:
    return text if len(text) <= most else text[:most] + "..."


# ---- what all ways in share ----------------------------------------------------------------------


def load(
    found: Found, options: Options, store: PictureStore | None = None, root: str | None = None
) -> MultimodalDataset:
    """The data set of what was found: every row checked, merged by picture, and counted.

    store: where pictures given as numbers lie; without one they are paths under `root` (None:
    anywhere).
    """
    _real_folder.cache_clear()  # a link may have been set anew since the last time
    report = Report(found.source, rows=len(found.lines), checked=options.check or "")
    refuse = functools.partial(_refuse, report, options)
    kept: dict[Any, int] = {}  # picture -> its place below
    texts: list[list[str]] = []
    meta, lines, rows_of, sizes = [], [], [], []
    for line, picture, text, facts in zip(
        found.lines, found.pictures, found.texts, found.meta, strict=True
    ):
        where = f"{found.source}, {found.unit} {line}"
        try:
            if isinstance(picture, Refused):
                raise picture
            captions = clean_captions(where, text)
            if store is None:
                picture = _path(root, picture, where)
            if picture not in kept:
                sizes.append(_look(store, picture, where, options))
                kept[picture] = len(texts)
                texts.append([])
                meta.append(facts)
                lines.append(line)
                rows_of.append(0)
            place = kept[picture]
            report.blank_captions += 0 if isinstance(text, str) else count_blank(text)
            texts[place] += [caption for caption in captions if caption not in texts[place]]
            rows_of[place] += 1
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
    """The error, and what may be behind it where a picture is not there."""
    if hint and isinstance(error, Refused) and error.reason == "missing":
        return Refused(error.reason, f"{error}; {hint}")
    return error


def _refuse(report: Report, options: Options, error: Exception, rows: int = 1) -> None:
    """Raise it, or count it; too many of them are an error of their own."""
    if options.on_error == "raise":
        raise error
    reason = getattr(error, "reason", "missing")
    for _ in range(rows):
        report.skip(Refused(reason, str(error)))


def _nothing(report: Report) -> str:
    if not report.rows:
        return "no row was found; is it the right file or folder?"
    words = "; ".join(messages[0] for messages in report.examples.values())
    return f"none of {report.rows:,} rows can be loaded: {words}"


def _path(root: str | None, written, where: str) -> str:
    if root is None and isinstance(written, str | os.PathLike) and str(written).strip():
        return within(os.sep, os.path.abspath(written), where)
    return within(root or os.sep, written, where)


def _look(
    store: PictureStore | None, picture, where: str, options: Options
) -> tuple[int, int, int]:
    """(width, height, bytes) of a picture from its head; zeros where nobody shall look."""
    reading = options.reading
    if options.check == "none":
        return 0, 0, 0
    if store is None:
        width, height = check_picture(picture, where, reading=reading)
        return width, height, os.path.getsize(picture)
    with store.open(picture) as file:
        width, height = check_picture(file, where, reading=reading, name=store.name(picture))
        return width, height, file.seek(0, os.SEEK_END)


def _dataset(store, keep, texts, meta, lines, found, options, report) -> MultimodalDataset:
    """The data set of the rows whose heads are in order."""
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
    """The data set without pictures that cannot be decoded, if asked; the report filled in."""
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
        data._tokenizer = data._tokenizer if tokenizer_given else False  # of the good ones only
        data = data.subset(good)
        data._tokenizer = data._tokenizer or None
        data.report = report  # of all rows, not of a part
        sizes, rows_of = sizes[good], [rows_of[row] for row in good]
    report.loaded, report.pictures = sum(rows_of), len(data)
    assert report.loaded + sum(report.skipped.values()) == report.rows
    if options.check != "none":
        report.widths, report.heights = sizes[:, 0].tolist(), sizes[:, 1].tolist()
    report.file_sizes = sizes[:, 2].tolist()
    count_captions(report, data.texts)
    if options.check != "none" and report.bytes <= HASH_BYTES:
        hashes = data.content_hashes()
        report.identical_pictures = len(hashes) - len(set(hashes))
        data.same_pictures(hashes)
    if report.skipped_share > options.max_skipped:
        raise ValueError(
            f"{report.source}: {sum(report.skipped.values()):,} of {report.rows:,} rows "
            f"({100 * report.skipped_share:.1f} %) cannot be loaded, more than max_skipped="
            f"{options.max_skipped:g}. {'; '.join(m[0] for m in report.examples.values())}"
        )
    return data if options.device is None else data.keep_on(options.device)
