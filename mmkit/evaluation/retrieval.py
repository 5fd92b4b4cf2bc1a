"""Find pictures by words and words by pictures.

Features are unit-length float32. N pictures may have M captions; a caption is correct for the
pictures that have it (data/partners.py). Shapes: N pictures, M captions, K of a picture, D width.
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
from ..data.partners import correct_pairs, partner_counts
from ..data.tokenizer import encode_texts
from ..device import autocast_for
from ..distributed import all_gather_with_grad, rank_and_world_size, rank_slice
from ..joint_calls import joint
from ..losses import check_loss, info_nce_rows, say_if_no_unit_vectors, sigmoid_rows, similarity
from ..masking.plan import draw_image_masking, draw_text_masking
from ..masking.text import maskable_tokens
from ..models.attention import eval_mode
from ..models.encoder import MultimodalEncoder

_MATRIX = 2**25  # entries of a similarity matrix held at once (128 MB in float32)


@dataclass
class Features:
    """A whole data set seen by a model: all its pictures and all its captions."""

    image_features: Tensor  # (N, D) unit length
    text_features: Tensor  # (M, D) unit length
    caption_ids: Tensor  # (M,) int64, equal for captions of the same tokens
    image_captions: Tensor  # (N, K) int64, of all captions of each picture; -1 = none
    first_caption: Tensor  # (N,) int64, row of each picture's canonical caption
    pool_caption: Tensor  # (N,) the same, but of the caption that fewest pictures share


def _chunks(rows: int, columns: int) -> list[slice]:
    """Slices of `rows` so that slice x columns stays within `_MATRIX` entries."""
    size = max(1, _MATRIX // max(1, columns))
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


def _my_chunks(count: int, size: int) -> list[Tensor]:
    """This process's rows of `count`, in chunks; none where there are fewer rows than processes."""
    return [rows for rows in rank_slice(torch.arange(count))[0].split(size) if len(rows)]


@joint("mm.embed, by itself or in mm.evaluate, mm.Index, probe")
def embed(  # noqa: PLR0913 (by name)
    model: MultimodalEncoder,
    dataset: MultimodalDataset,
    *,
    batch_size: int = 256,
    image_mask: tuple[str, Any] = ("random", 0.0),
    text_mask: tuple[str, float] = ("random", 0.0),
    image_mode: str = "drop",
    text_mode: str = "drop",
    seed: int = 0,
    mixed_precision: str = "no",
) -> Features:
    """Features of all pictures and ALL captions of a data set, on the CPU; nothing hidden by
    default.

    image_mask, text_mask: (masker name, ratio) to see the model under masks; ("painted", array)
    takes an array (h, w), or one per picture (N, h, w), true = hidden. image_mode, text_mode: what
    is done with the hidden, as in `TrainingConfig`. mixed_precision: as there; "auto" is faster,
    "no" is exact. Several processes share the work, each sample counted once.
    """
    dataset = as_dataset(dataset, "dataset").encoded_by(model.tokenizer, model.max_length)
    _, _, first, _ = dataset.encoded_captions()
    common: Any = dict(batch_size=batch_size, seed=seed, mixed_precision=mixed_precision)
    size, images, texts = model.embed_dim, model.encode_image, model.encode_text
    image_features = of_pictures(model, dataset, images, size, image_mask, image_mode, **common)
    text_features = of_captions(model, dataset, texts, size, text_mask, text_mode, **common)
    rarest = dataset.correct_captions.rarest()
    return Features(image_features, text_features, *dataset.partners(), first, rarest)


@joint("mm.embed, by itself or in mm.evaluate, mm.Index, probe")
def of_pictures(  # noqa: PLR0913 (by name)
    model: MultimodalEncoder,
    dataset: MultimodalDataset,
    encode: Callable[..., Tensor],
    width: int,
    mask: tuple[str, Any] = ("random", 0.0),
    mode: str = "drop",
    *,
    batch_size: int = 256,
    seed: int = 0,
    mixed_precision: str = "no",
) -> Tensor:
    """What `encode(pixel_values, masking, mode)`, (B, width), gives for all pictures of a data set.

    (N, width) float32 on the CPU, with the model at rest. encode: a method of the model, say; the
    rest as in `embed`, whose first half this is.
    """
    device = model.logit_scale.device
    autocast = autocast_for(mixed_precision, device)
    dataset = dataset.encoded_by(model.tokenizer, model.max_length)
    parts: list[Tensor] = []
    for rows in _my_chunks(len(dataset), batch_size):
        batch = dataset.batch(rows).to(device)
        if not parts:
            _say_if_not_normalised(model, batch.pixel_values)
        hidden = _of_rows(mask, rows, len(dataset))
        with eval_mode(model), autocast:
            masking = draw_image_masking(
                batch.pixel_values,
                batch.sample_ids,
                model.token_info,
                hidden,
                seed=seed,
                epoch=0,
                layers=dataset.layers,
            )
            parts.append(encode(batch.pixel_values, masking, mode).float())
    features = _joined(parts, width, device)
    _name_images_that_are_not_finite(features, dataset)
    return features


