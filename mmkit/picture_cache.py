"""Pictures decoded once, into files that all processes share.

The pictures of a data set are cut into chunks of 32 MB. A chunk's file is keyed by the content of
its pictures (not by their names), by size and by how they are read, and gets its name only when it
is complete; so a second run, a second process or a copy of the data finds it, and a killed one
never leaves half of it. Nothing is ever removed from the folder: it says its size, and the user
may empty it at any time.
Walk-through: notebooks/08_your_own_pictures.ipynb.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
from tqdm import tqdm

from .cache import cache_folder, renamed, writing
from .picture_files import PictureStore, Refused

CHUNK_BYTES = 32_000_000
OPEN_CHUNKS = 128  # per data set and process; the system allows 1,024 files or so
FREE_SHARE = 0.8  # of the disk's free room that a cache may take


# ---- content -------------------------------------------------------------------------------------


def content_hash(store: PictureStore, i: int) -> str:
    """32 hex digits of the bytes of picture i; of a picture that cannot be opened, of its name."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with store.open(i) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except (OSError, ValueError):
        digest.update(f"unreadable {store.name(i)}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def content_hashes(
    store: PictureStore, rows: Sequence[int], cache_dir: str | os.PathLike | None = None
) -> list[str]:
    """`content_hash` of each of these pictures; one whose stamp has not changed is not read again.

    They are remembered, by name and stamp (size and time of change), in one small data base.
    """
    # sqlite takes no half letters, which stand for the bytes of file names that are no text
    names = [
        (store.name(i).encode("utf-8", "backslashreplace").decode(), store.stamp(i)) for i in rows
    ]
    with contextlib.closing(_memory(cache_dir)) as memory:
        known = _recall(memory, [name for name, stamp in names if stamp])
        hashes, new = [], []
        just_now = time.time_ns() - 2_000_000_000  # may change once more within one tick
        for i, (name, stamp) in zip(rows, names, strict=True):
            remembered = known.get(name, ("", ""))
            if stamp and remembered[0] == stamp:
                hashes.append(remembered[1])
                continue
            hashes.append(content_hash(store, i))
            if stamp and int(stamp.rpartition(":")[2]) < just_now:
                new.append((name, stamp, hashes[-1]))
        if new:
            with contextlib.suppress(sqlite3.Error):  # a full disk: then it is read again
                memory.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", new)
                memory.commit()
    return hashes


def _memory(cache_dir: str | os.PathLike | None) -> sqlite3.Connection:
    """The data base of remembered hashes; a damaged one is made anew, or kept in memory only."""
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


# ---- the decoded pictures ------------------------------------------------------------------------


class _Chunk:
    """An open chunk file, closed when nobody reads it any more.

    Reading by offset needs no place in the file: threads and forked processes may share it.
    """

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)
        with open(self.number, "rb", closefd=False) as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            self.start = file.tell()

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


class CachedPictures:
    """uint8 (N, 3, S, S) in chunk files; `pictures[rows]` gives an array of these rows.

    What is read comes from the system's own cache of the files, which all processes share; a
    process keeps nothing of it. (Mapped into memory, each touch of a picture would count up to 2 MB
    around it as this process's own: Linux maps whole folios.)
    """

    def __init__(self, paths: list[Path], per_chunk: int, count: int, side: int):
        self.paths, self.per_chunk = paths, per_chunk
        self.shape = (count, 3, side, side)
        self.folder, self.nbytes = paths[0].parent, count * 3 * side * side
        self._start()

    def _start(self) -> None:
        self._opened = functools.lru_cache(OPEN_CHUNKS)(_Chunk)

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_opened"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._start()

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        size = self.nbytes // self.shape[0]
        for picture, row in zip(out, np.asarray(rows).tolist(), strict=True):
            number, place = divmod(row, self.per_chunk)
            chunk = self._opened(self.paths[number])  # ours until we are done, though evicted
            if os.preadv(chunk.number, [picture], chunk.start + place * size) < size:
                path = self.paths[number]
                raise OSError(f"{path} was cut off while in use; remove it and start again")
        return out


Decode = Callable[[int], np.ndarray]  # row -> uint8 (3, S, S); raises Refused or OSError


