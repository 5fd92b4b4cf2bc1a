"""Files that are whole or absent, and the folder for those that can be made again.

Every file is written under a temporary name in the same folder, synced and renamed, so that a kill
or a full disk leaves the previous one whole, and nobody reads half of one.
Walk-through: notebooks/05_checkpoints.ipynb; the cache: notebooks/01_data.ipynb.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # disk, quota, or the process's own limit
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


# -- paths -----------------------------------------------------------------------------------


def as_path(path) -> str:
    """The path as a string; ValueError for anything else, such as the number of an open file."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{path!r} is no path; give the name of a file or a folder")
    return str(os.fspath(path))


def shown(path: str | os.PathLike) -> str:
    """A path as messages give it: from the working folder on, where it lies below that."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(path).absolute().relative_to(Path.cwd()))
    return os.fspath(path)


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder for cached files, made if need be: the given one, else $MMKIT_CACHE, else
    $XDG_CACHE_HOME/mmkit, else ~/.cache/mmkit.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmkit"
    folder = Path(cache_dir or os.environ.get("MMKIT_CACHE") or default).expanduser().absolute()
    with writing_cache(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


# -- whole or absent -------------------------------------------------------------------------


@contextlib.contextmanager
def renamed(path: Path) -> Iterator[BinaryIO]:
    """A new file that gets the name `path` when it is whole and on the disk.

    Until then it is locked and has a temporary name beside it. The system takes the lock away with
    the process, however that ends: a temporary file without one is stale, and goes when `path` is
    written next. A name by process number could not tell, as numbers are used again.
    """
    _remove_stale(path)
    file, temporary = _temporary(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:  # Windows renames no open file
                file.close()
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _temporary(path: Path) -> tuple[BinaryIO, Path]:
    """A new file that is ours: locked, and not removed as stale just before it was."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        file = open(temporary, "xb")
        lock(file)
        if os.fstat(file.fileno()).st_nlink:
            return file, temporary
        file.close()


def _remove_stale(path: Path) -> None:
    """Remove what killed processes left half-written; files still being written are locked."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError), open(left, "rb") as file:
            if lock(file, wait=False):
                left.unlink()


@contextlib.contextmanager
def unfinished_folder(folder: Path, prefix: str) -> Iterator[Path]:
    """A folder within `folder`, absolute, from which whole files are renamed; gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.absolute()))
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sync(path: str | os.PathLike) -> None:
    """Return when a file is on the disk; of a folder, when the names in it are."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO | int, wait: bool = True) -> bool | None:
    """Lock an open file until it is closed; False where another one has it, None = no locks here.

    The system takes a lock away with the process that has it, however that ends.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def write_atomically(state: dict | bytes, path: str | os.PathLike) -> None:
    """`torch.save` that leaves either the old file or the whole new one, never a part.

    Bytes are written as they are. Returns when file and name are on the disk. Raises OSError, with
    the system's errno, that says which file could not be written, how much room it wants, and what
    to do.
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
        kept = f"the earlier {path.name} is whole" if path.is_file() else "there is no earlier one"
        kept += ", and nothing half-written stays"
        raise _in_words(reason, path, f"It takes {_size(state) / 1e6:.1f} MB, ", kept) from error


# -- reading by offset -----------------------------------------------------------------------


class OpenFile:
    """A file descriptor, closed when nobody reads the file any more; data begins at `start`.

    Reading by offset needs no place in the file: threads and forked processes may share it.
    """

    def __init__(self, number: int, start: int = 0):
        self.number, self.start = number, start

    def __del__(self):
        os.close(self.number)


class OpenFiles:
    """The files that were read last, `most` of them; what is pickled opens its own.

    Calling it with an argument of `open_file` gives the file, opened if need be. One that others
    displace stays open until its readers are done.
    """

    def __init__(self, open_file: Callable[[Any], OpenFile], most: int):
        self._made_with = open_file, most
        self._opened = lru_cache(most)(open_file)

    def __call__(self, what) -> OpenFile:
        return self._opened(what)

    def __reduce__(self):
        return OpenFiles, self._made_with


# -- errors in words -------------------------------------------------------------------------


@contextlib.contextmanager
def writing_cache(path: Path) -> Iterator[None]:
    """An OSError while the cache is written says which file it was, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"the cache cannot write {path} ({error.strerror}); give cache_dir=… (or set "
            "MMKIT_CACHE to) a folder with room that can be written, or cache_gigabytes=0",
        ) from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError while a file of a run is written says which file it was, and what to do."""
    try:
        yield
    except OSError as error:
        raise _in_words(error, path) from error


def _disk_error(error: OSError | RuntimeError) -> OSError | None:
    """The OSError behind what `torch.save` raised; None where the disk is not at fault.

    Its zip writer, when a write fails, raises a RuntimeError of its own on top of the OSError.
    """
    if isinstance(error, OSError):
        return error
    if not re.search("inline_container|PytorchStreamWriter|iostream", str(error)):
        return None
    below: BaseException | None = error
    while below is not None and not isinstance(below, OSError):
        below = below.__context__
    return below or OSError(errno.EIO, "")


def _in_words(reason: OSError, path: Path, wanted: str = "", kept: str = "") -> OSError:
    """The same error, saying what is lost (nothing) and what to do."""
    remedy, number = "check that folder and its disk", reason.errno or errno.EIO
    if number in _NO_ROOM:
        remedy = "free some space, set output_dir to another disk, or keep fewer (keep_last)"
    elif number in _NOT_ALLOWED:
        remedy = "set output_dir to a folder that you may write to, or give it the right to be"
    free = shutil.disk_usage(_existing(path.parent)).free / 1e6
    return OSError(
        number,
        f"cannot write {shown(path)}: {os.strerror(number)}. {wanted}{free:.1f} MB are free "
        f"there{f'; {kept}' if kept else ''}. To go on: {remedy}",
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def _size(state) -> int:
    """Bytes of the tensors in nested dicts and lists, memory that several share counted once."""
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
