"""Parts of a batch computed in parallel, each by a thread of its own on some of the cores.

On a CPU the matrix products of a small transformer are too small to be divided among the cores:
after each product all threads wait for the slowest, and longer where another program keeps a core
busy. The gain is measured by: python -m tests.benchmarks.step_speed --peers mmkit serial.
Walk-through: notebooks/09_speed.ipynb.
"""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..models.layers import draws_dropout

MOST_AT_ONCE = 4  # Python prepares the work of all threads one after the other
SMALLEST_PART = 16  # pairs: with fewer, preparing the work takes longer than the work itself
Item = TypeVar("Item")
Result = TypeVar("Result")


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="mmkit")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child does not inherit threads


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Apply a function to all items in parallel, each in a thread of its own.

    Each thread gets an equal part of torch's threads and the caller's gradient mode. An error of
    one call is raised here.

    Args:
        function: of one item; it must not draw random numbers, since all threads draw from one
            generator in no fixed order.
        items: one or more.
    Returns:
        [function(item) for item in items].
    """
    if len(items) < 2:
        return [function(item) for item in items]
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()

    def run(item: Item) -> Result:
        torch.set_num_threads(max(1, threads // len(items)))  # of this thread
        with torch.set_grad_enabled(grad):
            return function(item)

    try:
        return list(_threads(len(items)).map(run, items))
    finally:
        torch.set_num_threads(threads)


def add_gradients(losses: list[Tensor], parameters: Sequence[nn.Parameter]):
    """Add the gradients of these losses to the parameters, always in the same order."""
    if len(losses) == 1:
        return losses[0].backward()
    if len(losses) == 2 and all(parameter.grad is None for parameter in parameters):
        side_by_side(torch.Tensor.backward, losses)  # a + b is b + a, to the bit
        return None
    each = side_by_side(
        lambda loss: torch.autograd.grad(loss, parameters, allow_unused=True), losses
    )
    for parameter, *gradients in zip(parameters, *each, strict=True):
        found = [gradient for gradient in (parameter.grad, *gradients) if gradient is not None]
        if len(found) > 1:  # a new tensor: autograd may give one to two parameters
            parameter.grad = functools.reduce(torch.Tensor.add_, found[2:], found[0] + found[1])
        elif found and parameter.grad is None:
            parameter.grad = found[0].clone()


def parts_at_once(trainer, size: int) -> int:
    """The number of parallel parts into which a micro-batch of `size` pairs is cut.

    1 unless a CPU has several threads for one process and nothing is drawn in the forward
    pass; compiled layers, and matching, which compares within a micro-batch, need it whole.
    """
    config = trainer.config
    if (
        trainer.device.type != "cpu"
        or trainer.net
        is not trainer.model  # DDP expects one backward pass, whatever the world size
        or config.compile
        or config.accumulation != "exact"
        or "itm" in config.terms
        or draws_dropout(trainer.model)
    ):
        return 1
    return max(1, min(MOST_AT_ONCE, torch.get_num_threads(), size // SMALLEST_PART))
