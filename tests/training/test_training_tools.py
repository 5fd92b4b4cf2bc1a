"""Frozen towers, layer decay, EMA, callbacks, forks and compilation do what they promise."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import mmkit as mm
from mmkit.models.checkpoint import read_checkpoint
from mmkit.schedules import RATIO_SCHEDULES
from mmkit.training.optim import build_optimizers, freeze, layer_multiplier, unfreeze
from mmkit.training.step import Contrast, backward
from tests.training.test_trainer import QUICK


@pytest.fixture
def make_config(tmp_path):
    def make(**values):
        return mm.TrainingConfig(**QUICK | dict(output_dir=str(tmp_path), run_name="run") | values)

    return make


@pytest.fixture
def make_trainer(make_config, make_model, make_data):
    def make(model=None, resume=False, callbacks=(), data=None, val=None, **values):
        model = model or make_model(dropout=values.get("dropout", 0.0))
        data = data or make_data(53)
        return mm.MaskedMultimodalTrainer(
            make_config(**values), data, val, model, resume, callbacks
        )

    return make


def weights(model) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before: dict, model) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


# -- frozen towers ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind, tower", [("image", "vit."), ("text", "bert.")])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_frozen_tower_stays_as_it_is_and_learns_afterwards(make_trainer, kind, tower, optimizer):
    """No gradient, decay or dropout; projections and the other tower learn; then it is unfrozen."""
    values = {f"frozen_{kind}_epochs": 1, "optimizer": optimizer, "dropout": 0.2}
    trainer = make_trainer(num_epochs=2, warmup_steps=0, text_mask_mode="replace", **values)
    before, seen = weights(trainer.model), []

    def after_each(trainer, record):
        if record["split"] == "train":
            training = (trainer.model.vit if kind == "image" else trainer.model.bert).training
            seen.append((record["epoch"], training, changed(before, trainer.model)))

    trainer.callbacks.append(after_each)
    trainer.fit()
    first = [names for epoch, _, names in seen if epoch == 0][-1]
    assert not any(n.startswith((tower, f"{kind}_mask_token")) for n in first)
    assert f"{kind}_projection.2.weight" in first and "logit_scale" in first
    other = "bert." if tower == "vit." else "vit."
    assert any(n.startswith(other) for n in first)
    assert [training for epoch, training, _ in seen] == [False] * 5 + [True] * 5
    assert any(n.startswith(tower) for n in seen[-1][2])


def test_a_frozen_tower_keeps_no_activations(make_model, make_data):
    """Its graph is not built: gradients of its features reach only the projection."""
    model, batch = make_model().train(), make_data(7).batch(range(7))
    frozen = freeze(model, "image")
    assert not model.image_tokens(batch.pixel_values).requires_grad
    assert model.encode_image(batch.pixel_values).requires_grad
    unfreeze(frozen)
    assert model.image_tokens(batch.pixel_values).requires_grad


def test_an_evaluation_in_between_leaves_a_frozen_tower_at_rest(make_trainer):
    """Its dropout stays off when the rest of the model returns to training mode."""
    trainer = make_trainer(frozen_image_epochs=1, num_epochs=1, dropout=0.2)
    modes = []

    def evaluate(trainer, record):
        mm.evaluate(trainer.model, trainer.train)
        modes.append((trainer.model.vit.training, trainer.model.bert.training))

    trainer.callbacks.append(evaluate)
    trainer.fit()
    assert modes == [(False, True)] * 6


def test_what_the_user_froze_stays_frozen(make_trainer, make_model):
    """Without frozen_*_epochs the trainer leaves `requires_grad` alone."""
    model = make_model()
    model.bert.embeddings.requires_grad_(False)
    trainer = make_trainer(model, num_epochs=1, warmup_steps=0)
    before = weights(model)
    trainer.fit()
    assert not any(name.startswith("bert.embeddings") for name in changed(before, model))


# -- optimizers ------------------------------------------------------------------------------


def test_layer_decay_gives_each_layer_its_rate(make_config, make_model):
    """0.5 to the power of the layers above, in both optimizers; a decoder has the full rate."""
    model = make_model().add_decoder(across=True, matching=True, width=32)
    assert layer_multiplier(model, "vit.layernorm.weight", 0.5) == 1
    assert layer_multiplier(model, "logit_scale", 0.5) == 1
    assert layer_multiplier(model, "text_projection.2.weight", 0.5) == 1
    for name, _ in model.named_parameters():  # by hand, for two layers in each tower
        above = 0
        if name.startswith("decoder."):
            pass
        elif ".layers.0." in name or ".layer.0." in name:
            above = 2
        elif ".layers.1." in name or ".layer.1." in name:
            above = 1
        elif "embeddings" in name or "mask_token" in name:
            above = 3
        assert layer_multiplier(model, name, 0.5) == 0.5**above, name
    for optimizer in ("muon", "adamw"):
        config = make_config(optimizer=optimizer, layer_decay=0.5)
        rates = {
            id(p): group["peak_lr"]
            for built in build_optimizers(model, config)
            for group in built.param_groups
            for p in group["params"]
        }
        for name, parameter in model.named_parameters():
            matrix = optimizer == "muon" and parameter.ndim == 2 and ".layer" in name
            peak = config.matrix_lr if matrix else config.learning_rate
            wanted = peak * layer_multiplier(model, name, 0.5)
            assert rates[id(parameter)] == pytest.approx(wanted), name
    with pytest.raises(ValueError, match=r"layer_decay=1\.5 must be in \(0, 1\]"):
        make_config(layer_decay=1.5)


def test_an_optimizer_and_a_schedule_may_be_functions(make_trainer, make_config):
    """Plain SGD from a function takes exactly the step computed by hand."""
    trainer = make_trainer(
        optimizer=lambda groups: torch.optim.SGD(groups),
        schedule=lambda progress: 1 - progress**2,
        warmup_steps=2, weight_decay=0.1, max_grad_norm=0.0,
    )  # fmt: skip
    batch = trainer.first_batch()
    before = weights(trainer.model)
    trainer.gradients(batch, 0)
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    trainer.train_step(batch, 0)
    rate = 0.5 * QUICK["learning_rate"]  # the first of two warmup steps
    for name in ("vit.layers.0.attention.q_proj.weight", "text_projection.2.weight"):
        wanted = before[name] - rate * (grads[name] + 0.1 * before[name])
        torch.testing.assert_close(dict(trainer.model.named_parameters())[name].detach(), wanted)
    assert trainer.config.lr_fraction(5, 8) == pytest.approx(0.02 + 0.98 * (1 - (3 / 5) ** 2))
    assert "function" in trainer.config.to_dict()["optimizer"]
    json.dumps(trainer.config.to_dict())
    with pytest.raises(ValueError, match=r"returned a list; it must return a torch\.optim"):
        make_trainer(optimizer=lambda groups: groups)
    with pytest.raises(ValueError, match=r"left out \d+ of \d+ weights"):
        make_trainer(optimizer=lambda groups: torch.optim.SGD(groups[:1]))


# -- the EMA of the weights ------------------------------------------------------------------


def test_the_running_mean_is_what_is_validated_and_kept(make_trainer, make_data):
    """After n steps it is the weighted sum of all weights so far, computed by hand."""
    seen = []
    trainer = make_trainer(
        ema_decay=0.9, num_epochs=1, val=make_data(17, seed=1), warmup_steps=0,
        callbacks=[lambda t, r: seen.append(weights(t.model)) if r["split"] == "train" else None],
    )  # fmt: skip
    expected = weights(trainer.model)
    run = trainer.fit()
    for step, now in enumerate(seen):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = {n: decay * expected[n] + (1 - decay) * now[n] for n in expected}
    best = run.model.state_dict()
    for name, wanted in expected.items():
        torch.testing.assert_close(best[name], wanted)
    assert not torch.equal(best["vit.layernorm.bias"], trainer.model.vit.layernorm.bias)
    kept = mm.evaluate(run.model, trainer.val)["loss"]
    assert run.history[-1]["loss"] == pytest.approx(kept, rel=1e-5)


# -- callbacks -------------------------------------------------------------------------------


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


def test_a_model_frozen_in_one_run_learns_in_the_next(make_trainer, make_model):
    model = make_model()
    make_trainer(model, num_epochs=1, frozen_image_epochs=1, run_name="first").fit()
    before = weights(model)
    second = dict(num_epochs=2, frozen_image_epochs=1, warmup_steps=0, run_name="second")
    make_trainer(model, **second).fit()
    assert any(name.startswith("vit.layers") for name in changed(before, model))


def test_fp16_with_both_towers_frozen_trains_the_rest(make_trainer):
    """An optimizer without a gradient is left out, also by the scaler."""
    values = dict(frozen_image_epochs=1, frozen_text_epochs=1, mixed_precision="fp16")
    trainer = make_trainer(num_epochs=1, warmup_steps=0, **values)
    before = weights(trainer.model)
    trainer.fit()
    assert "image_projection.2.weight" in changed(before, trainer.model)


# -- steps that are not applied --------------------------------------------------------------


def test_a_skipped_step_changes_nothing(make_trainer):
    """Weights, optimizer state, both running means and the epoch's loss stay as they are."""
    trainer = make_trainer(ema_decay=0.9, image_mask="attentive", warmup_steps=0)
    batch = trainer.first_batch()
    trainer.train_step(batch, 0)

    def everything():
        memory = [o.state_dict()["state"] for o in trainer.optimizers]
        means = (
            trainer.ema.state_dict(),
            (trainer.attention_ema and trainer.attention_ema.state_dict()),
        )
        return [*tensors(memory), *tensors(means), *weights(trainer.model).values()]

    before, loss = [x.clone() for x in everything()], float(trainer.epoch_loss)
    broken = batch[torch.arange(len(batch))]
    broken.pixel_values = torch.full((len(batch), 3, 15, 15), math.nan)
    trainer.train_step(broken, 0)
    assert trainer.skipped == trainer.skipped_in_a_row == 1
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert float(trainer.epoch_loss) == loss and trainer.epoch_steps == 1
    trainer.train_step(batch, 0)
    assert trainer.skipped == 1 and trainer.skipped_in_a_row == 0


