"""A report counts every row, loaded or skipped, and names very common captions."""

import pytest
from PIL import Image

import mmkit as mm
from mmkit.errors import Refused
from tests.data.seven_images import NAMES, OPTIONS, TEXTS

pytestmark = pytest.mark.usefixtures("cache")


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