def _say_if_not_normalised(model: MultimodalEncoder, pixel_values: Tensor) -> None:
    if odd := as_if_not_normalised(pixel_values, model.pixel_stats):
        warnings.warn(odd, stacklevel=4)


@joint("mm.embed, by itself or in mm.evaluate, mm.Index, probe")
def of_captions(  # noqa: PLR0913 (by name)
    model: MultimodalEncoder,
    dataset: MultimodalDataset,
    encode: Callable[..., Tensor],
    width: int,
    mask: tuple[str, float] = ("random", 0.0),
    mode: str = "drop",
    *,
    canonical: bool = False,
    batch_size: int = 256,
    seed: int = 0,
    mixed_precision: str = "no",
) -> Tensor:
    """What `encode(input_ids, valid, masking, mode)`, (B, width), gives for all M captions.

    (M, width) float32 on the CPU, as `of_pictures`. canonical: only each picture's first caption,
    so that row i belongs to picture i.
    """
    device = model.logit_scale.device
    autocast = autocast_for(mixed_precision, device)
    dataset = dataset.encoded_by(model.tokenizer, model.max_length)
    input_ids, lengths, first, counts = dataset.encoded_captions()
    picture = torch.repeat_interleave(torch.arange(len(dataset)), counts)  # picture of each caption
    captions = first if canonical else torch.arange(len(input_ids))
    parts = []
    for part in _my_chunks(len(captions), batch_size):
        rows = captions[part]
        longest = int(lengths[rows].max())
        valid = torch.arange(longest) < lengths[rows, None]
        ids, owner = input_ids[rows, :longest].long(), picture[rows]
        ids, valid = ids.to(device), valid.to(device)
        with eval_mode(model), autocast:
            owners = dataset.sample_ids[owner].to(device)
            masking = draw_text_masking(
                ids, valid, owners, model.token_info, mask, seed=seed, epoch=0, mode=mode
            )
            parts.append(encode(ids, valid, masking, mode).float())
    return _joined(parts, width, device)


def _name_images_that_are_not_finite(features: Tensor, dataset: MultimodalDataset) -> None:
    """Warn of the rows of features (N, width) that are not finite, by the ids of their images."""
    bad = (~features.isfinite().all(1)).nonzero()[:, 0]
    if not len(bad) or rank_and_world_size()[0]:
        return
    ids = ", ".join(str(int(i)) for i in dataset.sample_ids[bad[:5]])
    pixels = dataset.batch(bad[:5]).pixel_values
    fault = "the weights, or numbers too large for mixed_precision"
    if pixels.is_floating_point() and not pixels.isfinite().all():
        fault = "their pixels are not either: check the transform, or leave these images out"
    warnings.warn(
        f"{len(bad):,} of {len(features):,} images have no finite features (sample ids {ids}"
        f"{', …' if len(bad) > 5 else ''}); {fault}",
        stacklevel=2,
    )


def _joined(parts: list[Tensor], width: int, device: torch.device) -> Tensor:
    """All processes' rows (R, width) on the CPU; a process may have none."""
    return all_gather_with_grad(torch.cat([*parts, torch.zeros(0, width, device=device)])).cpu()


def _of_rows(image_mask: tuple[str, Any], rows: Tensor, count: int) -> tuple[str, Any]:
    """The mask of these rows, where one was painted for each of `count` pictures."""
    name, value = image_mask
    shape = np.shape(value)
    if len(shape) != 3:
        return image_mask
    if shape[0] != count:
        raise ValueError(f"{shape[0]} painted masks for {count} pictures; give one per picture")
    return name, torch.as_tensor(value)[rows]


