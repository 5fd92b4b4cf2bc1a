"""The time of a training step by kind of work.

Walk-through: notebooks/09_speed.ipynb.
"""

import os
import statistics
import time
from typing import Any

import torch
from torch.autograd.profiler import profile
from torch.autograd.profiler_util import FunctionEvent

from ..device import synchronize

# kind of work -> prefixes of the names of its operations in torch, without "aten::"
KINDS: dict[str, tuple[str, ...]] = {
    "matrix products": ("mm", "addmm", "linear", "mkldnn_linear", "addmv", "mv"),
    "attention": (
        "bmm", "baddbmm", "_softmax", "softmax", "masked_fill",
        "_scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_attention",
    ),
    "GELU": ("gelu",),
    "layer norms": ("native_layer_norm", "layer_norm"),
    "copies, casts": (
        "copy", "_to_copy", "to", "cat", "clone", "contiguous", "index", "gather", "embedding",
        "empty", "new_", "zeros", "zero_", "fill_", "constant_pad", "stack", "split", "scatter",
    ),
}  # fmt: skip
SUMS, OPTIMIZER, REST = "sums, products", "optimizer", "Python, waits"


def step_parts(trainer: Any, rounds: int = 3) -> dict[str, float]:
    """Seconds of a training step by kind of work; this trains the weights.

    On a CPU ONE thread is used, so that nothing overlaps; with more threads the work is the same.
    The profiler itself, Python, and waiting for a GPU count as "Python, waits". Time within an
    optimizer is the optimizer's, including its matrix products.

    Args:
        trainer: a MaskedMultimodalTrainer.
        rounds: measured steps, after one that is not counted.
    Returns:
        {kind: median seconds}; for one step they add up to its time.
    """
    device, threads = trainer.device, torch.get_num_threads()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it reports itself to the terminal
    on_gpu: dict[str, Any] = dict(use_device="cuda", use_kineto=True)
    options = on_gpu if device.type == "cuda" else dict(use_kineto=False)
    found: list[dict[str, float]] = []
    modes = {part: part.training for part in trainer.net.modules()}
    try:
        torch.set_num_threads(1)
        trainer.net.train()
        batch = trainer.first_batch()
        trainer.train_step(batch, epoch=0)
        for _ in range(rounds):
            with profile(**options) as profiler:
                start = time.perf_counter()
                trainer.train_step(batch, epoch=0)
                synchronize(device)
                seconds = time.perf_counter() - start
            found.append(by_kind(profiler.function_events, device.type, seconds))
    finally:
        torch.set_num_threads(threads)
        for part, mode in modes.items():
            part.training = mode
    return {kind: statistics.median(parts[kind] for parts in found) for kind in found[0]}


def by_kind(events: Any, device: str, seconds: float) -> dict[str, float]:
    """Seconds of each kind; the last kind is the time of the step outside of operations."""
    parts = dict.fromkeys((*KINDS, SUMS, OPTIMIZER), 0.0)
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # kernels: counted with the operation that started them
        kind = _kind(event)
        if kind is not None:
            own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            parts[kind] += own / 1e6
    parts[REST] = max(0.0, seconds - sum(parts.values()))
    return parts


def _kind(event: FunctionEvent) -> str | None:
    """The kind of an event; None for Python's own, such as a graph node around its operations."""
    around: FunctionEvent | None = event
    while around is not None:
        if around.name.startswith("Optimizer.step"):
            return OPTIMIZER
        around = around.cpu_parent
    if not event.name.startswith("aten::"):
        return None
    name = event.name.removeprefix("aten::")
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), SUMS)
