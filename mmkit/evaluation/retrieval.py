"""Retrieval: find images by text and texts by image.

Features are unit-length float32. N images may have M captions; a caption is correct for the
images that have it (data/partners.py). Shapes: N images, M captions, K captions per image, D width.
Walk-through: notebooks/04_retrieval.ipynb.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.dataset import MultimodalDataset
from ..data.loader import as_dataset
from ..data.partners import correct_pairs, partner_counts
from ..losses import CONTRASTIVE, check_loss, say_if_no_unit_vectors, similarity
from ..models.encoder import MultimodalEncoder
from ..older_names import older_functions
from .features import (  # noqa: F401 (mm.retrieval offers them all)
    Features,
    embed,
    embed_texts,
    of_captions,
    of_images,
    patch_token_similarity,
)

MATRIX = 2**25  # entries of a similarity matrix held at once (128 MB in float32)


def _chunks(rows: int, columns: int) -> list[slice]:
    """Slices of `rows` such that slice x columns stays within `MATRIX` entries."""
    size = max(1, MATRIX // max(1, columns))
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


def _recall(
    queries: Tensor, candidates: Tensor, correct_of: Callable[[slice], Tensor], ks: Sequence[int]
) -> dict[int, float]:
    """Fraction of queries whose best correct candidate is among the k best, for each k.

    correct_of(rows) gives (R, C) bool: the candidates that are correct for these queries.
    """
    hits = dict.fromkeys(ks, 0)
    finite = candidates.isfinite().all(1)  # a NaN is never ahead of anything and never found
    for rows in _chunks(len(queries), len(candidates)):
        correct = correct_of(rows)
        if not correct.any(1).all():
            row = rows.start + int((~correct.any(1)).nonzero()[0])
            raise ValueError(f"query {row} has no correct candidate; check the partners")
        scores = similarity(queries[rows], candidates).masked_fill(~finite, float("-inf"))
        best = scores.masked_fill(~correct, float("-inf")).amax(1, keepdim=True)
        # Ties count as misses: a model that maps everything to one point scores 0, not 100 %.
        ahead = ((scores >= best) & ~correct).sum(1)
        found = queries[rows].isfinite().all(1) & best[:, 0].isfinite()
        for k in ks:
            hits[k] += int((found & (ahead < k)).sum())
    return {k: hit / len(queries) for k, hit in hits.items()}


def recall_at_k(
    image_features: Tensor, text_features: Tensor, ks: Sequence[int] = (1, 5, 10),
    image_groups: Tensor | None = None, text_groups: Tensor | None = None, *,
    partners: tuple[Tensor, Tensor] | Tensor | None = None,
) -> dict[str, dict[int, float]]:  # fmt: skip
    """Compute Recall@K in both directions.

    A query is found if ANY correct candidate is among its K best (Karpathy & Fei-Fei 2015). Ties
    and features that are not finite (warned of) count as misses of their own. Works in chunks:
    100,000 pairs never hold more than 128 MB of the similarity matrix at once.

    Args:
        image_features, text_features: (N, D) and (M, D), unit length (else a warning).
        ks: values of K; one above the number of candidates is left out, with a warning.
        image_groups, text_groups: (N,) and (M,), equal where image and text belong together.
        partners: the general case: (caption_ids (M,), image_captions (N, K)) as
            `MultimodalDataset.partners` returns them, or a bool matrix (N, M). Without partners and
            groups row i belongs to row i, and N must equal M.
    Returns:
        {"image_to_text": {k: fraction}, "text_to_image": {k: fraction}}.
    Raises:
        ValueError: no pairs, no partners where N is not M, a query without any, or a K below 1.
    Example:
        >>> mm.recall_at_k(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]], ks=(1, 2))["image_to_text"]
        {1: 0.5, 2: 0.5}
    """
    images, texts = len(image_features), len(text_features)
    if not images or not texts:
        raise ValueError(f"{images} images and {texts} texts: give at least one of each")
    if (image_groups is None) != (text_groups is None):
        raise ValueError("only one of image_groups and text_groups is given; give both or none")
    if partners is None and image_groups is not None and text_groups is not None:
        partners = text_groups, image_groups[:, None]
    if partners is None:
        if images != texts:
            raise ValueError(
                f"{images} images and {texts} texts: give partners, for example "
                "dataset.partners(), to say which belong together"
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
    """Recall@K of a random order with all partners: (image to text, text to image)."""
    captions, images = dataset.partners()
    counts = partner_counts(images, captions)
    chances = []
    for right, candidates in zip(counts, (len(captions), len(images)), strict=True):
        drawn = torch.arange(min(k, candidates), dtype=torch.float64)
        wrong = (candidates - right.double()[:, None] - drawn).clamp(min=0)
        chances.append(1 - (wrong / (candidates - drawn)).prod(1).mean().item())
    return chances[0], chances[1]


def _meaningful(ks: Sequence[int], candidates: int) -> list[int]:
    """Those of `ks` that are at most the number of candidates; warns of the others."""
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
    for name, features in (("images", image_features), ("texts", text_features)):
        bad = (~features.isfinite().all(1)).nonzero()[:, 0].tolist()
        if bad:
            warnings.warn(
                f"features of {len(bad):,} of {len(features):,} {name} are not finite (the first "
                f"is row {bad[0]}): they count as misses, and are in no loss",
                stacklevel=3,
            )


@torch.no_grad()
def pool_loss(model: MultimodalEncoder, features: Features, loss: str | None = None) -> float:
    """The loss over the whole set as ONE pool of negatives, whatever the batch size.

    Each image has one caption: the first or, where captions are shared, the one that the fewest
    images have. loss: "info_nce" (chance is ln(N) where no caption is shared), "sigmoid", or None
    for the model's own; another one raises ValueError. Pairs whose features are not finite are left
    out (`recall_at_k` says how many).
    """
    check_loss(loss := loss or model.loss)
    images, texts = features.image_features, features.text_features[features.pool_caption]
    captions, table = features.caption_ids[features.pool_caption], features.image_captions
    finite = (images.isfinite() & texts.isfinite()).all(1)
    if finite.any() and not finite.all():
        images, texts, captions, table = (x[finite] for x in (images, texts, captions, table))
    scale, bias = model.logit_scale.exp().cpu(), model.logit_bias.cpu()
    total = 0.0
    for rows in _chunks(len(images), len(images)):
        own, pool, partners = (images[rows], texts[rows]), (images, texts), (captions, table)
        total += float(CONTRASTIVE[loss](own, pool, scale, bias, rows.start, partners))
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
    """Measure the loss (as one pool of negatives) and Recall@K over a whole data set.

    Args:
        model, dataset, ks: an encoder, the pairs to measure it on, and the values of K.
        loss: "info_nce" or "sigmoid"; None: the one that the model is trained with.
        **masks: options of `embed`; nothing is masked by default.
    Returns:
        {"loss": nats, "image_to_text": {k: fraction}, "text_to_image": {k: fraction},
        "cut_captions": how many captions are longer than the model reads and lost their end}.
    Raises:
        ValueError: the loss is not known.
    Example:
        >>> sorted(mm.evaluate(model, data))
        ['cut_captions', 'image_to_text', 'loss', 'text_to_image']
    """
    if loss is not None:
        check_loss(loss)
    dataset = as_dataset(dataset, "dataset").encoded_by(model.tokenizer, model.max_length)
    result = score(model, embed(model, dataset, **masks), loss, ks)
    return result | {"cut_captions": dataset.cut_captions()}


def mean_recall(result: dict, k: int = 1) -> float:
    """Average Recall@K over both directions.

    Args:
        result, k: what `evaluate` or `recall_at_k` returns, and one of its values of K.
    Returns:
        A fraction in [0, 1].
    Example:
        >>> mm.mean_recall({"image_to_text": {1: 0.5}, "text_to_image": {1: 0.25}})
        0.375
    """
    return (result["image_to_text"][k] + result["text_to_image"][k]) / 2


__getattr__ = older_functions(
    __name__, "mm.retrieval", patch_word_similarity="patch_token_similarity"
)
