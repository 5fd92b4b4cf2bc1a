"""Pictures with their captions, and batches of them.

A dataset is a list of pictures; each has one or several correct captions. Pictures stay uint8 until
they are on the device: normalising and augmenting run there, on the whole batch.
`valid` is True for a REAL token. Shapes: B batch, H x W pixels, L text length.
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
from ..older_names import renamed
from .batch import Batch, checked_ids
from .captions import clean_captions
from .clusters import number
from .decoding import Decoded, ImageDecoder
from .image_cache import content_hashes, room_for, same_files
from .image_files import PictureStore, checked_files
from .image_headers import Reading
from .images import as_png, square
from .partners import CorrectCaptions, encode_captions
from .tokenizer import piece_counts, token_frequency, train_wordpiece

HASH_BYTES = 20_000_000_000  # sources up to this size are searched for identical pictures


class MultimodalDataset:
    """Pictures and their captions.

    image_paths: files, one per picture. texts: for each picture one caption or a list of correct
    captions (the first is the canonical one). transform: PIL image -> tensor (3, H, W); uint8
    counts as raw, float as already normalised; None cuts a square of `image_size` pixels. device:
    None decodes when a batch is asked for (in worker processes while training); "cpu" or "cuda"
    decodes once and keeps pictures and word pieces there. Both give the same batches. tokenizer: a
    Hugging Face fast tokenizer; None trains a WordPiece on these captions.

    `dataset[i]` is `{"image": uint8 (3, H, W), "text": str, "sample_id": int}`;
    `dataset.batch(rows)` is a `Batch`. Raises ValueError for unequal numbers, an empty set or an
    empty caption, FileNotFoundError for a missing picture, naming file and row.
    """

    name = attribution = ""
    layers: Any = None  # DrawingLayers: what each pixel is part of; only built-in pictures know it
    transform: Any = None  # PIL image -> tensor; pictures that are decoded already have none
    report: Any = None  # of the source it was loaded from: see sources.py
    reading = Reading()  # limits and background of picture files
    side: int | None = None  # pixels of the square that is cut; None where a transform is given
    cache_dir: str | os.PathLike | None = None  # where decoded pictures are kept, and how many may
    cache_gigabytes = 0.0  # be; 0 = none: each epoch decodes them anew
    places: Any = None  # where each row stands in its source: ("pairs.csv, line", numbers)
    max_length = 77  # pieces of a caption that are read: CLIP's length; a model asks for its own
    _store: Any = None  # PictureStore: where the encoded pictures are
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
        self._start(texts, tokenizer, same_picture=same_files(self._store.paths))
        if device is not None:
            self.keep_on(device)

    @classmethod
    def from_store(
        cls,
        store: PictureStore,
        texts: Sequence[str | Sequence[str]],
        *,
        rows: np.ndarray | None = None,
        transform: Callable | None = None,
        image_size: int = 64,
        tokenizer=None,
        meta: list[dict] | None = None,
    ) -> "MultimodalDataset":
        """A dataset of encoded pictures wherever they lie; what every way in of sources.py makes.

        rows picks the picture of each text (None: all, in order).
        """
        self = cls.__new__(cls)
        self._store = store
        self._shape(transform, image_size)
        rows = np.arange(len(store)) if rows is None else np.asarray(rows)
        same = [store.name(i) for i in rows.tolist()]
        self._start(texts, tokenizer, meta=meta, same_picture=same)
        self._rows = rows
        return self

    def _shape(self, transform: Callable | None, image_size: int):
        """What becomes of a picture once it is read."""
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
        """A dataset of decoded pictures: uint8 (N, 3, H, W), a tensor or a (memory-mapped) array.

        rows picks the picture of each text (None: all, in order). meta: facts about each picture.
        """
        self = cls.__new__(cls)
        self.name, self.attribution = name, attribution
        count = len(pixels) if rows is None else len(rows)
        if count != len(texts):
            raise ValueError(f"{count} pictures but {len(texts)} texts; give one text per picture")
        rows = np.arange(count) if rows is None else np.asarray(rows)
        self._start(texts, tokenizer, sample_ids, meta, rows.tolist())
        self._decoded = Decoded(pixels, rows)
        if math.prod(pixels.shape) <= HASH_BYTES:
            self.same_pictures(self.content_hashes())
        if device is not None and torch.device(device).type != "cpu":
            self.keep_on(device)
        return self

    def _start(self, texts, tokenizer, sample_ids=None, meta=None, same_picture=()):
        """The part that files and decoded pictures share: captions and ids."""
        self.texts = [clean_captions(f"row {row}", text) for row, text in enumerate(texts)]
        if not self.texts:
            raise ValueError("the dataset is empty; give at least one picture and its text")
        self.sample_ids = checked_ids(sample_ids, len(self.texts))
        self.image_ids = number(same_picture)  # (N,) equal for rows that show the same image
        self.meta = meta or [{} for _ in self.texts]
        self._rows = np.arange(len(self.texts))  # of each row: its place in the store
        self._decoded = Decoded(None, self._rows)
        self._tokenizer, self.given_tokenizer = tokenizer, tokenizer is not None
        self._encodings: deque = deque(maxlen=2)

    # -- captions ----------------------------------------------------------------------------

    @property
    def tokenizer(self):
        """The tokenizer given, else a WordPiece trained on these captions at first use."""
        if self._tokenizer is None:
            self._tokenizer = train_wordpiece([c for captions in self.texts for c in captions])
        return self._tokenizer

    def encoded_by(self, tokenizer, max_length: int) -> "MultimodalDataset":
        """The same data, its captions as this tokenizer gives them, at most `max_length` tokens.

        A view: it shares images, captions and ids, also images that are decoded or cached later.
        This data set stays as it is, so that whoever reads it reads on what they read before.
        """
        if tokenizer is self._tokenizer and max_length == self.max_length:
            return self
        view = copy.copy(self)
        view._tokenizer, view.max_length, view._encoded = tokenizer, max_length, None
        return view

    def encoded_captions(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All captions: ids (M, L) int32, length (M,); of pictures (N,) the first and how many."""
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
        """Which captions are correct for which images, as this data set encodes them."""
        return self._encode()[1]

    def partners(self, rows=None, captions=None) -> tuple[Tensor, Tensor]:
        """(caption_ids (M,), image_captions (N, K)): what losses and `recall_at_k` take.

        rows: of the images; captions: rows of `encoded_captions`; None = all.
        """
        correct = self.correct_captions
        rows = torch.arange(len(self)) if rows is None else torch.as_tensor(rows)
        ids = correct.caption_ids if captions is None else correct.caption_ids[captions]
        return ids, correct.of_images(rows)

    def drawn_captions(self, rows: Tensor, caption_noise: Tensor | None = None) -> Tensor:
        """(B,) rows of `encoded_captions` that a batch of these rows has; see `batch`."""
        _, _, first, counts = self.encoded_captions()
        if caption_noise is None:
            return first[rows]
        return first[rows] + (caption_noise * counts[rows]).long()

    def common_captions(self) -> list[tuple[str, int]]:
        """(caption, images that it is correct for) of those that very many share, most first."""
        flat = [c for captions in self.texts for c in captions]
        return [(flat[row], count) for row, count in self.correct_captions.common()]

    def token_frequency(self) -> Tensor:
        """(V,) share of each word piece among all words of the captions (no ends, no padding).

        What the text masker "frequency" goes by.
        """
        input_ids, lengths, _, _ = self.encoded_captions()
        return token_frequency(self.tokenizer, input_ids, lengths)

    piece_frequency = renamed(token_frequency, "data.piece_frequency")

    # -- pictures ----------------------------------------------------------------------------

    def place(self, row: int) -> str:
        """What a message calls a row: "row 3", or "pairs.csv, line 7"."""
        return self._decoder.place(row)

    def picture_name(self, row: int) -> str:
        """What a message calls the picture of a row: its path, or the member of a shard."""
        return self._store.name(int(self._rows[row])) if self._store else f"picture {row}"

    def picture_file(self, row: int) -> BinaryIO:
        """The encoded bytes of a row's picture; a PNG of one that is there decoded only."""
        if self._store:
            return self._store.open(int(self._rows[row]))
        return as_png(self._take(np.array([row]))[0])

    def same_pictures(self, keys: Sequence) -> None:
        """Rows with equal keys (one each) show the same picture: each has the others' captions."""
        self.image_ids, self._encoded = number(keys), None
        self._encodings.clear()

    @property
    def expensive(self) -> bool:
        """True where comparing all pictures would mean reading more than they are worth."""
        if self.report is None or not self.report.bytes:
            return self._store is not None and len(self) > 200_000
        return self.report.bytes > HASH_BYTES

    def content_hashes(self) -> list[str]:
        """32 hex digits for each picture, equal for equal bytes (of decoded ones: equal pixels).

        Files are read once; their hashes are remembered in `cache_dir` until they change.
        """
        if self._store:
            return content_hashes(self._store, self._rows.tolist(), self.cache_dir)
        return self._decoded.content_hashes()

    @property
    def _decoder(self) -> ImageDecoder:
        return ImageDecoder(
            self._store, self._rows, self.places, self.transform, self.side, self.reading
        )

    def _take(self, rows: np.ndarray, noise: Tensor | None = None) -> Tensor:
        """Pictures of these rows as one tensor (B, 3, H, W)."""
        if self.resident:
            return self._decoded.take(rows)
        return self._decoder.batch(rows.tolist(), noise)

    def keep_on(self, device: str | torch.device) -> "MultimodalDataset":
        """Decode all pictures now and keep them there ("cpu", "cuda"); returns itself."""
        everything = np.arange(len(self))
        self._decoded.fill(self._take(everything).to(device), everything)
        return self

    def cached(
        self,
        num_workers: int = 0,
        cache_dir: str | os.PathLike | None = None,
        max_gigabytes: float = 20.0,
    ) -> "MultimodalDataset":
        """Decode all pictures once, into cached files; returns itself.

        The files lie in `cache_dir` (None: see `picture_cache.cache_folder`), are found again by
        the pictures' content, and are shared by all processes. Raises ValueError where that would
        take more than max_gigabytes or most of the free disk, where a transform of one's own is
        given, and for a picture that cannot be decoded.
        """
        self.cache_dir, self.cache_gigabytes = cache_dir or self.cache_dir, max_gigabytes
        if why := self.why_not_cached():
            raise ValueError(f"the pictures cannot be cached: {why}")
        for row in self.decode_into_cache(num_workers):
            self._decoded.fill(None, self._decoded.rows)
            self._decoder.decode(row)  # raises, naming file and row
            raise RuntimeError(f"{self.picture_name(row)} could not be decoded before; try again")
        return self

    def why_not_cached(self) -> str:
        """ "" where decoded pictures can be kept in files, else why not, in words."""
        if self.side is None:
            return "a transform of one's own may draw, and may give floats"
        return room_for(len(self), self.side, self.cache_gigabytes, self.cache_dir)

    def decode_into_cache(self, num_workers: int = 0) -> list[int]:
        """As `cached`; returns the rows that could not be decoded, whose pictures are black now."""
        if self.resident:
            return []
        hashes, where = self.content_hashes(), (self.cache_dir, self.cache_gigabytes)
        pixels, failed = self._decoder.into_cache(hashes, num_workers, *where)
        self._decoded.fill(pixels, np.arange(len(self)))
        return failed

    def rows_that_fail(self, num_workers: int = 0) -> list[int]:
        """Decode every picture once, into the cache where one may be kept; rows that cannot be."""
        if self.cache_gigabytes and not self.why_not_cached():
            return self.decode_into_cache(num_workers)
        return self._decoder.failing(num_workers)

    def prepare(self, num_workers: int = 0) -> str:
        """Make ready for a training: fill the cache that was asked for. Says what it did, or ""."""
        if self.resident or not self.cache_gigabytes:
            return ""
        if why := self.why_not_cached():
            return f"pictures are decoded anew in each epoch: {why}"
        started = time.perf_counter()
        pixels: Any = self.cached(num_workers, self.cache_dir, self.cache_gigabytes)._decoded.pixels
        return (
            f"{len(self):,} pictures decoded once ({pixels.nbytes / 1e9:.2f} GB in "
            f"{pixels.folder}), {time.perf_counter() - started:.1f} s"
        )

    def fingerprint(self) -> str:
        """16 hex digits that change with any id or caption: is this the set a run was made with?"""
        text = json.dumps([self.sample_ids.tolist(), self.texts])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def resident(self) -> bool:
        """True where a batch needs no decoding."""
        return self._decoded.pixels is not None

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> dict:
        row = range(len(self))[row]  # negative rows, and IndexError past the end
        image = self._take(np.array([row]))[0].cpu()
        return {"image": image, "text": self.texts[row][0], "sample_id": int(self.sample_ids[row])}

    def batch(self, rows: Sequence[int] | Tensor, caption_noise: Tensor | None = None) -> Batch:
        """The `Batch` of these rows.

        caption_noise (B,) uniform in [0, 1) picks one of each picture's captions; None takes the
        first. A transform that draws numbers draws them by it, too: the same ones for a picture in
        the same epoch, whatever the worker and however often the run was killed.
        """
        rows = torch.as_tensor(rows, dtype=torch.int64)
        pixels = self._take(rows.numpy(), caption_noise)
        input_ids, lengths, _, _ = self.encoded_captions()
        which = self.drawn_captions(rows, caption_noise)
        length = lengths[which]
        longest = int(length.max())
        valid = torch.arange(longest) < length[:, None]
        ids = [input_ids[which, :longest].long(), valid, self.sample_ids[rows]]
        if not self.correct_captions.one_to_one:
            ids += self.partners(rows, which)
        return Batch(pixels, *(x.to(pixels.device) for x in ids))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All pictures in order, with their first captions; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))))

    def epoch_rows(self, seed: int, epoch: int, steps: int) -> list[Tensor]:
        """The rows of each batch of an epoch: every picture once, sizes differing by at most one.

        The order depends on seed and epoch alone. Pictures in shards are read a few shards at a
        time (`shards.shard_order`).
        """
        noise = mask_noise(seed, epoch, self.sample_ids, 1, "order")[:, 0]
        order = getattr(self._store, "order", None)
        if order is not None:
            return order(self._rows, noise, steps, seed, epoch)
        return list(noise.argsort(stable=True).tensor_split(steps))

    def cut_captions(self) -> int:
        """How many captions are longer than `max_length` pieces, and lose their end."""
        _, lengths, _, _ = self.encoded_captions()
        full = (lengths == self.max_length).nonzero()[:, 0].tolist()
        flat = [c for captions in self.texts for c in captions]
        return sum(
            n > self.max_length for n in piece_counts(self.tokenizer, [flat[i] for i in full])
        )

    def subset(
        self, rows: Sequence[int] | np.ndarray, own_tokenizer: bool = False
    ) -> "MultimodalDataset":
        """The dataset of these rows: same ids, same images, same tokenizer, nothing copied.

        own_tokenizer: unless one was given, train one on the captions of these rows.
        """
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
        return f"MultimodalDataset({name}{len(self):,} pictures {shape}, {captions:,} captions)"
