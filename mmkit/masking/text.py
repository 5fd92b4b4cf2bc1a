"""Text maskers: one function per published strategy.

Each is `f(noise, mask_ratio, caption) -> Masking`: noise (B, L) uniform in [0, 1), mask_ratio a
fraction of the maskable tokens (or one per sample, (B,)). Of n maskable tokens
round(n * mask_ratio) are masked, at most n - 1; never [CLS], [SEP] or padding. ids_keep is in
reading order, [CLS] first, padded to the longest; keep_valid is False for the padding. `mask` is
True where a token is MASKED.
Shapes: B batch, L text length. Walk-through: notebooks/02_masking.ipynb.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import in_float64
from ..older_names import older_attributes
from .core import Masking, as_written, check_ratio, keep_visible

FREQUENCY_THRESHOLD = 1e-3  # t of `frequency_mask`, for sets of captions of a few thousand tokens


@older_attributes(least_hidden="min_masked")
@dataclass
class Caption:
    """What a text masker may use besides the noise."""

    valid: Tensor  # (B, L) bool, False = padding
    maskable: Tensor  # (B, L) bool, True = a token that may be masked
    word_start: Tensor | None = None  # (B, L) bool, True = the first token of a word
    # (B, L) fraction of each token among all tokens of the training captions
    frequency: Tensor | None = None
    min_masked: int = 0  # 1 if masked tokens are to be predicted; a single token stays visible


def maskable_tokens(input_ids: Tensor, valid: Tensor, special: Tensor) -> Tensor:
    """Valid tokens that may be masked: all but the special ones.

    Args:
        input_ids: (B, L) int64.
        valid: (B, L) bool, False = padding.
        special: (S,) ids that are never masked.

    Returns:
        (B, L) bool, True = may be masked.
    """
    return valid & ~torch.isin(input_ids, special.to(input_ids.device))


def num_masked(mask_ratio: float | Tensor, caption: Caption) -> Tensor:
    """How many tokens of each caption are to be masked, (B,) int64.

    Raises ValueError for a ratio outside [0, 1) and for a caption without a valid token.
    """
    check_ratio(mask_ratio, len(caption.valid))
    if not bool(caption.valid.any(1).all()):
        row = int((~caption.valid.any(1)).nonzero()[0])
        raise ValueError(f"caption {row} is all padding: it has no valid token; give it a text")
    count = caption.maskable.sum(1)
    exact = in_float64(count)
    ratio = torch.as_tensor(as_written(mask_ratio), dtype=torch.float64, device=exact.device)
    masked = (exact * ratio).round().long().to(count.device).clamp(min=caption.min_masked)
    return torch.minimum(masked, (count - 1).clamp(min=0))


def _mask_largest(score: Tensor, mask_ratio: float | Tensor, caption: Caption) -> Masking:
    """Mask the tokens with the largest score (B, L) > -inf."""
    rank = score.masked_fill(~caption.maskable, float("-inf"))
    rank = rank.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    masked = num_masked(mask_ratio, caption)
    return keep_visible((rank < masked[:, None]) & caption.maskable, caption.valid)


def random_text_mask(noise: Tensor, mask_ratio: float | Tensor, caption: Caption) -> Masking:
    """Mask the tokens with the largest noise.

    FLIP (Li et al. 2023, arXiv:2212.00794) draws over the padded length and so spends a part of its
    budget on padding; here the ratio is that of the maskable tokens.

    Args:
        noise: (B, L) float32, uniform in [0, 1).
        mask_ratio: fraction of the maskable tokens to mask, in [0, 1); (B,) gives each caption its
            own.
        caption: which tokens are valid, and which may be masked.

    Returns:
        Masking; of n maskable tokens round(n * mask_ratio) are masked, at most n - 1 and at least
        caption.min_masked. ids_keep is in reading order, padded to the longest (keep_valid False).

    Raises:
        ValueError: a ratio is outside [0, 1), or a caption has no valid token.

    Example:
        >>> batch = data.batch([0, 3])
        >>> caption = mm.masking.caption_of(batch.input_ids, batch.valid, model.token_info)
        >>> noise = mm.mask_noise(0, 0, batch.sample_ids, batch.input_ids.shape[1], "text")
        >>> masking = mm.masking.random_text_mask(noise, 0.5, caption)
        >>> caption.maskable.sum(1).tolist(), masking.mask.sum(1).tolist()
        ([2, 5], [1, 2])
    """
    return _mask_largest(noise, mask_ratio, caption)


def block_text_mask(noise: Tensor, mask_ratio: float | Tensor, caption: Caption) -> Masking:
    """Keep one run of adjacent tokens at a random position, mask the rest.

    Li et al. 2023 (CLIPA, arXiv:2305.07017, "block"; open_clip calls it "simple"). There the run
    has a fixed length; here its length follows from the ratio.
    """
    count, masked = caption.maskable.sum(1), num_masked(mask_ratio, caption)
    start = (noise[:, 0] * (masked + 1)).long()[:, None]  # uniform over all starts of the run
    index = caption.maskable.cumsum(1) - 1  # of each token among the maskable ones
    visible = (index >= start) & (index < start + (count - masked)[:, None])
    return keep_visible(caption.maskable & ~visible, caption.valid)


def truncate_mask(noise: Tensor, mask_ratio: float | Tensor, caption: Caption) -> Masking:
    """Keep the first tokens and mask the last ones; nothing is random.

    CLIPA's "truncation" (arXiv:2305.07017): to a fixed length there, by the ratio here.
    """
    position = torch.arange(noise.shape[1], device=noise.device, dtype=noise.dtype)
    return _mask_largest(position.expand_as(noise), mask_ratio, caption)


def whole_word_mask(noise: Tensor, mask_ratio: float | Tensor, caption: Caption) -> Masking:
    """Mask whole words: all tokens of a word, or none.

    BERT's "whole word masking" (Devlin et al. 2019, arXiv:1810.04805, code of May 2019): words are
    taken in random order, and a word that would exceed the number of tokens to mask is skipped, so
    that at most that number is masked. If `min_masked` asks for one token and no word fits, the
    first word is masked, unless it is the only one.
    """
    if caption.word_start is None:
        raise ValueError("text masker 'whole_word' needs word_start (B, L): where words begin")
    maskable = caption.maskable
    first = maskable & (caption.word_start | (maskable.cumsum(1) == 1))
    number = (first.cumsum(1) - 1).clamp(min=0)  # (B, L): index of the word that a token belongs to
    most = max(1, int(first.sum(1).max()))
    draw = noise.new_full((len(noise), most), -1.0)
    draw = draw.scatter_reduce(1, number, noise.masked_fill(~first, -1.0), "amax")
    length = torch.zeros_like(draw, dtype=torch.int64).scatter_add(1, number, maskable.long())
    budget, masked = num_masked(mask_ratio, caption), torch.zeros_like(draw, dtype=torch.bool)
    at_least_one = torch.minimum(budget, torch.as_tensor(caption.min_masked))
    for word in draw.argsort(dim=1, descending=True, stable=True).split(1, dim=1):  # (B, 1) each
        size = length.gather(1, word)[:, 0]
        alone = size == maskable.sum(1)
        none_yet = (at_least_one > 0) & ~masked.any(1) & (size > budget) & ~alone
        fits = (size > 0) & ((size <= budget) | (none_yet & _nothing_fits(length, budget)))
        masked = masked.scatter(1, word, fits[:, None] | masked.gather(1, word))
        budget = torch.where(fits, (budget - size).clamp(min=0), budget)
    return keep_visible(masked.gather(1, number) & maskable, caption.valid)


def _nothing_fits(length: Tensor, budget: Tensor) -> Tensor:
    """(B,) bool: all words, of lengths (B, W), are longer than the budget (B,)."""
    return ((length > budget[:, None]) | (length == 0)).all(1)


def frequency_mask(noise: Tensor, mask_ratio: float | Tensor, caption: Caption) -> Masking:
    """Mask frequent words more often than rare ones.

    Liang & Larson 2024 (CLIPF, arXiv:2412.16148): a word of relative frequency f has the drop
    probability p = max(0, 1 - sqrt(t / f)), and the words with the largest U - p are kept (U
    uniform). Here f is the frequency of a token, t = 1e-3 suits small sets of captions (f of "a" is
    near 0.1), and the number of kept tokens follows from the ratio, not from a fixed length.
    """
    if caption.frequency is None:
        raise ValueError(
            "text masker 'frequency' needs the frequency of the tokens in the captions that the "
            "model was trained on: set model.token_frequency = train.token_frequency(), or give "
            "frequency"
        )
    rare = (FREQUENCY_THRESHOLD / caption.frequency.clamp(min=1e-12)).sqrt()
    return _mask_largest(noise + (1 - rare).clamp(min=0), mask_ratio, caption)


# Names for `text_mask` -> f(noise, mask_ratio, caption) -> Masking.
TEXT_MASKERS: dict[str, Callable[..., Masking]] = {
    "random": random_text_mask,
    "block": block_text_mask,
    "truncate": truncate_mask,
    "whole_word": whole_word_mask,
    "frequency": frequency_mask,
}
