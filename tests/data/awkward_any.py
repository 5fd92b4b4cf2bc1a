"""What `mm.load_data` makes of folders that could be several things, names, lists and frames."""

import bz2
import lzma

import mmkit as mm
from tests.data.awkward import Case, Maker, captions, source
from tests.data.awkward_sources import CLASSES, PNG, A, images_of, tree


def anything(make_source) -> Maker:
    """What load_data is given, made of the folder with the plain images."""
    return source(lambda f: (lambda made: lambda **o: mm.load_data(made, **o))(make_source(f)))


def frame(**columns):
    import pandas

    return pandas.DataFrame(columns)


class DataFrame:
    """The part of polars' data frame that is needed, as polars may not be installed."""

    def __init__(self, rows: list[dict]):
        self.rows, self.columns = rows, list(rows[0])

    def to_dicts(self) -> list[dict]:
        return self.rows


DataFrame.__module__ = "polars.dataframe.frame"
Polars = DataFrame


def beside(*tables: str, images: str = "images") -> Maker:
    """Images, and tables (of any content) around them, for load_data."""
    return tree(images_of(images) | dict.fromkeys(tables, "x"), "load_data")


TAR = b"no tar"
CAPTIONS = "which may have their captions: take "
NO_CLASS = "no names of classes, or only one; .*take mm.from_class_folders"

WAYS = [name for name in dir(mm) if name.startswith("from_")]


def misspelt(way: str) -> Maker:
    """A loader with an option that it does not have."""
    more = {"from_lists": [[]], "from_coco": ["x"], "from_flickr30k": ["x"]}.get(way, [])
    return source(lambda f: lambda **_: getattr(mm, way)(f / "a.png", *more, imagesize=3))


