"""Atomic writing of files, and the folder for cached files.

Every file is written under a temporary name in the same folder, synced and renamed. A kill or a
full disk therefore leaves the previous file intact, and no reader sees half a file.
Walk-through: notebooks/05_checkpoints.ipynb; the cache: notebooks/01_data.ipynb.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:
    msvcrt = None  # type: ignore[assignment]

WINDOWS = fcntl is None  # the rules of its files: no open file is renamed or removed
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # full disk, quota, limit of the process
_SEEKING = threading.Lock()
_LOCKED_BYTE = 0x7FFF0000  # behind the end of all files: Windows lets nobody read a locked byte
_UNFINISHED_SECONDS = 3600  # nobody writes one file for so long
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


# -- paths -----------------------------------------------------------------------------------


def as_path(path) -> str:
    """The path as a string; ValueError for anything else, such as the number of an open file."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{path!r} is not a path; give the name of a file or a folder")
    return str(os.fspath(path))


def shown(path: str | os.PathLike) -> str:
    """A path as messages show it: relative to the working folder where it lies below that."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(path).absolute().relative_to(Path.cwd()))
    return os.fspath(path)


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder for cached files, created if it is missing.

    It is the given one, else $MMKIT_CACHE, else $XDG_CACHE_HOME/mmkit, else ~/.cache/mmkit.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmkit"
    folder = Path(cache_dir or os.environ.get("MMKIT_CACHE") or default).expanduser().absolute()
    with writing_cache(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


# -- atomic writing --------------------------------------------------------------------------


@contextlib.contextmanager
def renamed(path: Path) -> Iterator[BinaryIO]:
    """A new file that gets the name `path` once it is complete and on the disk.

    Until then it is locked and has a temporary name in the same folder. The system releases the
    lock when the process ends, however that happens: a temporary file without a lock is stale and
    is removed when `path` is written next. A process number in the name could not tell this, since
    numbers are reused.
    """
    _remove_stale(path)
    file, temporary = _temporary(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if WINDOWS:
                file.close()
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _temporary(path: Path) -> tuple[BinaryIO, Path]:
    """A new temporary file that is locked and was not removed as stale before the lock."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        file = open(temporary, "xb")
        lock(file)
        if os.fstat(file.fileno()).st_nlink:
            return file, temporary
        file.close()


