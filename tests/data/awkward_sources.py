"""Awkward parquet files, data sets of `datasets`, and folders."""

import os
from pathlib import Path

from PIL import Image

import mmkit as mm
from tests.data.awkward import RED, Case, Maker, captions, metadata, one_colour, shows, source

# ---- parquet, the hub ----------------------------------------------------------------------------


def parquet(columns: dict, name: str = "pairs.parquet", **how) -> Maker:
    """A parquet file; values "a.png" and so on in `columns` are paths beside it."""

    def prepare(folder: Path):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), folder / name)
        return lambda **options: mm.from_table(folder / name, **how, **options)

    return source(prepare)


def hub(make_set, **how) -> Maker:
    """A data set object, made from `datasets` and the folder."""

    def prepare(folder: Path):
        import datasets

        made = make_set(datasets, folder)
        return lambda **options: mm.from_hub(made, root=folder, **how, **options)

    return source(prepare)


def pairs(datasets, folder: Path, **more):
    return datasets.Dataset.from_dict({"image": ["a.png", "b.png"], "text": ["one", "two"], **more})


def splits(datasets, folder):
    return datasets.DatasetDict(train=pairs(datasets, folder), test=pairs(datasets, folder))


def one_split(datasets, folder):
    return datasets.DatasetDict(train=pairs(datasets, folder))


def named(datasets, folder):
    """As load_dataset returns it: it knows its name and the folder of its images."""
    made = datasets.Dataset.from_dict({"image": [str(folder / "a.png")], "text": ["one"]})
    made.info.dataset_name = "birds"
    return made


def decoded(datasets, folder):
    """Images as PIL images, with the format set to tensors."""
    files = [str(folder / "a.png"), Image.new("RGB", (9, 9), RED)]
    kinds = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    made = datasets.Dataset.from_dict({"image": files, "text": ["one", "two"]}, features=kinds)
    return made.with_format("numpy")


def saved(make_set, name: str = "saved", **how) -> Maker:
    def prepare(folder: Path):
        import datasets

        make_set(datasets, folder).save_to_disk(folder / name)
        return lambda **options: mm.load_data(folder / name, **how, **options)

    return source(prepare)


PNG = one_colour("PNG")
TWO = {"image": ["a.png", "b.png"], "text": ["one", "two"]}

# fmt: off
HUB = [
    Case("parquet with paths", parquet(TWO), "load", check=captions("one", "two")),
    Case("parquet with bytes", parquet(TWO | {"image": [PNG, PNG]}), "load", check=shows(RED)),
    Case("parquet with bytes and paths in one",
         parquet(TWO | {"image": [{"bytes": None, "path": "a.png"}, {"bytes": PNG, "path": "x"}]}),
         "load", check=shows(RED)),
    Case("parquet with lists of captions", parquet(TWO | {"text": [["one"], ["two", "three"]]}),
         "load", check=captions("one", ["two", "three"])),
    Case("parquet with an image that is null", parquet(TWO | {"image": ["a.png", None]}), "skip",
         "pairs.parquet, image of row 1 is empty"),
    Case("parquet with a caption that is null", parquet(TWO | {"text": ["one", None]}), "skip",
         "row 1 is empty or not a string: .*None"),
    Case("parquet with a caption that is null among others",
         parquet(TWO | {"text": [["one", None], ["two"]]}), "load", check=captions("one", "two")),
    Case("parquet with a split", parquet(TWO, split="test"), "reject",
         "pairs.parquet has no splits; leave split='test' out"),
    Case("a column by its name alone", parquet(TWO | {"artist": ["M", "N"]}, meta="artist"), "load",
         check=metadata("artist", "M", "N")),
    Case("parquet with numbers for images", parquet(TWO | {"image": [1, 2]}), "reject",
         "holds int, not an image"),
    Case("parquet with bytes of something else", parquet(TWO | {"image": [PNG, b"<html>"]}), "skip",
         "pairs.parquet, image of row 1 .*it is a web page"),
    Case("parquet with a path that leaves", parquet(TWO | {"image": ["a.png", "/etc/hostname"]}),
         "skip", "leads to /etc/hostname, outside"),
    Case("parquet without rows", parquet({"image": [], "text": []}), "reject",
         "no row was found|cannot be read as a data set"),
    Case("parquet, cut off",
         source(lambda f: cut_off(parquet(TWO)(f), f / "pairs.parquet")), "reject",
         "pairs.parquet cannot be read as a data set"),
    Case("parquet with a column misspelt", parquet(TWO, text="texts"), "reject",
         "no column 'texts'; did you mean 'text'"),
    Case("a data set of images", hub(decoded), "load", check=shows(RED)),
    Case("a data set with splits", hub(splits), "reject", "has splits train, test; give split='…'"),
    Case("a data set with one split", hub(one_split), "load", check=captions("one", "two")),
    Case("a data set without splits, one asked for", hub(pairs, split="foo"), "reject",
         "the data set has no splits; leave split='foo' out"),
    Case("a data set that knows its name", hub(named, text="x"), "reject", "birds has no column"),
    Case("a data set with absolute paths",
         source(lambda f: (lambda made: lambda **options: mm.load_data(made, **options))(
             named(__import__("datasets"), f))),
         "reject", "birds, image of row 0: .*a.png, outside /.*; move .*root='/.*'"),
    Case("a data set with splits, one given", hub(splits, split="train"), "load",
         check=captions("one", "two")),
    Case("a split that is not there", hub(splits, split="trian"), "reject",
         "no split 'trian'; did you mean 'train'"),
    Case("a stream", hub(lambda *a: pairs(*a).to_iterable_dataset()), "reject",
         r"is a stream; give a data set with a length \(streaming=False\)"),
    Case("no data set", hub(lambda *a: 7), "reject", "is int, not a data set"),
    Case("a data set with an odd column", hub(pairs, text="words"), "reject", "no column 'words'"),
    Case("a saved data set", saved(lambda d, f: decoded(d, f).with_format(None)), "load",
         check=shows(RED)),
    Case("a saved data set with splits", saved(splits), "reject", "has splits train, test"),
    Case("a saved data set with one split", saved(one_split), "load",
         check=captions("one", "two")),
    Case("a saved data set without splits, one asked for", saved(pairs, split="x"), "reject",
         "saved has no splits"),
    Case("a saved split that is not there", saved(splits, split="x"), "reject", "no split 'x'"),
    Case("a saved data set that is cut off",
         source(lambda f: cut_off(saved(pairs)(f), *(f / "saved").glob("*.arrow"))), "reject",
         "saved cannot be read as a data set"),
]
# fmt: on


