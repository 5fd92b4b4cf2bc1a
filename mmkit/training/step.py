"""The exact step: the gradient of the whole batch, computed in micro-batches, and the update.

For any number of micro-batches and processes, the gradient is that of the global batch (Gao et al.
2021, arXiv:2101.06983): first all features, then one loss over all of them, then each micro-batch
again with the same masks and dropout. Walk-through: notebooks/03_training.ipynb.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..data.partners import correct_pairs
from ..distributed import all_gather_with_grad, neighbour_exchange, rank_and_world_size, row_counts
from ..losses import CONTRASTIVE, check_loss, sigmoid_block
from ..models.encoder import EncoderOutput, MultimodalEncoder
from .random_state import random_states, set_random_states

MAX_LOGIT_SCALE = math.log(100)  # CLIP's: a temperature below 0.01 makes training unstable
LOGITS = 2**22  # entries of a similarity matrix held at once (16 MB in float32)


def _in_chunks(
    loss_of: Callable[..., Tensor], rows: int, columns: int, keep: bool = True
) -> Tensor:
    """Sum of loss_of(slice) over slices of `rows`, each at most `LOGITS` logits.

    With several slices, or keep=False, the backward pass recomputes the logits of a slice instead
    of keeping them.
    """
    size = max(1, LOGITS // max(1, columns))
    if size >= rows and keep:
        return loss_of(slice(0, rows))
    parts = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    options: dict[str, Any] = dict(use_reentrant=False, preserve_rng_state=False)
    return torch.stack([checkpoint(loss_of, part, **options) for part in parts]).sum()


def contrastive_fraction(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    partners: tuple[Tensor, Tensor] | None,
    kind: str,
    exchange: str = "gather",
) -> Tensor:
    """This process's part of the contrastive loss of the global batch.

    Its rows are compared with the candidates of all processes; the parts of all processes add up to
    `info_nce` (or `sigmoid_loss`) of the joined batch. The logits take (R, C), never (C, C); beyond
    4 million entries, only a slice of that is held at once.

    Args:
        image: (R, D) unit features of this process's rows.
        text: (R, D) unit features of the captions of these rows.
        logit_scale: scalar, the logarithm of the factor of the cosines.
        logit_bias: scalar, for the sigmoid loss.
        partners: of these rows, see `Batch.partners`; None = images and captions are one to one.
        kind: a name in `losses.CONTRASTIVE`.
        exchange: "gather", or "neighbours" (sigmoid only), around a ring of processes.
    Returns:
        A scalar with gradients for all four tensors.
    Raises:
        ValueError: kind is not the name of a loss.
    """
    check_loss(kind)
    rank, _ = rank_and_world_size()
    counts = row_counts(len(image), image.device)
    offset, total, scale = sum(counts[:rank]), sum(counts), logit_scale.exp()
    partners = _partners_of_all(partners, counts)
    if kind == "sigmoid" and exchange == "neighbours":
        return _ring_of_texts(image, text, scale, logit_bias, partners, counts) / total
    candidates = all_gather_with_grad(image, counts), all_gather_with_grad(text, counts)

    def rows_loss(part: slice) -> Tensor:
        rows, first = (image[part], text[part]), offset + part.start
        return CONTRASTIVE[kind](rows, candidates, scale, logit_bias, first, partners)

    return _in_chunks(rows_loss, len(image), total) / total


def _joined(partners: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    """Join the partners of several batches; None where images and captions are one to one."""
    found = [part for part in partners if part is not None]
    if not found:
        return None
    captions, tables = zip(*found, strict=True)
    return torch.cat(captions), _padded(tables)


def _padded(tables: Sequence[Tensor], width: int = 0) -> Tensor:
    """Stack tables of captions, (B, K) each; narrower ones are padded with -1."""
    width = max(width, *(table.shape[1] for table in tables))
    pad = torch.nn.functional.pad
    return torch.cat([pad(table, (0, width - table.shape[1]), value=-1) for table in tables])


def _partners_of_all(partners: tuple[Tensor, Tensor] | None, counts: list[int]):
    """The partners of all processes, whose data is one to one either everywhere or nowhere."""
    if partners is None or len(counts) == 1:
        return partners
    captions, table = partners
    width = max(row_counts(table.shape[1], table.device))
    return all_gather_with_grad(captions, counts), all_gather_with_grad(
        _padded([table], width), counts
    )


def _ring_of_texts(
    image: Tensor, text: Tensor, scale: Tensor, logit_bias: Tensor, partners, counts: list[int]
) -> Tensor:
    """Summed sigmoid loss of this process's images and the texts of each process in turn."""
    rank, rows = rank_and_world_size()[0], torch.arange(len(image), device=image.device)
    captions_of = None if partners is None else partners[0].split(counts)
    own_captions = None if partners is None else partners[1].split(counts)[rank]

    def block(theirs: Tensor, owner: int, part: slice) -> Tensor:
        own = rows[part, None] == rows[None, :] if owner == rank else None
        left_out = None
        if captions_of is not None and own_captions is not None:
            left_out = correct_pairs(own_captions[part], captions_of[owner])
        return sigmoid_block(image[part], theirs, scale, logit_bias, own, left_out)

    total = image.new_zeros(())
    for owner, theirs in neighbour_exchange(text, counts):
        loss_of = functools.partial(block, theirs, owner)
        total = total + _in_chunks(loss_of, len(image), len(theirs), keep=False)
    return total


