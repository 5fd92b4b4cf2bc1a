"""What a model puts back: pictures, words, and how well, with and without the other modality.

Errors are of hidden patches and hidden words alone; `mask` True = HIDDEN. Pixels are compared as
fractions of full brightness, so that figures of models with other pixel statistics are of one
scale. Shapes: B batch, N patches, L text length, M hidden words, V vocabulary.
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
from ..device import autocast_for
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

SEES = ("right", "none", "wrong")  # the other modality: the pair's own, none at all, another pair's
_TOP = 5


@dataclass
class PutBack:
    """A batch put back. What the model has no head for, or nothing was hidden of, is None."""

    pictures: Tensor | None  # (B, 3, H, W) uint8: visible patches as they are, hidden as predicted
    predictions: Tensor | None  # (B, N, 3 * p * p) the patches predicted, brightness in [0, 1]
    pixel_errors: Tensor | None  # (B,) mean squared error of the hidden patches, brightness squared
    word_log_probs: Tensor | None  # (M, V) of the hidden words, row by row
    word_labels: Tensor | None  # (M,) int64, what stood there
    word_places: Tensor | None  # (M, 2) int64: row of the batch, place in the caption


def partners(correct: Tensor, sees: str) -> Tensor | None:
    """(B,) which row's other modality a row's decoder looks at; see `ForwardSpec.sees`.

    correct (B, B) bool: caption j is correct for image i. sees: "right" (its own), "none" (-1),
    "wrong" (the next row whose caption and picture are both wrong; -1 where there is none).
    """
    if sees not in SEES:
        raise ValueError(f"sees={sees!r} is not known; {nearest(sees, SEES)}")
    if sees == "right":
        return None
    count = len(correct)
    if sees == "none":
        return torch.full((count,), -1, device=correct.device)
    own = torch.arange(count, device=correct.device)
    ahead = (own[:, None] + 1 + own[None, :]) % count  # (B, B): the rows after each, in turn
    other = ~(correct | correct.T).gather(1, ahead)
    first = ahead.gather(1, other.long().argmax(1, keepdim=True))[:, 0]
    return first.masked_fill(~other.any(1), -1)


@torch.no_grad()
def put_back(
    model: MultimodalEncoder,
    batch: Batch,
    image_masking: Masking | None,
    text_masking: Masking | None = None,
    *,
    image_mode: str = "drop",
    text_mode: str = "replace",
    sees: str = "right",
) -> PutBack:
    """The batch with its hidden patches and words put back by the model's decoder.

    sees: whether the decoder looks at the pair's own other modality, at "none", or at a "wrong" one
    (see `partners`; nothing to a decoder that does not look across). A model of norm_pix_loss
    predicts patches without their mean and deviation: those are then taken from the hidden patch
    itself, so that its pictures know more than the model does. Raises ValueError for a model
    without a decoder.
    """
    decoder = _decoder(model)
    wanted = _wanted(decoder, (image_masking, text_masking), partners(batch.correct(), sees))
    back = PutBack(*[None] * 6)
    if not wanted.put_back:
        return back
    with eval_mode(model):
        out = model(batch, image_masking, text_masking, image_mode, text_mode, wanted)
    if out.pixels is not None and image_masking is not None:
        _fill_pictures(back, model, batch, image_masking, out.pixels)
    if out.word_logits is not None and text_masking is not None:
        back.word_log_probs = out.word_logits.float().log_softmax(-1)
        back.word_labels = batch.input_ids[text_masking.mask]
        back.word_places = text_masking.mask.nonzero()
    return back


def _decoder(model: MultimodalEncoder):
    if model.decoder is None:
        raise ValueError(
            "the model has no decoder, it puts nothing back; train it with pixels_weight or "
            "words_weight above 0 (or call model.add_decoder(...) and train that)"
        )
    return model.decoder


def _wanted(decoder, maskings: Maskings, sees: Tensor | None, **more) -> ForwardSpec:
    """All that the decoder has heads for and that something is masked of."""
    image, text = maskings
    pixels = decoder.spec["pixels"] and image is not None
    words = decoder.spec["words"] and text is not None
    return ForwardSpec(contrast=False, pixels=pixels, words=words, sees=sees, **more)


def _brightness(model: MultimodalEncoder, pixels: Tensor) -> Tensor:
    """Normalised pixels (B, 3, H, W) as fractions of full brightness."""
    mean, std = model.pixel_stats.unbind()
    return pixels * std + mean


def _fill_pictures(
    back: PutBack, model: MultimodalEncoder, batch: Batch, masking: Masking, predicted: Tensor
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
    hidden = masking.mask
    error = (back.predictions - true).square().mean(-1)  # (B, N)
    back.pixel_errors = (error * hidden).sum(1) / hidden.sum(1)  # NaN where nothing is hidden
    filled = torch.where(hidden[..., None], back.predictions, true.clamp(0, 1))
    back.pictures = (255 * unpatchify(filled, p, grid)).round().to(torch.uint8)


def guesses(model: MultimodalEncoder, batch: Batch, back: PutBack, top: int = _TOP) -> list[dict]:
    """For each caption its pieces and, for each hidden one, the model's best guesses.

    A list of {"pieces": [(piece, kind), …] without padding, "guesses": [{"position", "truth",
    "top": [(piece, probability), …]}]}, for `mm.plots.word_guesses`. kind: "end" ([CLS], [SEP]),
    "seen", or "mask" for what was hidden, whatever stood in its place.
    """
    piece_of, special = model.tokenizer.convert_ids_to_tokens, set(model.special_ids.tolist())
    places = [] if back.word_places is None else back.word_places.tolist()
    hidden, lines = {tuple(place) for place in places}, []
    for row, (ids, valid) in enumerate(
        zip(batch.input_ids.tolist(), batch.valid.tolist(), strict=True)
    ):
        real = [i for i, counts in zip(ids, valid, strict=True) if counts]
        pieces = [
            ("[mask]", "mask")
            if (row, place) in hidden
            else (piece_of([i])[0], "end" if i in special else "seen")
            for place, i in enumerate(real)
        ]
        lines.append({"pieces": pieces, "guesses": []})
    if back.word_log_probs is None or back.word_labels is None or back.word_places is None:
        return lines
    best = back.word_log_probs.exp().topk(top, dim=1)
    for i, (row, position) in enumerate(back.word_places.tolist()):
        pairs = zip(piece_of(best.indices[i].tolist()), best.values[i].tolist(), strict=True)
        truth = piece_of([int(back.word_labels[i])])[0]
        found = {"position": position, "truth": truth, "top": list(pairs)}
        lines[row]["guesses"].append(found)
    return lines


def mean_patches(dataset: MultimodalDataset, patch_size: int, chunk: int = 256) -> Tensor:
    """The mean patch at each place, (N, 3 * p * p), brightness in [0, 1].

    What to predict of a hidden patch without looking at the picture. dataset: the TRAINING set.
    Raises ValueError for pictures that a transform has normalised: their brightness is not known.
    """
    total, count = torch.zeros(()), 0
    for rows in torch.arange(len(dataset)).split(chunk):
        pixels = dataset.batch(rows).pixel_values
        if pixels.is_floating_point():
            raise ValueError(
                "these pictures are normalised already: their mean patch has no brightness; give a "
                "data set whose transform returns uint8"
            )
        patches = patchify(pixels.double() / 255, patch_size)
        total, count = total + patches.sum(0).cpu(), count + len(rows)
    return (total / count).float()


@joint("mm.evaluate_reconstruction")
@torch.no_grad()
def evaluate_reconstruction(  # noqa: PLR0913 (by name)
    model: MultimodalEncoder,
    dataset: MultimodalDataset,
    *,
    image_mask: tuple[str, Any] = ("random", 0.75),
    text_mask: tuple[str, float] = ("random", 0.3),
    image_mode: str = "drop",
    text_mode: str = "replace",
    sees: str = "right",
    seed: int = 0,
    batch_size: int = 128,
    mixed_precision: str = "no",
    pixel_error: str = "mse",
    view: str = "masked",
    baseline: Tensor | None = None,
) -> dict[str, float]:
    """How well hidden patches and words of a data set (canonical captions) are put back.

    Returns, as far as the model has heads and something is hidden: "pixels_loss" (as trained),
    "pixel_error" (mean squared error of hidden patches, brightness in [0, 1]), "words_loss" (nats),
    "words_accuracy", "words_perplexity", "matching_loss" and "matching_accuracy" (two pairs in
    three are wrong: always saying so scores 0.667; candidates are those of a batch of this size on
    one process, drawn by the features of the masked or the unmasked `view`). Pixels are clipped to
    [0, 1]; of a model of norm_pix_loss they have the mean and deviation of the hidden patch itself,
    so that its error is too good to be compared. baseline (N, 3 * p * p), from
    `mean_patches(train)`, adds "mean_patch_error" (its error on the same patches) and
    "visible_mean_error" (that of the mean visible patch of each picture). The masks are those of
    `seed`, epoch 0. Images with pixels that are not finite are left out. Several processes share
    the work.
    """
    decoder, device = _decoder(model), model.logit_scale.device
    dataset = as_dataset(dataset, "dataset").encoded_by(model.tokenizer, model.max_length)
    sums = torch.zeros(len(_SUMS), dtype=torch.float64)
    for rows in rank_slice(torch.arange(len(dataset)))[0].split(batch_size):
        if not len(rows):
            continue
        batch = dataset.batch(rows).to(device)
        if batch.pixel_values.is_floating_point():  # one that is not finite would spoil all sums
            batch = batch[batch.pixel_values.isfinite().flatten(1).all(1)]
            if not len(batch):
                continue
        with eval_mode(model), autocast_for(mixed_precision, device):
            maskings = draw_maskings(
                batch, model.token_info, seed=seed, epoch=0, image=image_mask, text=text_mask,
                text_mode=text_mode, predict_words=True, layers=dataset.layers,
            )  # fmt: skip
            matching = decoder.spec["matching"] and sees == "right"
            noise = mask_noise(seed, 0, batch.sample_ids, 2, "matching") if matching else None
            seen = partners(batch.correct(), sees)
            wanted = _wanted(decoder, maskings, seen, view=view, matching=noise)
            if not wanted.put_back:
                break  # the same in all processes; one without rows waits for their sums
            out = model(batch, *maskings, image_mode, text_mode, wanted)
        found = _sums(model, out, batch, maskings, wanted, pixel_error, baseline)
        sums += torch.tensor([found.get(name, 0.0) for name in _SUMS], dtype=torch.float64)
    return _means(dict(zip(_SUMS, all_reduce_sum(sums.to(device)).tolist(), strict=True)))


_SUMS = (
    "patches pixels pixel_error mean_patch_error visible_mean_error words_seen words words_right "
    "pairs matching matching_right"
).split()


def _sums(
    model: MultimodalEncoder, out: EncoderOutput, batch: Batch, maskings, wanted, error, baseline
) -> dict[str, float]:
    """What a batch adds to each of `_SUMS`."""
    found = {k: float(v) for k, v in term_sums(model, out, batch, maskings, error).items()}
    image, text = maskings
    if out.pixels is not None:
        back = PutBack(*[None] * 6)
        _fill_pictures(back, model, batch, image, out.pixels)
        hidden = image.mask
        found["patches"] = float(hidden.sum())
        assert back.pixel_errors is not None
        found["pixel_error"] = float((back.pixel_errors * hidden.sum(1)).nansum())
        if baseline is not None:
            found |= _baselines(model, batch, hidden, baseline)
    if out.word_logits is not None:
        labels = batch.input_ids[text.mask]
        found["words_seen"] = float(len(labels))
        found["words_right"] = float((out.word_logits.argmax(1) == labels).sum())
    if out.matching is not None:
        found["pairs"] = float(num_pairs(batch.correct(), wanted))
        right = torch.eq(out.matching > 0, out.match == 1)
        found["matching_right"] = float(right.sum())
    return found


def _baselines(model, batch: Batch, hidden: Tensor, baseline: Tensor) -> dict[str, float]:
    """Summed error of the mean patch at its place, and of the mean visible patch."""
    p = model.patch_size
    true = patchify(_brightness(model, model.normalize(batch.pixel_values)), p)
    seen = (~hidden)[..., None].float()
    visible = (true * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
    return {
        name: float(((guess.to(true) - true).square().mean(-1) * hidden).sum())
        for name, guess in (("mean_patch_error", baseline), ("visible_mean_error", visible))
    }


def _means(sums: dict[str, float]) -> dict[str, float]:
    means = {}
    if count := sums["patches"]:
        means["pixels_loss"] = sums["pixels"] / count
        for name in ("pixel_error", "mean_patch_error", "visible_mean_error"):
            if sums[name]:
                means[name] = sums[name] / count
    if count := sums["words_seen"]:
        means["words_loss"] = sums["words"] / count
        means["words_accuracy"] = sums["words_right"] / count
        means["words_perplexity"] = math.exp(min(50.0, means["words_loss"]))
    if count := sums["pairs"]:
        means["matching_loss"] = sums["matching"] / count
        means["matching_accuracy"] = sums["matching_right"] / count
    return means


def example_pictures(
    model: MultimodalEncoder, dataset: MultimodalDataset, config: TrainingConfig, count: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """(original, masked, put back) of pictures spread evenly over a data set, (B, 3, H, W) uint8.

    Masks are those of a validation; the caption is seen where the decoder looks across.
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
    back = put_back(model, batch, masking, image_mode=config.image_mask_mode)
    original = batch.pixel_values
    if original.is_floating_point():
        original = (255 * _brightness(model, original).clamp(0, 1)).round().to(torch.uint8)
    if masking is None or back.pictures is None:
        return (original.cpu(),) * 3
    masked = paint_mask(original, masking.mask, model.patch_size)
    return original.cpu(), masked.cpu(), back.pictures.cpu()
