"""Ways in for annotations as they are published: COCO captions, Flickr30k, Karpathy's splits.

Walk-through: notebooks/08_your_own_pictures.ipynb.
"""

import os
from typing import Any

from ..errors import Refused
from .dataset import MultimodalDataset
from .folders import existing_file, existing_folder
from .hub import known_split
from .rows import Found, Options, load
from .tables import read_json, read_lines


def from_coco(
    annotations: str | os.PathLike, images: str | os.PathLike, **options
) -> MultimodalDataset:
    """COCO captions as published: captions_train2017.json and the folder train2017."""
    options_ = Options.named(from_coco, options)
    found, value = Found(str(annotations), "entry"), read_json(existing_file(annotations))
    found.hint = f"is {images} the folder of its pictures?"
    try:
        captions: dict[Any, list[str]] = {}
        for one in value["annotations"]:
            captions.setdefault(one["image_id"], []).append(one["caption"])
        for line, picture in enumerate(value["images"], 1):
            facts = {"image_id": picture["id"]}
            found.add(line, picture["file_name"], captions.pop(picture["id"], []), facts)
        for line, (number, texts) in enumerate(captions.items(), len(found.lines) + 1):
            why = f"{annotations}: no picture has the id {number!r} of {texts[0]!r}"
            found.add(line, Refused("no picture", why))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{annotations} is not in the form of COCO captions (images with id and file_name, "
            f"annotations with image_id and caption): {error!r}"
        ) from None
    return load(found, options_, root=str(existing_folder(images)))


def from_flickr30k(
    annotations: str | os.PathLike,
    images: str | os.PathLike,
    split: str | None = None,
    **options,
) -> MultimodalDataset:
    """Flickr30k as published: dataset_flickr30k.json (Karpathy's splits; dataset_coco.json and
    dataset_flickr8k.json, too) or results_20130124.token, and the folder of its pictures.

    split: "train", "val", "test" of the JSON file (None: all).
    """
    options_ = Options.named(from_flickr30k, options)
    path, root = existing_file(annotations), str(existing_folder(images))
    found = Found(str(annotations), hint=f"is {images} the folder of its pictures?")
    if path.suffix == ".token" or path.name.endswith(".token.txt"):
        known_split(split, None, str(path))
        for line, words in enumerate(read_lines(path, blank=True), 1):
            if not words:
                continue
            name, tab, caption = words.partition("\t")
            why = Refused("no caption", f"{path}, line {line}: no tab in {words[:60]!r}")
            found.add(line, name.rpartition("#")[0] or name if tab else why, caption)
        return load(found, options_, root=root)
    try:
        pictures = read_json(path)["images"]
        known_split(split, {picture.get("split") for picture in pictures}, str(path))
        for line, picture in enumerate(pictures, 1):
            if split is None or picture.get("split") == split:
                name = os.path.join(picture.get("filepath", ""), picture["filename"])
                texts = [sentence["raw"] for sentence in picture["sentences"]]
                found.add(line, name, texts, {"split": picture.get("split")})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not in the form of Karpathy's splits (images with filename and sentences "
            f"with raw): {error!r}"
        ) from None
    return load(found, options_, root=root)
