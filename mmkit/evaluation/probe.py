"""Probes of frozen features: can a simple classifier tell the classes from a model's states?

States are read BEFORE the projection, which reconstruction alone never trains. Classes are usually
very unequal (two thirds of the built-in test images are people), so the main measure is balanced
accuracy, the mean recall of the classes: always giving one answer scores 1 / classes, however
common it is. Images of one family are near copies of each other: they are resampled together for
an interval, and never split between the choice of C and its check.
Shapes: N training rows, M test rows, D width. Linear probes as in He et al. 2022
(arXiv:2111.06377), kNN as in Caron et al. 2021 (arXiv:2104.14294); both are scikit-learn's.
Walk-through: notebooks/07_reconstruction.ipynb.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.dataset import MultimodalDataset
from ..errors import nearest
from ..models.encoder import MultimodalEncoder
from .features import of_captions, of_images

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C, the inverse of the L2 penalty
TOWERS = ("image", "text")
_FOLDS = 5
_DRAWS = 1000  # resamples of the bootstrap
_WHOLE = "everything seen"

Labels = Sequence | np.ndarray | Tensor
Families = tuple[Labels, Labels]  # of the training rows, of the test rows


def pooled_states(  # noqa: PLR0913 (by name)
    model: MultimodalEncoder, dataset: MultimodalDataset, tower: str = "image", *,
    batch_size: int = 256,
    image_mask: tuple[str, Any] = ("random", 0.0), text_mask: tuple[str, float] = ("random", 0.0),
    image_mode: str = "drop", text_mode: str = "drop", seed: int = 0, mixed_precision: str = "no",
) -> Tensor:  # fmt: skip
    """Encode a data set with one tower, up to the states that enter the projection.

    Args:
        model, dataset: run in evaluation mode without a gradient; N images.
        tower: "image", or "text" (the canonical caption of each image).
        batch_size, image_mask, text_mask, image_mode, text_mode, seed, mixed_precision: as in
            `retrieval.embed`; only the mask and mode of this tower count, none masks by default.
    Returns:
        (N, width) float32 on the CPU: the last states, pooled as the model pools them.
    Raises:
        ValueError: the tower is not known.
    """
    common: Any = dict(batch_size=batch_size, seed=seed, mixed_precision=mixed_precision)
    if tower == "image":
        width = model.vit.config.hidden_size
        encode = _before(model.image_projection, model.encode_image)
        return of_images(model, dataset, encode, width, image_mask, image_mode, **common)
    if tower == "text":
        width, common["canonical"] = model.bert.config.hidden_size, True
        encode = _before(model.text_projection, model.encode_text)
        return of_captions(model, dataset, encode, width, text_mask, text_mode, **common)
    raise ValueError(f"tower={tower!r} is not known; {nearest(tower, TOWERS)}")


def _before(projection: torch.nn.Module, encode: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`encode`, but returning the input of the projection; pooling is left to the encoder."""

    def states(*inputs) -> Tensor:
        entered: list[Tensor] = []
        hook = projection.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        try:
            encode(*inputs)
        finally:
            hook.remove()
        return entered[0]

    return states


def raw_pixels(dataset: MultimodalDataset, cells: int = 8, batch_size: int = 256) -> Tensor:
    """Average the colours in a grid of cells: the baseline of a probe of image features.

    Args:
        dataset, batch_size: N images, and how many to read at a time.
        cells: cells per side; 8 give as many numbers as the width of the tiny model.
    Returns:
        (N, 3 * cells**2) float32 in [0, 1]; images normalised by a transform keep their scale.
    Raises:
        ValueError: an image has fewer pixels per side than cells.
    """
    parts = []
    for batch in dataset.batches(batch_size):
        pixels = batch.pixel_values
        side = min(pixels.shape[-2:])
        if not 1 <= cells <= side:
            raise ValueError(f"cells={cells} must be between 1 and the image's {side} pixels")
        pixels = pixels if pixels.is_floating_point() else pixels.float() / 255
        parts.append(F.adaptive_avg_pool2d(pixels, cells).flatten(1).float().cpu())
    return torch.cat(parts)


def labels(dataset: MultimodalDataset, key: str = "group") -> tuple[np.ndarray, np.ndarray]:
    """Read class labels from the metadata of a data set.

    Args:
        dataset: its `meta` holds a dict per image; "" and a missing entry mean unknown.
        key: of the built-in images "group" (10 classes), "subgroup" (100), "family", "gender" or
            "tone".
    Returns:
        Rows (R,) int64 whose label is known, and those labels (R,) as strings.
    Raises:
        ValueError: there is no metadata, or no such key, or no row has a label under it.
    """
    known = {name for metadata in dataset.meta for name in metadata}
    if not known:
        raise ValueError(
            f"the data set has no meta, so no labels; set dataset.meta = [{{{key!r}: ...}}, ...], "
            "one dict per image, or give your own labels to linear_probe"
        )
    if key not in known:
        raise ValueError(f"meta has no key {key!r}; {nearest(key, known)}")
    found = [metadata.get(key) for metadata in dataset.meta]
    rows = [row for row, label in enumerate(found) if label not in ("", None)]
    if not rows:
        raise ValueError(f"meta[{key!r}] is empty in all {len(found)} rows; choose another key")
    return np.array(rows, np.int64), np.array([str(found[row]) for row in rows])


