"""A wrong value never starts a run; every field has a type and a rule."""

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch

from mmkit import TrainingConfig
from mmkit.schedules import RATIO_SCHEDULES


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(bach_size=3), "no field 'bach_size'; did you mean 'batch_size'"),
        (dict(optimizer="mion"), "did you mean 'muon'"),
        (dict(schedule="cosin"), "did you mean 'cosine'"),
        (dict(image_mask_ratio=1.0), r"image_mask_ratio=1.0 must be in \[0, 1\)"),
        (dict(image_mask_ratio=50), "a fraction, not per cent"),
        (dict(text_mask_ratio=-0.1), r"must be in \[0, 1\)"),
        (dict(num_epochs=0), "num_epochs=0 must be at least 1"),
        (dict(batch_size=2.5), "whole number"),
        (dict(learning_rate=-1), "learning_rate=-1 must be 0 or more"),
        (dict(batch_size=4, gradient_accumulation_steps=5), "at most 4"),
        (dict(temperature=0.001), "at least 0.01"),
        (dict(mixed_precision="bf17"), "known: auto, bf16, fp16, no"),
        (dict(max_steps=0), "None or at least 1"),
        (dict(text_mask_mode="80-10-10"), "did you mean '80/10/10'"),
        (dict(image_mask_mode="80/10/10"), "known: drop, replace"),
        (dict(image_mask_schedule="cosin"), "did you mean 'cosine'"),
        (dict(text_mask_schedule="step"), "known: constant, cosine, linear, uniform"),
        (dict(image_mask_schedule="linear"), "image_mask_final_ratio=None must be given with a s"),
        (dict(text_mask_schedule="uniform"), "text_mask_final_ratio=None must be given with a s"),
        (dict(image_mask_final_ratio=0.9), "image_mask_final_ratio=0.9 must be given with a sch"),
        (dict(text_mask_final_ratio=0.9), "text_mask_final_ratio=0.9 must be given with a sched"),
        (
            dict(image_mask_schedule="linear", image_mask_final_ratio=1.0),
            r"image_mask_final_ratio=1.0 must be None or in \[0, 1\)",
        ),
        (
            dict(text_mask_schedule="cosine", text_mask_final_ratio=-0.5),
            r"text_mask_final_ratio=-0.5 must be None or in \[0, 1\)",
        ),
        (dict(ema_momentum=1.0), r"ema_momentum=1.0 must be in \[0, 1\)"),
        (dict(ema_momentum=-0.1), r"ema_momentum=-0.1 must be in \[0, 1\)"),
        (dict(image_mask="painted"), "painted_mask=None must be given with image_mask='painted'"),
        (dict(image_mask="painted", painted_mask=[0, 1]), "must be rows of equal length"),
        (dict(image_mask="painted", painted_mask=[[0, 1], [0]]), "must be rows of equal length"),
        (dict(image_mask="painted", painted_mask="0101"), "must be rows of equal length"),
        (
            dict(image_mask="layers", image_mask_schedule="linear", image_mask_final_ratio=0.5),
            "'layers' uses no ratio; take 'constant'",
        ),
        (dict(painted_mask=[[0, 1]]), "must be given with image_mask='painted', and only then"),
        (dict(image_mask="layers", augment="shift"), "augment='shift' moves .* augment='none'"),
        (dict(emma_momentum=0.9), "did you mean 'ema_momentum'"),
        (dict(warmup_steps=2.5), "warmup_steps=2.5 must be a whole number"),
        (dict(max_steps=2.5), "max_steps=2.5 must be None or a whole number"),
        (dict(seed=1.5), "seed=1.5 must be a whole number"),
        (dict(seed=2**63), "seed=9223372036854775808 must be a whole number of 64 bits"),
        (dict(matrix_learning_rate=math.nan), "matrix_learning_rate=nan must be None or a finite"),
        (dict(matrix_learning_rate=-1), "matrix_learning_rate=-1 must be None or 0 or more"),
        (dict(learning_rate=math.inf), "learning_rate=inf must be a finite number"),
        (dict(temperature=math.inf), "temperature=inf must be a finite number"),
        (dict(num_workers=-1), "num_workers=-1 must be 0 or more"),
        (dict(deterministic="no"), r"deterministic='no' must be True or False \(without quotes\)"),
        (dict(compile="false"), "compile='false' must be True or False"),
        (dict(cross_modal=1), "cross_modal=1 must be True or False"),
        (dict(learning_rate="5e-4"), r"learning_rate='5e-4' must be a number \(without quotes\)"),
        (dict(batch_size="16"), r"batch_size='16' must be a whole number \(without quotes\)"),
        (dict(num_epochs=True), "num_epochs=True must be a whole number"),
        (dict(weight_decay=None), "weight_decay=None must be a number"),
        (dict(num_epochs=None), "num_epochs=None must be a whole number"),
        (dict(run_name=7), "run_name=7 must be a string"),
        (dict(image_mask=["random"]), r"image_mask=\['random'\] must be a string"),
        (dict(image_mask=len), r"a name by mmkit\.masking\.IMAGE_MASKERS\['mine'\] = function"),
        (dict(text_mask=len), r"mmkit\.masking\.TEXT_MASKERS\['mine'\] = function"),
        (dict(loss=len), "loss=<built-in function len> must be a string"),
        (dict(decoder_width=40), "decoder_width=40 must be a multiple of 32"),
    ],
)
def test_wrong_values_are_refused_with_a_message(values, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**values)


