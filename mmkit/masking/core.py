"""What a mask is, and the noise it is made of.

Convention everywhere: `mask` is True where a token is HIDDEN (MAE's 1 = remove). Padding is another
tensor, `valid`, True = a REAL token; PyTorch's own attention masks disagree about polarity.
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
    """Which tokens are hidden, and how to pick and put back the others."""

    mask: Tensor  # (B, N) bool, True = hidden
    ids_keep: Tensor  # (B, K) int64, positions of the visible tokens
    ids_restore: Tensor  # (B, N) int64, where each position stands in [kept | hidden]
    keep_valid: Tensor | None = None  # (B, K) bool, False = filler, where K differs between samples
    # (B, N) int64, for 80/10/10: the id put in a hidden word's place, -1 = the mask token
    substitute: Tensor | None = None

    def __getitem__(self, rows) -> "Masking":
        parts = (self.mask, self.ids_keep, self.ids_restore, self.keep_valid, self.substitute)
        return Masking(*(None if part is None else part[rows] for part in parts))  # type: ignore


@dataclass
class TokenInfo:
    """What maskers need to know of a model: how it cuts images and captions into tokens."""

    patch_size: int  # side of a patch, in pixels
    special_ids: Tensor  # (S,) ids of tokens that are never masked
    maskable_ids: Tensor  # (W,) ids of all others
    is_subword: Tensor  # (V,) bool, True = a token that goes on with the word before it
    frequency: Tensor | None = None  # (V,) of each token in training, for the masker of that name
    # (B, 3, H, W) pixels -> (B, N) attention to each patch, for "attentive" and "inattentive"
    attend: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, tokenizer, patch_size: int) -> "TokenInfo":
        """That of a tokenizer alone, where there is no model."""
        ids = (special_ids(tokenizer), word_ids(tokenizer), is_subword(tokenizer))
        return cls(patch_size, *ids)


def patch_grid(pixel_values: Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of images (..., H, W)."""
    return pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size


# -- from an order to a mask -----------------------------------------------------------------


def check_ratio(mask_ratio: float | Tensor, count: int):
    """ValueError unless there is one ratio, or one for each of `count` samples, all in [0, 1)."""
    if isinstance(mask_ratio, Tensor) and mask_ratio.shape not in ((), (count,)):
        raise ValueError(
            f"mask_ratio has shape {tuple(mask_ratio.shape)}; give one number, or one for each of "
            f"the {count} samples"
        )
    ratios = torch.as_tensor(mask_ratio, dtype=torch.float64, device="cpu")
    if not bool(((ratios >= 0) & (ratios < 1)).all()):
        worst = float(ratios.flatten()[((ratios < 0) | ~(ratios < 1)).flatten()][0])
        raise ValueError(
            f"mask_ratio={worst:g} must be in [0, 1): 0 hides nothing, 0.75 three quarters "
            "(a fraction, not per cent)"
        )


_DIGITS = {torch.float32: 7, torch.float16: 3, torch.bfloat16: 2}  # that each holds of a decimal


def as_written(ratio: float | Tensor) -> float | Tensor:
    """A ratio in float64 as it was written: a float32 of 0.1 is 0.1, and not 0.10000000149.

    So a tensor gives the counts that the same plain number gives.
    """
    if not isinstance(ratio, Tensor):
        return float(ratio)
    exact = ratio.double()
    if (digits := _DIGITS.get(ratio.dtype)) is None:
        return exact
    decimal = exact.round(decimals=digits)
    return torch.where(decimal.to(ratio.dtype) == ratio, decimal, exact)


def count_kept(score: Tensor, mask_ratio: float | Tensor) -> int | Tensor:
    """How many tokens of score (B, N) stay, at least one; (B,) for ratios (B,)."""
    check_ratio(mask_ratio, len(score))
    num_tokens = score.shape[1]
    ratio = as_written(mask_ratio)
    if isinstance(ratio, Tensor) and ratio.ndim:
        return (num_tokens * (1 - ratio)).round().long().clamp(min=1)
    return max(1, round(num_tokens * (1 - float(ratio))))


