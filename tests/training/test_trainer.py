"""A run learns, describes itself, writes readable files, and resumes after a kill."""

import json
import math
import signal
import subprocess
import sys

import pytest
import torch

import mmkit as mm
from mmkit.training.optim import build_optimizers, parameter_groups
from mmkit.training.step import MAX_LOGIT_SCALE
from mmkit.training.summary import effective_configuration
from mmkit.widgets.mask_lab import MaskLab
from tests.train_small import DEFAULTS

QUICK = DEFAULTS | dict(num_epochs=2)


@pytest.fixture
def config(tmp_path):
    def make(**values):
        return mm.TrainingConfig(**QUICK | dict(output_dir=str(tmp_path), run_name="run") | values)

    return make


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_one_batch_overfits(config, make_model, make_data, optimizer, loss):
    data = make_data(11)
    options = dict(
        num_epochs=120, text_mask_ratio=0.0, eval_every=120, optimizer=optimizer, loss=loss
    )
    run = mm.train_model(config(**options), data, data, make_model(), resume=False)
    assert run.history[-1]["image_to_text_R@1"] == 1.0
    assert run.history[-1]["loss"] < 0.3 * run.history[0]["loss"]


def test_a_run_leaves_what_it_promises(config, make_model, make_data, capsys):
    """best_model.pth and its contents, last/, config.json, metrics.jsonl, TensorBoard's scalars."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train, val = make_data(53), make_data(17, seed=1)
    run = mm.train_model(config(num_epochs=3), train, val, make_model())
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


def test_the_best_model_comes_back_whole(config, make_model, make_data):
    """Identical features, its tokenizer, ready to encode."""
    train, val = make_data(53), make_data(17, seed=1)
    trainer = mm.MaskedMultimodalTrainer(config(num_epochs=1), train, val, make_model(dropout=0.2))
    trained = trainer.fit().model
    assert not trained.training
    a, b = mm.embed(trained, val), mm.embed(trainer.model, val)
    assert torch.equal(a.image_features, b.image_features)
    assert torch.equal(a.text_features, b.text_features)


def test_two_unnamed_runs_are_two_folders(config, make_model, make_data):
    paths = [
        mm.train_model(config(run_name="", max_steps=1), make_data(53), None, make_model()).path
        for _ in range(2)
    ]
    assert paths[0] != paths[1] and all((path / "best_model.pth").is_file() for path in paths)


def test_images_are_moved_while_training_only(config, make_model, make_data):
    """augment="shift" changes the input of the encoder, by noise that depends on the epoch."""
    data, pixels = make_data(53), []
    trainer = mm.MaskedMultimodalTrainer(config(augment="shift"), data, None, make_model())
    trainer.model.register_forward_pre_hook(lambda _, args: pixels.append(args[0].pixel_values))
    batch = trainer.first_batch()
    for epoch in (0, 0, 1):
        trainer.gradients(batch, epoch)
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[2])
    assert not torch.equal(pixels[0], batch.pixel_values)


def test_a_short_run_is_told_that_its_warmup_is_long(config, make_model, make_data, capsys):
    mm.train_model(config(warmup_steps=9), make_data(53), None, make_model())
    assert "the warmup takes 9 of 10 steps" in capsys.readouterr().out


def test_without_validation_the_training_loss_judges(config, make_model, make_data, capsys):
    run = mm.train_model(config(), make_data(53), None, make_model())
    assert "chosen by the training loss" in capsys.readouterr().out
    assert run.best["loss"] == min(r["train_loss"] for r in run.history if r["split"] == "val")


def test_what_training_and_validation_set_share_is_said(config, make_model, make_data, capsys):
    """The number of shared images and captions, before the first step; nothing without any."""
    train, other = make_data(23), make_data(7, seed=1)
    pixels = torch.cat([train.batch([3, 5]).pixel_values, other.batch(range(5)).pixel_values])
    words = ["moon", "shoe", "star", train.texts[11][0].upper(), "bread", "tree", "boat"]
    val = mm.MultimodalDataset.from_pixels(pixels, words, tokenizer=train.tokenizer)
    mm.train_model(config(max_steps=1), train, val, make_model())
    (line,) = [w for w in capsys.readouterr().out.splitlines() if "also in training" in w]
    assert "2 of 7 validation images (28.6 %) are also in training" in line
    assert "(validation row = training row: 0 = 3, 1 = 5)" in line
    assert "1 of 7 validation images (14.3 %) have a caption that is also in training" in line
    assert line.startswith("beware ") and "mm.split keeps such images together" in line
    apart = mm.MultimodalDataset.from_pixels(
        pixels[2:], ["moon", "shoe", "star", "bread", "tree"], tokenizer=train.tokenizer
    )
    mm.train_model(config(max_steps=1), train, apart, make_model())
    assert "also in training" not in capsys.readouterr().out


def test_the_training_tokenizer_goes_to_the_validation_set(
    config, make_model, make_data, tokenizer
):
    train, val = make_data(53, tokenizer=None), make_data(17, tokenizer=None)
    val.texts = [["blue moon"]] * 17
    trainer = mm.MaskedMultimodalTrainer(config(), train, val, make_model())
    assert trainer.val.tokenizer is trainer.model.tokenizer is trainer.train.tokenizer
    assert val.tokenizer is not train.tokenizer and val.max_length == 77  # both are unchanged
    foreign = make_data(17, tokenizer=mm.train_wordpiece(["something else"]))
    with pytest.raises(ValueError, match="val set was given another tokenizer"):
        mm.MaskedMultimodalTrainer(config(), train, foreign, make_model())


def other_model(make_data):
    """A model that reads other tokens, and at most 5 of a caption."""
    from transformers import BertConfig, ViTConfig

    tokenizer = mm.train_wordpiece(["moon", "the old red house and the small boat"])
    tower = dict(hidden_size=22, num_hidden_layers=1, num_attention_heads=2, intermediate_size=31)
    return mm.MultimodalEncoder(
        ViTConfig(image_size=15, patch_size=5, **tower),
        BertConfig(vocab_size=len(tokenizer), max_position_embeddings=5, **tower),
        tokenizer,
        embed_dim=13,
    )


def test_others_on_the_same_data_do_not_move_a_training(config, make_model, make_data):
    """A model with another tokenizer is evaluated in a callback, and trained beside it."""
    other = other_model(make_data)

    def losses(data, *callbacks):
        trainer = mm.MaskedMultimodalTrainer(
            config(run_name="", num_epochs=1), data, data, make_model(), callbacks=callbacks
        )
        return [record["loss"] for record in trainer.fit().history]

    def evaluate(trainer, record):
        if trainer.step == 2:
            mm.evaluate(other, data, ks=(1,))
            mm.probe.pooled_states(other, data, "text")
            MaskLab(data, other)

    def train_beside(trainer, record):
        if trainer.step == 2:
            beside = mm.MaskedMultimodalTrainer(config(run_name=""), data, data, other)
            assert beside.first_batch().input_ids.shape[1] == 5

    data = make_data(53, tokenizer=None)
    alone = losses(make_data(53, tokenizer=None))
    before = [x.clone() for x in data.encoded_captions()]
    assert losses(data, evaluate) == alone
    assert losses(data, train_beside) == alone
    assert all(map(torch.equal, before, data.encoded_captions()))


def test_a_view_is_encoded_once_and_shares_its_images(tmp_path, make_data, monkeypatch):
    calls, encode = [], mm.data.partners.encode_texts
    monkeypatch.setattr(
        mm.data.partners, "encode_texts", lambda *args: calls.append(args[2]) or encode(*args)
    )
    data = make_data(23)
    assert data.encoded_by(data.tokenizer, 77) is data
    for _ in range(3):
        views = [data.encoded_by(data.tokenizer, length) for length in (5, 7)]
        assert [view.batch(range(23)).input_ids.shape[1] for view in views] == [5, 7]
    assert calls == [5, 7]
    assert views[0].subset([4, 0]).batch([0]).input_ids.shape[1] == 5
    paths = [tmp_path / f"{row}.png" for row in range(3)]
    for row, path in enumerate(paths):
        path.write_bytes(data.image_file(row).getvalue())
    for first, second in ((0, 1), (1, 0)):  # for both decoding orders
        files = mm.MultimodalDataset(paths, ["a", "b", "c"], image_size=15)
        pair = (files, files.encoded_by(data.tokenizer, 5))
        pair[first].keep_on("cpu")
        assert pair[second].resident
        assert torch.equal(pair[second].batch([2]).pixel_values, data.batch([2]).pixel_values)


def test_what_an_encoder_says_of_long_captions_is_a_remedy(make_data):
    model, data = other_model(make_data), make_data(23)
    with pytest.raises(ValueError, match="the encoder takes 5") as error:
        model(data.batch(range(23)))
    remedy = str(error.value).split("take batches of ")[1]
    view = eval(remedy, {"dataset": data, "model": model})
    assert model(view.batch(range(23))).text_features.shape == (23, 13)


def test_every_image_once_per_epoch_in_a_new_order(config, make_model, make_data):
    trainer = mm.MaskedMultimodalTrainer(config(), make_data(53), None, make_model())
    epochs = [torch.cat([rows for rows, _ in trainer.epoch_batches(e)]) for e in (0, 1, 0)]
    for rows in epochs:
        assert rows.sort().values.tolist() == list(range(53))
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])
    assert [len(rows) for rows, _ in trainer.epoch_batches(0)] == [11, 11, 11, 10, 10]


def test_masks_are_replayed_and_end_for_the_unmasked_epochs(config, make_model, make_data):
    trainer = mm.MaskedMultimodalTrainer(
        config(num_epochs=5, unmasked_epochs=2), make_data(53), None, make_model()
    )
    batch = trainer.first_batch()
    image, text = trainer.maskings(batch, 2)
    again = trainer.maskings(batch[torch.arange(10, -1, -1)], 2)[0]
    assert torch.equal(image.mask, again.mask.flip(0)) and text.mask.any()
    assert not torch.equal(image.mask, trainer.maskings(batch, 1)[0].mask)
    assert trainer.maskings(batch, 3) == trainer.maskings(batch, 4) == (None, None)


def test_the_effective_configuration_is_read_from_the_model(config, make_model, make_data):
    """A ratio that masks nothing is reported as 0, whatever the setting says."""

    def effective(**values):
        trainer = mm.MaskedMultimodalTrainer(config(**values), make_data(53), None, make_model())
        return effective_configuration(trainer)

    e = effective(image_mask_ratio=0.02, gradient_accumulation_steps=3)
    assert e["image_mask_ratio"] == 0 and e["patches_encoded"] == 9
    assert (e["negatives"], e["compared"]) == (10, 10)  # of the first batch, 11 of 53 pairs
    assert effective(gradient_accumulation_steps=3, accumulation="naive")["negatives"] == 3
    assert effective(image_mask_mode="replace")["patches_encoded"] == 9
    assert effective(text_mask_mode="drop")["tokens_encoded"] < effective()["tokens_encoded"]
    assert effective(image_mask_ratio=0.8)["gflop_per_pair"] < e["gflop_per_pair"]


TAGGED = {
    "a caption for all": lambda i: ["photo", f"thing number {i}"],
    "a title and one of two categories": lambda i: [f"thing number {i}", f"kind {i % 2}"],
    "a chain": lambda i: [f"caption {i}", f"caption {i + 1}"],
}


@pytest.mark.parametrize("captions", TAGGED.values(), ids=TAGGED)
@pytest.mark.parametrize("accumulation", ["exact", "naive"])
def test_negatives_and_chance_are_counted_with_partners(
    config, make_model, make_data, capsys, captions, accumulation
):
    """Negatives are counted in the first batch, and every step has something to learn."""
    train, val = make_data(53, tokenizer=None), make_data(17, seed=1, tokenizer=None)
    for data in (train, val):
        data.texts = [captions(i) for i in range(len(data))]
    options = dict(num_epochs=1, gradient_accumulation_steps=2, accumulation=accumulation)
    trainer = mm.MaskedMultimodalTrainer(config(**options), train, val, make_model())
    micro = trainer.first_batch().split(1 if accumulation == "exact" else 2)[0]
    wrong = torch.cat([(~micro.correct()).sum(way).double() for way in (0, 1)])
    assert accumulation == "naive" or wrong.mean() < len(micro) - 1, "none shares a caption"
    e = effective_configuration(trainer)
    assert e["negatives"] == pytest.approx(wrong.mean().item())
    assert e["guessing_costs"] == pytest.approx(wrong.log1p().mean().item())

    flat = [caption for texts in val.texts for caption in texts]
    of_images = [sum(c in texts for c in flat) / len(flat) for texts in val.texts]
    of_captions = [sum(caption in texts for texts in val.texts) / 17 for caption in flat]
    chance = 50 * (sum(of_images) / 17 + sum(of_captions) / len(flat))
    run = trainer.fit()
    said = capsys.readouterr().out
    count = f"{e['negatives']:.1f} of " if e["negatives"] < len(micro) - 1 else ""
    assert f"negatives   {count}{len(micro) - 1} per pair" in said
    assert f"chance of R@1 {chance:.1f} %" in said
    assert ("“photo” (53 images)" in said) == (train.texts[0][0] == "photo")
    assert ("“kind 0” (27 images), “kind 1” (26 images)" in said) == ("kind 0" in flat)
    steps = [record for record in run.history if record["split"] == "train"]
    assert all(record["loss"] > 0.1 and record["grad_norm"] > 0 for record in steps)


def test_parameters_stand_in_the_right_group(make_model, config):
    """Biases, norms, positions, class and mask tokens and the scale never decay."""
    model = make_model()
    groups = parameter_groups(model)
    assert all(".layers." in n or ".layer." in n for n in groups["matrices"])
    assert len(groups["matrices"]) == 2 * 6 + 2 * 6
    words = set(groups["decayed"])
    assert words == {
        "vit.embeddings.patch_embeddings.projection.weight",
        "bert.embeddings.word_embeddings.weight",
        "image_projection.2.weight",
        "text_projection.2.weight",
    }
    assert {"logit_scale", "logit_bias", "image_mask_token", "vit.embeddings.cls_token"} <= set(
        groups["plain"]
    )
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    muon, adamw = build_optimizers(model, config())
    assert muon.param_groups[0]["lr"] == pytest.approx(3 * 5e-3)
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.1, 0.0]
    (only,) = build_optimizers(model, config(optimizer="adamw"))
    assert sum(len(g["params"]) for g in only.param_groups) == len(list(model.parameters()))


def test_parameters_of_a_decoder_stand_in_the_right_group(make_model):
    """Muon updates its layers' matrices; mask tokens, biases and norms never decay."""
    model = make_model().add_decoder(across=True, matching=True, width=32)
    groups = {
        role: {name.removeprefix("decoder.") for name in names if name.startswith("decoder.")}
        for role, names in parameter_groups(model).items()
    }
    assert len(groups["matrices"]) == 2 * 2 * 6
    assert all("_layers.layers." in name and "weight" in name for name in groups["matrices"])
    layers = ("pixel_layers", "word_layers")
    assert groups["decayed"] == {f"{part}.{map}.weight" for part in layers for map in
                                 ("embed", "other")} | {"pixel_head.weight", "matching_head.weight",
                                                        "word_head.dense.weight"}  # fmt: skip
    assert {f"{part}.mask_token" for part in layers} | {"word_head.bias"} <= groups["plain"]
    own = [name for name, _ in model.named_parameters() if name.startswith("decoder.")]
    assert sum(map(len, groups.values())) == len(own)


