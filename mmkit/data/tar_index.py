"""The index of one tar shard: names, captions, and the position of the bytes of each image.

It takes one pass over the headers by the standard library's `tarfile` (100,000 members in 2 s).
Captions are read, images are not, and nothing is ever extracted or unpickled: only members of the
named suffixes are read at all. A tar may come from anyone, so every number in it is checked.
Walk-through: notebooks/08_your_own_images.ipynb.
"""

import json
import os
import re
import tarfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import Refused
from ..files import pread

SHARD_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
SAMPLE_ID = "mmkit_sample_id"  # the key of the id in the .json of our own shards
HEADER_BYTES = 64 * 1024  # of a member with long name and pax records; tar writers need 2 KB
CAPTION_BYTES = 1_000_000  # a novel; more is a mistake or an attack
DAMAGED = ("not a tar", "truncated shard", "damaged shard")  # reasons for which a shard is refused
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_META = re.compile(r"__[^/]*__($|/)")  # webdataset uses such names for its own metadata


@dataclass(frozen=True)
class Suffixes:
    """The suffixes of the members of a sample that are read; all others are ignored.

    image: the first of these that a sample has is its image. text: (suffix, None) for a member
    that is a caption, (suffix, key) for a JSON object with one or several captions under that key.
    meta: keys of the .json that are metadata of the image.
    """

    image: tuple[str, ...]
    text: tuple[tuple[str, str | None], ...]
    meta: tuple[str, ...] = ()

    @classmethod
    def named(
        cls, image: str | Sequence[str], text: str | Sequence[str], meta: Sequence[str] = ()
    ) -> "Suffixes":
        """From names such as "jpg", ("jpg", "png"), "txt", "json.caption"; ValueError for none."""
        images = [image] if isinstance(image, str) else list(image)
        texts = [text] if isinstance(text, str) else list(text)
        if not images or not texts or not all([*images, *texts]):
            raise ValueError(
                f"image={image!r}, text={text!r}: name at least one suffix of each, such as "
                'image="jpg" and text="txt" (or text="json.caption", a key of the .json)'
            )
        fields = []
        for name in texts:
            is_json = name.lower().startswith("json.")
            fields.append(("json", name[5:]) if is_json else (name.lower().lstrip("."), None))
        names = tuple(name.lower().lstrip(".") for name in images)
        return cls(names, tuple(fields), tuple(meta))

    @cached_property
    def read(self) -> set[str]:
        """All suffixes whose members are read and checked."""
        asked = {"json"} if self.meta else set()
        return {*self.image, *(suffix for suffix, _ in self.text), *asked}


@dataclass
class TarIndex:
    """The samples of one tar in order, and (reason, message) of each refused sample."""

    names: list[str] = field(default_factory=list)  # of the image's member
    captions: list[list[str]] = field(default_factory=list)  # as they were found
    offset: list[int] = field(default_factory=list)  # bytes from the start of the tar
    size: list[int] = field(default_factory=list)  # bytes of the image
    meta: list[dict] = field(default_factory=list)  # the keys that were asked for and exist
    ids: list[int | None] = field(default_factory=list)  # in our own shards; None elsewhere
    keys: list[str] = field(default_factory=list)  # of the first .json that is read
    refused: list[tuple[str, str]] = field(default_factory=list)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member: the key ends at the first dot of the base name.

    "a/000.seg.png" has key "a/000" and suffix "seg.png", as in webdataset. None for a member that
    belongs to no sample: no dot, or nothing before or after it.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and suffix else None


def scan_tar(fd: int, suffixes: Suffixes) -> TarIndex:
    """Index an open, uncompressed tar.

    The members of a sample must follow each other; a sample whose name has occurred before is
    refused. Complete samples before a damaged or truncated position are indexed, the rest counts as
    one refused row. Raises `Refused` if the first header is not that of a tar, OSError if the disk
    fails.
    """
    index, sample, seen = TarIndex(), None, dict[str, set[str]]()
    members, apart = _members(fd), False
    try:
        for member in members:
            if member is None:  # where another tar begins
                if sample is not None:
                    sample.finish(fd, index)
                sample = None
                continue
            parts = None if _META.match(member.name) or member.isdir() else split_name(member.name)
            if parts is None:
                continue
            key, suffix = parts
            if sample is None or key != sample.key:
                if sample is not None:
                    sample.finish(fd, index)
                sample = _Sample(key, suffixes, again=key in seen)
            apart |= suffix not in seen.setdefault(key, {suffix}) and sample.again
            seen[key].add(suffix)
            sample.add(suffix, member)
    except Refused as damage:
        if sample is not None and sample.complete():
            sample.finish(fd, index)
        if damage.reason == "not a tar":
            raise
        kept = f"the samples before that ({len(index.names):,}) are kept"
        index.refused.append((damage.reason, f"{damage}; {kept}; fetch it again or leave it out"))
    else:
        if sample is not None:
            sample.finish(fd, index)
    if apart:
        why = "; its members are not together: sort them, as tar --sort=name does"
        index.refused = [(reason, message + why) for reason, message in index.refused]
    return index


