"""Flags say where a user's own images are, and wrong ones are refused in one line."""

import json
import re

import pytest

from mmkit.cli.source_flags import Source
from tests.cli.own_images import (
    FLAGS,
    as_classes,
    as_parquet,
    as_saved,
    as_shards,
    as_words,
    run_on,
    table,
    with_bad_rows,
)

# ---- any source ----------------------------------------------------------------------------------


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
