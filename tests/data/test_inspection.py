"""The report of `mm.inspect` is right for every loader, subset and transform."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import mmkit as mm
from tests.data.test_sources import NAMES, OPTIONS, TEXTS, folder, images, lists


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def root(tmp_path):
    """Seven images of different sizes with a .txt beside each."""
    return images(tmp_path / "images")


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


def test_a_caption_of_very_many_images_is_named_with_what_it_costs(tmp_path):
    """At load, and by `inspect`; a subset is counted again."""
    lines = ["image,title,kind"]
    for i in range(31):
        Image.new("RGB", (9, 9), (8 * i, 99, 255 - i)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,thing number {i},{'a red one' if i % 3 else 'blue'}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    options = dict(text=["title", "kind"], image_size=8, cache_gigabytes=0)
    data = mm.from_table(tmp_path / "pairs.csv", **options)
    report = data.report
    assert report.common_captions == {"a red one": 20, "blue": 11}
    other = (20 * 19 + 11 * 10) / 2 / (31 * 30)  # a class name is drawn half of the time
    assert report.left_out == pytest.approx(other)
    line = f"“a red one” of 20, “blue” of 11 of 31 images; {100 * other:.1f} % of a batch's other"
    assert line in str(report) and line in str(mm.inspect(data, near=False))
    assert report.to_dict()["common_captions"] == report.common_captions
    part = data.subset(range(13))
    assert part.report.common_captions == {} and "very common" not in str(part.report)


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


def test_a_transform_that_fails_says_so_in_its_own_words(root):
    """The error is raised here, not as the traceback of a worker process."""

    def transform(image):
        raise TypeError("my own mistake")

    paths = [root / name for name in NAMES]
    with pytest.raises(TypeError, match=r"^my own mistake$"):
        mm.from_lists(paths, TEXTS, transform=transform, on_error="skip", num_workers=2)
    from mmkit.data.loader import load_batches

    data = mm.from_lists(paths, TEXTS, transform=transform, num_workers=2)
    keys = [(torch.arange(7), torch.zeros(7))]
    with pytest.raises(TypeError, match=r"^my own mistake$"):
        list(load_batches(data, keys, 2, False))


@pytest.mark.parametrize("colour", ["white", (1, 2), (0, 0, 256), (0.5, 0.5, 0.5)])
def test_a_background_that_is_no_colour_is_refused_before_any_file(root, colour):
    with pytest.raises(ValueError, match=r"background=.* must be three numbers, 0 to 255 each"):
        lists(root, reading=mm.Reading(background=colour))
    with pytest.raises(ValueError, match=r"is not an mm.Reading; give mm.Reading\("):
        lists(root, reading=dict(background=colour))


def test_a_part_without_a_report_is_looked_at(root):
    data = mm.MultimodalDataset([root / name for name in NAMES], TEXTS, image_size=8)
    report = mm.inspect(data)
    assert (report.rows, report.images, report.captions) == (7, 7, 14)
    assert report.identical_images == 0
