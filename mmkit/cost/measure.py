"""The cost of a training step, measured.

A multiply-add counts as two operations. Walk-through: notebooks/09_speed.ipynb.
"""

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..data.batch import Batch
from ..device import synchronize
from ..losses import info_nce
from ..masking.plan import draw_maskings
from ..models.encoder import MultimodalEncoder
from ..models.flops import step_flops
from ..older_names import older_arguments
from ..training.random_state import random_state_kept


@older_arguments(num_words="num_tokens")
def matmul_rate(
    model: MultimodalEncoder,
    batch_size: int,
    num_patches: float,
    num_tokens: float,
    dtype: torch.dtype = torch.float32,
    rounds: int = 9,
) -> float:
    """The rate at which this machine multiplies matrices of the shapes of a training step.

    It is an upper bound of a step's rate: the linear maps of both towers, forward and both products
    of the backward pass, on tensors in memory. The median time of each shape is weighted by its
    operations. Measured on the model's device with the present number of threads.

    Args:
        model: an encoder.
        batch_size: pairs of a step, at least 1.
        num_patches: encoded patches of an image.
        num_tokens: mean number of encoded tokens of a caption.
        dtype: type of the matrices.
        rounds: measurements of each shape, after two that are not counted.
    Returns:
        GFLOP per second.
    """
    device, total, seconds = model.logit_scale.device, 0.0, 0.0
    draws = torch.Generator(device).manual_seed(0)
    for config, tokens in (
        (model.vit.config, batch_size * (num_patches + 1)),
        (model.bert.config, batch_size * num_tokens),
    ):
        width, inner, rows = config.hidden_size, config.intermediate_size, round(tokens)
        for columns, out in ((width, 3 * width), (width, width), (width, inner), (inner, width)):
            x, w, g = (
                torch.randn(shape, device=device, generator=draws).to(dtype)
                for shape in ((rows, columns), (out, columns), (rows, out))
            )
            for product in (lambda: x @ w.T, lambda: g @ w, lambda: g.T @ x):  # noqa: B023
                seconds += config.num_hidden_layers * _median_seconds(product, device, rounds)
                total += config.num_hidden_layers * 2 * rows * columns * out
    return total / seconds / 1e9


def _median_seconds(work, device: torch.device, rounds: int) -> float:
    times = []
    for _ in range(rounds + 2):  # the first two warm up
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def step_seconds(trainers: dict[str, Any], rounds: int = 5) -> dict[str, float]:
    """Measure a whole training step of each trainer; this trains their weights.

    The trainers take turns, so that a busy moment of the machine does not affect only one of them.
    Of the two steps of a turn the second one counts, since it finds memory as a step of the same
    trainer left it. A first round is not counted.

    Args:
        trainers: {name: MaskedMultimodalTrainer}.
        rounds: counted turns of each trainer.
    Returns:
        {name: median seconds}.
    """
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds + 1):
        for name, trainer in trainers.items():
            batch = trainer.first_batch()
            step_time(trainer, batch)
            times[name].append(step_time(trainer, batch))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure_ratios(
    model: MultimodalEncoder,
    batch: Batch,
    ratios: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 0.9),
    masker: str = "random",
    rounds: int = 5,
) -> list[dict]:
    """Tokens, counted operations and measured milliseconds of a step at each image mask ratio.

    A step here is the forward and backward pass of one batch without an optimizer (masked patches
    dropped, all tokens of the captions encoded). The ratios take turns, so that a busy moment of
    the machine does not affect only one of them; a first round is not counted. The model's
    gradients stay as they were.

    Args:
        model: an encoder.
        batch: a batch on its device.
        ratios: mask ratios, in [0, 1).
        masker: name of an image masker.
        rounds: counted steps of each ratio.
    Returns:
        For each ratio {"ratio", "tokens" per pair, "gflop" per pair, "milliseconds" (median),
        "quartiles" of the milliseconds}.
    """
    maskings = [
        draw_maskings(batch, model.token_info, seed=0, epoch=0, image=(masker, ratio))[0]
        for ratio in ratios
    ]
    times: list[list[float]] = [[] for _ in ratios]
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    with random_state_kept():  # dropout draws
        for _ in range(rounds + 1):
            for masking, took in zip(maskings, times, strict=True):
                model.zero_grad(set_to_none=True)
                start = time.perf_counter()
                out = model(batch, masking)
                loss = info_nce(out.image_features, out.text_features, out.logit_scale.exp())
                loss.backward()
                loss.item()  # waits for a GPU
                took.append(1000 * (time.perf_counter() - start))
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    costs = []
    tokens = batch.valid.sum(1).float().mean().item()
    for ratio, masking, took in zip(ratios, maskings, times, strict=True):
        patches = model.num_patches if masking is None else masking.ids_keep.shape[1]
        ordered = sorted(took[1:])
        costs.append(
            {
                "ratio": ratio,
                "tokens": 1 + patches + tokens,
                "gflop": step_flops(model, patches, tokens, replay=False) / 1e9,
                "milliseconds": statistics.median(ordered),
                "quartiles": (ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]),
            }
        )
    return costs


