"""Ways in by folder: a .txt beside each picture, or a folder per class; and what a folder holds.

Every file is a picture, words, refused in words, or of no concern; a picture is told by its ending
or, without a known one, by its first bytes. Links are followed where they stay within the folder.
Walk-through: notebooks/08_your_own_pictures.ipynb.
"""

import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Refused
from ..files import as_path
from .dataset import MultimodalDataset
from .rows import Found, Options, load, within
from .tables import read_lines

PICTURE_SUFFIXES = set(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .avif .jp2 .tga".split()
)
# Cameras' own formats begin as a TIFF does, and hold a picture the size of a stamp.
_RAW = set(".cr2 .cr3 .nef .arw .dng .orf .rw2 .raf .pef".split())
_NOT_READ = set(".heic .heif .svg .svgz .psd .jxl .xcf".split())
_UNFINISHED = set(".download .crdownload .part .partial .tmp .opdownload .filepart".split())
_HEADS: tuple[bytes, ...] = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
)
_HEADS += (b"\0\0\0\x0cjP  ",)  # JPEG 2000
# Words that go with a folder, not with a picture.
_ABOUT = set("readme license licence notice citation attribution changelog requirements".split())


# ---- paths that are given ------------------------------------------------------------------------


def _existing(path: str | os.PathLike) -> Path:
    path = Path(as_path(path)).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    return path


def existing_file(path: str | os.PathLike) -> Path:
    """The path of a file that is there; FileNotFoundError or ValueError in words otherwise."""
    path = _existing(path)
    if not path.is_file():  # to read from a pipe would wait for ever
        raise ValueError(f"{path} is not a file; for a folder take load_data")
    return path


