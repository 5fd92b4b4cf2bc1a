"""The command line does the whole job on the built-in images, and on images of one's own."""

import dataclasses
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmkit as mm
import mmkit.cli.commands as cli
from mmkit.cli.source_flags import Source
from tests.cli.own_images import (
    FLAGS,
    as_classes,
    as_parquet,
    run_on,
    scene,
    table,
    with_bad_rows,
)


def spawn(*words):
    """`python -m mmkit` with these words, in a process of its own."""
    command = [sys.executable, "-m", "mmkit", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_train_then_evaluate_then_search(tmp_path):
    """A few steps, then a table, a grid of ten searches, and a search by a given text."""
    where = ["--output-dir", tmp_path, "--run-name", "quick"]
    done = spawn("train", "--max-steps", 3, "--batch-size", 32, *where)
    assert done.returncode == 0, done.stderr
    for words in (
        "3 steps of 32.0",
        "compose test: ",
        "nothing masked",
        "50 % of patches masked",
        "CC BY-SA 4.0",
    ):
        assert words in done.stdout, done.stdout
    assert (tmp_path / "quick/searches.png").stat().st_size > 50_000
    checkpoint = tmp_path / "quick/best_model.pth"
    done = spawn("evaluate", "--checkpoint", checkpoint, "--part", "val", "--masked", 0.75)
    assert "compose val: " in done.stdout and "75 % of patches masked" in done.stdout, done.stderr
    grid = tmp_path / "found.png"
    done = spawn("search", "a red heart", "--checkpoint", checkpoint, "--k", 7, "--out", grid)
    assert len(done.stdout.splitlines()) == 8 and grid.stat().st_size > 10_000, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "masker, said",
    [
        ("painted", "painted mask  "),
        ("layers", "layers mask  "),
        ("attentive", "attentive, 75 % masked"),
    ],
)
def test_any_masker_trains_and_scores(tmp_path, masker, said):
    """Also maskers without a ratio; a painted array is a flag in JSON."""
    painted = ["--painted-mask", str(torch.eye(8).int().tolist())] if masker == "painted" else []
    where = ["--output-dir", tmp_path, "--run-name", masker, "--image-mask-ratio", 0.75]
    done = spawn(
        "train", "--max-steps", 2, "--batch-size", 32, "--image-mask", masker, *painted, *where
    )
    assert done.returncode == 0 and said in done.stdout, done.stderr


@pytest.mark.slow
def test_torchrun_trains_and_rank_0_scores(tmp_path):
    """Two processes train; only rank 0 prints the table and the grid."""
    torchrun = Path(sys.executable).with_name("torchrun")
    words = "--standalone --nproc-per-node 2 -m mmkit train"
    where = [
        "--max-steps",
        "1",
        "--pixels-weight",
        "1",
        "--batch-size",
        "16",
        "--output-dir",
        tmp_path,
        "--run-name",
        "two",
    ]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    command = [torchrun, *words.split(), *map(str, where)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "reconstruction (masked as in training):\n" in done.stdout and "pixel error" in done.stdout
    )
    assert "processes: 2" in done.stdout and done.stdout.count("compose test: ") == 1
    assert (tmp_path / "two/searches.png").is_file()


