"""The EMA is a running mean that never trains."""

import copy

import pytest
import torch

from mmkit.models.attention import class_attention
from mmkit.models.ema import EMA
from tests.models.vits import make_vit


def step(vit, seed):
    """Change the weights, as an optimizer step does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996])
def test_the_running_mean_equals_a_slow_loop(momentum):
    """m x mean + (1 - m) x weights, with m = min(momentum, (1 + step) / (10 + step))."""
    vit = make_vit()
    mean = EMA(vit, momentum)
    slow = [parameter.detach().double().clone() for parameter in vit.parameters()]
    for number in range(17):
        step(vit, number)
        mean.update(vit)
        m = min(momentum, (1 + number) / (10 + number))
        slow = [
            m * old + (1 - m) * new.detach().double()
            for old, new in zip(slow, vit.parameters(), strict=True)
        ]
    for ours, expected in zip(mean.module.parameters(), slow, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    assert mean.steps == 17
    if momentum == 0:  # no memory at all
        assert torch.equal(
            class_attention(mean.module, torch.ones(1, 3, 15, 20)),
            class_attention(vit, torch.ones(1, 3, 15, 20)),
        )


def test_the_running_mean_is_a_copy_that_never_trains():
    """It has no gradient, no dropout and no shared memory, and leaves the model as it was."""
    vit = make_vit(dropout=0.3).train()
    before = copy.deepcopy(vit.state_dict())
    mean = EMA(vit, 0.9)
    assert not any(parameter.requires_grad for parameter in mean.module.parameters())
    assert not any(module.training for module in mean.module.modules())
    step(mean.module, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    mean.update(vit)
    assert vit.training and all(parameter.requires_grad for parameter in vit.parameters())
    assert all(parameter.grad is None for parameter in mean.module.parameters())
    vit(torch.randn(2, 3, 15, 20)).last_hidden_state.sum().backward()
    mean.update(vit)
    assert not any(parameter.requires_grad for parameter in mean.module.parameters())


def test_a_saved_running_mean_continues_as_if_it_had_never_stopped(tmp_path):
    """Weights and momentum schedule come back from a file without code."""
    vit = make_vit()
    mean = EMA(vit, 0.996)
    for number in range(5):
        step(vit, number)
        mean.update(vit)
    torch.save(mean.state_dict(), tmp_path / "mean.pth")
    other = EMA(make_vit(seed=1), 0.996)
    other.load_state_dict(torch.load(tmp_path / "mean.pth", weights_only=True))
    for number in range(5, 8):
        step(vit, number)
        mean.update(vit)
        other.update(vit)
    assert mean.steps == other.steps == 8
    for ours, theirs in zip(mean.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not any(parameter.requires_grad for parameter in other.module.parameters())
