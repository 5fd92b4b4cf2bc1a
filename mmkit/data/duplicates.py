"""Find images and captions that occur twice: within a batch they are false negatives.

image_duplicates.py compares images; this module compares captions, without case and punctuation,
and by their words. Shapes: N images, M captions, B batch.
Walk-through: notebooks/08_your_own_images.ipynb.
"""

import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .clusters import connected, exact_duplicates, rows_that_share
from .dataset import MultimodalDataset
from .image_duplicates import NEAR, image_signature, near_duplicates
from .partners import CorrectCaptions, partner_counts

# ---- captions ------------------------------------------------------------------------------------

# Not all of Unicode's punctuation: "keycap #" and "keycap *", C and C# are different.
_MARKS = ".,;:!?\"'`()[]{}<>-_/\\|~\u2010\u2011\u2012\u2013\u2014\u2018\u2019\u201c\u201d\u201e"
_MARKS += "\u00ab\u00bb\u2026\u00bf\u00a1\u3001\u3002\u300c\u300d\u30fb"
_TO_SPACES = str.maketrans(dict.fromkeys(_MARKS, " "))


def caption_key(text: str) -> str:
    """The caption without case, letter width, punctuation and spaces, which rarely have a meaning.

    "A dog, running!" and "a dog running" have the same key. Punctuation alone is kept.
    """
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(plain.translate(_TO_SPACES).split()) or plain.strip()


def near_caption_groups(texts: Sequence[str], min_words: int = 6) -> np.ndarray:
    """(M,) int64: captions of the same words in any order, or with one more, get the same number.

    A caption with one more word joins the shorter one only if that has at least `min_words` words
    ("a dog" and "a wet dog" differ) and no other caption extends it: "a woman with dark skin tone
    running", "... swimming" and "... surfing" are not copies of "a woman with dark skin tone". A
    replaced word always is a difference, since it may be a colour, a number or a name. Each caption
    is looked up without each of its words, so that the time is linear in the number of words:
    250,000 captions take 2 s.
    """
    known: dict[str, str] = {}  # each different word once in memory
    bags = [tuple(known.setdefault(word, word) for word in _bag(text)) for text in texts]
    number = exact_duplicates(bags)
    unique = dict(zip(bags, number.tolist(), strict=True))
    sums: dict[int, dict[int, tuple]] = {}  # number of words -> sum of their hashes -> the words
    for bag in unique:
        sums.setdefault(len(bag), {})[sum(map(hash, bag))] = bag
    longer_ones: dict[int, set[int]] = {}  # of each caption those with one more word
    for bag, i in unique.items():
        shorter_ones = sums.get(len(bag) - 1)
        if len(bag) <= min_words or not shorter_ones:
            continue
        total = sum(map(hash, bag))
        for word in {*bag}:
            shorter = shorter_ones.get(total - hash(word))
            position = 0 if shorter is None else bag.index(word)
            if shorter is not None and shorter == bag[:position] + bag[position + 1 :]:
                longer_ones.setdefault(unique[shorter], set()).add(i)
    links = [(short, *longer) for short, longer in longer_ones.items() if len(longer) == 1]
    return exact_duplicates(connected(len(unique), links)[number].tolist())


