"""A run learns, on one process or many, and every masker trains."""

import copy
import json
import math
import signal

import pytest
import torch

import mmkit as mm
from mmkit.masking.image import IMAGE_MASKERS
from mmkit.masking.text import TEXT_MASKERS
from mmkit.models.attention import class_attention
from mmkit.models.checkpoint import read_checkpoint
from mmkit.widgets.mask_lab import MaskLab
from tests.train_small import QUICK, other_model
from tests.training.small_runs import (
    differences,
    losses,
    recorded_masks,
    same_weights,
    set_scale,
    train_small,
    weights_of,
)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_one_batch_overfits(make_config, make_model, make_data, optimizer, loss):
    data = make_data(11)
    options = dict(
        num_epochs=120, text_mask_ratio=0.0, eval_every=120, optimizer=optimizer, loss=loss
    )
    run = mm.train_model(make_config(**options), data, data, make_model(), resume=False)
    assert run.history[-1]["image_to_text_R@1"] == 1.0
    assert run.history[-1]["loss"] < 0.3 * run.history[0]["loss"]


def test_images_are_moved_while_training_only(make_config, make_model, make_data):
    """augment="shift" changes the input of the encoder, by noise that depends on the epoch."""
    data, pixels = make_data(53), []
    trainer = mm.MaskedMultimodalTrainer(make_config(augment="shift"), data, None, make_model())
    trainer.model.register_forward_pre_hook(lambda _, args: pixels.append(args[0].pixel_values))
    batch = trainer.first_batch()
    for epoch in (0, 0, 1):
        trainer.gradients(batch, epoch)
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[2])
    assert not torch.equal(pixels[0], batch.pixel_values)


def test_others_on_the_same_data_do_not_move_a_training(make_config, make_model, make_data):
    """A model with another tokenizer is evaluated in a callback, and trained beside it."""
    other = other_model(make_data)

    def losses(data, *callbacks):
        trainer = mm.MaskedMultimodalTrainer(
            make_config(run_name="", num_epochs=1), data, data, make_model(), callbacks=callbacks
        )
        return [record["loss"] for record in trainer.fit().history]

    def evaluate(trainer, record):
        if trainer.step == 2:
            mm.evaluate(other, data, ks=(1,))
            mm.probe.pooled_states(other, data, "text")
            MaskLab(data, other)

    def train_beside(trainer, record):
        if trainer.step == 2:
            beside = mm.MaskedMultimodalTrainer(make_config(run_name=""), data, data, other)
            assert beside.first_batch().input_ids.shape[1] == 5

    data = make_data(53, tokenizer=None)
    alone = losses(make_data(53, tokenizer=None))
    before = [x.clone() for x in data.encoded_captions()]
    assert losses(data, evaluate) == alone
    assert losses(data, train_beside) == alone
    assert all(map(torch.equal, before, data.encoded_captions()))


def test_every_image_once_per_epoch_in_a_new_order(make_config, make_model, make_data):
    trainer = mm.MaskedMultimodalTrainer(make_config(), make_data(53), None, make_model())
    epochs = [torch.cat([rows for rows, _ in trainer.epoch_batches(e)]) for e in (0, 1, 0)]
    for rows in epochs:
        assert rows.sort().values.tolist() == list(range(53))
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])
    assert [len(rows) for rows, _ in trainer.epoch_batches(0)] == [11, 11, 11, 10, 10]


def test_masks_are_replayed_and_end_for_the_unmasked_epochs(make_config, make_model, make_data):
    trainer = mm.MaskedMultimodalTrainer(
        make_config(num_epochs=5, unmasked_epochs=2), make_data(53), None, make_model()
    )
    batch = trainer.first_batch()
    image, text = trainer.maskings(batch, 2)
    again = trainer.maskings(batch[torch.arange(10, -1, -1)], 2)[0]
    assert torch.equal(image.mask, again.mask.flip(0)) and text.mask.any()
    assert not torch.equal(image.mask, trainer.maskings(batch, 1)[0].mask)
    assert trainer.maskings(batch, 3) == trainer.maskings(batch, 4) == (None, None)


