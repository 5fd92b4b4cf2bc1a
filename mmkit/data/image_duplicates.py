"""Which images are one image saved twice: clusters of equal and of nearly equal ones.

Two images are near-duplicates where one could be the other saved again: resized, recompressed, a
little brighter or darker, 1 % cut off. An image becomes a thumbnail without brightness and
contrast; those that are alike on 8 x 8 cells are laid over each other, and what still differs must
be small in every place, not only on average: two drawings may differ in a hand. A cluster is what
such pairs connect.

What is found was measured (`tests/benchmarks/near_duplicates.py`): at least 98 % of the images that
were resized, recompressed, 5 % brighter or 10 % darker, and 82 % of photographs cut by 1 % at each
side, 57 % by 2 %. NOT found are most of those cut by 5 % at any side, given a border, mirrored or
turned grey. Of a million pairs of different built-in drawings, 93 are joined.
Shapes: N pictures, B batch, P pairs, K numbers of a thumbnail.
Walk-through: notebooks/08_your_own_pictures.ipynb.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .clusters import connected, exact_duplicates

SIDE = 16  # cells of a thumbnail along each side
COARSE = 0.2  # root mean square difference on 8 x 8 cells, in standard deviations of the picture
NEAR = 0.4  # what may differ in any one place once laid over each other, in the same unit
MEAN_COLOUR = 0.125  # mean colours may differ by this share of the range: "slightly brighter"
NEIGHBOURS = 32  # a picture is laid over at most so many of those alike, in each tile
_ROWS, _COLUMNS, _PAIRS = 1024, 4096, 8192  # sizes of tiles: about 200 MB at a time


def picture_signature(pixel_values: Tensor) -> Tensor:
    """What of a picture outlives saving it again: float16 (B, 771), on the device of the pictures.

    pixel_values (B, 3, H, W) uint8, or float where a transform has normalised already (taken to
    have a mean near 0 and a spread near 1). A thumbnail 3 x 16 x 16, each colour less its mean, all
    divided by their standard deviation (at least 8 of 255, or noise would fill an empty picture);
    then the three mean colours, 0 to 1. Raises ValueError for another shape.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(f"pictures of shape {tuple(pixel_values.shape)}; give (B, 3, H, W)")
    pixels = pixel_values.float()
    if pixel_values.is_floating_point():
        pixels = pixels * 57 + 118  # back to about 0..255 from ImageNet's mean and spread
    return unrounded_signature(pixels).half()


def unrounded_signature(pixels: Tensor) -> Tensor:
    """`picture_signature` in the number type of `pixels` (B, 3, H, W), from 0 to 255."""
    small = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
    mean = small.mean((2, 3), keepdim=True)
    flat = (small - mean).flatten(1)
    flat = flat / flat.pow(2).mean(1, keepdim=True).sqrt().clamp(min=8)
    return torch.cat([flat, mean.flatten(1) / 255], 1)


