"""A run goes on from its state as it would have; a fork goes on under another recipe."""

import dataclasses
import shutil
import signal

import pytest
import torch

import mmkit as mm
from mmkit.files import write_atomically
from mmkit.models.checkpoint import read_checkpoint
from tests.terms_by_hand import ALL, BESIDE
from tests.training.small_runs import (
    at,
    interrupt,
    losses,
    same_weights,
    set_scale,
    states_of,
    train_small,
)


def test_a_new_run_replaces_and_a_resumed_one_asks_for_the_same_settings(
    make_config, make_model, make_data, capsys
):
    data = make_data(53)
    mm.train_model(make_config(), data, None, make_model())
    mm.train_model(make_config(), data, None, make_model())
    assert "replacing the earlier run" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"configuration differs .*learning_rate: 0\.005 -> 0\.1"):
        mm.train_model(make_config(learning_rate=0.1), data, None, make_model(), resume=True)
    with pytest.raises(ValueError, match="it was trained on other images or captions"):
        mm.train_model(make_config(), make_data(54), None, make_model(), resume=True)
    mm.train_model(make_config(run_name="other"), data, None, make_model(), resume=True)
    assert "nothing to resume" in capsys.readouterr().out
    finished = mm.train_model(make_config(), data, None, make_model(), resume=True)
    assert finished.history[-1]["step"] == 10


def test_keep_last_keeps_the_newest_states(make_trainer):
    """state.pth and the newest three named states hold the states of the run."""
    run = make_trainer(num_epochs=2, checkpoint_every=2, keep_last=3).fit()
    names = sorted(path.name for path in (run.path / "last").iterdir())
    assert names == ["state-00000006.pth", "state-00000008.pth", "state-00000010.pth", "state.pth"]
    for name in names[:3]:
        assert read_checkpoint(run.path / "last" / name)["step"] == int(name[6:14])
    assert read_checkpoint(run.path / "last/state.pth")["step"] == 10
    one = make_trainer(num_epochs=1, run_name="one").fit()
    assert [path.name for path in (one.path / "last").iterdir()] == ["state.pth"]


def test_a_resume_says_what_differs_what_may_and_how_to_fork(make_trainer, capsys):
    make_trainer(max_steps=3).fit()
    with pytest.raises(ValueError) as refused:
        make_trainer(max_steps=3, learning_rate=0.1, seed=5, log_every=2, resume=True)
    words = str(refused.value)
    assert "learning_rate: 0.005 -> 0.1" in words and "seed: 0 -> 5" in words
    assert "log_every:" not in words and "checkpoint_every" in words  # as free
    assert "fork" in words and "another run_name and resume=" in words and "--fork" in words
    make_trainer(max_steps=3, gradient_accumulation_steps=2, keep_last=2, resume=True)
    said = capsys.readouterr().out
    assert "the same up to float summation: gradient_accumulation_steps: 1 -> 2" in said
    with pytest.raises(ValueError, match="accumulation"):
        make_trainer(max_steps=3, accumulation="naive", resume=True)


def test_going_back_to_an_earlier_state_drops_the_later_ones(make_trainer):
    run = make_trainer(num_epochs=2, checkpoint_every=2, keep_last=9).fit()
    last = run.path / "last"
    shutil.copyfile(last / "state-00000004.pth", last / "state.pth")
    make_trainer(num_epochs=2, max_steps=6, keep_last=9)
    changed = make_trainer(num_epochs=2, checkpoint_every=2, keep_last=2, resume=True)
    changed.callbacks.append(lambda trainer, record: trainer.step == 7 and trainer.stop())
    changed.fit()
    names = sorted(path.name for path in last.glob("state-*"))
    assert names == ["state-00000006.pth", "state-00000007.pth"]


def test_a_run_from_before_these_fields_can_be_resumed(make_trainer, tmp_path):
    """A field that the file lacks is its default; a missing EMA is an error."""
    trainer = make_trainer(run_name="old", num_epochs=1)
    trainer.fit()
    path = tmp_path / "old/last/state.pth"
    state = mm.models.checkpoint.read_checkpoint(path)
    del state["ema"], state["config"]["image_mask_schedule"], state["config"]["ema_momentum"]
    mm.files.write_atomically(state, path)
    config, data, model = trainer.config, trainer.train, trainer.model
    assert mm.MaskedMultimodalTrainer(config, data, None, model, resume=True).step == 5
    state["config"]["image_mask"] = "attentive"
    mm.files.write_atomically(state, path)
    config = dataclasses.replace(config, image_mask="attentive")
    with pytest.raises(ValueError, match="no EMA to resume from"):
        mm.MaskedMultimodalTrainer(config, data, None, model, resume=True)


