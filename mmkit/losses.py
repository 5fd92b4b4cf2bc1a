"""Losses as functions of features and scale.

Features are unit-length (B, D); `scale` is exp(logit_scale), the inverse temperature, which
`training.step.update` keeps at 100 or below. A caption that is correct for an image (one of its
own captions, in whichever row) is never a negative of that image, nor the image a negative of it.
Reconstruction losses cover the masked positions only: `mask` True = MASKED. All arithmetic is
float32, whatever the type of the features. Shapes: B batch, N patches, M masked tokens.
After Radford et al. 2021 (CLIP, arXiv:2103.00020), Khosla et al. 2020 (several positives,
arXiv:2004.11362) and Zhai et al. 2023 (SigLIP, arXiv:2303.15343).
Walk-through: notebooks/03_training.ipynb, 07_reconstruction.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.partners import correct_pairs
from .errors import nearest


def check_loss(name: str):
    """Refuse the name of an unknown contrastive loss.

    Args:
        name: a name in CONTRASTIVE.

    Raises:
        ValueError: the name is not in CONTRASTIVE.
    """
    if name not in CONTRASTIVE:
        raise ValueError(f"loss={name!r} is not known; {nearest(name, CONTRASTIVE)}")


def similarity(rows: Tensor, columns: Tensor) -> Tensor:
    """Dot products of features in float32, also under autocast.

    Args:
        rows: (R, D) features.
        columns: (C, D) features.

    Returns:
        (R, C) float32.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return rows.float() @ columns.float().T


# Which captions are correct for which images of a batch: None, only row i for row i; (caption_ids
# (B,), image_captions (B, K)), as `Batch.partners`, from which each chunk builds its part of the
# matrix; a (B, B) bool matrix, images in rows; or (B,) numbers, equal for pairs that are correct
# for each other.
Partners = Tensor | tuple[Tensor, Tensor] | None


def _correct(partners: Partners, rows: Tensor, of_texts: bool = False) -> Tensor | None:
    """(R, C) bool: texts that are correct for the images `rows`, or images for the texts `rows`."""
    if partners is None:
        return None
    if isinstance(partners, Tensor):
        if partners.ndim == 2:
            return (partners.T if of_texts else partners)[rows]
        partners = partners, partners[:, None]
    caption_ids, image_captions = partners
    if of_texts:
        return correct_pairs(image_captions, caption_ids[rows]).T
    return correct_pairs(image_captions[rows], caption_ids)


def _checked(partners: Partners, group_ids: Tensor | None, count: int) -> Partners:
    """The partners of `count` pairs; ValueError if their shape or type does not fit."""
    partners = group_ids if partners is None else partners
    parts = (partners,) if isinstance(partners, Tensor) else partners or ()
    wrong = any(len(part) != count for part in parts)
    if isinstance(partners, Tensor) and partners.ndim > 1:
        wrong |= partners.dtype != torch.bool or partners.shape != (count, count)
    if wrong:
        shapes = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in parts)
        raise ValueError(
            f"partners of {count} pairs are given as {shapes}; give batch.partners, a bool matrix "
            f"({count}, {count}) with images in rows, or None"
        )
    return partners


def say_if_no_unit_vectors(image: Tensor, text: Tensor, so: str) -> None:
    """Warn if features are not of length 1.

    Args:
        image: (N, D) image features.
        text: (M, D) text features.
        so: end of the message: what follows from it, and what to do.
    """
    if torch.compiler.is_compiling():
        return
    lengths = torch.cat([x.detach().float().norm(dim=-1) for x in (image, text)])
    lengths = lengths[lengths.isfinite()]
    if len(lengths) and not ((lengths - 1).abs() < 0.01).all():  # bfloat16 is off by 0.004
        message = f"features are {lengths.min():.3g} to {lengths.max():.3g} long, not 1: {so}"
        warnings.warn(message, stacklevel=4)


