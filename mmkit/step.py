"""The exact step: the gradient of the whole batch, in pieces.

Whatever the number of micro-batches and of processes, the gradient is the one of the global batch
(Gao et al. 2021, arXiv:2101.06983): features first, then one loss over all of them, then each
micro-batch again, its masks and dropout replayed. Walk-through: notebooks/03_training.ipynb.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .data import Batch
from .distributed import gather_rows, row_counts, world
from .encoder import EncoderOutput
from .losses import info_nce_rows, sigmoid_rows


def contrastive_share(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, groups: Tensor, kind: str
) -> Tensor:
    """This process's rows against the candidates of all processes: its part of the global mean.

    image, text (R, D), groups (R,); the parts of all processes add up to `info_nce` (or
    `sigmoid_loss`) of the joined batch. Memory for logits is (R, C), never (C, C).
    """
    rank, _ = world()
    counts = row_counts(len(image), image.device)
    offset, total = sum(counts[:rank]), sum(counts)
    groups, all_text = gather_rows(groups, counts), gather_rows(text, counts)
    scale = logit_scale.exp()
    if kind == "sigmoid":
        rows = sigmoid_rows(image, all_text, scale, logit_bias, offset, groups)
    else:
        all_image = gather_rows(image, counts)
        rows = info_nce_rows(image, text, all_image, all_text, scale, offset, groups)
    return rows / total


def _generators(device: torch.device) -> list[Tensor]:
    """State of the generators that dropout draws from."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _set_generators(states: list[Tensor], device: torch.device):
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def backward(
    encode: Callable[[Batch], EncoderOutput],
    micro_batches: list[Batch],
    scale_parameters: tuple[nn.Parameter, nn.Parameter],
    kind: str,
    *,
    weight: float = 1.0,
    grad_scale: Callable[[Tensor], Tensor] = lambda x: x,
    no_sync: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    synchronize: bool = True,
) -> Tensor:
    """Add the gradient of ONE loss over all these micro-batches to every parameter; returns the
    loss.

    encode: the masked forward pass, masks a pure function of the batch. scale_parameters:
    logit_scale and logit_bias. kind: "info_nce" or "sigmoid". weight multiplies the gradient. With
    several micro-batches each runs twice, and memory grows with the micro-batch, not with the
    batch.
    grad_scale: an fp16 scaler's `scale`. no_sync: keeps DDP from summing gradients before the last
    micro-batch. The loss is this process's part of the global mean.
    """
    replay, device = len(micro_batches) > 1, micro_batches[0].sample_ids.device
    outputs, generators = [], []
    for batch in micro_batches:
        generators.append(_generators(device))
        with torch.set_grad_enabled(not replay):
            outputs.append(encode(batch))

    image = torch.cat([o.image_features for o in outputs])
    text = torch.cat([o.text_features for o in outputs])
    leaves = [leaf.detach().requires_grad_() for leaf in (image, text, *scale_parameters)]
    groups = torch.cat([batch.group_ids for batch in micro_batches])
    loss = contrastive_share(leaves[0], leaves[1], leaves[2], leaves[3], groups, kind)
    factor = weight * world()[1]  # DDP averages over processes; each holds its part of a sum
    image_grad, text_grad, *scale_grads = torch.autograd.grad(
        loss * factor, leaves, allow_unused=True, materialize_grads=True
    )
    sizes = [len(batch) for batch in micro_batches]
    pieces = zip(micro_batches, image_grad.split(sizes), text_grad.split(sizes), strict=True)

    for i, (batch, image_piece, text_piece) in enumerate(pieces):
        final = i == len(micro_batches) - 1
        with contextlib.nullcontext() if final and synchronize else no_sync():
            if replay:
                _set_generators(generators[i], device)
                outputs[i] = encode(batch)
            out = outputs[i]
            surrogate = (out.image_features * image_piece).sum()
            surrogate = surrogate + (out.text_features * text_piece).sum()
            # logit_scale has ONE gradient per step; once per micro-batch would multiply it.
            once = [g if final else torch.zeros_like(g) for g in scale_grads]
            surrogate = surrogate + out.logit_scale * once[0] + out.logit_bias * once[1]
            grad_scale(surrogate).backward()
    return loss.detach()


def naive_backward(encode, micro_batches: list[Batch], *args, no_sync, **options) -> Tensor:
    """Plain accumulation, for comparison: each micro-batch sees only its own negatives."""
    rows, last = sum(map(len, micro_batches)), len(micro_batches) - 1
    loss = torch.zeros((), device=micro_batches[0].sample_ids.device)
    for i, batch in enumerate(micro_batches):
        weight = len(batch) / rows
        part = backward(
            encode, [batch], *args, weight=weight, no_sync=no_sync, synchronize=i == last, **options
        )
        loss = loss + weight * part
    return loss
