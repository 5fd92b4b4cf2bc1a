"""What a mask is, and how scores become one.

Convention everywhere: `mask` is True where a token is MASKED (MAE's 1 = remove). Padding has a
tensor of its own, `valid`, True = a valid token (PyTorch's attention masks differ in polarity).
Masking is a pure function: seed, epoch and sample id give the noise, the noise gives the mask, so
that a mask is never stored and can always be replayed. Shapes: B batch, N tokens, K kept.
After He et al. 2022 (arXiv:2111.06377), section 3. Walk-through: notebooks/02_masking.ipynb.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.tokenizer import is_subword, special_ids, word_ids


@dataclass
class Masking:
    """Which tokens are masked, and how to pick the others and restore the order.

    Example:
        >>> noise = mm.mask_noise(seed=0, epoch=0, sample_ids=torch.arange(2), num_tokens=6)
        >>> masking = mm.masking.random_mask(noise, mask_ratio=0.5)
        >>> masking.mask.sum(1).tolist(), masking.ids_keep.shape
        ([3, 3], torch.Size([2, 3]))
        >>> x = torch.arange(6).expand(2, 6)  # a token says where it is
        >>> kept = x.gather(1, masking.ids_keep)
        >>> padded = torch.cat([kept, torch.full((2, 3), -1)], dim=1)  # -1 as mask token
        >>> restored = padded.gather(1, masking.ids_restore)
        >>> torch.equal(restored, x.masked_fill(masking.mask, -1))
        True
    """

    mask: Tensor  # (B, N) bool, True = masked
    ids_keep: Tensor  # (B, K) int64, positions of the visible tokens
    ids_restore: Tensor  # (B, N) int64, index of each position in [kept | masked]
    # (B, K) bool, False = padding, where K differs between samples
    keep_valid: Tensor | None = None
    # (B, N) int64, for 80/10/10: the id that replaces a masked token, -1 = the mask token
    substitute: Tensor | None = None

    def __getitem__(self, rows) -> "Masking":
        parts = (self.mask, self.ids_keep, self.ids_restore, self.keep_valid, self.substitute)
        return Masking(*(None if part is None else part[rows] for part in parts))  # type: ignore


@dataclass
class TokenInfo:
    """What maskers need to know about a model: how it splits images and captions into tokens."""

    patch_size: int  # side of a patch, in pixels
    special_ids: Tensor  # (S,) ids of tokens that are never masked
    maskable_ids: Tensor  # (W,) ids of all others
    is_subword: Tensor  # (V,) bool, True = a token that continues the previous word
    # (V,) frequency of each token in the training captions, for the masker "frequency"
    frequency: Tensor | None = None
    # (B, 3, H, W) pixels -> (B, N) attention to each patch, for "attentive" and "inattentive"
    attend: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, tokenizer, patch_size: int) -> "TokenInfo":
        """The info of a tokenizer and a patch size, where there is no model."""
        ids = (special_ids(tokenizer), word_ids(tokenizer), is_subword(tokenizer))
        return cls(patch_size, *ids)


def patch_grid(pixel_values: Tensor, patch_size: int) -> tuple[int, int]:
    """Number of rows and columns of patches of images (..., H, W)."""
    return pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size


# -- from an order to a mask -----------------------------------------------------------------


def check_ratio(mask_ratio: float | Tensor, count: int):
    """ValueError unless it is one ratio, or one for each of `count` samples, all in [0, 1)."""
    if isinstance(mask_ratio, Tensor) and mask_ratio.shape not in ((), (count,)):
        raise ValueError(
            f"mask_ratio has shape {tuple(mask_ratio.shape)}; give one number, or one for each of "
            f"the {count} samples"
        )
    ratios = torch.as_tensor(mask_ratio, dtype=torch.float64, device="cpu")
    if not bool(((ratios >= 0) & (ratios < 1)).all()):
        worst = float(ratios.flatten()[((ratios < 0) | ~(ratios < 1)).flatten()][0])
        raise ValueError(
            f"mask_ratio={worst:g} must be in [0, 1): 0 masks nothing, 0.75 three quarters "
            "(a fraction, not per cent)"
        )


_DIGITS = {torch.float32: 7, torch.float16: 3, torch.bfloat16: 2}  # decimal digits that each holds


def as_written(ratio: float | Tensor) -> float | Tensor:
    """A ratio in float64 as it was written: a float32 0.1 becomes 0.1, not 0.10000000149.

    A tensor thus gives the same counts as a plain number.
    """
    if not isinstance(ratio, Tensor):
        return float(ratio)
    exact = ratio.double()
    if (digits := _DIGITS.get(ratio.dtype)) is None:
        return exact
    decimal = exact.round(decimals=digits)
    return torch.where(decimal.to(ratio.dtype) == ratio, decimal, exact)


def count_kept(score: Tensor, mask_ratio: float | Tensor) -> int | Tensor:
    """How many tokens of score (B, N) stay visible, at least one; (B,) for ratios (B,)."""
    check_ratio(mask_ratio, len(score))
    num_tokens = score.shape[1]
    ratio = as_written(mask_ratio)
    if isinstance(ratio, Tensor) and ratio.ndim:
        return (num_tokens * (1 - ratio)).round().long().clamp(min=1).to(score.device)
    return max(1, round(num_tokens * (1 - float(ratio))))


def _inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation (B, N), twice as fast as sorting again."""
    position = torch.arange(order.shape[1], device=order.device)
    return torch.empty_like(order).scatter_(1, order, position.expand_as(order))


