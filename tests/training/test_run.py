"""A run's folder: one writer at a time, nothing foreign removed, all that was promised is there."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import mmkit as mm
from mmkit.models.checkpoint import read_checkpoint
from mmkit.training import run as run_module
from tests.training.small_runs import at, everything, interrupt

# ---- what a run leaves ---------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(make_config, make_model, make_data, capsys):
    """best_model.pth and its contents, last/, config.json, metrics.jsonl, TensorBoard's scalars."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train, val = make_data(53), make_data(17, seed=1)
    run = mm.train_model(make_config(num_epochs=3), train, val, make_model())
    state = torch.load(run.path / "best_model.pth", weights_only=True)
    promised = {
        "model_state_dict",
        "optimizer_state_dict",
        "epoch",
        "best_loss",
        "config",
        "architecture",
    }
    assert promised <= state.keys()
    assert state["best_loss"] == min(r["loss"] for r in run.history if r["split"] == "val")
    assert run.best["loss"] == state["best_loss"] and run.best["epoch"] == state["epoch"]
    assert json.loads((run.path / "config.json").read_text())["batch_size"] == 11
    assert (run.path / "last/state.pth").is_file()

    events = EventAccumulator(str(run.path)).Reload()
    tags = set(events.Tags()["scalars"])
    reading_aids = {
        "retrieval/image_to_text_R@1",
        "logit_scale",
        "image_mask_ratio",
        "samples_per_second",
    }
    assert {"loss/train", "loss/val", "learning_rate"} | reading_aids <= tags
    steps, losses = run.curve("loss")
    assert [e.step for e in events.Scalars("loss/train")] == steps == list(range(1, 16))
    assert [e.value for e in events.Scalars("loss/train")] == pytest.approx(losses)
    assert len(events.Scalars("loss/val")) == 3

    said = capsys.readouterr().out
    for words in (
        "4 of 9 patches encoded",
        "55.6 % masked (drop)",
        "guessing costs ln(11)",
        "cpu, float32",
    ):
        assert words in said
    assert "epoch   3/3" in said


def test_the_best_model_comes_back_whole(make_config, make_model, make_data):
    """Identical features, its tokenizer, ready to encode."""
    train, val = make_data(53), make_data(17, seed=1)
    trainer = mm.MaskedMultimodalTrainer(
        make_config(num_epochs=1), train, val, make_model(dropout=0.2)
    )
    trained = trainer.fit().model
    assert not trained.training
    a, b = mm.embed(trained, val), mm.embed(trainer.model, val)
    assert torch.equal(a.image_features, b.image_features)
    assert torch.equal(a.text_features, b.text_features)


# ---- what is there already -----------------------------------------------------------------------


def test_only_what_the_kit_wrote_is_removed(make_short_run, make_data):
    """A rerun of the same name keeps notes, exports and runs inside, also in mmkit's folders."""
    first = make_short_run(num_epochs=1, mim_weight=1.0, val=make_data(7, seed=1)).fit()
    best = (first.path / "best_model.pth").read_bytes()
    foreign = ["notes.txt", "export/config.json", "last/mine.txt", "reconstructions/mine.png",
               "events.out.tfevents.1.mine", "inner/metrics.jsonl", "inner/last/state.pth",
               "last/state-best.pth", "checkpoints/state.pth"]  # fmt: skip
    for name in foreign:
        path = first.path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f"my own {name}")
    (first.path / "link").symlink_to("/proc/self")
    run = make_short_run(num_epochs=1, max_steps=1, learning_rate=1e-3).fit()
    for name in foreign:
        assert (run.path / name).read_text() == f"my own {name}"
    assert (run.path / "link").is_symlink()
    assert [r["step"] for r in run.history] == [1, 1]
    assert not (run.path / "reconstructions/00000003.png").exists()
    assert len(list(run.path.glob("events*.mmkit"))) == 1
    assert (run.path / "best_model.pth").read_bytes() != best
    assert not (run.path / ".lock").exists()


def test_the_earlier_best_model_stays_until_there_is_a_new_one(make_short_run, capsys):
    """It stays, and is not mistaken for the new run's."""
    first = make_short_run(num_epochs=1).fit()
    best = (first.path / "best_model.pth").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        make_short_run(learning_rate=1e-3, callbacks=[at(2, interrupt)]).fit()
    said = capsys.readouterr().out
    assert "replacing the earlier run" in said and "best_model.pth stays until this one" in said
    assert (first.path / "best_model.pth").read_bytes() == best
    assert torch.equal(first.model.logit_scale, mm.load(first.path / "best_model.pth").logit_scale)
    with pytest.raises(FileNotFoundError, match="is of an earlier run of that name"):
        mm.Run.load(first.path).model  # noqa: B018
    run = make_short_run(learning_rate=1e-3, resume=True).fit()
    assert (run.path / "best_model.pth").read_bytes() != best
    assert read_checkpoint(run.path / "best_model.pth")["config"]["learning_rate"] == 1e-3
    assert run.model.embed_dim == 13 and run.curve("loss")[0] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["config.json", "best_model.pth", "last/state.pth"])