def _recall(
    queries: Tensor, candidates: Tensor, correct_of: Callable[[slice], Tensor], ks: Sequence[int]
) -> dict[int, float]:
    """Share of queries whose best correct candidate is among the k best, for each k.

    correct_of(rows) (R, C) bool: the candidates that are correct for these queries.
    """
    hits = dict.fromkeys(ks, 0)
    finite = candidates.isfinite().all(1)  # NaN is never ahead of anything, and never found
    for rows in _chunks(len(queries), len(candidates)):
        correct = correct_of(rows)
        if not correct.any(1).all():
            row = rows.start + int((~correct.any(1)).nonzero()[0])
            raise ValueError(f"query {row} has no correct candidate; check the partners")
        scores = similarity(queries[rows], candidates).masked_fill(~finite, float("-inf"))
        best = scores.masked_fill(~correct, float("-inf")).amax(1, keepdim=True)
        # Ties count against us: a model that maps everything to one point scores 0, not 100 %.
        ahead = ((scores >= best) & ~correct).sum(1)
        found = queries[rows].isfinite().all(1) & best[:, 0].isfinite()
        for k in ks:
            hits[k] += int((found & (ahead < k)).sum())
    return {k: hit / len(queries) for k, hit in hits.items()}


def recall_at_k(
    image_features: Tensor,
    text_features: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    image_groups: Tensor | None = None,
    text_groups: Tensor | None = None,
    *,
    partners: tuple[Tensor, Tensor] | Tensor | None = None,
) -> dict[str, dict[int, float]]:
    """Recall@K in both directions, as fractions: {"image_to_text": {1: ...}, "text_to_image":
    {...}}.

    image_features (N, D), text_features (M, D), unit length. partners says which caption is correct
    for which picture: (caption_ids (M,), image_captions (N, K)) as `MultimodalDataset.partners`
    gives it, or a bool matrix (N, M); image_groups (N,) and text_groups (M,), equal where they
    belong together, are the simple case of it. Without any row i belongs to row i, and N must equal
    M. A query counts if ANY correct candidate is among its K best (Karpathy & Fei-Fei 2015). Ties
    count as misses, and so do features that are not finite: for themselves alone, with a warning,
    as for features that are no unit vectors. A K above the number of candidates says nothing and is
    left out, with a warning. Works in chunks: 100,000 pairs never hold more than 128 MB of the
    matrix at once. Raises ValueError for no pairs, for a K below 1, and where nothing says what
    belongs together.
    """
    images, texts = len(image_features), len(text_features)
    if not images or not texts:
        raise ValueError(f"{images} pictures and {texts} texts: give at least one of each")
    if (image_groups is None) != (text_groups is None):
        raise ValueError("only one of image_groups and text_groups is given; give both or none")
    if partners is None and image_groups is not None and text_groups is not None:
        partners = text_groups, image_groups[:, None]
    if partners is None:
        if images != texts:
            raise ValueError(
                f"{images} pictures and {texts} texts: give partners, dataset.partners() say, so "
                "that it is known which belong together"
            )
        own = torch.arange(images, device=image_features.device)
        partners = own, own[:, None]
    _say_what_is_not_finite(image_features, text_features)
    ranked = "they are ranked by dot products, not by cosines; normalise them before"
    say_if_no_unit_vectors(image_features, text_features, ranked)

    def texts_of(rows: slice) -> Tensor:
        if isinstance(partners, Tensor):
            return partners[rows]
        return correct_pairs(partners[1][rows], partners[0])

    def images_of(rows: slice) -> Tensor:
        if isinstance(partners, Tensor):
            return partners.T[rows]
        return correct_pairs(partners[1], partners[0][rows]).T

    ways = {
        "image_to_text": (image_features, text_features, texts_of),
        "text_to_image": (text_features, image_features, images_of),
    }
    return {way: _recall(*found, _meaningful(ks, len(found[1]))) for way, found in ways.items()}


def chance_of_recall(dataset: MultimodalDataset, k: int = 1) -> tuple[float, float]:
    """Recall@K of an order drawn at random, image to text and text to image, with all partners."""
    captions, images = dataset.partners()
    counts = partner_counts(images, captions)
    chances = []
    for right, candidates in zip(counts, (len(captions), len(images)), strict=True):
        drawn = torch.arange(min(k, candidates), dtype=torch.float64)
        wrong = (candidates - right.double()[:, None] - drawn).clamp(min=0)
        chances.append(1 - (wrong / (candidates - drawn)).prod(1).mean().item())
    return chances[0], chances[1]


def _meaningful(ks: Sequence[int], candidates: int) -> list[int]:
    """Those of `ks` that ask something of so many candidates; a warning for the others."""
    if any(k < 1 or k != int(k) for k in ks):
        raise ValueError(f"ks={tuple(ks)!r}: each must be a whole number, 1 or more")
    if above := [k for k in ks if k > candidates]:
        names = ", ".join(f"R@{k}" for k in above)
        warnings.warn(
            f"{names} of {candidates} candidates would be 100 % for any model: left out",
            stacklevel=3,
        )
    return [int(k) for k in ks if k <= candidates]


