"""Muon takes the steps of torch.optim.Muon; each parameter has its rate and decay, or is frozen."""

import pytest
import torch

import mmkit as mm
from mmkit.training.optim import (
    Muon,
    build_optimizers,
    freeze,
    layer_multiplier,
    orthogonalize,
    parameter_groups,
    unfreeze,
)
from tests.training.small_runs import changed, weights_of

SHAPES = [(23, 23)] * 3 + [(46, 11)] * 2 + [(11, 46)] * 2 + [(7, 29)]


def weights():
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_torch(decay):
    """Several shapes, two groups of different rates, one matrix temporarily without a gradient."""
    ours, theirs = weights(), weights()
    optimizers = [
        kind([{"params": w[:4]}, {"params": w[4:], "lr": 0.03}], lr=0.01, weight_decay=decay)
        for kind, w in ((Muon, ours), (torch.optim.Muon, theirs))
    ]
    for step in range(5):
        draw = torch.Generator().manual_seed(step)
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(a.shape, generator=draw)
            missing = number == 1 and step < 2
            a.grad, b.grad = (None, None) if missing else (gradient, gradient.clone())
        for optimizer in optimizers:
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            # torch's always multiplies in bfloat16, ours in float32 where that is faster
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    state = optimizers[0].state_dict()["state"]
    assert {*state[0]} == {"momentum_buffer"} and len(state) == len(SHAPES)
    optimizers[0].load_state_dict(optimizers[1].state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(17, 17), (13, 37), (37, 13)])
def test_matrices_become_nearly_orthogonal_each_by_itself(shape, dtype):
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    stack[1] *= 1e-3  # its norm has no effect
    found = orthogonalize(stack, dtype=dtype)
    assert found.dtype == dtype and found.shape == stack.shape
    for matrix, before in zip(found.float(), stack, strict=True):
        values = torch.linalg.svdvals(matrix)
        assert 0.4 < values.min() and values.max() < 1.4
        left, _, right = torch.linalg.svd(before, full_matrices=False)
        assert (matrix * (left @ right)).sum() / (matrix.norm() * (left @ right).norm()) > 0.95
    alone = torch.stack([orthogonalize(matrix[None], dtype=dtype)[0] for matrix in stack])
    torch.testing.assert_close(found, alone, rtol=0.02, atol=0.02)


# -- frozen towers -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind, tower", [("image", "vit."), ("text", "bert.")])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_frozen_tower_stays_as_it_is_and_learns_afterwards(make_trainer, kind, tower, optimizer):
    """No gradient, decay or dropout; projections and the other tower learn; then it is unfrozen."""
    values = {f"frozen_{kind}_epochs": 1, "optimizer": optimizer, "dropout": 0.2}
    trainer = make_trainer(num_epochs=2, warmup_steps=0, text_mask_mode="replace", **values)
    before, seen = weights_of(trainer.model), []

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
    before = weights_of(model)
    trainer.fit()
    assert not any(name.startswith("bert.embeddings") for name in changed(before, model))


def test_a_model_frozen_in_one_run_learns_in_the_next(make_trainer, make_model):
    model = make_model()
    make_trainer(model, num_epochs=1, frozen_image_epochs=1, run_name="first").fit()
    before = weights_of(model)
    second = dict(num_epochs=2, frozen_image_epochs=1, warmup_steps=0, run_name="second")
    make_trainer(model, **second).fit()
    assert any(name.startswith("vit.layers") for name in changed(before, model))


# -- rates and decays ------------------------------------------------------------------------


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


def test_parameters_stand_in_the_right_group(make_model, make_config):
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
    muon, adamw = build_optimizers(model, make_config())
    assert muon.param_groups[0]["lr"] == pytest.approx(3 * 5e-3)
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.1, 0.0]
    (only,) = build_optimizers(model, make_config(optimizer="adamw"))
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