# fmt: off
ANY = [
    # captions that would not have been read
    Case("captions.csv beside a folder of images", beside("captions.csv"), "reject",
         CAPTIONS + r"mm.from_table\('.*/in/captions.csv', root='.*/in/images'\)"),
    Case("captions.txt beside a folder of images", beside("captions.txt"), "reject",
         CAPTIONS + "mm.from_table.*captions.txt"),
    Case("as COCO lies on the disk",
         beside("annotations/captions_val2017.json", "annotations/a.json", images="val2017"),
         "reject", CAPTIONS + "mm.from_coco.*/annotations/captions_val2017.json', '.*/in/val2017'"),
    Case("as Flickr30k lies on the disk", beside("results.token"), "reject",
         CAPTIONS + "mm.from_flickr30k.*results.token"),
    Case("as Karpathy's splits lie on the disk", beside("dataset_flickr30k.json"), "reject",
         CAPTIONS + "mm.from_flickr30k"),
    Case("as Hugging Face's imagefolder has it",
         tree(images_of("train", "test") | {"train/metadata.jsonl": "{}"}, "load_data"), "reject",
         CAPTIONS + r"mm.from_table\('.*/train/metadata.jsonl', root='.*/in/train'\)"),
    Case("a table of imagefolder itself",
         tree(images_of("train") | {"train/metadata.jsonl": '{"file_name":"1.png","text":"one"}'},
              "load_data", "in/train/metadata.jsonl"), "load", check=captions("one")),
    Case("a parquet file below, beside images", beside("data/x.parquet"), "reject",
         CAPTIONS + "mm.from_hub"),
    Case("a table beside folders of classes, these asked for",
         tree(CLASSES | {"x.csv": "x"}, "from_class_folders"), "load",
         check=captions("a photo of a cat", "a photo of a guide dog")),
    Case("a .txt beside each image, and a table", tree(A | {"x.csv": "x"}, "load_data"), "load",
         check=captions("one")),
    # folders that are not classes
    Case("train and test", tree(images_of("train/cat", "test/dog"), "load_data"), "reject",
         r"'test', 'train': " + NO_CLASS + r"\('.*/in/test'\)"),
    Case("val2017 and more", tree(images_of("val2017", "cat"), "load_data"), "reject", NO_CLASS),
    Case("images and photos", tree(images_of("images", "Photos"), "load_data"), "reject",
         NO_CLASS),
    Case("one class", tree(images_of("cat"), "load_data"), "reject", "are in 'cat': " + NO_CLASS),
    Case("one class, asked for", tree(images_of("cat"), "from_class_folders"), "load",
         check=captions("a photo of a cat")),
    Case("images without captions", tree({"a.png": PNG, "b.png": PNG}, "load_data"), "reject",
         r"holds 2 images \(a.png, ...\) and no captions; a folder may have a .txt beside each"),
    # several things in one folder
    Case("images and a tar", tree(A | {"backup.tar": TAR}, "load_data"), "reject",
         r"1 tar shard \(backup.tar\) and 1 image \(a.png\); choose: "
         r"take mm.from_shards\('.*in'\) or mm.from_folder\('.*in'\)"),
    Case("images and a parquet file", tree(A | {"x.parquet": "x"}, "load_data"), "reject",
         "1 parquet file .* and 1 image .*; choose: take mm.from_hub.* or mm.from_folder"),
    Case("shards and a parquet file", tree({"0.tar": TAR, "x.parquet": "x"}, "load_data"), "reject",
         "1 tar shard .* and 1 parquet file"),
    Case("shards and what img2dataset says of them",
         tree({"0.tar": TAR, "0.parquet": "x", "0_stats.json": "{}"}, "load_data"), "reject",
         "this is not a tar"),
    Case("images and a tar in a folder below", tree(A | {"old/backup.tar": TAR}, "load_data"),
         "load", check=captions("one")),
    Case("shards in a folder below", tree({"cc3m/0.tar": TAR}, "load_data"), "reject",
         r"1 tar shard \(cc3m/0.tar\) in folders .*; take mm.from_shards\('.*/cc3m/\*.tar'\)"),
    Case("a table and no images", tree({"pairs.csv": "x"}, "load_data"), "reject",
         "holds no images but pairs.csv; take mm.load_data"),
    Case("nothing", tree({"notes.md": "x"}, "load_data"), "reject",
         "holds no images; a folder may have"),
    Case("images none of which is read", tree({"a.heic": "x", "a.txt": "one"}, "load_data"),
         "reject", "a.heic: it looks like an image"),
    # names of files
    Case("a table in a folder called .tar-something",
         tree({"my.tar.d/a.png": PNG, "my.tar.d/pairs.csv": "image,text\na.png,one\n"},
              "load_data", "in/my.tar.d/pairs.csv"), "load", check=captions("one")),
    Case("a table called .tar.csv",
         tree({"a.png": PNG, "cc3m.tar.csv": "image,text\na.png,one\n"}, "load_data",
              "in/cc3m.tar.csv"), "load", check=captions("one")),
    Case("one image", anything(lambda f: f / "a.png"), "reject",
         r"a.png is one image; .*mm.from_lists\(\['.*a.png'\], \['its caption'\]\)"),
    Case("a list of images", anything(lambda f: [f / "a.png", f / "b.png"]), "reject",
         "a.png and 1 more are images without captions; take mm.from_lists"),
    Case("paths and texts", anything(lambda f: ([f / "a.png"], ["one"])), "reject",
         r"a tuple of list is not a list of shards; .*mm.from_lists\(paths, texts\)"),
    Case("Flickr30k's tokens alone",
         anything(lambda f: ((f / "r.token").write_text("x"), f / "r.token")[1]), "reject",
         r"take mm.from_flickr30k\('.*r.token', folder\)"),
    Case("a table that is not there", anything(lambda f: "data/pairz.csv"), "reject",
         "^data/pairz.csv does not exist; check the path$"),
    Case("a name that is not there", anything(lambda f: "cifar99"), "reject",
         r"cifar99 does not exist; check the path, or take mm.from_hub\('cifar99'\)"),
    Case("a table on the web", anything(lambda f: "https://x.org/pairs.csv"), "reject",
         "is a web address; download it first"),
    Case("shards at Amazon", anything(lambda f: "s3://b/x.tar"), "reject", "Install s3fs"),
    Case("a command", anything(lambda f: "pipe:cat x.tar"), "reject",
         "commands are no longer run; give the address itself"),
    Case("shards that no server has", anything(lambda f: "http://127.0.0.1:9/x.tar"), "reject",
         "shard http://127.0.0.1:9/x.tar cannot be fetched: .*refused"),
    *[Case(f"a tar compressed by {name}",
           tree({f"x.tar{end}": compress(b"x" * 999)}, "load_data", f"in/x.tar{end}"), "reject",
           f"x.tar{end}: it is compressed by {name}; unpack it \\(only gzip is read as it is")
      for name, end, compress in (("xz", ".xz", lzma.compress), ("bzip2", ".bz2", bz2.compress))],
    # frames, lists, options
    Case("a data frame",
         anything(lambda f: frame(image=[f / "a.png", str(f / "b.png")], text=["one", "two"])),
         "load", check=captions("one", "two")),
    Case("a data frame with an empty cell, and a root",
         source(lambda f: lambda **o: mm.load_data(
             frame(image=["a.png", "b.png"], text=["one", float("nan")]), root=f, **o)), "skip",
         "the data frame, row 1 is empty or not a string: .nan"),
    Case("a data frame as polars has it",
         anything(lambda f: Polars([{"image": f / "a.png", "text": ["one", "two"]}])), "load",
         check=captions(["one", "two"])),
    Case("fewer meta than paths",
         source(lambda f: lambda **o: mm.from_lists([f / "a.png"] * 2, ["x", "y"], meta=[{}], **o)),
         "reject", "2 paths but 1 meta; give a dict per image"),
    *[Case(f"an option misspelt, {way}", misspelt(way), "reject",
           f"{way} has no option 'imagesize'; did you mean 'image_size'")
      for way in WAYS],
    Case("an option of the way in misspelt",
         tree(A | {"p.csv": "image,text\na.png,one\n"}, "load_data", "in/p.csv", quots=False),
         "reject", "from_table has no option 'quots'; did you mean 'quotes'"),
]
# fmt: on
