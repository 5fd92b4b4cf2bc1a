"""Published annotations give each image its own captions, in the order of the images."""

import json

from mmkit.data.published import from_coco, from_flickr30k
from tests.data.awkward import BLUE, GREEN, RED, plain

OPTIONS = dict(image_size=8, num_workers=0)


def colours(data) -> list[tuple]:
    return [tuple(data[row]["image"][:, 0, 0].tolist()) for row in range(len(data))]


def test_captions_of_coco_find_their_image_by_its_id(cache, tmp_path):
    images = [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}]
    pairs = [(3, "one"), (7, "two"), (3, "three")]
    annotations = [{"image_id": number, "caption": text} for number, text in pairs]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    data = from_coco(path, plain(tmp_path / "images"), **OPTIONS)
    assert data.texts == [["two"], ["one", "three"]] and colours(data) == [GREEN, RED]
    assert data.meta == [{"image_id": 7}, {"image_id": 3}]


def test_flickr30k_is_read_from_tokens_and_from_karpathys_splits(cache, tmp_path):
    plain(tmp_path / "images/below")
    (tmp_path / "r.token").write_text(
        "below/c.png#0\tone\nbelow/a.png#0\ttwo\nbelow/c.png#1\tthree"
    )
    data = from_flickr30k(tmp_path / "r.token", tmp_path / "images", **OPTIONS)
    assert data.texts == [["one", "three"], ["two"]] and colours(data) == [BLUE, RED]
    parts = [("a.png", "val", ["one"]), ("b.png", "train", ["two"]), ("c.png", "val", ["x", "y"])]
    entries = [
        {"filepath": "below", "filename": name, "split": split,
         "sentences": [{"raw": text} for text in texts]}
        for name, split, texts in parts
    ]  # fmt: skip
    (tmp_path / "k.json").write_text(json.dumps({"images": entries}))
    data = from_flickr30k(tmp_path / "k.json", tmp_path / "images", split="val", **OPTIONS)
    assert data.texts == [["one"], ["x", "y"]] and colours(data) == [RED, BLUE]
    assert data.meta == [{"split": "val"}] * 2
