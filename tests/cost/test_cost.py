"""The cost of a step is predicted: operations, bytes, and time from measured rates."""

import dataclasses
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mmkit as mm
from mmkit import cost
from mmkit.cost.memory import Numbers, kept_by_pair
from mmkit.cost.profile import by_kind
from mmkit.models.layers import _places
from mmkit.training.summary import effective_configuration


@pytest.fixture
def trainer_of(make_model, make_data, tmp_path):
    """A trainer whose only batch has 23 pairs (or as given), with a small encoder."""

    def make(count=23, **settings):
        config = mm.TrainingConfig(
            **dict(batch_size=count, mixed_precision="no", output_dir=str(tmp_path)) | settings
        )
        return mm.MaskedMultimodalTrainer(config, make_data(count), None, make_model())

    return make


def counted(trainer) -> int:
    """Operations of a whole training step as torch counts them, product by product."""
    batch, threads = trainer.first_batch(), torch.get_num_threads()
    torch.set_num_threads(1)  # the counter sees only its own thread
    try:
        with FlopCounterMode(display=False) as counter:
            trainer.train_step(batch, 0)
    finally:
        torch.set_num_threads(threads)
    return counter.get_total_flops()


# ---- operations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
def test_operations_are_those_that_torch_counts(trainer_of, ratio, micro_batches):
    """Nothing, half and most masked; all micro-batches but the last go forward twice."""
    trainer = trainer_of(image_mask_ratio=ratio, gradient_accumulation_steps=micro_batches)
    expected = counted(trainer)
    prediction = cost.predict_batch(trainer, trainer.first_batch())
    assert prediction.flops == pytest.approx(expected, rel=1e-6 if micro_batches == 1 else 0.02)


@pytest.mark.parametrize(
    ("settings", "within"),
    [
        (dict(loss="sigmoid"), 1e-6),
        (dict(optimizer="adamw"), 1e-6),
        (dict(accumulation="naive", gradient_accumulation_steps=3), 1e-4),
        (dict(image_mask_mode="replace"), 1e-6),
        (
            dict(text_mask_ratio=0.3, text_mask_mode="drop"),
            0.02,
        ),  # masked tokens are rounded
        (dict(image_mask="attentive"), 0.04),  # 9 patches have no half resolution
        (dict(gradient_checkpointing=True), 0.02),
        (dict(mim_weight=1.0, cross_modal=True), 0.02),
        (dict(text_mask_ratio=0.3, mlm_weight=1.0), 0.04),
        (dict(mim_weight=1.0, contrastive_view="unmasked"), 0.02),
    ],
    ids=str,
)
def test_operations_of_every_kind_of_step(trainer_of, settings, within):
    trainer = trainer_of(**settings)
    expected = counted(trainer)
    prediction = cost.predict_batch(trainer, trainer.first_batch())
    assert prediction.flops == pytest.approx(expected, rel=within)


def test_a_run_says_the_same_operations_as_are_predicted(trainer_of):
    """The printed number leaves out the logits and the optimizer, and nothing else."""
    trainer = trainer_of(gradient_accumulation_steps=3)
    said = 1e9 * effective_configuration(trainer)["gflop_per_pair"]
    prediction = cost.predict_batch(trainer, trainer.first_batch())
    logits = cost.logit_flops(trainer.config, 13, 23, again=False)
    assert prediction.flops_per_pair == pytest.approx(said + logits)


# ---- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("ratio", [0.0, 0.75])
def test_kept_bytes_are_those_that_autograd_keeps(trainer_of, ratio, precision):
    """Compared with all storages that the graph of a forward pass saves, without weights."""
    trainer = trainer_of(61, image_mask_ratio=ratio, mixed_precision=precision)
    batch, found, held = trainer.first_batch(), {}, []
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights and x.ndim and x.shape[0] >= 61:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            held.append(x)  # or its memory is used for another tensor
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        trainer.encode(batch, trainer.maskings(batch, 0))
    rows = len(_places(batch.valid)[1])  # valid tokens, rounded up to a whole number of rows
    words, longest = rows / 61, batch.valid.shape[1]
    patches = max(1, round(9 * (1 - ratio)))
    numbers = Numbers(2 if precision == "bf16" else 4, cpu=True)
    kept = kept_by_pair(
        trainer.config, trainer.model, (patches, words), (9, words), longest, numbers, 0.0
    )
    assert 61 * kept == pytest.approx(sum(found.values()), rel=0.08)


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


# ---- presets, errors -----------------------------------------------------------------------------


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


# ---- time ----------------------------------------------------------------------------------------


def predictions():
    """Of nine steps: each ratio with each batch."""
    return [
        cost.predict(
            mm.TrainingConfig(batch_size=size, image_mask_ratio=ratio, mixed_precision="no"),
            "tiny",
            caption_length=11,
        )
        for ratio in (0.0, 0.5, 0.75)
        for size in (17, 41, 97)
    ]


