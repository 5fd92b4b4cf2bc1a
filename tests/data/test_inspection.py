"""The report of `mm.inspect` is right for every loader, subset and transform."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import mmkit as mm
from tests.data.awkward import RED
from tests.data.seven_images import NAMES, OPTIONS, TEXTS, folder

pytestmark = pytest.mark.usefixtures("cache")


def test_all_that_is_odd_is_said(root, tmp_path):
    """An image saved twice, one of one colour, a web page, a missing file, a long caption."""
    (root / "copy.png").write_bytes((root / NAMES[0]).read_bytes())
    Image.new("RGB", (40, 20), (7, 7, 7)).save(root / "black.png")
    (root / "page.jpg").write_bytes(b"<html>")
    rows = [*zip(NAMES, [texts[0] for texts in TEXTS], strict=True)]
    rows += [
        ("copy.png", "a copy"),
        ("black.png", "word " * 90),
        ("page.jpg", "x"),
        ("gone.png", "y"),
    ]
    lines = ["image,text", *(f"{name},{text}" for name, text in rows)]
    (root / "pairs.csv").write_text("\n".join(lines))
    report = mm.inspect(root / "pairs.csv", max_length=12, **OPTIONS)
    assert (report.rows, report.loaded, report.images) == (11, 9, 9)
    assert report.skipped == {"not an image": 1, "missing": 1}
    assert report.identical_images == 1 and report.duplicates.exact_images == 2
    assert [name.rpartition("/")[2] for name in report.blank] == ["black.png"]
    assert report.cut_captions == 1 and max(report.caption_tokens) == 92
    assert report.unknown == 0 and report.shared_captions == 1  # two cats
    table = str(report)
    for words in ("11 = 9 loaded + 2 skipped", "it is a web page", "1 equal an earlier one",
                  "1 are longer than 12 and are cut", "black.png", "an exact copy"):  # fmt: skip
        assert words in table
    again = json.loads(report.save(tmp_path / "report.json").read_text())
    assert again["skipped"] == report.skipped and again["duplicates"]["exact_images"] == 2
    assert again["width"]["max"] == 40 and again["cut_captions"] == 1


def test_a_part_is_reported_as_what_it_is(root):
    (root / "copy.png").write_bytes((root / NAMES[0]).read_bytes())
    (root / "copy.txt").write_text("a copy")
    data = folder(root, **OPTIONS)
    assert data.report.identical_images == 1
    part = data.subset([0, 2, 1])
    report = mm.inspect(part)
    assert (report.rows, report.loaded, report.images) == (3, 3, 3)
    assert report.widths == [data.report.widths[row] for row in (0, 2, 1)]
    assert report.bytes == sum(data.report.file_sizes[row] for row in (0, 2, 1))
    assert report.captions == sum(len(texts) for texts in part.texts)
    names = [part.image_name(row).rpartition("/")[2] for row in range(3)]
    assert report.identical_images == int({"copy.png", NAMES[0].rpartition("/")[2]} <= {*names})
    parts = mm.split(data, val=0, test=0.4, by="content", seed=1)[::2]
    assert sum(one.report.images for one in parts) == len(data) == data.report.images


@pytest.mark.parametrize("normalised", [False, True])
def test_images_from_a_transform_are_not_all_blank(root, normalised):
    """Floats from 0 to 1, or with a mean near 0: only the grey image is of one colour."""
    Image.new("RGB", (20, 20), (99, 99, 99)).save(root / "grey.png")

    def transform(image):
        pixels = torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1).float() / 255
        return (pixels - 0.45) / 0.22 if normalised else pixels

    paths = [root / name for name in [*NAMES, "grey.png"]]
    data = mm.from_lists(paths, [*TEXTS, "grey"], transform=transform, num_workers=0)
    assert [name.rpartition("/")[2] for name in mm.inspect(data, near=False).blank] == ["grey.png"]


def test_a_part_without_a_report_is_looked_at(root):
    data = mm.MultimodalDataset([root / name for name in NAMES], TEXTS, image_size=8)
    report = mm.inspect(data)
    assert (report.rows, report.images, report.captions) == (7, 7, 14)
    assert report.identical_images == 0


def test_twelve_bits_in_sixteen_are_said_and_the_remedy_works(tmp_path):
    """Divided by the full range, so that a series stays comparable; `inspect` names the remedy."""
    grey = np.linspace(0, 4095, 97).astype(np.uint16)[None].repeat(89, 0)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey).save(tmp_path / "b.tif")
    Image.new("RGB", (97, 89), RED).save(tmp_path / "c.png")
    paths, texts = [tmp_path / name for name in ("a.png", "b.tif", "c.png")], ["a", "b", "c"]
    options = dict(num_workers=0, cache_gigabytes=0, image_size=29)
    report = mm.inspect(mm.from_lists(paths, texts, **options), near=False)
    assert [name[-5:] for name in report.dark] == ["a.png", "b.tif"]
    said = str(report)
    assert "nearly black" in said and report.to_dict()["dark"] == report.dark
    (remedy,) = set(re.findall(r"reading=(mm\.Reading\(white=\d+\))", said))
    data = mm.from_lists(paths, texts, reading=eval(remedy), **options)
    assert not mm.inspect(data, near=False).dark
    for row in range(2):
        seen = data[row]["image"].int()
        assert seen.max() > 235 and seen.min() < 20 and data[2]["image"][0].eq(RED[0]).all()
