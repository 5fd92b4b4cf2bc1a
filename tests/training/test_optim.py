"""Batched Muon takes the steps of torch.optim.Muon."""

import math

import pytest
import torch

import mmkit as mm
from mmkit.training.optim import Muon, build_optimizers, orthogonalize, parameter_groups

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


# -- the caller's own optimizer ----------------------------------------------------------------


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