def test_rates_that_made_the_times_are_found():
    found = predictions()
    rates = cost.Rates(0.03, 0.004, 0.05)
    fitted = cost.fit_rates(found, [p.time(rates) for p in found])
    for name in ("seconds_per_step", "seconds_per_gflop", "seconds_per_gigabyte"):
        assert getattr(fitted, name) == pytest.approx(getattr(rates, name), rel=1e-3)
    assert fitted.seconds_per_exchanged_gigabyte == 0
    assert rates.gflop_per_second == pytest.approx(250)


def test_no_rate_is_below_zero_and_too_few_times_are_refused():
    """If times FALL with the bytes moved, that rate is left out and the others are fitted."""
    found = predictions()
    times = [p.time(cost.Rates(0.5, 0.004, -0.02)) for p in found]
    assert min(times) > 0
    fitted = cost.fit_rates(found, times)
    assert min(dataclasses.astuple(fitted)) >= 0
    with pytest.raises(ValueError, match="at least 6"):
        cost.fit_rates(found[:5], times[:5])
    with pytest.raises(ValueError, match="cannot be fitted"):
        cost.fit_rates(found, times[:7])


def test_measured_rates_leave_the_run_as_it_was(trainer_of):
    trainer = trainer_of(image_mask_ratio=0.5, image_mask="grid")
    before = trainer.config.to_dict()
    rates = cost.measure_rates(trainer, rounds=1)
    assert trainer.config.to_dict() == before
    assert max(dataclasses.astuple(rates)) > 0
    batch = trainer.first_batch()
    assert 0.0001 < cost.predict_batch(trainer, batch, rates).seconds < 5
    with pytest.raises(ValueError, match="29 is more than the 23"):
        cost.measure_rates(trainer, batches=[29])
    assert trainer.config.to_dict() == before


def test_crossover_is_where_hiding_begins_to_pay():
    """One patch less is too small; where only the number of steps costs, it never pays."""
    config, rates = mm.TrainingConfig(image_mask_ratio=0.5), cost.Rates(0.05, 0.004, 0.0)
    side = cost.crossover(config, "tiny", rates, caption_length=11, gain=1.5)
    assert side is not None and side % 8 == 0

    def gain(image_size, **changed):
        times = [
            cost.predict(
                dataclasses.replace(config, image_mask_ratio=ratio, **changed),
                "tiny",
                caption_length=11,
                rates=rates,
                image_size=image_size,
            ).seconds
            for ratio in (0.0, 0.5)
        ]
        return times[0] / times[1]

    assert gain(side) >= 1.5 > gain(side - 8)
    dearer = cost.crossover(config, "tiny", rates, caption_length=11, gain=1.8)
    assert dearer is not None and dearer > side
    replaced = dataclasses.replace(config, image_mask_mode="replace")
    given = dict(caption_length=11, gain=1.1, largest=96)
    assert cost.crossover(replaced, "tiny", rates, **given) is None
    with pytest.raises(ValueError, match="above 1"):
        cost.crossover(config, "tiny", rates, caption_length=11, gain=1.0)
    with pytest.raises(ValueError, match="mim_weight=0"):
        back = dataclasses.replace(config, mim_weight=1.0)
        cost.crossover(back, "tiny", rates, caption_length=11, gain=1.5)


# ---- where the time goes -------------------------------------------------------------------------


def test_the_longest_part_of_a_step_is_what_took_the_time(trainer_of, monkeypatch):
    """A slow optimizer counts as optimizer; waits between operations count as the rest."""

    class Slow(torch.optim.SGD):
        def step(self, closure=None):
            time.sleep(0.5)
            return super().step(closure)

    threads = torch.get_num_threads()
    trainer = trainer_of(optimizer=lambda groups: Slow(groups, lr=0.1))
    parts = cost.step_parts(trainer, rounds=1)
    assert torch.get_num_threads() == threads
    assert parts["optimizer"] >= 0.5 and max(parts, key=parts.__getitem__) == "optimizer"
    assert all(seconds > 0 for seconds in parts.values())
    encode = trainer.encode

    def waiting(*words):
        time.sleep(1)
        return encode(*words)

    monkeypatch.setattr(trainer, "encode", waiting)
    parts = cost.step_parts(trainer, rounds=1)
    assert parts["Python, waits"] >= 1 and max(parts, key=parts.__getitem__) == "Python, waits"


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (lambda x: x @ x, "matrix products"),
        (lambda x: torch.nn.functional.linear(x, x, x[0]), "matrix products"),
        (lambda x: torch.bmm(x[None], x[None]), "attention"),
        (lambda x: x.softmax(-1), "attention"),
        (torch.nn.functional.gelu, "GELU"),
        (lambda x: torch.nn.functional.layer_norm(x, (331,)), "layer norms"),
        (torch.clone, "copies, casts"),
        (lambda x: x.bfloat16(), "copies, casts"),
        (lambda x: x + x, "sums, products"),
    ],
)
def test_operations_are_of_their_kind(work, kind):
    x = torch.randn(331, 331)
    with torch.autograd.profiler.profile(use_kineto=False) as profiler:
        work(x)
    parts = by_kind(profiler.function_events, "cpu", seconds=0.0)
    assert max(parts, key=parts.__getitem__) == kind
