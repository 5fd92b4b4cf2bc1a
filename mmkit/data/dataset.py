"""Images with their captions, and batches of them.

A dataset is a list of images, each with one or several correct captions. Images stay uint8 until
they are on the device, where the whole batch is normalised and augmented.
Shapes: N images, M captions, B batch, H x W pixels, L text length.
Walk-through: notebooks/01_data.ipynb.
"""

import copy
import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import as_type
from ..noise import mask_noise
from ..older_names import older_attributes
from .batch import Batch, checked_ids
from .captions import clean_captions
from .clusters import number
from .decoding import Decoded, ImageDecoder
from .image_cache import content_hashes, room_for, same_files
from .image_files import ImageStore, checked_files
from .image_headers import Reading
from .images import as_png, square
from .partners import CorrectCaptions, encode_captions
from .tokenizer import token_counts, token_frequency, train_wordpiece

HASH_BYTES = 20_000_000_000  # sources up to this size are searched for identical images


@older_attributes(
    piece_frequency="token_frequency",
    picture_name="image_name",
    picture_file="image_file",
    same_pictures="same_images",
)
class MultimodalDataset:
    """Images and their captions.

    `dataset[i]` is `{"image": uint8 (3, H, W), "text": str, "sample_id": int}`;
    `dataset.batch(rows)` is a `Batch`.

    Args:
        image_paths: one file per image.
        texts: for each image one caption or a list of correct ones, the canonical one first.
        transform: PIL image -> tensor (3, H, W); uint8 counts as raw, float as normalised already.
            None cuts a square of `image_size` pixels.
        device: None decodes when a batch is asked for (during training in worker processes); "cpu"
            or "cuda" decodes once and keeps images and tokens there. The batches are the same.
        image_size: side of the square, pixels.
        tokenizer: a Hugging Face fast tokenizer; None trains a WordPiece on these captions.

    Raises:
        ValueError: unequal numbers, no image or an empty caption.
        FileNotFoundError: a missing image; the message names file and row.

    Example:
        >>> from PIL import Image
        >>> Image.new("RGB", (40, 30), "red").save("red.png")
        >>> mm.MultimodalDataset(["red.png"] * 2, ["a red image", ["red", "a colour"]])
        MultimodalDataset(2 images (3, 64, 64), 3 captions)
    """

    name = attribution = ""
    layers: Any = None  # DrawingLayers: the layer of each pixel; only for the built-in images
    transform: Any = None  # PIL image -> tensor; None where images are given decoded
    report: Any = None  # of the source that was loaded: see sources.py
    reading = Reading()  # limits and background of image files
    side: int | None = None  # pixels of the square that is cut; None where a transform is given
    cache_dir: str | os.PathLike | None = None  # folder for decoded images
    cache_gigabytes = 0.0  # its largest size; 0 = no cache: each epoch decodes anew
    places: Any = None  # position of each row in its source: ("pairs.csv, line", numbers)
    max_length = 77  # tokens of a caption that are read: CLIP's length; a model sets its own
    _store: Any = None  # ImageStore of the encoded images
    _encoded: tuple[tuple[Tensor, Tensor, Tensor, Tensor], CorrectCaptions] | None = None

    def __init__(
        self,
        image_paths: Sequence[str | os.PathLike],
        texts: Sequence[str | Sequence[str]],
        transform: Callable | None = None,
        device: str | torch.device | None = None,
        image_size: int = 64,
        tokenizer=None,
    ):
        self._store = checked_files(image_paths, len(texts))
        self._shape(transform, image_size)
        self._start(texts, tokenizer, same_image=same_files(self._store.paths))
        if device is not None:
            self.keep_on(device)

    @classmethod
    def from_store(
        cls,
        store: ImageStore,
        texts: Sequence[str | Sequence[str]],
        *,
        rows: np.ndarray | None = None,
        transform: Callable | None = None,
        image_size: int = 64,
        tokenizer=None,
        meta: list[dict] | None = None,
    ) -> "MultimodalDataset":
        """A dataset of the images of a store; rows is the image of each text (None: in order)."""
        self = cls.__new__(cls)
        self._store = store
        self._shape(transform, image_size)
        rows = np.arange(len(store)) if rows is None else np.asarray(rows)
        same = [store.name(i) for i in rows.tolist()]
        self._start(texts, tokenizer, meta=meta, same_image=same)
        self._rows = rows
        return self

    def _shape(self, transform: Callable | None, image_size: int):
        """Set how an image becomes a tensor."""
        image_size = as_type("image_size", image_size, int)
        if image_size < 1:
            raise ValueError(f"image_size={image_size} must be at least 1 pixel")
        if not (transform is None or callable(transform)):
            raise ValueError(f"transform={transform!r} must be a function of a PIL image, or None")
        self.transform = transform or square(image_size)
        self.side = None if transform else image_size

    @classmethod
    def from_pixels(  # noqa: PLR0913 (by name)
        cls,
        pixels,
        texts: Sequence[str | Sequence[str]],
        *,
        rows: np.ndarray | None = None,
        sample_ids: Sequence[int] | None = None,
        tokenizer=None,
        device: str | torch.device | None = None,
        name: str = "",
        attribution: str = "",
        meta: list[dict] | None = None,
    ) -> "MultimodalDataset":
        """A dataset of decoded images: uint8 (N, 3, H, W), a tensor or a (memory-mapped) array.

        rows selects the image of each text (None: all, in order). meta: metadata of each image.
        """
        self = cls.__new__(cls)
        self.name, self.attribution = name, attribution
        count = len(pixels) if rows is None else len(rows)
        if count != len(texts):
            raise ValueError(f"{count} images but {len(texts)} texts; give one text per image")
        rows = np.arange(count) if rows is None else np.asarray(rows)
        self._start(texts, tokenizer, sample_ids, meta, rows.tolist())
        self._decoded = Decoded(pixels, rows)
        if math.prod(pixels.shape) <= HASH_BYTES:
            self.same_images(self.content_hashes())
        if device is not None and torch.device(device).type != "cpu":
            self.keep_on(device)
        return self

    def _start(self, texts, tokenizer, sample_ids=None, meta=None, same_image=()):
        """Set captions and ids, whatever the images are read from."""
        self.texts = [clean_captions(f"row {row}", text) for row, text in enumerate(texts)]
        if not self.texts:
            raise ValueError("the dataset is empty; give at least one image and its text")
        self.sample_ids = checked_ids(sample_ids, len(self.texts))
        self.image_ids = number(same_image)  # (N,) equal for rows that show the same image
        self.meta = meta or [{} for _ in self.texts]
        self._rows = np.arange(len(self.texts))  # index of each row in the store
        self._decoded = Decoded(None, self._rows)
        self._tokenizer, self.given_tokenizer = tokenizer, tokenizer is not None
        self._encodings: deque = deque(maxlen=2)

    # -- captions ----------------------------------------------------------------------------

    @property
    def tokenizer(self):
        """The given tokenizer, else a WordPiece trained on these captions at first use."""
        if self._tokenizer is None:
            self._tokenizer = train_wordpiece([c for captions in self.texts for c in captions])
        return self._tokenizer

    def encoded_by(self, tokenizer, max_length: int) -> "MultimodalDataset":
        """A view with captions of this tokenizer, at most `max_length` tokens each.

        It shares images, captions and ids, also images that are decoded or cached later.
        """
        if tokenizer is self._tokenizer and max_length == self.max_length:
            return self
        view = copy.copy(self)
        view._tokenizer, view.max_length, view._encoded = tokenizer, max_length, None
        return view

    def encoded_captions(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids (M, L) int32 and lengths (M,) of captions; first caption and count (N,) of images."""
        return self._encode()[0]

    def _encode(self) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], CorrectCaptions]:
        if self._encoded is None:
            for tokenizer, max_length, encoded in self._encodings:  # of views made before
                if tokenizer is self.tokenizer and max_length == self.max_length:
                    self._encoded = encoded
        if self._encoded is None:
            self._encoded = encode_captions(
                self.tokenizer, self.texts, self.image_ids, self.max_length
            )
            self._encodings.append((self.tokenizer, self.max_length, self._encoded))
        return self._encoded

    @property
    def correct_captions(self) -> CorrectCaptions:
        """Which captions are correct for which images, as this dataset encodes them."""
        return self._encode()[1]

    def partners(self, rows=None, captions=None) -> tuple[Tensor, Tensor]:
        """(caption_ids (M,), image_captions (N, K)), as losses and `recall_at_k` take them.

        rows: of the images; captions: rows of `encoded_captions`; None = all.
        """
        correct = self.correct_captions
        rows = torch.arange(len(self)) if rows is None else torch.as_tensor(rows)
        ids = correct.caption_ids if captions is None else correct.caption_ids[captions]
        return ids, correct.of_images(rows)

    def drawn_captions(self, rows: Tensor, caption_noise: Tensor | None = None) -> Tensor:
        """(B,) rows of `encoded_captions` that `batch` draws for these rows."""
        _, _, first, counts = self.encoded_captions()
        if caption_noise is None:
            return first[rows]
        return first[rows] + (caption_noise * counts[rows]).long()

    def common_captions(self) -> list[tuple[str, int]]:
        """(caption, number of its images) of very common captions, the most common first."""
        flat = [c for captions in self.texts for c in captions]
        return [(flat[row], count) for row, count in self.correct_captions.common()]

    def token_frequency(self) -> Tensor:
        """(V,) frequency of each token in the captions without special ones; masker "frequency"."""
        input_ids, lengths, _, _ = self.encoded_captions()
        return token_frequency(self.tokenizer, input_ids, lengths)

    # -- images ----------------------------------------------------------------------------

    def place(self, row: int) -> str:
        """A row's name in messages: "row 3", or "pairs.csv, line 7"."""
        return self._decoder.place(row)

    def image_name(self, row: int) -> str:
        """The name of a row's image in messages: its path, or the member of a shard."""
        return self._store.name(int(self._rows[row])) if self._store else f"image {row}"

    def image_file(self, row: int) -> BinaryIO:
        """The encoded bytes of a row's image; a PNG where only decoded pixels exist."""
        if self._store:
            return self._store.open(int(self._rows[row]))
        return as_png(self._take(np.array([row]))[0])

    def same_images(self, keys: Sequence) -> None:
        """Treat rows with equal keys (one per row) as one image with the captions of all."""
        self.image_ids, self._encoded = number(keys), None
        self._encodings.clear()

    @property
    def expensive(self) -> bool:
        """True where reading all images only to compare them would take too long."""
        if self.report is None or not self.report.bytes:
            return self._store is not None and len(self) > 200_000
        return self.report.bytes > HASH_BYTES

    def content_hashes(self) -> list[str]:
        """32 hex digits per image, equal for equal bytes of files (cached) or equal pixels."""
        if self._store:
            return content_hashes(self._store, self._rows.tolist(), self.cache_dir)
        return self._decoded.content_hashes()

    @property
    def _decoder(self) -> ImageDecoder:
        return ImageDecoder(
            self._store, self._rows, self.places, self.transform, self.side, self.reading
        )

    def _take(self, rows: np.ndarray, noise: Tensor | None = None) -> Tensor:
        """Images of these rows as one tensor (B, 3, H, W)."""
        if self.resident:
            return self._decoded.take(rows)
        return self._decoder.batch(rows.tolist(), noise)

    def keep_on(self, device: str | torch.device) -> "MultimodalDataset":
        """Decode all images now and keep them on a device ("cpu", "cuda"); returns itself."""
        everything = np.arange(len(self))
        self._decoded.fill(self._take(everything).to(device), everything)
        return self

    def cached(
        self,
        num_workers: int = 0,
        cache_dir: str | os.PathLike | None = None,
        max_gigabytes: float = 20.0,
    ) -> "MultimodalDataset":
        """Decode all images once, into cached files; returns itself.

        The files are in `cache_dir` (None: see `image_cache.cache_folder`), found again by the
        images' content and shared by all processes. Raises ValueError if they would take more than
        max_gigabytes or most of the free disk, for a given transform, and for an undecodable image.
        """
        self.cache_dir, self.cache_gigabytes = cache_dir or self.cache_dir, max_gigabytes
        if why := self.why_not_cached():
            raise ValueError(f"the images cannot be cached: {why}")
        for row in self.decode_into_cache(num_workers):
            self._decoded.fill(None, self._decoded.rows)
            self._decoder.decode(row)  # raises, naming file and row
            raise RuntimeError(f"{self.image_name(row)} could not be decoded before; try again")
        return self

    def why_not_cached(self) -> str:
        """The reason why decoded images cannot be kept in files; "" where they can."""
        if self.side is None:
            return "the given transform may be random, and may give floats"
        return room_for(len(self), self.side, self.cache_gigabytes, self.cache_dir)

    def decode_into_cache(self, num_workers: int = 0) -> list[int]:
        """As `cached`; returns the rows that cannot be decoded, whose images are black now."""
        if self.resident:
            return []
        hashes, where = self.content_hashes(), (self.cache_dir, self.cache_gigabytes)
        pixels, failed = self._decoder.into_cache(hashes, num_workers, *where)
        self._decoded.fill(pixels, np.arange(len(self)))
        return failed

    def rows_that_fail(self, num_workers: int = 0) -> list[int]:
        """Decode every image once, into the cache if possible; returns the rows that fail."""
        if self.cache_gigabytes and not self.why_not_cached():
            return self.decode_into_cache(num_workers)
        return self._decoder.failing(num_workers)

    def prepare(self, num_workers: int = 0) -> str:
        """Fill the cache, if one was asked for; returns a message about it, or ""."""
        if self.resident or not self.cache_gigabytes:
            return ""
        if why := self.why_not_cached():
            return f"images are decoded anew in each epoch: {why}"
        started = time.perf_counter()
        pixels: Any = self.cached(num_workers, self.cache_dir, self.cache_gigabytes)._decoded.pixels
        return (
            f"{len(self):,} images decoded once ({pixels.nbytes / 1e9:.2f} GB in "
            f"{pixels.path.parent}), {time.perf_counter() - started:.1f} s"
        )

    def fingerprint(self) -> str:
        """16 hex digits that change with any id or caption, to recognise a run's dataset."""
        text = json.dumps([self.sample_ids.tolist(), self.texts])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def resident(self) -> bool:
        """True if a batch needs no decoding."""
        return self._decoded.pixels is not None

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> dict:
        row = range(len(self))[row]  # negative rows, and IndexError past the end
        image = self._take(np.array([row]))[0].cpu()
        return {"image": image, "text": self.texts[row][0], "sample_id": int(self.sample_ids[row])}

    def batch(self, rows: Sequence[int] | Tensor, caption_noise: Tensor | None = None) -> Batch:
        """The `Batch` of these rows.

        Args:
            rows: row numbers, B of them.
            caption_noise: (B,) uniform in [0, 1), selects one of each image's captions; None takes
                the first. It also seeds a random transform: an image gets the same draws in the
                same epoch, whatever the worker and however often the run was killed.

        Returns:
            Batch on the device of the images.

        Example:
            >>> batch = data.batch([0, 5, 7])
            >>> batch.pixel_values.shape, batch.sample_ids.tolist()
            (torch.Size([3, 3, 15, 15]), [0, 5, 7])
        """
        rows = torch.as_tensor(rows, dtype=torch.int64)
        pixels = self._take(rows.numpy(), caption_noise)
        input_ids, lengths, _, _ = self.encoded_captions()
        drawn = self.drawn_captions(rows, caption_noise)
        length = lengths[drawn]
        longest = int(length.max())
        valid = torch.arange(longest) < length[:, None]
        ids = [input_ids[drawn, :longest].long(), valid, self.sample_ids[rows]]
        if not self.correct_captions.one_to_one:
            ids += self.partners(rows, drawn)
        return Batch(pixels, *(x.to(pixels.device) for x in ids))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All images in order, with their first captions; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))))

    def epoch_rows(self, seed: int, epoch: int, steps: int) -> list[Tensor]:
        """The rows of each batch of an epoch: every image once, sizes differing by at most one.

        It depends only on seed and epoch; shards are read a few at a time (`shards.shard_order`).
        """
        noise = mask_noise(seed, epoch, self.sample_ids, 1, "order")[:, 0]
        order = getattr(self._store, "order", None)
        if order is not None:
            return order(self._rows, noise, steps, seed, epoch)
        return list(noise.argsort(stable=True).tensor_split(steps))

    def cut_captions(self) -> int:
        """The number of captions that are longer than `max_length` tokens and lose their end."""
        _, lengths, _, _ = self.encoded_captions()
        full = (lengths == self.max_length).nonzero()[:, 0].tolist()
        flat = [c for captions in self.texts for c in captions]
        return sum(
            n > self.max_length for n in token_counts(self.tokenizer, [flat[i] for i in full])
        )

    def subset(
        self, rows: Sequence[int] | np.ndarray, own_tokenizer: bool = False
    ) -> "MultimodalDataset":
        """These rows, nothing copied; own_tokenizer: train one on them unless one was given."""
        rows = np.asarray(rows, dtype=np.int64)
        if not len(rows):
            raise ValueError("a subset of 0 rows; give at least one")
        part = copy.copy(self)
        part.texts, part.meta = [self.texts[r] for r in rows], [self.meta[r] for r in rows]
        part.sample_ids, part._rows = self.sample_ids[rows], self._rows[rows]
        part.image_ids = number(self.image_ids[rows].tolist())
        if self.places is not None:
            part.places = (self.places[0], self.places[1][rows])
        part._decoded = Decoded(self._decoded.pixels, self._decoded.rows[rows])
        train_one = own_tokenizer and not self.given_tokenizer
        part._tokenizer = None if train_one else self.tokenizer
        part._encoded, part._encodings = None, deque(maxlen=2)
        if self.report is not None:
            part.report = self.report.part(rows.tolist(), part.texts)
        return part

    def __repr__(self) -> str:
        shape = tuple(self[0]["image"].shape)
        captions = sum(map(len, self.texts))
        name = f"{self.name}: " if self.name else ""
        return f"MultimodalDataset({name}{len(self):,} images {shape}, {captions:,} captions)"
