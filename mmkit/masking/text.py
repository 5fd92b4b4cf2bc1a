"""Which words are hidden: one function per published strategy.

Each is `f(noise, mask_ratio, caption) -> Masking`: noise (B, L) uniform in [0, 1), mask_ratio a
fraction of the REAL word pieces (or one per sample, (B,)). Of n pieces round(n * mask_ratio) are
hidden, at most n - 1; never [CLS], [SEP] or padding. ids_keep is in reading order, [CLS] first,
filled up to the longest; keep_valid marks the filler. `mask` is True where a piece is HIDDEN.
Shapes: B batch, L text length. Walk-through: notebooks/02_masking.ipynb.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .core import Masking, as_written, check_ratio, keep_visible

FREQUENCY_THRESHOLD = 1e-3  # t of `frequency_mask`; right for captions of a few thousand pieces


@dataclass
class Caption:
    """What a text masker looks at besides the noise."""

    valid: Tensor  # (B, L) bool, True = a real token
    maskable: Tensor  # (B, L) bool, True = a word piece that may be hidden
    word_start: Tensor | None = None  # (B, L) bool, True = the first piece of a word
    frequency: Tensor | None = None  # (B, L) share of each piece among all pieces of the captions
    least_hidden: int = 0  # 1 where hidden words are to be predicted; a lone piece stays


def maskable_tokens(input_ids: Tensor, valid: Tensor, special: Tensor) -> Tensor:
    """(B, L) bool: real tokens that are words, i.e. not one of the `special` ids."""
    return valid & ~torch.isin(input_ids, special.to(input_ids.device))


def num_hidden(mask_ratio: float | Tensor, caption: Caption) -> Tensor:
    """How many pieces of each caption are to be hidden, (B,) int64.

    Raises ValueError for a ratio outside [0, 1) and for a caption without a single real token.
    """
    check_ratio(mask_ratio, len(caption.valid))
    if not bool(caption.valid.any(1).all()):
        row = int((~caption.valid.any(1)).nonzero()[0])
        raise ValueError(f"caption {row} is all padding: no real token; give it a text")
    count = caption.maskable.sum(1)
    ratio = torch.as_tensor(as_written(mask_ratio), dtype=torch.float64, device=count.device)
    hidden = (count * ratio).round().long().clamp(min=caption.least_hidden)
    return torch.minimum(hidden, (count - 1).clamp(min=0))


def _hide_largest(score: Tensor, mask_ratio: float | Tensor, caption: Caption) -> Masking:
    """Hide the word pieces with the largest score (B, L) > -inf."""
    rank = score.masked_fill(~caption.maskable, float("-inf"))
    rank = rank.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    hidden = num_hidden(mask_ratio, caption)
    return keep_visible((rank < hidden[:, None]) & caption.maskable, caption.valid)


def random_text_mask(noise: Tensor, mask_ratio: float | Tensor, caption: Caption) -> Masking:
    """Hide the word pieces with the largest noise.

    FLIP (Li et al. 2023, arXiv:2212.00794) draws over the padded length and so spends its budget on
    padding; here the ratio is over real pieces.
    """
    return _hide_largest(noise, mask_ratio, caption)


def block_text_mask(noise: Tensor, mask_ratio: float | Tensor, caption: Caption) -> Masking:
    """Keep one run of neighbouring pieces at a random place, hide the rest.

    Li et al. 2023 (CLIPA, arXiv:2305.07017, "block"; open_clip calls it "simple"). There the run
    has a fixed length; here it follows from the ratio.
    """
    count, hidden = caption.maskable.sum(1), num_hidden(mask_ratio, caption)
    start = (noise[:, 0] * (hidden + 1)).long()[:, None]  # uniform over all places of the run
    place = caption.maskable.cumsum(1) - 1  # the how-manieth word piece
    seen = (place >= start) & (place < start + (count - hidden)[:, None])
    return keep_visible(caption.maskable & ~seen, caption.valid)


def truncate_mask(noise: Tensor, mask_ratio: float | Tensor, caption: Caption) -> Masking:
    """Keep the first pieces, hide the end. Not random at all.

    CLIPA's "truncation" (arXiv:2305.07017), to a fixed length there, by the ratio here.
    """
    place = torch.arange(noise.shape[1], device=noise.device, dtype=noise.dtype)
    return _hide_largest(place.expand_as(noise), mask_ratio, caption)


def whole_word_mask(noise: Tensor, mask_ratio: float | Tensor, caption: Caption) -> Masking:
    """Hide whole words: all pieces of one, or none.

    BERT's "whole word masking" (Devlin et al. 2019, arXiv:1810.04805, code of May 2019): words in
    random order, one that would exceed the number of pieces is skipped. So the number is at most
    the one asked for. Where `least_hidden` asks for one and no word fits, the first is hidden
    unless it is the only one.
    """
    if caption.word_start is None:
        raise ValueError("text masker 'whole_word' needs word_start (B, L): where words begin")
    words = caption.maskable
    first = words & (caption.word_start | (words.cumsum(1) == 1))
    number = (first.cumsum(1) - 1).clamp(min=0)  # (B, L): the how-manieth word a piece is of
    most = max(1, int(first.sum(1).max()))
    draw = noise.new_full((len(noise), most), -1.0)
    draw = draw.scatter_reduce(1, number, noise.masked_fill(~first, -1.0), "amax")
    length = torch.zeros_like(draw, dtype=torch.int64).scatter_add(1, number, words.long())
    budget, hide = num_hidden(mask_ratio, caption), torch.zeros_like(draw, dtype=torch.bool)
    at_least_one = torch.minimum(budget, torch.as_tensor(caption.least_hidden))
    for word in draw.argsort(dim=1, descending=True, stable=True).split(1, dim=1):  # (B, 1) each
        size = length.gather(1, word)[:, 0]
        alone = size == words.sum(1)
        none_yet = (at_least_one > 0) & ~hide.any(1) & (size > budget) & ~alone
        fits = (size > 0) & ((size <= budget) | (none_yet & _nothing_fits(length, budget)))
        hide = hide.scatter(1, word, fits[:, None] | hide.gather(1, word))
        budget = torch.where(fits, (budget - size).clamp(min=0), budget)
    return keep_visible(hide.gather(1, number) & words, caption.valid)


def _nothing_fits(length: Tensor, budget: Tensor) -> Tensor:
    """(B,) bool: every word (B, W) is longer than the budget (B,)."""
    return ((length > budget[:, None]) | (length == 0)).all(1)


def frequency_mask(noise: Tensor, mask_ratio: float | Tensor, caption: Caption) -> Masking:
    """Hide frequent words more often than rare ones.

    Liang & Larson 2024 (CLIPF, arXiv:2412.16148): a word of relative frequency f has the drop
    probability p = max(0, 1 - sqrt(t / f)), and those with the largest U - p are kept (U uniform).
    Here f is counted over word pieces, t = 1e-3 suits small sets of captions (f of "a" is near
    0.1), and the number kept follows from the ratio instead of a fixed length.
    """
    if caption.frequency is None:
        raise ValueError(
            "text masker 'frequency' needs the pieces' frequency among the captions that the model "
            "was trained on: set model.token_frequency = train.token_frequency(), or give frequency"
        )
    rare = (FREQUENCY_THRESHOLD / caption.frequency.clamp(min=1e-12)).sqrt()
    return _hide_largest(noise + (1 - rare).clamp(min=0), mask_ratio, caption)


# What `text_mask` may name: f(noise, mask_ratio, caption) -> Masking.
TEXT_MASKERS: dict[str, Callable[..., Masking]] = {
    "random": random_text_mask,
    "block": block_text_mask,
    "truncate": truncate_mask,
    "whole_word": whole_word_mask,
    "frequency": frequency_mask,
}