def _bag(text: str) -> tuple[str, ...]:
    """The sorted words. "medium-dark" is one word, else it would be "medium" with one more."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = [word.strip(_MARKS) for word in plain.split()]
    return tuple(sorted(word for word in words if word)) or (plain.strip(),)


# ---- the report ----------------------------------------------------------------------------------


@dataclass
class Duplicates:
    """How much of a data set occurs twice; numbers of images include the first copy."""

    images: int  # N
    captions: int  # M, of all images together
    exact_images: int  # images that have an exact copy
    near_images: int  # images that have a near-duplicate, exact copies included
    near_clusters: int  # clusters of at least two that they form
    exact_captions: int  # captions whose `caption_key` occurs again
    near_captions: int  # captions that occur again by `near_caption_groups` or by `caption_key`
    # Expected number of pairs of an image and the caption drawn in another row that are correct:
    # the caption, by `caption_key`, is one of the image's or of its near-duplicates'. Counted in
    # both directions and halved. Near captions do not count: one word may distinguish two images.
    pairs: float
    unknown_pairs: float  # of these, those that the loss does not know as correct and pushes apart
    examples: list[list[int]]  # rows of the largest clusters of images

    def per_batch(self, batch_size: int) -> float:
        """Expected number of false negatives (unknown pairs) in a random batch.

        B images drawn without replacement contain a given pair with probability
        B (B - 1) / (N (N - 1)). Raises ValueError unless 1 <= batch_size <= N.
        """
        if not 1 <= batch_size <= self.images:
            raise ValueError(f"batch_size={batch_size} must be between 1 and {self.images}")
        all_pairs = max(self.images * (self.images - 1), 1)
        return self.unknown_pairs * batch_size * (batch_size - 1) / all_pairs

    def __str__(self) -> str:
        batch = min(256, self.images)
        return (
            f"{self.images:,} images: {self.exact_images:,} have an exact copy, "
            f"{self.near_images:,} a near-duplicate ({self.near_clusters:,} clusters). "
            f"{self.captions:,} captions: {self.exact_captions:,} occur again, "
            f"{self.near_captions:,} nearly. Expected false negatives in a random batch of "
            f"{batch}: {self.per_batch(batch):.2f} pairs."
        )


def count_duplicates(
    texts: Sequence[Sequence[str]],
    hashes: Sequence[Hashable],
    signature: Tensor,
    partners: tuple[Tensor, Tensor] | None = None,
    threshold: float = NEAR,
) -> Duplicates:
    """The `Duplicates` of N images with lists of captions, content hashes and signatures.

    partners: which pairs the loss knows as correct (`dataset.partners()`); None: none.
    Raises ValueError for unequal numbers.
    """
    if not len(texts) == len(hashes) == len(signature):
        raise ValueError(
            f"{len(texts)} texts, {len(hashes)} hashes and {len(signature)} signatures; give one "
            "of each per image"
        )
    flat = [caption for captions in texts for caption in captions]
    exact = exact_duplicates(hashes)
    near = _joined(exact, near_duplicates(signature, threshold))
    keys = exact_duplicates([caption_key(caption) for caption in flat])
    counts = torch.tensor([len(captions) for captions in texts])
    drawn = 1 / counts.double().repeat_interleave(counts)  # probability of each caption in its row
    alike = known = torch.ones(len(flat))  # number of rows that each caption is correct for
    same = torch.from_numpy(keys)
    if partners is not None:
        _, known = partner_counts(partners[1], partners[0])
        same = torch.from_numpy(
            _joined(keys, partners[0].numpy())
        )  # the loss knows more than the keys
    correct = CorrectCaptions(torch.from_numpy(near), counts, same)
    _, alike = partner_counts(correct.of_images(torch.arange(len(texts))), same)
    size = np.bincount(near)
    largest = [c for c in np.argsort(-size, kind="stable")[:5] if size[c] > 1]
    return Duplicates(
        images=len(texts),
        captions=len(flat),
        exact_images=_repeated(exact),
        near_images=_repeated(near),
        near_clusters=int((size > 1).sum()),
        exact_captions=_repeated(keys),
        near_captions=_repeated(_joined(keys, near_caption_groups(flat))),
        pairs=float(((alike - 1) * drawn).sum()) / 2,
        unknown_pairs=float(((alike - known) * drawn).sum()) / 2,
        examples=[np.flatnonzero(near == c).tolist() for c in largest],
    )


def _joined(*groupings: np.ndarray) -> np.ndarray:
    """The groups of rows that any of several groupings (N,) connects."""
    rows = zip(*(grouping.tolist() for grouping in groupings), strict=True)
    return rows_that_share([list(enumerate(numbers)) for numbers in rows])


def _repeated(group: np.ndarray) -> int:
    """The number of rows in groups of two or more."""
    size = np.bincount(group)
    return int(size[size > 1].sum())


# ---- data sets -----------------------------------------------------------------------------------


def signatures(dataset: MultimodalDataset, batch_size: int = 256) -> Tensor:
    """Signatures (N, 771) of all images, on the CPU; each is read once, and cached if asked for."""
    dataset.prepare(num_workers=2)
    rows = np.array_split(np.arange(len(dataset)), -(-len(dataset) // batch_size))
    return torch.cat([image_signature(dataset._take(part)).cpu() for part in rows])


def find_duplicates(
    dataset: MultimodalDataset, hashes: Sequence[Hashable] | None = None, threshold: float = NEAR
) -> Duplicates:
    """The `Duplicates` of a data set, reading every image once.

    hashes: of each image's content (None: `dataset.content_hashes()`).
    """
    hashes = hashes or dataset.content_hashes()
    return count_duplicates(
        dataset.texts, hashes, signatures(dataset), dataset.partners(), threshold
    )
