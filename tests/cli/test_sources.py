"""The command line on a user's images: inspect, train, evaluate, search, and refusals.

In this process: `main` is called as `python -m mmkit` would.
"""

import json
import re
import shlex
import sys

import numpy as np
import pytest
from PIL import Image

import mmkit as mm
from mmkit.cli.commands import main
from mmkit.cli.source_flags import Source

ARTISTS = [f"artist {letter}" for letter in "abcdefghijklmnopqrstuvwx"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MMKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def mmkit(monkeypatch, capsys):
    """Call the command line; (exit status, output, error message)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["mmkit", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, said.out, said.err

    return call


def scene(i: int) -> Image.Image:
    """Patterns of 4 x 4 colours, 32 px: images that are clearly different."""
    coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse.repeat(8, 0).repeat(8, 1))


@pytest.fixture
def own(tmp_path):
    """A folder named "my set": 48 images in pics/, pairs.csv, and files that a test adds."""
    folder = tmp_path / "my set"
    (folder / "pics").mkdir(parents=True)
    rows = ["file,words,artist"]
    for i in range(48):
        scene(i).save(folder / f"pics/{i}.png")
        rows.append(f"{i}.png,image of number {i},{ARTISTS[i % 24]}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder


FLAGS = ["--image", "file", "--text", "words"]


def with_bad_rows(folder, count: int = 3):
    """pairs.csv with rows that cannot be loaded."""
    (folder / "pics/broken.png").write_bytes(b"<html>")
    bad = ["gone.png,a word,Ann", "broken.png,a word,Ann", "1.png,,Ann"][:count]
    with open(folder / "pairs.csv", "a") as file:
        file.write("\n".join(bad) + "\n")


# ---- inspect -------------------------------------------------------------------------------------


def test_inspect_says_what_is_odd_and_writes_it_down(mmkit, own, tmp_path):
    with_bad_rows(own)
    files = ["--json", tmp_path / "r.json", "--figure", tmp_path / "r.png"]
    status, said, _ = mmkit("inspect", own / "pairs.csv", *FLAGS, "--root", own / "pics", *files)
    assert status == 0
    assert re.search(r"^rows +51 = 48 loaded \+ 3 skipped$", said, re.MULTILINE), said
    for reason in ("missing", "not an image", "no caption"):
        assert re.search(rf"^  {reason} +1; ", said, re.MULTILINE), said
    assert "each decoded" in said and re.search("^duplicates", said, re.MULTILINE)
    assert f"written: {tmp_path / 'r.json'}" in said and f"written: {tmp_path / 'r.png'}" in said
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["rows"], report["loaded"], sum(report["skipped"].values())) == (51, 48, 3)
    assert report["width"]["median"] == 32
    with Image.open(tmp_path / "r.png") as figure:
        assert figure.width > 600
    status, said, _ = mmkit("inspect", own / "pairs.csv", *FLAGS, "--root", own / "pics",
                            "--no-near", "--max-length", 4)  # fmt: skip
    assert status == 0 and "duplicates" not in said and "48 are longer than 4 and are cut" in said


def as_words(own):
    for i in range(48):
        (own / f"pics/{i}.txt").write_text(f"image of number {i}")
    return own / "pics"


def as_classes(own):
    for i in range(48):
        (own / f"classes/{ARTISTS[i % 24]}").mkdir(parents=True, exist_ok=True)
        (own / f"pics/{i}.png").rename(own / f"classes/{ARTISTS[i % 24]}/{i}.png")
    return own / "classes"


def as_shards(own):
    data = mm.from_table(own / "pairs.csv", image="file", text="words", root=own / "pics",
                         meta=["artist"])  # fmt: skip
    mm.write_shards(data, own / "shards", samples_per_shard=20)
    return own / "shards"


def as_parquet(own):
    import pyarrow
    import pyarrow.parquet

    images = [(own / f"pics/{i}.png").read_bytes() for i in range(48)]
    texts = [f"image of number {i}" for i in range(48)]
    artists = [ARTISTS[i % 24] for i in range(48)]
    columns = {"image": images, "text": texts, "artist": artists}
    pyarrow.parquet.write_table(pyarrow.table(columns), own / "pairs.parquet")
    return own / "pairs.parquet"


def as_saved(own):
    import datasets

    made = datasets.Dataset.from_parquet(str(as_parquet(own)), cache_dir=str(own / "made"))
    datasets.DatasetDict(train=made, other=made.select(range(5))).save_to_disk(own / "saved")
    return own / "saved"


@pytest.mark.filterwarnings("ignore:Using an existing")
@pytest.mark.parametrize(
    "make, flags",
    [
        (as_words, []),
        (as_classes, []),
        (as_shards, ["--image", "png"]),
        (as_parquet, ["--image", "image"]),
        (as_saved, ["--data-split", "train"]),
    ],
)
def test_inspect_takes_every_kind_of_source(mmkit, own, make, flags):
    status, said, complaint = mmkit("inspect", make(own), *flags)
    assert status == 0 and "48 loaded + 0 skipped" in said, complaint


# ---- train, evaluate, search ---------------------------------------------------------------------


def run_on(folder, *flags, steps: int = 2):
    where = ["--output-dir", folder / "runs", "--run-name", "my own"]
    small = ["--max-steps", steps, "--batch-size", 8, "--num-workers", 0]
    return ["train", *where, *small, "--data", *flags]


def table(said: str) -> list[str]:
    """The lines of scores, without the last one, which is chance."""
    return re.findall(r"^(?:nothing masked|50 % of patches masked) .*$", said, re.MULTILINE)


def test_a_set_with_bad_rows_is_trained_on_scored_and_searched(mmkit, own, tmp_path):
    """With the flags it needs, in folders whose names must be quoted, as its last lines say."""
    with_bad_rows(own)
    source = [own / "pairs.csv", *FLAGS, "--root", own / "pics", "--on-error", "skip"]
    status, said, complaint = mmkit(*run_on(tmp_path, *source))
    assert status == 0, complaint
    assert "51 = 48 loaded + 3 skipped" in said
    assert "No overlap of training and test found.\n" in said
    count = int(re.search(r"test part: (\d+) images", said)[1])
    assert 0 < count < 20 and (tmp_path / "runs/my own/searches.png").is_file()
    model = tmp_path / "runs/my own/best_model.pth"
    (line,) = [line for line in said.splitlines() if " -m mmkit search " in line]
    words = shlex.split(line)
    assert words[2:4] == ["mmkit", "search"] and words[4].startswith("image of number ")
    assert words[5:] == ["--data", *map(str, source), "--checkpoint", str(model)]
    out = tmp_path / "found.png"
    status, found, complaint = mmkit(*words[3:], "--k", 3, "--out", out)
    assert status == 0 and len(found.splitlines()) == 4 and out.is_file(), complaint

    scores = table(said)
    status, again, complaint = mmkit("evaluate", "--data", *source, "--checkpoint", model)
    assert status == 0 and table(again) == scores and "beware" not in again, complaint
    assert f"test part: {count} images" in again
    status, said, _ = mmkit("evaluate", "--data", *source, "--checkpoint", model, "--part", "all")
    assert status == 0 and "all of pairs.csv: 48 images" in said
    assert "beware: these are all images, including those that the model was trained on" in said
    by = ["--group", "artist", "--part", "val"]
    status, said, _ = mmkit("evaluate", "--data", *source, "--checkpoint", model, *by)
    assert status == 0 and "beware: pairs.csv-train is not what it was" in said
    assert "val part: " in said
    other = as_classes(own)
    status, said, _ = mmkit("evaluate", "--data", other, "--checkpoint", model)
    assert "beware: trained on pairs.csv-train, not on classes-train" in said


@pytest.mark.parametrize(
    "make, flags",
    [
        (as_classes, ["--group", "class"]),
        (as_shards, ["--group", "artist"]),
        (as_words, ["--group", "content"]),
    ],
)
def test_what_stays_together_is_a_column_of_any_source(mmkit, own, tmp_path, make, flags):
    """By a class, or a key in a shard's metadata; few test images give few results, no error."""
    source = make(own)
    status, said, complaint = mmkit(*run_on(tmp_path, source, *flags, steps=1))
    assert status == 0 and "ten searches: " in said, complaint
    assert "No overlap of training and test found.\n" in said
    where = ["--checkpoint", tmp_path / "runs/my own/best_model.pth"]
    status, again, complaint = mmkit("evaluate", "--data", source, *flags, *where)
    assert status == 0 and table(again) == table(said) and "beware" not in again, complaint


def test_four_images_in_a_test_part_are_enough(mmkit, tmp_path):
    """The grid of ten searches shows six images, if there are as many."""
    rows = ["image,text"]
    for i in range(30):
        scene(i).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,number {i}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    for seed in range(20):
        parts = mm.split(mm.from_table(tmp_path / "pairs.csv"), seed=seed)
        if len(parts[2]) < 6:
            break
    status, said, complaint = mmkit(*run_on(tmp_path, tmp_path / "pairs.csv", "--seed", seed))
    assert status == 0 and f"each with its nearest of {len(parts[2])}" not in complaint, complaint
    assert f"test part: {len(parts[2])} images" in said and len(parts[2]) < 6


def test_what_the_parts_share_is_said_in_numbers(mmkit, tmp_path):
    """Grouped by content, near-duplicates fall into different parts."""
    rows = ["image,text"]
    for i in range(30):
        scene(i).save(tmp_path / f"{i}.png")
        brighter = Image.fromarray(np.minimum(255, np.asarray(scene(i)) * 1.03 + 2).astype("uint8"))
        brighter.save(tmp_path / f"again-{i}.png")
        rows += [f"{i}.png,number {i}", f"again-{i}.png,the other {i}"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    data = tmp_path / "pairs.csv"
    status, said, complaint = mmkit(*run_on(tmp_path, data, "--group", "content", steps=1))
    assert status == 0, complaint
    train, _, test = mm.split(mm.from_table(data, image_size=64), by="content")
    near = mm.overlap(train, test).near
    fraction = f"{near} of {len(test)} test images ({100 * near / len(test):.1f} %)"
    assert near > 0 and f"{fraction} are near-duplicates of one in training" in said
    assert "Scores on test are too high" in said


# ---- published formats ---------------------------------------------------------------------------


def coco(own):
    value = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(48)],
        "annotations": [{"image_id": i, "caption": f"image of number {i}"} for i in range(48)],
    }
    (own / "captions.json").write_text(json.dumps(value))
    return own / "captions.json"


