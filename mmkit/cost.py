"""What a step costs, counted before it runs.

A multiply-add counts as two operations. Shapes: N tokens, D width, I width of the MLP.
Walk-through: notebooks/02_masking.ipynb.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from .config import TrainingConfig
from .data import Batch
from .encoder import MultimodalEncoder
from .losses import info_nce
from .masking import draw_maskings


def tower_flops(config, num_tokens: float) -> float:
    """Forward FLOPs of one sample through a transformer tower of `num_tokens` tokens.

    Matrix products only (8 D^2 + 4 D I per token, 4 N^2 D for attention); norms, softmax and
    activations are left out (a few per cent).
    """
    return config.num_hidden_layers * _layer_flops(config, num_tokens)


def _layer_flops(config, num_tokens: float) -> float:
    width, inner = config.hidden_size, config.intermediate_size
    per_token = 8 * width**2 + 4 * width * inner
    return num_tokens * per_token + 4 * num_tokens**2 * width


def sample_flops(model: MultimodalEncoder, num_patches: float, num_words: float) -> float:
    """Forward FLOPs of one picture-text pair with so many visible patches and text tokens."""
    vit, bert = model.vit.config, model.bert.config
    patch = 2 * 3 * model.patch_size**2 * vit.hidden_size * num_patches
    heads = 2 * model.embed_dim * (vit.hidden_size + bert.hidden_size)
    return patch + tower_flops(vit, num_patches + 1) + tower_flops(bert, num_words) + heads


def put_back_flops(
    model: MultimodalEncoder,
    num_patches: float,
    num_words: float,
    all_words: float,
    config: TrainingConfig,
) -> float:
    """Forward FLOPs of one pair through the decoder's heads that the terms of a run need.

    num_patches, num_words: as encoded, for the other modality to look at; a head's own tokens are
    all patches, or all words of the caption. Matching fuses two wrong pairs for each that looks
    across. The words' logits are left out.
    """
    if (decoder := model.decoder) is None:
        return 0.0
    across, flops = decoder.across, 0.0
    if "pixels" in config.terms and decoder.pixel_head is not None:
        own = model.num_patches + 1
        flops += _head_flops(decoder.pixel_layers, own, num_words * across)
        flops += 2 * decoder.pixel_head.weight.numel() * model.num_patches
    if "words" in config.terms or "matching" in config.terms:
        pairs = 1 + 2 * config.cross_modal_ratio * ("matching" in config.terms)
        flops += pairs * _head_flops(decoder.word_layers, all_words, (num_patches + 1) * across)
    return flops


def _head_flops(layers, own: float, other: float) -> float:
    """A `TokenDecoder` over so many own tokens, and those of the other modality behind them."""
    if layers is None:
        return 0.0
    entry = 2 * layers.embed.weight.numel() * own
    if layers.other is not None:
        entry += 2 * layers.other.weight.numel() * other
    return entry + len(layers.layers) * _layer_flops(layers.config, own + other)


def step_flops(
    model: MultimodalEncoder, num_patches: float, num_words: float, replay: bool
) -> float:
    """Training FLOPs of one pair: forward once, backward twice that; `replay` adds a forward."""
    return (4 if replay else 3) * sample_flops(model, num_patches, num_words)


def matmul_rate(
    model: MultimodalEncoder,
    batch_size: int,
    num_patches: float,
    num_words: float,
    dtype: torch.dtype = torch.float32,
    rounds: int = 9,
) -> float:
    """GFLOP a second that this machine multiplies at the shapes of a training step's layers.

    The linear maps of both towers, forward and both ways back, on tensors that lie ready: what a
    step could reach at best. Every shape's median, weighted by its operations. On the device and
    with the threads of now.
    """
    device, total, seconds = model.logit_scale.device, 0.0, 0.0
    for config, tokens in (
        (model.vit.config, batch_size * (num_patches + 1)),
        (model.bert.config, batch_size * num_words),
    ):
        width, inner, rows = config.hidden_size, config.intermediate_size, round(tokens)
        for columns, out in ((width, 3 * width), (width, width), (width, inner), (inner, width)):
            x, w, g = (
                torch.randn(shape, device=device).to(dtype)
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
    """Median seconds of a whole training step of each trainer ({name: trainer}).

    They take turns, so that a busy moment does not hit one of them alone; a first round warms up.
    Their weights are trained on by it.
    """
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds + 1):
        for name, trainer in trainers.items():
            batch, start = trainer.first_batch(), time.perf_counter()
            trainer.train_step(batch, epoch=0)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure_ratios(
    model: MultimodalEncoder,
    batch: Batch,
    ratios: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 0.9),
    masker: str = "random",
    rounds: int = 5,
) -> list[dict]:
    """Tokens, predicted operations and measured milliseconds of a step at each hidden share.

    A step here is forward and backward of one batch (patches dropped, words seen), no optimizer.
    The ratios take turns, so that a busy moment does not hit one of them alone; the first round
    warms up and is not counted. Returns for each ratio {"ratio", "tokens" per pair, "gflop" per
    pair, "milliseconds" (median), "quartiles"}.
    """
    maskings = [
        draw_maskings(batch, model, seed=0, epoch=0, image=(masker, ratio))[0] for ratio in ratios
    ]
    times: list[list[float]] = [[] for _ in ratios]
    for _ in range(rounds + 1):
        for masking, took in zip(maskings, times, strict=True):
            start = time.perf_counter()
            out = model(batch, masking)
            loss = info_nce(out.image_features, out.text_features, out.logit_scale.exp())
            loss.backward()
            loss.item()  # waits for a GPU
            took.append(1000 * (time.perf_counter() - start))
            model.zero_grad(set_to_none=True)
    costs = []
    words = batch.valid.sum(1).float().mean().item()
    for ratio, masking, took in zip(ratios, maskings, times, strict=True):
        patches = model.num_patches if masking is None else masking.ids_keep.shape[1]
        ordered = sorted(took[1:])
        costs.append(
            {
                "ratio": ratio,
                "tokens": 1 + patches + words,
                "gflop": step_flops(model, patches, words, replay=False) / 1e9,
                "milliseconds": statistics.median(ordered),
                "quartiles": (ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]),
            }
        )
    return costs