def _inverse(order: Tensor) -> Tensor:
    """Where each number stands in a permutation (B, N): twice as fast as sorting again."""
    place = torch.arange(order.shape[1], device=order.device)
    return torch.empty_like(order).scatter_(1, order, place.expand_as(order))


def hide_largest(score: Tensor, mask_ratio: float | Tensor) -> Masking:
    """Hide the tokens with the largest score (B, N), the same exact number in each sample.

    K = max(1, round(N * (1 - mask_ratio))) stay; MAE truncates instead of rounding, so that 100
    tokens at 0.9 keep 9 there and 10 here. ids_keep is in the order of the scores (MAE's
    convention). mask_ratio (B,) gives each sample a ratio of its own; rows are then filled up to
    the longest, and keep_valid marks the filler. Raises ValueError outside [0, 1).
    """
    kept = count_kept(score, mask_ratio)
    ids_shuffle = score.argsort(dim=1, stable=True)
    ids_restore = _inverse(ids_shuffle)
    if not isinstance(kept, Tensor):
        return Masking(ids_restore >= kept, ids_shuffle[:, :kept], ids_restore)
    kept = kept.to(score.device)
    return _padded(ids_restore >= kept[:, None], ids_shuffle, ids_restore, kept)


def keep_visible(mask: Tensor, valid: Tensor) -> Masking:
    """A `Masking` from any mask (B, N): visible real tokens in order, filled up to the longest."""
    visible = valid & ~mask
    ids_shuffle = (~visible).long().argsort(dim=1, stable=True)
    ids_restore = _inverse(ids_shuffle)
    return _padded(mask, ids_shuffle, ids_restore, visible.sum(1))


def as_masking(found: Any, name: str, maskable: Tensor, valid: Tensor) -> Masking:
    """What a masker of one's own gave, a `Masking` or a bool mask (B, N), as a checked `Masking`.

    maskable (B, N): True = may be masked; valid (B, N): True = a token, which is encoded unless it
    is masked. What may not be masked is taken out of a bool mask. Raises ValueError, naming the
    first sample, where a mask has another shape, leaves nothing visible or masks what it may not,
    and where `ids_keep` or `ids_restore` is not what the mask says.
    """
    shape, head = tuple(valid.shape), f"masker {name!r} gave "
    mask = found.mask if isinstance(found, Masking) else found
    mask = torch.as_tensor(mask, device=valid.device) if hasattr(mask, "__array__") else None
    if mask is None or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        what = type(found).__name__ if mask is None else f"{tuple(mask.shape)} {mask.dtype}"
        raise ValueError(
            f"{head}{what} for {shape[0]} samples of {shape[1]} tokens; give a bool mask {shape}, "
            "True = masked, or what mmkit.masking.hide_largest(score, mask_ratio) makes"
        )
    if not isinstance(found, Masking):
        mask = mask & maskable
        found = keep_visible(mask, valid)
        if bool(found.keep_valid.all()):  # all of one length: rectangular without filler
            found.keep_valid = None
    kept, back = found.ids_keep, found.ids_restore
    real = torch.ones_like(kept, dtype=torch.bool) if found.keep_valid is None else found.keep_valid
    if kept.ndim != 2 or len(kept) != shape[0] or real.shape != kept.shape or back.shape != shape:
        raise ValueError(
            f"{head}ids_keep {tuple(kept.shape)} and ids_restore {tuple(back.shape)} for a mask "
            f"{shape}; give the bool mask itself, True = masked"
        )
    at = kept.clamp(0, shape[1] - 1)
    times = torch.zeros_like(back).scatter_add(1, at, real.long())  # (B, N) how often it is kept
    every = torch.arange(shape[1], device=back.device)
    leads = (back.sort(1).values == every).all(1, keepdim=True)
    leads = leads & ((back.gather(1, at) == every[: kept.shape[1]]) | ~real)
    faults = {
        "masks what may not be masked (the ends of a caption, padding)": mask & ~maskable,
        "leaves no token visible": maskable.any(1, True) & ~(maskable & ~mask).any(1, True),
        "keeps a token twice": times > 1,
        "keeps other tokens (ids_keep) than the mask leaves": (times > 0) != (valid & ~mask),
        "keeps tokens that are not there (ids_keep)": (at != kept) & real,
        "has an ids_restore that does not lead back": ~leads,
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
