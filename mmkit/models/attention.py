"""What a ViT looks at.

Shapes: B batch, N = h x w patches, D width. Walk-through: notebooks/02_masking.ipynb.
"""

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masking.core import patch_grid


@contextlib.contextmanager
def eval_mode(model):
    """Evaluation mode without gradients; each part's training flag is put back."""
    training = {part: part.training for part in model.modules()}  # a frozen tower has its own
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, flag in training.items():
            part.training = flag


def key_mask(real: Tensor | None, implementation: str, dtype: torch.dtype) -> Tensor | None:
    """What a transformers layer takes for keys of which only the real ones (B, T) count.

    (B, 1, 1, T): bool, True = counts, for "sdpa"; 0 or -inf for "eager", which adds its mask. In a
    row without a real key all count: its states mean nothing, but they are finite.
    """
    if real is None:
        return None
    real = (real | ~real.any(1, keepdim=True))[:, None, None, :]
    if implementation != "eager":
        return real
    return torch.zeros_like(real, dtype=dtype).masked_fill(~real, -math.inf)


@torch.no_grad()
def class_attention(vit: Any, pixels: Tensor, half: bool = False, of: str = "cls") -> Tensor:
    """(B, N) float32: attention of the class token to each patch, mean over layers and heads.

    vit: a transformers ViTModel; pixels (B, 3, H, W) normalised. half: at half the resolution (a
    quarter of the patches, position embeddings averaged), each value standing for 2 x 2 patches.
    of: "cls", or "mean" for a model that pools by the mean of its patches: nothing trains its class
    token to look anywhere, so there it is the mean over the patches' own rows.
    After Yang et al. 2023 (A-CLIP, arXiv:2212.08653), whose features are the class token.
    """
    patch = vit.config.patch_size
    grid = patch_grid(pixels, patch)
    small = ((grid[0] + 1) // 2, (grid[1] + 1) // 2) if half else grid
    embeddings = vit.embeddings
    place = embeddings.position_embeddings  # (1, 1 + N, D)
    if small != grid:
        pixels = F.adaptive_avg_pool2d(pixels, (small[0] * patch, small[1] * patch))
        plane = place[:, 1:].transpose(1, 2).unflatten(2, grid)  # (1, D, h, w)
        plane = F.adaptive_avg_pool2d(plane, small).flatten(2).transpose(1, 2)
        place = torch.cat([place[:, :1], plane], 1)
    projection = embeddings.patch_embeddings.projection
    x = projection(pixels.to(projection.weight.dtype)).flatten(2).transpose(1, 2)
    x = torch.cat([embeddings.cls_token.expand(len(x), -1, -1), x], 1) + place
    total = torch.zeros(len(x), x.shape[1] - 1, device=x.device)
    with eval_mode(vit):  # with dropout, a mask that goes by attention would be another each time
        for block in vit.layers:
            total += _attention_to_patches(block, x, of)
            if block is not vit.layers[-1]:  # its output is not needed
                x = block(x)
    mean = (total / len(vit.layers)).unflatten(1, small)
    if small == grid:
        return mean.flatten(1)
    rows, columns = (torch.arange(side, device=x.device) // 2 for side in grid)
    return (mean[:, rows][:, :, columns] / 4).flatten(1)


def _attention_to_patches(block: Any, x: Tensor, of: str) -> Tensor:
    """(B, N): what a block's class token (or the mean patch) attends to, mean over its heads."""
    attention = block.attention
    x = block.layernorm_before(x)
    heads = (-1, attention.head_dim)
    asking = x[:, :1] if of == "cls" else x[:, 1:]
    query = attention.q_proj(asking).unflatten(2, heads).transpose(1, 2)  # (B, heads, 1 or N, d)
    key = attention.k_proj(x).unflatten(2, heads).transpose(1, 2)  # (B, heads, 1 + N, d)
    rows = (query @ key.transpose(2, 3) * attention.scaling).float().softmax(-1)
    return rows[..., 1:].mean((1, 2))
