"""The command line does the whole job on the built-in images."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmkit as mm
import mmkit.cli.commands as cli
from mmkit.cli.source_flags import Source


def mmkit(*words):
    command = [sys.executable, "-m", "mmkit", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_train_then_evaluate_then_search(tmp_path):
    """A few steps, then a table, a grid of ten searches, and a search by a given text."""
    where = ["--output-dir", tmp_path, "--run-name", "quick"]
    done = mmkit("train", "--max-steps", 3, "--batch-size", 32, *where)
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
    done = mmkit("evaluate", "--checkpoint", checkpoint, "--part", "val", "--masked", 0.75)
    assert "compose val: " in done.stdout and "75 % of patches masked" in done.stdout, done.stderr
    grid = tmp_path / "found.png"
    done = mmkit("search", "a red heart", "--checkpoint", checkpoint, "--k", 7, "--out", grid)
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
    done = mmkit(
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
    done = mmkit("export", "--checkpoint", checkpoint, "--out", tmp_path / "shared")
    assert done.returncode == 0 and "written to" in done.stdout, done.stderr
    weights = mm.load(tmp_path / "shared").state_dict()
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    card = (tmp_path / "shared/README.md").read_text()
    for row in ("| data | noise |", "| `image_mask_ratio` | 0.5 |", "| weights of epoch | 5 |"):
        assert row in card
    again = mmkit("export", "--checkpoint", tmp_path / "shared", "--out", tmp_path / "again")
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
    wrong = mmkit("train", "--image-mask-ratio", 1.5, "--output-dir", tmp_path)
    assert wrong.returncode != 0 and "Traceback" not in wrong.stderr
    assert "must be in [0, 1)" in wrong.stderr + wrong.stdout
    gone = mmkit("evaluate", "--checkpoint", tmp_path / "gone.pth")
    assert (
        gone.returncode == 2
        and "no checkpoint at" in gone.stderr
        and "Traceback" not in gone.stderr
    )
