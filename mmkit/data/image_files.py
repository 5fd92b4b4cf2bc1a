"""Where pictures lie: in files, in members of tar shards, in a column of a table.

Such a store of pictures answers two questions about picture i: `name(i)`, what a message calls it,
and `open(i)`, its bytes as a binary file. Nothing here decodes.
Walk-through: notebooks/08_your_own_pictures.ipynb.
"""

import os
from collections.abc import Sequence
from typing import BinaryIO, Protocol, cast


class PictureStore(Protocol):
    """What a data set asks of the place its pictures lie in."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What a message calls picture i; files with this name are the same picture."""
        ...

    def open(self, i: int) -> BinaryIO:
        """The bytes of picture i; raises OSError or `Refused`."""
        ...

    def stamp(self, i: int) -> str:
        """What changes whenever its bytes may have, "…:time in ns"; "" where nobody knows."""
        ...


class Files:
    """Pictures in files of their own."""

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self.paths = [os.fspath(path) for path in paths]
        self._root = os.getcwd()  # relative paths go on from here, wherever the process goes

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return self.paths[i]

    def open(self, i: int, buffering: int = -1) -> BinaryIO:
        path = os.path.join(self._root, self.paths[i])
        return cast(BinaryIO, open(path, "rb", buffering=buffering))

    def stamp(self, i: int) -> str:
        try:
            facts = os.stat(os.path.join(self._root, self.paths[i]))
        except (OSError, ValueError):
            return ""
        # the time of change cannot be set, as that of writing is by tar, rsync and cp -p
        return f"{facts.st_size}:{facts.st_mtime_ns}:{facts.st_ctime_ns}"


def checked_files(paths: Sequence[str | os.PathLike], count: int) -> Files:
    """The `Files` of `count` rows, one each; raises what `MultimodalDataset` says."""
    for row, path in enumerate(paths):
        if not isinstance(path, str | os.PathLike):
            raise ValueError(f"the picture of row {row} is {path!r}; give the path of a file")
    files = Files(paths)
    if len(files) != count:
        raise ValueError(
            f"{len(files)} image_paths but {count} texts; give one text (or one list of texts) per "
            "picture"
        )
    for row, path in enumerate(files.paths):
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"picture {path} (row {row}) does not exist; check the path or leave it out"
            )
    return files
