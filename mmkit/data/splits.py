"""Training, validation and test parts of your own images that share nothing.

A random split leaks: copies of an image, or ten photographs of one scene, fall on both sides, and
the model is scored on images that it was trained on. Here whole groups are assigned to a part by a
hash of their content, so that other file names, another order or more images change nothing else.
`overlap` reports what two parts share. Walk-through: notebooks/08_your_own_images.ipynb.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..older_names import older_attributes
from .clusters import exact_duplicates, rows_that_share
from .dataset import MultimodalDataset
from .duplicates import caption_key, signatures
from .image_duplicates import NEAR, near_duplicates
from .loader import as_dataset
from .partners import very_common

Parts = tuple[MultimodalDataset, MultimodalDataset | None, MultimodalDataset | None]


def split(
    dataset: MultimodalDataset,
    val: float = 0.1,
    test: float = 0.1,
    by: str = "near",
    seed: int = 0,
    hashes: Sequence[Hashable] | None = None,
    threshold: float = NEAR,
) -> Parts:
    """Split into (train, val, test) that share no image, and no caption but very common ones.

    Rows of the same image always stay together, and so do rows that share a caption, unless it is
    very common (of at least 10 images, and of more than 1 % of all or more than 100) or a class
    prompt (`class_prompts`), and so names a category that must be both trained on and tested.

    A hash of the seed and of a group's smallest content hash gives its part: another order, other
    names and more images move only groups that new images join. All parts share one tokenizer: the
    given one, else one trained on the training captions.

    Args:
        dataset: the data to split.
        val: fraction of the groups for validation, at least 0; the fraction of images is only
            close to it. A part of fraction 0 is None.
        test: the same for testing; val + test is below 1.
        by: "near" keeps near-duplicates together (`near_duplicates`: images saved again, but not
            most of those cropped by more than 2 %, mirrored, framed or turned grey); "content" only
            equal images, without decoding where the data set hashes its files; "caption" as "near",
            and also rows that share a very common caption, to hold out whole classes; any other
            value is a key of `meta`, such as "artist": as "near", and also rows of equal value.
        seed: another seed gives another split.
        hashes: of each image's content (None: `dataset.content_hashes()`).
        threshold: largest difference of near-duplicates, see `near_duplicates`.

    Returns:
        The three data sets, None for a part of fraction 0.

    Raises:
        ValueError: impossible fractions, an unknown key, a missing value, or an empty part.

    Example:
        >>> train, val, test = mm.split(data, val=0.2, test=0.2)
        >>> len(train) + len(val) + len(test) == len(data)
        True
    """
    dataset = as_dataset(dataset, "dataset")
    if not (val >= 0 and test >= 0 and val + test < 1):
        raise ValueError(f"val={val} and test={test} must be at least 0 and add up to less than 1")
    values = [] if by in ("near", "content", "caption") else _values(dataset.meta, by)
    hashes, near = _images(dataset, hashes, by != "content", threshold)
    joins = {"content": hashes, "near": near, "value": values}
    joins["same"] = dataset.image_ids.tolist()
    if by == "caption" or not class_prompts(dataset.texts):
        joins["caption"] = _caption_groups(dataset.texts, common=by == "caption")
    lists = [[(kind, key) for key in keys] for kind, keys in joins.items() if len(keys)]
    group = rows_that_share(list(zip(*lists, strict=True)))
    chance = _chances(group, hashes, seed)[group]
    where = np.where(chance < test, 2, np.where(chance < test + val, 1, 0))
    rows = [np.flatnonzero(where == part) for part in range(3)]
    _refuse_empty(rows, (1 - val - test, val, test), int(group.max()) + 1, seed, joins)
    return _parts(dataset, rows)


def _keys(texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """The different `caption_key` of each row."""
    return [list(dict.fromkeys(map(caption_key, captions))) for captions in texts]


def _common_keys(keys: Sequence[Sequence[str]]) -> set[str]:
    """The keys of very common captions, which say nothing about a single image."""
    images_of = Counter(key for own in keys for key in own)
    return {key for key, count in images_of.items() if very_common(count, len(keys))}


def _caption_groups(texts: Sequence[Sequence[str]], common: bool) -> list[int]:
    """Rows that share a caption get the same number; common: very common captions count, too."""
    keys = _keys(texts)
    skipped = set() if common else _common_keys(keys)
    return rows_that_share([[key for key in own if key not in skipped] for own in keys]).tolist()


def _images(dataset, hashes, near: bool, threshold: float):
    """Content hashes of all rows, and clusters of near-duplicates ([] if not asked for)."""
    hashes = dataset.content_hashes() if hashes is None else list(hashes)
    if len(hashes) != len(dataset):
        raise ValueError(f"{len(hashes)} hashes for {len(dataset)} images; give one per image")
    return hashes, near_duplicates(signatures(dataset), threshold).tolist() if near else []


def _values(meta: Sequence[dict], key: str) -> list[Hashable]:
    """The value of `key` in every row; ValueError if it is unknown or missing."""
    known = sorted({name for metadata in meta for name in metadata})
    if key not in known:
        have = f"its keys are {', '.join(known)}" if known else "the data set has no meta"
        raise ValueError(f"by={key!r} is not in meta; {have}; or use 'near', 'content', 'caption'")
    values = [metadata.get(key) for metadata in meta]
    missing = [i for i, v in enumerate(values) if v is None or v == "" or v != v]  # NaN is not NaN
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(meta)} rows have no {key!r}, the first is row {missing[0]}; "
            "fill them in (a unique value keeps a row by itself) or leave the rows out"
        )
    return [str(value) for value in values]


def _bytes(key: Hashable) -> bytes:
    return key if isinstance(key, bytes) else str(key).encode()


def _chances(group: np.ndarray, hashes: Sequence[Hashable], seed: int) -> np.ndarray:
    """A number in [0, 1) for each group, from its smallest content hash."""
    smallest: dict[int, bytes] = {}
    for number, key in zip(group.tolist(), map(_bytes, hashes), strict=True):
        smallest[number] = min(smallest.get(number, key), key)
    digests = (
        hashlib.sha256(f"split {seed} ".encode() + smallest[number]).digest()
        for number in range(len(smallest))
    )
    return np.array([int.from_bytes(digest[:6], "big") / 2**48 for digest in digests])


def _refuse_empty(
    rows: list[np.ndarray], fractions: Sequence[float], groups: int, seed: int, joins: dict
) -> None:
    """Raise ValueError for a part of fraction above 0 that has no rows."""
    most = min(filter(joins.get, joins), key=lambda kind: len(set(joins[kind])))  # joins most
    less = "or by='content', which joins less"
    remedy = {
        "near": less,
        "value": less,
        "caption": "or leave captions out that many images share (mm.inspect counts them)",
    }.get(most, "or more images")
    for name, part, fraction in zip(("train", "val", "test"), rows, fractions, strict=True):
        if fraction > 0 and not len(part):
            total = sum(map(len, rows))
            raise ValueError(
                f"{name} would be empty: {total} images form {groups} groups that must stay "
                f"whole, and none falls into a fraction of {fraction:.2g}; try a larger fraction, "
                f"another seed than {seed}, {remedy}"
            )


def _parts(dataset: MultimodalDataset, rows: list[np.ndarray]) -> Parts:
    """The data sets of these rows, None for no rows; they share one tokenizer."""
    parts = [dataset.subset(part, own_tokenizer=True) if len(part) else None for part in rows]
    train = parts[0]
    assert train is not None  # refused above
    for name, part in zip(("train", "val", "test"), parts, strict=True):
        if part is not None:
            part._tokenizer = train.tokenizer
            part.name = f"{dataset.name}-{name}" if dataset.name else name
    return train, parts[1], parts[2]


def class_prompts(texts: Sequence[Sequence[str]]) -> bool:
    """Do these captions name classes, shared by design, rather than single images?

    They do if at least 9 of 10 images share all their captions with others, and each caption
    occurs at 4 images or more on average.
    """
    keys = [{caption_key(caption) for caption in captions} for captions in texts]
    count = Counter(key for own in keys for key in own)
    shared = sum(all(count[key] > 1 for key in own) for own in keys)
    return shared >= 0.9 * len(keys) and count.total() >= 4 * len(count)


# ---- what two parts share ------------------------------------------------------------------------


@older_attributes(pictures="images")
@dataclass
class Overlap:
    """What test images share with training images; it is true if that is a reason to warn."""

    images: int  # in the test part
    exact: int  # of these, equal to a training image
    near: int | None  # near-duplicates of one, without the equal ones; None: not compared
    captions: int  # those that share a caption, not a very common one, with a training image
    class_prompts: bool  # captions name classes: they are shared by design, no reason to warn
    # (training row, test row) of up to five pairs of each kind: "exact", "near", "captions"
    examples: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    names: tuple[str, str] = ("training", "test")

    def __bool__(self) -> bool:
        return bool(self.exact or self.near or (self.captions and not self.class_prompts))

    def __str__(self) -> str:
        train, test = self.names
        said = []
        for kind, count, what in (
            ("exact", self.exact, f"are also in {train}"),
            ("near", self.near, f"are near-duplicates of one in {train}"),
            ("captions", self.captions, f"have a caption that is also in {train}"),
        ):
            if count and not (kind == "captions" and self.class_prompts):
                pairs = ", ".join(f"{b} = {a}" for a, b in self.examples.get(kind, [])[:3])
                fraction = f"({100 * count / self.images:.1f} %)"
                rows = f" ({test} row = {train} row: {pairs})" if pairs else ""
                said.append(f"{count:,} of {self.images:,} {test} images {fraction} {what}{rows}")
        note = " Near-duplicates were not looked for." if self.near is None else ""
        if not said:
            return f"No overlap of {train} and {test} found.{note}"
        advice = f"Scores on {test} are too high; mm.split keeps such images together."
        return f"{'; '.join(said)}. {advice}{note}"


def overlap(
    train: MultimodalDataset,
    test: MultimodalDataset,
    near: bool = True,
    hashes: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
    threshold: float = NEAR,
    names: tuple[str, str] = ("training", "test"),
) -> Overlap:
    """Find the test images and captions that also occur in training.

    A file and an image given as pixels are never equal, but may be near-duplicates.
    Near-duplicates are images saved again in another size, quality or brightness; most of those
    that were cropped by more than 2 %, mirrored, framed or turned grey are not found.

    Args:
        train: the training data.
        test: the data to compare with it.
        near: also look for near-duplicates; False is fast: files are compared by their bytes and
            not decoded.
        hashes: content hashes of (train, test); None: `content_hashes()` of each.
        threshold: largest difference of near-duplicates, see `near_duplicates`.
        names: what the report calls the two.

    Returns:
        Overlap: print it; it is true if it is a reason to warn.

    Example:
        >>> shared = mm.overlap(data.subset(range(12)), data.subset(range(10, 23)))
        >>> shared.exact, bool(shared)
        (2, True)
    """
    parts = train, test = as_dataset(train, "train"), as_dataset(test, "test")
    first = len(train)
    own = [part.content_hashes() for part in parts] if hashes is None else list(map(list, hashes))
    exact = _shared(exact_duplicates([*own[0], *own[1]]), first)
    alike = None
    if near:
        together = torch.cat([signatures(part) for part in parts])
        equal = {row for _, row in exact}
        pairs = _shared(near_duplicates(together, threshold), first)
        alike = [pair for pair in pairs if pair[1] not in equal]
    texts = [*train.texts, *test.texts]
    found = {"exact": exact, "near": alike, "captions": _shared_captions(texts, first)}
    return Overlap(
        images=len(test),
        exact=len(exact),
        near=None if alike is None else len(alike),
        captions=len(found["captions"] or []),
        class_prompts=class_prompts(texts),
        examples={kind: pairs[:5] for kind, pairs in found.items() if pairs},
        names=names,
    )


def _shared(group: np.ndarray, first: int) -> list[tuple[int, int]]:
    """(training row, test row) for each test row (from `first` on) whose group is in training."""
    of_group: dict[int, int] = {}
    for row, number in enumerate(group[:first].tolist()):
        of_group.setdefault(number, row)
    test = enumerate(group[first:].tolist())
    return [(of_group[number], row) for row, number in test if number in of_group]


def _shared_captions(texts: Sequence[Sequence[str]], first: int) -> list[tuple[int, int]]:
    """The same for captions, one pair per test row."""
    keys = _keys(texts)
    common = set() if class_prompts(texts) else _common_keys(keys)
    of_key: dict[str, int] = {}
    for row, own in enumerate(keys[:first]):
        for key in own:
            of_key.setdefault(key, row)
    pairs = []
    for row, own in enumerate(keys[first:]):
        rows = [of_key[key] for key in own if key in of_key and key not in common]
        pairs += [(rows[0], row)] if rows else []
    return pairs
