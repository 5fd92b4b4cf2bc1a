"""Awkward images: they look as a person would see them, or a message says why they cannot."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from mmkit.data.image_headers import Reading
from tests.data.awkward import (
    BLUE,
    GREEN,
    RED,
    Case,
    chunk,
    encoded,
    gif_claiming,
    grey_ramp,
    image,
    noise,
    one_colour,
    png_claiming,
    png_with,
    ramp,
    row,
    shows,
    turned,
    upright,
)

WHITE = (255, 255, 255)


def clear(mode: str, **options) -> bytes:
    """A PNG without opaque pixels."""
    return one_colour("PNG", mode, **options)


def palette_with_transparency() -> bytes:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([*RED, *GREEN, *BLUE])
    return encoded(image, "PNG", transparency=1)


def ycck() -> bytes:
    """CMYK as Adobe writes it: Y = 200, no colour, no black; PIL's JPEG with another Adobe mark."""
    data = bytearray(encoded(Image.new("CMYK", (16, 16), (55, 127, 127, 0)), "JPEG", quality=95))
    mark = data.index(b"Adobe")
    data[mark + 11] = 2  # the transform: YCCK
    return bytes(data)


def damaged_png() -> bytes:
    """One byte of its pixels is changed; head and end are intact."""
    data = bytearray(noise("PNG"))
    data[len(data) // 2] ^= 255
    return bytes(data)


def damaged_jpeg() -> bytes:
    """Two kilobytes in the middle are zeros; head and end are intact."""
    data = bytearray(noise("JPEG", quality=95))
    data[3000:5000] = bytes(2000)
    return bytes(data)


def cut(kind: str, fraction: float = 0.6, **options) -> bytes:
    data = noise(kind, **options)
    return data[: int(fraction * len(data))]


def animated(kind: str, **options) -> bytes:
    """A red frame, a green one, a blue one."""
    first, *more = (Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE))
    return encoded(first, kind, save_all=True, append_images=more, **options)


