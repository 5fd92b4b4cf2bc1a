"""Every loader gives the same batches for the same images, shards with their own ids."""

import csv
import json
import tarfile

import pytest
import torch
from PIL import Image

import mmkit as mm
from mmkit import from_shards
from mmkit.data.loader import load_batches
from mmkit.data.shards import write_shards
from mmkit.errors import Refused
from tests.data.awkward import one_colour
from tests.data.seven_images import (
    NAMES,
    OPTIONS,
    SIDE,
    TEMPLATES,
    TEXTS,
    by_hand,
    folder,
    lists,
    parquet,
)
from tests.data.tars import member, write_tar

pytestmark = pytest.mark.usefixtures("cache")

# ---- loaders -------------------------------------------------------------------------------------


def constructor(root, **options):
    return mm.MultimodalDataset([root / name for name in NAMES], TEXTS, image_size=SIDE)


def table(separator, name):
    """A row per caption; each image has two."""

    def way(root, **options):
        with open(root / name, "w", newline="") as file:
            writer = csv.writer(file, delimiter=separator)
            writer.writerow(["image", "text"])
            writer.writerows(
                (n, text) for n, texts in zip(NAMES, TEXTS, strict=True) for text in texts
            )
        return mm.from_table(root / name, **options)

    return way


def two_columns(root, **options):
    rows = [f"{name};{texts[0]};{texts[1]}" for name, texts in zip(NAMES, TEXTS, strict=True)]
    (root / "wide.csv").write_text("\n".join(["file;first;second", *rows]))
    return mm.from_table(root / "wide.csv", text=["first", "second"], **options)


def jsonl(root, **options):
    lines = [json.dumps({"image": n, "text": t}) for n, t in zip(NAMES, TEXTS, strict=True)]
    (root / "pairs.jsonl").write_text("\n".join(lines))
    return mm.load_data(root / "pairs.jsonl", **options)


def class_folders(root, **options):
    return mm.from_class_folders(root, TEMPLATES, **options)


def hub_set(root):
    import datasets

    kinds = datasets.Features(image=datasets.Image(), text=datasets.List(datasets.Value("string")))
    rows = {"image": [str(root / name) for name in NAMES], "text": TEXTS}
    return datasets.Dataset.from_dict(rows, features=kinds)


def hub(root, **options):
    return mm.load_data(hub_set(root), root=root, **options)


def saved(root, **options):
    import datasets

    datasets.DatasetDict(train=hub_set(root)).save_to_disk(root.parent / "saved")
    return mm.load_data(root.parent / "saved", split="train", **options)


def hub_of_pil(root, **options):
    """Decoded images, which do not know their files."""
    import datasets

    kinds = datasets.Features(image=datasets.Image(), text=datasets.List(datasets.Value("string")))
    rows = {"image": [Image.open(root / name).convert("RGB") for name in NAMES], "text": TEXTS}
    return mm.from_hub(datasets.Dataset.from_dict(rows, features=kinds), **options)


def shards(root, **options):
    """Several lists of the same files."""
    mm.write_shards(constructor(root), root.parent / "shards", samples_per_shard=3, overwrite=True)
    return mm.load_data(root.parent / "shards", **options)


def coco(root, **options):
    """As published: captions in any order, arbitrary ids."""
    value = {
        "images": [{"id": 100 - i, "file_name": name} for i, name in enumerate(NAMES)],
        "annotations": [
            {"image_id": 100 - i, "caption": TEXTS[i][k]} for k in range(2) for i in range(7)
        ],
    }
    (root / "captions.json").write_text(json.dumps(value))
    return mm.from_coco(root / "captions.json", root, **options)


def karpathy(root, **options):
    parts = [name.split("/") for name in NAMES]
    images = [
        {"filepath": p[0], "filename": p[1], "split": "val", "sentences": [{"raw": t} for t in ts]}
        for p, ts in zip(parts, TEXTS, strict=True)
    ]
    (root / "dataset.json").write_text(json.dumps({"images": images}))
    return mm.from_flickr30k(root / "dataset.json", root, split="val", **options)


def tokens(root, **options):
    lines = [
        f"{n}#{k}\t{t}" for n, texts in zip(NAMES, TEXTS, strict=True) for k, t in enumerate(texts)
    ]
    (root / "results.token").write_text("\n".join(lines))
    return mm.from_flickr30k(root / "results.token", root, **options)


