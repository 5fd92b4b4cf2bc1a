"""Batches of an epoch, made ahead: by worker processes, or by a thread for decoded images.

Walk-through: notebooks/01_data.ipynb.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .dataset import MultimodalDataset


class _BatchView(torch.utils.data.Dataset):
    """A map-style view whose item is a whole `Batch`, for worker processes."""

    def __init__(self, dataset: MultimodalDataset):
        self.dataset = dataset

    def __getitem__(self, key) -> Batch:
        """Tensors in shared memory; where that has no room, arrays, which go through a pipe.

        Left to the DataLoader, tensors are shared by a thread of the worker, whose error reaches
        nobody: whoever waits for the batch waits for ever (Docker gives /dev/shm 64 MB).
        """
        batch = self.dataset.batch(*key)
        try:
            return batch._map(Tensor.share_memory_)
        except (RuntimeError, OSError):
            return batch._map(Tensor.numpy)  # type: ignore


def _ahead(batches: Iterator[Batch], pin: bool, depth: int = 2) -> Iterator[Batch]:
    """The same batches, up to `depth` of them made by a thread before they are asked for."""
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(item) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def work():
        try:
            for batch in batches:
                if not put(batch.pin_memory() if pin else batch):
                    return
            put(None)
        except BaseException as error:  # raised where the batch is waited for
            put(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        worker.join()


def load_batches(
    dataset: MultimodalDataset, keys: list, num_workers: int, pin: bool
) -> Iterator[Batch]:
    """Batches for `keys`, a list of (rows, caption_noise), in that order.

    Pictures that must be decoded are decoded by `num_workers` processes; those of a cached
    file are collected by a thread; those in memory need neither.
    """
    if isinstance(dataset._decoded.pixels, Tensor) or (num_workers == 0 and not dataset.resident):
        return (dataset.batch(*key) for key in keys)
    if dataset.resident:
        return _ahead((dataset.batch(*key) for key in keys), pin)
    dataset.encoded_captions()  # once here, not once per worker
    for rows, noise in keys[:1]:  # what fails at once says so here, in its own words
        dataset.batch(rows[:1], noise[:1])
    loader = torch.utils.data.DataLoader(
        _BatchView(dataset), sampler=keys, batch_size=None, num_workers=num_workers, pin_memory=pin,
        generator=torch.Generator(),  # or each start of workers would move the draws of dropout
    )  # fmt: skip
    made = iter(loader)  # now: workers are forked by the thread that asks
    return (batch._map(torch.as_tensor) for batch in made)


def as_dataset(given: Any, name: str) -> MultimodalDataset:
    """A data set of ours, or of a `torch.utils.data.Subset` of one; ValueError in words else.

    name: what the caller names it, for the message.
    """
    if isinstance(given, MultimodalDataset):
        return given
    if isinstance(given, torch.utils.data.Subset):
        return as_dataset(given.dataset, name).subset(given.indices)
    remedy = "give mm.MultimodalDataset(image_paths, texts), or what mm.load_data(...) returns"
    if isinstance(given, torch.utils.data.DataLoader):
        remedy = f"give the data set inside it ({name}=loader.dataset), which makes batches itself"
    elif isinstance(given, list | tuple) and any(isinstance(x, MultimodalDataset) for x in given):
        remedy = "give one of the data sets in it"
    elif isinstance(given, str | os.PathLike):
        remedy = f"give the data in it: mm.load_data({str(given)!r})"
    raise ValueError(
        f"{name} is a {type(given).__name__}, no data set of images and texts; {remedy}"
    )
