"""A user's own optimizer is checked, and its own rates and decays hold."""

import json
import math

import pytest
import torch

import mmkit as mm
from mmkit.training.optim import build_optimizers, parameter_groups
from tests.train_small import QUICK
from tests.training.small_runs import weights_of


def rates_and_decays(make_model, build, **values):
    """{role: (peak learning rate, weight decay)} of the caller's optimizer."""
    model = make_model()
    config = mm.TrainingConfig(optimizer=build, learning_rate=5e-3, weight_decay=0.1, **values)
    (optimizer,) = build_optimizers(model, config)
    found = {
        id(p): (group["peak_lr"], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    roles = {}
    for role, parameters in parameter_groups(model).items():
        (one,) = {found[id(p)] for p in parameters.values()}
        assert one[0] == one[1]
        roles["decayed" if role == "matrices" else role] = (one[0], one[2])
    return roles


SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


@pytest.mark.parametrize(
    "build, decayed, plain",
    [
        (lambda g: SGD(g), (5e-3, 0.1), (5e-3, 0.0)),
        (lambda g: SGD(g, momentum=0.7), (5e-3, 0.1), (5e-3, 0.0)),
        (lambda g: SGD(g, lr=g[0]["lr"]), (5e-3, 0.1), (5e-3, 0.0)),
        (lambda g: SGD(g, lr=0.1, weight_decay=0.0), (0.1, 0.0), (0.1, 0.0)),
        (lambda g: SGD(g, lr=0.1, weight_decay=0.3), (0.1, 0.3), (0.1, 0.0)),
        (lambda g: SGD(g, lr=0.0), (0.0, 0.0), (0.0, 0.0)),
        (lambda g: AdamW(g, weight_decay=0.0), (5e-3, 0.0), (5e-3, 0.0)),
        (lambda g: AdamW(g, weight_decay=0.3), (5e-3, 0.3), (5e-3, 0.0)),
        (lambda g: AdamW(g, lr=0.1, weight_decay=0.3), (0.1, 0.3), (0.1, 0.0)),
        (lambda g: SGD([{**x, "lr": 0.07} for x in g]), (0.07, 0.1), (0.07, 0.0)),
        (lambda g: SGD([{"params": x["params"]} for x in g], lr=0.1), (0.1, 0.0), (0.1, 0.0)),
    ],
)
def test_what_the_caller_gives_his_optimizer_holds(make_model, build, decayed, plain):
    """Values in the constructor or in the groups; the others are the configuration's."""
    assert rates_and_decays(make_model, build) == {"decayed": decayed, "plain": plain}


def test_layer_decay_scales_the_callers_own_rate(make_model):
    config = mm.TrainingConfig(optimizer=lambda g: SGD(g, lr=0.1), layer_decay=0.5)
    (optimizer,) = build_optimizers(make_model(), config)
    rates = sorted({group["peak_lr"] for group in optimizer.param_groups}, reverse=True)
    assert rates == pytest.approx([0.1, 0.05, 0.025, 0.0125])


def test_an_optimizer_that_wants_a_closure_is_refused(make_model):
    config = mm.TrainingConfig(optimizer=lambda groups: torch.optim.LBFGS(params(groups)))
    with pytest.raises(ValueError, match="LBFGS recomputes the loss in each step"):
        build_optimizers(make_model(), config)


def params(groups):
    return [p for group in groups for p in group["params"]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_rate_that_is_no_number_is_refused(make_model, value):
    config = mm.TrainingConfig(optimizer=lambda g: SGD([{**x, "lr": value} for x in g]))
    with pytest.raises(ValueError, match="must be finite and at least 0"):
        build_optimizers(make_model(), config)


def test_an_optimizer_and_a_schedule_may_be_functions(make_trainer, make_config):
    """Plain SGD from a function takes exactly the step computed by hand."""
    trainer = make_trainer(
        optimizer=lambda groups: torch.optim.SGD(groups),
        schedule=lambda progress: 1 - progress**2,
        warmup_steps=2, weight_decay=0.1, max_grad_norm=0.0,
    )  # fmt: skip
    batch = trainer.first_batch()
    before = weights_of(trainer.model)
    trainer.gradients(batch, 0)
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    trainer.train_step(batch, 0)
    rate = 0.5 * QUICK["learning_rate"]  # the first of two warmup steps
    for name in ("vit.layers.0.attention.q_proj.weight", "text_projection.2.weight"):
        wanted = before[name] - rate * (grads[name] + 0.1 * before[name])
        torch.testing.assert_close(dict(trainer.model.named_parameters())[name].detach(), wanted)
    assert trainer.config.lr_fraction(5, 8) == pytest.approx(0.02 + 0.98 * (1 - (3 / 5) ** 2))
    assert "function" in trainer.config.to_dict()["optimizer"]
    json.dumps(trainer.config.to_dict())
    with pytest.raises(ValueError, match=r"returned a list; it must return a torch\.optim"):
        make_trainer(optimizer=lambda groups: groups)
    with pytest.raises(ValueError, match=r"left out \d+ of \d+ weights"):
        make_trainer(optimizer=lambda groups: torch.optim.SGD(groups[:1]))