def test_other_micro_batches_are_another_run_where_there_is_matching(make_terms_trainer):
    """Wrong pairs come from one micro-batch: a resume with other micro-batches is refused, but not
    one that only measures more."""
    make_terms_trainer(**ALL, gradient_accumulation_steps=2, max_steps=1).fit()
    with pytest.raises(ValueError, match="gradient_accumulation_steps: 2 -> 3"):
        make_terms_trainer(**ALL, gradient_accumulation_steps=3, max_steps=1, resume=True)
    same = dict(gradient_accumulation_steps=2, max_steps=1, resume=True)
    make_terms_trainer(**ALL, **same, term_gradients_every=1)
    make_terms_trainer(**BESIDE, gradient_accumulation_steps=2, max_steps=1).fit()
    make_terms_trainer(**BESIDE, gradient_accumulation_steps=3, max_steps=1, resume=True)


def test_up_to_summation_is_said_only_where_it_is_so(stopped, make_model, capsys):
    """Micro-batches draw dropout in another order, also the model's own dropout."""
    make = stopped()
    make(gradient_accumulation_steps=2)
    same = "the same up to float summation: gradient_accumulation_steps: 1 -> 2"
    assert same in capsys.readouterr().out
    make = stopped(model=make_model(dropout=0.2), run_name="drops")
    capsys.readouterr()
    make(model=make_model(dropout=0.2), run_name="drops", gradient_accumulation_steps=2)
    said = capsys.readouterr().out
    assert "float summation" not in said
    assert "other dropout from here on: gradient_accumulation_steps: 1 -> 2" in said
    make(model=make_model(dropout=0.2), run_name="drops", gradient_checkpointing=True)
    assert "the same up to float summation: gradient_checkpointing" in capsys.readouterr().out
    with pytest.raises(ValueError, match="up to float summation and dropout: compile"):
        make(model=make_model(dropout=0.2), run_name="drops", seed=5)


@pytest.mark.parametrize(
    "own, values, words",
    [
        (0.0, {}, "the same up to float summation"),
        (0.2, {}, "other draws of dropout from here on"),
        (0.0, dict(accumulation="naive", gradient_accumulation_steps=2), "micro-batch's negatives"),
    ],
)
def test_another_number_of_processes_is_said_truly(
    stopped, make_model, tmp_path, capsys, own, values, words
):
    make = stopped(model=make_model(dropout=own), **values)
    path = tmp_path / "run/last/state.pth"
    state = read_checkpoint(path)
    state["random"] *= 3
    write_atomically(state, path)
    make(model=make_model(dropout=own), **values)
    said = capsys.readouterr().out
    assert "saved by 3 processes, now 1: " in said and words in said
    assert ("up to float summation" in said) == (words == "the same up to float summation")


def test_another_number_type_is_said(stopped, tmp_path, capsys):
    """mixed_precision="auto" chooses the type that is fast on the machine."""
    make = stopped()
    path = tmp_path / "run/last/state.pth"
    state = read_checkpoint(path)
    state["identity"]["computed"] = "torch.bfloat16 on cuda"
    write_atomically(state, path)
    make()
    assert "computed in torch.bfloat16 on cuda before, now in torch.float32 on cpu" in (
        capsys.readouterr().out
    )


def test_the_room_that_a_run_takes_is_counted(make_short_run):
    """The bytes that are announced are those that the files take, up to 2 % and headers."""
    from mmkit.training.resume import needed_bytes

    trainer = make_short_run(num_epochs=1, keep_last=2, checkpoint_every=1, ema_decay=0.9)
    needed = needed_bytes(trainer)
    path = trainer.fit().path
    last, best = (path / name for name in ("last/state.pth", "best_model.pth"))
    taken = best.stat().st_size + 3 * last.stat().st_size
    overhead = 5 * 150_000  # headers and tokenizer of this small model
    assert taken - overhead < needed < taken


# -- killed ----------------------------------------------------------------------------------


def test_the_scale_and_its_growth_go_on_where_they_were(make_fp16_trainer, tmp_path):
    """Saved in mid-growth: it grows at the step at which it would have."""
    trainer = make_fp16_trainer(max_steps=9)
    set_scale(trainer, 32.0, growth_interval=5)
    scales = []
    step = trainer.train_step

    def noting(*args):
        scales.append(trainer.scaler.get_scale())
        return step(*args)

    trainer.train_step = noting
    trainer.fit()
    assert scales == [32.0] * 5 + [64.0] * 4
    saved = read_checkpoint(tmp_path / "run/last/state.pth")["scaler"]
    assert (saved["scale"], saved["growth_interval"], saved["_growth_tracker"]) == (64.0, 5, 4)

    resumed = make_fp16_trainer(resume=True, max_steps=9)
    batch = resumed.first_batch()
    scales = [(resumed.scaler.get_scale(), resumed.train_step(batch, 0))[0] for _ in range(2)]
    assert scales == [64.0, 128.0]  # from a count of 4 to 5; from 0 it would take five steps
    assert resumed.skipped == 0


