"""Images decoded once, and hashes of files, in caches that all processes share.

A cache is a file of rows of one size and a file of their 16-byte keys. A key is written once its
row is on the disk, so that a killed process never leaves half a row. Images are found again by
their content (not their name), their size and the way they are read: a second run, another split
or a copy of the data decodes nothing. If the folder would grow beyond its limit, the caches used
least recently go first, but none that was used within a day; users may empty it at any time.
Walk-through: notebooks/08_your_own_images.ipynb.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..errors import Refused
from ..files import OpenFile, cache_folder, lock, open_to_read, read_at, writing_cache
from .image_files import Files, ImageStore
from .workers import workers_for

SYNC_BYTES = 32_000_000  # after so many, rows are put on the disk and their keys written
FREE_FRACTION = 0.8  # of the free disk space that a cache may take
SPARED_SECONDS = 86_400  # a cache that was used within this time is not removed
_KEY = 16  # bytes


# ---- rows by key ---------------------------------------------------------------------------------


class RowCache:
    """Rows of `size` bytes by their keys, for everything that `what` describes.

    `NAME-NUMBER.rows` and `.keys` in the folder; the number is drawn anew when the cache is begun
    anew, so that a process that still reads the old file never reads other rows in it.
    """

    def __init__(self, folder: Path, what: str, size: int):
        self.folder, self.size = folder, size
        self.name = hashlib.blake2b(what.encode(), digest_size=8).hexdigest()

    def find(self) -> tuple[Path, dict[str, int]]:
        """(the file of rows, {key: its row}); rows that were cut off do not count."""
        for path in sorted(self.folder.glob(f"{self.name}-*.rows")):
            with contextlib.suppress(OSError):
                keys = path.with_suffix(".keys").read_bytes()
                count = min(len(keys) // _KEY, path.stat().st_size // self.size)
                each = (keys[_KEY * i : _KEY * (i + 1)].hex() for i in range(count))
                return path, {key: row for row, key in enumerate(each)}
        return self.folder / f"{self.name}-{secrets.token_hex(4)}.rows", {}

    def add(self, new: Iterable[tuple[str, np.ndarray]]) -> None:
        """Append rows with their keys; call it with the `locked` cache only."""
        path, known = self.find()
        waiting: list[str] = []
        count, unsynced = len(known), 0
        with writing_cache(path), open(path, "ab") as rows, open(_keys(path), "ab") as keys:
            rows.truncate(count * self.size)
            keys.truncate(count * _KEY)

            def write_keys() -> None:
                rows.flush()
                os.fsync(rows.fileno())
                keys.write(bytes.fromhex("".join(waiting)))
                keys.flush()
                waiting.clear()

            try:
                for key, row in new:
                    rows.write(row.tobytes())
                    waiting.append(key)
                    unsynced += self.size
                    if unsynced >= SYNC_BYTES:
                        write_keys()
                        unsynced = 0
            finally:
                write_keys()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time; without locks on this system, all of them."""
        path = self.folder / f"{self.name}.lock"
        with writing_cache(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")
        with file:
            lock(file)
            yield


def _keys(rows: Path) -> Path:
    return rows.with_suffix(".keys")


def make_room(folder: Path, needed: int, max_bytes: float, own: Path) -> None:
    """Remove the caches used least recently until `needed` bytes fit into max_bytes.

    The cache `own`, which is about to grow, goes last.
    """
    caches = []
    for path in folder.glob("*.rows"):
        with contextlib.suppress(OSError):  # another process has removed it
            used = _keys(path).stat().st_mtime
            caches.append((path == own, used, path, path.stat().st_size))
    total = needed + sum(size for *_, size in caches)
    for is_own, used, path, size in sorted(caches):
        if total <= max_bytes or (not is_own and used > time.time() - SPARED_SECONDS):
            continue
        with contextlib.suppress(OSError):  # Windows keeps what a process has open
            path.unlink()
            _keys(path).unlink()
            total -= size


# ---- content -------------------------------------------------------------------------------------


def content_hash(store: ImageStore, i: int) -> str:
    """32 hex digits: a hash of the bytes of image i, or of its name if it cannot be opened."""
    digest = hashlib.blake2b(digest_size=_KEY)
    try:
        # Allocating a buffer would take as long as reading the file.
        with store.open(i, 0) if isinstance(store, Files) else store.open(i) as file:
            while block := file.read(1 << 18):
                digest.update(block)
    except (OSError, ValueError):
        digest.update(_bytes(f"unreadable {store.name(i)}"))
    return digest.hexdigest()


def _bytes(text: str) -> bytes:
    """A text as bytes, also a file name that is not Unicode."""
    return text.encode("utf-8", "surrogatepass")


def same_files(paths: Sequence[str]) -> list[Hashable]:
    """A key per file, equal for equal contents; only files of equal size and end are read."""
    real = [os.path.realpath(path) for path in paths]
    store = Files(list(dict.fromkeys(real)))
    keys: list[Hashable] = [os.path.getsize(path) for path in store.paths]
    for look in (_end, content_hash):
        times = Counter(keys)
        keys = [key if times[key] == 1 else (key, look(store, i)) for i, key in enumerate(keys)]
    key_of = dict(zip(store.paths, keys, strict=True))
    return [key_of[path] for path in real]


def _end(store: ImageStore, i: int) -> bytes | str:
    """The last kilobyte of image i, or its name if it cannot be opened."""
    try:
        with store.open(i) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
            return file.read()
    except OSError:
        return store.name(i)


def content_hashes(
    store: ImageStore, rows: Sequence[int], cache_dir: str | os.PathLike | None = None
) -> list[str]:
    """`content_hash` of each of these images; one whose stamp has not changed is not read again.

    A cache has the hash of each name and stamp (size and time of change).
    """
    with contextlib.suppress(OSError):  # read-only: the files are read each time
        memory = RowCache(cache_folder(cache_dir), "content", _KEY)
        path, known = memory.find()
        stored = np.fromfile(path, f"V{_KEY}") if known else np.empty(0, f"V{_KEY}")
        hashes, new = [], []
        just_now = time.time_ns() - 2_000_000_000  # it may change again within one clock tick
        for i in rows:
            stamp = store.stamp(i)
            name = hashlib.blake2b(_bytes(f"{store.name(i)} {stamp}"), digest_size=_KEY).hexdigest()
            if stamp and name in known:
                hashes.append(bytes(stored[known[name]]).hex())
                continue
            hashes.append(content_hash(store, i))
            if stamp and int(stamp.rpartition(":")[2]) < just_now:
                new.append((name, np.frombuffer(bytes.fromhex(hashes[-1]), np.uint8)))
        if new:
            with contextlib.suppress(OSError), memory.locked():  # a full disk
                memory.add(new)
        return hashes
    return [content_hash(store, i) for i in rows]


# ---- the decoded images ------------------------------------------------------------------------


class CachedImages:
    """uint8 (N, 3, S, S) in a cache; `images[rows]` gives an array of these rows.

    place: the row in the file of each image; -1 is a black image. Reads are served by the system's
    own cache of the file, which all processes share; a process keeps nothing in memory. (If the
    file were memory-mapped, each access to an image would count up to 2 MB around it as memory of
    the process, since Linux maps whole folios.)
    """

    def __init__(self, path: Path, place: np.ndarray, side: int):
        self.shape, self.path, self.place = (len(place), 3, side, side), path, place
        self.nbytes = len(place) * 3 * side * side
        self._file: OpenFile | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce__(self):
        return CachedImages, (self.path, self.place, self.shape[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        out = np.zeros((len(rows), *self.shape[1:]), np.uint8)
        for image, place in zip(out, self.place[rows].tolist(), strict=True):
            if place < 0:
                continue
            if self._file is None:
                self._file = OpenFile(open_to_read(self.path))
            if read_at(self._file, place * image.nbytes, image) < image.nbytes:
                raise OSError(f"{self.path} was cut off while in use; remove it and start again")
        return out


Decode = Callable[[int], np.ndarray]  # row -> uint8 (3, S, S); raises Refused or OSError


def room_for(count: int, side: int, max_gigabytes: float, cache_dir=None) -> str:
    """The reason why so many images cannot be cached; "" if they can."""
    needed = count * 3 * side * side / 1e9
    try:
        free = shutil.disk_usage(cache_folder(cache_dir)).free / 1e9
    except OSError as error:
        return str(error.strerror)
    if needed > max_gigabytes:
        return f"{needed:.1f} GB decoded is more than cache_gigabytes={max_gigabytes:g}"
    if needed > FREE_FRACTION * free:
        return f"{needed:.1f} GB decoded is too much for {free:.1f} GB of free disk"
    return ""


def decode_once(
    hashes: list[str],
    decode: Decode,
    side: int,
    how: str,
    num_workers: int = 0,
    cache_dir: str | os.PathLike | None = None,
    max_gigabytes: float = 20.0,
) -> tuple[CachedImages, list[int]]:
    """Images from the cache; worker processes first decode those that are missing there.

    hashes: of the content of each image. how: a text of what else the pixels depend on.
    max_gigabytes: limit of the folder, including the images of other data. Returns the images and
    the numbers of those that could not be decoded, which are black; each call tries them again.
    """
    versions = [version(package) for package in ("pillow", "torch", "torchvision")]
    size = 3 * side * side
    cache = RowCache(cache_folder(cache_dir) / "images", f"{side} {how} {versions}", size)
    path, known = cache.find()
    failed: list[int] = []
    if any(key not in known for key in hashes):
        with cache.locked():  # one process decodes, the others then find the images
            path, known = cache.find()
            kept = sum(key in known for key in set(hashes))
            needed = size * (len(set(hashes)) - kept)
            make_room(cache.folder, needed, 1e9 * max_gigabytes, path)
            _, known = cache.find()
            first = {key: row for row, key in reversed(list(enumerate(hashes))) if key not in known}
            missing = sorted(first.values())
            decoded = _decoded(decode, missing, num_workers, failed)
            cache.add((hashes[row], image) for row, image in decoded)
            path, known = cache.find()
    with contextlib.suppress(OSError):  # a read-only folder
        os.utime(_keys(path))
    place = np.array([known.get(key, -1) for key in hashes], np.int64)
    lost = {hashes[row] for row in failed}
    return CachedImages(path, place, side), [i for i, key in enumerate(hashes) if key in lost]


class _Decoded(torch.utils.data.Dataset):
    """Item i is (row, its decoded image or None)."""

    def __init__(self, decode: Decode, rows: list[int]):
        self.decode, self.rows = decode, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[int, np.ndarray | None]:
        try:
            return self.rows[i], np.ascontiguousarray(self.decode(self.rows[i]))
        except (Refused, OSError):
            return self.rows[i], None


def _unchanged(item):
    return item


def _decoded(
    decode: Decode, rows: list[int], workers: int, failed: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """(row, image) of each row, decoded by so many processes; the others are added to `failed`."""
    items = _Decoded(decode, rows)
    loader = torch.utils.data.DataLoader(
        items, batch_size=None, num_workers=workers_for(items, min(workers, len(rows)), len(rows)),
        collate_fn=_unchanged,  # arrays: tensors would need shared memory
        generator=torch.Generator(),  # else it would change the draws of dropout
    )  # fmt: skip
    message = f"decoding {len(rows):,} images, once"
    for row, image in tqdm(loader, desc=message, total=len(rows), delay=2, leave=False):
        if image is None:
            failed.append(row)
        else:
            yield row, image