# -- one sample ------------------------------------------------------------------------------


class _Sample:
    """The members of one key, collected until the next key begins."""

    def __init__(self, key: str, suffixes: Suffixes, again: bool):
        self.key, self.suffixes = key, suffixes
        self.parts: dict[str, tarfile.TarInfo] = {}
        self.others: list[str] = []  # suffixes that are not read
        self.note: tarfile.TarInfo | None = None  # a .json that nobody asked for
        self.problem: tuple[str, str] | None = None
        self.again = again
        if again:
            self.refuse("two samples of one name", "a sample of this name has occurred before")

    def refuse(self, reason: str, message: str) -> None:
        """Refuse this sample; the first reason counts."""
        self.problem = self.problem or (reason, f"{self.key[:80]!r}: {message}")

    def add(self, suffix: str, member: tarfile.TarInfo) -> None:
        """Add a member, or refuse the sample because of it."""
        name = member.name
        if name.startswith("/") or ".." in name.split("/") or _CONTROL.search(name):
            self.refuse("hostile name", f"member {name[:80]!r} names no path within the shard")
        if suffix not in self.suffixes.read:
            self.others = [*self.others, suffix][:8]
            self.note = member if suffix == "json" and member.isreg() else self.note
        elif not member.isreg() or member.issparse():
            self.refuse("not a file", f"member .{suffix} is a link, a device or a sparse file")
        elif suffix in self.parts:
            self.refuse("two samples of one name", f"it has two members .{suffix}")
        else:
            self.parts[suffix] = member

    def image(self) -> tarfile.TarInfo | None:
        """The member with the image."""
        return next((self.parts[s] for s in self.suffixes.image if s in self.parts), None)

    def complete(self) -> bool:
        """Is nothing missing, as far as is known before the next key begins?"""
        has_text = any(suffix in self.parts for suffix, _ in self.suffixes.text)
        return self.problem is not None or (self.image() is not None and has_text)

    def finish(self, fd: int, index: TarIndex) -> None:
        """Append this sample to the index, or to its refused samples."""
        image = self.image()
        if image is None:
            self._refuse_lack("image", self.suffixes.image)
        captions = [] if self.problem else self._captions(fd)
        metadata = {} if self.problem else self._metadata(fd)
        if self.problem or image is None:
            index.refused.append(self.problem)  # type: ignore
            return
        index.names.append(image.name)
        index.captions.append(captions)
        index.meta.append({key: metadata[key] for key in self.suffixes.meta if key in metadata})
        index.ids.append(_sample_id(metadata))
        index.keys = index.keys or [key for key in metadata if key != SAMPLE_ID][:100]
        index.offset.append(image.offset_data)
        index.size.append(image.size)

    def _refuse_lack(self, what: str, wanted: Sequence[str]) -> None:
        has = ", ".join(f".{s[:20]}" for s in [*self.parts, *self.others]) or "nothing else"
        named = ", ".join(f".{s}" for s in wanted)
        self.refuse(f"no {what}", f"it has no {what} ({named}), but {has}")

    def _captions(self, fd: int) -> list[str]:
        """The captions of all members named for them; refuse the sample if one is unreadable."""
        captions: list[str] = []
        for suffix, key in self.suffixes.text:
            if (text := self._text(fd, suffix)) is None:
                continue
            try:
                captions += [text] if key is None else _captions_of(text, key)
                "".join(captions).encode()  # JSON can contain lone surrogates: "\ud800"
            except (ValueError, RecursionError) as error:
                self.refuse("caption not readable", f"member .{suffix}: {str(error)[:120]}")
        if self.problem:
            return []
        if not captions:
            self._refuse_lack("caption", [".".join(filter(None, t)) for t in self.suffixes.text])
        return captions

    def _text(self, fd: int, suffix: str) -> str | None:
        """The text of a member; None if there is none, or if it is refused."""
        if (member := self.parts.get(suffix)) is None:
            return None
        if member.size > CAPTION_BYTES:
            size = f"{member.size:,} bytes, more than {CAPTION_BYTES:,}"
            self.refuse("caption too long", f"member .{suffix} has {size}")
            return None
        try:
            return pread(fd, member.size, member.offset_data).decode("utf-8-sig")
        except ValueError as error:
            self.refuse("caption not readable", f"member .{suffix}: {str(error)[:120]}")
            return None

    def _metadata(self, fd: int) -> dict:
        """The .json of the sample; {} without one, or for another value that was not asked for."""
        asked, note = self.suffixes.meta, self.note
        if note is not None:
            if note.size > CAPTION_BYTES:
                return {}
            data = pread(fd, note.size, note.offset_data)
            text = data.decode("utf-8-sig", "replace") if SAMPLE_ID.encode() in data else None
        else:
            text = self._text(fd, "json")
        try:
            metadata = json.loads(text or "{}")
            if asked and not isinstance(metadata, dict):
                raise ValueError(f"it is {type(metadata).__name__}, not an object with keys")
            if asked:
                json.dumps([[[[[metadata]]]]])  # the index nests it this deep in JSON
        except (ValueError, RecursionError) as error:
            if asked:
                self.refuse("metadata not readable", f"member .json: {str(error)[:120]}")
            return {}
        return metadata if isinstance(metadata, dict) else {}


