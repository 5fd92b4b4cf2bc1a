"""One process or many: gathering with gradients, and starting processes from a notebook.

Shapes: R rows of this process, C rows of all processes, D width. Rank order is row order.
Walk-through: notebooks/03_training.ipynb.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


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
        grad = grad.contiguous()
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


def leave_group() -> bool:
    """End this process's part in a run of several; True where it is the one that goes on (rank 0).

    What follows is then one process's work: no rank waits for another that has gone home.
    """
    rank, processes = world()
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    return rank == 0


def _free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def preflight(num_processes: int) -> None:
    """Raise RuntimeError, with the remedy, for what would make a launch from this kernel fail."""
    from accelerate.state import AcceleratorState, PartialState

    if num_processes < 1:
        raise ValueError(f"num_processes={num_processes} must be at least 1")
    if torch.cuda.is_initialized():
        raise RuntimeError(
            "CUDA is already in use in this kernel, so that no process can be forked from it; "
            "restart the kernel and call mm.launch before anything touches the GPU"
        )
    if PartialState._shared_state or AcceleratorState._shared_state:
        raise RuntimeError(
            "an Accelerator was already made in this kernel (by train_model, say); restart the "
            "kernel and run every training of this notebook through mm.launch"
        )
    # Asking NVML instead of CUDA leaves the parent's CUDA untouched: forking stays possible.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    gpus = torch.cuda.device_count()
    if 0 < gpus < num_processes:
        raise RuntimeError(
            f"num_processes={num_processes} but there are {gpus} GPUs; take at most {gpus}"
        )


def _child(fn: Callable, args: tuple, num_processes: int, result: str) -> None:
    """What each process runs: check that the processes know each other, then `fn`."""
    from accelerate import Accelerator

    seen = Accelerator(cpu=not torch.cuda.is_available()).num_processes
    if seen != num_processes:  # else every process would silently train a model of its own
        raise RuntimeError(f"{num_processes} processes were asked for, each sees {seen}")
    value = fn(*args)
    if world()[0] == 0:
        torch.save(value, result)


def launch(fn: Callable, *args, num_processes: int = 1):
    """Run `fn(*args)` in several processes of this machine and return what rank 0 returned.

    Works in a notebook (accelerate's notebook_launcher forks, so that `fn` may be defined in a
    cell), on GPUs (one process each) or on a CPU (gloo). With 1 process `fn` is simply called.
    Raises RuntimeError where this kernel cannot be forked, saying why.
    """
    if num_processes == 1:
        return fn(*args)
    from accelerate import notebook_launcher

    preflight(num_processes)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // num_processes))
    forced = not torch.cuda.is_available() and "ACCELERATE_USE_CPU" not in os.environ
    if forced:  # else each rank trains an independent copy and nothing fails
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pth"
        try:
            notebook_launcher(
                _child,
                (fn, args, num_processes, str(result)),
                num_processes=num_processes,
                use_port=_free_port(),
            )
        finally:
            torch.set_num_threads(threads)
            if forced:
                del os.environ["ACCELERATE_USE_CPU"]
        return torch.load(result, weights_only=False)  # written by our own child a moment ago