def mask_largest(score: Tensor, mask_ratio: float | Tensor) -> Masking:
    """Mask the tokens with the largest score, exactly the same number in each sample.

    Args:
        score: (B, N); of equal scores the later ones are masked first.
        mask_ratio: fraction of tokens to mask, in [0, 1); (B,) gives each sample its own.

    Returns:
        Masking with K = max(1, round(N * (1 - mask_ratio))) visible tokens; MAE truncates instead
        of rounding, so that 100 tokens at 0.9 keep 9 there and 10 here. ids_keep is in the order of
        the scores (MAE's convention). With ratios (B,), rows are padded to the longest, and
        keep_valid is False for the padding.

    Raises:
        ValueError: a ratio is outside [0, 1), or there are not B of them.
    """
    kept = count_kept(score, mask_ratio)
    ids_shuffle = score.argsort(dim=1, stable=True)
    ids_restore = _inverse(ids_shuffle)
    if not isinstance(kept, Tensor):
        return Masking(ids_restore >= kept, ids_shuffle[:, :kept], ids_restore)
    kept = kept.to(score.device)
    return _padded(ids_restore >= kept[:, None], ids_shuffle, ids_restore, kept)


def keep_visible(mask: Tensor, valid: Tensor) -> Masking:
    """Make a `Masking` from any mask.

    Args:
        mask: (B, N) bool, True = masked.
        valid: (B, N) bool, False = padding.

    Returns:
        Masking with the visible valid tokens in order, padded to the longest row.
    """
    visible = valid & ~mask
    ids_shuffle = (~visible).long().argsort(dim=1, stable=True)
    ids_restore = _inverse(ids_shuffle)
    return _padded(mask, ids_shuffle, ids_restore, visible.sum(1))


def as_masking(found: Any, name: str, maskable: Tensor, valid: Tensor) -> Masking:
    """Check what a user's masker returned, a `Masking` or a bool mask (B, N); return a `Masking`.

    maskable (B, N): True = may be masked; valid (B, N): True = a token, which is encoded unless it
    is masked. A bool mask loses what may not be masked. Raises ValueError, naming the first sample,
    if a mask has another shape, leaves nothing visible or masks what may not be masked, or if
    `ids_keep` or `ids_restore` contradicts the mask.
    """
    shape, head = tuple(valid.shape), f"masker {name!r} gave "
    mask = found.mask if isinstance(found, Masking) else found
    mask = torch.as_tensor(mask, device=valid.device) if hasattr(mask, "__array__") else None
    if mask is None or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        what = type(found).__name__ if mask is None else f"{tuple(mask.shape)} {mask.dtype}"
        raise ValueError(
            f"{head}{what} for {shape[0]} samples of {shape[1]} tokens; give a bool mask {shape}, "
            "True = masked, or what mmkit.masking.mask_largest(score, mask_ratio) makes"
        )
    if not isinstance(found, Masking):
        mask = mask & maskable
        found = keep_visible(mask, valid)
        if bool(found.keep_valid.all()):  # all of the same length, without padding
            found.keep_valid = None
    kept, back = found.ids_keep, found.ids_restore
    used = torch.ones_like(kept, dtype=torch.bool) if found.keep_valid is None else found.keep_valid
    if kept.ndim != 2 or len(kept) != shape[0] or used.shape != kept.shape or back.shape != shape:
        raise ValueError(
            f"{head}ids_keep {tuple(kept.shape)} and ids_restore {tuple(back.shape)} for a mask "
            f"{shape}; give the bool mask itself, True = masked"
        )
    at = kept.clamp(0, shape[1] - 1)
    times = torch.zeros_like(back).scatter_add(1, at, used.long())  # (B, N) how often it is kept
    every = torch.arange(shape[1], device=back.device)
    leads = (back.sort(1).values == every).all(1, keepdim=True)
    leads = leads & ((back.gather(1, at) == every[: kept.shape[1]]) | ~used)
    faults = {
        "masks what may not be masked (special tokens, padding)": mask & ~maskable,
        "leaves no token visible": maskable.any(1, True) & ~(maskable & ~mask).any(1, True),
        "keeps a token twice": times > 1,
        "keeps other tokens (ids_keep) than the mask leaves": (times > 0) != (valid & ~mask),
        "keeps tokens that do not exist (ids_keep)": (at != kept) & used,
        "has an ids_restore that does not restore the order": ~leads,
    }
    for fault, where in faults.items():
        if bool(where.any()):
            raise ValueError(
                f"{head}a mask that {fault}, in sample {int(where.any(1).nonzero()[0])} of the "
                "batch; each sample keeps at least one token, each once; a bool mask is enough"
            )
    return found


def _padded(mask: Tensor, ids_shuffle: Tensor, ids_restore: Tensor, num_kept: Tensor) -> Masking:
    longest = max(1, int(num_kept.max()))
    keep_valid = torch.arange(longest, device=mask.device) < num_kept[:, None]
    return Masking(mask, ids_shuffle[:, :longest], ids_restore, keep_valid)
