"""Read a picture file as a person would see it, and change pictures on the device.

Pictures are uint8 until they are on the device. Shapes: B batch, H x W pixels.
Walk-through: notebooks/01_data.ipynb.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_picture(path: str | os.PathLike, row: int | None = None):
    """Decode a picture file to an RGB PIL image as a person would see it.

    EXIF rotation is applied, alpha is laid over white, 16-bit and float grey values are scaled to 8
    bits. Raises FileNotFoundError or ValueError naming file and row.
    """
    from PIL import Image

    where = f"{path}" + (f" (row {row})" if row is not None else "")
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"picture {where} does not exist; check the path or leave the row out"
        )
    try:
        with Image.open(path) as picture:
            picture.load()
            return as_seen(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "the file")
        message = (
            f"picture {where} cannot be read ({reason}); replace the file or leave the row out"
        )
        raise ValueError(message) from None


def as_seen(picture):
    """A PIL image as a person sees it: upright, RGB, alpha over white, wide values scaled.

    16-bit grey is divided by its full range, so that pictures of one series stay comparable; 32-bit
    and float grey, which have no range of their own, are taken for 0-1, 0-255 or 0-65,535 by their
    largest value. (PIL's own conversion clips all of these to white.)
    """
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):  # I;16, I;16B, I (32 bits), F
        values = np.asarray(picture).astype(np.float64)
        ranges = [65535.0] if picture.mode.startswith("I;16") else [1.0, 255.0, 65535.0]
        if picture.mode == "I":
            ranges = ranges[1:]
        top = next((r for r in ranges if values.max() <= r), ranges[-1])
        grey = np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def square(image_size: int) -> Callable:
    """CLIP's way to a square: the shorter side becomes `image_size`, then the centre is cut out.

    Returns a function PIL -> uint8 (3, image_size, image_size).
    """
    from torchvision.transforms import InterpolationMode, v2

    resize = v2.Resize(image_size, InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(image_size), v2.PILToTensor()])


def shift_pictures(pixel_values: Tensor, noise: Tensor, fraction: float = 1 / 16) -> Tensor:
    """Move each picture (B, 3, H, W) by its own whole number of pixels, the edge repeated.

    noise (B, 2) uniform in [0, 1) gives the shift down and right, up to `fraction` of the side
    either way. Nothing is flipped: "facing right" and the order of two people are in the captions.
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
    picture = torch.arange(len(noise), device=noise.device)[:, None, None, None]
    colour = torch.arange(3, device=noise.device)[None, :, None, None]
    return pixel_values[picture, colour, rows[:, None, :, None], columns[:, None, None, :]]


def _whole_shift(noise: Tensor, limit: float) -> Tensor:
    return ((noise * 2 - 1) * (limit + 0.5)).round().clamp(-limit, limit)
