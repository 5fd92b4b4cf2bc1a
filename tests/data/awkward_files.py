"""Awkward annotations, as COCO and Flickr30k publish them, and awkward checkpoints."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import torch
from PIL import Image

import mmkit as mm
from tests.data.awkward import Case, Maker, captions, encoded, source


def coco(images=None, annotations=None, **more) -> dict:
    images = [{"id": 1, "file_name": "a.png"}] if images is None else images
    annotations = [{"image_id": 1, "caption": "one"}] if annotations is None else annotations
    return {"images": images, "annotations": annotations, **more}


def published(value, way: str = "from_coco", name: str = "captions.json", **how) -> Maker:
    """A file of annotations, as text or as a value for JSON, and the folder of plain images."""

    def prepare(folder: Path):
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name).write_text(text)
        return lambda **options: getattr(mm, way)(folder / name, folder, **how, **options)

    return source(prepare)


def karpathy(*images, **how) -> Maker:
    return published({"images": list(images)}, "from_flickr30k", **how)


ONE = {"filename": "a.png", "sentences": [{"raw": "one"}], "split": "train"}
B = {"id": 2, "file_name": "b.png"}
COCO_FORM = "is not in the form of COCO captions"
KARPATHY_FORM = "is not in the form of Karpathy's splits"

# fmt: off
PUBLISHED = [
    Case("COCO", published(coco(info={}, licenses=[])), "load", check=captions("one")),
    Case("COCO, an image without captions", published(coco(coco()["images"] + [B])), "skip",
         "entry 2 is empty"),
    Case("COCO, a caption of no image",
         published(coco(annotations=coco()["annotations"] + [{"image_id": 9, "caption": "x"}])),
         "skip", "no image has the id 9 of 'x'"),
    Case("COCO, a caption that is null",
         published(coco([*coco()["images"], B],
                        [*coco()["annotations"], {"image_id": 2, "caption": None}])),
         "skip", "entry 2 is empty or not a string"),
    Case("COCO, a blank caption among others",
         published(coco(annotations=[*coco()["annotations"], {"image_id": 1, "caption": " "}])),
         "load", check=captions("one")),
    Case("COCO, another folder of images", published(coco([{"id": 1, "file_name": "x.png"}])),
         "reject", "x.png does not exist; is .* the folder of its images"),
    Case("COCO, a path that leaves",
         published(coco([*coco()["images"], {"id": 2, "file_name": "/etc/hostname"}],
                        [*coco()["annotations"], {"image_id": 2, "caption": "x"}])),
         "skip", "leads to /etc/hostname, outside"),
    Case("COCO without annotations", published({"images": []}), "reject", COCO_FORM),
    Case("COCO without file names", published(coco([{"id": 1}])), "reject", COCO_FORM),
    Case("COCO, a list", published([1, 2]), "reject", COCO_FORM),
    Case("COCO, ids that are lists", published(coco([{"id": [1], "file_name": "a.png"}])), "reject",
         COCO_FORM),
    Case("COCO, cut off", published(json.dumps(coco())[:40]), "reject",
         "captions.json is not a JSON file"),
    Case("COCO, a web page", published("<html>"), "reject", "is not a JSON file"),
    Case("COCO, 100,000 deep", published("[" * 100_000), "reject", "nested too deep"),
    Case("COCO, nothing", published(coco([], [])), "reject", "no row was found"),
    Case("COCO, no file",
         source(lambda f: lambda **options: mm.from_coco(f / "x.json", f, **options)), "reject",
         "x.json does not exist"),
    Case("COCO, a folder for annotations",
         source(lambda f: lambda **options: mm.from_coco(f, f, **options)), "reject",
         "is not a file"),
    Case("COCO, no folder of images",
         source(lambda f: ((f / "c.json").write_text(json.dumps(coco())),
                           lambda **options: mm.from_coco(f / "c.json", f / "x", **options))[1]),
         "reject", "x does not exist"),
    Case("Flickr30k", karpathy(ONE), "load", check=captions("one")),
    Case("Flickr30k, a split", karpathy(ONE, ONE | {"split": "test"}, split="train"), "load",
         check=captions("one")),
    Case("Flickr30k, a split that is not there", karpathy(ONE, split="trian"), "reject",
         "no split 'trian'; did you mean 'train'"),
    Case("Flickr30k without sentences", karpathy({"filename": "a.png"}), "reject", KARPATHY_FORM),
    Case("Flickr30k, sentences without raw", karpathy(ONE | {"sentences": [{}]}), "reject",
         KARPATHY_FORM),
    Case("Flickr30k, no sentence", karpathy(ONE, ONE | {"sentences": []}), "skip",
         "line 2 is empty"),
    Case("Flickr30k, a path that leaves", karpathy(ONE, ONE | {"filepath": "../.."}), "skip",
         "does not exist|outside"),
    Case("Flickr30k, tokens",
         published("a.png#0\tone\n\na.png#1\ttwo\n", "from_flickr30k", "results.token"), "load",
         check=captions(["one", "two"])),
    Case("Flickr30k, tokens, a split",
         published("a.png#0\tone\n", "from_flickr30k", "results.token", split="train"), "reject",
         "results.token has no splits; leave split='train' out"),
    Case("Flickr30k, a line without a tab",
         published("a.png#0\tone\n\na.png#1 two\n", "from_flickr30k", "results.token"), "skip",
         "results.token, line 3: no tab in 'a.png#1 two'"),
]
# fmt: on


# ---- checkpoints ---------------------------------------------------------------------------------


class Runs:
    """Unpickling it would create a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def checkpoint(write) -> Maker:
    """`write(path)` makes the file that mm.load is given."""

    def make(folder: Path):
        write(folder / "best_model.pth")

        def load(**_):
            try:
                return mm.load(folder / "best_model.pth")
            finally:
                assert not (folder / "ran").exists()

        return load

    return make


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "no checkpoint")