def test_steps_skipped_in_a_row_are_counted_across_a_kill(make_fp16_trainer):
    """A run stops after 20 of them in a row, also when it is restarted in between."""
    trainer = make_fp16_trainer(max_steps=3)
    set_scale(trainer, 2.0**60)
    trainer.fit()
    assert trainer.skipped_in_a_row == 3
    assert make_fp16_trainer(resume=True, max_steps=3).skipped_in_a_row == 3


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    """SIGKILL between steps (mid-epoch) and inside a checkpoint write: the same bits at the end."""
    values = dict(dropout=0.2, gradient_accumulation_steps=2, checkpoint_every=2)
    values |= dict(image_mask="attentive", text_mask_mode="80/10/10")  # a running mean, too
    whole = train_small(tmp_path, "whole", **values)
    assert whole.returncode == 0, whole.stderr
    for name, flags in (("step", ["--kill-at", "8"]), ("write", ["--kill-in-write", "4"])):
        killed = train_small(tmp_path, name, *flags, **values)
        assert killed.returncode == -signal.SIGKILL
        mm.models.checkpoint.read_checkpoint(
            tmp_path / name / "last/state.pth"
        )  # complete, though killed
        resumed = train_small(tmp_path, name, "--resume", **values)
        assert resumed.returncode == 0 and "resuming" in resumed.stdout, resumed.stderr
        assert losses(tmp_path, name) == losses(tmp_path, "whole")
        same_weights(tmp_path, name, "whole")
        same_weights(tmp_path, name, "whole", "best_model.pth")


# -- ended early -----------------------------------------------------------------------------


