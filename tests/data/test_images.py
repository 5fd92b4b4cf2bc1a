"""Images look as a person would see them, and are not copied without need."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mmkit.data import images
from mmkit.data.images import check_image, read_image, read_square, shift_images, square, to_rgb
from mmkit.errors import Refused
from tests.data.awkward import noise as noisy_file
from tests.data.two_colours import BLUE, RED, WHITE


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


def save(path, array_or_image, **options):
    image = array_or_image
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(path, **options)
    return np.asarray(read_image(path))


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (8, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated: show the image rotated by 90 degrees clockwise
    seen = save(tmp_path / "turned.png", image, exif=exif)
    assert seen.shape == (16, 8, 3)
    assert tuple(seen[0, 0]) == RED and tuple(seen[15, 0]) == BLUE


def test_alpha_is_laid_over_white(tmp_path):
    image = Image.new("RGBA", (5, 3), (255, 0, 0, 0))
    assert (save(tmp_path / "clear.png", image) == 255).all()
    palette = Image.new("P", (5, 3), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((0, 0), 1)
    seen = save(tmp_path / "palette.png", palette, transparency=0)
    assert tuple(seen[0, 0]) == RED and tuple(seen[2, 4]) == WHITE


@pytest.mark.parametrize("top, dtype", [(65535, np.uint16), (255, np.uint8)])
def test_grey_images_keep_their_shades(tmp_path, top, dtype):
    """A 16-bit ramp stays a ramp; clipping would turn it white."""
    ramp = np.linspace(0, top, 17).astype(dtype)[None].repeat(5, 0)
    seen = save(tmp_path / "ramp.png", ramp)
    assert seen.shape == (5, 17, 3)
    assert np.abs(seen[0, :, 0].astype(int) - np.linspace(0, 255, 17)).max() <= 1


@pytest.mark.parametrize("top", [1.0, 1.0000001, 1.04, 2.5, 255.0, 255.5, 3000.0, 65535.0, 66000.0])
@pytest.mark.parametrize("lowest", [0.0, -1e-6])
def test_float_images_are_neither_black_nor_white(tmp_path, top, lowest):
    """Also where resampling or rounding left values just outside a usual range."""
    ramp = np.linspace(lowest, top, 17, dtype=np.float32)[None].repeat(5, 0)
    seen = save(tmp_path / "ramp.tiff", ramp)[0, :, 0].astype(int)
    assert seen[0] == 0 and (np.diff(seen) >= 0).all()
    assert np.abs(seen[8] - seen[16] / 2) <= 8 and seen[16] >= (10 if top == 3000 else 240)


def test_whole_numbers_of_a_small_range_are_seen(tmp_path):
    seen = save(tmp_path / "labels.tiff", np.arange(4, dtype=np.int32)[None].repeat(5, 0))
    assert seen[0, :, 0].tolist() == [0, 85, 170, 255]


def test_dark_16_bit_images_stay_dark(tmp_path):
    """0.3 % of white is nearly black, whatever the rest of the image contains."""
    assert (save(tmp_path / "dark.png", np.full((5, 3), 200, np.uint16)) <= 1).all()


def test_float_images_are_scaled(tmp_path):
    ramp = np.linspace(0, 1, 17, dtype=np.float32)[None].repeat(5, 0)
    seen = save(tmp_path / "ramp.tiff", ramp)
    assert np.abs(seen[0, :, 0].astype(int) - np.linspace(0, 255, 17)).max() <= 1


def test_shift_moves_images_by_their_own_noise():
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    noise = torch.tensor([[0.5, 0.5], [0.999, 0.5], [0.5, 0.0]])
    moved = shift_images(pixels, noise)
    assert torch.equal(moved[0], pixels[0])
    assert torch.equal(moved[1, :, :-2], pixels[1, :, 2:])
    assert torch.equal(moved[2, :, :, 2:], pixels[2, :, :, :-2])
    assert torch.equal(moved[2, :, :, 0], pixels[2, :, :, 0])


@pytest.mark.usefixtures("watch")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_an_image_with_random_damage_is_read_or_refused(kind, tmp_path):
    """Each of 60 damaged files gives an image or a `Refused`."""
    import random

    draw, data = random.Random(0), noisy_file(kind, side=13)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 8)):
            damaged[draw.randrange(min(len(data), draw.choice([60, 10_000])))] = draw.randrange(256)
        path = tmp_path / "damaged"
        path.write_bytes(damaged[: draw.choice([len(data), draw.randrange(len(data))])])
        for read in (check_image, read_image):
            try:
                read(path)
            except Refused as refused:
                assert str(path) in str(refused)


@pytest.mark.parametrize("source", [3, True, None, 2.5, b"a.png", ["a.png"]])
def test_what_is_no_path_is_not_opened(source):
    """`open(3)` would read and close the file with this descriptor."""
    for read in (check_image, read_image):
        with pytest.raises(ValueError, match="is not an image; give the path of a file"):
            read(source)