def tensors(thing):
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from tensors(part)


def test_too_many_skipped_steps_stop_the_run_and_name_the_cause(make_trainer, make_model):
    trainer = make_trainer(max_skipped_steps=3)
    batch = trainer.first_batch()
    broken = batch[torch.arange(len(batch))]
    broken.pixel_values = torch.zeros(len(batch), 3, 15, 15)
    broken.pixel_values[4] = math.nan
    with pytest.raises(RuntimeError, match=rf"3 steps .* \(sample ids {batch.sample_ids[4]}\)"):
        for _ in range(3):
            trainer.train_step(broken, 0)
    assert trainer.skipped == 3
    spoilt = make_model()
    with torch.no_grad():
        spoilt.text_projection[2].weight[0, 0] = math.inf
    trainer = make_trainer(spoilt, max_skipped_steps=2)
    with pytest.raises(RuntimeError, match=r"not finite from the start \(text_projection\.2"):
        trainer.fit()


def test_an_epoch_without_an_applied_step_has_no_loss(make_trainer, make_model):
    """It is written as null, not as 0, and is never the best."""
    spoilt = make_model()
    with torch.no_grad():
        spoilt.logit_scale.fill_(math.nan)
    run = make_trainer(spoilt, num_epochs=1).fit()
    assert [r["loss"] for r in run.history] == [None] * 6 and run.best == {}
    assert run.history[-2]["skipped_steps"] == 5
    json.loads((run.path / "metrics.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)


# -- last/, resuming with other settings, forks ----------------------------------------------


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


def test_restarts_by_torchrun_resume_by_themselves(make_trainer, monkeypatch):
    """The same command again, as from an elastic agent; a run without a name is refused."""
    make_trainer(num_epochs=2, max_steps=4).fit()
    assert make_trainer(num_epochs=2, max_steps=4).step == 0
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert make_trainer(num_epochs=2, max_steps=4).step == 4
    assert make_trainer(num_epochs=2, max_steps=4, run_name="not_yet").step == 0
    with pytest.raises(ValueError, match="give a run_name"):
        make_trainer(run_name="")


# -- less memory, compiled -------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradient_and_keeps_less(make_trainer):
    """Dropout on; the bytes that autograd holds after the forward pass are counted."""
    grads, held = {}, {}
    for asked in (False, True):
        trainer = make_trainer(gradient_checkpointing=asked, dropout=0.2)
        model, sizes = trainer.model.train(), []
        batch = trainer.first_batch()
        maskings = trainer.maskings(batch, 0)
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x
        )
        torch.manual_seed(3)
        with hooks:
            model(batch, *maskings)
        held[asked] = sum(sizes)
        torch.manual_seed(3)
        scale = (model.logit_scale, model.logit_bias)
        backward(lambda micro, m=model, x=maskings: m(micro, *x), [batch], scale, Contrast())
        grads[asked] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert held[True] < 0.5 * held[False]
    for name, wanted in grads[False].items():
        torch.testing.assert_close(grads[True][name], wanted)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler; none here")
def test_a_compiled_model_gives_the_same_losses(make_trainer):
    losses = {}
    for asked in (False, True):
        run = make_trainer(compile=asked, max_steps=7, num_epochs=2, run_name=f"c{asked}").fit()
        losses[asked] = [r["loss"] for r in run.history]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    with pytest.raises(ValueError, match="take one"):
        make_trainer(compile=True, gradient_checkpointing=True)


def test_a_missing_compiler_is_said_in_words(make_trainer, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler on a CPU"):
        make_trainer(compile=True)


def test_neighbours_need_the_sigmoid_loss(make_config):
    with pytest.raises(ValueError, match="needs loss='sigmoid'"):
        make_config(exchange="neighbours")
    assert make_config(exchange="neighbours", loss="sigmoid").exchange == "neighbours"


# -- arguments are checked before anything starts ----------------------------------------------


def said_by(trainer) -> str:
    return mm.describe(trainer)


def test_rates_and_decays_stand_in_the_report_as_they_hold(make_trainer):
    """The caller's own rates replace the configuration's, in the report and in the step."""
    build = lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.0)  # noqa: E731
    trainer = make_trainer(optimizer=build, warmup_steps=2)
    assert "peak rates  SGD 0.1, decay 0\n" in said_by(trainer)
    trainer.train_step(trainer.first_batch(), 0)
    assert {group["lr"] for group in trainer.optimizers[0].param_groups} == {0.05}
    said = said_by(make_trainer(layer_decay=0.5))
    assert "peak rates  Muon 0.00375 to 0.0075, decay 0.1; AdamW 0.000625 to 0.005" in said


def test_the_models_own_dropout_is_said(make_trainer, make_model):
    assert "AdamW, dropout 0\n" in said_by(make_trainer(make_model()))
    assert "AdamW, dropout 0.2\n" in said_by(make_trainer(make_model(dropout=0.2)))
    model = make_model()
    model.bert.encoder.layer[1].output.dropout.p = 0.3
    said = said_by(make_trainer(model))
    assert "dropout 0 (ViT), 0.3 (BERT), 0 (projections)" in said


@pytest.mark.parametrize(
    "values, count, words",
    [
        (dict(batch_size=1), 7, "contrastive a single pair at a time .* take batch_size=3$"),
        (dict(batch_size=2), 5, r"contrastive a single pair at a time \(5 images.* batch_size=3$"),
        (dict(batch_size=1), 1, "take more images$"),
        (dict(batch_size=7, gradient_accumulation_steps=5, accumulation="naive"), 13,
         "contrastive a single .* take batch_size=13, or fewer micro-batches"),
        (dict(batch_size=7, gradient_accumulation_steps=5, itm_weight=1.0, cross_modal=True),
         13, "itm a single .* take batch_size=13, or fewer micro-batches"),
    ],
)  # fmt: skip
def test_a_pair_alone_is_refused_with_a_remedy_that_works(
    make_trainer, make_data, values, count, words
):
    """Without a mismatched pair a matching one has loss 0 and no gradient."""
    with pytest.raises(ValueError, match=words) as refused:
        make_trainer(data=make_data(count), **values)
    if size := re.search("take batch_size=([0-9]+)", str(refused.value)):
        assert make_trainer(data=make_data(count), **values | {"batch_size": int(size[1])})


def test_a_batch_of_one_may_reconstruct(make_trainer, make_data):
    values = dict(contrastive_weight=0.0, mim_weight=1.0, decoder_width=32, max_steps=1)
    trainer = make_trainer(data=make_data(7), batch_size=1, **values)
    _, norm = trainer.train_step(trainer.first_batch(), 0)
    assert norm > 0


def test_floats_that_nobody_normalised_are_said_and_the_remedies_work(make_trainer, make_data):
    """ToTensor() gives 0 to 1; with both remedies the model's input is that of uint8."""
    import warnings

    from torchvision.transforms import v2

    data = make_data(23)
    model = make_trainer(data=data).model
    plain = mm.embed(model, data).image_features

    def seen(transform) -> tuple[str, torch.Tensor]:
        data._decoded.fill(torch.stack([transform(data[row]["image"]) for row in range(23)]), rows)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            features = mm.embed(model, data).image_features
        report = said_by(make_trainer(data=data, model=model))
        assert ("count as normalised" in report) == bool(said)
        return " ".join(str(one.message) for one in said), features

    rows, to_tensor = data._decoded.rows, v2.ToDtype(torch.float32, scale=True)
    for row in range(23):
        data._decoded.pixels[row, :, 0, 0] = 17 * row % 256  # including black
    plain = mm.embed(model, data).image_features
    raw = data._decoded.pixels.clone()
    words, features = seen(to_tensor)
    assert "floats from 0.00 to 1.00, which count as normalised already" in words
    assert (features - plain).abs().max() > 0.01
    (remedy,) = re.findall(r"Normalize\([^)]*\)", words)
    data._decoded.fill(raw, rows)
    words, features = seen(v2.Compose([to_tensor, eval(f"v2.{remedy}")]))
    assert not words
    torch.testing.assert_close(features, plain)
    data._decoded.fill(raw, rows)
    words, features = seen(v2.Identity())
    assert not words and torch.equal(features, plain)
    model.pixel_stats[0], model.pixel_stats[1] = 0, 1  # of a model that expects 0 to 1
    assert not seen(to_tensor)[0]


def test_settings_that_change_nothing_are_said(make_trainer):
    def beware(**values):
        lines = [x for x in said_by(make_trainer(**values)).splitlines() if x[:6] == "beware"]
        return "".join(lines)

    assert not beware(num_epochs=2, unmasked_epochs=1)
    words = "unmasked_epochs=99 of 2 epochs: nothing is masked in this run"
    assert words in beware(num_epochs=2, unmasked_epochs=99)
    assert words in beware(num_epochs=99, max_steps=6, unmasked_epochs=99)
    assert not beware(num_epochs=2, unmasked_epochs=99, image_mask_ratio=0, text_mask_ratio=0)
    assert "image_mask_ratio=0.02 masks nothing" in beware(image_mask_ratio=0.02)
    assert "text_mask_ratio=0.01 masks nothing" in beware(text_mask_ratio=0.01)
    idle = dict(mim_weight=0.5, decoder_width=32, max_steps=3)
    assert "mim_weight=0.5 has nothing" in beware(**idle, mim_schedule=lambda p: 0.0)
    assert "all learning rates are 0" in beware(learning_rate=0, matrix_learning_rate=0)
    for name, value, need in (
        ("matrix_learning_rate", 0.1, dict(optimizer="adamw")),
        ("image_mask", "block", dict(image_mask_ratio=0)),
        ("text_mask", "whole_word", dict(text_mask_ratio=0)),
        ("text_mask_mode", "drop", dict(text_mask_ratio=0)),
        ("cross_modal_ratio", 0.5, {}),
        ("pixel_error", "l1", {}),
        ("decoder_width", 64, {}),
        ("mlm_schedule", "rising", {}),
        ("ema_momentum", 0.9, {}),
    ):
        assert f"{name}={value!r} has no effect without" in beware(**{name: value}, **need), name
    assert "has no effect" not in beware(text_mask="whole_word", text_mask_mode="drop")
    trainer = make_trainer(num_epochs=99, max_steps=6, frozen_image_epochs=5)
    assert "ViT frozen for 2 epochs" in said_by(trainer)


@pytest.mark.parametrize("value", [-0.5, 50, math.nan])
def test_a_learning_rate_out_of_range_is_refused_before_the_run(make_trainer, value):
    words = r"schedule gives .* at step 4 of 7; it must give a number in \[0, 1\]"
    with pytest.raises(ValueError, match=words):
        make_trainer(max_steps=7, warmup_steps=1, schedule=lambda p: value if p == 0.6 else 1.0)
    assert not list(make_trainer().path.parent.iterdir())


@pytest.mark.parametrize("value", [-0.5, 1.0, 50, math.nan])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_ratio_out_of_range_is_refused_before_the_run(make_trainer, monkeypatch, kind, value):
    """From a user's schedule, for all samples or one of them, in a late epoch."""
    for late in (lambda noise: value, lambda noise: noise * 0 + value):
        late_one = lambda s, f, p, noise, late=late: late(noise) if p == 1 else s  # noqa: E731
        monkeypatch.setitem(RATIO_SCHEDULES, "late", late_one)
        values = {f"{kind}_mask_schedule": "late", f"{kind}_mask_final_ratio": 0.5}
        words = rf"{kind}_mask_schedule='late' in epoch 3: mask_ratio=.* must be in \[0, 1\)"
        with pytest.raises(ValueError, match=words):
            make_trainer(num_epochs=3, **values)


def test_a_model_that_was_trained_is_said_to_be(make_trainer, make_model, tmp_path):
    """A cell run twice trains the same model further, as does a loaded model; a warning says so."""
    model, words = make_model(), "the model has been trained before"
    assert words not in said_by(make_trainer(model))
    make_trainer(model, max_steps=3).fit()
    assert f"{words} (3 steps)" in said_by(make_trainer(model))
    again = make_trainer(model, max_steps=5, run_name="two").fit()
    assert f"{words} (8 steps)" in said_by(make_trainer(mm.load(again.path / "best_model.pth")))
    resumed = make_trainer(make_model(), max_steps=5, run_name="two", resume=True)
    assert words not in said_by(resumed) and resumed.model.trained_steps == 8
    assert words not in said_by(make_trainer(run_name="fork", max_steps=7, resume=again.path))


def test_settings_of_a_given_model_are_recorded_as_they_are(make_trainer, make_model, make_data):
    """Settings that a given model overrides are named; a model of the preset has them."""
    model = make_model(dropout=0.2, temperature=0.13)
    trainer = make_trainer(model, max_steps=2, temperature=0.5, dropout=0.4)
    said = said_by(trainer)
    assert "temperature=0.5 is for a new model; the given one has 0.13" in said
    assert "dropout=0.4 is for a new model; the given one has 0.2" in said
    assert "preset=" not in said
    run = trainer.fit()
    real = dict(preset="own", dropout=0.2, temperature=0.13)
    saved = read_checkpoint(run.path / "best_model.pth")["config"]
    for recorded in (json.loads((run.path / "config.json").read_text()), saved):
        assert {name: recorded[name] for name in real} == real
    same = make_trainer(make_model(dropout=0.2), max_steps=2, resume=True)  # resumes all the same
    assert same.step == 2
    written = mm.TrainingConfig(**saved)
    mm.MaskedMultimodalTrainer(written, make_data(53), None, make_model(dropout=0.2))
    with pytest.raises(ValueError, match="preset='own' is not known; known: base, small, tiny"):
        mm.MaskedMultimodalTrainer(written, make_data(53))
    data = make_data(53, size=64)
    tiny = mm.MultimodalEncoder.preset("tiny", tokenizer=data.tokenizer)
    trainer = make_trainer(tiny, data=data, preset="small")
    assert "preset='small' is for a new model; the given one has 'tiny'" in said_by(trainer)
    assert trainer.recorded_config()["preset"] == "tiny"


def test_a_new_model_has_what_was_asked_for_to_the_last_digit(make_config, make_data):
    """Resuming compares it with the record."""
    data, values = make_data(17, size=64), dict(temperature=0.1234567891, max_steps=1)
    for resume in (False, True):
        config = make_config(**values, num_epochs=1)
        trainer = mm.MaskedMultimodalTrainer(config, data, None, None, resume)
        assert trainer.recorded_config()["temperature"] == 0.1234567891
        trainer.fit()


def test_a_configuration_that_is_changed_later_changes_no_run(make_config, make_model, make_data):
    """Fields that no longer fit each other are refused when the run starts."""
    config = make_config(max_steps=2)
    trainer = mm.MaskedMultimodalTrainer(config, make_data(53), None, make_model())
    config.batch_size, config.image_mask_schedule = 7, "linear"
    assert trainer.config.batch_size == 11
    with pytest.raises(ValueError, match="image_mask_final_ratio=None must be given with a sched"):
        mm.MaskedMultimodalTrainer(config, make_data(53), None, make_model())


def test_a_torch_subset_of_ours_is_a_data_set(make_trainer, make_data, make_model):
    """The rows of a subset, and of a subset of it; anything else is an error with a remedy."""
    data, model = make_data(53), make_model()
    first, second = torch.utils.data.random_split(
        data, [37, 16], generator=torch.Generator().manual_seed(0)
    )
    val = torch.utils.data.Subset(second, range(3, 14))
    trainer = make_trainer(model, data=first, val=val, max_steps=1)
    assert trainer.train.sample_ids.tolist() == list(first.indices)
    assert trainer.val.sample_ids.tolist() == [second.indices[i] for i in range(3, 14)]
    trainer.fit()
    whole = data.subset(second.indices)
    assert mm.evaluate(model, second) == mm.evaluate(model, whole)
    assert mm.Index(model, second).dataset.texts == whole.texts
    assert mm.inspect(second).rows == 16
    assert mm.overlap(first, second, near=False).images == 16


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda d: torch.utils.data.DataLoader(d), r"is a DataLoader, .* \({}=loader\.dataset\)"),
        (lambda d: [(d[0]["image"], "a dog")], r"is a list, .* give mm\.MultimodalDataset\("),
        (
            lambda d: torch.utils.data.TensorDataset(torch.zeros(7)),
            "is a TensorDataset, not a data",
        ),
        (lambda d: torch.utils.data.Subset([1, 2, 3], [0]), "is a list, not a data set"),
        (lambda d: (d, d), "is a tuple, .* give one of the data sets in it"),
        (lambda d: "pairs.csv", r"is a str, .* mm\.load_data\('pairs\.csv'\)"),
    ],
)
def test_what_is_no_data_set_is_named(make_config, make_model, make_data, wrong, words):
    data, model = make_data(53), make_model()
    given = wrong(data)
    with pytest.raises(ValueError, match="train " + words.format("train")):
        mm.train_model(make_config(), given, None, model)
    with pytest.raises(ValueError, match="val " + words.format("val")):
        mm.train_model(make_config(), data, given, model)
    for call in (mm.evaluate, mm.embed, mm.evaluate_reconstruction, mm.Index):
        shown = (
            model if call is not mm.evaluate_reconstruction else make_model().add_decoder(width=32)
        )
        with pytest.raises(ValueError, match="dataset " + words.format("dataset")):
            call(shown, given)