def test_the_scale_is_clamped_in_the_parameter_and_still_learns(config, make_model, make_data):
    trainer = mm.MaskedMultimodalTrainer(config(warmup_steps=0), make_data(53), None, make_model())
    with torch.no_grad():
        trainer.model.logit_scale.fill_(7.0)
    batch = trainer.first_batch()
    trainer.train_step(batch, 0)
    assert trainer.model.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)
    trainer.gradients(batch, 0)
    assert trainer.model.logit_scale.grad.abs() > 0


def test_gradients_are_clipped_and_bad_steps_skipped(config, make_model, make_data):
    """A step without a finite gradient changes nothing; too many stop the run with a message."""
    trainer = mm.MaskedMultimodalTrainer(
        config(max_grad_norm=0.01, optimizer="adamw"), make_data(53), None, make_model()
    )
    batch = trainer.first_batch()
    seen = []
    step = trainer.optimizers[0].step
    trainer.optimizers[0].step = lambda *a: (seen.append(clipped(trainer.model)), step(*a))
    _, norm = trainer.train_step(batch, 0)
    assert norm > 0.01 and seen[0] == pytest.approx(0.01, rel=1e-3)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    broken = batch[torch.arange(len(batch))]
    broken.pixel_values = torch.full((len(batch), 3, 15, 15), math.nan)
    trainer.train_step(broken, 0)
    assert trainer.skipped == 1
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
    with pytest.raises(RuntimeError, match="20 steps in a row had no finite gradient"):
        for _ in range(20):
            trainer.train_step(broken, 0)


