"""WebDataset tar shards as a store of images, and as an output format.

`read_index` reads every shard once, headers and captions only. From then on a sample is (shard,
offset, size), which any process can read by itself. The number of samples is therefore exact, and
the order of an epoch, its division among processes and the position of a resumed run are functions
of row numbers, as for images in files. Nothing is extracted or unpickled.
Walk-through: notebooks/08_your_own_images.ipynb.
"""

import io
import json
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import Refused
from ..files import OpenFile, OpenFiles, cache_folder, pread, sync, unfinished_folder
from ..noise import mask_noise
from .dataset import MultimodalDataset
from .image_headers import Reading, open_head
from .loader import as_dataset
from .shard_index import (
    FOLDER_PATTERNS,
    Shard,
    ShardIndex,
    open_shard,
    shard_identity,
)
from .spool import Spool, is_address
from .tar_index import SAMPLE_ID

OPEN_SHARDS = 64  # per process; the system allows 1,024 files or so
# Suffixes by content. The JPEG of a phone with a second image in it is an MPO.
_SUFFIX_OF = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
_SUFFIX_OF |= {"TIFF": "tif", "PPM": "ppm"}
_ANY = Reading(max_pixels=10**12, max_aspect=10**6, max_bytes=10**12)  # reading limits, not writing


# -- reading images ------------------------------------------------------------------------


def _open(shard: Shard, spool: Spool, root: str) -> OpenFile:
    """Open an indexed shard if it has not changed since. root: the start of relative paths."""
    again = "build the data set again"
    url = shard.url if is_address(shard.url) else os.path.join(root, shard.url)
    try:
        if (identity := shard_identity(url)) != shard.identity:
            raise Refused("changed shard", f"shard {shard.url} has changed; {again}")
        file = OpenFile(open_shard(url, identity, spool)[0])
    except FileNotFoundError:
        raise FileNotFoundError(f"shard {shard.url} is gone; put it back, or {again}") from None
    if (size := os.fstat(file.number).st_size) != shard.size:
        raise Refused(
            "changed shard",
            f"shard {shard.url} has {size:,} bytes and had {shard.size:,} when it was indexed; "
            f"remove the folders {spool.folder} and {spool.folder.with_name('shards')} and {again}",
        )
    return file


class TarMembers:
    """The images of indexed shards: an `ImageStore`.

    max_bytes: a larger image is refused before it is read. cache_dir, spool_gigabytes: as in
    `read_index`. Each process opens a shard when it first reads from it.
    """

    def __init__(
        self,
        index: ShardIndex,
        max_bytes: int = 256_000_000,
        cache_dir: str | Path | None = None,
        spool_gigabytes: float = 10.0,
    ):
        self.keys, self.shards, self.max_bytes = index.keys, index.shards, max_bytes
        self.shard, self.offset, self.size = index.shard, index.offset, index.size
        self.spool = Spool(cache_folder(cache_dir) / "spool", spool_gigabytes)
        self._times: dict[int, str] = {}
        root = os.getcwd()  # relative paths stay valid if the process changes its folder
        self._opened = OpenFiles(partial(_open, spool=self.spool, root=root), OPEN_SHARDS)

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, i: int) -> str:
        """Shard and member."""
        return self.keys[i]

    def stamp(self, i: int) -> str:
        """Offset, size and time of the shard; "" for an address."""
        shard = int(self.shard[i])
        if shard not in self._times:  # an identity ends with the time of the file
            found = re.search(r", (\d+)\]$", self.shards[shard].identity)
            self._times[shard] = found.group(1) if found else ""
        time = self._times[shard]
        return f"{self.offset[i]} {self.size[i]}:{time}" if time else ""

    def order(self, rows: np.ndarray, noise: Tensor, steps: int, seed: int, epoch: int):
        """The batches of an epoch over these rows, see `shard_order`."""
        return shard_order(noise, self.shard[rows], steps, seed, epoch)

    def open(self, i: int) -> io.BytesIO:
        """The bytes of image i. Raises `Refused` and OSError, naming shard and member."""
        size, offset = int(self.size[i]), int(self.offset[i])
        if size > self.max_bytes:
            raise Refused(
                "image too large",
                f"{self.name(i)} has {size:,} bytes, more than max_bytes={self.max_bytes:,}; leave "
                "it out or raise max_bytes",
            )
        file = self._opened(self.shards[self.shard[i]])
        data = pread(file.number, size, file.start + offset)
        if len(data) < size:
            raise Refused(
                "changed shard",
                f"{self.name(i)}: the shard ends before byte {offset + size:,} but did not when it "
                "was indexed; build the data set again",
            )
        return io.BytesIO(data)


