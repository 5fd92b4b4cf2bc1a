"""Image maskers: one function per published strategy.

Each is `f(noise, mask_ratio, scene) -> Masking`: noise (B, N) uniform in [0, 1), mask_ratio a
fraction in [0, 1) (or one per sample, (B,)), scene what it may use besides the noise. Those that
use the ratio mask exactly N - max(1, round(N * (1 - mask_ratio))) patches of each image.
`mask` is True where a patch is MASKED. Shapes: B batch, N = h x w patches, R regions.
Walk-through: notebooks/02_masking.ipynb.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..noise import as_integers, more_noise, then_noise
from .core import Masking, count_kept, keep_visible, mask_largest


@dataclass
class Scene:
    """What an image masker may use besides the noise. Only `grid` is always there."""

    grid: tuple[int, int]  # (h, w): rows and columns of patches
    pixel_values: Tensor | None = None  # (B, 3, H, W) uint8 or float
    attend: Callable[[], Tensor] | None = None  # -> (B, N) what a model's class token attends to
    regions: Callable[[], Tensor] | None = None  # -> (B, R, N) bool, patches that a region touches
    painted: Any = None  # (h, w) or (B, h, w), true = masked


def _checked(scene: Scene | None, masker: str, *needs: str) -> Any:
    """The scene if it has all that a masker needs; else ValueError with the remedy."""
    remedies = {
        "grid": "Scene(grid=(rows, columns))",
        "pixel_values": "Scene(grid, pixel_values=batch.pixel_values)",
        "attend": "Scene(grid, attend=lambda: model.class_attention(batch.pixel_values))",
        "regions": "the built-in images (mm.openmoji), whose drawings have layers",
        "painted": "an array of rows x columns patches, true = masked",
    }
    for need in needs:
        if scene is None or getattr(scene, need) is None:
            raise ValueError(f"image masker {masker!r} needs {need}: give {remedies[need]}")
    return scene


def random_mask(noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None) -> Masking:
    """Mask the patches with the largest noise, independently per sample.

    He et al. 2022 (MAE, arXiv:2111.06377) and Li et al. 2023 (FLIP, arXiv:2212.00794).

    Args:
        noise: (B, N) float32, uniform in [0, 1).
        mask_ratio: fraction of patches to mask, in [0, 1); (B,) gives each sample its own.
        scene: not used.

    Returns:
        Masking with K = max(1, round(N * (1 - mask_ratio))) visible patches; the papers' code
        truncates instead of rounding (see `mask_largest`).

    Raises:
        ValueError: a ratio is outside [0, 1), or there are not B of them.

    Example:
        >>> noise = torch.tensor([[0.1, 0.9, 0.4, 0.7]])
        >>> masking = mm.masking.random_mask(noise, mask_ratio=0.5)
        >>> masking.mask
        tensor([[False,  True, False,  True]])
        >>> masking.ids_keep
        tensor([[0, 2]])
    """
    return mask_largest(as_integers(noise), mask_ratio)


_BLOCKS = 12  # rectangles tried; single patches fill what they leave open


def block_mask(noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None) -> Masking:
    """Mask rectangles until enough patches are masked.

    Bao et al. 2022 (BEiT, arXiv:2106.08254, algorithm 1), also FLAVA: areas from 16 of 196 patches
    up to what is still to be masked, aspect ratios from 0.3 to 3.3. There the number of masked
    patches ends above or below the target; here the last rectangle is cut off after some of its
    rows, so that the number is exact.
    """
    (height, width), num_tokens = _checked(scene, "block", "grid").grid, noise.shape[1]
    wanted = num_tokens - torch.as_tensor(count_kept(noise, mask_ratio)).to(noise.device)
    wanted = wanted.expand(len(noise))[:, None]
    draws = more_noise(noise, 4 * _BLOCKS).unflatten(1, (_BLOCKS, 4, 1))  # (B, _BLOCKS, 4, 1)
    position = torch.arange(num_tokens, device=noise.device)
    row, column = position // width, position % width
    smallest = 16 / 196 * num_tokens
    order = torch.full_like(noise, _BLOCKS, dtype=torch.int64)  # the first rectangle that covers it
    for number in range(_BLOCKS):
        left_over = wanted - (order < _BLOCKS).sum(1, keepdim=True)  # (B, 1)
        size, shape, down, right = draws[:, number].unbind(1)  # (B, 1) each
        area = smallest + size * (left_over - smallest).clamp(min=0)
        stretch = torch.exp((2 * shape - 1) * math.log(1 / 0.3) / 2)  # square root of the aspect
        tall = (area.sqrt() * stretch).round().clamp(1, height)
        wide = (area.sqrt() / stretch).round().clamp(1, width)
        top = (down * (height - tall + 1)).floor()
        start = (right * (width - wide + 1)).floor()
        inside = (row >= top) & (row < top + tall) & (column >= start) & (column < start + wide)
        order = order.masked_fill(inside & (order == _BLOCKS) & (left_over > 0), number)
    # Rectangles in their order, each row by row; then single patches in the order of their noise.
    within = torch.where(order < _BLOCKS, position / num_tokens, noise)
    return mask_largest(-then_noise(order, within), mask_ratio)


def inverse_block_mask(
    noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None
) -> Masking:
    """KEEP blocks of 3 x 3 patches around random centres, mask everything else.

    Baevski et al. 2023 (data2vec 2.0, arXiv:2212.07525) draw a fixed number of blocks and then add
    or remove single patches at random. Here blocks are added in the order of their centres' noise,
    and a part of the last one is kept. Blocks may extend beyond the edge.
    """
    grid = _checked(scene, "inverse_block", "grid").grid
    around = F.pad(noise.unflatten(1, grid)[:, None], (1, 1, 1, 1), value=1.0)
    first = -F.max_pool2d(-around, 3, stride=1)  # (B, 1, h, w): the first block that covers it
    return mask_largest(then_noise(first.flatten(1), noise), mask_ratio)


def _bayer(levels: int) -> Tensor:
    """Bayer's matrix (2**levels square): the order that fills a plane most evenly."""
    matrix = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(levels):
        matrix = 4 * matrix
        matrix = torch.cat(
            [torch.cat([matrix, matrix + 2], 1), torch.cat([matrix + 3, matrix + 1], 1)]
        )
    return matrix


