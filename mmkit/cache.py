"""The folder for files that can be made again: rendered drawings, indexes of shards, shards.

Whatever is put there gets its name only when it is whole, so that a killed run or a second process
never reads half of it. Walk-through: notebooks/01_data.ipynb.
"""

import os
import uuid
from pathlib import Path


def cache_folder(cache_dir: str | Path | None) -> Path:
    """The folder for rendered files, made if need be: the given one, or as `openmoji()` says."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmkit"
    folder = Path(cache_dir or os.environ.get("MMKIT_CACHE") or default).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file beside its place, sync, rename: the old file or the whole new one."""
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
