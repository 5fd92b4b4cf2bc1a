"""Image maskers as slow loops, written from the papers."""

import math

import numpy as np
import torch

from mmkit.noise import more_noise


def slow_block(noise, number, grid):
    """BEiT's algorithm 1 with loops: the masked patches of one image, and its rectangles."""
    height, width = grid
    smallest = 16 / 196 * height * width
    masked, rectangles = [], []
    for size, shape, down, right in more_noise(noise[None], 48)[0].reshape(12, 4).tolist():
        left_over = number - len(masked)
        if left_over <= 0:
            break
        area = smallest + size * max(0, left_over - smallest)
        aspect = 0.3 ** (1 - 2 * shape)  # log-uniform in (0.3, 1 / 0.3)
        tall = min(max(1, round(math.sqrt(area * aspect))), height)
        wide = min(max(1, round(math.sqrt(area / aspect))), width)
        top, left = int(down * (height - tall + 1)), int(right * (width - wide + 1))
        rectangles.append((tall, wide, left_over))
        for row in range(top, top + tall):
            for column in range(left, left + wide):
                if row * width + column not in masked:
                    masked.append(row * width + column)
    for patch in noise.argsort().tolist():  # twelve were not enough
        if patch not in masked:
            masked.append(patch)
    return set(masked[:number]), rectangles


def slow_inverse_block(noise, kept, grid):
    """Add 3 x 3 blocks in the order of their centres' noise until enough patches are kept."""
    height, width = grid
    visible = []
    for centre in noise.argsort().tolist():
        row, column = divmod(centre, width)
        block = [
            r * width + c
            for r in range(max(0, row - 1), min(height, row + 2))
            for c in range(max(0, column - 1), min(width, column + 2))
        ]
        new = [patch for patch in block if patch not in visible]
        visible += sorted(new, key=lambda patch: noise[patch].item())
    return set(visible[:kept])


def density(row, column, grid):
    """GLIP's: normal, variance 0.2, coordinates from -1 to 1."""
    y, x = (2 * i / (n - 1) - 1 for i, n in ((row, grid[0]), (column, grid[1])))
    return math.exp(-(x * x + y * y) / (2 * 0.2)) / (2 * math.pi * 0.2)


def slow_gaussian(rand, kept, grid):
    """GLIP's rule: the largest of rand - (1 - pdf) are kept."""
    score = [
        value - (1 - density(*divmod(patch, grid[1]), grid)) for patch, value in enumerate(rand)
    ]
    return set(sorted(range(len(rand)), key=score.__getitem__, reverse=True)[:kept])


def slow_cluster(noise, pixels, number, grid, patch):
    """The masked patches of one image, by loops over patches, their quarters and anchors."""
    half = patch // 2
    means = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            square = pixels[:, row * patch :, column * patch :][:, :patch, :patch]
            quarters = [square[:, y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
            means.append(np.concatenate([quarter.mean((1, 2)) for quarter in quarters]))
    anchors = np.argsort(-noise, kind="stable")[: max(1, round(0.03 * len(means)))]
    nearest = [min(np.linalg.norm(mean - means[a]) for a in anchors) for mean in means]
    order = sorted(range(len(means)), key=lambda i: (round(16 * nearest[i]), noise[i]))
    return set(order[:number])


def slow_layers(noise, regions):
    """The patches of the region that the first further draw picks among the valid ones."""
    valid = [region for region in regions if region.any()]
    if not valid:
        return torch.zeros_like(regions[0])
    masked = valid[int(more_noise(noise[None], 1)[0, 0] * len(valid))].clone()
    if masked.all():
        masked[noise.argmin()] = False
    return masked