def _say_what_is_not_finite(image_features: Tensor, text_features: Tensor) -> None:
    for name, features in (("pictures", image_features), ("texts", text_features)):
        bad = (~features.isfinite().all(1)).nonzero()[:, 0].tolist()
        if bad:
            warnings.warn(
                f"features of {len(bad):,} of {len(features):,} {name} are not finite (the first "
                f"is row {bad[0]}): they count as misses, and are in no loss",
                stacklevel=3,
            )


@torch.no_grad()
def pool_loss(model: MultimodalEncoder, features: Features, loss: str | None = None) -> float:
    """The loss over the whole set as ONE pool of negatives, in chunks; a caption of each picture,
    the first or, where captions are shared, the one that fewest others have.

    loss: "info_nce" or "sigmoid"; None = the one that the model is trained by. It does not depend
    on any batch size; chance is ln(N) for "info_nce" where no two pictures share a caption. Pairs
    whose features are not finite are left out (`recall_at_k` says how many). Raises ValueError for
    another loss.
    """
    check_loss(loss := loss or model.loss)
    images, texts = features.image_features, features.text_features[features.pool_caption]
    captions, table = features.caption_ids[features.pool_caption], features.image_captions
    finite = (images.isfinite() & texts.isfinite()).all(1)
    if finite.any() and not finite.all():
        images, texts, captions, table = (x[finite] for x in (images, texts, captions, table))
    scale, partners = model.logit_scale.exp().cpu(), (captions, table)
    total = 0.0
    for rows in _chunks(len(images), len(images)):
        own = (images[rows], texts[rows])
        if loss == "sigmoid":
            bias = model.logit_bias.cpu()
            total += float(sigmoid_rows(own[0], texts, scale, bias, rows.start, partners))
        else:
            total += float(info_nce_rows(*own, images, texts, scale, rows.start, partners))
    return total / len(images)


def score(
    model: MultimodalEncoder, features: Features, loss: str | None = None, ks=(1, 5, 10)
) -> dict:
    """Loss and Recall@K of features: {"loss", "image_to_text": {k: …}, "text_to_image": {k: …}}."""
    partners = features.caption_ids, features.image_captions
    recalls = recall_at_k(features.image_features, features.text_features, ks, partners=partners)
    return {"loss": pool_loss(model, features, loss), **recalls}


def evaluate(
    model: MultimodalEncoder,
    dataset: MultimodalDataset,
    ks: Sequence[int] = (1, 5, 10),
    loss: str | None = None,
    **masks,
) -> dict:
    """Loss ("info_nce" or "sigmoid", one pool) and Recall@K over a whole data set.

    loss: None = the one that the model is trained by. Masks are off unless asked for (see `embed`).
    "cut_captions" of the result: how many captions are longer than the model reads, and were judged
    without their end. Raises ValueError for a loss that is not known.
    """
    if loss is not None:
        check_loss(loss)
    dataset = as_dataset(dataset, "dataset").encoded_by(model.tokenizer, model.max_length)
    result = score(model, embed(model, dataset, **masks), loss, ks)
    return result | {"cut_captions": dataset.cut_captions()}


def mean_recall(result: dict, k: int = 1) -> float:
    """Mean of both directions of Recall@K, a fraction."""
    return (result["image_to_text"][k] + result["text_to_image"][k]) / 2


def embed_texts(model: MultimodalEncoder, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Unit-length features (M, D) of texts, on the CPU, the model in evaluation mode.

    Raises ValueError for no text, or an empty one.
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


def patch_word_similarity(
    model: MultimodalEncoder, picture: Tensor, text: str
) -> tuple[list[str], Tensor]:
    """Which patch speaks to which word: (word pieces, cosines (W, N)).

    picture (3, H, W). The states of single patches and single words (no [CLS], no [SEP]) go
    through the projections that were trained on their mean, so that a map shows a tendency and
    explains no score.
    """
    device = model.logit_scale.device
    input_ids, valid = (
        x.to(device) for x in encode_texts(model.tokenizer, [text], model.max_length)
    )
    with eval_mode(model):
        patches = model.image_projection(
            model.image_tokens(picture[None].to(device))[0, 1:]
        ).float()
        words = model.text_projection(model.text_tokens(input_ids, valid)[0][0]).float()
    inside = maskable_tokens(input_ids, valid, model.special_ids)[0]
    normal = torch.nn.functional.normalize
    cosines = normal(words[inside], dim=-1) @ normal(patches, dim=-1).T
    return model.tokenizer.convert_ids_to_tokens(input_ids[0, inside]), cosines.cpu()