@dataclass
class Contrast:
    """The contrastive loss, its weight, and how processes exchange features for it."""

    kind: str = "info_nce"  # | "sigmoid"
    exchange: str = "gather"  # | "neighbours", see `contrastive_fraction`
    weight: float = 1.0  # 0 = no contrastive term, and each micro-batch runs only once


@dataclass
class Mechanics:
    """How gradients reach the parameters; the defaults are for one process in float32."""

    grad_scale: Callable[[Tensor], Tensor] = lambda loss: loss  # an fp16 scaler's `scale`
    # keeps DDP from summing gradients before the last micro-batch
    no_sync: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


class Part(Protocol):
    """What the loss needs to know about a part of a batch, a `Batch` or a `MicroBatch`."""

    @property
    def partners(self) -> tuple[Tensor, Tensor] | None:
        """See `Batch.partners`."""

    def __len__(self) -> int: ...


Micro = TypeVar("Micro", bound=Part)


def backward(
    encode: Callable[[Micro], EncoderOutput],
    micro_batches: Sequence[Micro],
    scale_parameters: tuple[nn.Parameter, nn.Parameter],
    contrast: Contrast,
    *,
    whole: Callable[[Micro], tuple[EncoderOutput, Tensor | None]] | None = None,
    how: Mechanics | None = None,
    weight: float = 1.0,
    synchronize: bool = True,
) -> Tensor:
    """Add the gradient of ONE loss over all these micro-batches to every parameter.

    All micro-batches but the last run twice, so that memory grows with one of them, not with all.

    Args:
        encode: the masked forward pass that returns features, the same at each call.
        micro_batches: the parts of this process's batch, in order.
        scale_parameters: logit_scale and logit_bias.
        contrast: the contrastive loss and its weight.
        whole: the forward pass with the other terms: (output, their weighted sum or None).
        how: how gradients reach the parameters; None = `Mechanics()`.
        weight: another factor of the contrastive gradient, besides that of `contrast`.
        synchronize: whether processes sum their gradients at the end.
    Returns:
        This process's part of the contrastive loss, a global mean, unweighted and detached.
    """
    how, whole = how or Mechanics(), whole or (lambda micro: (encode(micro), None))
    device = scale_parameters[0].device
    if not contrast.weight:
        _backward_of_parts(whole, micro_batches, how, synchronize)
        return torch.zeros((), device=device)
    *others, last = micro_batches
    states, features = [], []
    for micro in others:
        states.append(random_states(device))
        with torch.no_grad():
            features.append(_features(encode(micro)))
    alone = synchronize and not others
    # The graph of the last micro-batch is kept: a second pass would only repeat it.
    with contextlib.nullcontext() if alone else how.no_sync():
        kept = whole(last)
    afterwards = random_states(device)
    features.append(_features(kept[0]))
    loss, at_features, at_scales = _loss_and_gradients(
        features, micro_batches, scale_parameters, contrast, weight
    )
    with contextlib.nullcontext() if alone else how.no_sync():
        _pull(kept, at_features[-1], None if others else at_scales, how)
    del kept
    for i, micro in enumerate(others):
        final = i == len(others) - 1
        with contextlib.nullcontext() if final and synchronize else how.no_sync():
            set_random_states(states[i], device)
            _pull(whole(micro), at_features[i], at_scales if final else None, how)
    if others:
        set_random_states(afterwards, device)
    return loss


