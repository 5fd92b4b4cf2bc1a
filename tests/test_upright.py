"""Pictures are not copied without need, and come out as if they were."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mmkit.pictures import as_seen, read_picture, square


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [None, *range(10)])
def test_every_orientation_is_seen_as_pillow_turns_it(mode, orientation):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    file = io.BytesIO()
    noise(13, 7, mode).save(file, "JPEG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue()))).convert("RGB")
    seen = read_picture(io.BytesIO(file.getvalue()))
    assert seen.mode == "RGB" and seen.size == expected.size
    np.testing.assert_array_equal(np.array(seen), np.array(expected))


def test_an_upright_rgb_picture_is_itself():
    picture = noise(13, 7)
    assert as_seen(picture) is picture


@pytest.mark.parametrize("size", [(97, 97), (131, 97), (59, 83), (11, 11), (5, 7)])
def test_a_square_is_what_pillow_makes_of_the_centre(size):
    """Of a smooth picture and of noise, larger and smaller than the square."""
    short, picture = min(size), noise(*size)
    left, top = (size[0] - short) // 2, (size[1] - short) // 2
    centre = picture.crop((left, top, left + short, top + short))
    expected = np.array(centre.resize((11, 11), Image.Resampling.BICUBIC)).astype(int)
    pixels = square(11)(picture)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 11, 11) and pixels.is_contiguous()
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
