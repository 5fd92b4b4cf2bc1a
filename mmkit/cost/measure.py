"""The cost of a training step, measured; fits and comparisons with its prediction.

A multiply-add counts as two operations. Walk-through: notebooks/09_speed.ipynb.
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..config import TrainingConfig
from ..data.batch import Batch
from ..losses import info_nce
from ..masking.plan import draw_maskings
from ..models.encoder import MultimodalEncoder
from ..models.flops import step_flops
from ..older_names import older_arguments
from ..training.random_state import random_state_kept
from ..training.threads import parts_at_once
from .prediction import Prediction, Rates, looked_at, predict


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
        if device.type == "cuda":
            torch.cuda.synchronize(device)
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


def fit_rates(predictions: Sequence[Prediction], seconds: Sequence[float]) -> Rates:
    """Fit the rates with which predictions match measured seconds.

    Least squares of the RELATIVE errors with rates of at least 0: of all ways to set some rates to
    0, the best one in which the others are positive.

    Args:
        predictions: of at least 6 configurations.
        seconds: measured for each of them, above 0.
    Returns:
        The fitted `Rates`.
    Raises:
        ValueError: fewer than 6 configurations, unequal numbers, or a time that is not above 0.
    """
    if len(predictions) != len(seconds) or len(seconds) < 6 or min(seconds) <= 0:
        raise ValueError(
            f"{len(predictions)} predictions and {len(seconds)} times cannot be fitted; measure "
            "at least 6 configurations (ratios and batches), all longer than 0 s"
        )
    took = torch.tensor(list(seconds), dtype=torch.float64)
    work = torch.tensor([p.work() for p in predictions], dtype=torch.float64) / took[:, None]
    kinds = [i for i in range(work.shape[1]) if work[:, i].any()]
    best, least = torch.zeros(work.shape[1], dtype=torch.float64), math.inf
    for chosen in itertools.chain(*(itertools.combinations(kinds, n) for n in (1, 2, 3, 4))):
        columns = work[:, chosen]
        scale = columns.norm(dim=0)  # or passes and gigabytes would differ by orders of magnitude
        found = torch.linalg.lstsq(columns / scale, torch.ones_like(took)).solution / scale
        error = float((columns @ found - 1).square().sum())
        if (found > 0).all() and error < least:
            best, least = torch.zeros_like(best), error
            best[list(chosen)] = found
    return Rates(*best.tolist())


def measure_rates(
    trainer: Any,
    ratios: Sequence[float] = (0.0, 0.5, 0.75),
    batches: Sequence[int] | None = None,
    rounds: int = 5,
) -> Rates:
    """Fit `Rates` to the steps of a trainer at each ratio and batch; this trains its weights.

    The configurations take turns as in `step_seconds`; a first round is not counted. Measured with
    the trainer's device, precision and threads; its configuration stays as it is.

    Args:
        trainer: a MaskedMultimodalTrainer of one process.
        ratios: image mask ratios, in [0, 1).
        batches: pairs of a step, at most the trainer's batch; None = the whole, half and a quarter
            of it.
        rounds: counted steps of each configuration.
    Returns:
        The fitted `Rates`.
    Raises:
        ValueError: fewer than 6 configurations, a batch larger than the trainer's, or a run of
            several processes.
    """
    if trainer.processes > 1:
        raise ValueError(f"rates are of one process; this run has {trainer.processes}")
    batch, config = trainer.first_batch(), trainer.config
    batches = batches or sorted({max(1, len(batch) // n) for n in (1, 2, 4)})
    if max(batches) > len(batch):
        raise ValueError(
            f"a batch of {max(batches)} is more than the {len(batch)} pairs that the trainer has; "
            "take smaller ones"
        )
    before, ways = vars(config).copy(), list(itertools.product(ratios, batches))
    times: dict[tuple, list[float]] = {way: [] for way in ways}
    predictions = []
    try:
        vars(config).update(image_mask="random", painted_mask=None)
        vars(config).update(image_mask_schedule="constant", image_mask_final_ratio=None)
        for _ in range(rounds + 1):
            for ratio, size in ways:
                config.image_mask_ratio = ratio
                times[ratio, size].append(step_time(trainer, batch[:size]))
        for ratio, size in ways:
            config.image_mask_ratio, config.batch_size = ratio, size
            predictions.append(predict_batch(trainer, batch[:size]))
    finally:
        vars(config).update(before)
    return fit_rates(predictions, [statistics.median(times[way][1:]) for way in ways])


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
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - start


def predict_batch(trainer: Any, batch: Batch, rates: Rates | None = None) -> Prediction:
    """`predict` for a trainer's next step, with the caption lengths of a batch.

    Args:
        trainer: a MaskedMultimodalTrainer.
        batch: this process's part of a batch.
        rates: of the device; None = no seconds are predicted.
    Returns:
        The `Prediction`.
    """
    micro_batches = trainer.config.gradient_accumulation_steps
    return predict(
        trainer.config,
        trainer.model,
        caption_length=batch.valid.sum(1).float().mean().item(),
        longest_caption=batch.valid.shape[1],
        processes=trainer.processes,
        rates=rates,
        device=trainer.device,
        at_once=parts_at_once(trainer, len(batch) // micro_batches),
    )


def crossover(
    config: TrainingConfig,
    model_or_preset: MultimodalEncoder | str,
    rates: Rates,
    *,
    caption_length: float,
    gain: float,
    largest: int = 1024,
) -> int | None:
    """The smallest image side at which masking makes a step `gain` times as fast, by `predict`.

    With smaller images `config.image_mask_ratio` saves less, because captions and fixed costs
    remain. Compares a step with nothing masked to a masked one at all multiples of the patch size;
    an image has (side / patch)^2 patches.

    Args:
        config: the masked configuration.
        model_or_preset: an encoder, or the name of a preset.
        rates: of the machine, see `Rates`.
        caption_length: mean number of tokens of a caption, both ends included.
        gain: factor, above 1.
        largest: largest side to try, in pixels.
    Returns:
        The side in pixels; None where there is none up to `largest`.
    Raises:
        ValueError: patches are reconstructed (with nothing masked there are none), or gain is not
            above 1.
    """
    if not gain > 1:
        raise ValueError(f"gain={gain!r} must be above 1: how much faster than with nothing masked")
    if "mim" in config.terms:
        raise ValueError("mim_weight above 0 needs masked patches; compare with mim_weight=0")
    plain = dict(image_mask="random", painted_mask=None, image_mask_schedule="constant")
    whole = dataclasses.replace(
        config, image_mask_ratio=0.0, image_mask_final_ratio=None, **plain  # type: ignore[arg-type]
    )  # fmt: skip
    model = looked_at(config, model_or_preset)
    for side in range(model.patch_size, largest + 1, model.patch_size):
        times = [
            predict(c, model, caption_length=caption_length, rates=rates, image_size=side).seconds
            for c in (whole, config)
        ]
        if times[0] >= gain * times[1]:  # type: ignore[operator]
            return side
    return None
