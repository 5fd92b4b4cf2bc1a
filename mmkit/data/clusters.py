"""Clusters of rows: rows with equal keys, or connected by links, get the same number.

Shapes: N rows, E links. Walk-through: notebooks/08_your_own_images.ipynb.
"""

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def exact_duplicates(keys: Iterable[Hashable]) -> np.ndarray:
    """(N,) int64: equal keys get the same number, in order of first appearance."""
    first: dict[Hashable, int] = {}
    return np.array([first.setdefault(key, len(first)) for key in keys], dtype=np.int64)


def number(keys: Iterable[Hashable]) -> Tensor:
    """`exact_duplicates` as a tensor."""
    return torch.from_numpy(exact_duplicates(keys))


def connected(count: int, links) -> np.ndarray:
    """(count,) int64: rows that links (E, 2) connect, directly or not, get the same number."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = np.asarray(links, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(ends.shape[1], np.int8), tuple(ends)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def rows_that_share(keys_of: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """(N,) int64: rows that share a key, directly or through others, get the same number."""
    key = exact_duplicates([key for keys in keys_of for key in keys])
    row = np.repeat(np.arange(len(keys_of)), [len(keys) for keys in keys_of])
    links = np.stack([row, key + len(keys_of)], 1)  # rows first, then keys
    return exact_duplicates(connected(len(keys_of) + len(key), links)[: len(keys_of)].tolist())
