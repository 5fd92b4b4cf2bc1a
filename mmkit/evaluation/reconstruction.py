"""Reconstruction of masked patches and tokens, and its errors under different contexts.

Errors are those of masked patches and masked tokens alone; `mask` True = MASKED. Pixels are
compared as fractions of full brightness, so that models with different pixel statistics are
measured on one scale. Shapes: B batch, N patches, L text length, M masked tokens, V vocabulary.
Walk-through: notebooks/07_reconstruction.ipynb.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import TrainingConfig
from ..data.batch import Batch
from ..data.dataset import MultimodalDataset
from ..data.loader import as_dataset
from ..device import autocast_for, in_float64
from ..distributed import all_reduce_sum, rank_slice
from ..errors import nearest
from ..joint_calls import joint
from ..losses import patch_stats
from ..masking.core import Masking, patch_grid
from ..masking.plan import draw_maskings, validation_masks
from ..models.attention import eval_mode
from ..models.decoder import ForwardSpec
from ..models.encoder import EncoderOutput, MultimodalEncoder
from ..models.patches import paint_mask, patchify, unpatchify
from ..noise import mask_noise
from ..objective import Maskings, num_pairs, term_sums
from ..older_names import older_arguments, older_attributes, say_renamed

# the other modality that a decoder attends to: the pair's own, none at all, another pair's
CONTEXTS = ("matched", "none", "mismatched")
_TOP = 5


@older_attributes(
    pictures="images",
    word_log_probs="token_log_probs",
    word_labels="token_labels",
    word_places="token_positions",
)
@dataclass
class Reconstruction:
    """A reconstructed batch; None where the model has no such head or nothing was masked."""

    images: Tensor | None  # (B, 3, H, W) uint8: visible patches as they are, masked as predicted
    predictions: Tensor | None  # (B, N, 3 * p * p) predicted patches, brightness in [0, 1]
    pixel_errors: Tensor | None  # (B,) mean squared error of the masked patches, brightness squared
    token_log_probs: Tensor | None  # (M, V) of the masked tokens, row by row
    token_labels: Tensor | None  # (M,) int64, the ids of the tokens that were masked
    token_positions: Tensor | None  # (M, 2) int64: row of the batch, position in the caption


def _context(name: str) -> str:
    """The current name of a context; warns where an older name is given."""
    older = {"right": "matched", "wrong": "mismatched"}
    if name in older:
        say_renamed(f"context={name!r}", repr(older[name]))
    name = older.get(name, name)
    if name not in CONTEXTS:
        raise ValueError(f"context={name!r} is not known; {nearest(name, CONTEXTS)}")
    return name


def partners(correct: Tensor, context: str) -> Tensor | None:
    """Choose for each row the row whose other modality its decoder attends to.

    Args:
        correct: (B, B) bool, True where caption j is correct for image i.
        context: "matched" (the row itself), "none" (-1) or "mismatched" (the next row whose
            caption and image are both wrong for this one; -1 where there is none).
    Returns:
        (B,) int64 for `ForwardSpec.context`; None stands for "matched".
    Raises:
        ValueError: the context is not known.
    """
    if _context(context) == "matched":
        return None
    count = len(correct)
    if context == "none":
        return torch.full((count,), -1, device=correct.device)
    own = torch.arange(count, device=correct.device)
    ahead = (own[:, None] + 1 + own[None, :]) % count  # (B, B): the rows that follow each row
    other = ~(correct | correct.T).gather(1, ahead)
    first = ahead.gather(1, other.long().argmax(1, keepdim=True))[:, 0]
    return first.masked_fill(~other.any(1), -1)


@older_arguments(sees="context")
@torch.no_grad()
def reconstruct(
    model: MultimodalEncoder,
    batch: Batch,
    image_masking: Masking | None,
    text_masking: Masking | None = None,
    *,
    image_mode: str = "drop",
    text_mode: str = "replace",
    context: str = "matched",
) -> Reconstruction:
    """Reconstruct the masked patches and tokens of a batch with the model's decoder.

    A model trained with norm_pix_loss predicts patches without their mean and deviation. These are
    then taken from the masked patch itself, so that the images show more than the model predicts.

    Args:
        model: an encoder with a decoder; it is run in evaluation mode.
        batch: B pairs on the model's device.
        image_masking: the masked patches; None: none are masked.
        text_masking: the masked tokens; None: none are masked.
        image_mode: what is done with masked patches, "drop" or "replace".
        text_mode: the same for tokens, or "80/10/10".
        context: the other modality that the decoder attends to: the pair's own ("matched"), "none",
            or another pair's ("mismatched", see `partners`). A decoder without cross-attention
            ignores it.
    Returns:
        A `Reconstruction`; parts that the model has no head for are None.
    Raises:
        ValueError: the model has no decoder, or the context is not known.
    Example:
        >>> model = model.add_decoder(pixels=True, words=True, width=32)
        >>> batch = data.batch(range(5))
        >>> image, text = mm.masking.draw_maskings(
        ...     batch, model.token_info, seed=0, epoch=0, image=("random", 0.75),
        ...     text=("random", 0.3), predict_tokens=True)
        >>> found = mm.reconstruct(model, batch, image, text)
        >>> found.images.shape, found.pixel_errors.shape
        (torch.Size([5, 3, 15, 15]), torch.Size([5]))
        >>> len(found.token_labels) == int(text.mask.sum())
        True
    """
    decoder = _decoder(model)
    wanted = _wanted(decoder, (image_masking, text_masking), partners(batch.correct(), context))
    back = Reconstruction(*[None] * 6)
    if not wanted.reconstructs:
        return back
    with eval_mode(model):
        out = model(batch, image_masking, text_masking, image_mode, text_mode, wanted)
    if out.pixels is not None and image_masking is not None:
        _fill_images(back, model, batch, image_masking, out.pixels)
    if out.token_logits is not None and text_masking is not None:
        back.token_log_probs = out.token_logits.float().log_softmax(-1)
        back.token_labels = batch.input_ids[text_masking.mask]
        back.token_positions = text_masking.mask.nonzero()
    return back


def _decoder(model: MultimodalEncoder):
    if model.decoder is None:
        raise ValueError(
            "the model has no decoder, so it reconstructs nothing; train it with mim_weight or "
            "mlm_weight above 0 (or call model.add_decoder(...) and train that)"
        )
    return model.decoder


def _wanted(decoder, maskings: Maskings, context: Tensor | None, **more) -> ForwardSpec:
    """A forward pass that predicts what is masked, as far as the decoder has heads for it."""
    image, text = maskings
    pixels = decoder.spec["pixels"] and image is not None
    tokens = decoder.spec["words"] and text is not None
    return ForwardSpec(contrast=False, pixels=pixels, tokens=tokens, context=context, **more)


def _brightness(model: MultimodalEncoder, pixels: Tensor) -> Tensor:
    """Normalised pixels (B, 3, H, W) as fractions of full brightness."""
    mean, std = model.pixel_stats.unbind()
    return pixels * std + mean


def _fill_images(
    back: Reconstruction,
    model: MultimodalEncoder,
    batch: Batch,
    masking: Masking,
    predicted: Tensor,
):
    p = model.patch_size
    whole = model.normalize(batch.pixel_values)
    patches = patchify(whole, p)
    if _decoder(model).norm_pix_loss:
        mean, deviation = patch_stats(patches)
        predicted = predicted * deviation + mean
    grid = patch_grid(whole, p)
    pixels = _brightness(model, unpatchify(predicted, p, grid)).clamp(0, 1)
    back.predictions = patchify(pixels, p)
    true = patchify(_brightness(model, whole), p)
    masked = masking.mask
    error = (back.predictions - true).square().mean(-1)  # (B, N)
    back.pixel_errors = (error * masked).sum(1) / masked.sum(1)  # NaN where nothing is masked
    filled = torch.where(masked[..., None], back.predictions, true.clamp(0, 1))
    back.images = (255 * unpatchify(filled, p, grid)).round().to(torch.uint8)


def guesses(
    model: MultimodalEncoder, batch: Batch, back: Reconstruction, top: int = _TOP
) -> list[dict]:
    """List the tokens of each caption and the model's best guesses for each masked one.

    Args:
        model: the model that reconstructed the batch; its tokenizer names the tokens.
        batch: the B captions.
        back: their reconstruction.
        top: number of guesses per masked token.
    Returns:
        For each caption {"tokens": [(token, kind), …] without padding, "guesses": [{"position",
        "truth", "top": [(token, probability), …]}]}, as `mm.plots.token_guesses` takes them. kind:
        "end" ([CLS], [SEP]), "visible", or "mask" for a masked token, whatever replaced it.
    """
    token_of, special = model.tokenizer.convert_ids_to_tokens, set(model.special_ids.tolist())
    positions = [] if back.token_positions is None else back.token_positions.tolist()
    masked, lines = {tuple(position) for position in positions}, []
    for row, (ids, valid) in enumerate(
        zip(batch.input_ids.tolist(), batch.valid.tolist(), strict=True)
    ):
        valid_ids = [i for i, is_valid in zip(ids, valid, strict=True) if is_valid]
        tokens = [
            ("[mask]", "mask")
            if (row, position) in masked
            else (token_of([i])[0], "end" if i in special else "visible")
            for position, i in enumerate(valid_ids)
        ]
        lines.append({"tokens": tokens, "guesses": []})
    if back.token_log_probs is None or back.token_labels is None or back.token_positions is None:
        return lines
    best = back.token_log_probs.exp().topk(top, dim=1)
    for i, (row, position) in enumerate(back.token_positions.tolist()):
        pairs = zip(token_of(best.indices[i].tolist()), best.values[i].tolist(), strict=True)
        truth = token_of([int(back.token_labels[i])])[0]
        found = {"position": position, "truth": truth, "top": list(pairs)}
        lines[row]["guesses"].append(found)
    return lines


def mean_patches(dataset: MultimodalDataset, patch_size: int, chunk: int = 256) -> Tensor:
    """Average the patches at each position over a data set: a baseline that ignores the image.

    Args:
        dataset: the TRAINING set.
        patch_size: side p of a patch in pixels.
        chunk: images read at a time.
    Returns:
        (N, 3 * p * p) float32, brightness in [0, 1].
    Raises:
        ValueError: a transform has normalised the images, so that their brightness is not known.
    """
    total, count = torch.zeros(()), 0
    for rows in torch.arange(len(dataset)).split(chunk):
        pixels = dataset.batch(rows).pixel_values
        if pixels.is_floating_point():
            raise ValueError(
                "these images are normalised already, so the brightness of their mean patch is not "
                "known; give a data set whose transform returns uint8"
            )
        patches = patchify(in_float64(pixels) / 255, patch_size)
        total, count = total + patches.sum(0).cpu(), count + len(rows)
    return (total / count).float()


@older_arguments(sees="context")
@joint("mm.evaluate_reconstruction")
@torch.no_grad()
def evaluate_reconstruction(  # noqa: PLR0913 (by name)
    model: MultimodalEncoder, dataset: MultimodalDataset, *,
    image_mask: tuple[str, Any] = ("random", 0.75), text_mask: tuple[str, float] = ("random", 0.3),
    image_mode: str = "drop", text_mode: str = "replace", context: str = "matched",
    seed: int = 0, batch_size: int = 128, mixed_precision: str = "no",
    pixel_error: str = "mse", view: str = "masked", baseline: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """Measure how well the masked patches and tokens of a data set are reconstructed.

    Args:
        model, dataset: an encoder with a decoder, and N pairs; canonical captions are read, images
            with pixels that are not finite are left out. Several processes share the work.
        image_mask, text_mask, seed: (masker, ratio); the masks are those of the seed, epoch 0.
        image_mode, text_mode, context: as in `reconstruct`.
        batch_size, mixed_precision: pairs per forward pass; as in `TrainingConfig`.
        pixel_error, view: "mse" or "l1", for "mim_loss"; whose features choose the wrong pairs.
        baseline: (N, 3 * p * p), of `mean_patches(train)`; adds two more errors.
    Returns:
        What the heads and masks allow of "mim_loss" (as trained), "pixel_error" (MSE of brightness
        clipped to [0, 1]; too low to be compared under norm_pix_loss, whose masked patches keep
        their true mean and deviation), "mlm_loss" (nats), "mlm_accuracy", "mlm_perplexity",
        "itm_loss", "itm_accuracy" (two pairs in three are wrong: always answering so scores 0.667;
        candidates are those of one process's batch), "mean_patch_error" and "visible_mean_error"
        (of the baseline, and of each image's mean visible patch, on the same patches).
    Raises:
        ValueError: the model has no decoder, or the context is not known.
    Example:
        >>> model = model.add_decoder(pixels=True, words=False, width=32)
        >>> sorted(mm.evaluate_reconstruction(model, data))
        ['mim_loss', 'pixel_error']
    """
    decoder, device = _decoder(model), model.logit_scale.device
    dataset = as_dataset(dataset, "dataset").encoded_by(model.tokenizer, model.max_length)
    sums = torch.zeros(len(_SUMS), dtype=torch.float64)
    for rows in rank_slice(torch.arange(len(dataset)))[0].split(batch_size):
        if not len(rows):
            continue
        batch = dataset.batch(rows).to(device)
        if batch.pixel_values.is_floating_point():  # one NaN would make every sum NaN
            batch = batch[batch.pixel_values.isfinite().flatten(1).all(1)]
            if not len(batch):
                continue
        with eval_mode(model), autocast_for(mixed_precision, device):
            maskings = draw_maskings(
                batch, model.token_info, seed=seed, epoch=0, image=image_mask, text=text_mask,
                text_mode=text_mode, predict_tokens=True, layers=dataset.layers,
            )  # fmt: skip
            matching = decoder.spec["matching"] and _context(context) == "matched"
            noise = mask_noise(seed, 0, batch.sample_ids, 2, "matching") if matching else None
            attended = partners(batch.correct(), context)
            wanted = _wanted(decoder, maskings, attended, view=view, matching=noise)
            if not wanted.reconstructs:
                break  # the same in all processes; one without rows waits for the others' sums
            out = model(batch, *maskings, image_mode, text_mode, wanted)
        found = _sums(model, out, batch, maskings, wanted, pixel_error, baseline)
        sums += torch.tensor([found.get(name, 0.0) for name in _SUMS], dtype=torch.float64)
    return _means(dict(zip(_SUMS, all_reduce_sum(sums.to(device)).tolist(), strict=True)))


_SUMS = (
    "patches mim pixel_error mean_patch_error visible_mean_error tokens mlm tokens_right "
    "pairs itm pairs_right"
).split()


def _sums(
    model: MultimodalEncoder, out: EncoderOutput, batch: Batch, maskings, wanted, error, baseline
) -> dict[str, float]:
    """The contribution of one batch to each of `_SUMS`."""
    found = {k: float(v) for k, v in term_sums(model, out, batch, maskings, error).items()}
    image, text = maskings
    if out.pixels is not None:
        back = Reconstruction(*[None] * 6)
        _fill_images(back, model, batch, image, out.pixels)
        masked = image.mask
        found["patches"] = float(masked.sum())
        assert back.pixel_errors is not None
        found["pixel_error"] = float((back.pixel_errors * masked.sum(1)).nansum())
        if baseline is not None:
            found |= _baselines(model, batch, masked, baseline)
    if out.token_logits is not None:
        labels = batch.input_ids[text.mask]
        found["tokens"] = float(len(labels))
        found["tokens_right"] = float((out.token_logits.argmax(1) == labels).sum())
    if out.matching is not None:
        found["pairs"] = float(num_pairs(batch.correct(), wanted))
        right = torch.eq(out.matching > 0, out.match == 1)
        found["pairs_right"] = float(right.sum())
    return found


def _baselines(model, batch: Batch, masked: Tensor, baseline: Tensor) -> dict[str, float]:
    """Summed error of the mean patch at each position, and of the mean visible patch."""
    p = model.patch_size
    true = patchify(_brightness(model, model.normalize(batch.pixel_values)), p)
    visible = (~masked)[..., None].float()
    mean = (true * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True).clamp(min=1)
    return {
        name: float(((guess.to(true) - true).square().mean(-1) * masked).sum())
        for name, guess in (("mean_patch_error", baseline), ("visible_mean_error", mean))
    }


def _means(sums: dict[str, float]) -> dict[str, float]:
    means = {}
    if count := sums["patches"]:
        means["mim_loss"] = sums["mim"] / count
        for name in ("pixel_error", "mean_patch_error", "visible_mean_error"):
            if sums[name]:
                means[name] = sums[name] / count
    if count := sums["tokens"]:
        means["mlm_loss"] = sums["mlm"] / count
        means["mlm_accuracy"] = sums["tokens_right"] / count
        means["mlm_perplexity"] = math.exp(min(50.0, means["mlm_loss"]))
    if count := sums["pairs"]:
        means["itm_loss"] = sums["itm"] / count
        means["itm_accuracy"] = sums["pairs_right"] / count
    return means


def example_images(
    model: MultimodalEncoder, dataset: MultimodalDataset, config: TrainingConfig, count: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruct a few images, spread evenly over a data set, under the masks of validation.

    Args:
        model: an encoder with a decoder; with cross-attention it attends to the whole caption.
        dataset: the pairs to choose from.
        config: gives the masker, its ratio and mode, and the seed.
        count: number of images B, fewer where the data set is smaller.
    Returns:
        (original, masked, reconstructed), each (B, 3, H, W) uint8 on the CPU.
    """
    device = model.logit_scale.device
    rows = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long()
    batch = dataset.batch(rows).to(device)
    image = validation_masks(config)["image_mask"]
    with eval_mode(model):
        masking, _ = draw_maskings(
            batch,
            model.token_info,
            seed=config.seed,
            epoch=0,
            image=image,
            layers=dataset.layers,
        )
    back = reconstruct(model, batch, masking, image_mode=config.image_mask_mode)
    original = batch.pixel_values
    if original.is_floating_point():
        original = (255 * _brightness(model, original).clamp(0, 1)).round().to(torch.uint8)
    if masking is None or back.images is None:
        return (original.cpu(),) * 3
    masked = paint_mask(original, masking.mask, model.patch_size)
    return original.cpu(), masked.cpu(), back.images.cpu()