def linear_probe(
    train_features: Tensor | np.ndarray, train_labels: Labels,
    test_features: Tensor | np.ndarray, test_labels: Labels, seed: int = 0,
    *, families: Families | None = None, grid: Sequence[float] = GRID,
) -> dict:  # fmt: skip
    """Fit a logistic regression to training features and score it on test features.

    Features are standardised by the training set, and classes have equal weight. C is the value of
    the grid with the best balanced accuracy in five-fold cross-validation of the TRAINING set
    (ties: the strongest penalty). Labels are compared as strings.

    Args:
        train_features, test_features: (N, D) and (M, D).
        train_labels, test_labels: N and M class labels.
        seed: of the folds and of the bootstrap.
        families: (N labels, M labels) or None; rows of one family stay together in folds and
            intervals.
        grid: values of C to choose from, all above 0.
    Returns:
        A dict of plain values, fractions in [0, 1]: "balanced_accuracy" and its "interval",
        "chance" (1 / test classes); "accuracy", "accuracy_interval", "accuracy_chance" (always the
        most common training class); "recall", "counts" and "families" per test class (the interval
        rests on the families); "unseen" (counts of test labels that are not among the training
        labels: left out of all scores), "predictions" of all M rows, "train" and "test" (rows
        used), "method", "C". Intervals: 95 %, bootstrap of test families within each class (so that
        no class is lost), 1,000 seeded draws; a class that is all right or all wrong adds no width.
    Raises:
        ValueError: unequal lengths or widths, fewer than two classes, or an empty grid.
    """
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # scikit-learn brings it

    truth, tested = _words(train_labels), _words(test_labels)
    x, y = _features(train_features, truth, test_features, tested)
    own, theirs = _families(families, truth, tested)
    scaler = StandardScaler().fit(x)
    x, y = scaler.transform(x), scaler.transform(y)
    # One thread: the products are small; on two busy cores threads took 220 s, one takes 5.
    with threadpool_limits(1, "blas"):
        strength = _choose(x, truth, own, grid, seed)
        predicted = _logistic(strength).fit(x, truth).predict(y)
    return {"method": "linear", "C": strength} | _score(truth, tested, predicted, theirs, seed)


def knn(
    train_features: Tensor | np.ndarray, train_labels: Labels,
    test_features: Tensor | np.ndarray, test_labels: Labels, k: int = 20, seed: int = 0,
    *, families: Families | None = None,
) -> dict:  # fmt: skip
    """Classify by the k training rows of largest cosine, weighted by 1 / (1 - cosine).

    Nothing is trained or standardised; common classes win more votes, which balanced accuracy
    shows. Caron et al. weight by exp(cosine / 0.07), which suits unit features trained at a
    temperature, and hardly distinguishes states that all point in one direction.

    Args:
        train_features, train_labels, test_features, test_labels, families: as in `linear_probe`.
        k: number of neighbours, in [1, N].
        seed: of the bootstrap.
    Returns:
        The result of `linear_probe`, with "k" in place of "C".
    Raises:
        ValueError: k is out of range, or as in `linear_probe`.
    """
    from sklearn.neighbors import KNeighborsClassifier

    truth, tested = _words(train_labels), _words(test_labels)
    x, y = _features(train_features, truth, test_features, tested)
    _, theirs = _families(families, truth, tested)
    if not 1 <= k <= len(x):
        raise ValueError(f"k={k} must be between 1 and the {len(x)} training rows")
    classifier = KNeighborsClassifier(k, metric="cosine", weights="distance").fit(x, truth)
    predicted = classifier.predict(y)
    return {"method": "knn", "k": k} | _score(truth, tested, predicted, theirs, seed)


def _words(values: Labels) -> np.ndarray:
    """Labels as strings, also where they are the numbers of a tensor."""
    return np.array([str(value) for value in (getattr(values, "tolist", lambda: values)())], str)


