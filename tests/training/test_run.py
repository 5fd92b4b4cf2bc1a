"""A run's folder: one writer at a time, nothing foreign removed, everything checked before."""

import errno
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
from tests.train_small import DEFAULTS, data_in_files
from tests.train_small import model as model_of


@pytest.fixture
def make(tmp_path, make_model, make_data):
    """f(...) builds a trainer of a run of six steps, three an epoch."""

    def build(data=None, val=None, model=None, resume=False, callbacks=(), **values):
        values = dict(output_dir=str(tmp_path), run_name="run", num_epochs=2) | values
        config = mm.TrainingConfig(**DEFAULTS | dict(warmup_steps=2) | values)
        data, model = data or make_data(23), model or make_model()
        return mm.MaskedMultimodalTrainer(config, data, val, model, resume, callbacks)

    return build


def at(step: int, what):
    """A callback that calls `what()` at a step's record."""
    return lambda trainer, record: what() if record["step"] == step else None


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)


def everything(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- what is there already -----------------------------------------------------------------------


def test_only_what_the_kit_wrote_is_removed(make, make_data):
    """A rerun of the same name keeps notes, exports and runs inside, also in mmkit's folders."""
    first = make(num_epochs=1, mim_weight=1.0, val=make_data(7, seed=1)).fit()
    best = (first.path / "best_model.pth").read_bytes()
    foreign = ["notes.txt", "export/config.json", "last/mine.txt", "reconstructions/mine.png",
               "events.out.tfevents.1.mine", "inner/metrics.jsonl", "inner/last/state.pth",
               "last/state-best.pth", "checkpoints/state.pth"]  # fmt: skip
    for name in foreign:
        path = first.path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f"my own {name}")
    (first.path / "link").symlink_to("/proc/self")
    run = make(num_epochs=1, max_steps=1, learning_rate=1e-3).fit()
    for name in foreign:
        assert (run.path / name).read_text() == f"my own {name}"
    assert (run.path / "link").is_symlink()
    assert [r["step"] for r in run.history] == [1, 1]
    assert not (run.path / "reconstructions/00000003.png").exists()
    assert len(list(run.path.glob("events*.mmkit"))) == 1
    assert (run.path / "best_model.pth").read_bytes() != best
    assert not (run.path / ".lock").exists()


def test_the_earlier_best_model_stays_until_there_is_a_new_one(make, capsys):
    """It stays, and is not mistaken for the new run's."""
    first = make(num_epochs=1).fit()
    best = (first.path / "best_model.pth").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        make(learning_rate=1e-3, callbacks=[at(2, interrupt)]).fit()
    said = capsys.readouterr().out
    assert "replacing the earlier run" in said and "best_model.pth stays until this one" in said
    assert (first.path / "best_model.pth").read_bytes() == best
    assert torch.equal(first.model.logit_scale, mm.load(first.path / "best_model.pth").logit_scale)
    with pytest.raises(FileNotFoundError, match="is of an earlier run of that name"):
        mm.Run.load(first.path).model  # noqa: B018
    run = make(learning_rate=1e-3, resume=True).fit()
    assert (run.path / "best_model.pth").read_bytes() != best
    assert read_checkpoint(run.path / "best_model.pth")["config"]["learning_rate"] == 1e-3
    assert run.model.embed_dim == 13 and run.curve("loss")[0] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["config.json", "best_model.pth", "last/state.pth"])
def test_what_is_no_run_is_not_written_over(make, tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"model_type": "mmkit"}')
    before = everything(tmp_path)
    with pytest.raises(FileExistsError, match=rf"holds a {name} .*give another run_name"):
        make().fit()
    assert everything(tmp_path) == before


def test_an_export_in_the_place_of_a_config_is_kept(make):
    run = make(num_epochs=1).fit()
    (run.path / "config.json").write_text('{"model_type": "mmkit"}')
    before = everything(run.path)
    with pytest.raises(FileExistsError, match=r"a config\.json that is not from a run"):
        make(num_epochs=1).fit()
    assert everything(run.path) == before


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", ".", "..", "a\0b"])
def test_a_run_stays_inside_its_output_dir(make, tmp_path, name):
    with pytest.raises(ValueError, match="must be the name of a folder in output_dir"):
        make(run_name=name)
    assert list(tmp_path.iterdir()) == []


