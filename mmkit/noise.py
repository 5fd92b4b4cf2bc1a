"""Counter-based random numbers: the noise from which masks, orders and choices are drawn.

The noise is a pure function of (seed, epoch, sample id, stream), so that nothing drawn is ever
stored and all of it can be replayed: the same bits on every device and for any batch order, batch
size, number of workers and number of processes. Shapes: B batch, N tokens.
Walk-through: notebooks/02_masking.ipynb.
"""

import zlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # splitmix64's constants, as signed 64-bit integers
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_BITS = 24  # bits of a draw: exact in float32


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: `>>` of int64 would copy the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al. 2014): integer products wrap alike on CPU and GPU."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _uniform(state: Tensor, count: int) -> Tensor:
    """(B, count) float32 in [0, 1) from states (B, 1)."""
    position = torch.arange(count, dtype=torch.int64, device=state.device)
    bits = _mix(_mix(state + position * _GOLDEN))
    return _shift_right(bits, 64 - _BITS).float() / 2**_BITS


def mask_noise(
    seed: int, epoch: int, sample_ids: Tensor, num_tokens: int, stream: str = "image"
) -> Tensor:
    """Uniform noise for each token of each sample, a pure function of the arguments.

    The bits are the same on every device and for any batch order, batch size, number of workers
    and world size.

    Args:
        seed: seed of the run.
        epoch: epoch, from 0.
        sample_ids: (B,) int64; its device is that of the result.
        num_tokens: draws per sample.
        stream: what the noise is for; each name gives noise independent of all others.

    Returns:
        (B, num_tokens) float32 in [0, 1).

    Example:
        >>> noise = mm.mask_noise(seed=0, epoch=3, sample_ids=torch.tensor([7, 5]), num_tokens=9)
        >>> noise.shape
        torch.Size([2, 9])
        >>> alone = mm.mask_noise(seed=0, epoch=3, sample_ids=torch.tensor([5]), num_tokens=9)
        >>> torch.equal(alone[0], noise[1])  # whatever else is in the batch
        True
    """
    key = torch.tensor([zlib.crc32(stream.encode()), seed, epoch], dtype=torch.int64, device="cpu")
    state = _mix(key[:1])
    for part in (key[1:2], key[2:3]):
        state = _mix(state ^ part)
    return _uniform(_mix(state.to(sample_ids.device) ^ sample_ids)[:, None], num_tokens)


def more_noise(noise: Tensor, count: int) -> Tensor:
    """Draw (B, count) further values, a function of the noise (B, N) alone.

    For maskers that need another number of draws than there are tokens (a block's size and
    position).
    """
    state = torch.zeros_like(noise[:, :1], dtype=torch.int64)
    for column in as_integers(noise[:, :3]).long().split(1, dim=1):  # three draws: 72 bits
        state = _mix(state ^ column)
    return _uniform(state, count)


def as_integers(noise: Tensor) -> Tensor:
    """Noise as int32 in [0, 2**24): the same order, but it sorts twice as fast."""
    return (noise * 2**_BITS).int()


def then_noise(score: Tensor, noise: Tensor) -> Tensor:
    """Whole numbers (B, N) in the order of (score, noise): the noise breaks ties of the score.

    score (B, N) >= 0, float32 or whole numbers below 2**24. The bits of non-negative float32
    numbers have the same order as the numbers.
    """
    bits = score.float().abs().contiguous().view(torch.int32).long()  # abs: -0.0 is 0, too
    return (bits << _BITS) | as_integers(noise)
