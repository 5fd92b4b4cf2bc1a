"""Read an image file as a person would see it, and change images on the device.

Images are uint8 until they are on the device. Shapes: B batch, H x W pixels.
Walk-through: notebooks/01_data.ipynb.
"""

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import Refused
from .image_headers import Head, Reading, head_of, open_head, refused, to_srgb

SMALL_FILE = 16_000_000  # bytes; a larger file is not read into memory as a whole
AS_USUAL = Reading()
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientation -> Image.Transpose


def read_image(
    source: str | os.PathLike | BinaryIO | Callable[[], BinaryIO],
    row: int | str | None = None,
    *,
    side: int | None = None,
    reading: Reading = AS_USUAL,
    name: str | None = None,
):
    """Decode an image file to an RGB PIL image as a person would see it.

    EXIF rotation is applied, transparent pixels show the background, colours of another profile
    are converted to sRGB, 16-bit and float grey values are scaled to 8 bits, and of an animation
    the first frame is taken. side: only a square of this many pixels is needed, so that a JPEG may
    be decoded at a half, a quarter or an eighth of its size, never below twice that side. Raises
    FileNotFoundError or `Refused` (a ValueError) with a message that names file and row.
    """
    with _opened(source, row, name) as (file, where), _refusing(where):
        return _decoded(open_head(file, where, reading), side, reading)


def read_square(
    source: str | os.PathLike | BinaryIO | Callable[[], BinaryIO],
    row: int | str | None = None,
    *,
    side: int,
    reading: Reading = AS_USUAL,
    name: str | None = None,
) -> Tensor:
    """`square(side)` of `read_image`, uint8 (3, side, side); raises the same errors.

    torchvision decodes a plain JPEG of full size directly into a tensor: the same pixels in less
    time.
    """
    with _opened(source, row, name) as (file, where), _refusing(where):
        file = _in_memory(file)
        head = open_head(file, where, reading)
        in_full = min(head.size) < 4 * side  # else `draft` decodes at a half or less
        if in_full and isinstance(file, io.BytesIO) and head.plain and (decode := tensor_decoder()):
            return cut_square(decode(torch.frombuffer(file.getbuffer(), dtype=torch.uint8)), side)
        return square(side)(_decoded(head, side, reading))


def _decoded(head: Head, side: int | None, reading: Reading):
    """The RGB PIL image of an opened file."""
    image = head.image
    if side is not None and image.format in ("JPEG", "MPO"):
        image.draft("RGB" if image.mode == "YCbCr" else image.mode, (2 * side, 2 * side))
    return _seen(head, reading)


