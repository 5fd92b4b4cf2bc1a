"""What frozen features know: can a simple reader tell the classes from a model's states?

States are read BEFORE the projection: reconstruction alone never trains it. Classes are usually
very unequal (two thirds of the built-in test pictures are people), so balanced accuracy, the mean
of the classes' recalls, is the headline: always giving one answer scores 1 / classes, however
common it is. Pictures of one family are near copies of each other: they are drawn together in an
interval, and never split between the choice of C and its check.
Shapes: N training rows, M test rows, D width. Linear probes as in He et al. 2022
(arXiv:2111.06377), kNN as in Caron et al. 2021 (arXiv:2104.14294); the readers are scikit-learn's.
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
from .retrieval import of_captions, of_pictures

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C, the inverse of the L2 penalty
TOWERS = ("image", "text")
_FOLDS = 5
_DRAWS = 1000  # of the bootstrap
_WHOLE = "everything seen"

Labels = Sequence | np.ndarray | Tensor
Families = tuple[Labels, Labels]  # of the training rows, of the test rows


# ---- features ------------------------------------------------------------------------------------


def pooled_states(  # noqa: PLR0913 (by name)
    model: MultimodalEncoder,
    dataset: MultimodalDataset,
    tower: str = "image",
    *,
    batch_size: int = 256,
    image_mask: tuple[str, Any] = ("random", 0.0),
    text_mask: tuple[str, float] = ("random", 0.0),
    image_mode: str = "drop",
    text_mode: str = "drop",
    seed: int = 0,
    mixed_precision: str = "no",
) -> Tensor:
    """One tower's last states, pooled as the model pools, before the projection: (N, width).

    float32 on the CPU, evaluation mode, no gradient, nothing hidden by default. tower: "image", or
    "text" (each picture's canonical caption); only the mask and the mode of that tower are looked
    at. The rest as in `retrieval.embed`. Raises ValueError for an unknown tower.
    """
    common: Any = dict(batch_size=batch_size, seed=seed, mixed_precision=mixed_precision)
    if tower == "image":
        width = model.vit.config.hidden_size
        encode = _before(model.image_projection, model.encode_image)
        return of_pictures(model, dataset, encode, width, image_mask, image_mode, **common)
    if tower == "text":
        width, common["canonical"] = model.bert.config.hidden_size, True
        encode = _before(model.text_projection, model.encode_text)
        return of_captions(model, dataset, encode, width, text_mask, text_mode, **common)
    raise ValueError(f"tower={tower!r} is not known; {nearest(tower, TOWERS)}")


def _before(projection: torch.nn.Module, encode: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`encode`, but giving what enters the projection; how to pool stays the encoder's matter."""

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
    """Mean colours of a grid of cells: (N, 3 * cells**2) float32, in [0, 1]; a probe's yardstick.

    With 8 cells as many numbers as the tiny model's width. Pictures that a transform has normalised
    keep their scale. Raises ValueError where a picture has fewer pixels than cells.
    """
    parts = []
    for batch in dataset.batches(batch_size):
        pixels = batch.pixel_values
        side = min(pixels.shape[-2:])
        if not 1 <= cells <= side:
            raise ValueError(f"cells={cells} must be between 1 and the picture's {side} pixels")
        pixels = pixels if pixels.is_floating_point() else pixels.float() / 255
        parts.append(F.adaptive_avg_pool2d(pixels, cells).flatten(1).float().cpu())
    return torch.cat(parts)


def labels(dataset: MultimodalDataset, key: str = "group") -> tuple[np.ndarray, np.ndarray]:
    """Rows (R,) int64 whose `meta[key]` is known, and those labels (R,) as words.

    '' and a missing entry mean unknown: such rows are left out. Built-in pictures have "group"
    (10 classes), "subgroup" (100), "family", "gender" and "tone". Raises ValueError for a data set
    without meta, an unknown key, or a key that no row has a label for.
    """
    known = {name for facts in dataset.meta for name in facts}
    if not known:
        raise ValueError(
            f"the data set has no meta, so no labels; set dataset.meta = [{{{key!r}: ...}}, ...], "
            "one dict per picture, or give your own labels to linear_probe"
        )
    if key not in known:
        raise ValueError(f"meta has no key {key!r}; {nearest(key, known)}")
    found = [facts.get(key) for facts in dataset.meta]
    rows = [row for row, label in enumerate(found) if label not in ("", None)]
    if not rows:
        raise ValueError(f"meta[{key!r}] is empty in all {len(found)} rows; choose another key")
    return np.array(rows, np.int64), np.array([str(found[row]) for row in rows])


# ---- readers -------------------------------------------------------------------------------------


def linear_probe(
    train_features: Tensor | np.ndarray,
    train_labels: Labels,
    test_features: Tensor | np.ndarray,
    test_labels: Labels,
    seed: int = 0,
    *,
    families: Families | None = None,
    grid: Sequence[float] = GRID,
) -> dict:
    """Logistic regression on features (N, D), standardised by the training set; tried on (M, D).

    Classes weigh alike. C is the value of `grid` with the best balanced accuracy by five-fold
    cross-validation of the TRAINING set (ties: the strongest penalty). families: (N labels, M
    labels); rows of one family stay together in folds and intervals. Labels are compared as words.

    Returns a plain dict: "balanced_accuracy" and its "interval", "chance" (1 / test classes);
    "accuracy", "accuracy_interval", "accuracy_chance" (always the commonest training class);
    "recall" and "counts" per test class, "families" per test class (what the interval rests on),
    "unseen" (test labels never trained on: left out of all scores, counted here), "predictions" of
    all M rows, "train" and "test" (rows used), "method", "C". Shares in [0, 1]. Intervals: 95 %,
    bootstrap of test families within each class (so that no class is lost), 1,000 seeded draws; a
    class that is all right or all wrong adds no width. Raises ValueError for unequal lengths or
    widths, fewer than two classes, an empty grid.
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
    train_features: Tensor | np.ndarray,
    train_labels: Labels,
    test_features: Tensor | np.ndarray,
    test_labels: Labels,
    k: int = 20,
    seed: int = 0,
    *,
    families: Families | None = None,
) -> dict:
    """The vote of the k training rows of largest cosine, weighted by 1 / (1 - cosine).

    Nothing is trained or standardised; common classes win more votes, which balanced accuracy
    shows. The result is that of `linear_probe`, with "k" in place of "C" (seed: of the bootstrap).
    Caron et al. weigh by exp(cosine / 0.07): that suits unit features trained at a temperature,
    and hardly weighs states that all point one way. Raises ValueError for k outside 1 … N.
    """
    from sklearn.neighbors import KNeighborsClassifier

    truth, tested = _words(train_labels), _words(test_labels)
    x, y = _features(train_features, truth, test_features, tested)
    _, theirs = _families(families, truth, tested)
    if not 1 <= k <= len(x):
        raise ValueError(f"k={k} must be between 1 and the {len(x)} training rows")
    reader = KNeighborsClassifier(k, metric="cosine", weights="distance").fit(x, truth)
    predicted = reader.predict(y)
    return {"method": "knn", "k": k} | _score(truth, tested, predicted, theirs, seed)


def _words(values: Labels) -> np.ndarray:
    """Labels as words; the numbers of a tensor, too."""
    return np.array([str(value) for value in (getattr(values, "tolist", lambda: values)())], str)


def _features(
    train: Tensor | np.ndarray, truth: np.ndarray, test: Tensor | np.ndarray, tested: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both sets in float64 (the solver's sums are steadier); ValueError if they do not fit."""
    x, y = np.asarray(train, np.float64), np.asarray(test, np.float64)
    for name, rows, names in (("training", x, truth), ("test", y, tested)):
        if rows.ndim != 2:
            raise ValueError(f"{name} features have shape {rows.shape}; give one row per picture")
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
    """Families of both sets; without any, each row is its own (None for the training set)."""
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
    """The strength of `grid` that tells held-out parts of the training set (N, D) best."""
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
    """(rows to fit, rows held out), every class spread over the folds as far as it goes."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    most = max(Counter(truth.tolist()).values())
    count = min(_FOLDS, most if families is None else min(most, len(set(families))))
    usable = []
    if count > 1:
        kind = StratifiedKFold if families is None else StratifiedGroupKFold
        split = kind(count, shuffle=True, random_state=seed).split
        with warnings.catch_warnings():  # of classes with fewer rows than folds: these are expected
            warnings.simplefilter("ignore", UserWarning)
            parts = list(split(truth[:, None], truth, families))
        usable = [(a, b) for a, b in parts if len(b) and len(set(truth[a])) > 1]
    if not usable:
        raise ValueError(
            f"{len(truth)} training rows are too few to choose C by cross-validation; "
            "give more, or one value: grid=[0.01]"
        )
    yield from usable


# ---- scores --------------------------------------------------------------------------------------


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
    """What `linear_probe` says of predictions (M,); trained: the training set's labels (N,)."""
    seen = np.isin(tested, trained)
    truth, correct = tested[seen], (predicted == tested)[seen]
    if len(set(truth)) < 2:
        raise ValueError(
            f"of {len(tested)} test rows {len(truth)} have a label of the training set, in "
            f"{len(set(truth))} classes; a probe needs at least two to tell apart: choose other "
            "labels or another split"
        )
    recall = _recalls(truth, predicted[seen])
    counts = {name: int((truth == name).sum()) for name in recall}
    commonest = Counter(sorted(trained.tolist())).most_common(1)[0][0]
    balanced, accuracy = float(np.mean(list(recall.values()))), float(correct.mean())
    drawn = _bootstrap(truth, correct, families[seen], seed)
    return {
        "balanced_accuracy": balanced,
        "interval": _interval(drawn[0], balanced),
        "chance": 1 / len(recall),
        "accuracy": accuracy,
        "accuracy_interval": _interval(drawn[1], accuracy),
        "accuracy_chance": counts.get(commonest, 0) / len(truth),
        "recall": recall,
        "counts": counts,
        "families": {name: len(set(families[seen][truth == name])) for name in recall},
        "unseen": dict(sorted(Counter(tested[~seen].tolist()).items())),
        "train": len(trained),
        "test": len(truth),
        "predictions": predicted.tolist(),
    }


def _bootstrap(
    truth: np.ndarray, correct: np.ndarray, families: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Balanced accuracy and accuracy (draws,), families drawn with replacement in each class."""
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
    """The middle 95 % of the draws, widened where they miss the value itself."""
    low, high = np.percentile(drawn, [2.5, 97.5])
    return [min(float(low), value), max(float(high), value)]


# ---- all in one ----------------------------------------------------------------------------------


def probe(  # noqa: PLR0913 (by name)
    model: MultimodalEncoder,
    train: MultimodalDataset,
    test: MultimodalDataset,
    by: str = "group",
    masks: dict[str, tuple[str, Any]] | None = None,
    *,
    tower: str = "image",
    mode: str = "drop",
    k: int = 20,
    seed: int = 0,
    batch_size: int = 256,
    mixed_precision: str = "no",
) -> dict:
    """Linear probe and kNN on a frozen tower, seen whole and with half of its input hidden.

    by: the key of `meta` that is to be told. masks: {name of the row: (masker, ratio)}; None is
    "everything seen" and "50 % hidden" (at random). Both sets are seen under the same mask, the
    reader is fitted anew for each. Where meta knows a "family", its pictures stay together.

    Returns a plain dict: "by", "tower", "unknown" ({"train", "test"}: rows left out because their
    label is not known), "rows": {name: {"linear": …, "knn": …}} as `linear_probe` gives them, less
    their predictions. The same call gives the same numbers. Errors as `labels` and `linear_probe`.
    """
    if masks is None:
        masks = {_WHOLE: ("random", 0.0), "50 % hidden": ("random", 0.5)}
    common: Any = dict(batch_size=batch_size, seed=seed, mixed_precision=mixed_precision)

    def states(mask: tuple[str, Any]) -> Callable[[MultimodalDataset], Tensor]:
        seen: Any = {f"{tower}_mask": mask, f"{tower}_mode": mode}
        return lambda dataset: pooled_states(model, dataset, tower, **seen, **common)

    if tower not in TOWERS:
        raise ValueError(f"tower={tower!r} is not known; {nearest(tower, TOWERS)}")
    views = {name: states(mask) for name, mask in masks.items()}
    return {"by": by, "tower": tower} | _read(views, train, test, by, k, seed)


def probe_pixels(
    train: MultimodalDataset,
    test: MultimodalDataset,
    by: str = "group",
    *,
    cells: int = 8,
    k: int = 20,
    seed: int = 0,
) -> dict:
    """What `probe` gives, of mean colours (`raw_pixels`): a model that knows something beats it."""
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
    """Both readers on each view of the two sets, without rows of unknown label."""
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
    """Families by meta, where it names any; rows without one that show the same picture are one."""
    sets = (train, test)
    named = any(facts.get("family") for dataset in sets for facts in dataset.meta)
    if not named and all(len(x.image_ids.unique()) == len(x) for x in sets):
        return None
    of_train, of_test = (
        [
            facts.get("family") or f"picture {number}"
            for number, facts in zip(dataset.image_ids.tolist(), dataset.meta, strict=True)
        ]
        for dataset in sets
    )
    return of_train, of_test