def clipped(model):
    return (
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    )


def test_half_the_bits_learn_as_float32_does(config, make_model, make_data):
    data, ends = make_data(23), {}
    for precision in ("no", "bf16", "fp16"):
        run = mm.train_model(
            config(num_epochs=40, mixed_precision=precision, eval_every=40),
            data,
            data,
            make_model(),
        )
        ends[precision] = run.history[-1]["loss"]
    for precision in ("bf16", "fp16"):
        assert ends[precision] == pytest.approx(ends["no"], rel=0.3) and ends[precision] < 1


def test_bad_starts_are_refused_in_words(config, make_model, make_data):
    with pytest.raises(ValueError, match=r"batch_size=99 is larger than the training set \(53"):
        mm.train_model(config(batch_size=99), make_data(53), None, make_model())
    with pytest.raises(ValueError, match="10 pairs cannot be divided among 1 processes and 11"):
        mm.train_model(config(gradient_accumulation_steps=11), make_data(53), None, make_model())
    with pytest.raises(ValueError, match="masker 'blok' is not known"):
        mm.train_model(config(image_mask="blok"), make_data(53), None, make_model())
    with pytest.raises(ValueError, match="16 x 16 pixels, the encoder takes 15 x 15"):
        mm.train_model(config(), make_data(53, size=16), None, make_model())
    with pytest.raises(FileNotFoundError, match="no run in"):
        mm.Run.load("nowhere")


