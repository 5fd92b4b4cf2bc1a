"""Which captions are correct for which images.

A caption is correct for every image that has it, and for every row that shows such an image. The
relation is not transitive. Shapes: N images, M captions, K captions of an image.
Walk-through: notebooks/04_retrieval.ipynb.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .clusters import number
from .tokenizer import encode_texts, special_ids


def correct_pairs(image_captions: Tensor, caption_ids: Tensor) -> Tensor:
    """(N, M) bool: is caption j one of the captions of image i?

    image_captions (N, K) int64: the ids of each image's captions, -1 where it has fewer than K.
    caption_ids (M,): the id of each caption. It does not synchronise with a GPU.
    """
    shape, device = (len(image_captions), len(caption_ids)), image_captions.device
    ordered = caption_ids.sort().values
    position = torch.searchsorted(ordered, image_captions).clamp(max=shape[1] - 1)  # (N, K)
    found = (ordered[position] == image_captions).to(torch.uint8)
    flat = position + torch.arange(shape[0], device=device)[:, None] * shape[1]
    member = torch.zeros(shape[0] * shape[1], dtype=torch.uint8, device=device)
    member.index_add_(
        0, flat.flatten(), found.flatten()
    )  # adds 0 at the position of another caption
    correct = member.clamp_(max=1).view(torch.bool).view(shape)
    return correct.index_select(1, torch.searchsorted(ordered, caption_ids))


def partner_counts(image_captions: Tensor, caption_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of True in each row (N,) and each column (M,) of `correct_pairs`."""

    def occurrences(values: Tensor, among: Tensor) -> Tensor:
        ordered = among.sort().values
        ends = [torch.searchsorted(ordered, values, right=right) for right in (True, False)]
        return ends[0] - ends[1]

    in_rows = occurrences(image_captions, caption_ids).masked_fill(image_captions < 0, 0)
    return in_rows.sum(1), occurrences(caption_ids, image_captions.flatten())


def very_common(count: int, images: int) -> bool:
    """Does a caption of `count` out of `images` images name a category, not a single image?

    It does if at least 10 images have it and these are more than 1 % of all, or more than 100.
    """
    return count >= 10 and (count > 100 or count > images / 100)


@dataclass
class CorrectCaptions:
    """Which captions are correct for which images, for a data set of N rows and M captions.

    An image has the captions of all rows that show it, and no others: of two images that share one
    caption, the other captions of the one are not correct for the other.
    """

    image_ids: Tensor  # (N,) int64, equal for rows that show the same image
    counts: Tensor  # (N,) captions of each row
    caption_ids: Tensor  # (M,) int64, equal for captions that count as the same

    def __post_init__(self):
        total = int(self.caption_ids.max()) + 1
        owners = self.image_ids.repeat_interleave(self.counts)
        pairs = (owners * total + self.caption_ids).unique()  # sorted by image
        self._captions, numbers = pairs % total, pairs // total
        self._sizes = torch.bincount(numbers)
        self._starts = self._sizes.cumsum(0) - self._sizes
        rows_of = torch.bincount(self.image_ids)
        self.one_to_one = len(pairs) == total and bool((rows_of < 2).all())

    def of_images(self, rows: Tensor) -> Tensor:
        """(B, K) the ids of these rows' captions, -1 where there are fewer than K."""
        images = self.image_ids[rows]
        sizes = self._sizes[images, None]
        nth = torch.arange(int(sizes.max()))
        indices = (self._starts[images, None] + nth).clamp(max=len(self._captions) - 1)
        return self._captions[indices].masked_fill(nth >= sizes, -1)

    def rarest(self) -> Tensor:
        """(N,) for each row the index of its caption that fewest rows share (the first of ties)."""
        rows, total = torch.arange(len(self.counts)), len(self.caption_ids)
        _, shared = partner_counts(self.of_images(rows), self.caption_ids)
        order = shared * total + torch.arange(total)
        start = torch.full_like(rows, int(order.max()))
        owners = rows.repeat_interleave(self.counts)
        return start.scatter_reduce(0, owners, order, "amin") % total

    def common(self) -> list[tuple[int, int]]:
        """(caption index, number of its images) of very common captions, most common first."""
        images = len(self._sizes)
        found = torch.bincount(self._captions)
        first = dict(zip(self.caption_ids.flip(0).tolist(), range(len(self.caption_ids))[::-1],
                         strict=True))  # fmt: skip
        return [
            (first[i], int(found[i]))
            for i in found.argsort(descending=True, stable=True).tolist()
            if very_common(int(found[i]), images)
        ]

    def left_out(self) -> float:
        """The fraction of a random batch's off-diagonal pairs that are correct, not negatives."""
        rows = len(self.counts)
        if self.one_to_one or rows < 2:
            return 0.0
        _, correct = partner_counts(self.of_images(torch.arange(rows)), self.caption_ids)
        drawn = (1 / self.counts.double()).repeat_interleave(self.counts)
        return float(((correct - 1) * drawn).sum()) / (rows * (rows - 1))


def as_read(tokenizer, ids: Tensor, lengths: Tensor, texts: list[str]) -> Iterator[tuple]:
    """A key of each caption that is equal where a model reads the same tokens.

    An unknown token stands for any word, so captions with one are equal only if their texts are.
    """
    unknown = torch.zeros(len(ids), dtype=torch.bool)
    if (
        tokenizer.unk_token_id not in special_ids(tokenizer).tolist()
    ):  # where it is not an end token, too
        unknown = (ids == (-1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id)).any(1)
    tokens = map(bytes, torch.cat([ids, lengths[:, None].int()], 1).numpy())
    for token, text, some in zip(tokens, texts, unknown.tolist(), strict=True):
        yield token, text.casefold() if some else None


def encode_captions(
    tokenizer, texts: Sequence[Sequence[str]], image_ids: Tensor, max_length: int
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], CorrectCaptions]:
    """The captions of N images, at most `max_length` tokens each, and their `CorrectCaptions`.

    The captions are ids (M, L) int32 and lengths (M,), and for each image the index of its first
    caption (N,) and their number (N,).
    """
    flat = [caption for captions in texts for caption in captions]
    input_ids, valid = encode_texts(tokenizer, flat, max_length)
    ids, lengths = input_ids.int(), valid.sum(1)
    counts = torch.tensor([len(captions) for captions in texts])
    same = number(as_read(tokenizer, ids, lengths, flat))
    correct = CorrectCaptions(image_ids, counts, same)
    return (ids, lengths, counts.cumsum(0) - counts, counts), correct