def test_half_the_bits_learn_as_float32_does(make_config, make_model, make_data):
    data, ends = make_data(23), {}
    for precision in ("no", "bf16", "fp16"):
        run = mm.train_model(
            make_config(num_epochs=40, mixed_precision=precision, eval_every=40),
            data,
            data,
            make_model(),
        )
        ends[precision] = run.history[-1]["loss"]
    for precision in ("bf16", "fp16"):
        assert ends[precision] == pytest.approx(ends["no"], rel=0.3) and ends[precision] < 1


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """The same global batches: the same losses, metrics and weights, up to summation."""
    values = dict(optimizer="adamw", num_epochs=2, gradient_accumulation_steps=2)
    for name, flags in (("one", []), ("two", ["--processes", "2"])):
        done = train_small(tmp_path, name, *flags, **values)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = losses(tmp_path, "one"), losses(tmp_path, "two")
    assert [r[:2] for r in one] == [r[:2] for r in two]
    assert [r[2] for r in two] == pytest.approx([r[2] for r in one], rel=1e-4)
    weights = [
        torch.load(tmp_path / n / "last/state.pth", weights_only=True)["model_state_dict"]
        for n in ("one", "two")
    ]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)


def test_the_running_mean_is_what_is_validated_and_kept(make_trainer, make_data):
    """After n steps it is the weighted sum of all weights so far, computed by hand."""
    seen = []
    trainer = make_trainer(
        ema_decay=0.9, num_epochs=1, val=make_data(17, seed=1), warmup_steps=0,
        callbacks=[
            lambda t, r: seen.append(weights_of(t.model)) if r["split"] == "train" else None
        ],
    )  # fmt: skip
    expected = weights_of(trainer.model)
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
        return [*tensors(memory), *tensors(means), *weights_of(trainer.model).values()]

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


def test_restarts_by_torchrun_resume_by_themselves(make_trainer, monkeypatch):
    """The same command again, as from an elastic agent; a run without a name is refused."""
    make_trainer(num_epochs=2, max_steps=4).fit()
    assert make_trainer(num_epochs=2, max_steps=4).step == 0
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert make_trainer(num_epochs=2, max_steps=4).step == 4
    assert make_trainer(num_epochs=2, max_steps=4, run_name="not_yet").step == 0
    with pytest.raises(ValueError, match="give a run_name"):
        make_trainer(run_name="")


def test_settings_of_a_given_model_are_recorded_as_they_are(make_trainer, make_model, make_data):
    """Settings that a given model overrides are named; a model of the preset has them."""
    model = make_model(dropout=0.2, temperature=0.13)
    trainer = make_trainer(model, max_steps=2, temperature=0.5, dropout=0.4)
    said = mm.describe(trainer)
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
    assert "preset='small' is for a new model; the given one has 'tiny'" in mm.describe(trainer)
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


def everything_but_the_scale(trainer) -> list:
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return copy.deepcopy(
        [
            trainer.model.state_dict(),
            optimizers,
            (trainer.attention_ema and trainer.attention_ema.state_dict()),
        ]
    )


def test_an_overflowing_step_changes_nothing_but_the_scale(make_fp16_trainer):
    """Weights, both optimizers and the EMA stay; the scale halves; the step is counted."""
    trainer = make_fp16_trainer()
    batch = trainer.first_batch()
    set_scale(trainer, 128.0)
    _, norm = trainer.train_step(batch, 0)
    assert math.isfinite(norm) and trainer.skipped == 0
    before = everything_but_the_scale(trainer)
    set_scale(trainer, 2.0**40)
    _, norm = trainer.train_step(batch, 0)
    assert not math.isfinite(norm)
    assert differences(before, everything_but_the_scale(trainer)) == []
    assert trainer.scaler.get_scale() == 2.0**39
    assert (trainer.skipped, trainer.skipped_in_a_row) == (1, 1)