def existing_folder(path: str | os.PathLike) -> Path:
    """The path of a folder that is there; FileNotFoundError or ValueError in words otherwise."""
    folder = _existing(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; for a table take from_table")
    return folder


# ---- what a folder holds -------------------------------------------------------------------------


@dataclass
class Tree:
    """The files under a folder, by paths relative to it, in the order of these; none hidden."""

    pictures: list[tuple[str, Refused | None]] = field(default_factory=list)  # or why it is none
    words: dict[str, str] = field(default_factory=dict)  # path without .txt, composed -> path
    others: list[str] = field(default_factory=list)

    def words_of(self, picture: str) -> str | None:
        """The path of the .txt beside a picture: a.txt or a.jpg.txt for a.jpg."""
        return next((self.words[name] for name in _names(picture) if name in self.words), None)


def look_through(folder: Path) -> Tree:
    """Every file under a folder, told by its ending or its first bytes."""
    tree = Tree()
    for path, refused in sorted(_walk(str(folder)), key=lambda found: found[0]):
        kind = "refused" if refused else _kind(os.path.join(folder, path))
        if kind == "words":
            tree.words[_stem(path)] = path
        elif kind == "other":
            tree.others.append(path)
        else:
            if kind == "not read":
                why = "it looks like a picture and is none that can be read here; save it as JPEG "
                why += "or PNG, or take it out"
                refused = Refused("not read", f"{os.path.join(folder, path)}: {why}")
            tree.pictures.append((path, refused))
    return tree


def _stem(path: str) -> str:
    """The path without its ending; composed, as a picture and its words may differ in that."""
    return unicodedata.normalize("NFC", os.path.splitext(path)[0])


def _names(picture: str) -> list[str]:
    """What the words of a picture may be called, without their .txt."""
    names = [_stem(picture), unicodedata.normalize("NFC", picture)]
    twice = os.path.splitext(names[0])[1].lower() in PICTURE_SUFFIXES  # a.png.download
    return [*names, _stem(names[0])] if twice else names


def _walk(folder: str) -> Iterator[tuple[str, Refused | None]]:
    """(path, why nothing below it is read) of every file; the folder of a link is walked once."""
    root = os.path.realpath(folder)
    waiting = [("", root, False)]
    seen: set[str] = set()
    while waiting:
        below, real, linked = waiting.pop()
        seen.add(real)
        try:
            entries = list(os.scandir(os.path.join(folder, below)))
        except OSError as error:
            yield below, Refused("not opened", f"{folder}/{below}: {error.strerror}")
            continue
        for entry in entries:
            path = os.path.join(below, entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append((path, os.path.join(real, entry.name), linked))
            elif not os.path.splitext(entry.name)[1] and not os.path.exists(entry.path):
                yield path, Refused("missing", f"{entry.path} is a link to what does not exist")
            elif not entry.is_dir():
                yield path, None
            elif not _is_within(target := os.path.realpath(entry.path), root):
                why = f"{entry.path} is a link to the folder {target}, outside {root}"
                yield path, Refused("outside the folder", f"{why}; move or copy it there")
            # a link upwards would never end; links among linked folders could be as good as that
            elif not _is_within(real, target) and not (linked and target in seen):
                waiting.append((path, target, True))


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _kind(path: str) -> str:
    """ "picture", "not read" (another picture, or a part of one), "words" or "other"."""
    before, suffix = os.path.splitext(path.lower())
    if suffix in PICTURE_SUFFIXES:
        return "picture"
    if suffix == ".txt":
        return "words"
    if suffix == ".json":  # shards that are unpacked have one beside each picture
        return "other"
    head = _head(path)
    if _looks_like_picture(head) and suffix not in _RAW:
        return "picture"
    if suffix in _RAW or _looks_unread(head):
        return "not read"
    part = suffix in _UNFINISHED and os.path.splitext(before)[1] in PICTURE_SUFFIXES
    return "not read" if part or suffix in _NOT_READ else "other"


def _head(path: str) -> bytes:
    """The first bytes of a regular file; none of another, or of one that cannot be opened."""
    try:
        if not os.path.isfile(path):  # a pipe would wait for ever
            return b""
        with open(path, "rb") as file:
            return file.read(32)
    except OSError:
        return b""


def _looks_like_picture(head: bytes) -> bool:
    if head.startswith(_HEADS):
        return True
    if head[:2] == b"BM":  # two letters, which a text may begin with
        return head[6:10] == bytes(4)
    avif = head[4:8] == b"ftyp" and b"avif" in head[8:]
    return avif or (head[:4], head[8:12]) == (b"RIFF", b"WEBP")


def _looks_unread(head: bytes) -> bool:
    return head[4:11] in (b"ftyphei", b"ftyphev", b"ftypmif", b"ftypmsf") or head[:4] == b"<svg"


# ---- ways in -------------------------------------------------------------------------------------


def from_folder(path: str | os.PathLike, **options) -> MultimodalDataset:
    """A folder with a .txt beside each picture; each of its lines is a caption.

    A .txt with no picture beside it is a row that cannot be loaded; a README.txt or so is none.
    """
    options_ = Options.named(from_folder, options)
    folder = existing_folder(path)
    tree, found = look_through(folder), Found(str(folder), "picture")
    for line, (picture, refused) in enumerate(tree.pictures, 1):
        try:
            if refused:
                raise refused
            found.add(line, picture, _captions(folder, picture, tree), {"file": picture})
        except Refused as error:
            found.add(line, error)
    known = {name for picture, _ in tree.pictures for name in _names(picture)}
    for stem, words in sorted(tree.words.items()):
        if stem not in known and os.path.basename(stem).lower() not in _ABOUT:
            why = f"{folder / words} has no picture of its name beside it"
            found.add(len(found.lines) + 1, Refused("no picture", why))
    return load(found, options_, root=str(folder))


def _captions(folder: Path, picture: str, tree: Tree) -> list[str]:
    """The lines of the .txt beside a picture; `Refused` where there is none to be read."""
    words = tree.words_of(picture)
    none = f"{folder / picture} has no {Path(picture).stem}.txt beside it"
    if words is None:
        raise Refused("no caption", none)
    try:
        return read_lines(within(str(folder), words, picture))
    except Refused as error:
        raise (Refused("no caption", none) if error.reason == "missing" else error) from None
    except ValueError as error:
        raise Refused("no caption", str(error)) from None


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
    options_ = Options.named(from_class_folders, options)
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates or any("{}" not in template for template in templates):
        raise ValueError(f"templates={templates!r}: each needs {{}} for the name of the class")
    folder = existing_folder(path)
    found = Found(str(folder), "picture")
    for line, (picture, refused) in enumerate(look_through(folder).pictures, 1):
        kind, _, rest = picture.partition(os.sep)
        if refused:
            found.add(line, refused)
            continue
        if not rest:
            why = "it lies beside the folders of the classes, in none of them"
            found.add(line, Refused("no class", f"{folder / picture}: {why}"))
            continue
        name = (names or {}).get(kind, kind.replace("_", " ").replace("-", " "))
        captions = [template.replace("{}", name) for template in templates]
        found.add(line, picture, captions, {"class": name, "file": picture})
    return load(found, options_, root=str(folder))