def test_what_is_no_run_is_not_written_over(make_short_run, tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"model_type": "mmkit"}')
    before = everything(tmp_path)
    with pytest.raises(FileExistsError, match=rf"holds a {name} .*give another run_name"):
        make_short_run().fit()
    assert everything(tmp_path) == before


def test_an_export_in_the_place_of_a_config_is_kept(make_short_run):
    run = make_short_run(num_epochs=1).fit()
    (run.path / "config.json").write_text('{"model_type": "mmkit"}')
    before = everything(run.path)
    with pytest.raises(FileExistsError, match=r"a config\.json that is not from a run"):
        make_short_run(num_epochs=1).fit()
    assert everything(run.path) == before


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", ".", "..", "a\0b"])
def test_a_run_stays_inside_its_output_dir(make_short_run, tmp_path, name):
    with pytest.raises(ValueError, match="must be the name of a folder in output_dir"):
        make_short_run(run_name=name)
    assert list(tmp_path.iterdir()) == []


def test_a_run_may_have_a_folder_of_folders(make_short_run, tmp_path):
    assert make_short_run(run_name="sweep/a", max_steps=1).fit().path == tmp_path / "sweep/a"


# ---- the disk ------------------------------------------------------------------------------------


def mounted(path: Path, options: str) -> bool:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("options", ["size=20k", "ro"])
def test_a_disk_that_is_too_small_or_read_only_is_named(make_short_run, tmp_path, options):
    disk = tmp_path / "disk"
    if not mounted(disk, options):
        pytest.skip("mounting a small disk is not permitted here")
    try:
        with pytest.raises(OSError) as refused:
            make_short_run(output_dir=str(disk)).fit()
        words = str(refused.value)
        assert "disk/run" in words and "set output_dir to" in words
        assert "MB are free there" in words
        assert ("Read-only" in words) == (options == "ro")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("file", ["metrics.jsonl", "config.json", "events.out.tfevents"])
