"""Choose which tokens the encoder sees.

Convention everywhere: `mask` is True where a token is HIDDEN (MAE's 1 = remove). Padding is another
tensor, `valid`, True = a REAL token; PyTorch's own attention masks disagree about polarity.
Masking is a pure function: seed, epoch and sample id give the noise, the noise gives the mask, so
that a mask is never stored and can always be replayed. Shapes: B batch, N tokens, K kept.
After He et al. 2022 (arXiv:2111.06377), section 3, and Li et al. 2023 (FLIP, arXiv:2212.00794).
Walk-through: notebooks/02_masking.ipynb.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import nearest
from .data import Batch


@dataclass
class Masking:
    """Which tokens are hidden, and how to pick and put back the others."""

    mask: Tensor  # (B, N) bool, True = hidden
    ids_keep: Tensor  # (B, K) int64, positions of the visible tokens
    ids_restore: Tensor  # (B, N) int64, where each position stands in [kept | hidden]
    keep_valid: Tensor | None = None  # (B, K) bool, False = filler, where K differs between samples

    def __getitem__(self, rows) -> "Masking":
        valid = None if self.keep_valid is None else self.keep_valid[rows]
        return Masking(self.mask[rows], self.ids_keep[rows], self.ids_restore[rows], valid)


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # splitmix64's constants, as signed 64-bit integers
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64 `>>` copies the sign bit in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al. 2014): integer products wrap alike on CPU and GPU."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def mask_noise(
    seed: int, epoch: int, sample_ids: Tensor, num_tokens: int, stream: str = "image"
) -> Tensor:
    """Noise (B, num_tokens) float32, uniform in [0, 1), a pure function of its arguments.

    sample_ids (B,) int64. The same bits on every device and for any batch order, batch size, worker
    count and world size; another `stream` is another, independent noise.
    """
    device = sample_ids.device
    key = torch.tensor([zlib.crc32(stream.encode()), seed, epoch], dtype=torch.int64, device="cpu")
    state = _mix(key[:1])
    for part in (key[1:2], key[2:3]):
        state = _mix(state ^ part)
    state = _mix(state.to(device) ^ sample_ids)[:, None]  # (B, 1)
    tokens = torch.arange(num_tokens, dtype=torch.int64, device=device)
    bits = _mix(_mix(state + tokens * _GOLDEN))  # (B, N)
    return _shift_right(bits, 40).float() / 2**24  # 24 bits: exact in float32


def _check_ratio(mask_ratio: float):
    if not 0 <= mask_ratio < 1:
        raise ValueError(
            f"mask_ratio={mask_ratio} must be in [0, 1): 0 hides nothing, 0.75 three quarters"
        )


def random_mask(noise: Tensor, mask_ratio: float) -> Masking:
    """Hide the tokens with the largest noise, independently per sample.

    noise (B, N) uniform in [0, 1). mask_ratio is a fraction in [0, 1).
    Returns Masking(ids_keep (B, K), ids_restore (B, N), mask (B, N) bool),
    K = max(1, round(N * (1 - mask_ratio))); MAE truncates instead of rounding.
    Raises ValueError outside that range.
    """
    _check_ratio(mask_ratio)
    num_kept = max(1, round(noise.shape[1] * (1 - mask_ratio)))
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1, stable=True)
    return Masking(ids_restore >= num_kept, ids_shuffle[:, :num_kept], ids_restore)


def random_text_mask(noise: Tensor, mask_ratio: float, valid: Tensor, maskable: Tensor) -> Masking:
    """Hide the words with the largest noise; never padding or special tokens.

    noise (B, N) uniform; valid (B, N) True = a real token; maskable (B, N) True = a word piece that
    may be hidden. Of a caption with n word pieces round(n * mask_ratio) are hidden, at most n - 1
    (FLIP draws over the padded length instead and so wastes its budget on padding).
    ids_keep is in reading order, [CLS] first, filled up to the longest; keep_valid marks the
    filler.
    """
    _check_ratio(mask_ratio)
    count = maskable.sum(1)
    hidden = torch.minimum((count * mask_ratio).round().long(), (count - 1).clamp(min=0))
    rank = noise.masked_fill(~maskable, -1).argsort(dim=1, descending=True, stable=True)
    rank = rank.argsort(dim=1, stable=True)  # (B, N): 0 = the largest noise among words
    mask = (rank < hidden[:, None]) & maskable
    return keep_visible(mask, valid)


def keep_visible(mask: Tensor, valid: Tensor) -> Masking:
    """A `Masking` from any mask (B, N): visible real tokens in order, filled up to the longest."""
    visible = valid & ~mask
    ids_shuffle = (~visible).long().argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1, stable=True)
    num_kept = visible.sum(1)
    longest = max(1, int(num_kept.max()))
    keep_valid = torch.arange(longest, device=mask.device) < num_kept[:, None]
    return Masking(mask, ids_shuffle[:, :longest], ids_restore, keep_valid)


def maskable_words(input_ids: Tensor, valid: Tensor, special: Tensor) -> Tensor:
    """(B, L) bool: real tokens that are words, i.e. not one of the `special` ids."""
    return valid & ~torch.isin(input_ids, special.to(input_ids.device))


IMAGE_MASKERS: dict[str, Callable[..., Masking]] = {"random": random_mask}
TEXT_MASKERS: dict[str, Callable[..., Masking]] = {"random": random_text_mask}


def find_masker(name: str, maskers: dict[str, Callable]) -> Callable:
    """The masker of that name; ValueError with the known names otherwise."""
    if name not in maskers:
        raise ValueError(f"masker {name!r} is not known; {nearest(name, maskers)}")
    return maskers[name]


def draw_maskings(
    batch: Batch,
    num_patches: int,
    special: Tensor,
    *,
    seed: int,
    epoch: int,
    image: tuple[str, float] = ("random", 0.0),
    text: tuple[str, float] = ("random", 0.0),
) -> tuple[Masking | None, Masking | None]:
    """The image and text `Masking` of a batch; None where the ratio is 0.

    image, text: (masker name, ratio). special: token ids that are never hidden.
    """
    image_masking = text_masking = None
    if image[1] > 0:
        noise = mask_noise(seed, epoch, batch.sample_ids, num_patches, "image")
        image_masking = find_masker(image[0], IMAGE_MASKERS)(noise, image[1])
    if text[1] > 0:
        noise = mask_noise(seed, epoch, batch.sample_ids, batch.input_ids.shape[1], "text")
        maskable = maskable_words(batch.input_ids, batch.valid, special)
        text_masking = find_masker(text[0], TEXT_MASKERS)(noise, text[1], batch.valid, maskable)
    return image_masking, text_masking
