"""Inputs at the seams between programs: what one of them writes and another cannot read."""

import gzip
import json
import sqlite3
import unicodedata
from pathlib import Path

import mmkit as mm
from tests.data.awkward import (
    BLUE,
    Case,
    Maker,
    captions,
    one_colour,
    plain,
    row,
    shows,
    source,
    table,
)
from tests.data.awkward_any import anything, frame
from tests.data.awkward_files import ONE, karpathy, published
from tests.data.awkward_shards import GOOD, SECOND, packed, shard
from tests.data.awkward_sources import PNG, A, tree
from tests.data.awkward_tables import HEAD, TWO, put

BYTES = [one_colour("PNG"), one_colour("PNG", colour=BLUE)]


def cells(*images) -> Maker:
    """A data frame with the images themselves in its cells, the second one blue."""
    return anything(lambda f: frame(image=list(images), text=["one", "two"]))


def as_image(data: bytes):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data))


def file_of(name: str, content: bytes) -> Maker:
    """A file of this content, read as a table."""

    def make(folder: Path):
        (plain(folder) / name).write_bytes(content)
        return lambda **options: mm.load_data(folder / name, **options)

    return make


def database(folder: Path):
    path = plain(folder) / "pairs.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE pairs (image, text)")
    return lambda **options: mm.load_data(path, **options)


def by_url(folder: Path):
    put(plain(folder), "my cat.png")
    lines = f"image,text\nfile://{folder}/a.png,one\nfile://{folder}/my%20cat.png,two\n"
    (folder / "pairs.csv").write_text(lines)
    return lambda **options: mm.from_table(folder / "pairs.csv", **options)


def in_home(folder: Path, where: str = "~/pics"):
    """A root in the home folder, which the tests set to the folder itself."""
    home = Path("~").expanduser()
    (home / "pics").mkdir(exist_ok=True)
    for name, content in (("a.png", PNG), ("b.png", BYTES[1])):
        (home / "pics" / name).write_bytes(content)
    (plain(folder) / "pairs.csv").write_text(TWO)
    return lambda **options: mm.from_table(folder / "pairs.csv", root=where, **options)


def snapshot(read) -> Maker:
    """A data set in a cache of the hub, whose files are links to ../../blobs."""

    def make(folder: Path):
        revision, blobs = folder / "hub/snapshots/0af3", folder / "hub/blobs"
        revision.mkdir(parents=True), blobs.mkdir()
        for name, content in (("a", BYTES[0]), ("b", BYTES[1])):
            (blobs / f"{name}0").write_bytes(content)
            (revision / f"{name}.png").symlink_to(f"../../blobs/{name}0")
            (revision / f"{name}.txt").write_text({"a": "one", "b": "two"}[name])
        (revision / "metadata.csv").write_text("file_name,text\na.png,one\nb.png,two\n")
        return lambda **options: read(revision, **options)

    return make


def beside_the_table(folder: Path):
    """Images beside the table, and a root above both that also holds what links lead to."""
    (plain(folder / "in/tables") / "pairs.csv").write_text("image,text\na.png,one\nlink.png,two\n")
    (folder / "in/blue").write_bytes(BYTES[1])
    (folder / "in/tables/link.png").symlink_to("../blue")
    path = folder / "in/tables/pairs.csv"
    return lambda **options: mm.from_table(path, root=folder / "in", **options)


def mixed_forms(folder: Path):
    """A folder of decomposed letters with a name of composed ones; the table composes both."""
    load = row("é/ü.png")(folder)
    put(folder / "inside", f"{unicodedata.normalize('NFD', 'é')}/ü.png")
    return load


def tokens(text: str) -> Maker:
    return published(text, "from_flickr30k", "Flickr8k.token.txt")


BOTH = captions("one", "two")
IS_BLUE = shows(BLUE)
ARROW = b"ARROW1\0\0" + bytes(99)
EXCEL = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(range(256))