def karpathy(own):
    images = [
        {"filename": f"{i}.png", "split": "val" if i < 9 else "train", "sentences": [{"raw": "x"}]}
        for i in range(48)
    ]
    (own / "dataset.json").write_text(json.dumps({"images": images}))
    return own / "dataset.json"


def tokens(own):
    lines = [f"{i}.png#0\timage of number {i}" for i in range(48)]
    (own / "results.token").write_text("\n".join(lines))
    return own / "results.token"


@pytest.mark.parametrize(
    "make, flags, count",
    [
        (coco, {}, 48),
        (karpathy, {}, 48),
        (karpathy, {"data_split": "val"}, 9),
        (tokens, {}, 48),
    ],
)
def test_coco_and_flickr30k_are_told_by_their_keys(mmkit, own, make, flags, count):
    path = make(own)
    data = Source(str(path), root=str(own / "pics"), **flags).load(image_size=8)
    assert len(data) == count and data.meta[0].keys() <= {"image_id", "split"}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    words = [word.replace("_", "-") for word in words]
    status, said, _ = mmkit("inspect", path, "--root", own / "pics", *words, "--no-near")
    assert status == 0 and f"{count} loaded + 0 skipped" in said
    status, _, complaint = mmkit("inspect", path)
    assert status == 2 and "does not say where its images are; give --root FOLDER" in complaint