def grid_mask(noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None) -> Masking:
    """Keep a regular grid: one patch of each 2 x 2 at 75 %, a checkerboard at 50 %.

    MAE's ablation (He et al. 2022, figure 6) has 75 % only; other ratios follow the order in which
    Bayer's dither matrix fills a plane. Here each sample and epoch has an offset of its own, so
    that over time all patches are visible; noise breaks ties between patches of equal rank.
    """
    height, width = _checked(scene, "grid", "grid").grid
    shift = (more_noise(noise, 2) * 8).long()  # (B, 2)
    row = (torch.arange(height, device=noise.device) + shift[:, :1]) % 8  # (B, h)
    column = (torch.arange(width, device=noise.device) + shift[:, 1:]) % 8  # (B, w)
    rank = _bayer(3).to(noise.device)[row[:, :, None], column[:, None, :]]  # (B, h, w)
    return mask_largest(then_noise(rank.flatten(1), noise), mask_ratio)


def gaussian_mask(noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None) -> Masking:
    """Keep the centre more often than the edge.

    Liang & Larson 2024 (GLIP, arXiv:2403.15837): a normal density with variance 0.2, on
    coordinates from -1 to 1, is subtracted from each patch's noise before the largest are masked.
    """
    height, width = _checked(scene, "gaussian", "grid").grid
    y, x = (torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in (height, width))
    far = (y[:, None] ** 2 + x**2).flatten()  # on the CPU, so that every device has the same bits
    density = torch.exp(-far / (2 * 0.2)) / (2 * math.pi * 0.2)
    return mask_largest(noise - density.to(noise.device), mask_ratio)


_ANCHORS = 0.03  # of the patches


def cluster_mask(noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None) -> Masking:
    """Mask patches of similar colour together: those nearest to a few random anchors.

    Wei et al. 2024 (cluster masking, arXiv:2405.08815): 3 % of the patches are anchors, and all
    patches within a threshold of one are masked; the threshold is searched for until the MEAN ratio
    is right. Here the nearest patches are masked until the number is exact in each image. Patches
    are compared by colour (2 x 2 means, Euclidean), not by normalised texture, which a flat patch
    of a drawing does not have.
    """
    checked = _checked(scene, "cluster", "grid", "pixel_values")
    height, width = checked.grid
    colours = _mean_colours(checked.pixel_values, 2 * height, 2 * width)  # (B, 3, 2h, 2w)
    colours = colours.unflatten(3, (width, 2)).unflatten(2, (height, 2))
    colours = colours.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, 12)
    num_anchors = max(1, round(_ANCHORS * noise.shape[1]))
    ids = noise.topk(num_anchors, dim=1).indices
    anchors = colours.gather(1, ids[..., None].expand(-1, -1, colours.shape[2]))
    exact = "donot_use_mm_for_euclid_dist"  # products are inexact for similar colours
    nearest = torch.cdist(colours, anchors, compute_mode=exact).amin(2)  # (B, N)
    # Rounded: equal colours are equally near in whatever order a device adds.
    return mask_largest(-then_noise((16 * nearest).round(), noise), mask_ratio)