def test_a_disk_that_fills_up_is_said_with_the_file_and_a_remedy(make_short_run, monkeypatch, file):
    """Any of the files cannot be written."""
    trainer = make_short_run()

    def fails(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    real = open
    if file == "metrics.jsonl":
        fake = lambda p, *a, **k: fails() if "a" in a else real(p, *a, **k)  # noqa: E731
        monkeypatch.setitem(run_module.__dict__, "open", fake)
    elif file == "config.json":
        monkeypatch.setattr(mm.files.os, "replace", lambda a, b: fails() if (
            Path(b).name == file) else os.rename(a, b))  # fmt: skip
    else:
        from torch.utils.tensorboard import SummaryWriter

        monkeypatch.setattr(SummaryWriter, "add_scalar", fails)
    with pytest.raises(OSError) as failed:
        trainer.fit()
    words = str(failed.value)
    assert failed.value.errno == errno.ENOSPC
    assert f"/run/{file}" in words and "free some space, set output_dir to another disk" in words


# ---- one writer at a time ------------------------------------------------------------------------

OTHER = """
    import sys, time, mmkit as mm
    from tests.train_small import DEFAULTS, data, model
    train = data(23)
    values = dict(output_dir={folder!r}, run_name="run", max_steps=4)
    config = mm.TrainingConfig(**DEFAULTS | values)
    def wait(trainer, record):
        print("at work", flush=True)
        if record["step"] == 1:
            sys.stdin.readline()
    mm.train_model(config, train, None, model(train.tokenizer, 0.0), callbacks=[wait])
"""


@pytest.fixture
def other(tmp_path):
    """A process that trains `run` and stops at its first step."""
    code = textwrap.dedent(OTHER.format(folder=str(tmp_path)))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        while "at work" not in process.stdout.readline():
            assert process.poll() is None
        yield process
        process.kill()


def test_a_second_run_of_that_name_is_refused(make_short_run, tmp_path, other):
    """Refused while the first process lives, whatever its arguments; then the name is free."""
    before = everything(tmp_path)
    for how in ({}, dict(learning_rate=0.1)):
        with pytest.raises(run_module.InUse) as refused:
            make_short_run(max_steps=4, **how).fit()
        words = str(refused.value)
        assert f"has been written by process {other.pid} on {os.uname().nodename}" in words
        assert "give another run_name" in words
    assert everything(tmp_path) == before
    make_short_run(run_name="another", max_steps=1).fit()
    other.stdin.write("\n")
    other.stdin.flush()
    assert other.wait(60) == 0
    assert mm.Run.load(tmp_path / "run").history[-1]["step"] == 4
    make_short_run(max_steps=1).fit()


def test_a_killed_process_leaves_no_lock(make_short_run, other, tmp_path):
    other.kill()
    other.wait()
    assert (tmp_path / "run/.lock").exists()
    assert make_short_run(max_steps=1).fit().history[-1]["step"] == 1


def test_a_run_within_its_own_callback_is_refused(make_short_run):
    """The same kernel and name: a lock that only other processes see would allow it."""
    with pytest.raises(RuntimeError, match=f"written by process {os.getpid()} on"):
        make_short_run(callbacks=[at(2, lambda: make_short_run().fit())]).fit()


def test_workers_that_outlive_their_run_do_not_hold_it(make_short_run, tmp_path):
    """A forked process has the parent's open files, but does not hold its lock."""
    with run_module.held(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        os.waitpid(child, os.WUNTRACED)
    try:
        make_short_run(max_steps=1).fit()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("alive", [True, False])
def test_without_locks_the_owner_is_asked_for(make_short_run, tmp_path, monkeypatch, alive):
    """On a file system (or a Windows) without locks, a living process of this machine counts."""
    monkeypatch.setattr(run_module, "lock", lambda file, wait: None)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    if not alive:
        process.kill()
        process.wait()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").write_text(f"{process.pid}\n{os.uname().nodename}\nnow\n")
    try:
        if alive:
            with pytest.raises(RuntimeError, match=f"written by process {process.pid} on"):
                make_short_run(max_steps=1).fit()
        else:
            make_short_run(max_steps=1).fit()
    finally:
        process.kill()
        process.wait()


def test_two_unnamed_runs_of_one_second_are_two_folders(make_short_run, monkeypatch):
    """Also where both chose a name before either had created its folder."""
    monkeypatch.setattr(time, "strftime", lambda *args: "20260102-030405")
    trainers = [make_short_run(run_name="", max_steps=1) for _ in range(3)]
    assert len({trainer.path for trainer in trainers}) == 1
    paths = [trainer.fit().path for trainer in trainers]
    assert [path.name for path in paths] == [f"20260102-030405{end}" for end in ("", "-2", "-3")]
    assert trainers[1].fit().path == paths[1]


# ---- paths ---------------------------------------------------------------------------------------


def test_paths_outlive_a_change_of_the_working_folder(
    make_short_run, make_data, tmp_path, monkeypatch
):
    """Of the run, its model, its images and the cache."""
    from torchvision.io import write_png

    monkeypatch.chdir(tmp_path)
    paths = []
    for row, item in enumerate(make_data(23)):
        paths.append(f"{row}.png")
        write_png(item["image"], paths[-1])
    data = mm.MultimodalDataset(paths, make_data(23).texts, image_size=15,
                                tokenizer=make_data(23).tokenizer)  # fmt: skip
    cached = mm.from_lists(paths, make_data(23).texts, image_size=15, cache_dir="cache",
                           tokenizer=make_data(23).tokenizer, cache_gigabytes=1.0)  # fmt: skip
    mm.write_shards(make_data(23), "shards", samples_per_shard=7)
    shards = mm.from_shards("shards/*.tar", image_size=15, cache_dir="cache",
                            tokenizer=make_data(23).tokenizer)  # fmt: skip
    trainer = make_short_run(data=data, output_dir="runs", max_steps=1, num_workers=0)
    assert mm.describe(trainer).splitlines()[0].split() == ["run", "runs/run"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    run = trainer.fit()
    monkeypatch.chdir("/")
    assert run.path == tmp_path / "runs/run" == mm.Run.load(run.path).path
    assert run.model.embed_dim == 13 and run.metadata["config"]["max_steps"] == 1
    assert torch.equal(cached.cached().batch([5]).pixel_values, data.batch([5]).pixel_values)
    assert torch.equal(shards.batch([5]).pixel_values, data.batch([5]).pixel_values)
    assert data.image_name(5) == "5.png"


def test_a_home_folder_is_found(make_short_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert make_short_run(output_dir="~/runs", max_steps=1).fit().path == tmp_path / "runs/run"
