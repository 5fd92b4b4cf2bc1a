"""Load annotations as they are published: COCO captions, Flickr30k, Karpathy's splits.

Walk-through: notebooks/08_your_own_images.ipynb.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

from ..errors import Refused
from .dataset import MultimodalDataset
from .hub import known_split
from .rows import Found, Options, existing_file, existing_folder, load
from .tables import listed, read_json, read_lines


def from_coco(
    annotations: str | os.PathLike, images: str | os.PathLike, **options
) -> MultimodalDataset:
    """Load COCO captions as published: captions_train2017.json and the folder train2017.

    Args:
        annotations: the JSON file.
        images: the folder of its images.
        **options: of `Options`, see `load_data`.

    Returns:
        MultimodalDataset with a `report`; `meta` has "image_id".

    Raises:
        FileNotFoundError: the file or the folder does not exist.
        ValueError: the file has another form, or a row cannot be loaded (see `load_data`).
    """
    options_ = Options.named(from_coco, options)
    found, value = Found(str(annotations), "entry"), read_json(existing_file(annotations))
    found.hint = f"is {images} the folder of its images?"
    try:
        captions: dict[Any, list[str]] = {}
        for one in value["annotations"]:
            captions.setdefault(one["image_id"], []).append(one["caption"])
        for line, image in enumerate(value["images"], 1):
            metadata = {"image_id": image["id"]}
            found.add(line, image["file_name"], captions.pop(image["id"], []), metadata)
        for line, (number, texts) in enumerate(captions.items(), len(found.lines) + 1):
            why = f"{annotations}: no image has the id {number!r} of {texts[0]!r}"
            found.add(line, Refused("no image", why))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{annotations} is not in the form of COCO captions (images with id and file_name, "
            f"annotations with image_id and caption): {error!r}"
        ) from None
    return load(found, options_, root=str(existing_folder(images)))


def from_flickr30k(
    annotations: str | os.PathLike,
    images: str | os.PathLike,
    split: str | Sequence[str] | None = None,
    **options,
) -> MultimodalDataset:
    """Load Flickr30k as published, or any file of Karpathy's splits.

    Args:
        annotations: dataset_flickr30k.json (also dataset_coco.json or dataset_flickr8k.json), or
            results_20130124.token.
        images: the folder of its images.
        split: "train", "val", "test", "restval" of the JSON file, or several (None: all).
        **options: of `Options`, see `load_data`.

    Returns:
        MultimodalDataset with a `report`; of a JSON file `meta` has "split".

    Raises:
        FileNotFoundError: the file or the folder does not exist.
        ValueError: the file has another form, the split is unknown, or a row cannot be loaded (see
            `load_data`).
    """
    options_ = Options.named(from_flickr30k, options)
    path, root = existing_file(annotations), str(existing_folder(images))
    found = Found(str(annotations), hint=f"is {images} the folder of its images?")
    if path.suffix == ".token" or path.name.endswith(".token.txt"):
        known_split(split, None, str(path))
        for line, text in enumerate(read_lines(path, blank=True), 1):
            if not text:
                continue
            name, tab, caption = text.partition("\t")
            image: Any = name.rpartition("#")[0] or name
            if not tab:
                image = Refused("no caption", f"{path}, line {line}: no tab in {text[:60]!r}")
            elif re.search(r"\.\d+$", image) and not os.path.lexists(os.path.join(root, image)):
                why = f"{image} does not exist: Flickr8k's list names images that it does not have"
                image = Refused("missing", f"{path}, line {line}: {why}; on_error='skip' goes on")
            found.add(line, image, caption)
        return load(found, options_, root=root)
    try:
        entries = read_json(path)["images"]
        known_split(split, {image.get("split") for image in entries}, str(path))
        for line, image in enumerate(entries, 1):
            if split is None or image.get("split") in listed(split):
                name = os.path.join(image.get("filepath", ""), image["filename"])
                texts = [sentence["raw"] for sentence in image["sentences"]]
                found.add(line, name, texts, {"split": image.get("split")})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not in the form of Karpathy's splits (images with filename and sentences "
            f"with raw): {error!r}"
        ) from None
    return load(found, options_, root=root)