def test_a_run_may_have_a_folder_of_folders(make, tmp_path):
    assert make(run_name="sweep/a", max_steps=1).fit().path == tmp_path / "sweep/a"


# ---- all is checked before anything is removed ---------------------------------------------------


def spoilt_pixels(make_data):
    data = make_data(23)
    return mm.MultimodalDataset.from_pixels(
        torch.zeros(23, 3, 20, 20, dtype=torch.uint8), data.texts, tokenizer=data.tokenizer
    )


@pytest.mark.parametrize("part", ["training", "validation", "schedule", "batch_size", "room"])
def test_a_run_that_cannot_start_leaves_the_earlier_one_as_it_is(
    make, make_data, monkeypatch, part
):
    """Shapes of both sets, the disk: not a byte of the earlier run is touched."""
    run = make(num_epochs=1, val=make_data(7, seed=1)).fit()
    before = everything(run.path)
    how, error = dict(num_epochs=1), ValueError
    if part == "training":
        how["data"] = spoilt_pixels(make_data)
    elif part == "validation":
        how["val"] = spoilt_pixels(make_data)
    elif part == "schedule":
        how |= dict(mim_weight=1.0, mim_schedule=lambda p: -1.0)
    elif part == "batch_size":
        how["batch_size"] = 24
    elif part == "room":
        usage = type("usage", (), dict(total=10**9, used=10**9, free=1000))
        monkeypatch.setattr(run_module.shutil, "disk_usage", lambda path: usage)
        monkeypatch.setattr(run_module, "_earlier", pytest.fail)
        error, how["keep_last"] = OSError, 9
    with pytest.raises(error) as refused:
        make(**how).fit()
    if part == "room":
        assert refused.value.errno == errno.ENOSPC and "set output_dir to another" in (
            str(refused.value)
        )
    assert everything(run.path) == before


def test_what_was_made_for_a_run_that_cannot_start_goes_again(make, make_data, tmp_path):
    with pytest.raises(ValueError, match="20 x 20 pixels, the encoder takes 15 x 15"):
        make(val=spoilt_pixels(make_data)).fit()
    assert list(tmp_path.iterdir()) == []


def test_the_first_look_moves_nothing(make, monkeypatch, tmp_path):
    """Draws, modes and weights of the first step are those of a run without the trial."""
    losses, data = [], data_in_files(tmp_path / "images", 23)  # its transform draws
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(mm.training.loop, "_try_out", lambda trainer: None)
        val, model = data_in_files(tmp_path / "images", 7), model_of(data.tokenizer, 0.2)
        run = make(run_name=f"{looks}", data=data, val=val, model=model, num_workers=0).fit()
        losses.append([{k: v for k, v in r.items() if "loss" in k} for r in run.history])
    assert losses[0] == losses[1]


def test_the_room_that_a_run_takes_is_counted(make):
    """The bytes that are announced are those that the files take, up to 2 % and headers."""
    from mmkit.training.resume import needed_bytes

    trainer = make(num_epochs=1, keep_last=2, checkpoint_every=1, ema_decay=0.9)
    needed = needed_bytes(trainer)
    path = trainer.fit().path
    last, best = (path / name for name in ("last/state.pth", "best_model.pth"))
    taken = best.stat().st_size + 3 * last.stat().st_size
    overhead = 5 * 150_000  # headers and tokenizer of this small model
    assert taken - overhead < needed < taken


def mounted(path: Path, options: str) -> bool:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("options", ["size=20k", "ro"])
def test_a_disk_that_is_too_small_or_read_only_is_named(make, tmp_path, options):
    disk = tmp_path / "disk"
    if not mounted(disk, options):
        pytest.skip("mounting a small disk is not permitted here")
    try:
        with pytest.raises(OSError) as refused:
            make(output_dir=str(disk)).fit()
        words = str(refused.value)
        assert "disk/run" in words and "set output_dir to" in words
        assert "MB are free there" in words
        assert ("Read-only" in words) == (options == "ro")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("file", ["metrics.jsonl", "config.json", "events.out.tfevents"])
