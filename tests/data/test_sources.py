"""Every loader gives the same batches and the same training run for the same images."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import mmkit as mm
from mmkit.data.loader import load_batches
from mmkit.errors import Refused
from tests.conftest import captions, centre_square
from tests.train_small import DEFAULTS

SIDE = 8
KINDS = ["bird", "cat", "cat", "dog", "eel", "fox", "gnu"]  # two cats, which share their captions
NAMES = [f"{kind}/{i}.{'jpg' if i % 2 else 'png'}" for i, kind in enumerate(KINDS)]
TEMPLATES = ["a photo of a {}", "this is my {}"]
TEXTS = [[template.format(kind) for template in TEMPLATES] for kind in KINDS]
OPTIONS = dict(image_size=SIDE, num_workers=0)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MMKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def root(tmp_path):
    """Seven images of different sizes with a .txt beside each."""
    return images(tmp_path / "images")


def images(root, seed=0):
    generator = np.random.default_rng(seed)
    for i, name in enumerate(NAMES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (11 + 2 * i, 29 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text("\n".join(TEXTS[i]))
    return root


# ---- loaders -------------------------------------------------------------------------------------


def constructor(root, **options):
    return mm.MultimodalDataset([root / name for name in NAMES], TEXTS, image_size=SIDE)


def lists(root, **options):
    return mm.from_lists([root / name for name in NAMES], TEXTS, **options)


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


def parquet(values):
    def way(root, **options):
        import pyarrow
        import pyarrow.parquet

        columns = {"image": [values(root / name, name) for name in NAMES], "text": TEXTS}
        pyarrow.parquet.write_table(pyarrow.table(columns), root / "pairs.parquet")
        return mm.from_table(root / "pairs.parquet", **options)

    return way


def folder(root, **options):
    return mm.from_folder(root, **options)


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


def by_hand(root):
    """The expected images (7, 3, 8, 8), uint8."""
    return torch.stack([centre_square(Image.open(root / name), SIDE) for name in NAMES])


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


def test_a_data_set_of_shards_has_a_name_to_read(root, tmp_path):
    paths = mm.write_shards(folder(root), tmp_path / "birds", 3)
    for source, name in (
        (paths, "00000.tar and 2 more"),
        (paths[:1], "00000.tar"),
        (tmp_path / "birds", "birds"),
        (f"{tmp_path}/birds/*.tar", "birds/*.tar"),
        (f"{tmp_path}/birds/{{00000..00002}}.tar", "birds/{00000..00002}.tar"),
    ):
        assert mm.load_data(source, **OPTIONS).name == name


# ---- training, the report -----------------------------------------------------------------------


def test_a_run_is_the_same_with_the_cache_without_it_and_in_memory(tmp_path, make_model):
    """The losses of each step are equal bit for bit."""
    generator = np.random.default_rng(0)
    (tmp_path / "p").mkdir()
    rows = ["image,text"]
    for i, text in enumerate(captions(23)):
        pixels = generator.integers(0, 256, (17, 19, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"p/{i}.png")
        rows += [f"p/{i}.png,{text}", f"p/{i}.png,again {text}"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    losses = {}
    for name, options, workers in (
        ("cached", {}, 0),
        ("anew", dict(cache_gigabytes=0), 2),
        ("memory", dict(device="cpu"), 0),
    ):
        data = mm.from_table(tmp_path / "pairs.csv", image_size=15, **options)
        values = dict(output_dir=str(tmp_path), run_name=name, num_epochs=2, num_workers=workers)
        run = mm.train_model(mm.TrainingConfig(**DEFAULTS | values), data, None, make_model())
        losses[name] = run.curve("loss")[1]
        assert data.resident == (name != "anew")
    assert len(losses["cached"]) == 6
    assert losses["cached"] == losses["anew"] == losses["memory"]


def test_a_report_counts_every_row(root):
    """Loaded and skipped rows add up, by reason, in the message, the table and the JSON."""
    rows = [f"{name},{text}" for name, texts in zip(NAMES, TEXTS, strict=True) for text in texts]
    rows += ["gone.png,x", "gone.png,y", f"{NAMES[0]},", "../x.png,z", f"{NAMES[0]},{TEXTS[0][0]}"]
    (root / "pairs.csv").write_text("\n".join(["image,text", *rows]))
    with pytest.raises(Refused, match=r"line 16: .*gone\.png does not exist"):
        mm.from_table(root / "pairs.csv", **OPTIONS)
    with pytest.raises(ValueError, match=r"4 of 19 rows \(21.1 %\) .* more than max_skipped=0.1"):
        mm.from_table(root / "pairs.csv", on_error="skip", **OPTIONS)
    report = mm.from_table(root / "pairs.csv", on_error="skip", max_skipped=0.25, **OPTIONS).report
    assert (report.rows, report.loaded, report.images, report.captions) == (19, 15, 7, 14)
    assert report.skipped == {"missing": 3, "no caption": 1}
    assert report.widths == [29 - i for i in range(7)]
    assert report.heights == [11 + 2 * i for i in range(7)]
    assert report.shared_captions == 2 and report.identical_images == 0
    assert report.bytes == sum((root / name).stat().st_size for name in NAMES)
    assert "19 = 15 loaded + 4 skipped" in str(report)
    assert report.to_dict()["width"]["median"] == 26


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(image_size="64"), r"image_size='64' must be a whole number \(without quotes\)"),
        (dict(image_size=12.5), "image_size=12.5 must be a whole number"),
        (dict(image_size=0), "image_size=0 must be at least 1 pixel"),
        (dict(num_workers=-1), "num_workers=-1 must be 0 or more"),
        (dict(num_workers="2"), "num_workers='2' must be a whole number"),
        (dict(max_skipped="0.1"), "max_skipped='0.1' must be a number"),
        (dict(max_skipped=float("nan")), "max_skipped=nan must be a finite number"),
        (dict(cache_gigabytes=-1), "cache_gigabytes=-1.0 must be 0 or more"),
        (dict(transform="resize"), "transform='resize' must be a function of a PIL image"),
    ],
)
def test_options_of_another_type_are_named(root, options, words):
    with pytest.raises(ValueError, match=words):
        mm.from_folder(root, **OPTIONS | options)
    size = np.int64(13)
    assert mm.from_folder(root, **OPTIONS | dict(image_size=size))[0]["image"].shape == (3, 13, 13)
