"""Features of images and captions: what the encoder gives for a whole data set.

Features are unit-length float32. Shapes: N images, M captions, K captions per image, D width.
Walk-through: notebooks/04_retrieval.ipynb.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.captions import clean_caption
from ..data.dataset import MultimodalDataset
from ..data.images import as_if_not_normalised
from ..data.loader import as_dataset
from ..data.tokenizer import encode_texts
from ..device import autocast_for
from ..distributed import all_gather_with_grad, rank_and_world_size, rank_slice
from ..joint_calls import joint
from ..masking.plan import draw_image_masking, draw_text_masking
from ..masking.text import maskable_tokens
from ..models.attention import eval_mode
from ..models.encoder import MultimodalEncoder


@dataclass
class Features:
    """Features of a whole data set: all its images and all its captions."""

    image_features: Tensor  # (N, D) unit length
    text_features: Tensor  # (M, D) unit length
    caption_ids: Tensor  # (M,) int64, equal for captions of the same tokens
    image_captions: Tensor  # (N, K) int64, caption ids of each image; -1 = none
    first_caption: Tensor  # (N,) int64, row of each image's canonical caption
    pool_caption: Tensor  # (N,) the same for the caption that the fewest images share


def _my_chunks(count: int, size: int) -> list[Tensor]:
    """This process's rows of `count`, in chunks; none where there are fewer rows than processes."""
    return [rows for rows in rank_slice(torch.arange(count))[0].split(size) if len(rows)]


@joint("mm.embed, by itself or in mm.evaluate, mm.Index, probe")
def embed(  # noqa: PLR0913 (by name)
    model: MultimodalEncoder, dataset: MultimodalDataset, *, batch_size: int = 256,
    image_mask: tuple[str, Any] = ("random", 0.0), text_mask: tuple[str, float] = ("random", 0.0),
    image_mode: str = "drop", text_mode: str = "drop", seed: int = 0, mixed_precision: str = "no",
) -> Features:  # fmt: skip
    """Encode all images and ALL captions of a data set; nothing is masked by default.

    Args:
        model, dataset: run in evaluation mode; N images with M captions. Several processes share
            the work, each sample counted once.
        batch_size: images, or captions, per forward pass.
        image_mask, text_mask, seed: (masker name, ratio), and the seed of the masks; ("painted",
            array) takes a bool array (h, w), or one per image (N, h, w), True = masked.
        image_mode, text_mode: what is done with masked tokens, as in `TrainingConfig`.
        mixed_precision: as in `TrainingConfig`; "auto" is faster, "no" is exact.
    Returns:
        `Features` on the CPU.
    Raises:
        ValueError: the number of painted masks is not that of the images.
    Example:
        >>> mm.embed(model, data).image_features.shape
        torch.Size([23, 13])
    """
    dataset = as_dataset(dataset, "dataset").encoded_by(model.tokenizer, model.max_length)
    _, _, first, _ = dataset.encoded_captions()
    common: Any = dict(batch_size=batch_size, seed=seed, mixed_precision=mixed_precision)
    size, images, texts = model.embed_dim, model.encode_image, model.encode_text
    image_features = of_images(model, dataset, images, size, image_mask, image_mode, **common)
    text_features = of_captions(model, dataset, texts, size, text_mask, text_mode, **common)
    rarest = dataset.correct_captions.rarest()
    return Features(image_features, text_features, *dataset.partners(), first, rarest)


@joint("mm.embed, by itself or in mm.evaluate, mm.Index, probe")
def of_images(  # noqa: PLR0913 (by name)
    model: MultimodalEncoder, dataset: MultimodalDataset, encode: Callable[..., Tensor], width: int,
    mask: tuple[str, Any] = ("random", 0.0), mode: str = "drop",
    *, batch_size: int = 256, seed: int = 0, mixed_precision: str = "no",
) -> Tensor:  # fmt: skip
    """Apply `encode(pixel_values, masking, mode)` -> (B, width) to all images of a data set.

    encode is a method of the model, for example; the other arguments are those of `embed`. Returns
    (N, width) float32 on the CPU, computed in evaluation mode.
    """
    device = model.logit_scale.device
    autocast = autocast_for(mixed_precision, device)
    dataset = dataset.encoded_by(model.tokenizer, model.max_length)
    parts: list[Tensor] = []
    for rows in _my_chunks(len(dataset), batch_size):
        batch = dataset.batch(rows).to(device)
        if not parts:
            _say_if_not_normalised(model, batch.pixel_values)
        masked = _of_rows(mask, rows, len(dataset))
        with eval_mode(model), autocast:
            masking = draw_image_masking(
                batch.pixel_values, batch.sample_ids, model.token_info, masked,
                seed=seed, epoch=0, layers=dataset.layers,
            )  # fmt: skip
            parts.append(encode(batch.pixel_values, masking, mode).float())
    features = _joined(parts, width, device)
    _name_images_that_are_not_finite(features, dataset)
    return features


def _say_if_not_normalised(model: MultimodalEncoder, pixel_values: Tensor) -> None:
    if odd := as_if_not_normalised(pixel_values, model.pixel_stats):
        warnings.warn(odd, stacklevel=4)