def test_a_disk_that_fills_up_is_said_with_the_file_and_a_remedy(make, monkeypatch, file):
    """Any of the files cannot be written."""
    trainer = make()

    def fails(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    real = open
    if file == "metrics.jsonl":
        monkeypatch.setitem(
            run_module.__dict__, "open", lambda p, *a: fails() if "a" in a else real(p, *a)
        )
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


def test_a_second_run_of_that_name_is_refused(make, tmp_path, other):
    """Refused while the first process lives, whatever its arguments; then the name is free."""
    before = everything(tmp_path)
    for how in ({}, dict(learning_rate=0.1)):
        with pytest.raises(run_module.InUse) as refused:
            make(max_steps=4, **how).fit()
        words = str(refused.value)
        assert f"has been written by process {other.pid} on {os.uname().nodename}" in words
        assert "give another run_name" in words
    assert everything(tmp_path) == before
    make(run_name="another", max_steps=1).fit()
    other.stdin.write("\n")
    other.stdin.flush()
    assert other.wait(60) == 0
    assert mm.Run.load(tmp_path / "run").history[-1]["step"] == 4
    make(max_steps=1).fit()


def test_a_killed_process_leaves_no_lock(make, other, tmp_path):
    other.kill()
    other.wait()
    assert (tmp_path / "run/.lock").exists()
    assert make(max_steps=1).fit().history[-1]["step"] == 1


def test_a_run_within_its_own_callback_is_refused(make):
    """The same kernel and name: a lock that only other processes see would allow it."""
    with pytest.raises(RuntimeError, match=f"written by process {os.getpid()} on"):
        make(callbacks=[at(2, lambda: make().fit())]).fit()


def test_workers_that_outlive_their_run_do_not_hold_it(make, tmp_path):
    """A forked process has the parent's open files, but does not hold its lock."""
    with run_module.held(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        os.waitpid(child, os.WUNTRACED)
    try:
        make(max_steps=1).fit()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("alive", [True, False])
def test_without_locks_the_owner_is_asked_for(make, tmp_path, monkeypatch, alive):
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
                make(max_steps=1).fit()
        else:
            make(max_steps=1).fit()
    finally:
        process.kill()
        process.wait()


def test_two_unnamed_runs_of_one_second_are_two_folders(make, monkeypatch):
    """Also where both chose a name before either had created its folder."""
    monkeypatch.setattr(time, "strftime", lambda *args: "20260102-030405")
    trainers = [make(run_name="", max_steps=1) for _ in range(3)]
    assert len({trainer.path for trainer in trainers}) == 1
    paths = [trainer.fit().path for trainer in trainers]
    assert [path.name for path in paths] == [f"20260102-030405{end}" for end in ("", "-2", "-3")]
    assert trainers[1].fit().path == paths[1]


# ---- ended early ---------------------------------------------------------------------------------


def test_an_interrupt_waits_for_the_step_and_is_saved(make, make_data, capsys):
    """In the middle of the first epoch: the same bits afterwards as without it."""
    whole = make(run_name="whole", val=make_data(7, seed=1)).fit()
    trainer = make(val=make_data(7, seed=1))
    trainer.optimizers[0].register_step_post_hook(
        lambda *args: interrupt() if trainer.step == 1 else None
    )  # half of the weights are updated
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert signal.getsignal(signal.SIGINT) is handler
    said = capsys.readouterr().out
    assert "ended at step 2 of 6, between two steps" in said and "continue with resume=True" in said
    assert read_checkpoint(trainer.path / "last/state.pth")["step"] == 2
    run = make(val=make_data(7, seed=1), resume=True).fit()
    assert run.curve("loss") == whole.curve("loss")
    assert run.curve("loss", "val") == whole.curve("loss", "val")
    states = [read_checkpoint(r.path / "last/state.pth")["model_state_dict"] for r in (run, whole)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_second_interrupt_ends_a_step_at_once(make, capsys):
    """A half-finished step is not saved."""
    trainer = make()
    trainer.optimizers[0].register_step_post_hook(
        lambda *args: (interrupt(), interrupt()) if trainer.step == 4 else None
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert "ended at step 4 of 6, within a step, which is lost" in capsys.readouterr().out
    assert read_checkpoint(trainer.path / "last/state.pth")["step"] == 3


def test_an_error_of_a_callback_costs_no_step(make, make_data, capsys):
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make(callbacks=[at(2, fails)]).fit()
    assert "ended at step 2 of 6" in capsys.readouterr().out
    assert make(resume=True).step == 2


def test_last_is_saved_before_validating(make, make_data, monkeypatch):
    """An error in validation loses nothing: the epoch is validated when the run is resumed."""
    val = make_data(7, seed=1)
    whole = make(run_name="whole", val=val).fit()
    trainer, real = make(val=val), mm.training.loop.validate

    def fails(model, data, config):
        if len(data) == 7 and trainer.step == 3 and trainer.writer:
            raise MemoryError
        return real(model, data, config)

    monkeypatch.setattr(mm.training.loop, "validate", fails)
    with pytest.raises(MemoryError):
        trainer.fit()
    state = read_checkpoint(trainer.path / "last/state.pth")
    assert (state["step"], state["ending"]) == (3, 0)
    assert not (trainer.path / "best_model.pth").exists()
    monkeypatch.setattr(mm.training.loop, "validate", real)
    run = make(val=val, resume=True).fit()
    clocks = {"seconds", "samples_per_second", "waiting_for_data"}
    records = [[{k: r[k] for k in r.keys() - clocks} for r in x.history] for x in (run, whole)]
    assert records[0] == records[1]
    best = [read_checkpoint(x.path / "best_model.pth")["best_loss"] for x in (run, whole)]
    assert best[0] == best[1]


def states_of(trainer, monkeypatch) -> list[tuple[int | None, bytes]]:
    """Every state.pth that a trainer writes: (the epoch that is about to end, its bytes)."""
    real, kept = mm.training.resume.save_last, []

    def keeping(trainer):
        real(trainer)
        kept.append((trainer.ending, (trainer.path / "last/state.pth").read_bytes()))

    monkeypatch.setattr(mm.training.resume, "save_last", keeping)
    return kept


def test_a_validation_after_which_it_was_killed_is_not_recorded_twice(make, make_data, monkeypatch):
    """Killed between its record and the state that includes it."""
    val = make_data(7, seed=1)
    trainer = make(val=val, callbacks=[lambda t, r: t.stop() if r["split"] == "val" else None])
    states = states_of(trainer, monkeypatch)
    trainer.fit()
    assert [ending for ending, _ in states] == [0, None]
    (trainer.path / "last/state.pth").write_bytes(states[0][1])
    run = make(val=val, resume=True).fit()
    assert [r["step"] for r in run.history if r["split"] == "val"] == [3, 6]
    assert run.curve("loss")[0] == [1, 2, 3, 4, 5, 6]


def test_an_error_after_the_last_step_of_an_epoch_leaves_its_end_to_be_done(make, make_data):
    """Of a callback, at the training record before the validation; also at the run's last step."""
    val = make_data(7, seed=1)
    whole = make(run_name="whole", val=val, max_steps=5).fit()

    def fails(trainer, record):
        if record["split"] == "train" and record["step"] in (3, 5):
            raise ZeroDivisionError

    for resume in (False, True):
        with pytest.raises(ZeroDivisionError):
            make(val=val, max_steps=5, resume=resume, callbacks=[fails]).fit()
    run = make(val=val, max_steps=5, resume=True).fit()
    for key in ("train_loss", "loss", "best"):
        assert run.curve(key, "val") == whole.curve(key, "val")
    assert run.curve("loss", "val")[0] == [3, 5]


def test_a_fork_of_a_state_that_was_not_validated_yet_starts_a_new_epoch(
    make, make_data, monkeypatch
):
    """Its first mean training loss is of its own epoch only."""
    whole = make(run_name="whole", val=make_data(7, seed=1)).fit()
    trainer = make(val=make_data(7, seed=1))
    states = states_of(trainer, monkeypatch)
    trainer.fit()
    (trainer.path / "last/state.pth").write_bytes(states[0][1])
    fork = make(run_name="fork", val=make_data(7, seed=1), resume=trainer.path).fit()
    records = [[r["train_loss"] for r in x.history if r["split"] == "val"] for x in (fork, whole)]
    assert records[0] == records[1][1:]


# ---- paths ---------------------------------------------------------------------------------------


def test_paths_outlive_a_change_of_the_working_folder(make, make_data, tmp_path, monkeypatch):
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
    trainer = make(data=data, output_dir="runs", max_steps=1, num_workers=0)
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


def test_a_home_folder_is_found(make, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert make(output_dir="~/runs", max_steps=1).fit().path == tmp_path / "runs/run"


def test_a_path_is_shown_from_the_working_folder_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mm.files.shown(tmp_path / "runs/x") == "runs/x"
    assert mm.files.shown("runs/x") == "runs/x"
    assert mm.files.shown("/proc/self") == "/proc/self"
