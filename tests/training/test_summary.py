"""The report before a run says what holds in it, and which settings are likely mistakes."""

import re

import pytest
import torch

import mmkit as mm
from mmkit.training.summary import describe, effective_configuration


def test_a_short_run_is_told_that_its_warmup_is_long(make_config, make_model, make_data, capsys):
    mm.train_model(make_config(warmup_steps=9), make_data(53), None, make_model())
    assert "the warmup takes 9 of 10 steps" in capsys.readouterr().out


def test_the_effective_configuration_is_read_from_the_model(make_config, make_model, make_data):
    """A ratio that masks nothing is reported as 0, whatever the setting says."""

    def effective(**values):
        trainer = mm.MaskedMultimodalTrainer(
            make_config(**values), make_data(53), None, make_model()
        )
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
    make_config, make_model, make_data, capsys, captions, accumulation
):
    """Negatives are counted in the first batch, and every step has something to learn."""
    train, val = make_data(53, tokenizer=None), make_data(17, seed=1, tokenizer=None)
    for data in (train, val):
        data.texts = [captions(i) for i in range(len(data))]
    options = dict(num_epochs=1, gradient_accumulation_steps=2, accumulation=accumulation)
    trainer = mm.MaskedMultimodalTrainer(make_config(**options), train, val, make_model())
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


def test_a_run_says_how_its_ratio_changes_and_what_it_pays_for(make_trainer):
    """The longest row is encoded; a schedule is named; the EMA's forward pass is counted."""
    rising = dict(image_mask_ratio=0.2, image_mask_final_ratio=0.8)
    trainer = make_trainer(image_mask_schedule="uniform", **rising)
    longest = trainer.maskings(trainer.first_batch(), 0)[0].ids_keep.shape[1]
    assert effective_configuration(trainer)["patches_encoded"] == longest
    assert "20 to 80 % at random; padded to the longest" in describe(trainer)
    assert "now; linear to 80 %" in describe(make_trainer(image_mask_schedule="linear", **rising))
    plain, looking = (
        effective_configuration(make_trainer(image_mask=name))["gflop_per_pair"]
        for name in ("random", "attentive")
    )
    assert plain < looking < 2 * plain
