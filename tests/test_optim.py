"""Muon in batches takes torch.optim.Muon's steps."""

import pytest
import torch

from mmkit.optim import Muon, orthogonalize

SHAPES = [(23, 23)] * 3 + [(46, 11)] * 2 + [(11, 46)] * 2 + [(7, 29)]


def weights():
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_torch(decay):
    """Several shapes, two groups of other rates, one matrix without a gradient for a while."""
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
    stack[1] *= 1e-3  # its size plays no part
    found = orthogonalize(stack, dtype=dtype)
    assert found.dtype == dtype and found.shape == stack.shape
    for matrix, before in zip(found.float(), stack, strict=True):
        values = torch.linalg.svdvals(matrix)
        assert 0.4 < values.min() and values.max() < 1.4
        left, _, right = torch.linalg.svd(before, full_matrices=False)
        assert (matrix * (left @ right)).sum() / (matrix.norm() * (left @ right).norm()) > 0.95
    alone = torch.stack([orthogonalize(matrix[None], dtype=dtype)[0] for matrix in stack])
    torch.testing.assert_close(found, alone, rtol=0.02, atol=0.02)
