"""The time of a step is divided among the kinds of work that took it."""

import time

import pytest
import torch

from mmkit import cost
from mmkit.cost.profile import by_kind


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