def _sample_id(metadata: dict) -> int | None:
    """The id that `write_shards` wrote, if any."""
    number = metadata.get(SAMPLE_ID)
    return number if type(number) is int and 0 <= number < 2**63 else None


def _captions_of(text: str, key: str) -> list[str]:
    """The string, or list of strings, under a key of a JSON object; [] without that key."""
    found = json.loads(text)
    value = found.get(key) if isinstance(found, dict) else None
    captions = [value] if isinstance(value, str) else value or []
    if not isinstance(captions, list) or any(not isinstance(c, str) for c in captions):
        raise ValueError(f"{key!r} holds neither a string nor a list of strings")
    return captions


# -- headers ---------------------------------------------------------------------------------


class _Headers:
    """The tar as `tarfile` reads it: at most HEADER_BYTES for one member.

    tarfile trusts the length in a header: gigabytes of pax records, endless lists of the holes of
    a sparse file, a negative size, which reads everything.
    """

    def __init__(self, fd: int):
        self.fd, self.size, self.position = fd, os.fstat(fd).st_size, 0
        self.left, self.cut_off = HEADER_BYTES, False

    def past_the_end(self) -> tarfile.ReadError:
        """The error for a member that is not complete."""
        self.cut_off = True
        return tarfile.ReadError("a member reaches past the end")

    def tell(self) -> int:
        """The position, in bytes."""
        return self.position

    def seek(self, position: int) -> None:
        """Go to a position within the file."""
        if not 0 <= position < self.size:
            raise self.past_the_end()
        self.position = position

    def read(self, count: int) -> bytes:
        """Read `count` bytes, within the limit of the member."""
        if not 0 <= count <= self.left:
            raise tarfile.ReadError(f"a header of more than {HEADER_BYTES:,} bytes")
        data = pread(self.fd, count, self.position)
        self.left -= count
        self.position += len(data)
        self.cut_off = len(data) < count
        return data


def _members(fd: int) -> Iterator[tarfile.TarInfo | None]:
    """The members of a tar, or of several one after the other (cat a.tar b.tar), in order.

    None stands after each tar. Raises `Refused` at the first damaged position.
    """
    headers, start = _Headers(fd), 0
    while start < headers.size or not start:
        headers.position, headers.left = start, HEADER_BYTES
        end = yield from _members_of_one(fd, headers)
        yield None
        start = _after_zeros(fd, end)


def _after_zeros(fd: int, position: int) -> int:
    """The position of the first block that is not only zeros; the size of the file without one."""
    while data := pread(fd, 2**20, position):
        if rest := data.lstrip(b"\0"):
            return position + (len(data) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        position += len(data)
    return position


def _members_of_one(fd: int, headers: "_Headers") -> Generator[tarfile.TarInfo, None, int]:
    """The members of the tar at this position; returns where the zeros begin that end it."""
    count, end = 0, headers.position
    try:
        tar: Any = tarfile.TarFile(fileobj=headers, errors="backslashreplace")  # type: ignore
        while (member := tar.next()) is not None:
            count += 1
            stored = member.size if member.isreg() and not member.issparse() else 0
            if tar.offset <= end or stored < 0:  # else an endless loop (CVE-2025-8194)
                raise tarfile.ReadError("a size below zero")
            if member.offset_data + stored > headers.size:
                raise headers.past_the_end()
            yield member
            end = tar.offset
            tar.members.clear()  # tarfile keeps all of them, and global records
            tar.pax_headers = {}
            headers.left = HEADER_BYTES
    except OSError:
        raise
    except Exception as error:  # tarfile: IndexError, OverflowError, … from a damaged header
        raise _damage(headers, count, end, headers.cut_off, str(error)) from None
    # tarfile treats anything that is not a header as the end.
    rest = pread(fd, tarfile.BLOCKSIZE, tar.offset)
    if not count or len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        why = "no header, and not the zeros that end a tar"
        raise _damage(headers, count or end, end, len(rest) < tarfile.BLOCKSIZE, why)
    return int(tar.offset)


def _damage(headers: _Headers, count: int, end: int, cut_off: bool, why: str) -> Refused:
    if not count:
        return Refused("not a tar", _what_instead(headers))
    if cut_off:
        return Refused("truncated shard", f"the tar is cut off after {headers.size:,} bytes")
    return Refused("damaged shard", f"the tar is damaged after byte {end:,} ({why})")


_COMPRESSED = {b"\xfd7zXZ\0": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}


def _what_instead(headers: _Headers) -> str:
    start = pread(headers.fd, 40, 0)
    for mark, name in _COMPRESSED.items():
        if start.startswith(mark):
            return f"it is compressed by {name}; unpack it (only gzip is read as it is)"
    seems = "an empty file" if not headers.size else f"it begins {start!r}"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        seems = "it is a web page, perhaps with the reason for a failed download"
    elif start and not start.strip(b"\0"):
        seems = "it has no members"
    return f"this is not a tar ({seems}); fetch it again or leave it out"
