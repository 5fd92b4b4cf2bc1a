"""Functions for spawned processes, which must be importable."""

import torch

from mmkit.distributed import rank_and_world_size


def who(word: str) -> tuple:
    """The rank, and the number of threads it computes with."""
    return word, rank_and_world_size(), torch.get_num_threads()