@pytest.mark.parametrize("masker", sorted(IMAGE_MASKERS))
@pytest.mark.parametrize("mode", ["drop", "replace"])
def test_every_image_masker_trains(make_trainer, masker, mode):
    """A step with each masker has a finite gradient in every part that got an input."""
    values = dict(image_mask=masker, image_mask_mode=mode, gradient_accumulation_steps=2)
    data = model = None
    if masker == "painted":
        values["painted_mask"] = torch.eye(3)
    if masker == "layers":  # only the built-in images have layers
        data = mm.openmoji(64)[1]
        model = mm.MultimodalEncoder.preset("tiny", tokenizer=data.tokenizer)
        values["batch_size"] = 16
    trainer = make_trainer(model, data=data, **values)
    batch = trainer.first_batch()
    loss, norm = trainer.train_step(batch, 0)
    assert torch.isfinite(loss) and 0 < norm < float("inf")
    if masker not in ("painted", "layers"):
        shown = trainer.maskings(batch, 0)[0].mask.sum(1)
        assert (shown == 9 - round(9 * 0.5)).all()


@pytest.mark.parametrize("masker", sorted(TEXT_MASKERS))
@pytest.mark.parametrize("mode", ["drop", "replace", "80/10/10"])
def test_every_text_masker_trains(make_trainer, masker, mode):
    trainer = make_trainer(text_mask=masker, text_mask_mode=mode, text_mask_ratio=0.5)
    loss, norm = trainer.train_step(trainer.first_batch(), 0)
    assert torch.isfinite(loss) and 0 < norm < float("inf")


@pytest.mark.parametrize(
    "schedule, expected",
    [("constant", [2, 2, 2, 2, 2]), ("linear", [2, 3, 5, 6, 7]), ("cosine", [2, 3, 5, 6, 7])],
)
def test_the_ratio_follows_its_schedule(make_trainer, schedule, expected):
    """Of 9 patches, from 0.2 in the first epoch to 0.8 in the last one that masks anything."""
    final = None if schedule == "constant" else 0.8
    trainer = make_trainer(
        num_epochs=6, unmasked_epochs=1, image_mask_ratio=0.2,
        image_mask_schedule=schedule, image_mask_final_ratio=final,
    )  # fmt: skip
    batch = trainer.first_batch()
    masked = [trainer.maskings(batch, epoch)[0].mask.sum(1).unique().tolist() for epoch in range(5)]
    assert masked == [[count] for count in expected]
    assert trainer.maskings(batch, 5) == (None, None)


def test_a_uniform_ratio_is_one_of_its_own_for_each_sample(make_trainer):
    trainer = make_trainer(
        image_mask_ratio=0.1, image_mask_schedule="uniform", image_mask_final_ratio=0.9,
        text_mask_ratio=0.1, text_mask_schedule="uniform", text_mask_final_ratio=0.6,
    )  # fmt: skip
    batch = trainer.first_batch()
    image, text = trainer.maskings(batch, 0)
    counts = image.mask.sum(1)
    assert len(counts.unique()) > 3 and 1 <= counts.min() and counts.max() <= 8
    assert torch.equal(image.keep_valid.sum(1), 9 - counts)
    assert not torch.equal(counts, trainer.maskings(batch, 1)[0].mask.sum(1))
    again = trainer.maskings(batch[torch.arange(10, -1, -1)], 0)
    assert torch.equal(again[0].mask.flip(0), image.mask)
    assert torch.equal(again[1].mask.flip(0), text.mask)


