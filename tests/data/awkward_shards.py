"""Awkward, broken and hostile tar shards."""

import io
import tarfile
from pathlib import Path

import mmkit as mm
from tests.data.awkward import GREEN, Case, Maker, captions, noise, one_colour, source

GOOD = [("a.png", one_colour("PNG")), ("a.txt", b"one")]
SECOND = [("b.png", one_colour("PNG", colour=GREEN)), ("b.txt", b"two")]
CODE = b"cos\nsystem\n(S'touch started'\ntR."  # what a pickle may contain


def packed(*members, mode: str = "w", cut: int | None = None) -> bytes:
    """A tar of (name, bytes or link type and target), the first `cut` bytes of it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()[:cut]


def shard(content: bytes, name: str = "s.tar", **how) -> Maker:
    def prepare(folder: Path):
        (folder / name).write_bytes(content)
        return lambda **options: mm.from_shards(folder / name, **how, **options)

    return source(prepare)


SHARDS = [
    Case("a shard", shard(packed(*GOOD, *SECOND)), "load", check=captions("one", "two")),
    Case("a shard in gzip", shard(packed(*GOOD, *SECOND, mode="w:gz"), "s.tar.gz"), "load",
         check=captions("one", "two")),
    Case("a member that others would unpickle",
         shard(packed(*GOOD, ("b.pyd", CODE), ("b.pkl", CODE), *SECOND)), "load",
         check=captions("one", "two")),
    Case("a shard, a caption in JSON",
         shard(packed(*GOOD, SECOND[0], ("b.json", b'{"caption": ["two", "three"]}'))), "load",
         check=captions("one", ["two", "three"])),
    Case("a shard, captions behind a byte order mark",
         shard(packed(*GOOD[:1], ("a.txt", b"\xef\xbb\xbfone"), SECOND[0],
                      ("b.json", b'\xef\xbb\xbf{"caption": "two", "n": 7}')), meta=["n"]), "load",
         check=captions("one", "two")),
    Case("a sample of code alone", shard(packed(*GOOD, ("b.pth", CODE), ("b.txt", b"two"))), "skip",
         "'b': it has no image"),
    Case("a member that climbs out", shard(packed(*GOOD, ("../b.png", SECOND[0][1]))), "skip",
         "names no path within the shard"),
    Case("a member with an absolute path", shard(packed(*GOOD, ("/etc/b.png", SECOND[0][1]))),
         "skip", "names no path within the shard"),
    Case("a member that is a link",
         shard(packed(*GOOD, ("b.png", (tarfile.SYMTYPE, "/etc/passwd")), SECOND[1])), "skip",
         "is a link, a device"),
    Case("a member with control characters in its name",
         shard(packed(*GOOD, ("b\tc.png", SECOND[0][1]), ("b\tc.txt", b"two"))), "skip",
         "names no path within the shard"),
    Case("a sample without a caption", shard(packed(*GOOD, SECOND[0])), "skip",
         "'b': it has no caption"),
    Case("a sample of an empty image", shard(packed(*GOOD, ("b.png", b""), SECOND[1])), "skip",
         "0 bytes"),
    Case("a sample of a web page", shard(packed(*GOOD, ("b.jpg", b"<html>"), SECOND[1])), "skip",
         "it is a web page"),
    Case("a caption in Latin-1", shard(packed(*GOOD, SECOND[0], ("b.txt", b"caf\xe9"))), "skip",
         "'b': member .txt: 'utf-8' codec"),
    Case("a caption in broken JSON", shard(packed(*GOOD, SECOND[0], ("b.json", b"{"))), "skip",
         "'b': member .json: Expecting"),
    Case("a shard, cut off", shard(packed(*GOOD, ("b.png", noise("PNG")), SECOND[1], cut=3000)),
         "skip", r"the tar is cut off after 3,000 bytes; the samples before that \(1\) are kept"),
    Case("a web page for a shard", shard(b"<html>404</html>"), "reject", "it is a web page"),
    Case("a shard of 0 bytes", shard(b""), "reject", "not a tar .an empty file"),
    Case("a sample that occurs twice", shard(packed(*GOOD, *GOOD)), "reject",
         "two members .png"),
    Case("captions under another suffix", shard(packed(*GOOD), text="caption"), "reject",
         "it has no caption"),
]  # fmt: skip
