"""Random images."""

import torch


def images(count=3, size=15, seed=0):
    torch.manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