@joint("mm.embed, by itself or in mm.evaluate, mm.Index, probe")
def of_captions(  # noqa: PLR0913 (by name)
    model: MultimodalEncoder, dataset: MultimodalDataset, encode: Callable[..., Tensor], width: int,
    mask: tuple[str, float] = ("random", 0.0), mode: str = "drop",
    *, canonical: bool = False, batch_size: int = 256, seed: int = 0, mixed_precision: str = "no",
) -> Tensor:  # fmt: skip
    """Apply `encode(input_ids, valid, masking, mode)` -> (B, width) to all M captions.

    canonical takes only the first caption of each image, so that row i belongs to image i; the
    other arguments are those of `of_images`. Returns (M, width) float32 on the CPU.
    """
    device = model.logit_scale.device
    autocast = autocast_for(mixed_precision, device)
    dataset = dataset.encoded_by(model.tokenizer, model.max_length)
    input_ids, lengths, first, counts = dataset.encoded_captions()
    image = torch.repeat_interleave(torch.arange(len(dataset)), counts)  # of each caption
    captions = first if canonical else torch.arange(len(input_ids))
    parts = []
    for part in _my_chunks(len(captions), batch_size):
        rows = captions[part]
        longest = int(lengths[rows].max())
        valid = torch.arange(longest) < lengths[rows, None]
        ids, owner = input_ids[rows, :longest].long(), image[rows]
        ids, valid = ids.to(device), valid.to(device)
        with eval_mode(model), autocast:
            owners = dataset.sample_ids[owner].to(device)
            masking = draw_text_masking(
                ids, valid, owners, model.token_info, mask, seed=seed, epoch=0, mode=mode
            )
            parts.append(encode(ids, valid, masking, mode).float())
    return _joined(parts, width, device)


def _name_images_that_are_not_finite(features: Tensor, dataset: MultimodalDataset) -> None:
    """Warn of rows of features (N, width) that are not finite; names the ids of their images."""
    bad = (~features.isfinite().all(1)).nonzero()[:, 0]
    if not len(bad) or rank_and_world_size()[0]:
        return
    ids = ", ".join(str(int(i)) for i in dataset.sample_ids[bad[:5]])
    pixels = dataset.batch(bad[:5]).pixel_values
    fault = "check the weights, or the numbers are too large for mixed_precision"
    if pixels.is_floating_point() and not pixels.isfinite().all():
        fault = "their pixels are not finite either: check the transform, or leave these images out"
    warnings.warn(
        f"{len(bad):,} of {len(features):,} images have no finite features (sample ids {ids}"
        f"{', …' if len(bad) > 5 else ''}); {fault}",
        stacklevel=2,
    )


def _joined(parts: list[Tensor], width: int, device: torch.device) -> Tensor:
    """The rows (R, width) of all processes on the CPU; a process may have none."""
    return all_gather_with_grad(torch.cat([*parts, torch.zeros(0, width, device=device)])).cpu()


def _of_rows(image_mask: tuple[str, Any], rows: Tensor, count: int) -> tuple[str, Any]:
    """The masks of these rows, where one is painted for each of `count` images."""
    name, value = image_mask
    shape = np.shape(value)
    if len(shape) != 3:
        return image_mask
    if shape[0] != count:
        raise ValueError(f"{shape[0]} painted masks for {count} images; give one per image")
    return name, torch.as_tensor(value)[rows]


def embed_texts(model: MultimodalEncoder, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Encode texts with the model in evaluation mode.

    Args:
        model: an encoder; its tokenizer reads the texts, which are cut at its `max_length`.
        texts, batch_size: M texts, none of them empty, and how many to encode at a time.
    Returns:
        (M, D) float32 on the CPU, unit length.
    Raises:
        ValueError: there is no text, or an empty one.
    Example:
        >>> mm.embed_texts(model, ["a red cat", "a blue boat"]).shape
        torch.Size([2, 13])
    """
    written = not isinstance(texts, str) and all(
        isinstance(t, str) and clean_caption(t) for t in texts
    )
    if not written or not len(texts):
        raise ValueError(f"texts={texts!r}: give a list of texts, none of them empty")
    device, features = model.logit_scale.device, []
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        input_ids, valid = encode_texts(model.tokenizer, part, model.max_length)
        with eval_mode(model):
            features.append(model.encode_text(input_ids.to(device), valid.to(device)).cpu())
    return torch.cat(features)


def patch_token_similarity(
    model: MultimodalEncoder, image: Tensor, text: str
) -> tuple[list[str], Tensor]:
    """Cosines between the tokens of a text and the patches of an image (3, H, W).

    Returns (T tokens, cosines (T, N)), without [CLS] and [SEP]. The states of single patches and
    tokens go through projections that were trained on their mean, so that a map shows a tendency
    and explains no score.
    """
    device = model.logit_scale.device
    input_ids, valid = (
        x.to(device) for x in encode_texts(model.tokenizer, [text], model.max_length)
    )
    with eval_mode(model):
        patches = model.image_projection(model.image_tokens(image[None].to(device))[0, 1:]).float()
        states = model.text_projection(model.text_tokens(input_ids, valid)[0][0]).float()
    inside = maskable_tokens(input_ids, valid, model.special_ids)[0]
    normal = torch.nn.functional.normalize
    cosines = normal(states[inside], dim=-1) @ normal(patches, dim=-1).T
    return model.tokenizer.convert_ids_to_tokens(input_ids[0, inside]), cosines.cpu()
