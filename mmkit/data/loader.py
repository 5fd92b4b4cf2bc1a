"""Batches of an epoch, prepared ahead by worker processes, or by a thread for decoded images.

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
from .workers import workers_for


class _BatchView(torch.utils.data.Dataset):
    """A map-style view whose item is a whole `Batch`, for worker processes."""

    def __init__(self, dataset: MultimodalDataset):
        self.dataset = dataset

    def __getitem__(self, key) -> Batch:
        """Tensors in shared memory; arrays, sent through a pipe, if that is full.

        The DataLoader itself would share tensors in a thread of the worker, whose error is lost, so
        that the reader of the batch waits for ever (Docker gives /dev/shm 64 MB).
        """
        batch = self.dataset.batch(*key)
        try:
            return batch._map(Tensor.share_memory_)
        except (RuntimeError, OSError):
            return batch._map(Tensor.numpy)  # type: ignore


def _ahead(batches: Iterator[Batch], pin: bool, depth: int = 2) -> Iterator[Batch]:
    """The same batches, up to `depth` of them prepared by a thread before they are needed."""
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
        except BaseException as error:  # raised again in the thread that waits for the batch
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
    """Batches of a dataset in a given order, prepared ahead where that saves time.

    Images that must be decoded are decoded by worker processes; those of cached files are
    collected by a thread; those in memory need neither.

    Args:
        dataset: the data.
        keys: (rows, caption_noise) of each batch, in order: arguments of `dataset.batch`.
        num_workers: processes that decode; 0 decodes in this one.
        pin: copy the batches to pinned memory, for a GPU.

    Returns:
        An iterator over the batches. What fails in the first image fails here, not in a worker.
    """
    if isinstance(dataset._decoded.pixels, Tensor) or (num_workers == 0 and not dataset.resident):
        return (dataset.batch(*key) for key in keys)
    if dataset.resident:
        return _ahead((dataset.batch(*key) for key in keys), pin)
    dataset.encoded_captions()  # once here, not once per worker
    for rows, noise in keys[:1]:  # an error in the first image is raised here, unwrapped
        dataset.batch(rows[:1], noise[:1])
    items, count = _BatchView(dataset), sum(len(rows) for rows, _ in keys)
    loader = torch.utils.data.DataLoader(
        items, sampler=keys, batch_size=None, pin_memory=pin,
        num_workers=workers_for(items, num_workers, count),
        generator=torch.Generator(),  # else each start of workers would change the draws of dropout
    )  # fmt: skip
    batches = iter(loader)  # now: the calling thread starts the workers
    return (batch._map(torch.as_tensor) for batch in batches)


def as_dataset(given: Any, name: str) -> MultimodalDataset:
    """A MultimodalDataset, also from a `torch.utils.data.Subset` of one; else ValueError.

    name: the caller's name for the argument, for the message.
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
        f"{name} is a {type(given).__name__}, not a data set of images and texts; {remedy}"
    )