def step_time(trainer: Any, batch: Batch) -> float:
    """Measure one training step on a batch; this trains the weights.

    Args:
        trainer: a MaskedMultimodalTrainer.
        batch: this process's part of a batch, on the trainer's device.
    Returns:
        Seconds.
    """
    start = time.perf_counter()
    trainer.train_step(batch, epoch=0)
    synchronize(trainer.device)
    return time.perf_counter() - start


@dataclass
class StepCost:
    """What one training step took."""

    seconds: float  # median
    flops: float  # as torch's FlopCounterMode counts them
    kept_bytes: float  # what autograd keeps of a micro-batch, at most, without the weights
    peak_bytes: float | None  # highest memory in use on a GPU; None on a CPU


def measure_step(trainer: Any, rounds: int = 3) -> StepCost:
    """Time, operations and memory of a step of this trainer, measured; this trains its weights.

    Args:
        trainer: a MaskedMultimodalTrainer.
        rounds: timed steps, after one that is counted and one that is not.
    Returns:
        The `StepCost`; `mm.cost.predict` counts its operations before it runs.
    """
    batch, cuda, kept = trainer.first_batch(), trainer.device.type == "cuda", _Kept(trainer)
    with (
        torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda packed: packed.tensor),
        FlopCounterMode(display=False) as counter,
    ):
        trainer.train_step(batch, epoch=0)
    step_time(trainer, batch)
    if cuda:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    seconds = statistics.median(step_time(trainer, batch) for _ in range(rounds))
    peak = float(torch.cuda.max_memory_allocated(trainer.device)) if cuda else None
    return StepCost(seconds, float(counter.get_total_flops()), float(kept.most), peak)


class _Kept:
    """Counts the bytes that autograd keeps: each storage once, for as long as it is kept."""

    def __init__(self, trainer: Any):
        self.weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
        self.users: Counter[int] = Counter()  # address of a storage -> how often it is kept
        self.bytes = self.most = 0

    def pack(self, tensor: torch.Tensor) -> "_Packed":
        return _Packed(self, tensor)


class _Packed:
    """A kept tensor; autograd drops it when the backward pass has used it."""

    def __init__(self, kept: _Kept, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        self.kept, self.tensor, self.address = kept, tensor, storage.data_ptr()
        self.size = 0 if self.address in kept.weights else storage.nbytes()
        if not kept.users[self.address]:
            kept.bytes += self.size
            kept.most = max(kept.most, kept.bytes)
        kept.users[self.address] += 1

    def __del__(self):
        self.kept.users[self.address] -= 1
        if not self.kept.users[self.address]:
            self.kept.bytes -= self.size
