"""One process or many: gathering with gradients.

Shapes: R rows of this process, C rows of all processes, D width. Rank order is row order.
Walk-through: notebooks/03_training.ipynb.
"""

import atexit
import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


# -- calls that all processes make ---------------------------------------------------------------

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
    rank, processes = world()
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
        if world()[1] > 1:
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


# -- what they exchange --------------------------------------------------------------------------


def my_share(rows: Tensor) -> tuple[Tensor, int]:
    """This process's contiguous part of a global batch, and where it starts.

    Parts differ by at most one row; joined in rank order they are the batch.
    """
    rank, processes = world()
    parts = rows.tensor_split(processes)
    return parts[rank], sum(len(part) for part in parts[:rank])


class _Gather(torch.autograd.Function):
    """All processes' rows; backward sums what every process asks of our rows.

    torch.distributed.all_gather alone cuts the gradient: the loss then only trains each process's
    own rows as queries, never as candidates (SLIP's issue 31).
    """

    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.split(ctx.sizes)[dist.get_rank()], None


def row_counts(count: int, device: torch.device) -> list[int]:
    """How many rows each process has, in rank order."""
    _, processes = world()
    if processes == 1:
        return [count]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(processes)]
    dist.all_gather(counts, torch.tensor([count], device=device))
    return [int(c) for c in counts]


def gather_rows(x: Tensor, counts: list[int] | None = None) -> Tensor:
    """(R, ...) of every process, joined in rank order: (C, ...). Differentiable; R may differ.

    counts: what `row_counts` gave, where it is known already.
    """
    if world()[1] == 1:
        return x
    return _Gather.apply(x, counts or row_counts(len(x), x.device))


class _Pass(torch.autograd.Function):
    """Our rows go to the next process, the previous one's come to us; gradients go back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _pass_on(x, 1)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return _pass_on(grads[0], -1)


def _pass_on(x: Tensor, hop: int) -> Tensor:
    rank, processes = world()
    received = torch.empty_like(x)
    exchanges = [
        dist.P2POp(dist.isend, x.contiguous(), (rank + hop) % processes),
        dist.P2POp(dist.irecv, received, (rank - hop) % processes),
    ]
    for request in dist.batch_isend_irecv(exchanges):
        request.wait()
    return received


def around_the_ring(x: Tensor, counts: list[int]) -> Iterator[tuple[int, Tensor]]:
    """(rank, its rows (R, ...)) of every process, our own first; differentiable.

    No process ever holds more than two others' rows for this; the chunked sigmoid loss (Zhai et
    al. 2023, arXiv:2303.15343, section 3.1). counts: rows of each process, in rank order.
    """
    rank, processes = world()
    yield rank, x
    moving = x.new_zeros(max(counts), *x.shape[1:])
    moving = torch.cat([x, moving[len(x) :]])  # all of one length, to be passed on
    for hop in range(1, processes):
        moving = _Pass.apply(moving)
        owner = (rank - hop) % processes
        yield owner, moving[: counts[owner]]


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes (a new tensor, no gradient)."""
    x = x.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(x)
    return x


def send_to_all(tensors: Sequence[Tensor], owner: int) -> None:
    """Overwrite these tensors of every process by those of process `owner`; one message."""
    if world()[1] == 1 or not tensors:
        return
    flat = torch.cat([x.flatten() for x in tensors])
    dist.broadcast(flat, owner)
    for x, new in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(new.view_as(x))


@joint("leave_group")
def leave_group() -> bool:
    """End this process's part in a run of several; True where it is the one that goes on (rank 0).

    What follows is then one process's work: no rank waits for another that has gone home.
    """
    rank, processes = world()
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    return rank == 0