def _features(
    train: Tensor | np.ndarray, truth: np.ndarray, test: Tensor | np.ndarray, tested: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both sets in float64, for a steadier solver; ValueError if they do not fit together."""
    x, y = np.asarray(train, np.float64), np.asarray(test, np.float64)
    for name, rows, names in (("training", x, truth), ("test", y, tested)):
        if rows.ndim != 2:
            raise ValueError(f"{name} features have shape {rows.shape}; give one row per image")
        if len(rows) != len(names):
            raise ValueError(f"{len(rows)} rows of {name} features but {len(names)} labels")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"training features are {x.shape[1]} wide, test features {y.shape[1]}")
    if len(set(truth)) < 2:
        found = f"the one class {str(truth[0])!r}" if len(truth) else "no rows"
        raise ValueError(f"the training set has {found}; a probe needs at least two classes")
    return x, y


def _families(
    families: Families | None, truth: np.ndarray, tested: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray]:
    """Families of both sets; without any, each test row is its own, and training has None."""
    if families is None:
        return None, np.arange(len(tested)).astype(str)
    own, theirs = map(_words, families)
    for name, given, names in (("training", own, truth), ("test", theirs, tested)):
        if len(given) != len(names):
            raise ValueError(f"{len(given)} families of {len(names)} {name} rows; give one per row")
    return own, theirs


def _logistic(strength: float):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)


def _choose(
    x: np.ndarray,
    truth: np.ndarray,
    families: np.ndarray | None,
    grid: Sequence[float],
    seed: int,
) -> float:
    """The C of `grid` with the best balanced accuracy on held-out training rows."""
    grid = sorted(map(float, grid))
    if not grid or grid[0] <= 0:
        raise ValueError(f"grid={grid} must hold at least one C, all above 0")
    if len(grid) == 1:
        return grid[0]
    folds = list(_folds(truth, families, seed))
    held = np.concatenate([part for _, part in folds])
    scores = []
    for strength in grid:
        predicted = [_logistic(strength).fit(x[a], truth[a]).predict(x[b]) for a, b in folds]
        recalls = _recalls(truth[held], np.concatenate(predicted))
        scores.append(np.mean(list(recalls.values())))
    return grid[int(np.argmax(scores))]  # the first of the best: the strongest penalty


def _folds(
    truth: np.ndarray, families: np.ndarray | None, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows to fit, rows held out), every class spread over the folds as far as possible."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    most = max(Counter(truth.tolist()).values())
    count = min(_FOLDS, most if families is None else min(most, len(set(families))))
    usable = []
    if count > 1:
        kind = StratifiedKFold if families is None else StratifiedGroupKFold
        split = kind(count, shuffle=True, random_state=seed).split
        with warnings.catch_warnings():  # expected: some classes have fewer rows than folds
            warnings.simplefilter("ignore", UserWarning)
            parts = list(split(truth[:, None], truth, families))
        usable = [(a, b) for a, b in parts if len(b) and len(set(truth[a])) > 1]
    if not usable:
        raise ValueError(
            f"{len(truth)} training rows are too few to choose C by cross-validation; "
            "give more, or one value: grid=[0.01]"
        )
    yield from usable


def _recalls(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Recall of each class of the truth, in [0, 1]."""
    return {str(c): float((predicted[truth == c] == c).mean()) for c in np.unique(truth)}


def _score(
    trained: np.ndarray,
    tested: np.ndarray,
    predicted: np.ndarray,
    families: np.ndarray,
    seed: int,
) -> dict:
    """The scores of `linear_probe` for predictions (M,); trained: the training labels (N,)."""
    known = np.isin(tested, trained)
    truth, correct = tested[known], (predicted == tested)[known]
    if len(set(truth)) < 2:
        raise ValueError(
            f"of {len(tested)} test rows {len(truth)} have a label of the training set, in "
            f"{len(set(truth))} classes; a probe needs at least two: choose other labels or "
            "another split"
        )
    recall = _recalls(truth, predicted[known])
    counts = {name: int((truth == name).sum()) for name in recall}
    commonest = Counter(sorted(trained.tolist())).most_common(1)[0][0]
    balanced, accuracy = float(np.mean(list(recall.values()))), float(correct.mean())
    drawn = _bootstrap(truth, correct, families[known], seed)
    return {
        "balanced_accuracy": balanced,
        "interval": _interval(drawn[0], balanced),
        "chance": 1 / len(recall),
        "accuracy": accuracy,
        "accuracy_interval": _interval(drawn[1], accuracy),
        "accuracy_chance": counts.get(commonest, 0) / len(truth),
        "recall": recall,
        "counts": counts,
        "families": {name: len(set(families[known][truth == name])) for name in recall},
        "unseen": dict(sorted(Counter(tested[~known].tolist()).items())),
        "train": len(trained),
        "test": len(truth),
        "predictions": predicted.tolist(),
    }


def _bootstrap(
    truth: np.ndarray, correct: np.ndarray, families: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Balanced accuracy and accuracy (draws,) of families drawn with replacement in each class."""
    generator = np.random.default_rng(seed)
    hits, rows = [], []
    for name in np.unique(truth):
        inside = truth == name
        family = np.unique(families[inside], return_inverse=True)[1]
        size = np.bincount(family)
        times = generator.multinomial(len(size), np.full(len(size), 1 / len(size)), _DRAWS)
        hits.append(times @ np.bincount(family, correct[inside]))
        rows.append(times @ size)
    right, drawn = np.array(hits), np.array(rows)  # (classes, draws)
    return (right / drawn).mean(0), right.sum(0) / drawn.sum(0)


def _interval(drawn: np.ndarray, value: float) -> list[float]:
    """The central 95 % of the draws, widened where they do not contain the value itself."""
    low, high = np.percentile(drawn, [2.5, 97.5])
    return [min(float(low), value), max(float(high), value)]


def probe(  # noqa: PLR0913 (by name)
    model: MultimodalEncoder, train: MultimodalDataset, test: MultimodalDataset, by: str = "group",
    masks: dict[str, tuple[str, Any]] | None = None, *, tower: str = "image", mode: str = "drop",
    k: int = 20, seed: int = 0, batch_size: int = 256, mixed_precision: str = "no",
) -> dict:  # fmt: skip
    """Probe a frozen tower by linear probe and kNN, unmasked and with half of its input masked.

    Both sets are encoded under the same mask, and the classifiers are fitted anew for each mask.
    The same call gives the same numbers.

    Args:
        model, train, test: an encoder, and two data sets with metadata; images of a "family" in it
            stay together.
        by: the key of the metadata whose values are the classes.
        masks: {name of the row: (masker, ratio)}; None is "everything seen" and "50 % masked".
        tower, mode: "image" or "text", and what is done with its masked tokens.
        k, seed, batch_size, mixed_precision: as in `knn` and `pooled_states`.
    Returns:
        A dict of plain values: "by", "tower", "unknown" ({"train", "test"}: rows left out because
        their label is not known), "rows": {name: {"linear": …, "knn": …}}, each a result of
        `linear_probe` or `knn` without the predictions.
    Raises:
        ValueError: the tower is not known, or as in `labels` and `linear_probe`.
    """
    if masks is None:
        masks = {_WHOLE: ("random", 0.0), "50 % masked": ("random", 0.5)}
    common: Any = dict(batch_size=batch_size, seed=seed, mixed_precision=mixed_precision)

    def states(mask: tuple[str, Any]) -> Callable[[MultimodalDataset], Tensor]:
        masked: Any = {f"{tower}_mask": mask, f"{tower}_mode": mode}
        return lambda dataset: pooled_states(model, dataset, tower, **masked, **common)

    if tower not in TOWERS:
        raise ValueError(f"tower={tower!r} is not known; {nearest(tower, TOWERS)}")
    views = {name: states(mask) for name, mask in masks.items()}
    return {"by": by, "tower": tower} | _read(views, train, test, by, k, seed)


def probe_pixels(
    train: MultimodalDataset, test: MultimodalDataset, by: str = "group", *,
    cells: int = 8, k: int = 20, seed: int = 0,
) -> dict:  # fmt: skip
    """Probe mean colours (`raw_pixels`) as `probe` does a model, which should do better."""
    views = {_WHOLE: lambda dataset: raw_pixels(dataset, cells)}
    return {"by": by, "tower": "pixels"} | _read(views, train, test, by, k, seed)


def _read(
    views: dict[str, Callable[[MultimodalDataset], Tensor]],
    train: MultimodalDataset,
    test: MultimodalDataset,
    by: str,
    k: int,
    seed: int,
) -> dict:
    """Both classifiers on each view of the two sets, without rows whose label is not known."""
    (train_rows, train_labels), (test_rows, test_labels) = labels(train, by), labels(test, by)
    unknown = {"train": len(train) - len(train_rows), "test": len(test) - len(test_rows)}
    train, test = train.subset(train_rows), test.subset(test_rows)
    families = None if by == "family" else _known_families(train, test)
    rows = {}
    for name, view in views.items():
        sets = (view(train), train_labels, view(test), test_labels)
        results = {
            "linear": linear_probe(*sets, seed, families=families),
            "knn": knn(*sets, k, seed, families=families),
        }
        for result in results.values():
            del result["predictions"]
        rows[name] = results
    return {"unknown": unknown, "rows": rows}


def _known_families(train: MultimodalDataset, test: MultimodalDataset) -> Families | None:
    """Families by metadata, where it names any; other rows that show one image are a family."""
    sets = (train, test)
    named = any(metadata.get("family") for dataset in sets for metadata in dataset.meta)
    if not named and all(len(x.image_ids.unique()) == len(x) for x in sets):
        return None
    of_train, of_test = (
        [
            metadata.get("family") or f"image {number}"
            for number, metadata in zip(dataset.image_ids.tolist(), dataset.meta, strict=True)
        ]
        for dataset in sets
    )
    return of_train, of_test
