"""A step is predicted from its configuration alone: operations, weights, memory."""

import dataclasses

import pytest

import mmkit as mm
from mmkit import cost
from mmkit.training.summary import effective_configuration


def test_a_run_says_the_same_operations_as_are_predicted(trainer_of):
    """The printed number leaves out the logits and the optimizer, and nothing else."""
    trainer = trainer_of(gradient_accumulation_steps=3)
    said = 1e9 * effective_configuration(trainer)["gflop_per_pair"]
    prediction = cost.predict_batch(trainer, trainer.first_batch())
    logits = cost.logit_flops(trainer.config, 13, 23, again=False)
    assert prediction.flops_per_pair == pytest.approx(said + logits)


def test_weights_gradients_and_optimizer_state_are_those_of_a_trainer(trainer_of):
    for optimizer in ("muon", "adamw"):
        trainer = trainer_of(optimizer=optimizer)
        trainer.train_step(trainer.first_batch(), 0)
        state = sum(
            value.numel() * 4
            for one in trainer.optimizers
            for values in one.state.values()
            for name, value in values.items()
            if name != "step"
        )
        prediction = cost.predict_batch(trainer, trainer.first_batch())
        assert prediction.weights == 4 * sum(p.numel() for p in trainer.model.parameters())
        assert prediction.gradients == prediction.weights
        unused = 2 * 22  # the mask tokens, which are unused here and have no state
        assert prediction.optimizer_state - state == 8 * unused


def test_micro_batches_cut_what_is_kept_but_not_the_operations(make_model):
    config = mm.TrainingConfig(batch_size=91, mixed_precision="no")
    whole, cut = (
        cost.predict(
            dataclasses.replace(config, gradient_accumulation_steps=k),
            make_model(),
            caption_length=5,
        )
        for k in (1, 7)
    )
    assert 6 < whole.activations / cut.activations < 7.1
    assert 1.2 < cut.flops / whole.flops < 4 / 3
    assert cut.logits == whole.logits and cut.memory < whole.memory


@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_presets_are_predicted_without_being_built(preset):
    """Weights of a model with 4,096 tokens; a 2-byte precision halves what products keep."""
    config = mm.TrainingConfig(batch_size=64, mixed_precision="no")
    full = cost.predict(config, preset, caption_length=11)
    half = cost.predict(
        dataclasses.replace(config, mixed_precision="bf16"), preset, caption_length=11
    )
    assert {"tiny": 20, "small": 130, "base": 690}[preset] < full.weights / 1e6
    assert full.weights / 1e6 < {"tiny": 24, "small": 145, "base": 720}[preset]
    assert 0.5 < half.activations / full.activations < 0.75
    assert half.flops == full.flops and full.seconds is None


@pytest.mark.parametrize(
    ("settings", "given", "words"),
    [
        ({}, dict(model_or_preset="tny"), "did you mean 'tiny'"),
        ({}, dict(caption_length=33), "1 to 32"),
        ({}, dict(caption_length=0.5), "1 to 32"),
        ({}, dict(longest_caption=3), "below the mean"),
        ({}, dict(image_size=61), "try 56"),
        ({}, dict(processes=67), "cannot be cut"),
        (dict(image_mask="layers"), {}, "mm.describe"),
    ],
    ids=str,
)
def test_what_cannot_be_predicted_is_said(settings, given, words):
    config = mm.TrainingConfig(batch_size=64, **settings)
    with pytest.raises(ValueError, match=words):
        cost.predict(config, **dict(model_or_preset="tiny", caption_length=7) | given)
