"""Clusters of images that are copies of each other, equal or nearly equal.

Two images are near-duplicates if one could be the other saved again: resized, recompressed, a
little brighter or darker, 1 % cropped. Each image becomes a thumbnail without brightness and
contrast. Thumbnails that are similar on 8 x 8 cells are aligned, and the remaining difference must
be small at every position, not only on average, since two drawings may differ only in a hand.
Clusters are the connected components of such pairs.

Recall was measured (`tests/benchmarks/near_duplicates.py`): at least 98 % of images that were
resized, recompressed, 5 % brighter or 10 % darker are found, 82 % of photographs cropped by 1 % at
each side and 57 % by 2 %. NOT found are most images that were cropped by 5 % at any side, framed,
mirrored or turned grey. Of a million pairs of different built-in drawings, 93 are joined.
Shapes: N images, B batch, P pairs, K numbers of a thumbnail.
Walk-through: notebooks/08_your_own_images.ipynb.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .clusters import connected, exact_duplicates

SIDE = 16  # cells of a thumbnail along each side
COARSE = 0.2  # root mean square difference on 8 x 8 cells, in standard deviations of the image
NEAR = 0.4  # largest difference at any position once aligned, in the same unit
MEAN_COLOUR = 0.125  # mean colours may differ by this fraction of the range: "slightly brighter"
NEIGHBOURS = 32  # an image is aligned with at most this many similar ones, in each tile
ROWS, COLUMNS, PAIRS = 1024, 4096, 8192  # sizes of tiles: about 200 MB at a time


def image_signature(pixel_values: Tensor) -> Tensor:
    """A signature of each image that survives saving it again: float16 (B, 771), same device.

    It is a thumbnail 3 x 16 x 16 from which the mean of each colour is subtracted, divided by its
    standard deviation (at least 8 of 255, else an empty image would be noise), and the three mean
    colours, 0 to 1. pixel_values (B, 3, H, W) are uint8, or float where a transform has normalised
    them (assumed mean near 0, standard deviation near 1). Raises ValueError for another shape.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(pixel_values.shape)}; give (B, 3, H, W)")
    pixels = pixel_values.float()
    if pixel_values.is_floating_point():
        pixels = pixels * 57 + 118  # back to about 0..255 from ImageNet's mean and deviation
    return unrounded_signature(pixels).half()


def unrounded_signature(pixels: Tensor) -> Tensor:
    """`image_signature` in the number type of `pixels` (B, 3, H, W), from 0 to 255."""
    small = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
    mean = small.mean((2, 3), keepdim=True)
    flat = (small - mean).flatten(1)
    flat = flat / flat.pow(2).mean(1, keepdim=True).sqrt().clamp(min=8)
    return torch.cat([flat, mean.flatten(1) / 255], 1)


