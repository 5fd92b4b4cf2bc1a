"""Calls that all processes must make: they wait for each other, and a missing call is an error.

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

SAID, LIMIT = 30.0, 1800.0  # seconds of waiting until a message is printed, until an error
_calls = 0  # how many calls this process has announced
_sure = False  # inside a call that all processes are known to make


@contextlib.contextmanager
def joint(what: str) -> Iterator[None]:
    """A call that all processes must make because they share its work; also a decorator.

    Raises RuntimeError in all processes if one of them is in another call or has ended, since the
    others would wait for it for ever. Calls within this one are not checked.
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
    """Within a joint call: a part (callbacks) in which the processes may do different things."""
    global _sure
    before, _sure = _sure, False
    try:
        yield
    finally:
        _sure = before


def meet(what: str) -> None:
    """Wait until all processes are in this call; RuntimeError if one is in another call."""
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
                    "all processes must make a call whose work they share (callbacks run in all "
                    "of them), so it must not stand under `if trainer.rank == 0`"
                )
            if theirs is not None:
                missing.remove(other)
        waited = time.monotonic() - started
        message = f"process {rank} has waited {waited:.0f} s in {what} for process {missing}"
        if waited > LIMIT:
            raise RuntimeError(f"{message}; all processes must make this call")
        if waited > SAID and not said:
            print(f"{message}, which has not called it yet", file=sys.stderr, flush=True)
            said = True
        if missing:
            time.sleep(pause)
            pause = min(2 * pause, 0.02)


def depart() -> None:
    """Tell the processes that wait for this one that it has ended."""
    with contextlib.suppress(Exception):
        if rank_and_world_size()[1] > 1:
            _announce("no call: it has ended")


@functools.cache
def _depart_at_exit() -> None:
    process = os.getpid()  # the end of a forked worker is not its end
    atexit.register(lambda: depart() if os.getpid() == process else None)


def _announce(what: str) -> None:
    global _calls
    _depart_at_exit()
    _calls += 1
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    store.set(f"mmkit/{_calls}/{rank}", what)
    if _calls > 2:  # a process in the previous call has read it
        store.delete_key(f"mmkit/{_calls - 2}/{rank}")


def _announced(rank: int) -> str | None:
    """The call that a process is in; None if it has not reached its next one yet."""
    store, key = dist.distributed_c10d._get_default_store(), f"mmkit/{_calls}/{rank}"
    try:
        return store.get(key).decode() if store.check([key]) else None
    except RuntimeError:  # the store ended with the process that kept it
        return "no call: it has ended, or the process that keeps the store has"


@joint("leave_group")
def leave_group() -> bool:
    """Leave a run of several processes; True for the process that goes on alone (rank 0).

    What follows is the work of one process: no rank waits for another that has ended.
    """
    rank, processes = rank_and_world_size()
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    return rank == 0
