"""Functions for processes that start anew (spawn): those must be importable."""

import torch

from mmkit.distributed import rank_and_world_size


def who(word: str) -> tuple:
    """What a rank is, and how many threads it computes with."""
    return word, rank_and_world_size(), torch.get_num_threads()