class _Chunks(torch.utils.data.Dataset):
    """Item k: chunk k is decoded and written."""

    def __init__(self, decode: Decode, rows: list[range], paths: list[Path], side: int):
        self.decode, self.rows, self.paths, self.side = decode, rows, paths, side

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> int:
        pixels = np.zeros((len(self.rows[k]), 3, self.side, self.side), np.uint8)
        failed = []
        for place, row in enumerate(self.rows[k]):
            try:
                pixels[place] = self.decode(row)
            except (Refused, OSError):
                failed.append(place)
        with renamed(_failed(self.paths[k])) as file:
            file.write(json.dumps(failed).encode())
        with renamed(self.paths[k]) as file:  # last: it says that all is there
            np.save(file, pixels)
        return k

    def complete(self, k: int) -> bool:
        """Whether chunk k is there; one that something has cut since is not, nor one with a
        picture that can be decoded by now (a disk or memory was at its end then).
        """
        path, pixels = self.paths[k], 3 * self.side * self.side * len(self.rows[k])
        if not path.is_file() or path.stat().st_size <= pixels:
            return False
        try:
            failed = json.loads(_failed(path).read_text())
        except (OSError, ValueError):
            return False
        return not any(self.decodes(self.rows[k][place]) for place in failed)

    def decodes(self, row: int) -> bool:
        try:
            self.decode(row)
        except (Refused, OSError):
            return False
        return True


def _failed(path: Path) -> Path:
    """The file beside a chunk that lists its places with no picture."""
    return path.with_suffix(".json")


def room_for(count: int, side: int, max_gigabytes: float, cache_dir=None) -> str:
    """ "" where so many pictures may be cached, else why not, in words."""
    needed = count * 3 * side * side / 1e9
    try:
        free = shutil.disk_usage(cache_folder(cache_dir)).free / 1e9
    except OSError as error:
        return str(error.strerror)
    if needed > max_gigabytes:
        return f"{needed:.1f} GB decoded is more than cache_gigabytes={max_gigabytes:g}"
    if needed > FREE_SHARE * free:
        return f"{needed:.1f} GB decoded is too much for {free:.1f} GB of free disk"
    return ""


def decode_once(
    hashes: list[str],
    decode: Decode,
    side: int,
    how: str,
    num_workers: int = 0,
    cache_dir: str | os.PathLike | None = None,
) -> tuple[CachedPictures, list[int]]:
    """Pictures from the cache, those that are not there yet decoded into it by worker processes.

    hashes: of the content of each picture. how: what else the pixels depend on. Returns the
    pictures, and the numbers of those that could not be decoded, which are black there.
    """
    folder = cache_folder(cache_dir) / "pictures"
    with writing(folder):
        folder.mkdir(exist_ok=True)
    per_chunk = max(1, CHUNK_BYTES // (3 * side * side))
    starts = range(0, len(hashes), per_chunk)
    rows = [range(start, min(start + per_chunk, len(hashes))) for start in starts]
    tail = f"{side} {how} pillow {PIL.__version__} torch {torch.__version__}"
    keys = [" ".join([*hashes[r.start : r.stop], tail]).encode() for r in rows]
    names = [f"{hashlib.blake2b(key, digest_size=16).hexdigest()}.npy" for key in keys]
    chunks = _Chunks(decode, rows, [folder / name for name in names], side)
    if not all(map(chunks.complete, range(len(chunks)))):
        with _locked(folder / f"{names[0]}.lock"):  # one process decodes, the others then find it
            missing = [k for k in range(len(chunks)) if not chunks.complete(k)]
            _decode_chunks(chunks, missing, num_workers)
    failed = [
        chunk.start + place
        for chunk, path in zip(rows, chunks.paths, strict=True)
        for place in json.loads(_failed(path).read_text())
    ]
    return CachedPictures(chunks.paths, per_chunk, len(hashes), side), failed


def _decode_chunks(chunks: _Chunks, missing: list[int], num_workers: int) -> None:
    if not missing:
        return
    loader = torch.utils.data.DataLoader(
        chunks, sampler=missing, batch_size=None, num_workers=min(num_workers, len(missing)),
        generator=torch.Generator(),  # or it would move the draws of dropout
    )  # fmt: skip
    words = f"decoding {sum(len(chunks.rows[k]) for k in missing):,} pictures, once"
    for _ in tqdm(loader, desc=words, total=len(missing), delay=2, leave=False):
        pass


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with writing(path):
            file = stack.enter_context(open(path, "a"))
        with contextlib.suppress(OSError):  # a file system without locks: then both decode
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
