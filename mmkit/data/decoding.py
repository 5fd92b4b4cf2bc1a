"""Decode the images of a data set: one, a batch, or all of them once.

Images are uint8 unless a transform makes them floats. Shapes: N images, B batch, H x W pixels.
Walk-through: notebooks/01_data.ipynb.
"""

import contextlib
import functools
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import Refused
from .image_cache import CachedImages, decode_once
from .image_files import ImageStore
from .image_headers import Reading
from .images import read_image, read_square, tensor_decoder
from .workers import workers_for


@dataclass
class Decoded:
    """Decoded images, shared by a data set and all its views: filling them serves all."""

    pixels: Any  # (N, 3, H, W) uint8: a tensor, an array, or cached files; None = decode
    rows: np.ndarray  # index in `pixels` of each row of the data set

    def fill(self, pixels: Any, rows: np.ndarray):
        """Set the decoded images and the index of each row in them."""
        self.pixels, self.rows = pixels, rows

    def take(self, rows: np.ndarray) -> Tensor:
        """Images of these rows as one tensor (B, 3, H, W)."""
        indices = self.rows[rows]
        if isinstance(self.pixels, Tensor):
            return self.pixels[torch.from_numpy(indices).to(self.pixels.device)]
        return torch.from_numpy(np.ascontiguousarray(self.pixels[indices]))

    def content_hashes(self) -> list[str]:
        """32 hex digits for each row, equal for equal pixels."""
        images = (
            image
            for rows in np.array_split(np.arange(len(self.rows)), -(-len(self.rows) // 256))
            for image in self.take(rows).cpu().numpy()
        )
        return [hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in images]


@dataclass
class ImageDecoder:
    """Decodes the images of a data set; it holds only what a worker process needs for that."""

    store: ImageStore
    rows: np.ndarray  # index in the store of each row of the data set
    places: tuple[str, np.ndarray] | None  # position of each row in its source
    transform: Callable
    side: int | None  # pixels of the square that is cut; None = use the transform
    reading: Reading

    def place(self, row: int) -> str:
        """A row's name in messages: "row 3", or "pairs.csv, line 7"."""
        return f"row {row}" if self.places is None else f"{self.places[0]} {self.places[1][row]}"

    def decode(self, row: int, noise: float | None = None) -> Tensor:
        """The image of a row, (3, H, W); `noise` in [0, 1) seeds a random transform."""
        i, where = int(self.rows[row]), self.place(row)
        source, name = functools.partial(self.store.open, i), self.store.name(i)
        if self.side is not None:  # cutting a square draws no numbers
            return read_square(source, where, side=self.side, reading=self.reading, name=name)
        image = read_image(source, where, reading=self.reading, name=name)
        with _seeded(noise):
            image = self.transform(image)
        if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
            got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(
                f"the transform gave {got} for image {name} ({where}); it must give a tensor "
                "(3, H, W) of one size for all images"
            )
        return image

    def array(self, row: int) -> np.ndarray:
        """`decode` as an array, which worker processes write or send."""
        return self.decode(row).numpy()

    def batch(self, rows: Sequence[int], noise: Tensor | None = None) -> Tensor:
        """Images of these rows as one tensor (B, 3, H, W); noise (B,) as in `decode`."""
        each = [None] * len(rows) if noise is None else noise.tolist()
        images = [self.decode(row, number) for row, number in zip(rows, each, strict=True)]
        for row, image in zip(rows, images, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(
                    f"the transform gave {tuple(image.shape)} for image "
                    f"{self.store.name(int(self.rows[row]))} ({self.place(row)}) and "
                    f"{tuple(images[0].shape)} for another; it must give one size for all"
                )
        return torch.stack(images)

    def into_cache(
        self, hashes: list[str], num_workers: int, cache_dir, max_gigabytes: float
    ) -> tuple[CachedImages, list[int]]:
        """`decode_once` for squares: the images, and the rows that could not be decoded."""
        assert self.side is not None
        tensor_decoder()
        how, where = repr(self.reading), (cache_dir, max_gigabytes)
        return decode_once(hashes, self.array, self.side, how, num_workers, *where)

    def failing(self, num_workers: int = 0) -> list[int]:
        """Decode every image once; the rows whose image cannot be decoded."""
        with contextlib.suppress(Refused, OSError):
            self.decode(0, 0.0)  # an error of the transform is raised here, unwrapped
        workers = workers_for(self, num_workers, len(self.rows))
        loader = torch.utils.data.DataLoader(
            torch.arange(len(self.rows)).split(256), batch_size=None, num_workers=workers,
            collate_fn=self._failing_of, generator=torch.Generator(),
        )  # fmt: skip
        return [row for failed in loader for row in failed]

    def _failing_of(self, rows: Any) -> list[int]:
        """The rows among these (a tensor) whose image cannot be decoded."""
        failed = []
        for row in rows.tolist():
            try:
                self.array(row)
            except (Refused, OSError):
                failed.append(row)
        return failed


@contextlib.contextmanager
def _seeded(noise: float | None) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch by `noise`; restore them afterwards."""
    if noise is None:
        yield
        return
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(noise * 2**32)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # images are decoded on the CPU
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
