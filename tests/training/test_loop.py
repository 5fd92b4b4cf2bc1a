"""Epochs, validations and records come in their order, and what ends early loses nothing."""

import errno
import json
import math

import pytest
import torch

import mmkit as mm
from mmkit.models.checkpoint import read_checkpoint
from mmkit.training import run as run_module
from tests.train_small import data_in_files
from tests.train_small import model as model_of
from tests.training.small_runs import everything, states_of


def test_without_validation_the_training_loss_judges(make_config, make_model, make_data, capsys):
    run = mm.train_model(make_config(), make_data(53), None, make_model())
    assert "chosen by the training loss" in capsys.readouterr().out
    assert run.best["loss"] == min(r["train_loss"] for r in run.history if r["split"] == "val")


def test_what_training_and_validation_set_share_is_said(make_config, make_model, make_data, capsys):
    """The number of shared images and captions, before the first step; nothing without any."""
    train, other = make_data(23), make_data(7, seed=1)
    pixels = torch.cat([train.batch([3, 5]).pixel_values, other.batch(range(5)).pixel_values])
    words = ["moon", "shoe", "star", train.texts[11][0].upper(), "bread", "tree", "boat"]
    val = mm.MultimodalDataset.from_pixels(pixels, words, tokenizer=train.tokenizer)
    mm.train_model(make_config(max_steps=1), train, val, make_model())
    (line,) = [w for w in capsys.readouterr().out.splitlines() if "also in training" in w]
    assert "2 of 7 validation images (28.6 %) are also in training" in line
    assert "(validation row = training row: 0 = 3, 1 = 5)" in line
    assert "1 of 7 validation images (14.3 %) have a caption that is also in training" in line
    assert line.startswith("beware ") and "mm.split keeps such images together" in line
    apart = mm.MultimodalDataset.from_pixels(
        pixels[2:], ["moon", "shoe", "star", "bread", "tree"], tokenizer=train.tokenizer
    )
    mm.train_model(make_config(max_steps=1), train, apart, make_model())
    assert "also in training" not in capsys.readouterr().out


def test_callbacks_see_every_record_and_can_stop_the_run(make_trainer, make_data, capsys):
    """The records of metrics.jsonl; after stop() the model is validated and saved, then resumed."""
    seen = []

    def stop_at_seven(trainer, record):
        seen.append(record)
        if record["step"] == 7:
            trainer.stop()

    run = make_trainer(num_epochs=3, val=make_data(17, seed=1), callbacks=[stop_at_seven]).fit()
    assert seen == run.history
    assert [r["step"] for r in run.history if r["split"] == "val"] == [5, 7]
    assert read_checkpoint(run.path / "last/state.pth")["step"] == 7
    whole = make_trainer(num_epochs=3, val=make_data(17, seed=1), resume=True).fit()
    assert whole.history[-1]["step"] == 15 and whole.curve("loss")[0] == list(range(1, 16))


def test_fitting_again_goes_on_and_loses_nothing(make_trainer):
    """After an interrupt, and after the end, the earlier records and files still exist."""
    whole = make_trainer(num_epochs=2, run_name="whole").fit()
    trainer = make_trainer(num_epochs=2)

    def interrupt(trainer, record):
        if record["step"] == 7:
            raise KeyboardInterrupt

    trainer.callbacks.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.callbacks.clear()
    run = trainer.fit()
    assert run.curve("loss") == whole.curve("loss")
    assert trainer.fit().curve("loss") == whole.curve("loss")
    assert (run.path / "best_model.pth").is_file()


