"""Pictures are not copied without need, and come out as if they were."""

import io

import numpy as np
import pytest
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


def test_a_square_is_what_pillow_fits_and_may_be_written_to():
    picture = noise(23, 17)
    pixels = square(11)(picture)
    expected = np.array(ImageOps.fit(picture, (11, 11), method=Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    assert pixels.is_contiguous()
    pixels += 1  # of memory of its own: PyTorch warns of what is read-only