def test_a_new_run_replaces_and_a_resumed_one_asks_for_the_same_settings(
    config, make_model, make_data, capsys
):
    data = make_data(53)
    mm.train_model(config(), data, None, make_model())
    mm.train_model(config(), data, None, make_model())
    assert "replacing the earlier run" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"configuration differs .*learning_rate: 0\.005 -> 0\.1"):
        mm.train_model(config(learning_rate=0.1), data, None, make_model(), resume=True)
    with pytest.raises(ValueError, match="it was trained on other images or captions"):
        mm.train_model(config(), make_data(54), None, make_model(), resume=True)
    mm.train_model(config(run_name="other"), data, None, make_model(), resume=True)
    assert "nothing to resume" in capsys.readouterr().out
    finished = mm.train_model(config(), data, None, make_model(), resume=True)
    assert finished.history[-1]["step"] == 10


# -- in processes of their own ---------------------------------------------------------------


def train_small(folder, name, *flags, **values):
    command = [
        sys.executable,
        "-m",
        "tests.train_small",
        str(folder),
        name,
        json.dumps(values),
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def losses(folder, name):
    return [(r["split"], r["step"], r["loss"]) for r in mm.Run.load(folder / name).history]


def same_weights(folder, one, other, file="last/state.pth"):
    states = [torch.load(folder / name / file, weights_only=True) for name in (one, other)]
    weights = [s["model_state_dict"] for s in states]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    slots = [torch.cat([v.flatten().float() for o in s["optimizer_state_dict"] for slot in
    o["state"].values()
                        for v in slot.values()]) for s in states]  # fmt: skip
    assert torch.equal(*slots)


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
