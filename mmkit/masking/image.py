"""Which patches are hidden: one function per published strategy.

Each is `f(noise, mask_ratio, scene) -> Masking`: noise (B, N) uniform in [0, 1), mask_ratio a
fraction in [0, 1) (or one per sample, (B,)), scene what it may look at besides the noise. Those
that go by the ratio hide exactly N - max(1, round(N * (1 - mask_ratio))) patches of each picture.
`mask` is True where a patch is HIDDEN. Shapes: B batch, N = h x w patches, R regions.
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
from .core import Masking, count_kept, hide_largest, keep_visible


@dataclass
class Scene:
    """What an image masker may look at. Only `grid` is always there."""

    grid: tuple[int, int]  # (h, w): rows and columns of patches
    pixel_values: Tensor | None = None  # (B, 3, H, W) uint8 or float
    attend: Callable[[], Tensor] | None = None  # -> (B, N) what a model's class token attends to
    regions: Callable[[], Tensor] | None = None  # -> (B, R, N) bool, which patches a region touches
    painted: Any = None  # (h, w) or (B, h, w), true = hidden


def _checked(scene: Scene | None, masker: str, *needs: str) -> Any:
    """The scene, with all that a masker needs; ValueError with the remedy otherwise."""
    remedies = {
        "grid": "Scene(grid=(rows, columns))",
        "pixel_values": "Scene(grid, pixel_values=batch.pixel_values)",
        "attend": "Scene(grid, attend=lambda: model.class_attention(batch.pixel_values))",
        "regions": "the built-in pictures (mm.openmoji), whose drawings have layers",
        "painted": "an array of rows x columns patches, true = hidden",
    }
    for need in needs:
        if scene is None or getattr(scene, need) is None:
            raise ValueError(f"image masker {masker!r} needs {need}: give {remedies[need]}")
    return scene


def random_mask(noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None) -> Masking:
    """Hide the patches with the largest noise, independently per sample.

    He et al. 2022 (MAE, arXiv:2111.06377), Li et al. 2023 (FLIP, arXiv:2212.00794), whose code
    truncates the number of kept patches; here it is rounded (see `hide_largest`).
    """
    return hide_largest(as_integers(noise), mask_ratio)


_BLOCKS = 12  # rectangles tried; what they leave open is filled by single patches


def block_mask(noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None) -> Masking:
    """Hide rectangles: area from 16 of 196 patches up to what is still to be hidden, sides 0.3 to
    3.3 to one, until enough is hidden.

    Bao et al. 2022 (BEiT, arXiv:2106.08254, algorithm 1), also FLAVA. They end above or below the
    number asked for; here the last rectangle is cut off by rows, so that the number is exact.
    """
    (height, width), num_tokens = _checked(scene, "block", "grid").grid, noise.shape[1]
    wanted = num_tokens - torch.as_tensor(count_kept(noise, mask_ratio)).to(noise.device)
    wanted = wanted.expand(len(noise))[:, None]
    draws = more_noise(noise, 4 * _BLOCKS).unflatten(1, (_BLOCKS, 4, 1))  # (B, _BLOCKS, 4, 1)
    place = torch.arange(num_tokens, device=noise.device)
    row, column = place // width, place % width
    smallest = 16 / 196 * num_tokens
    order = torch.full_like(noise, _BLOCKS, dtype=torch.int64)  # the first rectangle to cover it
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
    # Rectangles by number, each row by row; then single patches by their noise.
    within = torch.where(order < _BLOCKS, place / num_tokens, noise)
    return hide_largest(-then_noise(order, within), mask_ratio)


def inverse_block_mask(
    noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None
) -> Masking:
    """KEEP blocks of 3 x 3 patches around random centres, hide everything else.

    Baevski et al. 2023 (data2vec 2.0, arXiv:2212.07525), which draws a fixed number of blocks and
    then adds or removes single patches at random. Here blocks are added in the order of their
    centres' noise and the last one is taken in part. They may reach over the edge.
    """
    grid = _checked(scene, "inverse_block", "grid").grid
    around = F.pad(noise.unflatten(1, grid)[:, None], (1, 1, 1, 1), value=1.0)
    first = -F.max_pool2d(-around, 3, stride=1)  # (B, 1, h, w): the earliest block to cover it
    return hide_largest(then_noise(first.flatten(1), noise), mask_ratio)


def _bayer(levels: int) -> Tensor:
    """Bayer's matrix (2**levels square): the order in which to fill a plane most evenly."""
    matrix = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(levels):
        matrix = 4 * matrix
        matrix = torch.cat(
            [torch.cat([matrix, matrix + 2], 1), torch.cat([matrix + 3, matrix + 1], 1)]
        )
    return matrix