def _remove_stale(path: Path) -> None:
    """Remove the unfinished files of killed processes; files still being written are locked."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if WINDOWS:  # a file between its closing and its renaming has no lock
                if left.stat().st_mtime < time.time() - _UNFINISHED_SECONDS:
                    left.unlink()
                continue
            with open(left, "rb") as file:
                if lock(file, wait=False):
                    left.unlink()


@contextlib.contextmanager
def unfinished_folder(folder: Path, prefix: str) -> Iterator[Path]:
    """An absolute temporary folder within `folder`, removed at the end with what is left in it.

    Its user renames the finished files out of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.absolute()))
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sync(path: str | os.PathLike) -> None:
    """Return once a file is on the disk; for a folder, once the names in it are."""
    if WINDOWS and os.path.isdir(path):
        return  # it opens no folders
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO | int, wait: bool = True) -> bool | None:
    """Lock an open file until it is closed; False if another process holds the lock.

    None means that this system has no locks. The system releases the lock when its process ends,
    however that happens.
    """
    if msvcrt is not None:
        return _lock_on_windows(file if isinstance(file, int) else file.fileno(), wait)
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _lock_on_windows(number: int, wait: bool) -> bool | None:
    """Lock one byte of an open file, behind its end."""
    position = os.lseek(number, 0, os.SEEK_CUR)
    while True:
        try:
            os.lseek(number, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            return True
        except OSError as error:
            if error.errno != errno.EACCES:  # a file system without locks
                return None
            if not wait:
                return False
            time.sleep(0.05)  # LK_LOCK, which waits, gives up after ten seconds
        finally:
            os.lseek(number, position, os.SEEK_SET)


def write_atomically(state: dict | bytes, path: str | os.PathLike) -> None:
    """`torch.save` that leaves either the old file or the complete new one, never a part.

    Bytes are written unchanged. Returns once the file and its name are on the disk. Raises OSError
    with the system's errno and a message that names the file, its size and a remedy.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with renamed(path) as file:
            file.write(state) if isinstance(state, bytes) else torch.save(state, file)
        sync(path.parent)  # the rename itself
    except (OSError, RuntimeError) as error:
        if (reason := _disk_error(error)) is None:
            raise
        kept = f"the earlier {path.name} is intact" if path.is_file() else "there is no earlier one"
        kept += ", and no unfinished file remains"
        raise _explained(reason, path, f"It takes {_size(state) / 1e6:.1f} MB, ", kept) from error


# -- reading by offset -----------------------------------------------------------------------


def open_to_read(path: str | os.PathLike) -> int:
    """A file descriptor that gives the bytes as they are, on Windows, too."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def pread(number: int, count: int, offset: int) -> bytes:
    """Up to `count` bytes of an open file from an offset on: os.pread, where there is one."""
    if hasattr(os, "pread"):
        return os.pread(number, count, offset)
    with _SEEKING:  # a system whose reads need a file position
        os.lseek(number, offset, os.SEEK_SET)
        return os.read(number, count)


class OpenFile:
    """A file descriptor that is closed with its last reader; the data begin at `start`.

    Reading by offset needs no file position, so threads and forked processes may share it.
    """

    def __init__(self, number: int, start: int = 0):
        self.number, self.start = number, start

    def __del__(self):
        os.close(self.number)


def read_at(file: OpenFile, offset: int, buffer) -> int:
    """Read bytes at an offset into a buffer; how many were read (fewer at the end of the file)."""
    if hasattr(os, "preadv"):
        return os.preadv(file.number, [buffer], file.start + offset)
    found = pread(file.number, memoryview(buffer).nbytes, file.start + offset)
    memoryview(buffer).cast("B")[: len(found)] = found
    return len(found)


class OpenFiles:
    """The `most` files that were read last; a pickled copy opens its own.

    A file that others displace stays open until its readers are done.
    """

    def __init__(self, open_file: Callable[[Any], OpenFile], most: int):
        self._made_with = open_file, most
        self._opened = lru_cache(most)(open_file)

    def __call__(self, what) -> OpenFile:
        """The file of an argument of `open_file`, opened if necessary."""
        return self._opened(what)

    def __reduce__(self):
        return OpenFiles, self._made_with


# -- error messages --------------------------------------------------------------------------


@contextlib.contextmanager
def writing_cache(path: Path) -> Iterator[None]:
    """Make an OSError while the cache is written name the file and a remedy."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"the cache cannot write {path} ({error.strerror}); give cache_dir=… (or set "
            "MMKIT_CACHE to) a writable folder with enough space, or cache_gigabytes=0",
        ) from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make an OSError while a file of a run is written name the file and a remedy."""
    try:
        yield
    except OSError as error:
        raise _explained(error, path) from error


def _disk_error(error: OSError | RuntimeError) -> OSError | None:
    """The OSError behind an error of `torch.save`; None where the disk is not at fault.

    When a write fails, its zip writer raises a RuntimeError of its own on top of the OSError.
    """
    if isinstance(error, OSError):
        return error
    if not re.search("inline_container|PytorchStreamWriter|iostream", str(error)):
        return None
    below: BaseException | None = error
    while below is not None and not isinstance(below, OSError):
        below = below.__context__
    return below or OSError(errno.EIO, "")


def _explained(reason: OSError, path: Path, wanted: str = "", kept: str = "") -> OSError:
    """The same error with a message that says what is lost (nothing) and what to do."""
    remedy, number = "check that folder and its disk", reason.errno or errno.EIO
    if number in _NO_ROOM:
        remedy = "free some space, set output_dir to another disk, or keep fewer (keep_last)"
    elif number in _NOT_ALLOWED:
        remedy = "set output_dir to a folder that you may write to, or change its permissions"
        if WINDOWS:
            remedy += "; if another program has the file open (TensorBoard?), close it"
    free = shutil.disk_usage(_existing(path.parent)).free / 1e6
    return OSError(
        number,
        f"cannot write {shown(path)}: {os.strerror(number)}. {wanted}{free:.1f} MB are free "
        f"there{f'; {kept}' if kept else ''}. To go on: {remedy}",
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _size(state) -> int:
    """Bytes of the tensors in nested dicts and lists; shared memory counts once."""
    if isinstance(state, bytes):
        return len(state)
    storages, rest = {}, [state]
    while rest:
        value = rest.pop()
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            rest.extend(value.values())
        elif isinstance(value, list | tuple):
            rest.extend(value)
    return sum(storages.values())
