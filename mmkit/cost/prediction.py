"""What a step will cost, from its configuration alone: operations, memory, bytes sent, time.

Counted, not run: operations as in flops.py, bytes from what each layer keeps for the backward pass.
Time is a sum of four parts, each a count times a rate of the machine: passes, matrix products,
bytes moved, bytes exchanged. The rates come from a few measured steps (`cost.measure_rates`).
Shapes: B batch, K encoded tokens, D width, H heads, W processes.
Walk-through: notebooks/09_speed.ipynb.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config import TrainingConfig
from ..errors import nearest
from ..masking.image import ATTENTION_MASKERS, IMAGE_MASKERS
from ..masking.plan import find_masker
from ..models.encoder import MultimodalEncoder
from ..models.flops import logit_flops, muon_flops, objective_flops, tower_flops
from ..models.presets import PRESETS
from ..training.optim import parameter_groups
from ..training.terms import prepare_heads
from .memory import Numbers, exchanged_bytes, kept_by_pair, numbers_of, weight_copies, working_bytes

VOCABULARY = 4096  # tokens of a preset: what a WordPiece has when it is trained here
_SPECIAL = 2  # tokens of a caption that are never masked: its first and its last
_HELD_LOGITS = 2**22  # as step.py: so many of a similarity matrix at once


@dataclass
class Rates:
    """Seconds per unit of work of one process on one machine; what was not measured is 0.

    As fitted, with its threads and precision: a process with fewer threads has other rates. They
    hold together: work that grew alike in what was measured (products and bytes nearly do) is
    shared out between its rates, and one of them alone is no property of the machine.
    """

    seconds_per_step: float  # of a forward and backward pass: Python, launches, the optimizer's too
    seconds_per_gflop: float  # of matrix products
    seconds_per_gigabyte: float  # moved besides: norms, softmax, activations, weights updated
    seconds_per_exchanged_gigabyte: float = 0.0  # between processes

    @property
    def gflop_per_second(self) -> float:
        """At which matrices are multiplied; infinite where time did not depend on it."""
        return 1 / self.seconds_per_gflop if self.seconds_per_gflop else math.inf


@dataclass
class Prediction:
    """What one optimizer step takes; memory and bytes of one process, in bytes."""

    flops_per_pair: float  # forward, backward and replays of one pair, with its row of logits
    flops: float  # of the step, all processes together, the optimizer's products among them
    weights: float
    gradients: float  # with DDP's buckets where there are several processes
    optimizer_state: float  # AdamW keeps two numbers per weight, Muon one, shared over processes
    activations: float  # of the micro-batch that keeps its graph, pixels and captions among them
    logits: float  # the part of the similarity matrix that is held at once, and its gradient
    exchanged: float  # received from other processes: gradients, features, Muon's new weights
    moved: float  # read and written outside of matrix products
    passes: float  # forward and backward over a micro-batch; a forward alone is a third
    processes: int
    seconds: float | None = None  # with rates only

    @property
    def memory(self) -> float:
        """Bytes at the highest point, without libraries, data and what an allocator holds beside.

        On a CPU that was about a quarter of the activations more, and most of a small step.

        Activations go as gradients come; the two are there together only where gradients of
        earlier micro-batches, or DDP's buckets, wait.
        """
        step = max(self.activations + self.logits, self.gradients)
        if self.passes > 1 or self.processes > 1:
            step = self.activations + self.logits + self.gradients
        return self.weights + self.optimizer_state + step

    def work(self) -> tuple[float, float, float, float]:
        """Of one process: passes, GFLOP, gigabytes moved, gigabytes exchanged."""
        return (
            self.passes,
            self.flops / self.processes / 1e9,
            self.moved / 1e9,
            self.exchanged / 1e9,
        )

    def time(self, rates: Rates) -> float:
        """Seconds of the step at these rates."""
        each = dataclasses.astuple(rates)
        return sum(count * cost for count, cost in zip(self.work(), each, strict=True))


def predict(  # noqa: PLR0913 (by name)
    config: TrainingConfig,
    model_or_preset: MultimodalEncoder | str,
    *,
    caption_length: float,
    longest_caption: float | None = None,
    processes: int = 1,
    rates: Rates | None = None,
    image_size: int | None = None,
    device: str | torch.device | None = None,
    at_once: int = 1,
) -> Prediction:
    """Operations, memory, bytes exchanged and, given rates, seconds of one optimizer step.

    Assumes that nothing is frozen, that unmasked epochs are left out, that a changing ratio is at
    the mean of its ends, that a user's optimizer is as large as AdamW, and equal parts.

    Args:
        config: of the run.
        model_or_preset: an encoder, or "tiny", "small", "base" with a vocabulary of 4,096 tokens.
        caption_length: mean number of valid tokens, both ends included.
        longest_caption: tokens to which attention is padded; None = all captions are equally long.
        processes: number of processes that share `config.batch_size`.
        rates: of the device; None = no seconds are predicted.
        image_size: side in pixels; None = the model's own.
        device: None = the model's; the CPU for a preset.
        at_once: parts of a micro-batch computed in parallel, each with its own gradients (CPU).
    Returns:
        The `Prediction`.
    Raises:
        ValueError: arguments that do not fit each other, or "layers", whose fraction is not known.
    """
    model = looked_at(config, model_or_preset)
    _check(config, model, caption_length, longest_caption, processes, image_size)
    numbers = numbers_of(config, torch.device(device or _device_of(model_or_preset)))
    side = (image_size or model.image_size) // model.patch_size
    shape = _shape(config, side**2, (caption_length, longest_caption), processes, numbers)
    kept = kept_by_pair(
        config, model, shape.encoded, shape.whole, shape.padded, numbers, shape.masked_tokens
    )
    weights, learning, matrices = _weights(config, model, side)
    muon = sum(p.numel() for p in matrices)
    copies = at_once * weight_copies(model, numbers)
    pair, graph = _pair_flops(config, model, shape), math.ceil(shape.pairs)
    moved = (4 + 2 * shape.replayed) * kept * config.batch_size / processes
    prediction = Prediction(
        flops_per_pair=pair,
        flops=config.batch_size * pair + sum(muon_flops(*p.shape) for p in matrices),
        weights=4.0 * weights,
        gradients=4.0 * learning * (2 if processes > 1 else 1 if at_once < 3 else 1 + at_once),
        optimizer_state=8.0 * (learning - muon) + 4.0 * muon / processes,
        activations=graph * kept + copies + working_bytes(model, graph, shape.encoded[0], numbers),
        logits=4.0 * shape.logits * (7 if config.loss == "info_nce" else 6),
        exchanged=exchanged_bytes(config, model.embed_dim, 4.0 * learning, 4.0 * muon, processes),
        moved=moved + 4 * shape.micro_batches * copies + 8 * 4 * learning,
        passes=shape.micro_batches * (1 + shape.replayed / 3),
        processes=processes,
    )
    prediction.seconds = None if rates is None else prediction.time(rates)
    return prediction


def _weights(config: TrainingConfig, model: MultimodalEncoder, side: int) -> tuple[int, int, list]:
    """(all weights, those that learn, the matrices that Muon updates)."""
    weights = sum(p.numel() for p in model.parameters()) + _more_positions(model, side)
    learning = weights - sum(p.numel() for p in model.parameters() if not p.requires_grad)
    muon = config.optimizer == "muon"
    return weights, learning, list(parameter_groups(model)["matrices"].values()) if muon else []


class _Shape(NamedTuple):
    """How large a step's tensors are."""

    encoded: tuple[float, float]  # patches and words of a pair that are computed with
    whole: tuple[int, float]  # all of them
    padded: float  # words to which attention is padded
    masked_tokens: float
    micro_batches: int  # micro-batches
    pairs: float  # of one of them, in one process: what keeps its graph
    replayed: float  # fraction of the pairs that go forward twice
    candidates: float  # columns of the similarity matrix; 0 = nothing is contrasted
    logits: float  # entries of it that are held at once
    again: bool  # whether they are computed anew on the backward pass