# -- order of an epoch -----------------------------------------------------------------------


def shard_order(
    noise: Tensor, shard: Tensor | np.ndarray, steps: int, seed: int, epoch: int, lanes: int = 16
) -> list[Tensor]:
    """The rows (int64) of each of `steps` batches of an epoch: every row once, shards mixed.

    noise (N,) uniform in [0, 1). shard (N,): shard numbers. Shards are permuted by seed and epoch
    and dealt to `lanes` lanes, which advance through the epoch in parallel: each reads its shards
    one after the other, the rows of a shard in the order of their noise. A batch takes rows of all
    lanes, sorted by lane; batch sizes differ by at most one. A batch therefore mixes rows of
    `lanes` shards, and a process, whose part of a batch is contiguous, has its own lanes and does
    not read the shards of others. The result depends only on the arguments, not on processes or
    workers. Raises ValueError for more steps than rows, lanes below 1, or unequal lengths.
    """
    shard = torch.as_tensor(shard).long()
    if noise.shape != shard.shape or noise.ndim != 1:
        raise ValueError(f"noise {tuple(noise.shape)} and shard {tuple(shard.shape)} must be (N,)")
    if not 1 <= steps <= len(shard):
        raise ValueError(f"steps={steps} must be 1 to {len(shard)}, the number of rows")
    if lanes < 1:
        raise ValueError(f"lanes={lanes} must be at least 1; try 16")
    numbers, which = shard.unique(return_inverse=True)
    rank = mask_noise(seed, epoch, numbers, 1, "shards")[:, 0].argsort(stable=True).argsort()
    turn = rank[which]  # (N,) position of a row's shard in the permuted order
    rows = noise.argsort(stable=True)
    rows = rows[turn[rows].argsort(stable=True)]  # by shard, then noise
    lane = turn % lanes
    rows = rows[lane[rows].argsort(stable=True)]  # by lane, then shard, then noise
    counts = lane.bincount(minlength=lanes)
    first = counts.cumsum(0) - counts
    along = torch.arange(len(rows)) - first[lane[rows]]  # position of a row in its lane
    when = (2 * along + 1).double() / (2 * counts[lane[rows]])  # as a fraction of the epoch
    rows = rows[when.argsort(stable=True)]
    return [part[lane[part].argsort(stable=True)] for part in rows.tensor_split(steps)]


# -- writing ---------------------------------------------------------------------------------