def _mean_colours(pixels: Tensor, height: int, width: int) -> Tensor:
    """Images (B, 3, H, W) reduced to height x width by averaging, on the scale of uint8."""
    pixels = 64 * pixels if pixels.is_floating_point() else pixels.float()  # normalised: -2 to 2
    return F.adaptive_avg_pool2d(pixels, (height, width))


def attentive_mask(
    noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None
) -> Masking:
    """Keep the patches that a model's class token attends to most.

    Yang et al. 2023 (A-CLIP, arXiv:2212.08653): the model is a running mean (EMA) of the one in
    training, attention is averaged over layers and heads, and 2 x 2 patches are masked together.
    Here the trainer keeps that EMA, patches are masked together only where it gets a smaller image,
    and noise breaks ties. Where features are the mean of the patches, the attention of the patches
    counts instead: an untrained class token attends to the background.
    """
    attention = _checked(scene, "attentive", "attend").attend()
    return mask_largest(-then_noise(attention, noise), mask_ratio)


def inattentive_mask(
    noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None
) -> Masking:
    """Keep the patches that the class token attends to LEAST: the opposite of `attentive_mask`.

    Not a recipe but a control (A-CLIP's table of masking strategies): what is learned without the
    relevant part.
    """
    attention = _checked(scene, "inattentive", "attend").attend()
    return mask_largest(then_noise(attention, noise), mask_ratio)


def layers_mask(noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None) -> Masking:
    """Mask all patches that one layer of a drawing, or everything of one colour, touches.

    Only for the built-in drawings, whose layers are known; our own strategy, of no paper. The
    region is drawn for each sample and epoch. The ratio is not used, so that K differs between
    images and keep_valid is False for the padding. If a region touches every patch, the one with
    the least noise stays visible.
    """
    regions = _checked(scene, "layers", "regions").regions()  # (B, R, N)
    valid = regions.any(2)  # (B, R)
    which = (more_noise(noise, 1)[:, 0] * valid.sum(1)).long()  # its index among the valid regions
    chosen = valid & (valid.cumsum(1) == which[:, None] + 1)
    return _any_number((regions & chosen[..., None]).any(1), noise)


def painted_mask(noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None) -> Masking:
    """Mask what the user painted: an array of patches, true = masked, (h, w) or (B, h, w).

    Noise and ratio are not used. Raises ValueError for another grid, or if all of an image is
    masked.
    """
    asked = _checked(scene, "painted", "grid", "painted")
    painted = torch.as_tensor(asked.painted, device=noise.device) != 0
    sizes, shape = (asked.grid, (len(noise), *asked.grid)), tuple(painted.shape)
    if shape not in sizes:
        raise ValueError(
            f"the painted mask is {shape}, the images are {asked.grid[0]} x {asked.grid[1]} "
            f"patches; give an array of {sizes[0]}, or one per image, {sizes[1]}"
        )
    mask = painted.expand(sizes[1]).flatten(1)
    if bool(mask.all(1).any()):
        row = int(mask.all(1).nonzero()[0])
        raise ValueError(
            f"the painted mask masks all {noise.shape[1]} patches of image {row}; leave one visible"
        )
    return _any_number(mask, noise)


def _any_number(mask: Tensor, noise: Tensor) -> Masking:
    """A `Masking` of any mask; if all of an image is masked, the least noise stays visible."""
    full = mask.all(1, keepdim=True)
    mask = mask & ~(full & (noise == noise.amin(1, keepdim=True)))
    masking = keep_visible(mask, torch.ones_like(mask))
    assert masking.keep_valid is not None
    if bool(masking.keep_valid.all()):  # all of the same length, without padding
        masking.keep_valid = None
    return masking


# Names for `image_mask` -> f(noise, mask_ratio, scene) -> Masking.
IMAGE_MASKERS: dict[str, Callable[..., Masking]] = {
    "random": random_mask,
    "block": block_mask,
    "inverse_block": inverse_block_mask,
    "grid": grid_mask,
    "gaussian": gaussian_mask,
    "cluster": cluster_mask,
    "attentive": attentive_mask,
    "inattentive": inattentive_mask,
    "layers": layers_mask,
    "painted": painted_mask,
}
ATTENTION_MASKERS = ("attentive", "inattentive")  # these use a model's attention