def grid_mask(noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None) -> Masking:
    """Keep a regular grid: one patch of each 2 x 2 at 75 %, a checkerboard at 50 %.

    MAE's ablation (He et al. 2022, figure 6) knows 75 % alone; other ratios follow the order in
    which Bayer's dither matrix fills a plane. Here each sample and epoch has an offset of its own,
    so that over time all patches are seen; where a ratio cuts through equal ranks, noise decides.
    """
    height, width = _checked(scene, "grid", "grid").grid
    shift = (more_noise(noise, 2) * 8).long()  # (B, 2)
    row = (torch.arange(height, device=noise.device) + shift[:, :1]) % 8  # (B, h)
    column = (torch.arange(width, device=noise.device) + shift[:, 1:]) % 8  # (B, w)
    rank = _bayer(3).to(noise.device)[row[:, :, None], column[:, None, :]]  # (B, h, w)
    return hide_largest(then_noise(rank.flatten(1), noise), mask_ratio)


def gaussian_mask(noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None) -> Masking:
    """Keep the centre more often than the edge.

    Liang & Larson 2024 (GLIP, arXiv:2403.15837): a normal density with variance 0.2, on
    coordinates from -1 to 1, is taken from each patch's noise before the largest are hidden.
    """
    height, width = _checked(scene, "gaussian", "grid").grid
    y, x = (torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in (height, width))
    far = (y[:, None] ** 2 + x**2).flatten()  # on the CPU, so that every device has the same bits
    density = torch.exp(-far / (2 * 0.2)) / (2 * math.pi * 0.2)
    return hide_largest(noise - density.to(noise.device), mask_ratio)


_ANCHORS = 0.03  # of the patches


def cluster_mask(noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None) -> Masking:
    """Hide patches of similar colour together: those nearest to a few random anchors.

    Wei et al. 2024 (cluster masking, arXiv:2405.08815): 3 % of the patches are anchors, and what
    lies within a threshold of one is hidden, a threshold searched for until the MEAN ratio is
    right. Here the nearest are hidden until the number is exact in each picture; and patches are
    compared by colour (2 x 2 means, Euclidean), not by normalised texture, which a flat patch of a
    drawing does not have.
    """
    seen = _checked(scene, "cluster", "grid", "pixel_values")
    height, width = seen.grid
    colours = _mean_colours(seen.pixel_values, 2 * height, 2 * width)  # (B, 3, 2h, 2w)
    colours = colours.unflatten(3, (width, 2)).unflatten(2, (height, 2))
    colours = colours.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, 12)
    num_anchors = max(1, round(_ANCHORS * noise.shape[1]))
    ids = noise.topk(num_anchors, dim=1).indices
    anchors = colours.gather(1, ids[..., None].expand(-1, -1, colours.shape[2]))
    exact = "donot_use_mm_for_euclid_dist"  # by products near colours are off by shades
    nearest = torch.cdist(colours, anchors, compute_mode=exact).amin(2)  # (B, N)
    # Rounded: equal colours are equally near however a device adds up.
    return hide_largest(-then_noise((16 * nearest).round(), noise), mask_ratio)