def cut_off(load, *paths: Path):
    """The same, with files cut to half their length."""
    for path in paths:
        os.truncate(path, path.stat().st_size // 2)
    return load


# ---- folders -------------------------------------------------------------------------------------


def tree(files: dict[str, object], way="from_folder", source="in", **how) -> Maker:
    """A folder "in" with these files (a str is written as UTF-8), and the loader that reads it."""

    def make(folder: Path):
        for name, content in files.items():
            path = folder / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = content.encode() if isinstance(content, str) else content
            path.write_bytes(content)
        return lambda **options: getattr(mm, way)(folder / source, **how, **options)

    return make


def words_that_leave(folder: Path):
    load = tree({"a.png": PNG, "a.txt": "one", "b.png": PNG})(folder)
    (folder / "b.txt").write_text("secret")
    (folder / "in/b.txt").symlink_to("../b.txt")
    return load


def words_in_a_pipe(folder: Path):
    load = tree({"a.png": PNG, "a.txt": "one", "b.png": PNG})(folder)
    os.mkfifo(folder / "in/b.txt")
    return load


def name_of_no_letters(folder: Path):
    """A file whose name an old system wrote in another encoding."""
    load = tree({"a.png": PNG, "a.txt": "one"})(folder)
    for end, content in ((b".png", PNG), (b".txt", b"two")):
        Path(os.fsdecode(os.fsencode(folder / "in/gr") + b"\xfcn" + end)).write_bytes(content)
    return load


def linked(files: dict[str, object], links: dict[str, str], way="from_class_folders") -> Maker:
    """A folder with these files and with links: name -> target."""

    def make(folder: Path):
        load = tree(files, way)(folder)
        (folder / "away").mkdir()
        (folder / "away/1.png").write_bytes(PNG)
        for name, target in links.items():
            (folder / "in" / name).symlink_to(target)
        return load

    return make


def images_of(*folders: str) -> dict[str, object]:
    """A different image in each folder."""
    return {
        f"{name}/1.png": one_colour("PNG", colour=(9 * i, 1, 2)) for i, name in enumerate(folders)
    }


HEIC = b"\0\0\0\x18ftypheic"
A = {"a.png": PNG, "a.txt": "one"}
CLASSES = {"cat/1.png": PNG, "guide_dog/1.png": one_colour("PNG", colour=0)}

# fmt: off
FOLDERS = [
    Case("lines of a .txt", tree(A | {"a.txt": "\ufeffone\r\n\r\ntwo\n"}), "load",
         check=captions(["one", "two"])),
    Case("hidden files, other files",
         tree(A | {"._a.png": b"x", ".git/b.png": b"x", "notes.md": "x", ".b.txt": "x",
                   "README.txt": "x", "README": "x", "a.json": "{}", "Thumbs.db": b"\xd0\xcf\x11",
                   ".DS_Store": "x", "BMW": "BMW is a car",
                   "a.mp4": b"\0\0\0 ftypisom" + bytes(30)}),
         "load", check=captions("one")),
    Case("a .txt of no image", tree(A | {"b.txt": "x", "c/a.txt": "x"}), "skip",
         "b.txt has no image of the same name beside it", bad_rows=2),
    Case("a .TXT", tree(A | {"b.png": PNG, "b.TXT": "two"}), "load", check=captions("one", "two")),
    Case("words in a.png.txt", tree({"a.png": PNG, "a.png.txt": "one"}), "load",
         check=captions("one")),
    Case("an image without an ending", tree({"d": PNG, "d.txt": "one"}), "load",
         check=captions("one")),
    Case("an image with another ending",
         tree({"e.jpg_large": one_colour("JPEG"), "e.txt": "one"}), "load", check=captions("one")),
    *[Case(f"a file {name}", tree(A | {name: content, name.split(".")[0] + ".txt": "two"}), "skip",
           f"{name}: it looks like an image of a format that cannot be read")
      for name, content in (("b.heic", HEIC), ("b.HEIF", b"?"), ("b.svg", "<svg/>"), ("b", HEIC),
                            ("b.png.download", b"\x89PN"), ("b.nef", b"MM\0*"))],
    Case("a HEIC in a class", tree({"cat/1.png": PNG, "cat/2.heic": HEIC}, "from_class_folders"),
         "skip", "2.heic: it looks like an image"),
    Case("a PNG called .heic", tree({"b.heic": PNG, "b.txt": "one"}), "load",
         check=captions("one")),
    Case("an ending in capitals", tree({"A.PNG": PNG, "A.txt": "one"}), "load",
         check=captions("one")),
    Case("no .txt", tree(A | {"b.png": PNG}), "skip", "b.png has no b.txt beside it"),
    Case("an empty .txt", tree(A | {"b.png": PNG, "b.txt": " \n"}), "skip", "image 2 is empty"),
    Case("a .txt of other letters", tree(A | {"b.png": PNG, "b.txt": b"gr\xfcn"}), "skip",
         "b.txt, line 1: this is not utf-8"),
    Case("a .txt that is a link and leaves", words_that_leave, "skip", "b.txt, outside"),
    Case("a .txt that is a pipe", words_in_a_pipe, "skip", "b.txt is not a file"),
    Case("a name in another encoding", name_of_no_letters, "load", check=captions("one", "two")),
    Case("an empty folder", tree({"notes.md": "x"}), "reject", "no row was found"),
    Case("a folder that is a file",
         source(lambda f: lambda **options: mm.from_folder(f / "a.png", **options)), "reject",
         "a.png is not a folder; for a table take from_table"),
    Case("a folder that is not there",
         source(lambda f: lambda **options: mm.load_data(f / "gone", **options)), "reject",
         "gone does not exist"),
    Case("a table that is a folder",
         source(lambda f: lambda **options: mm.from_table(f, **options)), "reject",
         "is not a file; .*load_data"),
    Case("a table that is a pipe",
         source(lambda f: (os.mkfifo(f / "p.csv"),
                           lambda **options: mm.from_table(f / "p.csv", **options))[1]),
         "reject", "p.csv is not a file"),
    Case("folders of classes", tree(CLASSES, "from_class_folders"), "load",
         check=captions("a photo of a cat", "a photo of a guide dog")),
    Case("folders of classes, and a text about them",
         tree(CLASSES | {"README.txt": "x"}, "load_data"), "load",
         check=captions("a photo of a cat", "a photo of a guide dog")),
    Case("a folder called .tar-something",
         tree({"my.targets/a.png": PNG, "my.targets/a.txt": "one"}, "load_data"), "load",
         check=captions("one")),
    Case("an image in no class", tree(CLASSES | {"x.png": PNG}, "from_class_folders"), "skip",
         "x.png: it is beside the folders of the classes", loaded=2),
    Case("a class with nothing in it",
         tree(CLASSES | {"eel/notes.md": "x"}, "from_class_folders"), "load",
         check=captions("a photo of a cat", "a photo of a guide dog")),
    Case("a class that is a link within", linked(images_of("cat", "x/y"), {"dog": "x/y"}), "load",
         check=captions("a photo of a cat", ["a photo of a dog", "a photo of a x"])),
    Case("links in a circle",
         linked(images_of("cat", "dog"), {"cat/up": "..", "cat/o": "../dog", "dog/o": "../cat"}),
         "load", check=captions(*2 * [["a photo of a cat", "a photo of a dog"]])),
    Case("classes that are links and leave",
         linked(images_of("cat"), {"dog": "../away", "eel": "../away"}), "skip",
         "in/dog is a link to the folder .*/away, outside .*in", bad_rows=2),
    Case("a class that is a link to nothing", linked(images_of("cat"), {"dog": "../gone"}),
         "skip", "dog is a link to a file that does not exist"),
    Case("a folder of words that is a link and leaves", linked(A, {"b": "../away"}, "from_folder"),
         "skip", "in/b is a link to the folder"),
    Case("a template without {}", tree(CLASSES, "from_class_folders", templates="a photo"),
         "reject", "each needs {} for the name of the class"),
]
# fmt: on
