"""Images decoded once, into files that all processes share.

An image is found again by its content (not its name), its size and the way it is read, so that a
second run, another split or a copy of the data decodes nothing. Decoded images are stored in chunks
of up to 32 MB; the list of a chunk's images is written once the chunk is complete, so that a killed
process never leaves half a chunk. If the folder would grow beyond its limit, the least recently
used chunks are removed, but none that was used within a day; users may empty it at any time.
Walk-through: notebooks/08_your_own_images.ipynb.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..errors import Refused
from ..files import OpenFile, OpenFiles, cache_folder, lock, renamed, writing_cache
from .image_files import Files, ImageStore

CHUNK_BYTES = 32_000_000
OPEN_CHUNKS = 128  # per data set and process; the system allows 1,024 files or so
FREE_FRACTION = 0.8  # of the free disk space that a cache may take
SPARED_SECONDS = 86_400  # a chunk that was used within this time is not removed


# ---- content -------------------------------------------------------------------------------------


def content_hash(store: ImageStore, i: int) -> str:
    """32 hex digits: a hash of the bytes of image i, or of its name if it cannot be opened."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        # Allocating a buffer would take as long as reading the file.
        with store.open(i, 0) if isinstance(store, Files) else store.open(i) as file:
            while block := file.read(1 << 18):
                digest.update(block)
    except (OSError, ValueError):
        digest.update(f"unreadable {store.name(i)}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


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

    The hashes are stored by name and stamp (size and time of change) in a small data base.
    """
    # sqlite rejects lone surrogates, which represent the bytes of file names that are not text
    names = [
        (store.name(i).encode("utf-8", "backslashreplace").decode(), store.stamp(i)) for i in rows
    ]
    with contextlib.closing(_memory(cache_dir)) as memory:
        known = _recall(memory, [name for name, stamp in names if stamp])
        hashes, new = [], []
        just_now = time.time_ns() - 2_000_000_000  # it may change again within one clock tick
        for i, (name, stamp) in zip(rows, names, strict=True):
            remembered = known.get(name, ("", ""))
            if stamp and remembered[0] == stamp:
                hashes.append(remembered[1])
                continue
            hashes.append(content_hash(store, i))
            if stamp and int(stamp.rpartition(":")[2]) < just_now:
                new.append((name, stamp, hashes[-1]))
        if new:
            with contextlib.suppress(
                sqlite3.Error
            ):  # on a full disk the file is read again next time
                memory.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", new)
                memory.commit()
    return hashes


def _memory(cache_dir: str | os.PathLike | None) -> sqlite3.Connection:
    """The data base of hashes; a damaged one is replaced, or kept in memory only."""
    table = "CREATE TABLE IF NOT EXISTS hashes (name TEXT PRIMARY KEY, stamp TEXT, hash TEXT)"
    for _ in range(2):
        try:
            path = cache_folder(cache_dir) / "content.sqlite"
            memory = sqlite3.connect(path, timeout=30)
            memory.execute(table)
            return memory
        except (sqlite3.OperationalError, OSError):  # locked, or a read-only folder
            break
        except sqlite3.DatabaseError:
            path.unlink(missing_ok=True)
    memory = sqlite3.connect(":memory:")
    memory.execute(table)
    return memory


def _recall(memory: sqlite3.Connection, names: list[str]) -> dict[str, tuple[str, str]]:
    known: dict[str, tuple[str, str]] = {}
    for start in range(0, len(names), 500):
        part = names[start : start + 500]
        marks = ",".join("?" * len(part))
        with contextlib.suppress(sqlite3.Error):
            rows = memory.execute(f"SELECT * FROM hashes WHERE name IN ({marks})", part)
            known |= {name: (stamp, found) for name, stamp, found in rows}
    return known


# ---- the decoded images ------------------------------------------------------------------------


def _open(path: Path) -> OpenFile:
    """A chunk file; its images begin behind the header."""
    chunk = OpenFile(os.open(path, os.O_RDONLY))
    _used(path)  # so that it is not removed during a run of several days
    with open(chunk.number, "rb", closefd=False) as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        chunk.start = file.tell()
    return chunk


def _used(path: Path) -> None:
    """Mark a chunk as used now, so that it is not removed next."""
    with contextlib.suppress(OSError):  # a read-only folder
        os.utime(path.with_suffix(".json"))


class CachedImages:
    """uint8 (N, 3, S, S) in chunk files; `images[rows]` gives an array of these rows.

    where: (file, index in it) of each image; index -1 is a black image. Reads are served by the
    system's own cache of the files, which all processes share; a process keeps nothing in memory.
    (If the files were memory-mapped, each access to an image would count up to 2 MB around it as
    memory of the process, since Linux maps whole folios.)
    """

    def __init__(self, where: Sequence[tuple[Path, int]], folder: Path, side: int):
        self.shape = (len(where), 3, side, side)
        self.folder, self.nbytes = folder, len(where) * 3 * side * side
        numbers = {path: number for number, path in enumerate({path: 0 for path, _ in where})}
        self.paths = list(numbers)
        self.chunk = np.array([numbers[path] for path, _ in where], np.int32)
        self.place = np.array([place for _, place in where], np.int32)
        self._opened = OpenFiles(_open, OPEN_CHUNKS)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        out = np.zeros((len(rows), *self.shape[1:]), np.uint8)
        size = out[:1].nbytes
        for image, number, place in zip(out, self.chunk[rows], self.place[rows], strict=True):
            if place < 0:
                continue
            chunk = self._opened(self.paths[number])
            if os.preadv(chunk.number, [image.data], chunk.start + int(place) * size) < size:
                path = self.paths[number]
                raise OSError(f"{path} was cut off while in use; remove it and start again")
        return out


Decode = Callable[[int], np.ndarray]  # row -> uint8 (3, S, S); raises Refused or OSError


class _Chunks(torch.utils.data.Dataset):
    """Item k decodes and writes chunk k, and is its rows that cannot be decoded."""

    def __init__(
        self, decode: Decode, rows: list[list[int]], hashes: Sequence[str], folder: Path, side: int
    ):
        self.decode, self.rows, self.hashes = decode, rows, hashes
        self.folder, self.side = folder, side

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> list[int]:
        pixels = np.empty((len(self.rows[k]), 3, self.side, self.side), np.uint8)
        good: list[str] = []
        failed = []
        for row in self.rows[k]:
            try:
                pixels[len(good)] = self.decode(row)
                good.append(self.hashes[row])
            except (Refused, OSError):
                failed.append(row)
        if good:
            name = hashlib.blake2b(" ".join(good).encode(), digest_size=16).hexdigest()
            path = self.folder / f"{name}.npy"
            with writing_cache(path), renamed(path) as file:
                np.save(file, pixels[: len(good)])
            listing = {"bytes": path.stat().st_size, "pictures": good}
            listed = path.with_suffix(".json")  # written last: it says that the chunk is complete
            with writing_cache(listed), renamed(listed) as file:
                file.write(json.dumps(listing).encode())
        return failed


def _places(folder: Path) -> dict[str, tuple[Path, int]]:
    """{hash: (file, index)} of the images in a folder of chunks; truncated chunks do not count."""
    places: dict[str, tuple[Path, int]] = {}
    for listed in sorted(folder.glob("*.json")):
        path = listed.with_suffix(".npy")
        try:
            listing = json.loads(listed.read_text())
            if path.stat().st_size == listing["bytes"]:
                places |= {key: (path, index) for index, key in enumerate(listing["pictures"])}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return places


def _drop_oldest(folder: Path, needed: int, max_bytes: float, in_use: set[Path]) -> None:
    """Make room for `needed` bytes below max_bytes by removing the least recently used chunks."""
    chunks = []
    for path in folder.rglob("*.npy"):
        with contextlib.suppress(OSError):  # another process has removed it
            listed = path.with_suffix(".json")
            used = (listed if listed.exists() else path).stat().st_mtime
            chunks.append((used, path, path.stat().st_size))
    total = needed + sum(size for _, _, size in chunks)
    for used, path, size in sorted(chunks):
        if total <= max_bytes or used > time.time() - SPARED_SECONDS:
            return
        if path not in in_use:
            for one in (
                path.with_suffix(".json"),
                path,
            ):  # the list first: without it there is no chunk
                with contextlib.suppress(OSError):
                    one.unlink()
            total -= size


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
    everything = cache_folder(cache_dir) / "pictures"  # on disk since the first release
    versions = [version(package) for package in ("pillow", "torch", "torchvision")]
    how = f"{side} {how} {versions}"
    folder = everything / hashlib.blake2b(how.encode(), digest_size=8).hexdigest()
    with writing_cache(folder):
        folder.mkdir(parents=True, exist_ok=True)
    places, failed = _places(folder), []
    if any(key not in places for key in hashes):
        with _locked(folder / "lock"):  # one process decodes, the others then find the images
            places = _places(folder)
            missing = [row for key, row in _first_rows(hashes).items() if key not in places]
            in_use = {places[key][0] for key in hashes if key in places}
            size = 3 * side * side * len(missing)
            _drop_oldest(everything, size, 1e9 * max_gigabytes, in_use)
            failed = _decode_chunks(decode, missing, hashes, folder, side, num_workers)
            places = _places(folder)
    nowhere = (Path(), -1)
    where = [places.get(key, nowhere) for key in hashes]
    for path in {path for path, index in where if index >= 0}:
        _used(path)
    lost = {hashes[row] for row in failed}
    return CachedImages(where, folder, side), [i for i, key in enumerate(hashes) if key in lost]


def _first_rows(hashes: Sequence[str]) -> dict[str, int]:
    """{hash: the first row with this content}."""
    first: dict[str, int] = {}
    for row, key in enumerate(hashes):
        first.setdefault(key, row)
    return first


def _decode_chunks(
    decode: Decode, missing: list[int], hashes: Sequence[str], folder: Path, side: int, workers: int
) -> list[int]:
    """Decode rows into chunks, the same number for each worker; returns the rows that fail."""
    if not missing:
        return []
    workers = min(workers, len(missing))
    per_chunk = max(1, CHUNK_BYTES // (3 * side * side))
    turns = -(-len(missing) // (per_chunk * max(1, workers)))
    per_chunk = -(-len(missing) // (turns * max(1, workers)))
    rows = [missing[start : start + per_chunk] for start in range(0, len(missing), per_chunk)]
    loader = torch.utils.data.DataLoader(
        _Chunks(decode, rows, hashes, folder, side), batch_size=None, num_workers=workers,
        generator=torch.Generator(),  # else it would change the draws of dropout
    )  # fmt: skip
    message = f"decoding {len(missing):,} images, once"
    bar = tqdm(loader, desc=message, total=len(rows), delay=2, leave=False)
    return [row for failed in bar for row in failed]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with writing_cache(path):
            file = stack.enter_context(open(path, "a"))
        lock(file)  # without locks both processes decode
        yield
