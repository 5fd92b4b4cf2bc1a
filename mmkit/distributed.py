"""Several processes: gathering with gradients.

Shapes: R rows of this process, C rows of all processes, D width. Rank order is row order.
Walk-through: notebooks/03_training.ipynb.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def rank_slice(rows: Tensor) -> tuple[Tensor, int]:
    """This process's contiguous part of a global batch, and the index of its first row.

    The sizes of the parts differ by at most one row; joined in rank order, they are the batch.
    """
    rank, processes = rank_and_world_size()
    parts = rows.tensor_split(processes)
    return parts[rank], sum(len(part) for part in parts[:rank])


class _Gather(torch.autograd.Function):
    """All processes' rows; the backward pass sums the gradients that all have for our rows.

    torch.distributed.all_gather alone cuts the gradient: the loss then trains the rows of each
    process as queries only, never as candidates (SLIP's issue 31).
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
    """Number of rows of each process, in rank order."""
    _, processes = rank_and_world_size()
    if processes == 1:
        return [count]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(processes)]
    dist.all_gather(counts, torch.tensor([count], device=device))
    return [int(c) for c in counts]


def all_gather_with_grad(x: Tensor, counts: list[int] | None = None) -> Tensor:
    """Rows (R, ...) of all processes, joined in rank order: (C, ...). Differentiable; R may differ.

    counts: the result of `row_counts`, where it is known already.
    """
    if rank_and_world_size()[1] == 1:
        return x
    return _Gather.apply(x, counts or row_counts(len(x), x.device))


class _Pass(torch.autograd.Function):
    """Send our rows to the next process and take those of the previous one; gradients go back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _pass_on(x, 1)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return _pass_on(grads[0], -1)


def _pass_on(x: Tensor, hop: int) -> Tensor:
    rank, processes = rank_and_world_size()
    received = torch.empty_like(x)
    exchanges = [
        dist.P2POp(dist.isend, x.contiguous(), (rank + hop) % processes),
        dist.P2POp(dist.irecv, received, (rank - hop) % processes),
    ]
    for request in dist.batch_isend_irecv(exchanges):
        request.wait()
    return received


def neighbour_exchange(x: Tensor, counts: list[int]) -> Iterator[tuple[int, Tensor]]:
    """(rank, its rows (R, ...)) of every process, our own first; differentiable.

    A process never holds the rows of more than two others at a time, as in the chunked sigmoid
    loss (Zhai et al. 2023, arXiv:2303.15343, section 3.1). counts: rows of each process, in rank
    order.
    """
    rank, processes = rank_and_world_size()
    yield rank, x
    moving = x.new_zeros(max(counts), *x.shape[1:])
    moving = torch.cat(
        [x, moving[len(x) :]]
    )  # all of the same length, so that they can be passed on
    for hop in range(1, processes):
        moving = _Pass.apply(moving)
        owner = (rank - hop) % processes
        yield owner, moving[: counts[owner]]


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes (a new tensor, no gradient)."""
    x = x.detach().clone()
    if rank_and_world_size()[1] > 1:
        dist.all_reduce(x)
    return x


def broadcast(tensors: Sequence[Tensor], owner: int) -> None:
    """Overwrite these tensors on every process with those of process `owner`, in one message."""
    if rank_and_world_size()[1] == 1 or not tensors:
        return
    flat = torch.cat([x.flatten() for x in tensors])
    dist.broadcast(flat, owner)
    for x, new in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(new.view_as(x))