WAYS = {
    "constructor": constructor,
    "lists": lists,
    "csv": table(",", "pairs.csv"),
    "tsv": table("\t", "pairs.tsv"),
    "two columns": two_columns,
    "jsonl": jsonl,
    "parquet of paths": parquet(lambda path, name: name),
    "parquet of bytes": parquet(lambda path, name: path.read_bytes()),
    "folder": folder,
    "class folders": class_folders,
    "hub": hub,
    "hub of PIL": hub_of_pil,
    "saved": saved,
    "shards": shards,
    "coco": coco,
    "karpathy": karpathy,
    "tokens": tokens,
}


ROWS, NOISE = torch.tensor([3, 0, 6, 2, 5]), torch.tensor([0.9, 0.1, 0.6, 0.7, 0.2])


@pytest.mark.filterwarnings("ignore:Using an existing")
@pytest.mark.parametrize("name", WAYS)
def test_every_way_in_gives_the_same_batches(name, root, tokenizer):
    """Decoded by 0 and 2 processes, cached, and kept in memory; against a direct use of PIL."""
    reference = mm.MultimodalDataset.from_pixels(by_hand(root), TEXTS).batch(ROWS, NOISE)
    data = WAYS[name](root, **OPTIONS)
    assert data.texts == TEXTS and not data.resident
    assert data.report is None or (data.report.images, data.report.captions) == (7, 14)
    kept = WAYS[name](root, **OPTIONS | dict(device="cpu")).keep_on("cpu")
    for workers in (0, 2):
        (batch,) = load_batches(data, [(ROWS, NOISE)], workers, False)
        same(batch, reference)
    same(kept.batch(ROWS, NOISE), reference)
    same(data.cached().batch(ROWS, NOISE), reference)
    assert data.resident


def same(batch, reference):
    for name in ("pixel_values", "input_ids", "valid", "sample_ids"):
        assert torch.equal(getattr(batch, name), getattr(reference, name)), name
    assert torch.equal(batch.correct(), reference.correct())


# ---- names -------------------------------------------------------------------------------------


def test_the_hub_is_not_asked_for_what_is_a_path(root, monkeypatch):
    """A suffix or an existing folder decides; any other name with one slash is one on the hub."""
    asked = []
    monkeypatch.setattr("mmkit.data.sources.from_hub", lambda name, **_: asked.append(name))
    monkeypatch.chdir(root)
    for name in ("data/pairz.csv", "data/x.JPG", "bird/nothing", "./x", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="does not exist; check the path"):
            mm.load_data(name)
    mm.load_data("user/set-v1.5")
    assert asked == ["user/set-v1.5"]


# ---- tar shards ----------------------------------------------------------------------------------


def test_ids_that_occur_twice_are_numbers_of_rows(by_artists, tmp_path):
    """Two sets of shards together, and a set in which some ids are unknown."""
    part = by_artists.subset([7, 5, 3])
    for name in ("one", "two"):
        write_shards(part, tmp_path / name)
    both = from_shards([tmp_path / "one", tmp_path / "two"], image_size=11)
    assert both.sample_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert from_shards(tmp_path / "two", image_size=11).sample_ids.tolist() == [7, 5, 3]
    other = [member("x.png", (tmp_path / "0.png").read_bytes()), member("x.txt", b"x")]
    path = write_tar(tmp_path / "two" / "x.tar", other)
    assert from_shards(tmp_path / "two", image_size=11).sample_ids.tolist() == [0, 1, 2, 3]
    assert from_shards(path, image_size=11).sample_ids.tolist() == [0]