def _mean_colours(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pictures (B, 3, H, W) reduced to height x width by averaging, on the scale of uint8."""
    pixels = 64 * pixels if pixels.is_floating_point() else pixels.float()  # normalised: -2 to 2
    return F.adaptive_avg_pool2d(pixels, (height, width))


def attentive_mask(
    noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None
) -> Masking:
    """Keep the patches that a model's class token attends to most.

    Yang et al. 2023 (A-CLIP, arXiv:2212.08653): the model is the running mean (EMA) of the one in
    training, attention is averaged over layers and heads, and 2 x 2 patches go together. Here the
    trainer keeps that EMA, patches go together only where it looks at a smaller picture, noise
    decides ties, and where features are the mean of the patches, what these attend to counts: an
    untrained class token looks at the background.
    """
    attention = _checked(scene, "attentive", "attend").attend()
    return hide_largest(-then_noise(attention, noise), mask_ratio)


def inattentive_mask(
    noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None
) -> Masking:
    """Keep the patches that the class token attends to LEAST: the opposite of `attentive_mask`.

    Not a recipe but a control (A-CLIP's table of masking strategies): what is left when the
    relevant part goes.
    """
    attention = _checked(scene, "inattentive", "attend").attend()
    return hide_largest(then_noise(attention, noise), mask_ratio)


def layers_mask(noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None) -> Masking:
    """Hide one drawing layer, or everything of one colour: all patches that it touches.

    Only for the built-in drawings, which know their layers; ours, of no paper. Which region goes is
    drawn per sample and epoch; the ratio plays no part, so that K differs and keep_valid marks the
    filler. Where a region touches every patch, the one with the least noise stays.
    """
    regions = _checked(scene, "layers", "regions").regions()  # (B, R, N)
    real = regions.any(2)  # (B, R)
    which = (more_noise(noise, 1)[:, 0] * real.sum(1)).long()  # the which-th real region
    chosen = real & (real.cumsum(1) == which[:, None] + 1)
    return _any_number((regions & chosen[..., None]).any(1), noise)


def painted_mask(noise: Tensor, mask_ratio: float | Tensor, scene: Scene | None = None) -> Masking:
    """Hide what the user painted: an array of patches, true = hidden, (h, w) or (B, h, w).

    Noise and ratio play no part. Raises ValueError for another grid, or if nothing would be left.
    """
    asked = _checked(scene, "painted", "grid", "painted")
    painted = torch.as_tensor(asked.painted, device=noise.device) != 0
    sizes, shape = (asked.grid, (len(noise), *asked.grid)), tuple(painted.shape)
    if shape not in sizes:
        raise ValueError(
            f"the painted mask is {shape}, the pictures are {asked.grid[0]} x {asked.grid[1]} "
            f"patches; give an array of {sizes[0]}, or one per picture, {sizes[1]}"
        )
    mask = painted.expand(sizes[1]).flatten(1)
    if bool(mask.all(1).any()):
        row = int(mask.all(1).nonzero()[0])
        raise ValueError(
            f"the painted mask hides all {noise.shape[1]} patches of picture {row}; leave one"
        )
    return _any_number(mask, noise)


def _any_number(mask: Tensor, noise: Tensor) -> Masking:
    """A `Masking` of any mask; where all of a picture is hidden, the least noise stays visible."""
    full = mask.all(1, keepdim=True)
    mask = mask & ~(full & (noise == noise.amin(1, keepdim=True)))
    masking = keep_visible(mask, torch.ones_like(mask))
    assert masking.keep_valid is not None
    if bool(masking.keep_valid.all()):  # all of one length: rectangular without filler
        masking.keep_valid = None
    return masking


# What `image_mask` may name: f(noise, mask_ratio, scene) -> Masking.
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
ATTENTION_MASKERS = ("attentive", "inattentive")  # these look at a model's attention
