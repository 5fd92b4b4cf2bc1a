"""A step is counted from its configuration alone: operations, weights, bytes exchanged."""

import dataclasses

import pytest

import mmkit as mm
from mmkit import cost
from mmkit.training.summary import effective_configuration
from tests.cost.predicted import predicted


def test_a_run_says_the_same_operations_as_are_predicted(trainer_of):
    """The printed number leaves out the logits and the optimizer, and nothing else."""
    trainer = trainer_of(gradient_accumulation_steps=3)
    said = 1e9 * effective_configuration(trainer)["gflop_per_pair"]
    prediction = predicted(trainer)
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
        prediction = predicted(trainer)
        assert prediction.weights == 4 * sum(p.numel() for p in trainer.model.parameters())
        assert prediction.gradients == prediction.weights
        unused = 2 * 22  # the mask tokens, which are unused here and have no state
        assert prediction.optimizer_state - state == 8 * unused


def test_bytes_exchanged_grow_with_the_processes(make_model):
    """Gradients 2 (W - 1) / W, features once and their gradients twice, Muon's weights, ids."""
    model = make_model()
    parameters = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in mm.optim.parameter_groups(model)["matrices"].values())
    config = mm.TrainingConfig(batch_size=35)

    def exchanged(processes, **settings):
        changed = dataclasses.replace(config, **settings)
        return cost.predict(model_or_preset=model, config=changed, caption_length=5,
                            processes=processes).exchanged  # fmt: skip

    assert exchanged(1) == 0
    features = 35 * 13 * 4
    for world in (5, 7):
        fraction = (world - 1) / world
        expected = fraction * (2 * 4 * parameters + 4 * matrices + 2 * 3 * features + 8 * 35)
        assert exchanged(world) == pytest.approx(expected)
    plain = exchanged(5, loss="sigmoid", optimizer="adamw")
    assert exchanged(5, optimizer="adamw") - plain == pytest.approx(0.8 * 2 * features)
    ring = exchanged(5, loss="sigmoid", optimizer="adamw", exchange="neighbours")
    assert plain - ring == pytest.approx(0.8 * 2 * features)


@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_presets_are_predicted_without_being_built(preset):
    """The megabytes of the weights lie within bounds; decoder heads come on top."""
    config = mm.TrainingConfig(batch_size=64)
    found = cost.predict(config, preset, caption_length=11)
    assert {"tiny": 20, "small": 130, "base": 690}[preset] < found.weights / 1e6
    assert found.weights / 1e6 < {"tiny": 24, "small": 145, "base": 720}[preset]
    reconstructing = dataclasses.replace(config, mim_weight=1.0)
    assert cost.predict(reconstructing, preset, caption_length=11).weights > found.weights


@pytest.mark.parametrize(
    ("settings", "given", "words"),
    [
        ({}, dict(model_or_preset="tny"), "did you mean 'tiny'"),
        ({}, dict(caption_length=33), "1 to 32"),
        ({}, dict(caption_length=0.5), "1 to 32"),
        ({}, dict(longest_caption=3), "not below the mean"),
        (dict(image_mask="layers"), {}, "mm.describe"),
    ],
    ids=str,
)
def test_what_cannot_be_predicted_is_said(settings, given, words):
    config = mm.TrainingConfig(batch_size=64, **settings)
    with pytest.raises(ValueError, match=words):
        cost.predict(config, **dict(model_or_preset="tiny", caption_length=7) | given)
