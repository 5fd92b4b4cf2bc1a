"""Find shards and index their samples.

Every shard is read once, headers and captions only, and its index is stored on the disk. From then
on a sample is (shard, offset, size).
Walk-through: notebooks/08_your_own_images.ipynb.
"""

import glob
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import Refused
from ..files import as_path, cache_folder, open_to_read, pread, renamed, writing_cache
from .spool import GZIP, WEB, Spool, file_system, is_address
from .tar_index import SHARD_IMAGE_SUFFIXES, Suffixes, TarIndex, scan_tar

FOLDER_PATTERNS = ("*.tar", "*.tar.gz", "*.tgz")
_VERSION = 4  # of the cached indexes: increase it when the same shard would give another index


# -- which shards ----------------------------------------------------------------------------


def expand_urls(source: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """The shards that one or several names denote, in order.

    A name is a file, a folder (its *.tar and *.tar.gz, sorted) or an address that fsspec knows
    ("https://…", "s3://…", "hf://datasets/…"); names may have globs, and braces as in
    "cc3m/{00000..00331}.tar". Raises FileNotFoundError for files that do not exist, ValueError for
    no shard at all or the same one twice.
    """
    single = isinstance(source, str | bytes | os.PathLike) or not isinstance(source, Iterable)
    names: list = [source] if single else [*source]  # type: ignore[misc]
    urls = [url for name in names for url in _expand(as_path(name))]
    if not urls:
        raise ValueError("no shard is named; give the path of a .tar, a folder or a glob")
    if len(set(urls)) < len(urls):
        twice = next(url for i, url in enumerate(urls) if url in urls[:i])
        raise ValueError(f"shard {twice} is named twice; name it once, or every sample is doubled")
    return urls


def _expand(name: str) -> Iterator[str]:
    if name.startswith("pipe:"):
        raise ValueError(
            f"{name}: commands are no longer run; give the address itself (https://, s3://, gs://, "
            "hf://), or the path of a file that the command has written"
        )
    if os.path.exists(name := name if is_address(name) else os.path.expanduser(name)):
        yield from _shards_of(name)  # before braces, since a file may be called {a}.tar
        return
    for one in _alternatives(name):
        if one.startswith(WEB) or (is_address(one) and not glob.has_magic(one)):
            yield one
            continue
        paths = [one] if os.path.exists(one) else _fitting(one)
        if not paths:
            what = "no file fits" if glob.has_magic(one) else "there is no file"
            where = "" if one == name else f" (of {name})"
            raise FileNotFoundError(f"shards: {what} {one}{where}; check the path")
        for path in paths:
            yield from [path] if is_address(path) else _shards_of(path)


def _fitting(pattern: str) -> list[str]:
    """The files that a glob denotes, also at an address."""
    if not is_address(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    system, path = file_system(pattern)
    return sorted(system.unstrip_protocol(found) for found in system.glob(path))


def _alternatives(name: str) -> list[str]:
    """The names that braces denote, as in webdataset; unbalanced braces are letters."""
    from braceexpand import braceexpand

    if "{" not in name:  # braceexpand removes backslashes
        return [name]
    try:
        return list(braceexpand(name, escape=os.sep != "\\"))  # paths of Windows have them
    except ValueError:
        return [name]


def name_of(source: str | os.PathLike | Sequence[str | os.PathLike]) -> str:
    """The name of the shards in messages: the given name, or the first of several."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    names = [os.fspath(name) for name in source]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _shards_of(path: str) -> list[str]:
    """The file itself, or the shards of a folder."""
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise ValueError(f"{path} is neither a file nor a folder; write it to a file first")
    found = sorted(str(p) for pattern in FOLDER_PATTERNS for p in Path(path).glob(pattern))
    if not found:
        raise FileNotFoundError(
            f"folder {path} has no shards ({', '.join(FOLDER_PATTERNS)}); check the path"
        )
    return found


# -- their samples ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One shard as it was when it was indexed."""

    url: str  # a path or an address
    identity: str  # text that changes when the shard does
    spooled: bool  # read from a copy: of an address, or of gzip
    size: int  # bytes of the tar, unpacked


@dataclass
class ShardIndex:
    """The N samples of all shards, in the order of the shards."""

    shards: list[Shard]
    keys: list[str]  # N names, "cc3m/00000.tar: 000000012.jpg"
    captions: list[list[str]]  # of each sample, unchanged
    shard: np.ndarray  # (N,) int32, index in `shards`
    offset: np.ndarray  # (N,) int64, bytes from the start of the tar
    size: np.ndarray  # (N,) int64, bytes of the image
    meta: list[dict]  # of each sample: the keys that were asked for and are in its .json
    ids: list[int | None]  # of each sample, if `write_shards` wrote one
    fields: list[str]  # keys of the first .json that is read in each shard
    refused: list[Refused]  # samples that are not among the N, with reasons

    def __len__(self) -> int:
        return len(self.keys)


def read_index(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    image: str | Sequence[str] = SHARD_IMAGE_SUFFIXES,
    text: str | Sequence[str] = "txt",
    meta: Sequence[str] = (),
    cache_dir: str | Path | None = None,
    spool_gigabytes: float = 10.0,
    on_error: str = "raise",
) -> ShardIndex:
    """Index shards: every sample is either a row or refused.

    source: as `expand_urls` takes it. image: suffixes; the first that a sample has is its image.
    text: "txt" for a member that is one caption, "json.caption" for a string or a list of strings
    in a JSON member, or several of these, which are all read. meta: keys of the .json that are
    metadata of the image. spool_gigabytes: disk space for copies of addresses and gzip.
    on_error: "skip" counts a file that is not a tar as refused.

    Indexes are stored, one small file per shard, in the folder `cache_dir` (see `openmoji()`),
    until the shard changes; the content of a web address is assumed not to change.

    Raises FileNotFoundError for a shard that does not exist, `Refused` (a ValueError) for a file
    that is not a tar, OSError for an address that cannot be fetched.
    """
    suffixes = Suffixes.named(image, text, meta)
    folder = cache_folder(cache_dir)
    spool = Spool(folder / "spool", spool_gigabytes)
    bar = tqdm(expand_urls(source), desc="indexing shards", delay=1, leave=False)
    found, refused = [], []
    for url in bar:
        try:
            found.append(_index_shard(url, suffixes, folder / "shards", spool))
        except Refused as error:
            if on_error == "raise":
                raise
            refused.append(error)
    pairs = [(shard, part, i) for shard, part in found for i in range(len(part.names))]
    counts = [len(part.names) for _, part in found]
    return ShardIndex(
        shards=[shard for shard, _ in found],
        keys=[f"{shard.url}: {part.names[i]}" for shard, part, i in pairs],
        captions=[captions for _, part in found for captions in part.captions],
        shard=np.repeat(np.arange(len(found), dtype=np.int32), counts),
        offset=np.array([n for _, part in found for n in part.offset], np.int64),
        size=np.array([n for _, part in found for n in part.size], np.int64),
        meta=[metadata for _, part in found for metadata in part.meta],
        ids=[number for _, part in found for number in part.ids],
        fields=list(dict.fromkeys(key for _, part in found for key in part.keys)),
        refused=refused
        + [
            Refused(reason, f"{shard.url}: {message}")
            for shard, part in found
            for reason, message in part.refused
        ],
    )


def _index_shard(
    url: str, suffixes: Suffixes, folder: Path, spool: Spool
) -> tuple[Shard, TarIndex]:
    """The index of a shard, from the cache if the shard has not changed, else by reading it."""
    identity = shard_identity(url)
    key = json.dumps([_VERSION, identity, suffixes.image, suffixes.text, suffixes.meta])
    cached = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if (known := _read_cached(cached)) is not None:
        return Shard(url, identity, *known[0]), known[1]
    descriptor, spooled = open_shard(url, identity, spool)
    try:
        size = os.fstat(descriptor).st_size
        index = scan_tar(descriptor, suffixes)
    except Refused as error:
        raise Refused(error.reason, f"shard {url}: {error}") from None
    finally:
        os.close(descriptor)
    folder.mkdir(exist_ok=True)
    data = json.dumps([[spooled, size], vars(index)]).encode()
    with writing_cache(cached), renamed(cached) as file:
        file.write(b"%08x\n" % zlib.crc32(data) + data)
    return Shard(url, identity, spooled, size), index


def _read_cached(path: Path) -> tuple[tuple[bool, int], TarIndex] | None:
    """The content of a cache file; None if it does not exist or is damaged."""
    try:
        checksum, _, data = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if not data or checksum != b"%08x" % zlib.crc32(data):
        return None
    properties, index = json.loads(data)
    return tuple(properties), TarIndex(**index)


def shard_identity(url: str) -> str:
    """What fsspec knows of an address; path, size in bytes and time of a file."""
    if url.startswith(WEB):
        return json.dumps([url])
    if is_address(url):
        system, path = file_system(url)
        if not system.exists(path):
            raise FileNotFoundError(f"shard {url} does not exist; check the address")
        return json.dumps([url, system.ukey(path)])
    status = os.stat(url)
    return json.dumps([os.path.realpath(url), status.st_size, status.st_mtime_ns])


def open_shard(url: str, identity: str, spool: Spool) -> tuple[int, bool]:
    """(a file descriptor of the uncompressed tar, whether it is a copy in the spool)."""
    if is_address(url):
        return spool.open(url, identity), True
    descriptor = open_to_read(url)
    if pread(descriptor, len(GZIP), 0) != GZIP:
        return descriptor, False
    os.close(descriptor)
    return spool.open(os.path.realpath(url), identity), True
