"""What an image file's head says: format, orientation, transparency, depth and colour profile.

It is decided in one place, so that the check of heads, both decoders and the report agree. Nothing
here decodes pixels. Walk-through: notebooks/08_your_own_images.ipynb.
"""

import functools
import io
import os
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from ..errors import Refused

# Formats by content, never by name. EPS, PDF and the like would start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
_UNPACK = "compressed by {0}; unpack it ({0} -d)"
_HEIC = "a HEIC photo, as phones save them; save it as JPEG or PNG"
_FILM = "a film; save images of it (ffmpeg -i FILE %05d.png)"
_RAW = "a camera's raw photo; develop it and save it as JPEG or PNG"
# (offset, first bytes, description) of other files that often have the name of an image.
_NOT_IMAGES: tuple[tuple[int, bytes, str], ...] = (
    *((8, brand, _HEIC) for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")),
    *((8, brand, _HEIC) for brand in (b"mif1", b"msf1")),
    (8, b"avif", "an AVIF image, truncated or damaged (or this Pillow reads none)"),
    (8, b"crx ", _RAW),
    (4, b"ftyp", _FILM),
    (4, b"moov", _FILM),
    (0, b"\x1aE\xdf\xa3", _FILM),
    (8, b"AVI LIST", _FILM),
    (0, b"\xff\n", "a JPEG XL image; save it as PNG (djxl FILE a.png)"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image; save it as PNG (djxl FILE a.png)"),
    (0, b"\x1f\x8b", _UNPACK.format("gzip")),
    (0, b"BZh", _UNPACK.format("bzip2")),
    (0, b"\xfd7zXZ\0", _UNPACK.format("xz")),
    (0, b"\x28\xb5\x2f\xfd", _UNPACK.format("zstd")),
    (0, b"PK\x03\x04", "a zip archive; unpack it (unzip)"),
    (0, b"Rar!", "a rar archive; unpack it (unrar x)"),
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it (7z x)"),
    (257, b"ustar", "a tar archive; unpack it (tar -xf), or give it to mm.from_shards"),
    (0, b"8BPS", "a Photoshop file; save it as PNG"),
    (0, b"gimp xcf", "a GIMP file; export it as PNG"),
    (0, b"\0\0\1\0", "an icon (ICO); save it as PNG"),
    (0, b"v/1\1", "an OpenEXR image; save it as 16-bit PNG or TIFF"),
    (128, b"DICM", "a DICOM image; save it as 16-bit PNG or TIFF"),
    (0, b"FUJIFILMCCD-RAW", _RAW),
    (0, b"IIRO", _RAW),
    (0, b"IIU\0", _RAW),
    (0, b"\x93NUMPY", "an array of NumPy; give arrays to mm.MultimodalDataset.from_pixels"),
    (0, b"\x89HDF", "an HDF5 file; save its images as PNG"),
    (0, b"PAR1", "a parquet file; give it to mm.from_hub"),
    (0, b"SQLite format 3", "an SQLite data base; save its images as files"),
)
_NOT_IMAGES_BUT_TEXT = {  # in lower case, without white space before it
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"<?xml": "XML (an SVG drawing, perhaps)",
    b"<svg": "an SVG drawing",
    b"%pdf": "a PDF document",
    b"%!ps": "a PostScript document",
    b"version https://git-lfs": "a Git LFS pointer (fetch it by git lfs pull)",
    b"{": "JSON text",
}
_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_PROFILE = 16_000_000  # bytes; the largest in use, tables for printers, have 3 MB
_ORIENTATION, _BITS, _WIDTH, _HEIGHT = 0x0112, 258, 256, 257  # tags of TIFF
_SAME_COLOUR = 3  # of 255: by so much profiles that all mean sRGB may differ


@dataclass(frozen=True)
class Reading:
    """How image files are read, and which ones are refused before they are decoded.

    Raises ValueError for limits below 1, and for a background that is not a colour.
    """

    background: tuple[int, int, int] = (255, 255, 255)  # under transparent pixels, 0-255
    max_pixels: int = 64_000_000  # width x height; a decoded image of this size takes 0.3 GB
    max_aspect: float = 20.0  # longer side over shorter side
    max_bytes: int = 512_000_000  # of the file
    # The value of white in grey images with more than 8 bits; None: as the file says, which is
    # 65,535 even if 12-bit values were stored in 16 bits without scaling. Then give 4095.
    white: float | None = None

    def __post_init__(self):
        for name in ("max_pixels", "max_aspect", "max_bytes"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")
        if self.white is not None and not 0 < self.white < float("inf"):
            raise ValueError(f"white={self.white!r} must be above 0; 4095 for 12 bits")
        colour = self.background
        if not (
            isinstance(colour, tuple | list)
            and len(colour) == 3
            and all(isinstance(part, int) and 0 <= part <= 255 for part in colour)
        ):
            raise ValueError(f"background={colour!r} must be three numbers, 0 to 255 each")


@dataclass
class Head:
    """A PIL image that is not decoded, and how its pixels are to be treated."""

    image: Any
    size: tuple[int, int]  # width and height as a person sees them
    orientation: int  # 1 to 8, as in EXIF: how the decoded pixels are to be turned
    white: float  # the value of white in 16-bit grey
    ends: Callable[[], bool]  # is the end of the file there?
    opaque: bool = False  # the file says that its alpha channel has no meaning

    @property
    def plain(self) -> bool:
        """Is it a JPEG whose pixels need no correction, so that any decoder may be used?"""
        image = self.image
        plain = image.format == "JPEG" and image.mode == "RGB" and self.orientation == 1
        return plain and to_srgb(image.info.get("icc_profile"), "RGB") is None


def refused(reason: str, where: str, why: str, remedy: str = "replace the file") -> Refused:
    """The error for an image that cannot be read, with cause and remedy."""
    return Refused(reason, f"image {where} cannot be read ({why}); {remedy} or leave the row out")


def open_head(file: BinaryIO, where: str, reading: Reading = Reading()) -> Head:
    """The head of an image file within the limits; raises `Refused` and errors of decoders."""
    from PIL import Image, UnidentifiedImageError

    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size == 0:
        raise refused("empty file", where, "the file has 0 bytes")
    if size > reading.max_bytes:
        raise _beyond("too large", where, f"{size:,} bytes", reading, "max_bytes", size)
    try:
        image, ends = _opened(file, size)
    except UnidentifiedImageError:
        raise refused("not an image", where, _what_instead(file)) from None
    except Image.DecompressionBombError:
        raise refused("too many pixels", where, "more pixels than can be decoded") from None
    head = head_of(image, ends)
    width, height = image.size
    shape = f"{width} x {height} pixels"
    if width * height > reading.max_pixels:
        raise _beyond("too many pixels", where, shape, reading, "max_pixels", width * height)
    if (aspect := max(width, height) / min(width, height)) > reading.max_aspect:
        shape += f", one side {aspect:.4g} times the other"
        raise _beyond("too thin", where, shape, reading, "max_aspect", -(-aspect // 1))
    return head


def _beyond(reason: str, where: str, found: str, reading: Reading, limit: str, needed) -> Refused:
    """The error for an image beyond a limit, with the setting that raises the limit."""
    why = f"{found}, {limit} is {getattr(reading, limit):,.12g}"
    return refused(reason, where, why, f"give reading=mm.Reading({limit}={needed:.0f})")


def _what_instead(file: BinaryIO) -> str:
    """A description of a file that is not an image."""
    file.seek(0)
    head = file.read(300)
    text = head[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    for offset, begin, what in _NOT_IMAGES:
        if head[offset:].startswith(begin):
            return f"it is {what}"
    for begin, what in _NOT_IMAGES_BUT_TEXT.items():
        if text.lower().startswith(begin):
            return f"it is {what}"
    if len(text) > 3 and text.isascii() and text.decode().replace("\n", " ").isprintable():
        return f"it is text that begins {text[:30].decode()!r}"
    return "its format is not known"


# ---- opening -------------------------------------------------------------------------------------


@functools.cache
def _formats() -> list[str]:
    """The FORMATS that the installed Pillow knows; called once, before the first file is opened."""
    from PIL import Image

    # `Reading.max_pixels` is the limit here; Pillow's warning would repeat our own message.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _opened(file: BinaryIO, size: int) -> tuple[Any, Callable[[], bool]]:
    """(a PIL image that is not decoded, a function: is the end of its file there?)."""
    from PIL import Image

    is_png = file.read(8) == _PNG
    file.seek(0)
    if not is_png:
        image = Image.open(file, formats=_formats())
        return image, functools.partial(_has_its_end, file, image.format or "", size)
    chunks, whole = _chunks(file, size)
    kinds = [kind for kind, _, _ in chunks]
    behind = kinds[kinds.index(b"IDAT") :] if b"IDAT" in kinds else []
    profile = None
    # Pillow reads chunks behind the pixels only while it decodes.
    if {b"eXIf", b"iTXt", b"zTXt", b"tEXt"} & {*behind}:
        file, profile = _without_notes(file, chunks)
    file.seek(0)
    try:
        image = Image.open(file, formats=_formats())
    except Image.DecompressionBombError:
        raise
    except Exception:  # a text chunk may be damaged or too large, while the pixels are fine
        file, profile = _without_notes(file, chunks)
        image = Image.open(file, formats=_formats())
    if profile is not None:
        image.info["icc_profile"] = profile
    _scale_transparency(image)
    return image, lambda: whole


def _has_its_end(file: BinaryIO, kind: str, size: int) -> bool:
    position = file.tell()  # the decoder continues here
    file.seek(max(0, size - 64))
    tail = file.read()
    file.seek(4)
    riff = int.from_bytes(file.read(4), "little") + 8
    file.seek(position)
    if kind == "WEBP":
        return riff <= size
    if kind == "GIF":  # one letter, which may be anywhere by chance
        return tail.rstrip(b"\0").endswith(b";")
    return kind in ("JPEG", "MPO") and b"\xff\xd9" in tail[-16:]


def _chunks(file: BinaryIO, size: int) -> tuple[list[tuple[bytes, int, int]], bool]:
    """(kind, offset, length) of the chunks of a PNG file, and whether the last one is there."""
    chunks, offset = [], 8
    while offset + 12 <= size:
        file.seek(offset)
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if offset + 12 + length > size:
            break
        chunks.append((kind, offset, length))
        offset += 12 + length
        if kind == b"IEND":
            return chunks, True
    return chunks, False


def _without_notes(file: BinaryIO, chunks) -> tuple[BinaryIO, bytes | None]:
    """(the PNG file without text chunks, its colour profile); an orientation comes first in it.

    Chunks other than pixels are also left out if their check sum is wrong.
    """
    first: list[bytes] = []
    rest: list[bytes] = []
    profile = None
    for kind, offset, length in chunks:
        file.seek(offset)
        chunk = file.read(12 + length)
        data, sound = chunk[8:-4], zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind == b"IHDR":
            first.insert(0, chunk)
        elif kind == b"iCCP" and sound:
            profile = _inflated(data.partition(b"\0")[2][1:])
        elif kind == b"eXIf" or data.startswith(b"XML:com.adobe.xmp\0\0"):
            first += [chunk] * sound
        elif kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") and (sound or kind[:1].isupper()):
            rest.append(chunk)
    return io.BytesIO(b"".join([_PNG, *first, *rest])), profile


def _inflated(data: bytes) -> bytes | None:
    """A colour profile; None if it is damaged, or too large to be one."""
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(data, _MOST_PROFILE)
    except zlib.error:
        return None
    return profile if inflate.eof else None


def _scale_transparency(image) -> None:
    """Bring the transparent colour of a PNG to the scale on which Pillow decodes its pixels."""
    colour, raw = image.info.get("transparency"), image.tile[0][3] if image.tile else ""
    scale = {"L;2": 85, "L;4": 17}.get(raw if isinstance(raw, str) else raw[0], 1)
    if isinstance(colour, int) and image.mode == "L":
        image.info["transparency"] = colour * scale
    elif isinstance(colour, tuple) and "16" in raw:
        image.info["transparency"] = tuple(part >> 8 for part in colour)


# ---- properties ----------------------------------------------------------------------------------


def head_of(image, ends: Callable[[], bool] = bool) -> Head:
    """The properties of a PIL image, decoded or not."""
    head = Head(image, image.size, _orientation(image), 65535.0, ends)
    if image.format == "TIFF" and hasattr(image, "tag_v2"):  # Pillow rotates it while it decodes
        bits = image.tag_v2.get(_BITS, 16)
        head.white = 2.0 ** (bits[0] if isinstance(bits, tuple) else bits) - 1
        head.size = image.tag_v2.get(_WIDTH, head.size[0]), image.tag_v2.get(_HEIGHT, head.size[1])
    elif image.format == "TGA" and getattr(image, "fp", None) is not None:
        position = image.fp.tell()
        image.fp.seek(17)
        head.opaque = not image.fp.read(1)[0] & 15  # the number of alpha bits per pixel
        image.fp.seek(position)
    if head.orientation >= 5:
        head.size = head.size[::-1]
    if image.format == "TIFF":
        head.orientation = 1
    return head


def _orientation(image) -> int:
    """The orientation by EXIF or XMP, 1 to 8; 1 where that is missing or damaged."""
    from PIL import Image

    said = image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp"} or hasattr(image, "tag_v2")
    if not said and getattr(image, "_exif", None) is None:
        return 1
    try:  # the method of the base class, since that of a PNG decodes
        with warnings.catch_warnings():  # about damaged tags, which do not matter here
            warnings.simplefilter("ignore")
            value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # of any kind: struct.error, SyntaxError, ...
        return 1
    return int(value) if value in range(1, 9) else 1


# ---- colours -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def to_srgb(profile: bytes | None, mode: str):
    """The transform of pixels of a mode ("RGB", "L", "CMYK") from a colour profile to sRGB.

    None if it would change nothing visible: without a profile, for sRGB under any of its names, and
    for a damaged profile or one of another mode, which viewers ignore, too.
    """
    if not profile or {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}.get(profile[16:20]) != mode:
        return None
    from PIL import Image, ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:  # ImageCms.PyCMSError, OSError; ImportError where Pillow has no LittleCMS
        return None
    if mode == "RGB":
        levels = np.linspace(0, 255, 9).astype(np.uint8)
        probe = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
        seen = np.asarray(ImageCms.applyTransform(Image.fromarray(probe), transform))
        if np.abs(seen.astype(int) - probe).max() <= _SAME_COLOUR:
            return None
    return transform
