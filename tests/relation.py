"""A relation of captions and images that holds in one direction only."""

import torch


def matrix(caption_ids, image_captions):
    """(N, M) bool: caption j is correct for image i, by a loop."""
    rows = [[int(c) in own for c in caption_ids] for own in image_captions.tolist()]
    return torch.tensor(rows)


# Drawn captions, and all captions of each image: 2 and 6 are shared, images 0 and 4 are the same,
# and image 3 has a caption that no row draws. Most relations hold in one direction only.
IDS = torch.tensor([2, 1, 2, 3, 9, 6, 8])
TABLE = torch.tensor(
    [[2, 9, -1], [1, 2, 6], [2, -1, -1], [3, 7, -1], [2, 9, -1], [6, -1, -1], [8, 6, 1]]
)