def test_the_running_mean_is_what_attentive_looks_with(make_trainer, make_model):
    """The attention is that of the EMA, at half the resolution, not of the trained model."""
    trainer = make_trainer(image_mask="attentive", learning_rate=0.05, num_epochs=3)
    assert make_trainer().attention_ema is None
    rising = dict(image_mask_schedule="linear", image_mask_final_ratio=0.5)
    assert make_trainer(image_mask="attentive", image_mask_ratio=0.0, **rising).attention_ema
    batch = trainer.first_batch()
    for _ in range(3):
        trainer.train_step(batch, 0)
    pixels = trainer.model.normalize(batch.pixel_values)
    with torch.no_grad():
        mean, now = (
            class_attention(vit, pixels, half=True, of="mean")
            for vit in (trainer.attention_ema.module, trainer.model.vit)
        )
    masking = trainer.maskings(batch, 0)[0]
    assert not torch.allclose(mean, now)
    for seen, attention in zip(~masking.mask, mean, strict=True):
        assert attention[seen].min() >= attention[~seen].max()


def test_masks_are_drawn_once_per_step(make_trainer, monkeypatch):
    """The second pass of a micro-batch masks what the first masked, without drawing again."""
    trainer = make_trainer(image_mask="attentive", gradient_accumulation_steps=3)
    calls = []
    attend, tokens = trainer.plan.tokens.attend, trainer.plan.tokens
    monkeypatch.setattr(tokens, "attend", lambda x: calls.append(len(x)) or attend(x))
    trainer.train_step(trainer.first_batch(), 0)
    assert calls == [4, 4, 3]


@pytest.mark.slow
@pytest.mark.parametrize("masker", ["block", "attentive"])
def test_masks_are_the_same_on_two_processes_and_after_a_kill(tmp_path, masker):
    """What each sample masked in each epoch: one process, two, and one killed in mid-epoch."""
    values = dict(
        image_mask=masker, image_mask_schedule="uniform", image_mask_final_ratio=0.8,
        text_mask="whole_word", text_mask_mode="80/10/10", num_epochs=2, checkpoint_every=1,
    )  # fmt: skip
    runs = (("one", []), ("two", ["--processes", "2"]), ("killed", ["--kill-at", "7"]))
    for name, flags in runs:
        done = train_small(tmp_path, name, "--record", *flags, **values)
        assert done.returncode == (-signal.SIGKILL if name == "killed" else 0), done.stderr[-2000:]
    resumed = train_small(tmp_path, "killed", "--record", "--resume", **values)
    assert resumed.returncode == 0 and "resuming" in resumed.stdout, resumed.stderr[-2000:]
    whole = recorded_masks(tmp_path, "one")
    assert len(whole) == 2 * 53 and any(words for _, words in whole.values())
    assert recorded_masks(tmp_path, "two") == whole
    assert recorded_masks(tmp_path, "killed") == whole
    same_weights(tmp_path, "one", "killed")


def test_frequencies_are_those_of_the_training_whatever_is_evaluated(
    make_data, make_model, tmp_path
):
    """A caption is masked the same in a part, in the whole, and by the model read back; without a
    training, the remedy that is named serves."""
    train, untrained, other = make_data(53), make_model(), make_model()
    rows, mask = [3, 5, 7, 11, 13, 17, 19, 23, 29, 31], dict(text_mask=("frequency", 0.5))
    part = train.subset(rows)
    assert not torch.equal(part.token_frequency(), train.token_frequency())
    with pytest.raises(ValueError, match=r"set model.token_frequency = train.token_") as said:
        mm.embed(untrained, train, **mask)
    config = mm.TrainingConfig(**QUICK | dict(output_dir=str(tmp_path), text_mask="frequency"))
    run = mm.train_model(config, train, part, model=untrained)
    assert torch.equal(untrained.token_frequency, train.token_frequency())
    for model in (untrained, mm.load(run.path / "best_model.pth")):
        whole = mm.embed(model, train, **mask).text_features
        torch.testing.assert_close(mm.embed(model, part, **mask).text_features, whole[rows])
    remedy = str(said.value).partition("set ")[2].partition(",")[0]
    exec(remedy, dict(model=other, train=train))
    assert mm.embed(other, part, **mask).text_features.isfinite().all()