def bad_exif() -> bytes:
    """An orientation that is a text, "six"."""
    entry = struct.pack("<HHI4s", 0x0112, 2, 4, b"six\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    return one_colour("JPEG", exif=exif, quality=95)


def tiff_that_refers_to_itself() -> bytes:
    """Its first directory points to itself as the next one."""
    data = bytearray(one_colour("TIFF"))
    first = struct.unpack_from("<I", data, 4)[0]
    entries = struct.unpack_from("<H", data, first)[0]
    struct.pack_into("<I", data, first + 2 + 12 * entries, first)
    return bytes(data)


def bmp_with_palette_behind_the_end() -> bytes:
    return one_colour("BMP", "P", 1)[:60]


def many_chunks() -> bytes:
    data = one_colour("PNG")
    return data[:33] + chunk(b"tEXt", b"k\0" + b"v" * 1000) * 3000 + data[33:]


def big(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


ZIP = zlib.compress(bytes(80_000_000))  # 80 kB that become 80 MB
TOO_MANY = "cannot be read .*pixels"
CUT = "cannot be read .*(truncated|end of file|broken|not enough|decod|format is not known)"

# fmt: off
IMAGES = [
    Case("a JPEG called .png", image("d.png", one_colour("JPEG", quality=95)), "load",
         check=shows(RED, 6)),
    Case("a PNG called .jpg", image("d.jpg", one_colour("PNG")), "load", check=shows(RED)),
    Case("an image with no ending", image("d", one_colour("PNG")), "load", check=shows(RED)),
    *[Case(f"EXIF orientation {i}", image("d.jpg", turned(i)), "load", check=upright)
      for i in range(2, 9)],
    Case("EXIF orientation in words", image("d.jpg", bad_exif), "load", check=shows(RED, 6)),
    Case("alpha", image("d.png", clear("RGBA", colour=(*RED, 0))), "load", check=shows(WHITE)),
    Case("half alpha", image("d.png", clear("RGBA", colour=(0, 0, 0, 128))), "load",
         check=shows((127,) * 3)),
    Case("a palette with transparency", image("d.png", palette_with_transparency), "load",
         check=shows(WHITE)),
    Case("a colour that is transparent", image("d.png", clear("RGB", transparency=RED)), "load",
         check=shows(WHITE)),
    Case("black and white with transparency",
         image("d.png", clear("1", colour=0, transparency=0)), "load", check=shows(WHITE)),
    Case("grey", image("d.png", clear("L", colour=77)), "load", check=shows((77,) * 3)),
    Case("grey and alpha", image("d.png", clear("LA", colour=(0, 0))), "load",
         check=shows(WHITE)),
    Case("black and white", image("d.png", clear("1", colour=1)), "load", check=shows(WHITE)),
    Case("CMYK", image("d.jpg", one_colour("JPEG", "CMYK", (0, 255, 255, 0), quality=95)),
         "load", check=shows((255, 0, 0), 6)),
    Case("YCCK", image("d.jpg", ycck), "load", check=shows((55, 55, 55), 6)),
    Case("grey, 16 bits", image("d.png", encoded(grey_ramp(np.uint16, 65535), "PNG")), "load",
         check=ramp),
    Case("TIFF, 16 bits", image("d.tif", encoded(grey_ramp(np.uint16, 65535), "TIFF")), "load",
         check=ramp),
    Case("TIFF, 16 bits, dark",
         image("d.tif", encoded(np.full((16, 16), 257, np.uint16), "TIFF")), "load",
         check=shows((1, 1, 1), 0)),
    Case("TIFF, 32 bits", image("d.tif", encoded(grey_ramp(np.int32, 65535), "TIFF")), "load",
         check=ramp),
    *[Case(f"TIFF, float, 0 to {top}",
           image("d.tif", encoded(grey_ramp(np.float32, top), "TIFF")), "load", check=ramp)
      for top in (1, 255, 65535, 1e6)],
    *[Case(f"TIFF, float, {value}",
           image("d.tif", encoded(np.full((16, 16), value, np.float32), "TIFF")), "skip",
           "values below 0 or not finite; scale them") for value in (np.nan, np.inf, -1.0)],
    Case("GIF, animated", image("d.gif", animated("GIF")), "load", check=shows(RED)),
    Case("WebP, animated", image("d.webp", animated("WEBP", lossless=True)), "load",
         check=shows(RED)),
    Case("PNG, animated", image("d.png", animated("PNG")), "load", check=shows(RED)),
    Case("MPO", image("d.jpg", animated("MPO", quality=95)), "load", check=shows(RED, 6)),
    Case("TIFF of several pages", image("d.tif", animated("TIFF")), "load", check=shows(RED)),
    Case("WebP", image("d.webp", one_colour("WEBP", lossless=True)), "load", check=shows(RED)),
    Case("AVIF", image("d.avif", one_colour("AVIF", quality=95)), "load", check=shows(RED, 6)),
    Case("JPEG 2000", image("d.jp2", one_colour("JPEG2000")), "load", check=shows(RED)),
    Case("1 x 1", image("d.png", one_colour("PNG", size=(1, 1))), "load", check=shows(RED)),
    Case("19 x 1", image("d.png", one_colour("PNG", size=(19, 1))), "load", check=shows(RED)),
    # cut off, damaged
    *[Case(f"{kind}, cut off", image("d", cut(kind)), "skip", CUT)
      for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")],
    Case("JPEG, its last two bytes gone", image("d.jpg", noise("JPEG")[:-2]), "skip", CUT),
    Case("PNG, cut in its head", image("d.png", noise("PNG")[:20]), "skip", "cannot be read"),
    Case("PNG, damaged in the middle", image("d.png", damaged_png), "skip", "cannot be read"),
    # no decoder can tell: a JPEG has no check sum, and any bytes are some image
    Case("JPEG, damaged in the middle", image("d.jpg", damaged_jpeg), "load"),
    Case("a palette behind the end", image("d.bmp", bmp_with_palette_behind_the_end), "skip",
         "cannot be read"),
    Case("a TIFF that refers to itself", image("d.tif", tiff_that_refers_to_itself), "load",
         check=shows(RED)),
    Case("0 bytes", image("d.jpg", b""), "skip", "the file has 0 bytes"),
    Case("zeros", image("d.jpg", bytes(10_000)), "skip", "its format is not known"),
    # not images
    Case("a web page", image("d.jpg", b"\n <!DOCTYPE html><html>404</html>"), "skip",
         "it is a web page"),
    Case("SVG", image("d.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "skip",
         "it is an SVG drawing"),
    Case("XML", image("d.png", b"<?xml version='1.0'?><svg/>"), "skip", "it is XML"),
    Case("PDF", image("d.png", b"%PDF-1.7\n..."), "skip", "it is a PDF"),
    Case("EPS", image("d.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"),
         "skip", "it is a PostScript document"),
    Case("a Git LFS pointer",
         image("d.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
         "skip", "it is a Git LFS pointer .*git lfs pull"),
    Case("a zip archive", image("d.png", b"PK\x03\x04" + bytes(60)), "skip", "zip archive"),
    # bombs
    Case("60,000 x 60,000 claimed", image("d.png", png_claiming(60_000, 60_000)), "skip",
         TOO_MANY),
    Case("9,000 x 9,000 claimed", image("d.png", png_claiming(9000, 9000)), "skip",
         r"9000 x 9000 pixels, max_pixels is 64,000,000"),
    Case("9,000 x 9,000, really", lambda folder: image("d.png", big(9000, 9000))(folder), "skip",
         TOO_MANY),
    Case("0 x 0 claimed", image("d.png", png_claiming(0, 0)), "skip", "cannot be read"),
    Case("a size with no pixels behind it", image("d.png", png_claiming(4000, 4000)), "skip",
         "cannot be read"),
    Case("a GIF's frame larger than its screen", image("d.gif", gif_claiming(60_000, 60_000)),
         "skip", TOO_MANY),
    Case("1 x 5,000", image("d.png", one_colour("PNG", size=(1, 5000))), "skip",
         r"1 x 5000 pixels, one side 5000 times the other, max_aspect is 20\); give reading="),
    Case("a text of 80 MB in 80 kB", image("d.png", png_with(b"zTXt", b"k\0\0" + ZIP)), "load",
         check=shows(RED)),
    Case("a colour profile of 80 MB in 80 kB", image("d.png", png_with(b"iCCP", b"k\0\0" + ZIP)),
         "load", check=shows(RED)),
    Case("3,000 texts", image("d.png", many_chunks), "load", check=shows(RED)),
    Case("more bytes than allowed",
         row("d.png", lambda f: (f / "d.png").write_bytes(noise("PNG")),
             reading=Reading(max_bytes=5000)),
         "skip", "bytes, max_bytes is 5,000"),
    Case("a colour under alpha",
         row("d.png", lambda f: (f / "d.png").write_bytes(clear("RGBA", colour=(*RED, 0))),
             reading=Reading(background=BLUE)),
         "load", check=shows(BLUE)),
]
# fmt: on