def test_every_field_has_a_type_and_every_number_a_rule():
    """No field takes a value of another type; no number is without a rule."""
    for field in dataclasses.fields(TrainingConfig):
        wrong = object()
        with pytest.raises(ValueError, match=f"^{field.name}=.* must be "):
            TrainingConfig(**{field.name: wrong})
        if isinstance(field.default, float):
            with pytest.raises(ValueError, match=f"^{field.name}=nan must be "):
                TrainingConfig(**{field.name: math.nan})
        if type(field.default) in (int, float):
            with pytest.raises(ValueError, match=f"^{field.name}="):
                TrainingConfig(**{field.name: -(2**77)})
        config = TrainingConfig()
        with pytest.raises(ValueError, match=f"^{field.name}=.* must be "):
            setattr(config, field.name, wrong)
        assert getattr(config, field.name) == field.default


def test_a_field_that_is_set_later_is_checked_too():
    config = TrainingConfig()
    with pytest.raises(ValueError, match="no field 'num_epoch'; did you mean 'num_epochs'"):
        config.num_epoch = 1
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        config.batch_size = 0
    config.batch_size, config.learning_rate = 7.0, 1
    assert (config.batch_size, config.learning_rate) == (7, 1.0) and type(config.batch_size) is int
    again = copy.deepcopy(config), pickle.loads(pickle.dumps(config))
    assert again == (config, config)


def test_a_users_ratio_schedule_has_a_name(monkeypatch):
    monkeypatch.setitem(RATIO_SCHEDULES, "late", lambda start, final, progress, noise: start)
    assert TrainingConfig(text_mask_schedule="late", text_mask_final_ratio=0.5)
    assert TrainingConfig().text_mask_schedule == "constant"


def test_what_is_masked_by_default():
    """A random half of the patches is dropped in all epochs; no token is masked."""
    config = TrainingConfig()
    image = (config.image_mask, config.image_mask_ratio, config.image_mask_mode)
    text = (config.text_mask, config.text_mask_ratio, config.text_mask_mode)
    assert image == ("random", 0.5, "drop") and text == ("random", 0.0, "replace")
    assert config.image_mask_schedule == config.text_mask_schedule == "constant"
    assert config.image_mask_final_ratio is config.text_mask_final_ratio is None
    assert config.painted_mask is None and config.ema_momentum == 0.996


@pytest.mark.parametrize("schedule", ["linear", "cosine", "uniform"])
def test_a_schedule_takes_a_final_ratio(schedule):
    """0 is a ratio like any other, not a missing one."""
    options = dict(image_mask_schedule=schedule, text_mask_schedule=schedule)
    config = TrainingConfig(image_mask_final_ratio=0, text_mask_final_ratio=0.9, **options)
    assert (config.image_mask_final_ratio, config.text_mask_final_ratio) == (0, 0.9)
    assert TrainingConfig(text_mask_mode="80/10/10").text_mask_mode == "80/10/10"


@pytest.mark.parametrize(
    "painted",
    [
        [[0, 1, 0], [1, 1, 0]],
        np.array([[0, 255, 0], [7, 1, 0]], dtype=np.uint8),
        torch.tensor([[False, True, False], [True, True, False]]),
        ((0.0, 0.5, 0.0), (1.0, 1.0, 0.0)),
    ],
)
def test_a_painted_mask_becomes_plain_values(painted):
    """Any true value: the mask becomes rows of 0 and 1, which JSON keeps as they are."""
    config = TrainingConfig(image_mask="painted", painted_mask=painted)
    assert config.painted_mask == [[0, 1, 0], [1, 1, 0]]
    again = TrainingConfig(**json.loads(json.dumps(config.to_dict())))
    assert again == config


def test_to_dict_is_plain():
    config = TrainingConfig(schedule=math.sin)
    assert json.loads(json.dumps(config.to_dict()))["schedule"] == "function sin"


def test_neighbours_need_the_sigmoid_loss(make_config):
    with pytest.raises(ValueError, match="needs loss='sigmoid'"):
        make_config(exchange="neighbours")
    assert make_config(exchange="neighbours", loss="sigmoid").exchange == "neighbours"


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(mlm_weight=0.3), "mlm_weight=0.3 with text_mask_ratio=0 .*text_mask_ratio=0.3"),
        (dict(mim_weight=1, image_mask_ratio=0), "masks nothing, .*image_mask_ratio=0.75"),
        (dict(itm_weight=1.0), "itm_weight=1.0 needs cross_modal=True"),
        (dict(contrastive_weight=0), "nothing is learned: one of contrastive_weight, mim_"),
        (dict(mim_weight=-1), "mim_weight=-1 must be 0 or more"),
        (dict(cross_modal_ratio=0), r"cross_modal_ratio=0 must be in \(0, 1\]"),
        (dict(decoder_width=33), "decoder_width=33 must be a multiple of 32"),
        (dict(decoder_depth=0), "decoder_depth=0 must be at least 1"),
        (dict(pixel_error="mae"), "pixel_error='mae' is not a choice"),
        (dict(contrastive_view="whole"), "known: masked, unmasked"),
        (dict(mlm_schedule="risng"), "mlm_schedule='risng' is not known; did you mean 'ris"),
        (dict(mim_weight=1, image_mask="layers", image_mask_ratio=0), "masks nothing"),
        (dict(mim_weight=1, image_mask="painted", painted_mask=[[0, 0]]), "masks nothing"),
        (dict(contrastive_view="unmasked"), "would mask nothing"),
        (dict(cross_modal=True), "cross_modal=True needs a decoder"),
        (dict(term_gradients_every=0.5), "term_gradients_every=0.5 must be a whole number"),
    ],
)
def test_an_impossible_configuration_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**values)
