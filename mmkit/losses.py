"""Losses as functions of features and scale.

Features are unit-length (B, D); `scale` is exp(logit_scale), the inverse temperature, which
`training.step.update` keeps at 100 or below. A caption that is correct for an image (one of its
own, whichever row it stands in) is never its negative, nor the image the caption's.
What is put back is judged where it was hidden, and nowhere else: `mask` True = HIDDEN. All
arithmetic is float32, whatever the features' type. Shapes: B batch, N patches, M hidden words.
After Radford et al. 2021 (CLIP, arXiv:2103.00020), Khosla et al. 2020 (several positives,
arXiv:2004.11362) and Zhai et al. 2023 (SigLIP, arXiv:2303.15343).
Walk-through: notebooks/03_training.ipynb, 07_reconstruction.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.partners import correct_pairs
from .errors import nearest

CONTRASTIVE = ("info_nce", "sigmoid")


def check_loss(name: str):
    """ValueError for a contrastive loss that is not known."""
    if name not in CONTRASTIVE:
        raise ValueError(f"loss={name!r} is not known; {nearest(name, CONTRASTIVE)}")


def similarity(rows: Tensor, columns: Tensor) -> Tensor:
    """Dot products (R, C) of features (R, D) and (C, D) in float32, also under autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows.float() @ columns.float().T


# Who is correct for whom in a batch: None, only row i for row i; (caption_ids (B,), image_captions
# (B, K)), as `Batch.partners`, of which each chunk makes its part of a matrix; a (B, B) bool
# matrix, images in rows; or (B,) numbers, equal for pairs that are correct for each other.
Partners = Tensor | tuple[Tensor, Tensor] | None


def _correct(partners: Partners, rows: Tensor, of_texts: bool = False) -> Tensor | None:
    """(R, C) bool: which of all texts are correct for images `rows`, or images for texts `rows`."""
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
    """The partners of `count` pairs; ValueError where they are of another number."""
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
    """Warn where features (N, D), (M, D) are not of length 1; so: what follows, and what to do."""
    if torch.compiler.is_compiling():
        return
    lengths = torch.cat([x.detach().float().norm(dim=-1) for x in (image, text)])
    lengths = lengths[lengths.isfinite()]
    if len(lengths) and not ((lengths - 1).abs() < 0.01).all():  # bfloat16 is off by 0.004
        words = f"features are {lengths.min():.3g} to {lengths.max():.3g} long, not 1: {so}"
        warnings.warn(words, stacklevel=4)


def _whole_pairs(image: Tensor, text: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Features (B, D) of B pairs, of unit length if asked for; a warning where they are not.

    Raises ValueError where rows cannot belong to each other.
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"image_features are {tuple(image.shape)}, text_features {tuple(text.shape)}; row i of "
            "one belongs to row i of the other: give both as (B, D)"
        )
    if normalize:
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    say_if_no_unit_vectors(
        image, text, "the loss is not one of cosines; give normalize=True, or normalise them before"
    )
    return image, text


def _float(value: Tensor | float) -> Tensor | float:
    """In float32; a plain number stays one."""
    return value.float() if isinstance(value, Tensor) else float(value)


def _softmax_rows(logits: Tensor, targets: Tensor, same: Tensor | None) -> Tensor:
    """Cross entropy (R,) of each row against its own column, its other partners left out."""
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
    """Summed loss of R rows against C candidates; row i's own pair is candidate offset + i.

    image_features, text_features (R, D); all_* (C, D); partners of all C candidates. The sum over
    disjoint rows divided by C is `info_nce`: processes and chunks split the matrix by rows and
    never hold more than (R, C) of it.
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
    """Symmetric softmax loss over the batch, mean of both directions; a scalar in nats.

    image_features, text_features (B, D) unit length, row i of one belongs to row i of the other.
    partners: `batch.partners`, or a (B, B) bool matrix, True where caption j is correct for image
    i: such a pair is neither a target nor a negative (each row keeps its own partner as the one
    target). group_ids (B,): the older way, equal for pairs that are correct for each other. At
    chance the loss is the mean of ln(1 + negatives), ln(B) without other partners. normalize: bring
    the features to unit length first; without it, a warning says where they are not. Raises
    ValueError for shapes that differ.
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
    """Summed sigmoid loss of R pictures against C texts: each pair judged by itself.

    own (R, C) bool: the true pairs; None: there are none. left_out (R, C) bool: pairs that are not
    counted, true ones excepted.
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
    """Summed sigmoid loss of R pictures against C texts; see `sigmoid_loss` and `info_nce_rows`."""
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
    """Each picture-text pair judged by itself: true pair or not; a scalar in nats per picture.

    As SigLIP: sum over all B x B pairs divided by B; `logit_bias` is learned and starts at -10.
    Partners that are not a row's own are left out. partners, group_ids, normalize, and what is
    raised: as `info_nce`.
    """
    image_features, text_features = _whole_pairs(image_features, text_features, normalize)
    partners = _checked(partners, group_ids, len(image_features))
    total = sigmoid_rows(image_features, text_features, scale, logit_bias, 0, partners)
    return total / len(image_features)


# -- what was hidden -------------------------------------------------------------------------


def normalize_patches(patches: Tensor) -> Tensor:
    """Each patch (..., 3 * p * p) with mean 0 and deviation 1 of its own (MAE's norm_pix_loss)."""
    mean, deviation = patch_stats(patches)
    return (patches - mean) / deviation


def patch_stats(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (..., 1) that `normalize_patches` takes out of (..., 3 * p * p)."""
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
    """Error of the hidden patches: prediction, patches (B, N, 3 * p * p), mask (B, N) bool.

    error: "mse" (He et al. 2022, MAE) or "l1" (Xie et al. 2022, SimMIM), of a patch the mean over
    its values. norm_pix_loss: the target is each patch with mean 0 and deviation 1. reduction:
    "mean" over hidden patches (NaN where nothing is hidden), or their "sum": sums over the parts of
    a batch, divided by all that is hidden, are its mean. Raises ValueError for another error.
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
    """Cross entropy of hidden words, in nats: logits (M, V), labels (M,).

    With a mask (B, L) bool: logits (B, L, V) and labels (B, L), of which the hidden ones count.
    exp of the mean is the perplexity. reduction: as `masked_pixel_loss`.
    After Devlin et al. 2019 (BERT, arXiv:1810.04805).
    """
    if mask is not None:
        logits, labels = logits[mask], labels[mask]
    return F.cross_entropy(logits.float(), labels, reduction=reduction)


def matching_loss(logits: Tensor, match: Tensor, reduction: str = "mean") -> Tensor:
    """Binary cross entropy of pairs, in nats: logits (P,), match (P,) 1.0 = a true pair.

    After Li et al. 2021 (ALBEF, arXiv:2107.07651). With one true pair in three, knowing nothing
    but that costs 0.637 nats. reduction: as `masked_pixel_loss`.
    """
    loss = F.binary_cross_entropy_with_logits
    return loss(logits.float(), match.float(), reduction=reduction)
