"""Find pictures and captions that occur twice: in a batch they are negatives that are positives.

Pictures are compared by image_duplicates.py, captions here: by what is left without case and
punctuation, and by their words. Shapes: N pictures, M captions, B batch.
Walk-through: notebooks/08_your_own_pictures.ipynb.
"""

import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .clusters import connected, exact_duplicates, rows_that_share
from .dataset import MultimodalDataset
from .image_duplicates import NEAR, near_duplicates, picture_signature
from .partners import CorrectCaptions, partner_counts

# ---- captions ------------------------------------------------------------------------------------

# Not all that Unicode calls punctuation: "keycap #" and "keycap *", C and C# are different.
_MARKS = ".,;:!?\"'`()[]{}<>-_/\\|~\u2010\u2011\u2012\u2013\u2014\u2018\u2019\u201c\u201d\u201e"
_MARKS += "\u00ab\u00bb\u2026\u00bf\u00a1\u3001\u3002\u300c\u300d\u30fb"
_TO_SPACES = str.maketrans(dict.fromkeys(_MARKS, " "))


def caption_key(text: str) -> str:
    """The caption without what does not change its meaning: case, width, punctuation, spaces.

    "A dog, running!" and "a dog running" have one key. Of punctuation alone all is kept.
    """
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(plain.translate(_TO_SPACES).split()) or plain.strip()


def near_caption_groups(texts: Sequence[str], min_words: int = 6) -> np.ndarray:
    """(M,) int64: captions of the same words in any order, or with one word more, get one number.

    One word more counts from `min_words` on ("a dog" and "a wet dog" say different things), and
    only where one caption alone has it: "a woman with dark skin tone running", "... swimming" and
    "... surfing" are no copies of "a woman with dark skin tone". An exchanged word always counts
    as a difference: colours, numbers and names are such words. Every caption is looked up without
    each of its words, so that the time grows with the number of words: 250,000 take 2 s.
    """
    known: dict[str, str] = {}  # each word once in memory, however often it is said
    bags = [tuple(known.setdefault(word, word) for word in _bag(text)) for text in texts]
    number = exact_duplicates(bags)
    unique = dict(zip(bags, number.tolist(), strict=True))
    sums: dict[int, dict[int, tuple]] = {}  # number of words -> sum of their hashes -> the words
    for bag in unique:
        sums.setdefault(len(bag), {})[sum(map(hash, bag))] = bag
    longer_ones: dict[int, set[int]] = {}  # of each caption those that have one word more
    for bag, i in unique.items():
        shorter_ones = sums.get(len(bag) - 1)
        if len(bag) <= min_words or not shorter_ones:
            continue
        total = sum(map(hash, bag))
        for word in {*bag}:
            shorter = shorter_ones.get(total - hash(word))
            place = 0 if shorter is None else bag.index(word)
            if shorter is not None and shorter == bag[:place] + bag[place + 1 :]:
                longer_ones.setdefault(unique[shorter], set()).add(i)
    links = [(short, *longer) for short, longer in longer_ones.items() if len(longer) == 1]
    return exact_duplicates(connected(len(unique), links)[number].tolist())