def _whole_pairs(image: Tensor, text: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Features (B, D) of B pairs, normalised on request; else a warning if they are not yet.

    Raises ValueError if their shapes differ.
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"image_features are {tuple(image.shape)}, text_features {tuple(text.shape)}; row i of "
            "one belongs to row i of the other: give both as (B, D)"
        )
    if normalize:
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    say_if_no_unit_vectors(
        image,
        text,
        "the similarities are not cosines; normalise the features, or give normalize=True",
    )
    return image, text


def _float(value: Tensor | float) -> Tensor | float:
    """The value in float32; a plain number stays a plain number."""
    return value.float() if isinstance(value, Tensor) else float(value)


def _softmax_rows(logits: Tensor, targets: Tensor, same: Tensor | None) -> Tensor:
    """Cross entropy (R,) of each row with its own column as target, without its other partners."""
    if same is not None:
        others = same.clone()
        others[torch.arange(len(targets), device=targets.device), targets] = False
        logits = logits.masked_fill(others, float("-inf"))
    return F.cross_entropy(logits, targets, reduction="none")


def info_nce_rows(
    image_features: Tensor,
    text_features: Tensor,
    all_image_features: Tensor,
    all_text_features: Tensor,
    scale: Tensor | float,
    offset: int = 0,
    partners: Partners = None,
) -> Tensor:
    """Summed `info_nce` loss of R rows against C candidates.

    The sum over disjoint sets of rows, divided by C, is `info_nce`: processes and chunks split the
    matrix by rows and never hold more than (R, C) of it.

    Args:
        image_features: (R, D) unit length.
        text_features: (R, D) unit length.
        all_image_features: (C, D) unit length.
        all_text_features: (C, D) unit length.
        scale: inverse temperature, above 0.
        offset: index of row 0 among the candidates; row i belongs to candidate offset + i.
        partners: those of all C candidates, as in `info_nce`.

    Returns:
        Scalar, the sum over the R rows of the mean of both directions, in nats.
    """
    rows = torch.arange(len(image_features), device=image_features.device) + offset
    per_image = _float(scale) * similarity(image_features, all_text_features)
    per_text = _float(scale) * similarity(text_features, all_image_features)
    image_loss = _softmax_rows(per_image, rows, _correct(partners, rows))
    text_loss = _softmax_rows(per_text, rows, _correct(partners, rows, of_texts=True))
    return (image_loss + text_loss).sum() / 2