def test_arguments_of_another_kind_are_named(make_config, make_model, make_data):
    data, model, config = make_data(53), make_model(), make_config()
    for arguments, words in (
        ((data, config), r"config is a MultimodalDataset; give mm\.TrainingConfig"),
        (({"num_epochs": 3}, data), r"config is a dict; give mm\.TrainingConfig\(\*\*config\)"),
        ((config, data, None, "runs/a/best_model.pth"), r"give what mm\.load\('runs/a/best"),
        ((config, data, None, torch.nn.DataParallel(model)), "give model.module: the trainer"),
        ((config, data, None, torch.nn.Linear(3, 5)), r"model is a Linear; give a mm\.Multimodal"),
        ((config, data, None, model, False, print), "callbacks=.* must be a list of functions"),
        ((config, data, None, model, False, ["stop"]), "must be a list of functions"),
        (
            (config, data, None, model, 3),
            "resume is of type int; give True, False or a run's folder",
        ),
        ((config, data, None, model, Path), "resume is of type type; give True, False or"),
        ((make_config(preset="nano"), data), "preset='nano' is not known; known: base, small"),
        ((make_config(preset="nano"), data, None, model), "preset='nano' is not known"),
        ((make_config(text_mask="wole_word"), data, None, model), "did you mean 'whole_word'"),
    ):
        with pytest.raises(ValueError, match=words):
            mm.train_model(*arguments)
