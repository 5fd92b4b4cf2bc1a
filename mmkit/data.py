"""Pictures with their captions, and batches of them.

A dataset is a list of pictures; each has one or several correct captions. Pictures stay uint8 until
they are on the device: normalising and augmenting run there, on the whole batch.
`valid` is True for a REAL token. Shapes: B batch, H x W pixels, L text length.
Walk-through: notebooks/01_data.ipynb.
"""

import contextlib
import hashlib
import io
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .pictures import read_picture, square
from .tokenizer import encode_texts, special_ids, train_wordpiece


@dataclass
class Batch:
    """What the encoder eats. All five have the same first dimension B."""

    pixel_values: Tensor  # (B, 3, H, W) uint8; float only from a transform that normalises itself
    input_ids: Tensor  # (B, L) int64, L = the longest caption of the batch
    valid: Tensor  # (B, L) bool, True = a real token, False = padding
    sample_ids: Tensor  # (B,) int64, the same for a picture in every epoch, worker and process
    group_ids: Tensor  # (B,) int64, equal for pairs that are correct for each other

    def __len__(self) -> int:
        return len(self.sample_ids)

    def _map(self, f: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(*(f(getattr(self, field.name)) for field in fields(self)))

    def __getitem__(self, rows) -> "Batch":
        """The batch of these rows (a slice or an index tensor)."""
        return self._map(lambda x: x[rows])

    def to(self, device) -> "Batch":
        to_gpu = torch.device(device).type == "cuda"  # the other way a copy must be waited for
        return self._map(lambda x: x.to(device, non_blocking=to_gpu))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def split(self, parts: int) -> list["Batch"]:
        """`parts` micro-batches in order, their sizes differing by at most one, none empty."""
        rows = torch.arange(len(self)).tensor_split(min(parts, len(self)))
        return [self[int(part[0]) : int(part[-1]) + 1] for part in rows]


def _captions(row: int, text) -> list[str]:
    """The captions of a row; ValueError for what holds no words (None, or a table's NaN, say)."""
    captions = [text] if isinstance(text, str) else list(text) if isinstance(text, Iterable) else []
    if not captions or any(not isinstance(c, str) or not c.strip() for c in captions):
        raise ValueError(f"the text of row {row} is empty or not a string: {text!r}; give words")
    return captions


def _groups(keys_of: Sequence[Sequence]) -> Tensor:
    """Rows that share a key, directly or through others, get one id (union-find)."""
    parent = list(range(len(keys_of)))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict = {}
    for row, keys in enumerate(keys_of):
        for key in keys:
            a, b = root(first.setdefault(key, row)), root(row)
            parent[max(a, b)] = min(a, b)
    return torch.tensor([root(i) for i in range(len(keys_of))], dtype=torch.int64)


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
    _paths: Sequence[Path] = ()
    _pixels: Any  # (N, 3, H, W) uint8: a tensor, or a memory-mapped array; None = decode

    def __init__(
        self,
        image_paths: Sequence[str | os.PathLike],
        texts: Sequence[str | Sequence[str]],
        transform: Callable | None = None,
        device: str | torch.device | None = None,
        image_size: int = 64,
        tokenizer=None,
    ):
        for row, path in enumerate(image_paths):
            if not isinstance(path, str | os.PathLike):
                raise ValueError(f"the picture of row {row} is {path!r}; give the path of a file")
        self._paths = [Path(p) for p in image_paths]
        if len(self._paths) != len(texts):
            raise ValueError(
                f"{len(self._paths)} image_paths but {len(texts)} texts; give one text (or one "
                "list of texts) per picture"
            )
        for row, path in enumerate(self._paths):
            if not path.is_file():
                raise FileNotFoundError(
                    f"picture {path} (row {row}) does not exist; check the path or leave it out"
                )
        if image_size < 1:
            raise ValueError(f"image_size={image_size} must be at least 1 pixel")
        self.transform = transform or square(image_size)
        paths = [[("path", path)] for path in map(os.path.realpath, self._paths)]
        self._start(texts, tokenizer, same_picture=paths)
        if device is not None:
            self._pixels = self._decode_all(range(len(self))).to(device)

    @classmethod
    def from_pixels(
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
        self._start(texts, tokenizer, sample_ids, meta, [[("row", int(r))] for r in rows])
        self._pixels, self._rows = pixels, rows
        if device is not None and torch.device(device).type != "cpu":
            self._pixels = self._take(np.arange(count)).to(device)
            self._rows = np.arange(count)
        return self

    def _start(self, texts, tokenizer, sample_ids=None, meta=None, same_picture=()):
        """The part that files and decoded pictures share: captions, ids, groups."""
        self.texts = [_captions(row, text) for row, text in enumerate(texts)]
        if not self.texts:
            raise ValueError("the dataset is empty; give at least one picture and its text")
        ids = torch.arange(len(self.texts)) if sample_ids is None else torch.as_tensor(sample_ids)
        self.sample_ids = ids.to(torch.int64)
        self.group_ids = _groups([[*k, *c] for k, c in zip(same_picture, self.texts, strict=True)])
        self.meta = meta or [{} for _ in self.texts]
        self._pixels, self._rows = None, np.arange(len(self.texts))
        self._tokenizer, self.given_tokenizer = tokenizer, tokenizer is not None
        self.max_length, self._encoded = 77, None  # CLIP's length; a model sets its own

    # -- captions ----------------------------------------------------------------------------

    @property
    def tokenizer(self):
        """The tokenizer given, else a WordPiece trained on these captions at first use."""
        if self._tokenizer is None:
            self._tokenizer = train_wordpiece([c for captions in self.texts for c in captions])
        return self._tokenizer

    def use_tokenizer(self, tokenizer, max_length: int):
        """Encode captions by this tokenizer from now on, at most `max_length` pieces each."""
        if tokenizer is not self._tokenizer or max_length != self.max_length:
            self._tokenizer, self.max_length, self._encoded = tokenizer, max_length, None

    def encoded_captions(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All captions: ids (M, L), length (M,), first row of each picture (N,), number (N,)."""
        if self._encoded is None:
            flat = [c for captions in self.texts for c in captions]
            input_ids, valid = encode_texts(self.tokenizer, flat, self.max_length)
            counts = torch.tensor([len(c) for c in self.texts])
            self._encoded = (input_ids, valid.sum(1), counts.cumsum(0) - counts, counts)
        return self._encoded

    def piece_frequency(self) -> Tensor:
        """(V,) share of each word piece among all words of the captions (no ends, no padding).

        What the text masker "frequency" goes by.
        """
        input_ids, lengths, _, _ = self.encoded_captions()
        inside = torch.arange(input_ids.shape[1]) < lengths[:, None]
        words = inside & ~torch.isin(input_ids, special_ids(self.tokenizer))
        counts = torch.bincount(input_ids[words], minlength=len(self.tokenizer))
        return counts / counts.sum().clamp(min=1)

    # -- pictures ----------------------------------------------------------------------------

    def _decode(self, row: int, noise: float | None = None) -> Tensor:
        path = self._paths[self._rows[row]]
        with _drawing_by(noise):
            picture = self.transform(read_picture(path, row))
        if not isinstance(picture, Tensor) or picture.ndim != 3 or picture.shape[0] != 3:
            got = tuple(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__
            raise ValueError(
                f"the transform gave {got} for picture {path} (row {row}); it must give a tensor "
                "(3, H, W) of one size for all pictures"
            )
        return picture

    def _decode_all(self, rows: Sequence[int], noise: Tensor | None = None) -> Tensor:
        each = [None] * len(rows) if noise is None else noise.tolist()
        pictures = [self._decode(row, number) for row, number in zip(rows, each, strict=True)]
        for row, picture in zip(rows, pictures, strict=True):
            if picture.shape != pictures[0].shape:
                raise ValueError(
                    f"the transform gave {tuple(picture.shape)} for picture "
                    f"{self._paths[self._rows[row]]} (row {row}) and {tuple(pictures[0].shape)} "
                    "for another; it must give one size for all pictures"
                )
        return torch.stack(pictures)

    def _take(self, rows: np.ndarray, noise: Tensor | None = None) -> Tensor:
        """Pictures of these rows as one tensor (B, 3, H, W)."""
        if self._pixels is None:
            return self._decode_all(rows.tolist(), noise)
        picked = self._rows[rows]
        if isinstance(self._pixels, Tensor):
            return self._pixels[torch.from_numpy(picked).to(self._pixels.device)]
        return torch.from_numpy(np.ascontiguousarray(self._pixels[picked]))

    def picture_file(self, row: int) -> BinaryIO:
        """The bytes of a picture as it lies on the disk; a PNG where only pixels are known."""
        if len(self._paths):
            return open(self._paths[self._rows[row]], "rb")
        from PIL import Image

        pixels = self._take(np.array([row]))[0].permute(1, 2, 0)  # (3, H, W) -> (H, W, 3)
        file = io.BytesIO()
        Image.fromarray(pixels.cpu().numpy()).save(file, "PNG")
        file.seek(0)
        return file

    def fingerprint(self) -> str:
        """16 hex digits that change with any id or caption: is this the set a run was made with?"""
        text = json.dumps([self.sample_ids.tolist(), self.texts])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def resident(self) -> bool:
        """True where a batch needs no decoding."""
        return self._pixels is not None

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
        input_ids, lengths, first, counts = self.encoded_captions()
        which = first[rows]
        if caption_noise is not None:
            which = which + (caption_noise * counts[rows]).long()
        length = lengths[which]
        longest = int(length.max())
        valid = torch.arange(longest) < length[:, None]
        ids = (input_ids[which, :longest], valid, self.sample_ids[rows], self.group_ids[rows])
        return Batch(pixels, *(x.to(pixels.device) for x in ids))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All pictures in order, with their first captions; the last batch may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))))

    def subset(self, rows: Sequence[int] | np.ndarray) -> "MultimodalDataset":
        """The dataset of these rows: same ids, same groups, same tokenizer, nothing copied."""
        rows = np.asarray(rows, dtype=np.int64)
        if not len(rows):
            raise ValueError("a subset of 0 rows; give at least one")
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        part.texts, part.meta = [self.texts[r] for r in rows], [self.meta[r] for r in rows]
        part.sample_ids, part.group_ids = self.sample_ids[rows], self.group_ids[rows]
        part._rows, part._tokenizer, part._encoded = self._rows[rows], self.tokenizer, None
        return part

    def __repr__(self) -> str:
        shape = tuple(self[0]["image"].shape)
        captions = sum(map(len, self.texts))
        name = f"{self.name}: " if self.name else ""
        return f"MultimodalDataset({name}{len(self):,} pictures {shape}, {captions:,} captions)"


@contextlib.contextmanager
def _drawing_by(noise: float | None) -> Iterator[None]:
    """Python's, NumPy's and torch's draws follow from `noise`; afterwards as if none had been."""
    if noise is None:
        yield
        return
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(noise * 2**32)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # pictures are decoded on the CPU
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class _BatchView(torch.utils.data.Dataset):
    """A map-style view whose item is a whole `Batch`, for worker processes."""

    def __init__(self, dataset: MultimodalDataset):
        self.dataset = dataset

    def __getitem__(self, key) -> Batch:
        return self.dataset.batch(*key)


def load_batches(
    dataset: MultimodalDataset, keys: list, num_workers: int, pin: bool
) -> Iterator[Batch]:
    """Batches for `keys`, a list of (rows, caption_noise), in that order.

    Pictures that must be decoded are decoded by `num_workers` processes; resident ones need none.
    """
    if dataset.resident or num_workers == 0:
        return (dataset.batch(*key) for key in keys)
    dataset.encoded_captions()  # once here, not once per worker
    loader = torch.utils.data.DataLoader(
        _BatchView(dataset), sampler=keys, batch_size=None, num_workers=num_workers, pin_memory=pin,
        generator=torch.Generator(),  # or each start of workers would move the draws of dropout
    )  # fmt: skip
    return iter(loader)