def test_export_writes_a_folder_that_is_read_like_a_checkpoint(make_model, tmp_path):
    """The exported folder has the checkpoint's metadata of its training."""
    from mmkit.files import write_atomically

    model, checkpoint = make_model(), tmp_path / "best_model.pth"
    state = {"architecture": model.architecture(), "model_state_dict": model.state_dict()}
    state |= {"data": {"name": "noise"}, "config": mm.TrainingConfig().to_dict(), "epoch": 4}
    write_atomically(state, checkpoint)
    done = spawn("export", "--checkpoint", checkpoint, "--out", tmp_path / "shared")
    assert done.returncode == 0 and "written to" in done.stdout, done.stderr
    weights = mm.load(tmp_path / "shared").state_dict()
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    card = (tmp_path / "shared/README.md").read_text()
    for row in ("| data | noise |", "| `image_mask_ratio` | 0.5 |", "| weights of epoch | 5 |"):
        assert row in card
    again = spawn("export", "--checkpoint", tmp_path / "shared", "--out", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert "| data | noise |" in (tmp_path / "again/README.md").read_text()


def sentences(source: str) -> dict[str, str]:
    """{name: description} of a dataclass's fields or of a function's arguments."""
    if source.startswith("def "):
        words = source.partition("Args:\n")[2]
        said = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", words, re.MULTILINE)
    else:  # the comment above each field
        found = re.findall(r"((?:^    # .*\n)+)    (\w+): ", source, re.MULTILINE)
        said = [(name, comment.replace("    # ", "")) for comment, name in found]
    return {name: " ".join(sentence.split()) for name, sentence in said}


def flags(help_text: str) -> dict[str, str]:
    """{name: "choices sentence (default: …)"} of a help page, unwrapped."""
    found, name = {}, ""
    for line in help_text.splitlines():
        line = line[1:].rstrip("│ ")  # without its border
        if re.match(" (--[a-z]|STR)", line):
            name, _, line = line.strip().partition(" ")
            name = name.rstrip(",")
        elif not line.strip("─- "):
            name = ""
        if name:
            found[name] = " ".join(f"{found.get(name, '')} {line}".split())
    return found


@pytest.mark.parametrize("command", ["inspect", "train", "evaluate", "search", "export"])
def test_each_flag_shows_its_own_sentence_and_default(command, monkeypatch, capsys):
    """Nothing is cut off, and every flag has its own description."""
    function = {"inspect": cli.inspect_, "evaluate": cli._evaluate}.get(command)
    function = function or getattr(cli, command)
    said, defaults = sentences(inspect.getsource(function)), {}
    for name, argument in inspect.signature(function).parameters.items():
        defaults[name] = argument.default
    for name, part in (("config", mm.TrainingConfig), ("source", Source)):
        if name in said and command != "inspect":
            del said[name], defaults[name]
            said |= sentences(inspect.getsource(part))
            defaults |= {field.name: field.default for field in dataclasses.fields(part)}
    assert said.keys() == defaults.keys()
    assert len({*said.values()}) == len(said)
    monkeypatch.setattr(sys, "argv", ["mmkit", command, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = flags(capsys.readouterr().out)
    positional = {"inspect": "source", "search": "query"}.get(command)
    names = {"STR" if n == positional else f"--{n.replace('_', '-')}": n for n in said}
    assert shown.keys() == names.keys()
    for flag, words in shown.items():
        sentence, default = said[names[flag]], defaults[names[flag]]
        assert sentence[0].isupper() and sentence.endswith("."), sentence
        end = "(required)" if default is inspect.Parameter.empty else f"(default: {default!s})"
        choices, found, rest = words.partition(sentence)
        assert found and rest.replace("''", "").strip() == end, f"{flag}: {words}"
        assert not re.search("[a-z]", re.sub(r"--no-[a-z-]+|{[a-zN,]+}", "", choices)), words


def test_errors_are_one_line(tmp_path):
    wrong = spawn("train", "--image-mask-ratio", 1.5, "--output-dir", tmp_path)
    assert wrong.returncode != 0 and "Traceback" not in wrong.stderr
    assert "must be in [0, 1)" in wrong.stderr + wrong.stdout
    gone = spawn("evaluate", "--checkpoint", tmp_path / "gone.pth")
    assert (
        gone.returncode == 2
        and "no checkpoint at" in gone.stderr
        and "Traceback" not in gone.stderr
    )


# ---- images of one's own -------------------------------------------------------------------------


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


def test_all_of_the_built_in_images_are_not_a_part(mmkit):
    status, _, complaint = mmkit("evaluate", "--part", "all")
    assert status == 2 and "--part all is for images of your own" in complaint


def test_a_library_that_is_not_there_is_one_line(mmkit, own, monkeypatch):
    path = as_parquet(own)
    monkeypatch.setitem(sys.modules, "datasets", None)
    status, _, complaint = mmkit("inspect", path)
    assert status == 2 and 'pip install "mmkit[data]"' in complaint
