"""Head check, both decoders and the report agree about image files at every size."""

import io
import re
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

import mmkit as mm
from mmkit.data import images
from mmkit.data.image_headers import open_head, to_srgb
from mmkit.data.images import check_image, read_image, read_square, square, to_rgb
from mmkit.errors import Refused
from tests.data.awkward import BLUE, GREEN, RED, chunk, encoded, png_claiming
from tests.data.seven_images import lists

CORNERS = np.full((46, 94, 3), 200, np.uint8)  # lies on its side; a corner shows how
CORNERS[:23, :47] = RED
PNG = encoded(CORNERS, "PNG", compress_level=0)
JPEG = encoded(CORNERS, "JPEG", quality=95)
XMP = b"<x:xmpmeta><tiff:Orientation>8</tiff:Orientation></x:xmpmeta>"
ITXT = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
NOTES = [chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_000_003))), chunk(b"tEXt", b"k\0v")]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def app1(content: bytes) -> bytes:
    """The JPEG with one more segment."""
    return JPEG[:2] + struct.pack(">BBH", 255, 0xE1, len(content) + 2) + content + JPEG[2:]


def early(*chunks: bytes) -> bytes:
    return PNG[:33] + b"".join(chunks) + PNG[33:]


def late(*chunks: bytes) -> bytes:
    """The PNG with chunks between its pixels and its end."""
    return PNG[:-12] + b"".join(chunks) + PNG[-12:]


def eight() -> bytes:
    """An eXIf chunk that says 8."""
    return chunk(b"eXIf", exif(8).tobytes()[6:])


def broken(data: bytes) -> bytes:
    """A chunk whose check sum is wrong."""
    return data[:-1] + bytes([data[-1] ^ 255])


DAMAGED = chunk(b"eXIf", b"\x00\x08\x00\x02\x01\x12\x00\x03\0\0\0\1\0\6\0\0")
FILES = {  # bytes -> the orientation expected from all readers
    "plain": (JPEG, 1),
    "EXIF in a JPEG": (encoded(CORNERS, "JPEG", quality=95, exif=exif(8)), 8),
    "XMP in a JPEG": (app1(b"http://ns.adobe.com/xap/1.0/\0" + XMP), 8),
    "damaged EXIF in a JPEG": (app1(b"Exif\0\0MM\0*\0\0\0\x08\0\2\1\x12"), 1),
    "EXIF in a PNG": (early(eight()), 8),
    "EXIF behind a PNG's pixels": (late(eight()), 8),
    "XMP in a PNG": (early(ITXT), 8),
    "XMP behind a PNG's pixels": (late(ITXT, NOTES[1]), 8),
    "damaged EXIF in a PNG": (early(DAMAGED), 1),
    "damaged EXIF behind a PNG's pixels": (late(DAMAGED), 1),
    "a long note in a PNG": (early(*NOTES, eight()), 8),
    "a long note behind a PNG's pixels": (late(eight(), *NOTES), 8),
    "a damaged note in a PNG": (early(broken(NOTES[1]), eight()), 8),
    "a damaged note behind a PNG's pixels": (late(broken(NOTES[1]), eight()), 8),
    "EXIF in an AVIF": (encoded(CORNERS, "AVIF", quality=95, exif=exif(8)), 8),
    "EXIF in a WebP": (encoded(CORNERS, "WEBP", lossless=True, exif=exif(8).tobytes()), 8),
    "a tag of a TIFF": (encoded(CORNERS, "TIFF", tiffinfo={0x0112: 8}), 8),
    "XMP in a WebP": (encoded(CORNERS, "WEBP", lossless=True, xmp=XMP), 8),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # from which Pillow reads dots per inch
@pytest.mark.parametrize("fast", [True, False])
def test_all_readers_turn_an_image_alike(name, fast, tmp_path, monkeypatch):
    """For sides from an eighth of the image to larger ones, by head and by pixels."""
    data, orientation = FILES[name]
    if not fast:
        monkeypatch.setattr(images, "tensor_decoder", lambda: None)
    expected = CORNERS if orientation == 1 else np.rot90(CORNERS)
    (tmp_path / "a").write_bytes(data)
    size = expected.shape[1::-1]
    assert check_image(tmp_path / "a") == read_image(tmp_path / "a").size == size
    assert open_head(io.BytesIO(data), "a").ends() or name.startswith(("EXIF in an", "a tag"))
    report = mm.from_lists([tmp_path / "a"], ["a"], cache_gigabytes=0).report
    assert (report.widths, report.heights) == ([size[0]], [size[1]])
    for side in (5, 11, 23, 47, 101):
        seen = read_square(tmp_path / "a", side=side)
        whole = square(side)(Image.fromarray(np.ascontiguousarray(expected)))
        assert (seen.int() - whole.int()).abs().float().mean() < 6, side
        assert torch.equal(seen, square(side)(read_image(tmp_path / "a", side=side)))


def test_every_orientation_of_a_png_is_seen_as_pillow_turns_it():
    from PIL import ImageOps

    for orientation in range(10):
        data = encoded(CORNERS, "PNG", exif=exif(orientation))
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(read_image(io.BytesIO(data)), expected)
        assert check_image(io.BytesIO(data)) == expected.size


def test_a_large_note_is_not_unpacked():
    """80 MB in 80 kB are decompressed neither by the head check nor by the decoder."""
    import tracemalloc

    bomb = early(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000))))
    read_image(io.BytesIO(PNG)), read_image(io.BytesIO(early(*NOTES)))
    tracemalloc.start()
    for read in (check_image, read_image):
        read(io.BytesIO(bomb))
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