def test_an_epoch_without_an_applied_step_has_no_loss(make_trainer, make_model):
    """It is written as null, not as 0, and is never the best."""
    spoilt = make_model()
    with torch.no_grad():
        spoilt.logit_scale.fill_(math.nan)
    run = make_trainer(spoilt, num_epochs=1).fit()
    assert [r["loss"] for r in run.history] == [None] * 6 and run.best == {}
    assert run.history[-2]["skipped_steps"] == 5
    json.loads((run.path / "metrics.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)


def spoilt_pixels(make_data):
    data = make_data(23)
    return mm.MultimodalDataset.from_pixels(
        torch.zeros(23, 3, 20, 20, dtype=torch.uint8), data.texts, tokenizer=data.tokenizer
    )


@pytest.mark.parametrize("part", ["training", "validation", "schedule", "batch_size", "room"])
def test_a_run_that_cannot_start_leaves_the_earlier_one_as_it_is(
    make_short_run, make_data, monkeypatch, part
):
    """Shapes of both sets, the disk: not a byte of the earlier run is touched."""
    run = make_short_run(num_epochs=1, val=make_data(7, seed=1)).fit()
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
        monkeypatch.setattr(run_module, "earlier_files", pytest.fail)
        error, how["keep_last"] = OSError, 9
    with pytest.raises(error) as refused:
        make_short_run(**how).fit()
    if part == "room":
        assert refused.value.errno == errno.ENOSPC and "set output_dir to another" in (
            str(refused.value)
        )
    assert everything(run.path) == before


def test_what_was_made_for_a_run_that_cannot_start_goes_again(make_short_run, make_data, tmp_path):
    with pytest.raises(ValueError, match="20 x 20 pixels, the encoder takes 15 x 15"):
        make_short_run(val=spoilt_pixels(make_data)).fit()
    assert list(tmp_path.iterdir()) == []


def test_the_first_look_moves_nothing(make_short_run, monkeypatch, tmp_path):
    """Draws, modes and weights of the first step are those of a run without the trial."""
    losses, data = [], data_in_files(tmp_path / "images", 23)  # its transform draws
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(mm.training.loop, "try_out", lambda trainer: None)
        val, model = data_in_files(tmp_path / "images", 7), model_of(data.tokenizer, 0.2)
        run = make_short_run(
            run_name=f"{looks}", data=data, val=val, model=model, num_workers=0
        ).fit()
        losses.append([{k: v for k, v in r.items() if "loss" in k} for r in run.history])
    assert losses[0] == losses[1]


def test_last_is_saved_before_validating(make_short_run, make_data, monkeypatch):
    """An error in validation loses nothing: the epoch is validated when the run is resumed."""
    val = make_data(7, seed=1)
    whole = make_short_run(run_name="whole", val=val).fit()
    trainer, real = make_short_run(val=val), mm.training.loop.validate

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
    run = make_short_run(val=val, resume=True).fit()
    clocks = {"seconds", "samples_per_second", "waiting_for_data"}
    records = [[{k: r[k] for k in r.keys() - clocks} for r in x.history] for x in (run, whole)]
    assert records[0] == records[1]
    best = [read_checkpoint(x.path / "best_model.pth")["best_loss"] for x in (run, whole)]
    assert best[0] == best[1]


def test_a_validation_after_which_it_was_killed_is_not_recorded_twice(
    make_short_run, make_data, monkeypatch
):
    """Killed between its record and the state that includes it."""
    val = make_data(7, seed=1)
    trainer = make_short_run(
        val=val, callbacks=[lambda t, r: t.stop() if r["split"] == "val" else None]
    )
    states = states_of(trainer, monkeypatch)
    trainer.fit()
    assert [ending for ending, _ in states] == [0, None]
    (trainer.path / "last/state.pth").write_bytes(states[0][1])
    run = make_short_run(val=val, resume=True).fit()
    assert [r["step"] for r in run.history if r["split"] == "val"] == [3, 6]
    assert run.curve("loss")[0] == [1, 2, 3, 4, 5, 6]


def test_an_error_after_the_last_step_of_an_epoch_leaves_its_end_to_be_done(
    make_short_run, make_data
):
    """Of a callback, at the training record before the validation; also at the run's last step."""
    val = make_data(7, seed=1)
    whole = make_short_run(run_name="whole", val=val, max_steps=5).fit()

    def fails(trainer, record):
        if record["split"] == "train" and record["step"] in (3, 5):
            raise ZeroDivisionError

    for resume in (False, True):
        with pytest.raises(ZeroDivisionError):
            make_short_run(val=val, max_steps=5, resume=resume, callbacks=[fails]).fit()
    run = make_short_run(val=val, max_steps=5, resume=True).fit()
    for key in ("train_loss", "loss", "best"):
        assert run.curve(key, "val") == whole.curve(key, "val")
    assert run.curve("loss", "val")[0] == [3, 5]


def test_without_validation_the_last_of_changing_terms_is_kept(make_terms_trainer, capsys):
    """The loss of reconstruction is below that of contrast: its epochs would always be the best."""
    first = dict(
        mim_schedule=lambda p: float(p < 0.5), contrastive_schedule=lambda p: float(p >= 0.5)
    )
    trainer = make_terms_trainer(mim_weight=0.1, num_epochs=4, image_mask_ratio=0.5, **first)
    run = trainer.fit()
    assert "best_model.pth is the last one" in capsys.readouterr().out
    assert run.best["epoch"] == 3
    weights = mm.load(run.path / "best_model.pth").state_dict()
    assert all(torch.equal(weights[n], p) for n, p in trainer.model.state_dict().items())
