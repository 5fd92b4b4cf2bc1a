"""Split images into patches, pick some of them, and join patches to images.

Shapes: B batch, N patches, K kept, D width. Walk-through: notebooks/02_masking.ipynb.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masking.core import patch_grid

MASKED = 208  # the grey of a masked patch


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) -> (B, N, 3 * patch_size**2), patches row by row, channels first in each.

    This is the order of a flattened convolution kernel. Raises ValueError if H or W is not a
    multiple of patch_size.
    """
    _, _, height, width = pixels.shape
    for name, side in (("height", height), ("width", width)):
        if side % patch_size:
            raise ValueError(
                f"image {name} {side} is not a multiple of patch_size {patch_size}; "
                f"try {side - side % patch_size or patch_size}"
            )
    p, (h, w) = patch_size, patch_grid(pixels, patch_size)
    x = pixels.unflatten(2, (h, p)).unflatten(4, (w, p))  # (B, 3, h, p, w, p)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: (B, N, 3 * patch_size**2) -> (B, 3, H, W); grid: rows, columns."""
    p = patch_size
    x = patches.unflatten(1, grid).unflatten(3, (-1, p, p))  # (B, h, w, 3, p, p)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def pick_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (B, K) of x (B, N, D): (B, K, D)."""
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    picked = x.flatten(0, 1).index_select(0, (ids + first).flatten())
    return picked.view(*ids.shape, x.shape[-1])


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Interpolate the position embeddings (1, N, D) of a square grid: (1, side**2, D).

    Bicubic, with antialiasing if the new grid is smaller.
    """
    old = round(positions.shape[1] ** 0.5)
    plane = positions.transpose(1, 2).unflatten(2, (old, old)).float()  # (1, D, h, w)
    plane = F.interpolate(plane, (side, side), mode="bicubic", antialias=True)
    return plane.flatten(2).transpose(1, 2).to(positions.dtype)


def paint_mask(pixels: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """Paint the masked patches of images grey.

    Args:
        pixels: (B, 3, H, W) uint8.
        mask: (B, N) bool, True = masked.
        patch_size: side of a patch, in pixels.
    Returns:
        The images, (B, 3, H, W) uint8.
    """
    patches = patchify(pixels, patch_size).masked_fill(mask[..., None], MASKED)
    return unpatchify(patches, patch_size, patch_grid(pixels, patch_size))
