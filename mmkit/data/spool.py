"""Local copies of shards that cannot be read in place: addresses (https://, s3://, hf://), gzip.

Each is fetched once per machine, whatever the number of processes, and gets its name once it is
complete. fsspec reads addresses; what it needs for one (s3fs, gcsfs) it names itself.
Walk-through: notebooks/08_your_own_images.ipynb.
"""

import contextlib
import gzip
import hashlib
import os
import zlib
from pathlib import Path
from typing import BinaryIO

import fsspec

from ..errors import Refused
from ..files import lock, renamed

BLOCK = 16_000_000  # bytes in memory while a shard is fetched
GZIP = b"\x1f\x8b"


def is_address(url: str) -> bool:
    """Is it an address, and not a path?"""
    return "://" in url


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
                    descriptor = os.open(path, os.O_RDONLY)
                    os.utime(path)  # last used now
                    return descriptor
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
                path.unlink(missing_ok=True)
                too_much -= size


@contextlib.contextmanager
def _unpacked(url: str):
    """The bytes of a path or an address, without gzip; OSError names what cannot be fetched."""
    packed = not is_address(url) or url.lower().endswith((".gz", ".tgz"))
    try:
        source: BinaryIO = fsspec.open(url, "rb", compression="gzip" if packed else None).open()
    except ImportError as error:
        raise OSError(f"shard {url} cannot be fetched: {error}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"shard {url} does not exist; check the address") from None
    with source:
        yield source
