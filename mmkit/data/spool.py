"""Local copies of shards that cannot be read in place: the output of a command, gzip.

Each is fetched once per machine, whatever the number of processes, and gets its name once it is
complete. Walk-through: notebooks/08_your_own_images.ipynb.
"""

import contextlib
import gzip
import hashlib
import os
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import Refused
from ..files import lock, open_to_read, renamed

BLOCK = 16_000_000  # bytes in memory while a shard is fetched
GZIP = b"\x1f\x8b"
PIPE = "pipe:"


class Spool:
    """A folder of fetched shards of at most `gigabytes` (10⁹ bytes); least recently used go first.

    A shard that is removed while a process reads it stays on the disk until that process closes
    it. Safe for many processes; picklable.
    """

    def __init__(self, folder: Path, gigabytes: float = 10.0):
        if not gigabytes > 0:
            raise ValueError(f"spool_gigabytes={gigabytes!r} must be above 0; try 10")
        self.folder, self.gigabytes = folder, gigabytes

    def open(self, url: str, identity: str) -> int:
        """A file descriptor of the uncompressed tar; the caller closes it.

        identity: text that changes with the shard (its path, size, time). Raises OSError if the
        command fails, `Refused` for damaged gzip, ValueError if the spool is too small.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.tar"
        # A separate empty file, since the lock must outlive the shard, which may be removed.
        with open(path.with_suffix(".lock"), "wb") as mine:
            lock(mine)
            while True:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)  # last used now
                    return open_to_read(path)
                self._fetch(url, path)

    def _fetch(self, url: str, path: Path) -> None:
        with renamed(path) as file:

            def write(block: bytes) -> None:
                file.write(block)
                file.flush()
                self._make_room(Path(file.name), url)

            _copy(url, write)

    def _make_room(self, part: Path, url: str) -> None:
        """Remove shards until all fit, including the one being written."""
        room = self.gigabytes * 1e9
        if part.stat().st_size > room:
            raise ValueError(
                f"shard {url} has more than {self.gigabytes:g} GB, the limit of the spool; "
                "raise spool_gigabytes, or make smaller shards"
            )
        files = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        too_much = sum(size for _, size, _ in files) - room
        for _, size, path in sorted(files):
            if too_much > 0 and path.suffix == ".tar":
                with contextlib.suppress(PermissionError):  # Windows: a process reads it
                    path.unlink(missing_ok=True)
                    too_much -= size


def _copy(url: str, write: Callable[[bytes], None]) -> None:
    """Write the bytes of a shard block by block, decompressed if they are gzip."""
    if url.startswith(PIPE):
        from webdataset.gopen import gopen  # 2 s, most of it torch

        stream: Any = gopen(url, "rb")
    else:
        stream = open(url, "rb")
    try:
        packed: Any = _Whole(stream)
        source: Any = gzip.GzipFile(fileobj=packed) if packed.head == GZIP else packed
        while block := source.read(BLOCK):
            write(block)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        remedy = "fetch it again or leave it out"
        raise Refused("damaged shard", f"shard {url}: gzip data: {error}; {remedy}") from None
    except OSError:
        if not _status(stream):
            raise
    finally:
        with contextlib.suppress(OSError):  # a failed command is reported below
            stream.close()
    # Not left to gopen, which ignores some statuses, and all of them under GOPEN_VERBOSE.
    if _status(stream):
        raise OSError(
            f"shard {url} cannot be fetched: the command ended with status {_status(stream)}; "
            "run it in a terminal to see what it says"
        )


def _status(stream) -> int | None:
    """The exit status of a command; None while it runs, and for a file."""
    process: subprocess.Popen | None = getattr(stream, "proc", None)
    return None if process is None else process.poll()


class _Whole:
    """A complete stream whose first two bytes can be inspected."""

    def __init__(self, stream):
        self.stream, self.head = stream, stream.read(2)
        self._rest = self.head

    def read(self, count: int) -> bytes:
        if self._rest:
            given, self._rest = self._rest[:count], self._rest[count:]
            return given
        return self.stream.read(count)