def _in_memory(file: BinaryIO) -> BinaryIO:
    """A small file as bytes in memory, since reading its head takes forty small reads."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return io.BytesIO(file.read()) if size <= SMALL_FILE else file


@functools.cache
def tensor_decoder() -> Callable[[Tensor], Tensor] | None:
    """The function of torchvision that decodes JPEGs to RGB; None if it was built without one.

    Its import takes a second, so it should run before workers are forked, not in each of them.
    """
    try:
        from torchvision.io import ImageReadMode

        # The operator itself: the function in torchvision.io warns that it is deprecated.
        decode = torch.ops.image.decode_jpeg
    except (ImportError, AttributeError):
        return None
    return lambda encoded: decode(encoded, ImageReadMode.RGB.value, False)


def check_image(
    source: str | os.PathLike | BinaryIO | Callable[[], BinaryIO],
    row: int | str | None = None,
    *,
    reading: Reading = AS_USUAL,
    name: str | None = None,
) -> tuple[int, int]:
    """(width, height) of the upright image, from a file's head; refuses what `read_image` would.

    For a JPEG, PNG, WebP or GIF it checks that the end of the file is there, which a broken
    download lacks; if it is not, and for other formats, the image is decoded. Damage in the middle
    is found only by decoding, and in a JPEG, which has no check sums, often not even then.
    """
    with _opened(source, row, name) as (file, where), _refusing(where):
        head = open_head(file, where, reading)
        if not head.ends():
            _seen(head, reading)
        return head.size


@contextlib.contextmanager
def _opened(source, row: int | str | None, name: str | None) -> Iterator[tuple[BinaryIO, str]]:
    """The file, and its name in messages."""
    where = str(name or source)
    if row is not None:
        where += f" ({row if isinstance(row, str) else f'row {row}'})"
    if hasattr(source, "read"):
        yield source, where
        return
    if not (isinstance(source, str | os.PathLike) or callable(source)):  # a number is a descriptor
        raise ValueError(f"{where[:80]} is not an image; give the path of a file")
    try:
        file = source() if callable(source) else open(source, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"image {where} does not exist; check the path or leave the row out"
        ) from None
    except Refused as error:
        raise Refused(error.reason, f"image {where}: {error}") from None
    except (IsADirectoryError, ValueError) as error:  # a path with NUL in it
        raise Refused("not a file", f"image {where} is not a file ({error})") from None
    except OSError as error:  # no permission, for example
        raise Refused("not opened", f"image {where} cannot be opened ({error.strerror})") from None
    with file:
        yield file, where


@contextlib.contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turn any error of a decoder into a `Refused` that names the image."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:  # of any kind: zlib.error, struct.error, EOFError, ...
        cut = "truncated" in str(error) or "end of file" in str(error).lower()
        why = str(error) or type(error).__name__
        raise refused("truncated" if cut else "damaged", where, why) from None


def as_png(pixels: Tensor) -> BinaryIO:
    """A decoded image, uint8 (3, H, W), as the bytes of a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
    file.seek(0)
    return file


def to_rgb(image, background: tuple[int, int, int] = (255, 255, 255)):
    """A PIL image as a person sees it: upright, sRGB, alpha over `background`, 8 bits.

    16-bit grey is divided by its full range, so that images of one series stay comparable. 32-bit
    and float grey have no range of their own: their largest value decides between 0-1, 0-255 and
    0-65,535 (resampling may leave it slightly above); if it is below a thirty-second of the range,
    the values are divided by it. (PIL's own conversion clips all of these to white.) Raises
    ValueError for values that are negative or not finite.
    """
    return _seen(head_of(image), Reading(background=background))


def _seen(head: Head, reading: Reading):
    """`to_rgb` by the properties in a head."""
    from PIL import Image, ImageCms

    image, info, alpha = head.image, head.image.info, None
    image.load()
    if image.mode.startswith(("I", "F")):  # I;16, I;16B, I (32 bits), F
        image = _in_8_bits(image, reading.white, head.white)
    if head.orientation != 1:
        image = image.transpose(_TURNS[head.orientation])
    mode = {"CMYK": "CMYK", "L": "L", "LA": "L", "1": "L"}.get(image.mode, "RGB")
    clear = "transparency" in image.info or {"A", "a"} & {*image.getbands()}
    if clear or (image.mode == "P" and image.palette.mode == "RGBA"):
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        none = head.image.format in ("BMP", "TGA") and not alpha.getextrema()[1]  # left at 0
        image, alpha = image.convert(mode), None if none or head.opaque else alpha
    if transform := to_srgb(info.get("icc_profile"), mode):
        image = ImageCms.applyTransform(image.convert(mode), transform)
    image = image if image.mode == "RGB" else image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
        under = Image.new("RGBA", image.size, (*reading.background, 255))
        image = Image.alpha_composite(under, image).convert("RGB")
    return image


def _in_8_bits(image, white: float | None, full: float):
    """A grey PIL image of more than 8 bits as "L", or "LA" if one of its values is transparent.

    white: the value of white; None: `full` for 16 bits, else by the largest value.
    """
    from PIL import Image

    values, clear = np.asarray(image), image.info.get("transparency")
    top, bottom = float(values.max()), float(values.min())
    if not (np.isfinite(top) and np.isfinite(bottom) and bottom >= -0.05 * abs(top)):
        raise ValueError("it has values below 0 or not finite; scale them to 0-1")
    limit = white or (full if image.mode.startswith("I;16") else _range_of(top, image.mode))
    grey = (values * np.float32(255 / limit) + np.float32(0.5)).clip(0, 255).astype(np.uint8)
    narrow = Image.fromarray(grey)
    if isinstance(clear, int):
        narrow.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return narrow


