"""Stores of encoded images: files, members of tar shards, cells of a table.

A store gives for image i its `name(i)` in messages and, by `open(i)`, its bytes as a binary file.
Nothing here decodes.
Walk-through: notebooks/08_your_own_images.ipynb.
"""

import io
import os
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Protocol, cast

from PIL import Image

from ..errors import Refused


class ImageStore(Protocol):
    """What a data set needs from a store of its images."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """The name of image i in messages; images with the same name are the same."""
        ...

    def open(self, i: int) -> BinaryIO:
        """The bytes of image i; raises OSError or `Refused`."""
        ...

    def stamp(self, i: int) -> str:
        """A text that changes if its bytes may have, "…:time in ns"; "" where that is unknown."""
        ...


class Files:
    """Images in files of their own."""

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self.paths = [os.fspath(path) for path in paths]
        self._root = os.getcwd()  # relative paths stay valid if the process changes its folder

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """The path."""
        return self.paths[i]

    def open(self, i: int, buffering: int = -1) -> BinaryIO:
        """The file, opened for reading."""
        path = os.path.join(self._root, self.paths[i])
        return cast(BinaryIO, open(path, "rb", buffering=buffering))

    def stamp(self, i: int) -> str:
        """Size and times of the file; "" if it cannot be read."""
        try:
            status = os.stat(os.path.join(self._root, self.paths[i]))
        except (OSError, ValueError):
            return ""
        # tar, rsync and cp -p set the time of writing, but nothing sets the time of change
        return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


class Cells:
    """Images in the cells of a column: bytes, {"bytes", "path"}, PIL images, or paths.

    Args:
        cells: one for each image; anything that is indexed by a row.
        source: name of the column in messages.
        find: makes the path in a cell the path of a file; (path, name in messages).
    """

    def __init__(self, cells: Sequence, source: str, find: Callable[[Any, str], str]):
        self.cells, self.source, self.find = cells, source, find

    def __len__(self) -> int:
        return len(self.cells)

    def name(self, i: int) -> str:
        """Source and row."""
        return f"{self.source} of row {i}"

    def stamp(self, i: int) -> str:
        """Not known."""
        return ""

    def open(self, i: int) -> BinaryIO:
        """The bytes of image i; raises OSError or `Refused`."""
        value = self.cells[i]
        path = value
        if isinstance(value, dict):
            path, value = value.get("path"), value.get("bytes")
        if isinstance(value, Image.Image):
            file = io.BytesIO()
            value.save(file, value.format or "PNG")
            value = file.getvalue()
        if isinstance(value, bytes | bytearray):
            return io.BytesIO(value)
        if path is None:
            raise Refused("no image", f"{self.name(i)} is empty")
        if isinstance(path, str | os.PathLike):
            return open(self.find(path, self.name(i)), "rb")
        raise Refused("no image", f"{self.name(i)} holds {type(value).__name__}, not an image")


def checked_files(paths: Sequence[str | os.PathLike], count: int) -> Files:
    """The `Files` of `count` rows, one each; raises the errors of `MultimodalDataset`."""
    for row, path in enumerate(paths):
        if not isinstance(path, str | os.PathLike):
            raise ValueError(f"the image of row {row} is {path!r}; give the path of a file")
    files = Files(paths)
    if len(files) != count:
        raise ValueError(
            f"{len(files)} image_paths but {count} texts; give one text (or one list of texts) per "
            "image"
        )
    for row, path in enumerate(files.paths):
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"image {path} (row {row}) does not exist; check the path or leave it out"
            )
    return files
