"""Training, validation and test parts of your own pictures that share nothing.

A random split leaks: the same picture saved twice, or ten photographs of one scene, fall on both
sides, and a model scores on what it has seen. Here whole groups move, and where a group goes is a
hash of what is in it: renaming files, another order or more pictures move nothing else.
`overlap` says in words what two parts share. Walk-through: notebooks/08_your_own_pictures.ipynb.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

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
    """(train, val, test) that share no picture, and no caption but very common ones.

    val, test: shares of the groups, so that shares of the pictures only come near them; a part of
    share 0 is None. by: "near" keeps near-duplicates together (`near_duplicates`, by `threshold`:
    images saved again, but not most of those cut by more than 2 %, mirrored, bordered or grey);
    "content" only equal pictures, which decodes nothing where the data set hashes its files; any
    other word is a key of `meta`, such as "artist": rows of one value stay together, and
    near-duplicates, too. Rows of the same picture always do, and so do those that share a caption,
    unless it is very common (of at least 10 pictures, and of more than 1 % of all or more than 100)
    or the captions are class prompts (`class_prompts`): such a caption names a kind, not a picture,
    and joins nothing, or a kind could not be both trained on and tested; by="caption" joins them
    all the same, to hold out whole classes.

    A group's part is a hash of (seed, the smallest content hash in it): another order, other names
    and more pictures move no group but those that the new pictures join. hashes: of each picture's
    content (None: `dataset.content_hashes()`). Unless the data set was given a tokenizer, one is
    trained on the captions of the training part; all parts share it.

    Raises ValueError for impossible shares, an unknown key, a missing value, or an empty part.
    """
    dataset = as_dataset(dataset, "dataset")
    if not (val >= 0 and test >= 0 and val + test < 1):
        raise ValueError(f"val={val} and test={test} must be at least 0 and add up to less than 1")
    values = [] if by in ("near", "content", "caption") else _values(dataset.meta, by)
    hashes, near = _pictures(dataset, hashes, by != "content", threshold)
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
    """Those of very common captions, which tell nothing about a single picture."""
    pictures_of = Counter(key for own in keys for key in own)
    return {key for key, count in pictures_of.items() if very_common(count, len(keys))}


def _caption_groups(texts: Sequence[Sequence[str]], common: bool) -> list[int]:
    """Rows that share a caption get one number; common: also where it is a very common one."""
    keys = _keys(texts)
    skipped = set() if common else _common_keys(keys)
    return rows_that_share([[key for key in own if key not in skipped] for own in keys]).tolist()


def _pictures(dataset, hashes, near: bool, threshold: float):
    """Content hashes of all rows, and clusters of near-duplicates ([]: not asked for)."""
    hashes = dataset.content_hashes() if hashes is None else list(hashes)
    if len(hashes) != len(dataset):
        raise ValueError(f"{len(hashes)} hashes for {len(dataset)} pictures; give one per picture")
    return hashes, near_duplicates(signatures(dataset), threshold).tolist() if near else []


def _values(meta: Sequence[dict], key: str) -> list[Hashable]:
    """The value of `key` in every row; ValueError where it is unknown or missing."""
    known = sorted({name for facts in meta for name in facts})
    if key not in known:
        have = f"its keys are {', '.join(known)}" if known else "the data set has no meta"
        raise ValueError(f"by={key!r} is not in meta; {have}; or use 'near', 'content', 'caption'")
    values = [facts.get(key) for facts in meta]
    missing = [i for i, v in enumerate(values) if v is None or v == "" or v != v]  # NaN is not NaN
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(meta)} rows have no {key!r}, the first is row {missing[0]}; "
            "fill them in (a value of its own keeps a row alone) or leave the rows out"
        )
    return [str(value) for value in values]


def _bytes(key: Hashable) -> bytes:
    return key if isinstance(key, bytes) else str(key).encode()


def _chances(group: np.ndarray, hashes: Sequence[Hashable], seed: int) -> np.ndarray:
    """A number in [0, 1) for each group, by its smallest content hash."""
    smallest: dict[int, bytes] = {}
    for number, key in zip(group.tolist(), map(_bytes, hashes), strict=True):
        smallest[number] = min(smallest.get(number, key), key)
    digests = (
        hashlib.sha256(f"split {seed} ".encode() + smallest[number]).digest()
        for number in range(len(smallest))
    )
    return np.array([int.from_bytes(digest[:6], "big") / 2**48 for digest in digests])


def _refuse_empty(
    rows: list[np.ndarray], shares: Sequence[float], groups: int, seed: int, joins: dict
) -> None:
    most = min(filter(joins.get, joins), key=lambda kind: len(set(joins[kind])))  # joins most
    less = "or by='content', which joins less"
    remedy = {
        "near": less,
        "value": less,
        "caption": "or leave captions out that many pictures share (mm.inspect counts them)",
    }.get(most, "or more pictures")
    for name, part, share in zip(("train", "val", "test"), rows, shares, strict=True):
        if share > 0 and not len(part):
            total = sum(map(len, rows))
            raise ValueError(
                f"{name} would be empty: {total} pictures are {groups} groups that must stay "
                f"whole, and none falls into a share of {share:.2g}; try a larger share, another "
                f"seed than {seed}, {remedy}"
            )


def _parts(dataset: MultimodalDataset, rows: list[np.ndarray]) -> Parts:
    """The parts of these rows; None for no rows. They share one tokenizer."""
    parts = [dataset.subset(part, own_tokenizer=True) if len(part) else None for part in rows]
    train = parts[0]
    assert train is not None  # refused above
    for name, part in zip(("train", "val", "test"), parts, strict=True):
        if part is not None:
            part._tokenizer = train.tokenizer
            part.name = f"{dataset.name}-{name}" if dataset.name else name
    return train, parts[1], parts[2]


def class_prompts(texts: Sequence[Sequence[str]]) -> bool:
    """Are these captions the names of classes, shared by design, rather than of single pictures?

    So where at least 9 of 10 pictures share all their captions with others, and a caption stands at
    4 pictures or more on average.
    """
    keys = [{caption_key(caption) for caption in captions} for captions in texts]
    count = Counter(key for own in keys for key in own)
    shared = sum(all(count[key] > 1 for key in own) for own in keys)
    return shared >= 0.9 * len(keys) and count.total() >= 4 * len(count)


# ---- what two parts share ------------------------------------------------------------------------


@dataclass
class Overlap:
    """What test pictures have in common with training ones; true if that is a reason to warn."""

    pictures: int  # in the test part
    exact: int  # of these, equal to a training picture
    near: int | None  # near-duplicates of one, without the equal ones; None: not compared
    captions: int  # those with a caption, not a very common one, that a training picture has, too
    class_prompts: bool  # captions are names of classes: shared by design, no reason to warn
    # (row of training, row of test), five of each kind: "exact", "near", "captions"
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
                share = f"({100 * count / self.pictures:.1f} %)"
                rows = f" ({test} row = {train} row: {pairs})" if pairs else ""
                said.append(f"{count:,} of {self.pictures:,} {test} pictures {share} {what}{rows}")
        note = " Near-duplicates were not looked for." if self.near is None else ""
        if not said:
            return f"No overlap of {train} and {test} found.{note}"
        advice = f"Scores on {test} flatter; mm.split keeps such pictures together."
        return f"{'; '.join(said)}. {advice}{note}"


def overlap(
    train: MultimodalDataset,
    test: MultimodalDataset,
    near: bool = True,
    hashes: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
    threshold: float = NEAR,
    names: tuple[str, str] = ("training", "test"),
) -> Overlap:
    """Which test pictures and captions are also in training: an `Overlap`; print it.

    near=False is quick: files are compared by their bytes and not decoded. hashes: of (train,
    test); None: `dataset.content_hashes()` of each. A file and a picture given as pixels are never
    equal, but may be near. Near are images saved again in another size, quality or brightness; most
    of those that were cut by more than 2 %, mirrored, bordered or turned grey are not found.
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
        pictures=len(test),
        exact=len(exact),
        near=None if alike is None else len(alike),
        captions=len(found["captions"] or []),
        class_prompts=class_prompts(texts),
        examples={kind: pairs[:5] for kind, pairs in found.items() if pairs},
        names=names,
    )


def _shared(group: np.ndarray, first: int) -> list[tuple[int, int]]:
    """(training row, test row) for test rows, those from `first` on, whose group is in training."""
    of_group: dict[int, int] = {}
    for row, number in enumerate(group[:first].tolist()):
        of_group.setdefault(number, row)
    test = enumerate(group[first:].tolist())
    return [(of_group[number], row) for row, number in test if number in of_group]


def _shared_captions(texts: Sequence[Sequence[str]], first: int) -> list[tuple[int, int]]:
    """The same for captions, one pair for each test row."""
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