def test_an_interrupt_waits_for_the_step_and_is_saved(make_short_run, make_data, capsys):
    """In the middle of the first epoch: the same bits afterwards as without it."""
    whole = make_short_run(run_name="whole", val=make_data(7, seed=1)).fit()
    trainer = make_short_run(val=make_data(7, seed=1))
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
    run = make_short_run(val=make_data(7, seed=1), resume=True).fit()
    assert run.curve("loss") == whole.curve("loss")
    assert run.curve("loss", "val") == whole.curve("loss", "val")
    states = [read_checkpoint(r.path / "last/state.pth")["model_state_dict"] for r in (run, whole)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_second_interrupt_ends_a_step_at_once(make_short_run, capsys):
    """A half-finished step is not saved."""
    trainer = make_short_run()
    trainer.optimizers[0].register_step_post_hook(
        lambda *args: (interrupt(), interrupt()) if trainer.step == 4 else None
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert "ended at step 4 of 6, within a step, which is lost" in capsys.readouterr().out
    assert read_checkpoint(trainer.path / "last/state.pth")["step"] == 3


def test_an_error_of_a_callback_costs_no_step(make_short_run, make_data, capsys):
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_short_run(callbacks=[at(2, fails)]).fit()
    assert "ended at step 2 of 6" in capsys.readouterr().out
    assert make_short_run(resume=True).step == 2


# -- forks -----------------------------------------------------------------------------------


def test_a_fork_goes_on_from_another_run_under_another_recipe(make_trainer, capsys):
    """Its first step has the losses the other run would have had; the other run is unchanged."""
    straight = make_trainer(num_epochs=3).fit()
    source = make_trainer(num_epochs=3, max_steps=7, schedule="constant", run_name="source").fit()
    kept = (source.path / "last/state.pth").read_bytes()
    fork = make_trainer(
        num_epochs=3, learning_rate=0.001, matrix_learning_rate=0.003, weight_decay=0.2,
        run_name="fork", resume=source.path,
    )  # fmt: skip
    assert fork.step == 7 and not fork.resumed
    assert fork.optimizers[0].param_groups[0]["peak_lr"] == pytest.approx(0.003)
    assert fork.optimizers[0].param_groups[0]["weight_decay"] == 0.2
    assert "starts as a fork of" in (said := capsys.readouterr().out)
    assert "learning_rate: 0.005 -> 0.001" in said
    run = fork.fit()
    assert run.history[0]["step"] == 8 and run.history[-1]["step"] == 15
    assert run.history[0]["loss"] != straight.history[8]["loss"]
    assert (source.path / "last/state.pth").read_bytes() == kept
    # The same configuration, from a named state: the same bits as the run without a fork.
    whole = make_trainer(num_epochs=3, checkpoint_every=3, keep_last=9, run_name="whole").fit()
    state = whole.path / "last/state-00000006.pth"
    again = make_trainer(num_epochs=3, run_name="again", resume=state).fit()
    assert again.curve("loss")[1] == whole.curve("loss")[1][6:]


def test_a_fork_may_add_a_running_mean_or_change_the_optimizer(make_trainer, capsys):
    """A new EMA starts from the weights taken over, not from random ones."""
    source = make_trainer(max_steps=3).fit()
    asked = dict(ema_decay=0.99, image_mask="attentive", layer_decay=0.5, optimizer="adamw")
    fork = make_trainer(run_name="fork", resume=source.path, **asked)
    now = fork.model.state_dict()
    assert all(torch.equal(now[n], x) for n, x in fork.ema.module.state_dict().items())
    assert torch.equal(fork.attention_ema.module.layernorm.weight, now["vit.layernorm.weight"])
    assert not fork.optimizers[0].state and "without state" in capsys.readouterr().out
    same = make_trainer(run_name="same", resume=source.path, ema_decay=0.99)
    assert all(optimizer.state for optimizer in same.optimizers)


def test_forks_that_make_no_sense_are_refused(make_trainer, make_data):
    make_trainer(max_steps=2).fit()
    path = make_trainer(max_steps=2, run_name="other").path.with_name("run")
    for values, words in (
        (dict(batch_size=7, run_name="b"), "another batch_size .11 -> 7."),
        (dict(run_name="run"), "cannot be forked into itself"),
        (dict(data=make_data(54), run_name="c"), "54 images instead of 53"),
    ):
        with pytest.raises(ValueError, match=words):
            make_trainer(max_steps=2, resume=path, **values)
    with pytest.raises(ValueError, match=r"best_model\.pth has no scaler, random"):
        make_trainer(run_name="d", resume=path / "best_model.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        make_trainer(run_name="e", resume=path.with_name("nowhere"))


def test_a_fork_that_was_killed_at_once_goes_on(make_trainer):
    """It is saved before its first step."""
    source = make_trainer(max_steps=3).fit()
    fork = make_trainer(max_steps=9, run_name="fork", resume=source.path)

    def die(*args):
        raise KeyboardInterrupt

    fork.train_step = die
    with pytest.raises(KeyboardInterrupt):
        fork.fit()
    assert make_trainer(max_steps=9, run_name="fork", resume=True).step == 3
    with pytest.raises(ValueError, match="nothing is left to do; raise num_epochs"):
        make_trainer(max_steps=3, run_name="late", resume=source.path)


def test_a_fork_may_have_what_a_resume_may_not(stopped, make_data, make_model, tmp_path, capsys):
    """The remedy in a refusal works: other images, no validation set, another pooling."""
    make = stopped()
    now = dict(data=make_data(23, seed=5), val=None, model=make_model(pooling="cls"))
    with pytest.raises(ValueError, match="fork it"):
        make(**now)
    fork = make(**now, run_name="fork", resume=str(tmp_path / "run"))
    said = capsys.readouterr().out
    for words in ("training images: their contents", "validation set: 7 images -> none", "'cls'"):
        assert words in said
    assert fork.step == 6 and fork.fit().history[-1]["step"] == 16


def test_a_fork_of_a_state_that_was_not_validated_yet_starts_a_new_epoch(
    make_short_run, make_data, monkeypatch
):
    """Its first mean training loss is of its own epoch only."""
    whole = make_short_run(run_name="whole", val=make_data(7, seed=1)).fit()
    trainer = make_short_run(val=make_data(7, seed=1))
    states = states_of(trainer, monkeypatch)
    trainer.fit()
    (trainer.path / "last/state.pth").write_bytes(states[0][1])
    fork = make_short_run(run_name="fork", val=make_data(7, seed=1), resume=trainer.path).fit()
    records = [[r["train_loss"] for r in x.history if r["split"] == "val"] for x in (fork, whole)]
    assert records[0] == records[1][1:]


@pytest.mark.parametrize("there, here", [(False, True), (True, False)])
def test_a_fork_may_have_other_terms(make_terms_trainer, make_model, there, here):
    """The towers continue; a decoder that only the fork needs starts with new weights."""
    terms = {True: BESIDE, False: {}}
    common = dict(num_epochs=2, ema_decay=0.5)
    source = make_terms_trainer(run_name="source", **terms[there] | common)
    source.fit()
    values = terms[here] | common | dict(num_epochs=3, run_name="fork")
    fork = make_terms_trainer(resume=str(source.path), model=make_model(seed=1), **values)
    before = source.model.state_dict()
    for name, value in fork.model.state_dict().items():
        assert name.startswith("decoder.") or torch.equal(value, before[name]), name
    assert (fork.model.decoder is not None) == here
    assert fork.fit().history[-1]["step"] == 3
