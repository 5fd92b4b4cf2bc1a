"""Calls that all processes make: waited for, and refused in words where one of them does not.

Walk-through: notebooks/06_many_processes.ipynb.
"""

import atexit
import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator

import torch.distributed as dist

from .distributed import rank_and_world_size

_SAID, _LIMIT = 30.0, 1800.0  # seconds of waiting: when it is said, and when it ends
_calls = 0  # how many calls this process has announced
_sure = False  # within a call that is known to be made by all


@contextlib.contextmanager
def joint(what: str) -> Iterator[None]:
    """A call that all processes must make, for they share its work; also as a decorator.

    Raises RuntimeError in all of them where one is in another call, or has ended: what they wait
    for would never come. Calls within this one are not checked.
    """
    global _sure
    if not _sure:
        meet(what)
    before, _sure = _sure, True
    try:
        yield
    finally:
        _sure = before


@contextlib.contextmanager
def each_alone() -> Iterator[None]:
    """Within a joint call: what here is done (callbacks) may be another thing in each process."""
    global _sure
    before, _sure = _sure, False
    try:
        yield
    finally:
        _sure = before


def meet(what: str) -> None:
    """Wait until all processes are at this call; RuntimeError where one is at another."""
    rank, processes = rank_and_world_size()
    if processes == 1:
        return
    missing = [other for other in range(processes) if other != rank]
    started, pause, said = time.monotonic(), 1e-4, False
    _announce(what)
    while missing:
        for other in [*missing]:
            theirs = _announced(other)
            if theirs is not None and theirs != what:
                raise RuntimeError(
                    f"process {rank} of {processes} is in {what}, process {other} is in {theirs}: "
                    "what all processes share in must be called by each of them (a callback runs "
                    "in all), not by one alone, as under `if trainer.rank == 0`"
                )
            if theirs is not None:
                missing.remove(other)
        waited = time.monotonic() - started
        words = f"process {rank} has waited {waited:.0f} s in {what} for process {missing}"
        if waited > _LIMIT:
            raise RuntimeError(f"{words}; all processes must make this call")
        if waited > _SAID and not said:
            print(f"{words}, which has not called it yet", file=sys.stderr, flush=True)
            said = True
        if missing:
            time.sleep(pause)
            pause = min(2 * pause, 0.02)


def depart() -> None:
    """Let who waits for this process know that it has ended."""
    with contextlib.suppress(Exception):
        if rank_and_world_size()[1] > 1:
            _announce("no call: it has ended")


@functools.cache
def _depart_at_exit() -> None:
    process = os.getpid()  # a worker that it forks ends without ending it
    atexit.register(lambda: depart() if os.getpid() == process else None)


def _announce(what: str) -> None:
    global _calls
    _depart_at_exit()
    _calls += 1
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    store.set(f"mmkit/{_calls}/{rank}", what)
    if _calls > 2:  # whoever is at the call before this one has read it
        store.delete_key(f"mmkit/{_calls - 2}/{rank}")


def _announced(rank: int) -> str | None:
    """The call that a process is in; None where it has not come to its next one yet."""
    store, key = dist.distributed_c10d._get_default_store(), f"mmkit/{_calls}/{rank}"
    try:
        return store.get(key).decode() if store.check([key]) else None
    except RuntimeError:  # the store went with the process that kept it
        return "no call: it has ended, or the one that all meet by"


@joint("leave_group")
def leave_group() -> bool:
    """End this process's part in a run of several; True where it is the one that goes on (rank 0).

    What follows is then one process's work: no rank waits for another that has gone home.
    """
    rank, processes = rank_and_world_size()
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    return rank == 0
