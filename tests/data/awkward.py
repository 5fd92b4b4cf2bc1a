"""Awkward, broken and hostile inputs: how each is made, and what is expected of it.

A maker writes its input into a folder and returns a function that loads it. The cases themselves
are in awkward_tables.py, awkward_images.py, awkward_sources.py, awkward_any.py,
awkward_files.py and awkward_shards.py; tests/contracts/test_awkward_inputs.py tests all of them.
"""

import contextlib
import io
import signal
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import mmkit as mm

RED, GREEN, BLUE = (200, 30, 40), (20, 180, 60), (10, 50, 220)
PLAIN = {"a": RED, "b": GREEN, "c": BLUE}  # a.png, b.png, c.png in every folder

Maker = Callable[[Path], Callable]  # folder -> load(**options)
OPTIONS = dict(image_size=8, num_workers=0, max_skipped=1.0, check="decode")  # of each loader


@contextlib.contextmanager
def watched(folder: Path, monkeypatch):
    """Separate caches in this folder, no program that a decoder could start, at most 30 seconds."""
    monkeypatch.setenv("MMKIT_CACHE", str(folder))
    monkeypatch.setenv("HOME", str(folder))
    ghostscript = folder / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {folder}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def stop(*_):  # a reader that waits for ever (for a pipe, for example)
        raise TimeoutError("it takes more than 30 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not (folder / "started").exists()


@dataclass(frozen=True)
class Case:
    """One input and the expected result.

    expect: "load" succeeds, and `check` accepts the data set; "skip" has bad rows, raised or
    counted; "reject" cannot be used at all. words: a pattern that the message matches.
    """

    name: str
    make: Maker
    expect: str
    words: str = ""
    check: Callable | None = None
    bad_rows: int = 1  # of "skip"
    loaded: int = 1  # rows of "skip" that are loaded


def plain(folder: Path) -> Path:
    """The folder, with three images of one colour each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in PLAIN.items():
        Image.new("RGB", (11, 13), colour).save(folder / f"{name}.png")
    return folder


# ---- makers --------------------------------------------------------------------------------------


def table(content, name: str = "pairs.csv", **how) -> Maker:
    """A table of this content, text or bytes, beside the plain images."""

    def make(folder: Path):
        data = content() if callable(content) else content
        data = data if isinstance(data, bytes) else data.encode()
        (plain(folder) / name).write_bytes(data)
        return lambda **options: mm.from_table(folder / name, **how, **options)

    return make


def row(path: str, prepare: Callable[[Path], object] | None = None, **how) -> Maker:
    """A table whose first row is a.png and whose second names this path; `prepare` makes files."""

    def make(folder: Path):
        inside = plain(folder / "inside")
        if prepare:
            prepare(inside)
        with open(inside / "pairs.csv", "w", encoding="utf-8", newline="") as file:
            file.write(f"image;text\na.png;a red one\n{path};the row in question\n")
        return lambda **options: mm.from_table(inside / "pairs.csv", **how, **options)

    return make


def image(name: str, content) -> Maker:
    """a.png, then a file of this name and content."""

    def write(inside: Path):
        (inside / name).write_bytes(content() if callable(content) else content)

    return row(name, write)


def source(prepare: Callable[[Path], Callable]) -> Maker:
    """Any other loader: `prepare` gets the folder with the plain images."""
    return lambda folder: prepare(plain(folder))


# ---- results -------------------------------------------------------------------------------------


def captions(*expected) -> Callable:
    """The images have these captions."""

    def check(data):
        assert data.texts == [[text] if isinstance(text, str) else text for text in expected]

    return check


def metadata(column: str, *expected) -> Callable:
    """`meta` of each image has this value in this column."""

    def check(data):
        assert [meta[column] for meta in data.meta] == list(expected)

    return check


def shows(colour, near: int = 3) -> Callable:
    """The second image is of this one colour."""

    def check(data):
        seen = data[1]["image"].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(seen - np.array(colour)).max() <= near, seen[0, 0]

    return check


def ramp(data) -> None:
    """The second image is a grey ramp from black to white, left to right."""
    seen = data[1]["image"].numpy().astype(int)
    assert (seen[0] == seen[1]).all() and (seen[0] == seen[2]).all()
    expected = (np.arange(seen.shape[-1]) + 0.5) / seen.shape[-1] * 255
    assert np.abs(seen[0].mean(0) - expected).max() <= 12, seen[0, 0]


# ---- bytes of images ---------------------------------------------------------------------------


def encoded(image, kind: str, **options) -> bytes:
    """An image (PIL, or an array) as the bytes of a file."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(kind: str, side: int = 64, **options) -> bytes:
    """An image with enough content for a part of it to be missing."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return encoded(pixels, kind, **options)


def one_colour(kind: str, mode: str = "RGB", colour=RED, size=(16, 16), **options) -> bytes:
    return encoded(Image.new(mode, size, colour), kind, **options)


def grey_ramp(dtype, top: float) -> np.ndarray:
    """A ramp (64, 64) from 0 to `top`, left to right."""
    return np.linspace(0, top, 64).astype(dtype)[None].repeat(64, 0)


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(
        ">I", zlib.crc32(kind + content)
    )  # fmt: skip


def png_with(kind: bytes, content: bytes) -> bytes:
    """A red PNG with one more chunk after its head."""
    data = one_colour("PNG")
    return data[:33] + chunk(kind, content) + data[33:]


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG file whose head claims any size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*parts) for parts in ((b"IHDR", head), (b"IDAT", pixels), (b"IEND", b""))
    )


def gif_claiming(width: int, height: int) -> bytes:
    """A small GIF whose one frame claims to be larger than its screen."""
    data = bytearray(one_colour("GIF", "P", 1))
    frame = data.index(b"\x2c")
    data[frame + 5 : frame + 9] = struct.pack("<HH", width, height)
    return bytes(data)


def turned(orientation: int) -> bytes:
    """`UPRIGHT` as a rotated camera writes it, with the EXIF tag for this orientation."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # the inverse, of Transpose
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(UPRIGHT).transpose(Image.Transpose(back))
    return encoded(stored, "JPEG", quality=95, exif=exif)


UPRIGHT = np.zeros((96, 48, 3), np.uint8)  # four corners of four colours
UPRIGHT[:48, :24], UPRIGHT[:48, 24:], UPRIGHT[48:, :24] = RED, GREEN, BLUE


def upright(data) -> None:
    """The second image is the centre of `UPRIGHT`; the report has its upright sides."""
    seen = data[1]["image"].permute(1, 2, 0).numpy().astype(int)
    for corner, colour in (((1, 1), RED), ((1, -2), GREEN), ((-2, 1), BLUE), ((-2, -2), (0,) * 3)):
        assert np.abs(seen[corner] - np.array(colour)).max() < 20, corner
    assert (data.report.widths[1], data.report.heights[1]) == (48, 96)