def test_shards_of_before_still_load_and_img2dataset_has_metadata(real, tmp_path):
    """Without metadata nothing is added; keys of other .json are metadata, missing ones None."""
    shards = write_shards(real, tmp_path / "out")
    with tarfile.open(shards[0]) as tar:
        names = [m.name for m in tar if m.name.endswith(".json")]
    assert names == ["000000002.json"]  # the only one of several captions
    assert from_shards(tmp_path / "out", image_size=13).sample_ids.tolist() == list(range(7))
    png = (tmp_path / "6.ppm").read_bytes()
    metadata = {"caption": "c", "url": "https://x.org", "key": "000000000", "sha256": "ab"}
    foreign = write_tar(
        tmp_path / "foreign.tar",
        [
            *[member("0.jpg", png), member("0.json", json.dumps(metadata).encode())],
            *[member("1.jpg", png[:-1] + b"x"), member("1.json", b'{"caption": "d"}')],
        ],
    )
    data = from_shards(foreign, meta=["url", "key"], image_size=13)
    assert [row["url"] for row in data.meta] == ["https://x.org", None]
    assert data.meta[0]["key"] == "000000000" and data.texts == [["c"], ["d"]]
    with pytest.raises(ValueError, match=r"no \.json has the key 'ulr'; did you mean 'url'"):
        from_shards(foreign, meta=["ulr"])
    write_tar(tmp_path / "bare.tar", [member("0.jpg", png), member("0.txt", b"x")])
    with pytest.raises(ValueError, match=r"the key .url.; no sample has a \.json"):
        from_shards(tmp_path / "bare.tar", meta=["url"])


def test_the_suffix_of_images_can_be_named(by_artists, tmp_path):
    png = [(tmp_path / f"{i}.png").read_bytes() for i in range(2)]
    members = [member("0.jpg", png[0]), member("0.seg.png", png[1]), member("0.txt", b"x")]
    path = write_tar(tmp_path / "a.tar", members)
    for image, i in ((None, 0), ("seg.png", 1), (["seg.png", "jpg"], 1)):
        data = from_shards(path, image=image, image_size=11)
        assert data[0]["image"].equal(by_artists[i]["image"])


def test_shards_that_are_not_looked_at_are_said_to_be(by_artists, tmp_path, serve):
    """What lies at an address exceeds the spool: a bad image stops the training run."""
    written = write_shards(by_artists, tmp_path / "out", samples_per_shard=30)
    room = max(path.stat().st_size for path in written) / 1e9  # room for one of three
    members = [member("x.png", b"no image"), member("x.txt", b"x")]
    write_tar(tmp_path / "out/00002.tar", members)
    options: dict = dict(image_size=11, num_workers=0, on_error="skip")
    url = f"{serve.url}/out/{{00000..00002}}.tar"
    data = from_shards(url, spool_gigabytes=room, **options)
    said = str(data.report)
    assert "not checked: the shards fill 0.0 GB, more than spool_gigabytes=0.000" in said
    assert "a broken image will stop the training" in said and "check='decode'" in said
    assert data.report.to_dict()["why_unchecked"] and len(data) == 61
    assert data.report.why_unchecked in str(data.subset([3]).report)
    with pytest.raises(Refused, match=r"00002\.tar: x\.png"):
        data.batch([60])
    for looked in (
        from_shards(url, spool_gigabytes=room, check="decode", **options),
        from_shards(url, **options),
    ):
        assert looked.report.skipped == {"not an image": 1} and len(looked) == 60
        assert "each decoded" in str(looked.report) and not looked.report.why_unchecked
    on_purpose = from_shards(url, spool_gigabytes=room, check="none", **options)
    assert str(on_purpose.report).count("not checked\n") == 1


def test_a_cut_shard_trips_the_limit(make_real_shards):
    """How many samples it loses is not known: shards are counted, not the one row that is said."""
    folder, options = make_real_shards(4, 3), dict(image_size=8, num_workers=0, on_error="skip")
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="1 of 4 shards are cut off or damaged, more than"):
        from_shards(folder, **options)
    data = from_shards(folder, max_skipped=0.25, **options)
    assert data.report.skipped == {"truncated shard": 1} and len(data) < 12
    (folder / "00001.tar").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"1 of 4 shards are .* this is not a tar"):
        from_shards(folder, **options)


@pytest.fixture
def make_real_shards(cache, tmp_path):
    """So many shards of so many real images."""

    def make(shards: int, each: int):
        (tmp_path / "real").mkdir()
        for i in range(shards):
            members = []
            for j in range(each):
                image = one_colour("PNG", colour=(50 * i, 50 * j, 9))
                members += [member(f"{i}-{j}.png", image), member(f"{i}-{j}.txt", b"a colour")]
            write_tar(tmp_path / "real" / f"{i:05d}.tar", members)
        return tmp_path / "real"

    return make
