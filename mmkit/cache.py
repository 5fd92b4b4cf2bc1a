"""The folder for files that can be made again: decoded pictures, rendered drawings, shards.

Whatever is put there gets its name only when it is whole, so that a killed run or a second process
never reads half of it. Walk-through: notebooks/01_data.ipynb.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder for cached files, made if need be: the given one, else $MMKIT_CACHE, else
    $XDG_CACHE_HOME/mmkit, else ~/.cache/mmkit.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmkit"
    folder = Path(cache_dir or os.environ.get("MMKIT_CACHE") or default).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def renamed(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
