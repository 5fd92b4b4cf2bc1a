"""Load a folder with a .txt beside each image, or with a folder per class; list its files.

Every file is an image, a text, refused with a reason, or ignored. An image is recognised by its
suffix or, without a known one, by its first bytes. Links are followed within the folder.
Walk-through: notebooks/08_your_own_images.ipynb.
"""

import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Refused
from .dataset import MultimodalDataset
from .rows import Found, Options, existing_folder, load, within
from .tables import read_lines

IMAGE_SUFFIXES = set(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .avif .jp2 .tga".split()
)
# Raw formats of cameras begin like a TIFF file, and contain only a tiny image.
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
# Names of texts that describe a folder, not an image.
_ABOUT = set("readme license licence notice citation attribution changelog requirements".split())


# ---- contents of a folder ------------------------------------------------------------------------


@dataclass
class Tree:
    """The files under a folder as sorted relative paths, without hidden ones."""

    images: list[tuple[str, Refused | None]] = field(default_factory=list)  # with the reason if bad
    words: dict[str, str] = field(default_factory=dict)  # texts: path without .txt, in NFC -> path
    others: list[str] = field(default_factory=list)

    def words_of(self, image: str) -> str | None:
        """The path of the .txt beside an image: a.txt or a.jpg.txt for a.jpg."""
        return next((self.words[name] for name in _names(image) if name in self.words), None)


def look_through(folder: Path) -> Tree:
    """Every file under a folder, recognised by its suffix or its first bytes."""
    tree = Tree()
    for path, refused in sorted(_walk(str(folder)), key=lambda found: found[0]):
        kind = "refused" if refused else _kind(os.path.join(folder, path))
        if kind == "words":
            tree.words[_stem(path)] = path
        elif kind == "other":
            tree.others.append(path)
        else:
            if kind == "not read":
                why = "it looks like an image of a format that cannot be read; save it as JPEG or "
                why += "PNG, or remove it"
                refused = Refused("not read", f"{os.path.join(folder, path)}: {why}")
            tree.images.append((path, refused))
    return tree


def _stem(path: str) -> str:
    """The path without suffix, in NFC, since an image and its text may differ in that."""
    return unicodedata.normalize("NFC", os.path.splitext(path)[0])


def _names(image: str) -> list[str]:
    """The possible names of the text of an image, without .txt."""
    names = [_stem(image), unicodedata.normalize("NFC", image)]
    twice = os.path.splitext(names[0])[1].lower() in IMAGE_SUFFIXES  # a.png.download
    return [*names, _stem(names[0])] if twice else names


def _walk(folder: str) -> Iterator[tuple[str, Refused | None]]:
    """(path, the reason why it is not read) of every file; a linked folder is walked once."""
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
            path = f"{below}/{entry.name}" if below else entry.name  # the same on every system
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append((path, os.path.join(real, entry.name), linked))
            elif not os.path.splitext(entry.name)[1] and not os.path.exists(entry.path):
                yield (
                    path,
                    Refused("missing", f"{entry.path} is a link to a file that does not exist"),
                )
            elif not entry.is_dir():
                yield path, None
            elif not _is_within(target := os.path.realpath(entry.path), root):
                why = f"{entry.path} is a link to the folder {target}, outside {root}"
                yield path, Refused("outside the folder", f"{why}; move or copy it there")
            # a link upwards would never end; links among linked folders might be nearly as bad
            elif not _is_within(real, target) and not (linked and target in seen):
                waiting.append((path, target, True))


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _kind(path: str) -> str:
    """The kind of a file: "image", "not read" (an unknown or partial image), "words", "other"."""
    before, suffix = os.path.splitext(path.lower())
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix == ".txt":
        return "words"
    if suffix == ".json":  # unpacked shards have one beside each image
        return "other"
    head = _head(path)
    if _looks_like_image(head) and suffix not in _RAW:
        return "image"
    if suffix in _RAW or _looks_unread(head):
        return "not read"
    part = suffix in _UNFINISHED and os.path.splitext(before)[1] in IMAGE_SUFFIXES
    return "not read" if part or suffix in _NOT_READ else "other"


