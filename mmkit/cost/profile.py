"""Where the time of a training step goes, by kind of work.

Walk-through: notebooks/09_speed.ipynb.
"""

import os
import statistics
import time
from typing import Any

import torch
from torch.autograd.profiler import profile
from torch.autograd.profiler_util import FunctionEvent

# kind of work -> how the names of its operations in torch begin, "aten::" left out
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
    """Seconds of a training step by kind of work; they add up to the step (medians of rounds).

    trainer: a MaskedMultimodalTrainer. On a CPU by ONE thread, where nothing runs beside anything
    else: what two threads share between them is the same work. The profiler itself, Python and what
    waits for a GPU are "Python, waits"; time within an optimizer is the optimizer's, its matrix
    products included. The first of `rounds` + 1 steps warms up. The weights are trained on by it.
    """
    device, threads = trainer.device, torch.get_num_threads()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports itself to the terminal else
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
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds = time.perf_counter() - start
            found.append(by_kind(profiler.function_events, device.type, seconds))
    finally:
        torch.set_num_threads(threads)
        for part, mode in modes.items():
            part.training = mode
    return {kind: statistics.median(parts[kind] for parts in found) for kind in found[0]}


def by_kind(events: Any, device: str, seconds: float) -> dict[str, float]:
    """Seconds of each kind; what of the step no operation took is the last."""
    parts = dict.fromkeys((*KINDS, SUMS, OPTIMIZER), 0.0)
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # kernels: counted with the operation that started them
        kind = _kind(event)
        if kind is not None:
            own = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
            parts[kind] += own / 1e6
    parts[REST] = max(0.0, seconds - sum(parts.values()))
    return parts


def _kind(event: FunctionEvent) -> str | None:
    """Of one event; None = Python's own, such as a node of the graph around its operations."""
    around: FunctionEvent | None = event
    while around is not None:
        if around.name.startswith("Optimizer.step"):
            return OPTIMIZER
        around = around.cpu_parent
    if not event.name.startswith("aten::"):
        return None
    name = event.name.removeprefix("aten::")
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), SUMS)
