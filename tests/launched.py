"""Functions for processes that start anew (spawn): those must be importable."""

import torch

from mmkit.distributed import world


def who(word: str) -> tuple:
    """What a rank is, and how many threads it computes with."""
    return word, world(), torch.get_num_threads()