def near_duplicates(signature: Tensor, threshold: float = NEAR) -> np.ndarray:
    """(N,) int64: connected near-duplicates get the same number, in order of first appearance.

    signature (N, 771) of `image_signature`. threshold: the largest difference at any position, in
    standard deviations; 0 joins equal signatures only. Images are sorted along their first
    principal component and compared only with neighbours on it; equal ones are merged first, and
    pairs that are already connected are skipped. On two cores 50,000 images take about 15 s, or 20
    to 40 s if all are similar without being equal. Memory is bounded: of more than `NEIGHBOURS`
    similar images in a tile only the nearest are compared. Raises ValueError below 0.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold} must be at least 0; {NEAR} is a good start")
    signature = signature.half().cpu()
    same = exact_duplicates([row.tobytes() for row in signature.numpy()])
    if threshold == 0:
        return same
    signature = signature[np.unique(same, return_index=True)[1]]
    coarse = coarse_cells(signature.float())
    position = _main_direction(coarse)
    order = position.argsort(stable=True)
    label = torch.empty_like(order)
    label[order] = _linked(signature[order], coarse[order], position[order], threshold)
    return exact_duplicates(label[same].tolist())


def coarse_cells(signature: Tensor) -> Tensor:
    """(N, 192) colours of 8 x 8 cells, scaled so that distances are root mean squares."""
    cells = F.avg_pool2d(signature[:, :-3].view(-1, 3, SIDE, SIDE), 2).flatten(1)
    return cells / cells.shape[1] ** 0.5


def _main_direction(coarse: Tensor) -> Tensor:
    """(N,) position of each image along the first principal component.

    Positions differ by at most as much as the images do.
    """
    centred = coarse - coarse.mean(0)
    direction = torch.linalg.eigh(centred.T.double() @ centred.double())[1][:, -1]
    return centred @ direction.float()


def _linked(signature, coarse, position, threshold: float) -> Tensor:
    """(N,) the cluster of each image; images are sorted by position."""
    length, label = coarse.pow(2).sum(1), torch.arange(len(coarse))
    for start in range(0, len(coarse), ROWS):
        rows = torch.arange(start, min(start + ROWS, len(coarse)))
        end = int(torch.searchsorted(position, position[rows[-1]] + COARSE + 1e-4, right=True))
        for first in range(start, end, COLUMNS):
            columns = torch.arange(first, min(first + COLUMNS, end))
            mine, theirs = label[rows], label[columns]
            if mine.min() == mine.max() == theirs.min() == theirs.max():
                continue
            product = coarse[rows] @ coarse[columns].T
            distance = length[rows, None] + length[columns] - 2 * product  # squared
            new = (rows[:, None] < columns) & (mine[:, None] != theirs)
            a, b = _nearest(distance, *torch.where((distance <= COARSE**2) & new))
            for pair in range(0, len(a), PAIRS):
                left, right = rows[a[pair : pair + PAIRS]], columns[b[pair : pair + PAIRS]]
                apart = label[left] != label[right]
                left, right = left[apart], right[apart]
                near = is_near(signature[left].float(), signature[right].float(), threshold)
                if near.any():
                    links = torch.stack([label[left[near]], label[right[near]]], 1)
                    label = torch.from_numpy(connected(len(label), links))[label]
    return label


def _nearest(distance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each a the `NEIGHBOURS` nearest pairs (a, b); the nearest of all a come first."""
    by_distance = distance[a, b].argsort(stable=True)
    by_row = by_distance[a[by_distance].argsort(stable=True)]
    counts = torch.bincount(a, minlength=len(distance))
    rank = torch.arange(len(a)) - (counts.cumsum(0) - counts)[a[by_row]]
    first = rank.argsort(stable=True)[: int((rank < NEIGHBOURS).sum())]
    return a[by_row[first]], b[by_row[first]]


def is_near(left: Tensor, right: Tensor, threshold: float) -> Tensor:
    """(P,) bool for P pairs of signatures: same colour, and similar everywhere once aligned."""
    near = (left[:, -3:] - right[:, -3:]).abs().amax(1) <= MEAN_COLOUR
    a, b = (x[:, :-3].view(-1, 3, SIDE, SIDE) for x in (left, right))
    alike = _largest(a - b) <= threshold
    unsure = torch.where(near & ~alike)[0]
    if len(unsure):
        alike[unsure] = _largest(_unexplained(a[unsure], b[unsure])) <= threshold
    return near & alike


def _largest(difference: Tensor) -> Tensor:
    """(P,) the largest norm of the colour difference, averaged over 2 x 2 cells."""
    return F.avg_pool2d(difference, 2, 1).pow(2).sum(1).sqrt().flatten(1).amax(1)


def _unexplained(a: Tensor, b: Tensor) -> Tensor:
    """The part of a - b that no small shift, zoom or change of contrast explains.

    Least squares on the gradients of the mean image (Lucas & Kanade 1981); a small ridge penalty
    keeps flat images from moving.
    """
    mean = (a + b) / 2
    padded = F.pad(mean, (1, 1, 1, 1), mode="replicate")
    right = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    x = torch.arange(SIDE) / SIDE - 0.5
    parts = torch.stack([right, down, x * right, x[:, None] * down, mean], 1).flatten(2)  # (P,5,K)
    difference = (a - b).flatten(1)
    ridge = torch.diag(torch.tensor([2e-4, 2e-4, 2e-4, 2e-4, 5e-4])) * parts.shape[2]
    weights = torch.linalg.solve(parts @ parts.mT + ridge, parts @ difference[:, :, None])
    return (difference - (weights.mT @ parts)[:, 0]).view_as(a)