def _bag(text: str) -> tuple[str, ...]:
    """Its words, sorted. "medium-dark" is one word, or it would be "medium" and one word more."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = [word.strip(_MARKS) for word in plain.split()]
    return tuple(sorted(word for word in words if word)) or (plain.strip(),)


# ---- the report ----------------------------------------------------------------------------------


@dataclass
class Duplicates:
    """How much of a data set occurs twice. Numbers of pictures count all copies, the first too."""

    pictures: int  # N
    captions: int  # M, of all pictures together
    exact_pictures: int  # pictures that have an exact copy
    near_pictures: int  # pictures that have a near-duplicate, exact copies included
    near_clusters: int  # clusters of two and more that they form
    exact_captions: int  # captions that occur again, after `caption_key`
    near_captions: int  # captions that occur again by `near_caption_groups`, those included
    # A picture and the caption that another row draws, where that caption, by `caption_key`, is one
    # of the picture's own or of its near-duplicates'. Counted from both rows, halved. Near captions
    # do not count here: one word may be all that tells two pictures apart.
    pairs: float
    unknown_pairs: float  # of these, those that the loss pushes apart, not knowing them as partners
    examples: list[list[int]]  # rows of the largest clusters of pictures

    def per_batch(self, batch_size: int) -> float:
        """Expected number of false negatives, pairs not known as partners, in a random batch.

        By pairs: B pictures drawn without putting back hold a given pair with the chance
        B (B - 1) / (N (N - 1)). Raises ValueError unless 1 <= batch_size <= N.
        """
        if not 1 <= batch_size <= self.pictures:
            raise ValueError(f"batch_size={batch_size} must be between 1 and {self.pictures}")
        of_all = max(self.pictures * (self.pictures - 1), 1)
        return self.unknown_pairs * batch_size * (batch_size - 1) / of_all

    def __str__(self) -> str:
        batch = min(256, self.pictures)
        return (
            f"{self.pictures:,} pictures: {self.exact_pictures:,} have an exact copy, "
            f"{self.near_pictures:,} a near-duplicate ({self.near_clusters:,} clusters). "
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
    """The `Duplicates` of N pictures with lists of captions, content hashes and signatures.

    partners: what is known to be correct for each other (`dataset.partners()`); None: nothing.
    Raises ValueError for unequal numbers.
    """
    if not len(texts) == len(hashes) == len(signature):
        raise ValueError(
            f"{len(texts)} texts, {len(hashes)} hashes and {len(signature)} signatures; give one "
            "of each per picture"
        )
    flat = [caption for captions in texts for caption in captions]
    exact = exact_duplicates(hashes)
    near = _joined(exact, near_duplicates(signature, threshold))
    keys = exact_duplicates([caption_key(caption) for caption in flat])
    counts = torch.tensor([len(captions) for captions in texts])
    drawn = 1 / counts.double().repeat_interleave(counts)  # chance of each caption in its row
    alike = known = torch.ones(len(flat))  # rows that each caption is correct for, its own included
    same = torch.from_numpy(keys)
    if partners is not None:
        _, known = partner_counts(partners[1], partners[0])
        same = torch.from_numpy(_joined(keys, partners[0].numpy()))  # the loss knows more than keys
    correct = CorrectCaptions(torch.from_numpy(near), counts, same)
    _, alike = partner_counts(correct.of_images(torch.arange(len(texts))), same)
    size = np.bincount(near)
    largest = [c for c in np.argsort(-size, kind="stable")[:5] if size[c] > 1]
    return Duplicates(
        pictures=len(texts),
        captions=len(flat),
        exact_pictures=_repeated(exact),
        near_pictures=_repeated(near),
        near_clusters=int((size > 1).sum()),
        exact_captions=_repeated(keys),
        near_captions=_repeated(_joined(keys, near_caption_groups(flat))),
        pairs=float(((alike - 1) * drawn).sum()) / 2,
        unknown_pairs=float(((alike - known) * drawn).sum()) / 2,
        examples=[np.flatnonzero(near == c).tolist() for c in largest],
    )


def _joined(*groupings: np.ndarray) -> np.ndarray:
    """What any of several groupings (N,) connects."""
    rows = zip(*(grouping.tolist() for grouping in groupings), strict=True)
    return rows_that_share([list(enumerate(numbers)) for numbers in rows])


def _repeated(group: np.ndarray) -> int:
    """How many are in groups of two or more."""
    size = np.bincount(group)
    return int(size[size > 1].sum())


# ---- data sets -----------------------------------------------------------------------------------


def signatures(dataset: MultimodalDataset, batch_size: int = 256) -> Tensor:
    """Signatures (N, 771) of all pictures, on the CPU; each is read once, and cached if wanted."""
    dataset.prepare(num_workers=2)
    rows = np.array_split(np.arange(len(dataset)), -(-len(dataset) // batch_size))
    return torch.cat([picture_signature(dataset._take(part)).cpu() for part in rows])


def find_duplicates(
    dataset: MultimodalDataset, hashes: Sequence[Hashable] | None = None, threshold: float = NEAR
) -> Duplicates:
    """The `Duplicates` of a data set, reading every picture once.

    hashes: of each picture's content (None: `dataset.content_hashes()`).
    """
    hashes = hashes or dataset.content_hashes()
    return count_duplicates(
        dataset.texts, hashes, signatures(dataset), dataset.partners(), threshold
    )
