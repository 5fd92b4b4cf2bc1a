"""What is in one tar shard: names, captions, and where the bytes of each picture lie.

One pass over the headers, by the standard library's `tarfile` (100,000 members in 2 s). Captions
are read, pictures are not, and nothing is ever extracted or unpickled: only members of the named
suffixes are read at all. A tar is somebody else's file, so every number in it is checked.
Walk-through: notebooks/08_your_own_pictures.ipynb.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import Refused

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
SAMPLE_ID = "mmkit_sample_id"  # the key under which our own shards keep it, in the .json
HEADER_BYTES = 64 * 1024  # of one member, its long name and its pax records: tar writers need 2 KB
CAPTION_BYTES = 1_000_000  # a novel; more is a mistake or an attack
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_META = re.compile(r"__[^/]*__($|/)")  # webdataset keeps its own notes under such names


@dataclass(frozen=True)
class Suffixes:
    """Which members of a sample are read; all others are left alone.

    image: the first of these that a sample has is its picture. text: (suffix, None) for a member
    that is a caption, (suffix, key) for a JSON object that holds one or several under that key.
    meta: keys of the .json that are facts about the picture.
    """

    image: tuple[str, ...]
    text: tuple[tuple[str, str | None], ...]
    meta: tuple[str, ...] = ()

    @classmethod
    def named(
        cls, image: str | Sequence[str], text: str | Sequence[str], meta: Sequence[str] = ()
    ) -> "Suffixes":
        """From "jpg", ("jpg", "png"), "txt", "json.caption"; ValueError where one is missing."""
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
        """All suffixes whose members must be in order."""
        asked = {"json"} if self.meta else set()
        return {*self.image, *(suffix for suffix, _ in self.text), *asked}


@dataclass
class TarIndex:
    """The samples of one tar in order, and what was refused: (reason, message) of each."""

    names: list[str] = field(default_factory=list)  # of the picture's member
    captions: list[list[str]] = field(default_factory=list)  # as they were found
    offset: list[int] = field(default_factory=list)  # bytes from the start of the tar
    size: list[int] = field(default_factory=list)  # bytes of the picture
    meta: list[dict] = field(default_factory=list)  # of the keys asked for, those that are there
    ids: list[int | None] = field(default_factory=list)  # in our own shards; None elsewhere
    keys: list[str] = field(default_factory=list)  # of the first .json that is read
    refused: list[tuple[str, str]] = field(default_factory=list)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member: the key ends at the first dot of the base name.

    "a/000.seg.png" is sample "a/000", suffix "seg.png", as webdataset has it. None for a member
    that belongs to no sample: no dot, or nothing before or after it.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and suffix else None


def scan_tar(fd: int, suffixes: Suffixes) -> TarIndex:
    """Index an open, uncompressed tar.

    Members of one sample follow each other; a sample of a name that was there before is refused.
    What is whole before a damaged or cut-off place is indexed, the rest is one refusal. Raises
    `Refused` where not even the first header is a tar's, OSError where the disk fails.
    """
    index, sample, seen = TarIndex(), None, set[str]()
    members = _members(fd)
    try:
        for member in members:
            parts = None if _META.match(member.name) or member.isdir() else split_name(member.name)
            if parts is None:
                continue
            key, suffix = parts
            if sample is None or key != sample.key:
                if sample is not None:
                    sample.finish(fd, index)
                sample = _Sample(key, suffixes, again=key in seen)
                seen.add(key)
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
    return index


# -- one sample ------------------------------------------------------------------------------


class _Sample:
    """The members of one name, until the next name begins."""

    def __init__(self, key: str, suffixes: Suffixes, again: bool):
        self.key, self.suffixes = key, suffixes
        self.parts: dict[str, tarfile.TarInfo] = {}
        self.others: list[str] = []  # suffixes that are not read
        self.note: tarfile.TarInfo | None = None  # a .json that nobody asked for
        self.problem: tuple[str, str] | None = None
        if again:
            self.refuse("two samples of one name", "a sample of this name was there before")

    def refuse(self, reason: str, message: str) -> None:
        """The first reason stays."""
        self.problem = self.problem or (reason, f"{self.key[:80]!r}: {message}")

    def add(self, suffix: str, member: tarfile.TarInfo) -> None:
        name = member.name
        if name.startswith("/") or ".." in name.split("/") or _CONTROL.search(name):
            self.refuse("hostile name", f"member {name[:80]!r} names no place within the shard")
        if suffix not in self.suffixes.read:
            self.others = [*self.others, suffix][:8]
            self.note = member if suffix == "json" and member.isreg() else self.note
        elif not member.isreg() or member.issparse():
            self.refuse("not a file", f"member .{suffix} is a link, a device or a sparse file")
        elif suffix in self.parts:
            self.refuse("two samples of one name", f"it has two members .{suffix}")
        else:
            self.parts[suffix] = member

    def picture(self) -> tarfile.TarInfo | None:
        return next((self.parts[s] for s in self.suffixes.image if s in self.parts), None)

    def complete(self) -> bool:
        """Is nothing missing, so far as can be told before the next name is there?"""
        has_text = any(suffix in self.parts for suffix, _ in self.suffixes.text)
        return self.problem is not None or (self.picture() is not None and has_text)

    def finish(self, fd: int, index: TarIndex) -> None:
        """Append this sample to what is indexed, or to what is refused."""
        picture = self.picture()
        if picture is None:
            self._refuse_lack("picture", self.suffixes.image)
        captions = [] if self.problem else self._captions(fd)
        facts = {} if self.problem else self._facts(fd)
        if self.problem or picture is None:
            index.refused.append(self.problem)  # type: ignore
            return
        index.names.append(picture.name)
        index.captions.append(captions)
        index.meta.append({key: facts[key] for key in self.suffixes.meta if key in facts})
        index.ids.append(_sample_id(facts))
        index.keys = index.keys or [key for key in facts if key != SAMPLE_ID][:100]
        index.offset.append(picture.offset_data)
        index.size.append(picture.size)

    def _refuse_lack(self, what: str, wanted: Sequence[str]) -> None:
        has = ", ".join(f".{s[:20]}" for s in [*self.parts, *self.others]) or "nothing else"
        named = ", ".join(f".{s}" for s in wanted)
        self.refuse(f"no {what}", f"it has no {what} ({named}), but {has}")

    def _captions(self, fd: int) -> list[str]:
        """The captions of all members named for it; a problem is noted where one is unreadable."""
        captions: list[str] = []
        for suffix, key in self.suffixes.text:
            if (text := self._text(fd, suffix)) is None:
                continue
            try:
                captions += [text] if key is None else _captions_of(text, key)
                "".join(captions).encode()  # JSON can write halves of characters: "\ud800"
            except (ValueError, RecursionError) as error:
                self.refuse("caption not readable", f"member .{suffix}: {str(error)[:120]}")
        if self.problem:
            return []
        if not captions:
            self._refuse_lack("caption", [".".join(filter(None, t)) for t in self.suffixes.text])
        return captions

    def _text(self, fd: int, suffix: str) -> str | None:
        """What a member says; None where there is none, or a problem, which is noted."""
        if (member := self.parts.get(suffix)) is None:
            return None
        if member.size > CAPTION_BYTES:
            size = f"{member.size:,} bytes, more than {CAPTION_BYTES:,}"
            self.refuse("caption too long", f"member .{suffix} has {size}")
            return None
        try:
            return os.pread(fd, member.size, member.offset_data).decode("utf-8-sig")
        except ValueError as error:
            self.refuse("caption not readable", f"member .{suffix}: {str(error)[:120]}")
            return None

    def _facts(self, fd: int) -> dict:
        """The .json of the sample; one that nobody asked for may be anything, and is {} then."""
        asked, note = self.suffixes.meta, self.note
        if note is not None:
            if note.size > CAPTION_BYTES:
                return {}
            data = os.pread(fd, note.size, note.offset_data)
            text = data.decode("utf-8-sig", "replace") if SAMPLE_ID.encode() in data else None
        else:
            text = self._text(fd, "json")
        try:
            facts = json.loads(text or "{}")
            if asked and not isinstance(facts, dict):
                raise ValueError(f"it is {type(facts).__name__}, not an object with keys")
            if asked:
                json.dumps([[[[[facts]]]]])  # the index is JSON, too, and deeper by so much
        except (ValueError, RecursionError) as error:
            if asked:
                self.refuse("facts not readable", f"member .json: {str(error)[:120]}")
            return {}
        return facts if isinstance(facts, dict) else {}


def _sample_id(facts: dict) -> int | None:
    """The id that `write_shards` wrote, where it did."""
    number = facts.get(SAMPLE_ID)
    return number if type(number) is int and 0 <= number < 2**63 else None


def _captions_of(text: str, key: str) -> list[str]:
    """The string, or list of strings, under a key of a JSON object; none where there is no key."""
    found = json.loads(text)
    value = found.get(key) if isinstance(found, dict) else None
    captions = [value] if isinstance(value, str) else value or []
    if not isinstance(captions, list) or any(not isinstance(c, str) for c in captions):
        raise ValueError(f"{key!r} holds neither a string nor a list of strings")
    return captions


# -- headers ---------------------------------------------------------------------------------


class _Headers:
    """The tar as `tarfile` sees it: HEADER_BYTES at most for one member.

    tarfile believes what a header says of its own length: gigabytes of pax records, endless lists
    of a sparse file's holes, a size below zero, which reads everything.
    """

    def __init__(self, fd: int):
        self.fd, self.size, self.place = fd, os.fstat(fd).st_size, 0
        self.left, self.cut_off = HEADER_BYTES, False

    def past_the_end(self) -> tarfile.ReadError:
        self.cut_off = True
        return tarfile.ReadError("a member reaches past the end")

    def tell(self) -> int:
        return self.place

    def seek(self, place: int) -> None:
        if not 0 <= place < self.size:
            raise self.past_the_end()
        self.place = place

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise tarfile.ReadError(f"a header of more than {HEADER_BYTES:,} bytes")
        data = os.pread(self.fd, count, self.place)
        self.left -= count
        self.place += len(data)
        self.cut_off = len(data) < count
        return data


def _members(fd: int) -> Iterator[tarfile.TarInfo]:
    """The members of a tar in order; raises `Refused` at the first damaged place."""
    headers, count, end = _Headers(fd), 0, 0
    try:
        tar: Any = tarfile.TarFile(fileobj=headers, errors="backslashreplace")  # type: ignore
        while (member := tar.next()) is not None:
            count += 1
            stored = member.size if member.isreg() and not member.issparse() else 0
            if tar.offset <= end or stored < 0:  # or one header is read for ever (CVE-2025-8194)
                raise tarfile.ReadError("a size below zero")
            if member.offset_data + stored > headers.size:
                raise headers.past_the_end()
            yield member
            end = tar.offset
            tar.members.clear()  # tarfile keeps them all, and every global record
            tar.pax_headers = {}
            headers.left = HEADER_BYTES
    except OSError:
        raise
    except Exception as error:  # tarfile: IndexError, OverflowError, … from a damaged header
        raise _damage(headers, count, end, headers.cut_off, str(error)) from None
    # tarfile takes whatever is not a header for the end.
    rest = os.pread(fd, 1_000_000, tar.offset)
    if not count or len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        why = "no header, and not the zeros that end a tar"
        raise _damage(headers, count, end, len(rest) < tarfile.BLOCKSIZE, why)


def _damage(headers: _Headers, count: int, end: int, cut_off: bool, why: str) -> Refused:
    if not count:
        return Refused("not a tar", _what_instead(headers))
    if cut_off:
        return Refused("truncated shard", f"the tar is cut off after {headers.size:,} bytes")
    return Refused("damaged shard", f"the tar is damaged after byte {end:,} ({why})")


_COMPRESSED = {b"\xfd7zXZ\0": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}


def _what_instead(headers: _Headers) -> str:
    start = os.pread(headers.fd, 40, 0)
    for mark, name in _COMPRESSED.items():
        if start.startswith(mark):
            command = f"{name} -dc FILE"
            return f"it is compressed by {name}; unpack it, or give 'pipe:{command}' (gzip is read)"
    seems = "an empty file" if not headers.size else f"it begins {start!r}"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        seems = "it is a web page, perhaps one that says why there was no download"
    elif start and not start.strip(b"\0"):
        seems = "it has no members"
    return f"this is no tar ({seems}); fetch it again or leave it out"
