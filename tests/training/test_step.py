"""A step's gradient is that of the whole batch, in any micro-batches; then comes the update."""

import math

import pytest
import torch
import torch.nn.functional as F

import mmkit as mm
from mmkit import info_nce, sigmoid_loss
from mmkit.masking.plan import draw_maskings, mask_ratios
from mmkit.training.step import MAX_LOGIT_SCALE, Contrast, backward, naive_backward
from tests.conftest import shared
from tests.training.small_runs import changed, weights_of


@pytest.fixture(params=["info_nce", "sigmoid"])
def kind(request):
    return request.param


def encode_with(model, modes=("drop", "replace"), schedule="constant"):
    """A masked forward pass whose masks are a pure function of the batch, as in the trainer."""

    def encode(batch):
        ratio = mask_ratios(schedule, 0.4, 0.7, 0.0, batch.sample_ids, seed=0, epoch=0)
        masks = draw_maskings(
            batch,
            model.token_info,
            seed=0,
            epoch=0,
            image=("random", ratio),
            text=("random", ratio),
            text_mode=modes[1],
        )
        return model(batch, *masks, *modes)

    return encode


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative_error(ours, reference):
    assert ours.keys() == reference.keys()
    flat = [torch.cat([g[name].flatten() for name in sorted(reference)]) for g in (ours, reference)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def whole_batch_loss(model, out, batch, kind):
    features, scale = (out.image_features, out.text_features), out.logit_scale.exp()
    partners = batch.correct()  # the whole matrix
    if kind == "info_nce":
        return info_nce(*features, scale, partners)
    return sigmoid_loss(*features, scale, out.logit_bias, partners)


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 23])
def test_accumulated_gradient_is_the_gradient_of_the_big_batch(make_model, make_data, kind, parts):
    """With masks on, an uneven last micro-batch and partners; logit_scale included."""
    model, batch = make_model().train(), shared(make_data(23).batch(range(23)))
    encode = encode_with(model)
    expected = whole_batch_loss(model, encode(batch), batch, kind)
    expected.backward()
    reference = gradients(model)
    reference.setdefault("logit_bias", torch.zeros(()))
    model.zero_grad()

    scale = (model.logit_scale, model.logit_bias)
    loss = backward(encode, batch.split(parts), scale, Contrast(kind))
    torch.testing.assert_close(loss, expected.detach())
    ours = gradients(model)
    assert relative_error(ours, reference) < 1e-5
    torch.testing.assert_close(ours["logit_scale"], reference["logit_scale"])


@pytest.mark.parametrize("modes", [("drop", "drop"), ("replace", "80/10/10")])
def test_micro_batches_of_other_widths_give_the_same_gradient(make_model, make_data, kind, modes):
    """With a ratio per sample each micro-batch is padded to its own longest row."""
    model, batch = make_model().train(), make_data(23).batch(range(23))
    encode, scale = encode_with(model, modes, "uniform"), (model.logit_scale, model.logit_bias)
    if modes[0] == "drop":
        widths = [encode(part).image_tokens.shape[1] for part in batch.split(5)]
        assert len(set(widths)) > 1
    backward(encode, [batch], scale, Contrast(kind))
    reference = gradients(model)
    model.zero_grad()
    backward(encode, batch.split(5), scale, Contrast(kind))
    assert relative_error(gradients(model), reference) < 1e-5


def test_dropout_is_replayed(make_model, make_data, kind):
    """Equal to keeping every micro-batch's graph under the same draws."""
    model, batch = make_model(dropout=0.3).train(), shared(make_data(23).batch(range(23)))
    encode, parts = encode_with(model), batch.split(4)
    torch.manual_seed(7)
    outputs = [encode(part) for part in parts]
    image = torch.cat([o.image_features for o in outputs])
    text = torch.cat([o.text_features for o in outputs])
    joined = type(outputs[0])(image, text, None, None, model.logit_scale, model.logit_bias)
    whole_batch_loss(model, joined, batch, kind).backward()
    reference = gradients(model)
    reference.setdefault("logit_bias", torch.zeros(()))
    model.zero_grad()

    torch.manual_seed(7)
    backward(encode, parts, (model.logit_scale, model.logit_bias), Contrast(kind))
    assert relative_error(gradients(model), reference) < 1e-5


def test_naive_accumulation_is_another_gradient(make_model, make_data):
    """Micro-batches that lose their negatives give another direction."""
    model, batch = make_model().train(), make_data(23).batch(range(23))
    encode, scale = encode_with(model), (model.logit_scale, model.logit_bias)
    backward(encode, [batch], scale, Contrast())
    reference = torch.cat([g.flatten() for g in gradients(model).values()])
    model.zero_grad()
    naive_backward(encode, batch.split(4), scale, Contrast())
    naive = torch.cat([g.flatten() for g in gradients(model).values()])
    assert F.cosine_similarity(naive, reference, dim=0) < 0.95


def test_memory_grows_with_the_micro_batch(make_model, make_data):
    """While features are collected, only the graph of the last micro-batch is kept."""
    model, batch = make_model().train(), make_data(23).batch(range(23))
    graphs = []

    def encode(part):
        out = encode_with(model)(part)
        graphs.append(out.image_features.requires_grad)
        return out

    backward(encode, batch.split(3), (model.logit_scale, model.logit_bias), Contrast())
    assert graphs == [False, False, True, True, True]


def test_the_scale_is_clamped_in_the_parameter_and_still_learns(make_config, make_model, make_data):
    trainer = mm.MaskedMultimodalTrainer(
        make_config(warmup_steps=0), make_data(53), None, make_model()
    )
    with torch.no_grad():
        trainer.model.logit_scale.fill_(7.0)
    batch = trainer.first_batch()
    trainer.train_step(batch, 0)
    assert trainer.model.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)
    trainer.gradients(batch, 0)
    assert trainer.model.logit_scale.grad.abs() > 0


def test_gradients_are_clipped_and_bad_steps_skipped(make_config, make_model, make_data):
    """A step without a finite gradient changes nothing; too many stop the run with a message."""
    trainer = mm.MaskedMultimodalTrainer(
        make_config(max_grad_norm=0.01, optimizer="adamw"), make_data(53), None, make_model()
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


def test_fp16_with_both_towers_frozen_trains_the_rest(make_trainer):
    """An optimizer without a gradient is left out, also by the scaler."""
    values = dict(frozen_image_epochs=1, frozen_text_epochs=1, mixed_precision="fp16")
    trainer = make_trainer(num_epochs=1, warmup_steps=0, **values)
    before = weights_of(trainer.model)
    trainer.fit()
    assert "image_projection.2.weight" in changed(before, trainer.model)