# fmt: off
SEAMS = [
    # F2: shards
    Case("two shards in one file", shard(packed(*GOOD) + packed(*SECOND)), "load", check=BOTH),
    Case("two shards in one file, with zeros between",
         shard(packed(*GOOD) + bytes(2**21) + packed(*SECOND) + bytes(700)), "load", check=BOTH),
    Case("a shard and what is none in one file", shard(packed(*GOOD) + b"x" * 5000), "skip",
         "damaged after byte"),
    Case("a shard that is cut in its middle", shard(packed(*GOOD, *SECOND, cut=2600)), "skip",
         "cut off after 2,600 bytes"),
    Case("the second of two shards in one file is cut",
         shard(packed(*GOOD) + packed(*SECOND, cut=700)), "skip", "cut off after"),
    # F11
    Case("all images of a shard first, then all texts",
         shard(packed(GOOD[0], SECOND[0], GOOD[1], SECOND[1])), "reject",
         "its members are not together: sort them, as tar --sort=name does"),
    Case("all texts first", shard(packed(GOOD[1], SECOND[1], GOOD[0], SECOND[0])), "reject",
         "not together"),
    # F12: quotes and lists
    Case("a space before a quoted field", table(HEAD + 'a.png, "a red one"\nb.png,  "b, too"\n'),
         "load", check=captions("a red one", "b, too")),
    Case("a space before a quoted name", table('image, "text"\na.png,one\nb.png,two\n'), "load",
         check=BOTH),
    Case("a space after the separator, without quotes", table(HEAD + "a.png, one\nb.png,two\n"),
         "load", check=BOTH),
    Case("quotes behind back slashes", table(HEAD + 'a.png,"says \\"stop\\""\nb.png,two\n'),
         "skip", r"quotes='backslash' if they are written \\\""),
    Case("quotes behind back slashes, said",
         table(HEAD + 'a.png,"says \\"stop\\", so"\nb.png,two\n', quotes="backslash"), "load",
         check=captions('says "stop", so', "two")),
    Case("another word for quotes", table(TWO, quotes="no"), "reject", "take True, False or 'bac"),
    Case("lists of captions in a CSV",
         table(HEAD + "a.png,\"['a cat', 'a dog']\"\nb.png,\"[\"\"an owl\"\"]\"\n"), "load",
         check=captions(["a cat", "a dog"], "an owl")),
    Case("what only looks like a list",
         table(HEAD + "a.png,[sic] ['a']\nb.png,\"['a', 3]\"\n"), "load",
         check=captions("[sic] ['a']", "['a', 3]")),
    # F13: frames whose cells are the images
    Case("a frame of bytes", cells(*BYTES), "load", check=IS_BLUE),
    Case("a frame of bytes and paths", cells(*({"bytes": b, "path": "x.png"} for b in BYTES)),
         "load", check=IS_BLUE),
    Case("a frame of PIL images", cells(*map(as_image, BYTES)), "load", check=IS_BLUE),
    Case("a frame with an empty cell among bytes", cells(BYTES[0], None), "skip", "is empty"),
    Case("a list of bytes",
         source(lambda f: lambda **o: mm.from_lists(BYTES, ["one", "two"], **o)), "load",
         check=IS_BLUE),
    # F14: names of columns, kinds of files, roots
    Case("columns without names", table("image,caption,,\na.png,one,,\nb.png,two,x,\n"), "load",
         check=BOTH),
    Case("no name at all", table(",,\na.png,one,\n"), "reject", "no usable first line"),
    Case("a packed table", file_of("pairs.csv.gz", gzip.compress(TWO.encode())), "load",
         check=captions("a red one", "ein grüner")),
    Case("packed JSON lines",
         file_of("p.jsonl.gz", gzip.compress(b'{"image": "a.png", "text": "one"}\n')), "load",
         check=captions("one")),
    Case("a packed table called .csv", file_of("pairs.csv", gzip.compress(TWO.encode("utf-16"))),
         "load", check=captions("a red one", "ein grüner")),
    Case("an Excel file", file_of("pairs.xls", EXCEL), "reject", "an Excel file; save it as CSV"),
    Case("an Excel file called .csv", file_of("pairs.csv", EXCEL), "reject", "an Excel file"),
    Case("a data base", database, "reject", "an SQLite data base; export the table as CSV"),
    Case("an Arrow file", file_of("pairs.arrow", ARROW), "reject", "Arrow file; save it as parq"),
    Case("a parquet file called .csv", file_of("pairs.csv", b"PAR1" + bytes(99)), "reject",
         "a parquet file; give it the suffix .parquet"),
    Case("addresses of files", by_url, "load", check=IS_BLUE),
    Case("a root in the home folder", in_home, "load", check=captions("a red one", "ein grüner")),
    Case("a root that is not there", lambda f: in_home(f, "~/none"), "reject",
         "/none does not exist; check the path"),
    # F15: the cache of the hub, texts in another encoding
    Case("a table in the cache of the hub",
         snapshot(lambda f, **o: mm.from_table(f / "metadata.csv", **o)), "load", check=IS_BLUE),
    Case("a folder in the cache of the hub", snapshot(mm.from_folder), "load", check=IS_BLUE),
    Case("a root above the table", beside_the_table, "load", check=IS_BLUE),
    Case("a .txt of other letters, said",
         tree(A | {"a.txt": "gr\xfcn".encode("cp1252")}, encoding="cp1252"), "load",
         check=captions("grün")),
    # F16: splits, classes, other suffixes
    Case("Karpathy, two splits",
         karpathy(ONE, {"filename": "b.png", "sentences": [{"raw": "two"}], "split": "restval"},
                  {"filename": "c.png", "sentences": [{"raw": "x"}], "split": "test"},
                  split=["train", "restval"]), "load", check=BOTH),
    Case("Karpathy, one of two splits is unknown", karpathy(ONE, split=["train", "tset"]), "reject",
         "no split 'tset'"),
    Case("a .caption beside an image", tree(A | {"b.png": PNG, "b.caption": "two"}), "skip",
         "no b.txt beside it, but b.caption: captions are read from a .txt; rename them"),
    Case("Flickr8k's images that it does not have", tokens("a.png#0\tone\nb.png.1#0\ttwo\n"),
         "skip", "b.png.1 does not exist: Flickr8k's list names images that it does not have"),
    Case("packed annotations",
         source(lambda f: ((f / "c.json").write_bytes(gzip.compress(json.dumps(
             {"images": [{"id": 1, "file_name": "a.png"}],
              "annotations": [{"image_id": 1, "caption": "one"}]}).encode())),
             lambda **o: mm.from_coco(f / "c.json", f, **o))[1]), "load", check=captions("one")),
    # F19
    Case("letters composed otherwise in each part of a path", mixed_forms, "load", check=IS_BLUE),
    Case("the same in a name of several words",
         row(unicodedata.normalize("NFC", "zoë/naïve é.png"),
             lambda f: put(f, unicodedata.normalize("NFD", "zoë") + "/naïve é.png")), "load",
         check=IS_BLUE),
]
# fmt: on