def _shape(
    config: TrainingConfig,
    all_patches: int,
    lengths: tuple[float, float | None],
    processes: int,
    numbers: Numbers,
) -> _Shape:
    length, padded = lengths[0], lengths[1] or lengths[0]
    image, text = _ratio(config, "image"), _ratio(config, "text")
    patches, words = float(all_patches), length
    if config.image_mask_mode == "drop":
        patches = max(1.0, round(all_patches * (1 - image)))
    if config.text_mask_mode == "drop":
        words, padded = (n - text * max(0.0, n - _SPECIAL) for n in (length, padded))
    if config.compile or not numbers.cpu:
        words = padded  # captions lie end to end in layers.py alone
    micro_batches, contrast = config.gradient_accumulation_steps, "contrastive" in config.terms
    exact = config.accumulation == "exact"
    rows, candidates = config.batch_size / processes, float(config.batch_size * contrast)
    if not exact:
        rows, candidates = rows / micro_batches, candidates / micro_batches
    again = config.exchange == "neighbours" or rows * candidates > _HELD_LOGITS
    return _Shape(
        (patches, words),
        (all_patches, length),
        padded,
        masked_tokens=text * max(0.0, length - _SPECIAL),
        micro_batches=micro_batches,
        pairs=config.batch_size / processes / micro_batches,
        replayed=(micro_batches - 1) / micro_batches if exact and contrast else 0.0,
        candidates=candidates,
        logits=min(rows * candidates, max(_HELD_LOGITS, candidates)),
        again=again,
    )


