"""Small runs that several files of tests train, stop and resume."""

import functools

import pytest

import mmkit as mm
from tests.train_small import DEFAULTS


@pytest.fixture
def make_short_run(tmp_path, make_model, make_data):
    """f(...) builds a trainer of a run of six steps, three an epoch."""

    def build(data=None, val=None, model=None, resume=False, callbacks=(), **values):
        values = dict(output_dir=str(tmp_path), run_name="run", num_epochs=2) | values
        config = mm.TrainingConfig(**DEFAULTS | dict(warmup_steps=2) | values)
        data, model = data or make_data(23), model or make_model()
        return mm.MaskedMultimodalTrainer(config, data, val, model, resume, callbacks)

    return build


@pytest.fixture
def stopped(tmp_path, make_model, make_data):
    """f(...) builds a trainer; a run that stopped at step 6 of 16 can be resumed."""

    def make(data=None, val="usual", model=None, resume=True, callbacks=(), **values):
        values = dict(output_dir=str(tmp_path), run_name="run", max_steps=16) | values
        config = mm.TrainingConfig(**DEFAULTS | dict(warmup_steps=2, log_every=3) | values)
        data = make_data(23) if data is None else data
        val = make_data(7, seed=1) if isinstance(val, str) else val
        model = make_model() if model is None else model
        return mm.MaskedMultimodalTrainer(config, data, val, model, resume, callbacks)

    def run(**how):
        stop = [lambda trainer, record: trainer.stop() if record["step"] == 6 else None]
        trainer = make(resume=False, callbacks=stop, **how)
        trainer.fit()
        assert trainer.step == 6
        return make

    return run


@pytest.fixture
def make_fp16_trainer(make_trainer):
    """f(...) builds a trainer of 20 steps with a loss scale and a running mean."""
    fp16 = dict(mixed_precision="fp16", image_mask="attentive", num_epochs=4)
    return functools.partial(make_trainer, **fp16)
