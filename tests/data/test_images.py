"""Images are not copied without need, with the same result."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mmkit.data import images
from mmkit.data.images import read_image, read_square, square, to_rgb
from mmkit.errors import Refused


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
    seen = read_image(io.BytesIO(file.getvalue()))
    assert seen.mode == "RGB" and seen.size == expected.size
    np.testing.assert_array_equal(np.array(seen), np.array(expected))


def test_an_upright_rgb_image_is_itself():
    image = noise(13, 7)
    assert to_rgb(image) is image


@pytest.mark.parametrize("size", [(97, 97), (131, 97), (59, 83), (11, 11), (5, 7)])
def test_a_square_is_what_pillow_makes_of_the_centre(size):
    """Of a smooth image and of noise, larger and smaller than the square."""
    short, image = min(size), noise(*size)
    left, top = (size[0] - short) // 2, (size[1] - short) // 2
    centre = image.crop((left, top, left + short, top + short))
    expected = np.array(centre.resize((11, 11), Image.Resampling.BICUBIC)).astype(int)
    pixels = square(11)(image)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 11, 11) and pixels.is_contiguous()
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "size, reduced",
    [
        ((1024, 1024), (128, 128)),
        ((1024, 1023), (256, 256)),  # an eighth of 1023 would be below 2 x 64
        ((700, 1024), (175, 256)),
        ((300, 500), (150, 250)),
        ((255, 1024), (255, 1024)),
    ],
)
def test_a_jpeg_is_decoded_at_reduced_size(tmp_path, mode, size, reduced):
    """By 8, 4 or 2, never below twice the side; the square is nearly that of the whole image."""
    coarse = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
    image.save(tmp_path / "a.jpg", quality=95)
    whole, small = (read_image(tmp_path / "a.jpg", side=side) for side in (None, 64))
    assert whole.size == size and small.size == reduced and small.mode == "RGB"
    assert min(small.size) >= 2 * 64
    apart = (square(64)(whole).int() - square(64)(small).int()).abs()
    assert apart.float().mean() < 1.5 and apart.max() <= 8
    image.convert("RGB").save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", side=64).size == size


def test_a_jpeg_is_turned_after_it_is_reduced(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(1024, 512).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg", side=64).size == (128, 256)


def test_squares_are_the_same_whichever_decoder_reads_them(tmp_path, monkeypatch):
    """Plain, reduced, grey, turned, CMYK, progressive; with torchvision's decoder and without."""
    smooth = np.asarray(Image.effect_noise((90, 70), 60).convert("RGB").resize((181, 139)))
    lying = Image.Exif()
    lying[0x0112] = 6
    ways = {
        "plain": (Image.fromarray(smooth), {}),
        "reduced": (Image.fromarray(smooth).resize((1024, 700)), {}),
        "grey": (Image.fromarray(smooth).convert("L"), {}),
        "turned": (Image.fromarray(smooth), {"exif": lying}),
        "cmyk": (Image.fromarray(smooth).convert("CMYK"), {}),
        "progressive": (Image.fromarray(smooth), {"progressive": True, "subsampling": 0}),
    }
    for name, (image, options) in ways.items():
        image.save(tmp_path / f"{name}.jpg", quality=90, **options)
    paths = [tmp_path / f"{name}.jpg" for name in ways]
    with_both = [read_square(path, side=32) for path in paths]
    monkeypatch.setattr(images, "tensor_decoder", lambda: None)
    for path, seen in zip(paths, with_both, strict=True):
        assert torch.equal(seen, read_square(path, side=32)), path.name
        assert torch.equal(seen, square(32)(read_image(path, side=32))), path.name


def test_a_broken_plain_jpeg_is_refused_in_words(tmp_path):
    path = tmp_path / "a.jpg"
    Image.effect_noise((90, 70), 60).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(Refused, match=r"a\.jpg .*cannot be read") as refused:
        read_square(path, side=32)
    assert refused.value.reason == "truncated"
