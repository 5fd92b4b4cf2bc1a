"""Inspect a source before anything is trained on it.

Walk-through: notebooks/08_your_own_images.ipynb.
"""

import dataclasses
import os

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .dataset import MultimodalDataset
from .duplicates import find_duplicates
from .image_headers import open_head
from .loader import as_dataset
from .report import Report, count_captions
from .sources import load_data
from .tokenizer import token_counts, unk_rate

DARK = 32.0  # of 255: images nowhere brighter than an eighth of white are nearly black
BLANK = 2.0  # of 255: images whose standard deviation is below it are of nearly one colour


def inspect(
    source: str | os.PathLike | MultimodalDataset,
    *,
    max_length: int = 77,
    near: bool = True,
    **options,
) -> Report:
    """Report what would be loaded from a source, and what is unusual about it.

    Every image is decoded; bad rows are counted, however many there are. Nothing is trained.

    Args:
        source: anything that `load_data` takes, or a data set.
        max_length: tokens of a caption that the model will read (tiny 32, small 64, base and
            CLIP 77).
        near: also look for nearly equal images and captions.
        **options: of the function that loads this source, see `load_data`.

    Returns:
        Report: print it, or call its `to_dict()`.

    Raises:
        ValueError: nothing can be loaded.

    Example:
        >>> report = mm.inspect(data, max_length=32)
        >>> report.images, report.captions, report.cut_captions
        (23, 23, 0)
    """
    if isinstance(source, MultimodalDataset | Dataset | DataLoader):
        data = as_dataset(source, "source")
    else:
        options = {"on_error": "skip", "max_skipped": 1.0, "check": "decode"} | options
        data = load_data(source, **options)
    report = dataclasses.replace(data.report) if data.report else _of_decoded(data)
    if report.identical_images is None and not data.expensive:  # of a part it is not known
        hashes = data.content_hashes()
        report.identical_images = len(hashes) - len(set(hashes))
    flat = [caption for captions in data.texts for caption in captions]
    report.caption_tokens = token_counts(data.tokenizer, flat)
    report.max_length, report.unknown = max_length, unk_rate(data.tokenizer, flat)
    report.blank, dark = _blank_and_dark(data)
    report.dark = [data.image_name(row) for row in dark]
    report.dark_white = _white(data, dark)
    if near:
        report.duplicates = find_duplicates(data)
    return report


def _of_decoded(data: MultimodalDataset) -> Report:
    """The report of a data set that was not loaded from a source: all rows are there."""
    count = len(data)
    report = Report(data.name or "the data set", count, count, images=count)
    shape = data[0]["image"].shape
    report.heights, report.widths = [shape[1]] * count, [shape[2]] * count
    report.checked = "decode" if data.resident else "none"
    count_captions(report, data.texts)
    return report


def _blank_and_dark(data: MultimodalDataset) -> tuple[list[str], list[int]]:
    """Names of images of nearly one colour (black, white, empty), rows of other dark ones."""
    names, dark = [], []
    for rows in np.array_split(np.arange(len(data)), max(1, len(data) // 256)):
        pixels = _of_255(data._take(rows))
        flat = (pixels - pixels.mean((-2, -1), keepdim=True)).square().mean((1, 2, 3)).sqrt()
        blank = (flat < BLANK).cpu().numpy()
        names += [data.image_name(row) for row in rows[blank]]
        dark += rows[~blank & (pixels.amax((1, 2, 3)) < DARK).cpu().numpy()].tolist()
    return names, dark


def _white(data: MultimodalDataset, dark: list[int]) -> int:
    """The probable value of white in 16-bit grey files of nearly black images; 0 = none."""
    top = 0
    for row in dark[:16]:
        with data.image_file(row) as file:
            image = open_head(file, data.image_name(row), data.reading).image
            if image.mode.startswith("I;16"):
                top = max(top, int(np.asarray(image).max()))
    return 2 ** top.bit_length() - 1


def _of_255(pixels: torch.Tensor) -> torch.Tensor:
    """Images as floats from 0 to 255, whatever the scale of the transform."""
    if not pixels.is_floating_point():
        return pixels.float()
    return pixels * (255 if 0 <= pixels.min() and pixels.max() <= 1 else 57)  # else normalised