def write_shards(
    dataset: MultimodalDataset,
    folder: str | os.PathLike,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> list[Path]:
    """Write a data set as tar shards "00000.tar", …, for webdataset, open_clip and `from_shards`.

    A sample is named by its sample id in nine digits. It consists of the image's own bytes and of
    the caption as .txt, or of several as {"caption": [...]} in a .json, so that
    `text=("txt", "json.caption")` reads all of them back. Metadata (`meta`) are further keys of the
    .json, and so are sample ids that are not the row numbers; `from_shards` reads them from there.
    The same data set gives the same bytes. The shards get their names once all of them are written
    and synced.

    Args:
        dataset: the data to write, in the order of its rows.
        folder: where the shards are written; created if it is missing.
        samples_per_shard: at least 1; the last shard may have fewer.
        overwrite: replace the shards of an earlier call in this folder.

    Returns:
        The paths of the shards.

    Raises:
        FileExistsError: the folder has shards (with overwrite: of other names than these).
        ValueError: an id that occurs twice, an image that is unreadable or of an unusual format,
            or metadata that are not plain JSON values.

    Example:
        >>> [path.name for path in mm.write_shards(data, "shards", samples_per_shard=10)]
        ['00000.tar', '00001.tar', '00002.tar']
        >>> len(mm.from_shards("shards"))
        23
    """
    from webdataset import TarWriter

    folder, dataset = Path(folder), as_dataset(dataset, "dataset")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard} must be at least 1; try 1000")
    if len(dataset.sample_ids.unique()) < len(dataset):
        raise ValueError("a sample id occurs twice; take each row once, as readers skip the second")
    old = _shards_in_the_way(folder, overwrite)
    with_ids = dataset.sample_ids.tolist() != list(range(len(dataset)))
    digits = max(5, len(str((len(dataset) - 1) // samples_per_shard)))
    with unfinished_folder(folder, ".unfinished-") as unfinished:
        for number, start in enumerate(range(0, len(dataset), samples_per_shard)):
            path = unfinished / f"{number:0{digits}d}.tar"
            with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
                for row in range(len(dataset))[start : start + samples_per_shard]:
                    writer.write(_sample(dataset, row, with_ids))
            sync(path)
        for path in old:
            path.unlink()
        new = [path.rename(folder / path.name) for path in sorted(unfinished.iterdir())]
    sync(folder)
    return new


def _shards_in_the_way(folder: Path, overwrite: bool) -> list[Path]:
    """The shards to replace; raises FileExistsError if there are others, or if it may not."""
    there = [path for pattern in FOLDER_PATTERNS for path in sorted(folder.glob(pattern))]
    others = [path for path in there if not re.fullmatch(r"\d{5,}\.tar", path.name)]
    if others:
        raise FileExistsError(
            f"{folder} has other shards ({others[0].name}), which would be read together with the "
            "new ones; choose another folder"
        )
    if there and not overwrite:
        raise FileExistsError(
            f"{folder} has {len(there)} shards; choose another folder, or overwrite=True"
        )
    return there


def _sample(dataset: MultimodalDataset, row: int, with_id: bool) -> dict[str, str | bytes]:
    """The members of a sample by their suffixes, as webdataset writes them."""
    with dataset.image_file(row) as file:
        image = file.read()
    captions, number = dataset.texts[row], int(dataset.sample_ids[row])
    members: dict[str, str | bytes] = {"__key__": f"{number:09d}", _suffix(image, row): image}
    metadata: dict = _plain_metadata(dataset, row) | ({SAMPLE_ID: number} if with_id else {})
    if len(captions) == 1:
        members["txt"] = captions[0].encode()
    else:
        metadata = {"caption": captions} | metadata
    if metadata:
        members["json"] = json.dumps(metadata).encode()
    return members


def _plain_metadata(dataset: MultimodalDataset, row: int) -> dict:
    """The `meta` of a row, without its name in other shards."""
    name = dataset.image_name(row)
    metadata = {k: value for k, value in dataset.meta[row].items() if (k, value) != ("key", name)}
    for key, value in metadata.items():
        if key in ("caption", SAMPLE_ID):
            raise ValueError(
                f"meta of row {row} has the key {key!r}, which has another meaning in shards; "
                "give it another name"
            )
        if not isinstance(key, str) or not _is_plain(value):
            raise ValueError(
                f"meta of row {row}, {key!r}: {str(value)[:60]!r} ({type(value).__name__}) would "
                "not come back from JSON; make it a string or a number, or take it out of meta"
            )
    return metadata


def _is_plain(value) -> bool:
    """Does JSON return it unchanged? It does not for tuples, NaN, dates, or numbers as keys."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _suffix(image: bytes, row: int) -> str:
    """The suffix by content: the file name may be wrong, and a decoded image has none."""
    try:
        kind = open_head(io.BytesIO(image), f"of row {row}", _ANY).image.format
    except Refused:
        raise
    except Exception as error:  # whatever a decoder raises
        raise ValueError(
            f"the image of row {row} cannot be read ({error}); leave the row out"
        ) from None
    if kind not in _SUFFIX_OF:
        raise ValueError(
            f"the image of row {row} is {kind}, which readers of shards do not expect; save it "
            f"as one of {', '.join(_SUFFIX_OF)} first"
        )
    return _SUFFIX_OF[kind]
