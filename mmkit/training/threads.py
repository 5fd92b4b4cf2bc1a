"""Parts of a batch computed at the same time, each by a thread of its own with its share of cores.

On a CPU the products of a small transformer are too small to be cut among the cores: all threads
wait for the slowest after every single one, and long where another program keeps a core busy. What
it brings: python -m tests.benchmarks.step_speed --peers mmkit serial.
Walk-through: notebooks/09_speed.ipynb.
"""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MOST_AT_ONCE = 4  # Python prepares the work of all of them one after the other
Item = TypeVar("Item")
Result = TypeVar("Result")


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="mmkit")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of its parent's threads


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """[function(item) for each item], all at the same time; raises what one of them raises.

    Each has an equal share of torch's threads, and gradients where the caller has. The functions
    must not draw random numbers: threads share a generator and take from it as they come.
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