def _loss_and_gradients(features, micro_batches, scale_parameters, contrast: Contrast, weight):
    """The loss over all features, and its gradients by micro-batch and for the scales."""
    image, text = (torch.cat(parts) for parts in zip(*features, strict=True))
    leaves = [leaf.detach().requires_grad_() for leaf in (image, text, *scale_parameters)]
    partners = _joined([micro.partners for micro in micro_batches])
    loss = contrastive_fraction(
        leaves[0], leaves[1], leaves[2], leaves[3], partners, contrast.kind, contrast.exchange
    )
    # DDP averages over processes; each holds its part of a sum.
    factor = contrast.weight * weight * rank_and_world_size()[1]
    at_image, at_text, *at_scales = torch.autograd.grad(
        loss * factor, leaves, allow_unused=True, materialize_grads=True
    )
    sizes = [len(micro) for micro in micro_batches]
    pairs = list(zip(at_image.split(sizes), at_text.split(sizes), strict=True))
    return loss.detach(), pairs, at_scales


def _pull(
    output: tuple[EncoderOutput, Tensor | None],
    feature_gradients: tuple[Tensor, Tensor],
    scale_grads: list[Tensor] | None,
    how: Mechanics,
):
    """Propagate the gradient at the features of a micro-batch to the parameters.

    output: with its other terms. scale_grads: of logit_scale and logit_bias, which get ONE gradient
    per step (one per micro-batch would multiply it); None for all micro-batches but one.
    """
    (out, rest), (at_image, at_text) = output, feature_gradients
    surrogate = (out.image_features * at_image).sum() + (out.text_features * at_text).sum()
    scales = (out.logit_scale, out.logit_bias)
    once = scale_grads or [torch.zeros_like(x) for x in scales]
    surrogate = surrogate + out.logit_scale * once[0] + out.logit_bias * once[1]
    if rest is not None:
        surrogate = surrogate + rest * rank_and_world_size()[1]
    how.grad_scale(surrogate).backward()


def _backward_of_parts(whole, micro_batches: Sequence, how: Mechanics, synchronize: bool):
    """Add the gradient of terms that are sums over samples; each micro-batch runs once."""
    for i, micro in enumerate(micro_batches):
        final = synchronize and i == len(micro_batches) - 1
        with contextlib.nullcontext() if final else how.no_sync():
            _, rest = whole(micro)
            if rest is not None:
                how.grad_scale(rest * rank_and_world_size()[1]).backward()


def _features(out: EncoderOutput) -> tuple[Tensor, Tensor]:
    """The detached features of an output; keeping its token states would cost more memory."""
    return out.image_features.detach(), out.text_features.detach()


def naive_backward(encode, micro_batches, scale_parameters, *args, **options) -> Tensor:
    """Plain gradient accumulation, for comparison: each micro-batch has only its own negatives.

    Arguments and result are those of `backward`.
    """
    rows, last = sum(map(len, micro_batches)), len(micro_batches) - 1
    loss = torch.zeros((), device=scale_parameters[0].device)
    for i, micro in enumerate(micro_batches):
        options |= dict(weight=len(micro) / rows, synchronize=i == last)
        loss = loss + options["weight"] * backward(
            encode, [micro], scale_parameters, *args, **options
        )
    return loss


def update(
    model: MultimodalEncoder,
    optimizers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    max_norm: float,
) -> float:
    """Clip the gradients, take a step of each optimizer, and clamp logit_scale at ln(100), as CLIP.

    Args:
        model: the encoder with its gradients.
        optimizers: those of all its parameters.
        scaler: the fp16 loss scaler; disabled in other types.
        max_norm: largest norm of the whole gradient; 0 = no clipping.
    Returns:
        The norm before clipping; where it is not finite, no weight has changed.
    """
    active = [o for o in optimizers if _has_gradients(o)]  # a frozen part has none
    for optimizer in active:  # before clipping, or the norm is 65,536 times too large
        scaler.unscale_(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf))
    if math.isfinite(norm):  # the same in all processes: their gradients were summed
        for optimizer in active:
            scaler.step(optimizer)
        with torch.no_grad():  # in the parameter, after the step: its gradient stays alive
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    scaler.update()
    return norm


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