def near_duplicates(signature: Tensor, threshold: float = NEAR) -> np.ndarray:
    """(N,) int64: pictures that near-duplicate pairs connect get one number, by first appearance.

    signature (N, 771) of `picture_signature`. threshold: the largest difference in one place, in
    standard deviations; 0 joins equal signatures only. Pictures are sorted along their main
    direction, so that only neighbours on it are compared; equal ones are one to begin with, and
    pairs that are connected already are not looked at. On two cores 50,000 pictures take about 15 s
    and, where all are alike without being equal, 20 to 40 s, in bounded memory: of more than
    `NEIGHBOURS` alike in a tile only the nearest are looked at. Raises ValueError below 0.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold} must be at least 0; {NEAR} is a good start")
    signature = signature.half().cpu()
    same = exact_duplicates([row.tobytes() for row in signature.numpy()])
    if threshold == 0:
        return same
    signature = signature[np.unique(same, return_index=True)[1]]
    coarse = coarse_cells(signature.float())
    place = _main_direction(coarse)
    order = place.argsort(stable=True)
    label = torch.empty_like(order)
    label[order] = _linked(signature[order], coarse[order], place[order], threshold)
    return exact_duplicates(label[same].tolist())


def coarse_cells(signature: Tensor) -> Tensor:
    """(N, 192) colours of 8 x 8 cells, scaled so that a distance is a root mean square."""
    cells = F.avg_pool2d(signature[:, :-3].view(-1, 3, SIDE, SIDE), 2).flatten(1)
    return cells / cells.shape[1] ** 0.5


def _main_direction(coarse: Tensor) -> Tensor:
    """(N,) place of each picture along the direction in which they differ most.

    Places differ by at most as much as the pictures do.
    """
    centred = coarse - coarse.mean(0)
    direction = torch.linalg.eigh(centred.T.double() @ centred.double())[1][:, -1]
    return centred @ direction.float()


def _linked(signature, coarse, place, threshold: float) -> Tensor:
    """(N,) the cluster of each picture; pictures are in the order of their places."""
    length, label = coarse.pow(2).sum(1), torch.arange(len(coarse))
    for start in range(0, len(coarse), _ROWS):
        rows = torch.arange(start, min(start + _ROWS, len(coarse)))
        end = int(torch.searchsorted(place, place[rows[-1]] + COARSE + 1e-4, right=True))
        for first in range(start, end, _COLUMNS):
            columns = torch.arange(first, min(first + _COLUMNS, end))
            mine, theirs = label[rows], label[columns]
            if mine.min() == mine.max() == theirs.min() == theirs.max():
                continue
            product = coarse[rows] @ coarse[columns].T
            distance = length[rows, None] + length[columns] - 2 * product  # squared
            new = (rows[:, None] < columns) & (mine[:, None] != theirs)
            a, b = _nearest(distance, *torch.where((distance <= COARSE**2) & new))
            for pair in range(0, len(a), _PAIRS):
                left, right = rows[a[pair : pair + _PAIRS]], columns[b[pair : pair + _PAIRS]]
                apart = label[left] != label[right]
                left, right = left[apart], right[apart]
                near = is_near(signature[left].float(), signature[right].float(), threshold)
                if near.any():
                    links = torch.stack([label[left[near]], label[right[near]]], 1)
                    label = torch.from_numpy(connected(len(label), links))[label]
    return label


def _nearest(distance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of the pairs (a, b) the nearest `NEIGHBOURS` of each a, all nearest ones first."""
    by_distance = distance[a, b].argsort(stable=True)
    by_row = by_distance[a[by_distance].argsort(stable=True)]
    counts = torch.bincount(a, minlength=len(distance))
    rank = torch.arange(len(a)) - (counts.cumsum(0) - counts)[a[by_row]]
    first = rank.argsort(stable=True)[: int((rank < NEIGHBOURS).sum())]
    return a[by_row[first]], b[by_row[first]]


def is_near(left: Tensor, right: Tensor, threshold: float) -> Tensor:
    """(P,) bool for P pairs of signatures: of one colour, and alike in every place once aligned."""
    near = (left[:, -3:] - right[:, -3:]).abs().amax(1) <= MEAN_COLOUR
    a, b = (x[:, :-3].view(-1, 3, SIDE, SIDE) for x in (left, right))
    alike = _largest_place(a - b) <= threshold
    unsure = torch.where(near & ~alike)[0]
    if len(unsure):
        alike[unsure] = _largest_place(_unexplained(a[unsure], b[unsure])) <= threshold
    return near & alike


def _largest_place(difference: Tensor) -> Tensor:
    """(P,) the largest length of a colour difference, averaged over 2 x 2 cells."""
    return F.avg_pool2d(difference, 2, 1).pow(2).sum(1).sqrt().flatten(1).amax(1)


def _unexplained(a: Tensor, b: Tensor) -> Tensor:
    """What of a - b no small shift, zoom and change of contrast explains (Lucas & Kanade 1981).

    Least squares on the gradients of the mean picture; a small ridge keeps flat pictures still.
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