def _head(path: str) -> bytes:
    """The first bytes of a regular file; none for others and for files that cannot be opened."""
    try:
        if not os.path.isfile(path):  # reading from a pipe might never end
            return b""
        with open(path, "rb") as file:
            return file.read(32)
    except OSError:
        return b""


def _looks_like_image(head: bytes) -> bool:
    if head.startswith(_HEADS):
        return True
    if head[:2] == b"BM":  # a text may also begin with these letters
        return head[6:10] == bytes(4)
    avif = head[4:8] == b"ftyp" and b"avif" in head[8:]
    return avif or (head[:4], head[8:12]) == (b"RIFF", b"WEBP")


def _looks_unread(head: bytes) -> bool:
    return head[4:11] in (b"ftyphei", b"ftyphev", b"ftypmif", b"ftypmsf") or head[:4] == b"<svg"


# ---- loaders -------------------------------------------------------------------------------------


def from_folder(
    path: str | os.PathLike, *, encoding: str | None = None, **options
) -> MultimodalDataset:
    """Load a folder with a .txt beside each image; each line of the .txt is a caption.

    A .txt without an image is a row that cannot be loaded, except for README.txt and the like.

    Args:
        path: the folder; images may be in folders below it.
        encoding: of the .txt (None: by its byte order mark, else UTF-8).
        **options: of `Options`, see `load_data`.

    Returns:
        MultimodalDataset with a `report`; `meta` has "file".

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it is not a folder, or a row cannot be loaded (see `load_data`).

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> Image.new("RGB", (40, 30), "red").save("red.png")
        >>> _ = Path("red.txt").write_text("a red image")
        >>> mm.from_folder(".", image_size=32)
        MultimodalDataset(1 images (3, 32, 32), 1 captions)
    """
    options_ = Options.named(from_folder, options)
    folder = existing_folder(path)
    tree, found = look_through(folder), Found(str(folder), "image")
    for line, (image, refused) in enumerate(tree.images, 1):
        try:
            if refused:
                raise refused
            found.add(line, image, _captions(folder, image, tree, encoding), {"file": image})
        except Refused as error:
            found.add(line, error)
    known = {name for image, _ in tree.images for name in _names(image)}
    for stem, words in sorted(tree.words.items()):
        if stem not in known and os.path.basename(stem).lower() not in _ABOUT:
            why = f"{folder / words} has no image of the same name beside it"
            found.add(len(found.lines) + 1, Refused("no image", why))
    return load(found, options_, root=str(folder))


def _captions(folder: Path, image: str, tree: Tree, encoding: str | None) -> list[str]:
    """The lines of the .txt beside an image; `Refused` if there is none that can be read."""
    words = tree.words_of(image)
    none = f"{folder / image} has no {Path(image).stem}.txt beside it"
    others = [os.path.basename(name) for name in tree.others if _stem(name) in _names(image)]
    if others:
        none += f", but {', '.join(others)}: captions are read from a .txt; rename them"
    if words is None:
        raise Refused("no caption", none)
    try:
        return read_lines(within(str(folder), words, image), encoding)
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
    """Load a folder with one folder per class, as torchvision's ImageFolder expects it.

    Args:
        path: the folder.
        templates: each gives a caption, with the name of the class in place of {}.
        names: folder -> name of its class (None: the name of the folder, _ and - as spaces).
        **options: of `Options`, see `load_data`.

    Returns:
        MultimodalDataset with a `report`; `meta` has "class" and "file".

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it is not a folder, a template has no {}, or a row cannot be loaded (see
            `load_data`).
    """
    options_ = Options.named(from_class_folders, options)
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates or any("{}" not in template for template in templates):
        raise ValueError(f"templates={templates!r}: each needs {{}} for the name of the class")
    folder = existing_folder(path)
    found = Found(str(folder), "image")
    for line, (image, refused) in enumerate(look_through(folder).images, 1):
        kind, _, rest = image.partition("/")
        if refused:
            found.add(line, refused)
            continue
        if not rest:
            why = "it is beside the folders of the classes, not in one of them"
            found.add(line, Refused("no class", f"{folder / image}: {why}"))
            continue
        name = (names or {}).get(kind, kind.replace("_", " ").replace("-", " "))
        captions = [template.replace("{}", name) for template in templates]
        found.add(line, image, captions, {"class": name, "file": image})
    return load(found, options_, root=str(folder))