def _pair_flops(config: TrainingConfig, model: Any, shape: _Shape) -> float:
    """Operations of one pair: towers and decoder, its rows of logits, what a masker looks at."""
    flops = objective_flops(config, model, shape.encoded, shape.whole, shape.padded)
    if config.image_mask in ATTENTION_MASKERS and _ratio(config, "image"):
        flops += tower_flops(model.vit.config, shape.whole[0] / 4 + 1)  # at half the resolution
    if shape.candidates:
        flops += logit_flops(config, model.embed_dim, shape.candidates, shape.again)
    if "mlm" in config.terms:
        embedded = model.bert.embeddings.word_embeddings.weight.numel()
        head = model.decoder.word_head.dense.weight.numel()
        flops += 3 * 2 * shape.masked_tokens * (head + embedded)
    return flops


# -- what is looked at ---------------------------------------------------------------------------


def looked_at(config: TrainingConfig, model_or_preset) -> MultimodalEncoder:
    """The model with the heads that the terms need; a preset, and heads, without any memory."""
    if not isinstance(model_or_preset, str):
        model = model_or_preset
    elif model_or_preset not in PRESETS:
        hint = nearest(model_or_preset, PRESETS)
        raise ValueError(f"preset {model_or_preset!r} is not known; {hint}")
    else:
        model = _preset(model_or_preset)
    if model.decoder is not None or not {"mim", "mlm", "itm"}.intersection(config.terms):
        return model
    with torch.device("meta"):
        twin = MultimodalEncoder.from_architecture(model.architecture())
        prepare_heads(twin, config)
        return twin


def _preset(name: str) -> MultimodalEncoder:
    """A preset whose weights are nowhere, with a vocabulary of the usual size."""
    from ..data.tokenizer import train_wordpiece

    with torch.device("meta"):
        model = MultimodalEncoder.preset(name, tokenizer=train_wordpiece(["an image"]))
        width = model.bert.config.hidden_size
        model.bert.embeddings.word_embeddings = nn.Embedding(VOCABULARY, width)
    model.bert.config.vocab_size = VOCABULARY
    return model


def _device_of(model_or_preset) -> str:
    if isinstance(model_or_preset, str):
        return "cpu"
    kind = model_or_preset.logit_scale.device.type
    return "cpu" if kind == "meta" else kind


def _check(config, model, caption_length, longest_caption, processes: int, image_size: int | None):
    find_masker(config.image_mask, IMAGE_MASKERS)
    if config.image_mask == "layers":
        raise ValueError(
            "image_mask='layers' masks what the images say, not a fraction that is known before; "
            "read it from a trainer: mm.describe(trainer)"
        )
    longest = max(caption_length, longest_caption or 0)
    if not 1 <= caption_length or longest > model.max_length:
        raise ValueError(
            f"captions of {longest:g} tokens are not what the encoder takes; give 1 to "
            f"{model.max_length}"
        )
    if longest_caption is not None and longest_caption < caption_length:
        raise ValueError(
            f"longest_caption={longest_caption:g} is below the mean, caption_length="
            f"{caption_length:g}; give the length of the longest"
        )
    side, patch = image_size or model.image_size, model.patch_size
    if side < patch or side % patch:
        nearer = max(patch, side - side % patch)
        raise ValueError(f"image_size={side} is not a multiple of patch_size {patch}; try {nearer}")
    if processes < 1 or config.batch_size < processes * config.gradient_accumulation_steps:
        raise ValueError(
            f"batch_size={config.batch_size} cannot be cut for {processes} processes and "
            f"{config.gradient_accumulation_steps} micro-batches; take a larger batch_size"
        )


def _ratio(config: TrainingConfig, kind: str) -> float:
    """The fraction that is masked; the mean of its ends where it changes."""
    if kind == "image" and isinstance(config.painted_mask, list):
        masked = [x for row in config.painted_mask for x in row]
        return sum(masked) / len(masked)
    ends = [getattr(config, f"{kind}_mask_{which}") for which in ("ratio", "final_ratio")]
    ends = [end for end in ends if end is not None]
    return sum(ends) / len(ends)


def _more_positions(model: MultimodalEncoder, side: int) -> int:
    """Weights of positions that images of another side have more (or fewer)."""
    return (side**2 - model.num_patches) * model.vit.config.hidden_size
