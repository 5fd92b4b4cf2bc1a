"""The folder for files that can be made again: decoded pictures, rendered drawings, shards.

Whatever is put there gets its name only when it is whole, so that a killed run or a second process
never reads half of it. Walk-through: notebooks/01_data.ipynb.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder for cached files, made if need be: the given one, else $MMKIT_CACHE, else
    $XDG_CACHE_HOME/mmkit, else ~/.cache/mmkit.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmkit"
    folder = Path(cache_dir or os.environ.get("MMKIT_CACHE") or default).expanduser().absolute()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
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
def renamed(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with writing(path):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


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


def as_path(path) -> str:
    """The path as a string; ValueError for anything else, such as the number of an open file."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{path!r} is no path; give the name of a file or a folder")
    return str(os.fspath(path))