# ---- transparency, depth -------------------------------------------------------------------------


def colour(data: bytes, **reading) -> tuple:
    """The single colour of a file, equal for all readers."""
    seen = np.asarray(read_image(io.BytesIO(data), reading=mm.Reading(**reading)))
    assert (seen == seen[0, 0]).all()
    cut = read_square(io.BytesIO(data), side=7, reading=mm.Reading(**reading))
    assert cut[:, 0, 0].tolist() == seen[0, 0].tolist()
    return tuple(seen[0, 0].tolist())


def png_of(bits: int, kind: int, pixel: bytes, transparent: bytes) -> bytes:
    """8 x 8 pixels of one colour; those of the colour `transparent` are transparent."""
    head = struct.pack(">IIBBBBB", 8, 8, bits, kind, 0, 0, 0)
    rows = (b"\0" + pixel * (8 if bits > 4 else bits)) * 8
    parts = (b"IHDR", head), (b"tRNS", transparent), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return PNG[:8] + b"".join(chunk(*part) for part in parts)


def test_a_transparent_colour_is_found_at_every_depth():
    """2, 4, 8, 16 bits of grey and 8, 16 of red, green, blue; a similar colour stays opaque."""
    two = struct.Struct(">H").pack
    for bits, value in ((1, 1), (2, 2), (4, 11), (8, 77), (16, 1009)):
        if bits < 8:
            packed = bytes([int(f"{value:0{bits}b}" * (8 // bits), 2)])
        else:
            packed = two(value)[2 - bits // 8 :]
        data = png_of(bits, 0, packed, two(value))
        assert colour(data, background=BLUE) == BLUE, bits
        assert colour(png_of(bits, 0, packed, two(value - 1)), background=BLUE)[0] != BLUE[0], bits
    for bits in (8, 16):
        values = [v << (bits - 8) for v in RED]
        packed = b"".join(two(v)[2 - bits // 8 :] for v in values)
        key = b"".join(two(v) for v in values)
        assert colour(png_of(bits, 2, packed, key), background=BLUE) == BLUE
        other = b"".join(two(v) for v in values[::-1])
        assert colour(png_of(bits, 2, packed, other), background=BLUE) == RED


def test_a_wide_grey_png_keeps_what_is_not_transparent():
    values = np.full((11, 13), 40_009, np.uint16)
    values[:, :5] = 1009
    data = encoded(values, "PNG")
    data = data[:33] + chunk(b"tRNS", struct.pack(">H", 1009)) + data[33:]
    seen = np.asarray(read_image(io.BytesIO(data), reading=mm.Reading(background=GREEN)))
    assert (seen[:, :5] == GREEN).all() and (seen[:, 5:] == round(40_009 / 257)).all()


def tga(alpha_bits: int, alpha: int, palette: bool = False) -> bytes:
    """13 x 11 red pixels (blue, green, red, alpha in the file)."""
    pixel = bytes([*RED[::-1], alpha])
    if palette:
        head = struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 0, 1, 32, 0, 0, 13, 11, 8, 0x20 | alpha_bits)
        return head + pixel + bytes(13 * 11)
    head = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 13, 11, 32, 0x20 | alpha_bits)
    return head + pixel * 13 * 11


def bmp_v4(alpha: int) -> bytes:
    """13 x 11 red pixels with a mask for alpha."""
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII", 108, 13, 11, 1, 32, 3, 13 * 11 * 4, 0, 0, 0, 0)
    head += masks + b"BGRs" + bytes(48)
    body = bytes([*RED[::-1], alpha]) * 13 * 11
    return (
        b"BM" + struct.pack("<IHHI", 14 + len(head) + len(body), 0, 0, 14 + len(head)) + head + body
    )


@pytest.mark.parametrize("palette", [False, True])
def test_alpha_that_was_never_written_is_none(palette):
    """TGA gives the number of alpha bits per pixel; an alpha channel of zeros has no meaning."""
    assert colour(tga(0, 0, palette)) == colour(tga(8, 0, palette)) == RED
    assert colour(tga(0, 77, palette)) == colour(tga(8, 255, palette)) == RED
    assert colour(tga(8, 51, palette), background=(0, 0, 0)) == tuple(v // 5 for v in RED)
    assert colour(bmp_v4(0)) == colour(bmp_v4(255)) == RED
    assert colour(bmp_v4(51), background=(0, 0, 0)) == tuple(v // 5 for v in RED)
    clear = encoded(Image.new("RGBA", (13, 11), (*RED, 0)), "PNG")  # in a PNG it has a meaning
    assert colour(clear, background=GREEN) == GREEN


def test_a_tiff_of_twelve_bits_says_so_itself():
    """With two pixels in three bytes, as microscopes write them, 4,095 is white."""
    head = struct.pack("<2sHI", b"II", 42, 8)
    entries = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1),
               (273, 4, 1, 200), (277, 3, 1, 1), (278, 3, 1, 8), (279, 4, 1, 96)]  # fmt: skip
    tags = struct.pack("<H", len(entries))
    tags += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    data = (head + tags).ljust(200, b"\0") + b"\xff" * 96
    assert colour(data) == (255, 255, 255)


@pytest.mark.parametrize("white", [0, -1, float("nan"), float("inf")])
def test_a_white_that_is_none_is_refused(white):
    with pytest.raises(ValueError, match=r"white=.* must be above 0; 4095 for 12 bits"):
        mm.Reading(white=white)


# ---- colour --------------------------------------------------------------------------------------


def swapped() -> bytes:
    """sRGB with red and blue exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", data, 128)[0]
    offset = {bytes(data[132 + 12 * i :][:4]): 132 + 12 * i for i in range(count)}
    a, b = offset[b"rXYZ"] + 4, offset[b"bXYZ"] + 4
    data[a : a + 8], data[b : b + 8] = data[b : b + 8], data[a : a + 8]
    return bytes(data)


REDDEST, BLUEST = (255, 0, 0), (0, 0, 255)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
KINDS = {
    "PNG": {},
    "JPEG": dict(quality=95, subsampling=0),
    "TIFF": {},
    "WEBP": dict(lossless=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_another_profile_become_srgb(kind, mode):
    if kind in ("JPEG", "WEBP") and mode != "RGB":
        pytest.skip("a file of this kind has no such pixels")
    red = Image.new("RGB", (64, 64), (255, 0, 0))
    red = red.quantize(3) if mode == "P" else red.convert(mode)
    for profile, expected in (
        (swapped(), (0, 0, 255)),
        (SRGB, (255, 0, 0)),
        (b"no profile", (255, 0, 0)),
    ):
        data = encoded(red, kind, icc_profile=profile, **KINDS[kind])
        assert np.abs(np.subtract(colour(data), expected)).max() <= 2, profile[:9]
        seen = to_rgb(Image.open(io.BytesIO(data))).getpixel((5, 7))
        assert np.abs(np.subtract(seen, expected)).max() <= 2


def test_a_png_with_a_large_profile_is_read_by_it():
    """Profiles of 2 MB, which Pillow takes for an attack, are read; those of 80 MB are ignored."""
    red = encoded(Image.new("RGB", (64, 64), (255, 0, 0)), "PNG")
    for size, expected in ((2_000_003, (0, 0, 255)), (80_000_000, (255, 0, 0))):
        large = bytearray(swapped().ljust(size, b"\0"))
        large[:4] = struct.pack(">I", size)
        data = red[:33] + chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(large))) + red[33:]
        assert colour(data) == expected


def test_transparency_stays_under_a_profile():
    half = Image.new("RGBA", (13, 11), (255, 0, 0, 51))
    data = encoded(half, "PNG", icc_profile=swapped())
    assert colour(data, background=(0, 0, 0)) == (0, 0, 51)


def test_a_grey_profile_is_heeded():
    """A linear profile: the middle of its range is bright."""
    curve = struct.pack(">4sII", b"curv", 0, 0)  # no entry: linear
    white = struct.pack(">4sIiii", b"XYZ ", 0, 63190, 65536, 54061)
    words = struct.pack(">4sII", b"desc", 0, 2) + b"g\0" + bytes(78)
    text = b"text\0\0\0\0no\0\0"
    body, tags, offset = b"", b"", 132 + 4 * 12
    for name, content in ((b"kTRC", curve), (b"wtpt", white), (b"desc", words), (b"cprt", text)):
        content += bytes(-len(content) % 4)
        tags += struct.pack(">4sII", name, offset + len(body), len(content))
        body += content
    head = struct.pack(
        ">I4sI4s4s4s", offset + len(body), b"lcms", 0x02400000, b"mntr", b"GRAY", b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    profile = head.ljust(128, b"\0") + struct.pack(">I", 4) + tags + body
    assert to_srgb(profile, "L") is not None and to_srgb(profile, "RGB") is None
    for mode in ("L", "LA"):
        data = encoded(Image.new("L", (13, 11), 128).convert(mode), "PNG", icc_profile=profile)
        assert all(abs(value - 188) <= 1 for value in colour(data)), mode


def test_sRGB_under_its_names_stays_on_the_fast_path():
    assert to_srgb(SRGB, "RGB") is None and to_srgb(None, "RGB") is None
    head = open_head(io.BytesIO(encoded(CORNERS, "JPEG", icc_profile=SRGB)), "a")
    assert head.plain
    assert not open_head(io.BytesIO(encoded(CORNERS, "JPEG", icc_profile=swapped())), "a").plain


# ---- limits and other files ----------------------------------------------------------------------


@pytest.mark.parametrize("limit, reading", [
    ("max_aspect", {}), ("max_pixels", dict(max_pixels=2000)), ("max_bytes", dict(max_bytes=90)),
])  # fmt: skip
def test_a_limit_is_named_with_the_value_that_lets_the_image_in(limit, reading, tmp_path):
    """A panorama of 23 : 1, too many pixels, too many bytes."""
    size = (23 * 11, 11) if limit == "max_aspect" else (97, 89)
    Image.new("RGB", size, RED).save(tmp_path / "a.png", compress_level=0)
    with pytest.raises(ValueError, match=rf"{limit} is [\d,]+\); give reading=") as refused:
        mm.from_lists([tmp_path / "a.png"], ["a"], reading=mm.Reading(**reading))
    (remedy,) = re.findall(r"reading=(mm\.Reading\(\w+=\d+\))", str(refused.value))
    data = mm.from_lists([tmp_path / "a.png"], ["a"], reading=eval(remedy), cache_gigabytes=0)
    assert (data.report.widths[0], data.report.heights[0]) == size
    assert data[0]["image"][:, 0, 0].tolist() == list(RED)


def ftyp(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + bytes(60)


NO_IMAGES = {
    "a HEIC photo, .*save it as JPEG": [ftyp(b"heic"), ftyp(b"heix"), ftyp(b"mif1")],
    "a film; save images of it .ffmpeg": [ftyp(b"isom"), ftyp(b"qt  "),
                                          b"\x1aE\xdf\xa3" + bytes(30),
                                          b"RIFF\0\0\0\0AVI LIST" + bytes(30)],
    "a JPEG XL image; .*djxl": [b"\xff\n" + bytes(30), b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(30)],
    "a camera's raw photo": [ftyp(b"crx "), b"FUJIFILMCCD-RAW 0201" + bytes(30)],
    "a Photoshop file": [b"8BPS\0\1" + bytes(30)],
    "an icon": [b"\0\0\1\0\1\0" + bytes(30)],
    "a zip archive; unpack": [b"PK\3\4" + bytes(30)],
    "a tar archive": [bytes(257).replace(b"\0", b"a", 5) + b"ustar\0" + bytes(300)],
    "an array of NumPy": [b"\x93NUMPY\1\0" + bytes(30)],
    "text that begins 'Access denied": [b"Access denied.\nAsk somebody."],
    "its format is not known": [bytes(300), bytes(range(128, 256))],
}  # fmt: skip


@pytest.mark.parametrize("words", NO_IMAGES)
def test_what_is_no_image_is_named_by_its_first_bytes(words, tmp_path):
    for data in NO_IMAGES[words]:
        (tmp_path / "a.jpg").write_bytes(data)
        for read in (check_image, read_image):
            with pytest.raises(ValueError, match=words) as refused:
                read(tmp_path / "a.jpg")
            assert refused.value.reason == "not an image"


@pytest.mark.parametrize("name", ["gzip", "bz2", "lzma"])
def test_a_compressed_image_loads_once_unpacked_as_said(name, tmp_path):
    import importlib

    library = importlib.import_module(name)
    (tmp_path / "a.jpg").write_bytes(library.compress(JPEG))
    program = {"gzip": "gzip", "bz2": "bzip2", "lzma": "xz"}[name]
    with pytest.raises(ValueError, match=rf"compressed by {program}; unpack it \({program} -d\)"):
        check_image(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(library.decompress((tmp_path / "a.jpg").read_bytes()))
    assert check_image(tmp_path / "a.jpg") == (94, 46)


def test_shards_hold_what_the_reader_reads(tmp_path):
    """A text chunk of 2 MB in a PNG does no harm."""
    (tmp_path / "a.png").write_bytes(early(*NOTES))
    data = mm.from_lists([tmp_path / "a.png"], ["a"], cache_gigabytes=0)
    mm.write_shards(data, tmp_path / "shards")
    again = mm.from_shards(tmp_path / "shards", cache_gigabytes=0)
    assert torch.equal(again[0]["image"], data[0]["image"])
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1_048_576  # the limit of the process is not changed


@pytest.mark.parametrize("colour", ["white", (1, 2), (0, 0, 256), (0.5, 0.5, 0.5)])
def test_a_background_that_is_no_colour_is_refused_before_any_file(root, colour):
    with pytest.raises(ValueError, match=r"background=.* must be three numbers, 0 to 255 each"):
        lists(root, reading=mm.Reading(background=colour))
    with pytest.raises(ValueError, match=r"is not an mm.Reading; give mm.Reading\("):
        lists(root, reading=dict(background=colour))


@pytest.mark.usefixtures("watch")
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    """60,000 x 60,000 pixels would be 10.8 GB; only the head is read."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(60_000, 60_000))
    tracemalloc.start()
    started = time.perf_counter()
    for read in (check_image, read_image):
        with pytest.raises(Refused, match="more pixels than can be decoded") as refused:
            read(path)
        assert refused.value.reason == "too many pixels"
    assert time.perf_counter() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
