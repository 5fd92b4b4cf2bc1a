"""What an image file's head says: format, orientation, transparency, depth and colour profile.

One place decides it, so that the check of a head, both decoders and the report agree. Nothing here
decodes pixels. Walk-through: notebooks/08_your_own_pictures.ipynb.
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

# Formats by content, never by name. EPS, PDF and the like start other programs: left out.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
_UNPACK = "compressed by {0}; unpack it ({0} -d)"
_HEIC = "a HEIC photo, as phones save them; save it as JPEG or PNG"
_FILM = "a film; save images of it (ffmpeg -i FILE %05d.png)"
_RAW = "a camera's raw photo; develop it and save it as JPEG or PNG"
# How files begin that are often saved under an image's name; what is no image but text follows.
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
_NOT_IMAGES_BUT_TEXT = {  # in small letters, white space before it left out
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
_SAME_COLOUR = 3  # of 255: what profiles that all mean sRGB differ by


@dataclass(frozen=True)
class Reading:
    """How image files are read, and what is refused before it is decoded.

    Raises ValueError for limits below 1, and for a background that is no colour.
    """

    background: tuple[int, int, int] = (255, 255, 255)  # under transparent pixels, 0-255
    max_pixels: int = 64_000_000  # width x height; a decoded image of this size takes 0.3 GB
    max_aspect: float = 20.0  # longer side over shorter side
    max_bytes: int = 512_000_000  # of the file
    # The grey value that is white, of images with more than 8 bits; None: what the file says, which
    # is 65,535 where 12 bits were put into 16 as they are. Then give 4095.
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
    """A PIL image, not decoded, and what becomes of its pixels."""

    image: Any
    size: tuple[int, int]  # width and height as a person sees them
    orientation: int  # 1 to 8, as in EXIF: how the decoded pixels are to be turned
    white: float  # of 16-bit grey
    ends: Callable[[], bool]  # is the end of the file there?
    opaque: bool = False  # the file says that its alpha channel is none

    @property
    def plain(self) -> bool:
        """Are the decoded pixels of a JPEG what a person sees, whoever decodes them?"""
        image = self.image
        plain = image.format == "JPEG" and image.mode == "RGB" and self.orientation == 1
        return plain and to_srgb(image.info.get("icc_profile"), "RGB") is None


def refused(reason: str, where: str, why: str, remedy: str = "replace the file") -> Refused:
    return Refused(reason, f"picture {where} cannot be read ({why}); {remedy} or leave the row out")


def open_head(file: BinaryIO, where: str, reading: Reading = Reading()) -> Head:
    """The head of an image file, its limits kept. Raises `Refused`, and what decoders raise."""
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
        raise refused("not a picture", where, _what_instead(file)) from None
    except Image.DecompressionBombError:
        raise refused("too many pixels", where, "more pixels than can be decoded") from None
    head = head_of(image, ends)
    width, height = image.size
    words = f"{width} x {height} pixels"
    if width * height > reading.max_pixels:
        raise _beyond("too many pixels", where, words, reading, "max_pixels", width * height)
    if (aspect := max(width, height) / min(width, height)) > reading.max_aspect:
        words += f", one side {aspect:.4g} times the other"
        raise _beyond("too thin", where, words, reading, "max_aspect", -(-aspect // 1))
    return head


def _beyond(reason: str, where: str, words: str, reading: Reading, limit: str, needed) -> Refused:
    """A limit that a user may raise, and how."""
    why = f"{words}, {limit} is {getattr(reading, limit):,.12g}"
    return refused(reason, where, why, f"give reading=mm.Reading({limit}={needed:.0f})")


def _what_instead(file: BinaryIO) -> str:
    """What a file is that is no image, in words."""
    file.seek(0)
    head = file.read(300)
    text = head[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    for place, begin, what in _NOT_IMAGES:
        if head[place:].startswith(begin):
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
    """Those of FORMATS that the installed Pillow knows; asked for once, before the first file."""
    from PIL import Image

    # `Reading.max_pixels` is the limit here; Pillow's warning would come beside our own words.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _opened(file: BinaryIO, size: int) -> tuple[Any, Callable[[], bool]]:
    """(a PIL image that is not decoded, what says whether the end of its file is there)."""
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
    # Pillow reads what stands behind the pixels only while it decodes.
    if {b"eXIf", b"iTXt", b"zTXt", b"tEXt"} & {*behind}:
        file, profile = _without_notes(file, chunks)
    file.seek(0)
    try:
        image = Image.open(file, formats=_formats())
    except Image.DecompressionBombError:
        raise
    except Exception:  # of a note that is damaged or too large; the pixels may be in order
        file, profile = _without_notes(file, chunks)
        image = Image.open(file, formats=_formats())
    if profile is not None:
        image.info["icc_profile"] = profile
    _scale_transparency(image)
    return image, lambda: whole


def _has_its_end(file: BinaryIO, kind: str, size: int) -> bool:
    place = file.tell()  # the decoder goes on here
    file.seek(max(0, size - 64))
    tail = file.read()
    file.seek(4)
    riff = int.from_bytes(file.read(4), "little") + 8
    file.seek(place)
    if kind == "WEBP":
        return riff <= size
    if kind == "GIF":  # one letter, which stands anywhere by chance
        return tail.rstrip(b"\0").endswith(b";")
    return kind in ("JPEG", "MPO") and b"\xff\xd9" in tail[-16:]


def _chunks(file: BinaryIO, size: int) -> tuple[list[tuple[bytes, int, int]], bool]:
    """(kind, place, length) of the chunks of a PNG file, and whether the last one is there."""
    chunks, place = [], 8
    while place + 12 <= size:
        file.seek(place)
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if place + 12 + length > size:
            break
        chunks.append((kind, place, length))
        place += 12 + length
        if kind == b"IEND":
            return chunks, True
    return chunks, False


def _without_notes(file: BinaryIO, chunks) -> tuple[BinaryIO, bytes | None]:
    """(a PNG file again, its colour profile), with what is known of an orientation before all else.

    Notes in words are left out, and so is what does not fit its check sum beside the pixels.
    """
    first: list[bytes] = []
    rest: list[bytes] = []
    profile = None
    for kind, place, length in chunks:
        file.seek(place)
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
    """A colour profile; None of a damaged one, or of one too large to be any."""
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(data, _MOST_PROFILE)
    except zlib.error:
        return None
    return profile if inflate.eof else None


def _scale_transparency(image) -> None:
    """The transparent colour of a PNG, on the scale on which Pillow decodes its pixels."""
    colour, raw = image.info.get("transparency"), image.tile[0][3] if image.tile else ""
    scale = {"L;2": 85, "L;4": 17}.get(raw if isinstance(raw, str) else raw[0], 1)
    if isinstance(colour, int) and image.mode == "L":
        image.info["transparency"] = colour * scale
    elif isinstance(colour, tuple) and "16" in raw:
        image.info["transparency"] = tuple(part >> 8 for part in colour)


# ---- what it says --------------------------------------------------------------------------------


def head_of(image, ends: Callable[[], bool] = bool) -> Head:
    """What a PIL image says of itself, decoded or not."""
    head = Head(image, image.size, _orientation(image), 65535.0, ends)
    if image.format == "TIFF" and hasattr(image, "tag_v2"):  # Pillow turns it while it decodes
        bits = image.tag_v2.get(_BITS, 16)
        head.white = 2.0 ** (bits[0] if isinstance(bits, tuple) else bits) - 1
        head.size = image.tag_v2.get(_WIDTH, head.size[0]), image.tag_v2.get(_HEIGHT, head.size[1])
    elif image.format == "TGA" and getattr(image, "fp", None) is not None:
        place = image.fp.tell()
        image.fp.seek(17)
        head.opaque = not image.fp.read(1)[0] & 15  # how many bits of a pixel are alpha
        image.fp.seek(place)
    if head.orientation >= 5:
        head.size = head.size[::-1]
    if image.format == "TIFF":
        head.orientation = 1
    return head


def _orientation(image) -> int:
    """How the camera was held, 1 to 8, by EXIF or XMP; 1 where that is missing or damaged."""
    from PIL import Image

    said = image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp"} or hasattr(image, "tag_v2")
    if not said and getattr(image, "_exif", None) is None:
        return 1
    try:  # of the class itself: that of a PNG decodes
        with warnings.catch_warnings():  # of damaged tags, which concern nobody here
            warnings.simplefilter("ignore")
            value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # of any kind: struct.error, SyntaxError, ...
        return 1
    return int(value) if value in range(1, 9) else 1


# ---- colours -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def to_srgb(profile: bytes | None, mode: str):
    """What brings pixels of a mode ("RGB", "L", "CMYK") from a colour profile to sRGB.

    None where that changes nothing that can be seen: without a profile, for sRGB under any of its
    names, and for a damaged profile or one of another mode, which viewers leave alone, too.
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
