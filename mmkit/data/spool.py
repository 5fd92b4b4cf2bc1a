"""Local copies of shards that cannot be read in place: addresses (https://, s3://, hf://), gzip.

Each is fetched once per machine, whatever the number of processes, and gets its name once it is
complete. Addresses other than http(s) are read by fsspec, which names the package that it needs
(s3fs, gcsfs).
Walk-through: notebooks/08_your_own_images.ipynb.
"""

import contextlib
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import fsspec

from ..errors import Refused
from ..files import lock, open_to_read, renamed

BLOCK = 16_000_000  # bytes in memory while a shard is fetched
GZIP = b"\x1f\x8b"
WEB = ("http://", "https://")


def is_address(url: str) -> bool:
    """Is it an address, and not a path?"""
    return "://" in url


def file_system(url: str) -> tuple[Any, str]:
    """(fsspec's file system of an address, the path in it); OSError names a missing package."""
    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise OSError(f"shard {url} cannot be fetched: {error}") from None


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

        identity: text that changes with the shard (its path, size, time). Raises OSError if it
        cannot be fetched, `Refused` for damaged gzip, ValueError if the spool is too small.
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
        with renamed(path) as file, _unpacked(url) as source:
            try:
                while block := source.read(BLOCK):
                    file.write(block)
                    file.flush()
                    self._make_room(Path(file.name), url)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                why = f"shard {url}: gzip data: {error}; fetch it again or leave it out"
                raise Refused("damaged shard", why) from None

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


@contextlib.contextmanager
def _unpacked(url: str) -> Iterator[Any]:
    """The bytes of a path or an address, without gzip; OSError names what cannot be fetched."""
    try:
        if url.startswith(WEB):
            source: Any = urlopen(url, timeout=60)
        else:
            system, path = file_system(url)
            source = system.open(path, "rb")
    except (OSError, ValueError) as error:
        raise OSError(f"shard {url} cannot be fetched: {error}") from None
    with source:
        packed = not is_address(url) or url.lower().endswith((".gz", ".tgz"))
        yield gzip.GzipFile(fileobj=source) if packed else source
        if getattr(source, "length", 0):  # of an HTTP response: bytes that have not come
            raise OSError(f"shard {url} cannot be fetched: the connection was closed too early")