def info_nce(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor | float,
    partners: Partners = None,
    *,
    group_ids: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """Symmetric softmax loss over the batch (Radford et al. 2021, CLIP, arXiv:2103.00020).

    Args:
        image_features: (B, D) unit length.
        text_features: (B, D) unit length; row i belongs to row i of image_features.
        scale: inverse temperature, above 0.
        partners: `batch.partners`, or a (B, B) bool matrix, True where caption j is correct for
            image i. Such a pair is neither a target nor a negative: the one target of each row is
            its own pair. None: each caption is correct for its own image only.
        group_ids: (B,) older form of partners, equal for pairs that are correct for each other.
        normalize: bring the features to unit length first; without it, a warning says if they
            are not.

    Returns:
        Scalar, the mean of both directions, in nats. At chance it is the mean of
        ln(1 + negatives): ln(B) without other partners.

    Raises:
        ValueError: the shapes differ, or the partners are not those of B pairs.

    Example:
        >>> image, text = torch.eye(4), torch.eye(4)  # four pairs, each unlike the others
        >>> round(mm.info_nce(image, text, scale=100.0).item(), 4)
        0.0
        >>> wrong = mm.info_nce(image, text.roll(1, 0), scale=100.0)  # each with another's text
        >>> round(wrong.item(), 4)
        100.0
    """
    image_features, text_features = _whole_pairs(image_features, text_features, normalize)
    partners = _checked(partners, group_ids, len(image_features))
    total = info_nce_rows(
        image_features, text_features, image_features, text_features, scale, 0, partners
    )
    return total / len(image_features)


def sigmoid_block(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor | float,
    logit_bias: Tensor | float,
    own: Tensor | None = None,
    left_out: Tensor | None = None,
) -> Tensor:
    """Summed sigmoid loss of one block of pairs, R images against C texts.

    Args:
        image_features: (R, D) unit length.
        text_features: (C, D) unit length.
        scale: inverse temperature, above 0.
        logit_bias: added to each logit.
        own: (R, C) bool, the true pairs; None = there are none.
        left_out: (R, C) bool, pairs that do not count; true pairs always do.

    Returns:
        Scalar, the sum over the pairs, in nats.
    """
    logits = _float(scale) * similarity(image_features, text_features) + _float(logit_bias)
    loss = -F.logsigmoid(-logits if own is None else torch.where(own, logits, -logits))
    if left_out is not None:
        loss = loss.masked_fill(left_out if own is None else left_out & ~own, 0.0)
    return loss.sum()


def sigmoid_rows(
    image_features: Tensor,
    all_text_features: Tensor,
    scale: Tensor | float,
    logit_bias: Tensor | float,
    offset: int = 0,
    partners: Partners = None,
) -> Tensor:
    """Summed `sigmoid_loss` of R images against C texts.

    Args:
        image_features: (R, D) unit length.
        all_text_features: (C, D) unit length.
        scale: inverse temperature, above 0.
        logit_bias: added to each logit.
        offset: index of row 0 among the candidates, as in `info_nce_rows`.
        partners: those of all C candidates, as in `info_nce`.

    Returns:
        Scalar, the sum over the R x C pairs that count, in nats.
    """
    rows = torch.arange(len(image_features), device=image_features.device) + offset
    columns = torch.arange(len(all_text_features), device=rows.device)
    own = rows[:, None] == columns[None, :]
    left_out = _correct(partners, rows)
    return sigmoid_block(image_features, all_text_features, scale, logit_bias, own, left_out)


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor | float,
    logit_bias: Tensor | float,
    partners: Partners = None,
    *,
    group_ids: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """Sigmoid loss: each image-text pair is classified by itself, as a true pair or not.

    As SigLIP (Zhai et al. 2023, arXiv:2303.15343): the sum over all B x B pairs divided by B;
    `logit_bias` is learned and starts at -10.

    Args:
        image_features: (B, D) unit length.
        text_features: (B, D) unit length; row i belongs to row i of image_features.
        scale: inverse temperature, above 0.
        logit_bias: added to each logit.
        partners: as in `info_nce`; a row's partners other than its own pair do not count.
        group_ids: as in `info_nce`.
        normalize: as in `info_nce`.

    Returns:
        Scalar, in nats per image.

    Raises:
        ValueError: the shapes differ, or the partners are not those of B pairs.

    Example:
        >>> features = torch.eye(4)
        >>> right = mm.sigmoid_loss(features, features, scale=20.0, logit_bias=-10.0)
        >>> wrong = mm.sigmoid_loss(features, features.roll(1, 0), scale=20.0, logit_bias=-10.0)
        >>> round(right.item(), 3), round(wrong.item(), 3)
        (0.0, 20.0)
    """
    image_features, text_features = _whole_pairs(image_features, text_features, normalize)
    partners = _checked(partners, group_ids, len(image_features))
    total = sigmoid_rows(image_features, text_features, scale, logit_bias, 0, partners)
    return total / len(image_features)


Pairs = tuple[Tensor, Tensor]  # image and text features, (R, D) each

# Each contrastive loss by its name in `TrainingConfig.loss`: a function of the features of R rows
# and of all C candidates, scale, logit_bias, the index of row 0 among the candidates, and partners.
# It sums over the R rows; the sum over disjoint rows, divided by C, is the loss of the batch.
CONTRASTIVE: dict[str, Callable[[Pairs, Pairs, Tensor, Tensor, int, Partners], Tensor]] = {
    "info_nce": lambda rows, candidates, scale, bias, offset, partners: info_nce_rows(
        *rows, *candidates, scale, offset, partners
    ),
    "sigmoid": lambda rows, candidates, scale, bias, offset, partners: sigmoid_rows(
        rows[0], candidates[1], scale, bias, offset, partners
    ),
}


# -- what was masked -------------------------------------------------------------------------


def normalize_patches(patches: Tensor) -> Tensor:
    """Give each patch mean 0 and standard deviation 1 (MAE's norm_pix_loss).

    Args:
        patches: (..., 3 * p * p).

    Returns:
        (..., 3 * p * p), each patch normalised by its own `patch_stats`.
    """
    mean, deviation = patch_stats(patches)
    return (patches - mean) / deviation


def patch_stats(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, as `normalize_patches` uses them.

    Args:
        patches: (..., 3 * p * p).

    Returns:
        (mean, deviation), each (..., 1); the variance has 1e-6 added to it.
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


PIXEL_ERRORS = {"mse": F.mse_loss, "l1": F.l1_loss}  # MAE's, SimMIM's


def masked_pixel_loss(
    prediction: Tensor,
    patches: Tensor,
    mask: Tensor,
    norm_pix_loss: bool = False,
    error: str = "mse",
    reduction: str = "mean",
) -> Tensor:
    """Error of the predicted pixels of the masked patches.

    Args:
        prediction: (B, N, 3 * p * p).
        patches: (B, N, 3 * p * p), the pixels that were masked.
        mask: (B, N) bool, True = masked; the other patches do not count.
        norm_pix_loss: take as target each patch with mean 0 and standard deviation 1.
        error: "mse" (He et al. 2022, MAE) or "l1" (Xie et al. 2022, SimMIM); for each patch, the
            mean over its values.
        reduction: "mean" over the masked patches (NaN if nothing is masked), or "sum": the sums of
            micro-batches divided by the number of masked patches of the batch are its mean.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: the error is neither "mse" nor "l1".

    Example:
        >>> patches, prediction = torch.zeros(2, 9, 75), torch.ones(2, 9, 75)
        >>> mask = torch.arange(9).expand(2, -1) >= 4  # the last five patches of each image
        >>> prediction[~mask] = 1000.0  # visible patches do not count
        >>> mm.losses.masked_pixel_loss(prediction, patches, mask).item()
        1.0
    """
    if error not in PIXEL_ERRORS:
        raise ValueError(f"error={error!r} is not known; take one of {', '.join(PIXEL_ERRORS)}")
    target = patches.float()
    if norm_pix_loss:
        target = normalize_patches(target)
    each = PIXEL_ERRORS[error](prediction.float(), target, reduction="none").mean(-1)  # (B, N)
    total = each.masked_fill(~mask, 0.0).sum()  # a product would keep the NaN of a visible one
    return total if reduction == "sum" else total / mask.sum()


def masked_token_loss(
    logits: Tensor, labels: Tensor, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Cross entropy of the masked tokens (Devlin et al. 2019, BERT, arXiv:1810.04805).

    Args:
        logits: (M, V) of the masked tokens; with a mask, (B, L, V) of all.
        labels: (M,) int64 ids of the masked tokens; with a mask, (B, L) of all.
        mask: (B, L) bool, True = masked; the other tokens do not count.
        reduction: as in `masked_pixel_loss`.

    Returns:
        Scalar, in nats; exp of the mean is the perplexity.

    Example:
        >>> logits, labels = torch.zeros(2, 5, 8), torch.ones(2, 5, dtype=torch.int64)
        >>> mask = torch.arange(5).expand(2, -1) == 3  # one masked token in each caption
        >>> loss = mm.losses.masked_token_loss(logits, labels, mask)
        >>> round(loss.exp().item(), 3)  # perplexity of a guess among 8 tokens
        8.0
    """
    if mask is not None:
        logits, labels = logits[mask], labels[mask]
    return F.cross_entropy(logits.float(), labels, reduction=reduction)


def matching_loss(logits: Tensor, match: Tensor, reduction: str = "mean") -> Tensor:
    """Binary cross entropy of pairs (Li et al. 2021, ALBEF, arXiv:2107.07651).

    Args:
        logits: (P,).
        match: (P,) 1.0 = a true pair, 0.0 = a wrong one.
        reduction: as in `masked_pixel_loss`.

    Returns:
        Scalar, in nats; with one true pair in three, the best constant guess has 0.637.
    """
    loss = F.binary_cross_entropy_with_logits
    return loss(logits.float(), match.float(), reduction=reduction)
