"""Tar files, member by member, and the samples in them."""

import io
import tarfile
from pathlib import Path


def image(i: int) -> bytes:
    """Not a real image, since nothing here decodes; the tests of `write_shards` have real ones."""
    return b"image %d " % i * (i % 7 + 1)


def member(name: str, data: bytes = b"", **metadata) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in metadata.items():
        setattr(info, key, value)
    return info, data


def pair(key: str, i: int = 0, caption: str = "a cat") -> list:
    return [member(f"{key}.jpg", image(i)), member(f"{key}.txt", caption.encode())]


def write_tar(path: Path, members: list, **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def reasons(index) -> list[str]:
    return [refused.reason for refused in index.refused]