def half(path: Path) -> None:
    torch.save({"model_state_dict": {"w": torch.zeros(1000)}}, path)
    os.truncate(path, path.stat().st_size // 2)


MODEL = {"architecture": {"vit": {}}, "model_state_dict": {}}
REFUSED = "is refused: it is damaged, or holds more .* nothing in it was run"

# fmt: off
CHECKPOINTS = [
    Case("a checkpoint with code in it",
         checkpoint(lambda p: torch.save({"model_state_dict": Runs(p.parent / "ran")}, p)),
         "reject", "it asks for (posix|os).mkdir.*nothing in it was run"),
    Case("a pickle with code in it",
         checkpoint(lambda p: p.write_bytes(pickle.dumps(Runs(p.parent / "ran")))), "reject",
         REFUSED),
    Case("a checkpoint, cut off", checkpoint(half), "reject", REFUSED),
    Case("a checkpoint of 0 bytes", checkpoint(lambda p: p.write_bytes(b"")), "reject", REFUSED),
    Case("a web page for a checkpoint", checkpoint(lambda p: p.write_text("<html>404</html>")),
         "reject", REFUSED),
    Case("an image for a checkpoint",
         checkpoint(lambda p: p.write_bytes(encoded(Image.new("RGB", (9, 9)), "PNG"))), "reject",
         REFUSED),
    Case("a Git LFS pointer for a checkpoint",
         checkpoint(lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n")),
         "reject", REFUSED),
    Case("a zip that is no checkpoint", checkpoint(zipped), "reject", REFUSED),
    Case("a checkpoint of something else",
         checkpoint(lambda p: torch.save({"state_dict": {}, "epoch": 3}, p)), "reject",
         r"is no mmkit model \(it has epoch, state_dict\)"),
    Case("weights alone", checkpoint(lambda p: torch.save({"w": torch.zeros(3)}, p)), "reject",
         r"is no mmkit model \(it has w\)"),
    Case("a checkpoint that is a list", checkpoint(lambda p: torch.save([1, 2], p)), "reject",
         "holds a list, no checkpoint"),
    Case("an architecture with parts missing", checkpoint(lambda p: torch.save(MODEL, p)),
         "reject", "best_model.pth describes no model that can be built"),
    Case("an architecture that is a number",
         checkpoint(lambda p: torch.save(MODEL | {"architecture": 7}, p)), "reject",
         "best_model.pth describes no model that can be built"),
    Case("no checkpoint", checkpoint(lambda p: None), "reject", "no checkpoint at .*best_model"),
    Case("an empty folder for a checkpoint", checkpoint(lambda p: p.mkdir()), "reject",
         "best_model.pth"),
]
# fmt: on
