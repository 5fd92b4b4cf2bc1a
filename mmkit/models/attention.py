"""The attention of a ViT's class token to its patches.

Shapes: B batch, N = h x w patches, D width. Walk-through: notebooks/02_masking.ipynb.
"""

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masking.core import Masking, patch_grid


@contextlib.contextmanager
def eval_mode(model):
    """Evaluation mode without gradients; the training flag of each part is restored."""
    training = {part: part.training for part in model.modules()}  # they differ if one is frozen
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, flag in training.items():
            part.training = flag


def key_mask(valid: Tensor | None, implementation: str, dtype: torch.dtype) -> Tensor | None:
    """The attention mask of a transformers layer if only the valid keys (B, T) count.

    (B, 1, 1, T): for "sdpa" bool, True = counts; for "eager", which adds its mask, 0 or -inf. In a
    row without a valid key all count: its states are meaningless, but finite.
    """
    if valid is None:
        return None
    counts = (valid | ~valid.any(1, keepdim=True))[:, None, None, :]
    if implementation != "eager":
        return counts
    return torch.zeros_like(counts, dtype=dtype).masked_fill(~counts, -math.inf)


@torch.no_grad()
def class_attention(vit: Any, pixels: Tensor, half: bool = False, of: str = "cls") -> Tensor:
    """(B, N) float32: attention of the class token to each patch, mean over layers and heads.

    vit: a transformers ViTModel; pixels (B, 3, H, W) normalised. half: at half the resolution (a
    quarter of the patches, position embeddings averaged); each value is that of 2 x 2 patches.
    of: "cls", or "mean" for a model that pools the mean of its patches: nothing trains its class
    token to attend to anything, so that the mean over the attention of the patches is taken.
    After Yang et al. 2023 (A-CLIP, arXiv:2212.08653), whose features are the class token.
    """
    patch = vit.config.patch_size
    grid = patch_grid(pixels, patch)
    small = ((grid[0] + 1) // 2, (grid[1] + 1) // 2) if half else grid
    embeddings = vit.embeddings
    positions = embeddings.position_embeddings  # (1, 1 + N, D)
    if small != grid:
        pixels = F.adaptive_avg_pool2d(pixels, (small[0] * patch, small[1] * patch))
        plane = positions[:, 1:].transpose(1, 2).unflatten(2, grid)  # (1, D, h, w)
        plane = F.adaptive_avg_pool2d(plane, small).flatten(2).transpose(1, 2)
        positions = torch.cat([positions[:, :1], plane], 1)
    projection = embeddings.patch_embeddings.projection
    x = projection(pixels.to(projection.weight.dtype)).flatten(2).transpose(1, 2)
    x = torch.cat([embeddings.cls_token.expand(len(x), -1, -1), x], 1) + positions
    total = torch.zeros(len(x), x.shape[1] - 1, device=x.device)
    with eval_mode(vit):  # with dropout, a mask by attention would differ each time
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
    """(B, N): attention of a block's class token, or mean of its patches; mean over the heads."""
    attention = block.attention
    x = block.layernorm_before(x)
    heads = (-1, attention.head_dim)
    queries = x[:, :1] if of == "cls" else x[:, 1:]
    query = attention.q_proj(queries).unflatten(2, heads).transpose(1, 2)  # (B, heads, 1 or N, d)
    key = attention.k_proj(x).unflatten(2, heads).transpose(1, 2)  # (B, heads, 1 + N, d)
    rows = (query @ key.transpose(2, 3) * attention.scaling).float().softmax(-1)
    return rows[..., 1:].mean((1, 2))


def kept_valid(masking: Masking | None, mode: str) -> Tensor | None:
    """(B, K) bool, False for the padding of the kept tokens; None = there is no padding."""
    return masking.keep_valid if masking is not None and mode == "drop" else None


def with_class_token(valid: Tensor | None) -> Tensor | None:
    """(B, 1 + K) from (B, K): the class token is always valid."""
    return None if valid is None else F.pad(valid, (1, 0), value=True)


def mean_of_valid(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Mean (B, D) of the valid ones of tokens (B, K, D); None = all are valid."""
    if valid is None:
        return tokens.mean(1)
    weight = valid[..., None].to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