def test_json_lines_are_a_table_still(mmkit, own):
    (own / "pairs.json").write_text(
        '{"image": "1.png", "text": "x"}\n{"image": "2.png", "text": "y"}'
    )
    status, said, complaint = mmkit("inspect", own / "pairs.json", "--root", own / "pics")
    assert status == 0 and "2 loaded + 0 skipped" in said, complaint


def test_encoding_and_separator_are_flags(mmkit, own):
    rows = (own / "pairs.csv").read_text().replace(",", "|").replace("number", "Nummer für")
    (own / "old.csv").write_bytes(rows.encode("cp1252"))
    flags = [*FLAGS, "--root", own / "pics", "--no-near"]
    status, _, complaint = mmkit("inspect", own / "old.csv", *flags)
    assert status == 2 and "encoding" in complaint
    how = ["--encoding", "cp1252", "--separator", "|"]
    status, said, complaint = mmkit("inspect", own / "old.csv", *flags, *how)
    assert status == 0 and "48 loaded" in said, complaint


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using an existing")
@pytest.mark.parametrize(
    "make, words, says",
    [
        (as_words, ["inspect", "--image", "x"], "--image x has no meaning for .*mm.from_folder;"),
        (as_classes, ["inspect", "--text", "x"], "--text x has no meaning for .*class_folders"),
        (as_classes, ["train", "--group", "kind"], "--group kind is not in meta; its keys are cl"),
        (as_shards, ["inspect", "--image", "jpg"], r"it has no image \(.jpg\), but"),
        (as_shards, ["inspect", "--root", "x"], "from_shards; leave it out; .* takes --image, --t"),
        (as_shards, ["train", "--group", "artst"], "no .json has the key 'artst'; did you mean 'a"),
        (as_parquet, ["train", "--group", "artst"], "no column 'artst'; did you mean 'artist'"),
        (as_parquet, ["inspect", "--data-split", "x"], "--data-split x has no meaning for"),
        (as_saved, ["inspect"], "has splits train, other; give --data-split "),
        (as_saved, ["inspect", "--data-split", "trian"], "no split 'trian'; did you mean 'train'"),
        (coco, ["train", "--text", "x"], "--text x has no meaning for .*from_coco.* takes --root"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(mmkit, own, capsys, make, words, says):
    command, *flags = words
    where, made = ([] if command == "inspect" else ["--data"]), make(own)
    capsys.readouterr()
    status, _, complaint = mmkit(command, *where, made, *flags)
    assert status == 2 and re.search(rf"^mmkit: .*{says}.*\n\Z", complaint, re.MULTILINE), complaint


@pytest.mark.parametrize("command", ["train", "search", "evaluate"])
def test_flags_of_own_images_need_data(mmkit, command):
    words = ["a word"] if command == "search" else []
    status, _, complaint = mmkit(command, *words, "--group", "artist", "--on-error", "skip")
    assert status == 2
    assert complaint == (
        "mmkit: --group, --on-error is for images of your own; give --data, too, or leave it out\n"
    )


def test_all_of_the_built_in_images_are_not_a_part(mmkit):
    status, _, complaint = mmkit("evaluate", "--part", "all")
    assert status == 2 and "--part all is for images of your own" in complaint


def test_a_library_that_is_not_there_is_one_line(mmkit, own, monkeypatch):
    path = as_parquet(own)
    monkeypatch.setitem(sys.modules, "datasets", None)
    status, _, complaint = mmkit("inspect", path)
    assert status == 2 and 'pip install "mmkit[data]"' in complaint


def test_too_many_bad_rows_are_refused_or_allowed_by_a_flag(mmkit, own):
    with_bad_rows(own)
    source = ["--data", own / "pairs.csv", *FLAGS, "--root", own / "pics", "--on-error", "skip"]
    status, _, complaint = mmkit("train", *source, "--max-skipped", 0.01)
    assert status == 2 and re.search(r"3 of 51 rows .* more than max_skipped=0.01", complaint)
    for command in (["train"], ["search", "a word"], ["evaluate"]):
        status, _, complaint = mmkit(*command, *source, "--max-skipped", 7)
        assert status == 2 and ("must be in [0, 1]" in complaint or "no run" in complaint)


def test_a_part_that_is_empty_is_said_in_flags(mmkit, own):
    """Three groups cannot form three parts; the remedy names flags of the command line."""
    for i in range(48):
        (own / f"three/{i % 3}").mkdir(parents=True, exist_ok=True)
        (own / f"pics/{i}.png").rename(own / f"three/{i % 3}/{i}.png")
    status, _, complaint = mmkit("train", "--data", own / "three", "--group", "class")
    assert status == 2 and "would be empty: 48 images form 3 groups" in complaint
    assert "try another --seed than 0, or --group content, which joins less" in complaint