def _range_of(top: float, mode: str) -> float:
    """The value of white if the largest is `top`; mode "I": 32-bit integers, "F": floats."""
    if mode.startswith("F") and top <= 1.05:
        return 1.0
    return next((r for r in (255.0, 65535.0) if r / 32 < top <= 1.05 * r), top or 1.0)


@dataclass(frozen=True)
class square:
    """CLIP's preprocessing: resize the shorter side to `side` (bicubic) and crop the centre.

    A function of a PIL image that returns uint8 (3, side, side). The centre is cropped first, so
    that a thin image takes no more memory than a square one. PyTorch resizes: its filter is
    Pillow's at two and a half times the speed, with differences from rounding only.
    """

    side: int

    def __call__(self, image: Any) -> Tensor:
        """The square of an RGB PIL image."""
        width, height = image.size
        if width != height:
            image = image.crop(_centre(width, height))
        short = min(width, height)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return cut_square(
            pixels.view(short, short, 3).permute(2, 0, 1), self.side
        )  # without copying


def cut_square(pixels: Tensor, side: int) -> Tensor:
    """The centre of an image uint8 (3, H, W), resized to (3, side, side) by a bicubic filter."""
    left, top, right, bottom = _centre(pixels.shape[2], pixels.shape[1])
    pixels = pixels[None, :, top:bottom, left:right]
    fitted = torch.nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
    return fitted[0].contiguous()


def _centre(width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest square in the middle."""
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    return left, top, left + short, top + short


def as_if_not_normalised(pixel_values: Tensor, pixel_stats: Tensor) -> str:
    """A warning about floats (..., 3, H, W) that seem to be 0 to 1, as `ToTensor` gives; else "".

    Floats count as normalised and are not changed. pixel_stats (2, 3, 1, 1): mean and standard
    deviation of each channel, by which the model itself normalises uint8.
    """
    if not pixel_values.is_floating_point():
        return ""
    (low, high), (mean, std) = pixel_values.aminmax(), pixel_stats.flatten(1).tolist()
    if not (low >= 0 and high <= 1) or not any(mean):  # also if one of them is NaN
        return ""
    mean, std = ([round(x, 4) for x in three] for three in (mean, std))
    expected = f"{-mean[0] / std[0]:.1f} to {(1 - mean[0]) / std[0]:.1f}"
    return (
        f"images are floats from {low:.2f} to {high:.2f}, which count as normalised already, and "
        f"this model expects {expected}; end the transform with Normalize(mean={mean}, std={std}), "
        "or let it give uint8 (PILToTensor() in place of ToTensor())"
    )


def shift_images(pixel_values: Tensor, noise: Tensor, fraction: float = 1 / 16) -> Tensor:
    """Shift each image (B, 3, H, W) by its own whole number of pixels; the edge is repeated.

    noise (B, 2) uniform in [0, 1) gives the shifts down and right, up to `fraction` of the side in
    either direction. Images are not flipped, since captions say "facing right" or name two people
    from left to right.
    """
    height, width = pixel_values.shape[-2:]
    rows, columns = (
        (
            torch.arange(side, device=noise.device)
            + _whole_shift(noise[:, i : i + 1], side * fraction)
        )
        .clamp(0, side - 1)
        .long()
        for i, side in enumerate((height, width))
    )
    image = torch.arange(len(noise), device=noise.device)[:, None, None, None]
    colour = torch.arange(3, device=noise.device)[None, :, None, None]
    return pixel_values[image, colour, rows[:, None, :, None], columns[:, None, None, :]]


def _whole_shift(noise: Tensor, limit: float) -> Tensor:
    return ((noise * 2 - 1) * (limit + 0.5)).round().clamp(-limit, limit)
