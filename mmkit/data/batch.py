"""The encoder's input: images, captions, and which of them are correct for each other.

Shapes: B batch, H x W pixels, L text length, K captions of an image.
Walk-through: notebooks/01_data.ipynb.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .partners import correct_pairs


@dataclass
class Batch:
    """The encoder's input; all tensors have the same first dimension B.

    `caption_ids` and `image_captions` define which captions are correct for which images, see
    `correct`. They are None if each caption of the dataset belongs to a single row: then only a
    row's own caption is correct.
    """

    pixel_values: Tensor  # (B, 3, H, W) uint8; float only from a transform that normalises itself
    input_ids: Tensor  # (B, L) int64, L = the longest caption of the batch
    valid: Tensor  # (B, L) bool, True = token, False = padding
    sample_ids: Tensor  # (B,) int64, the same for an image in every epoch, worker and process
    caption_ids: Tensor | None = None  # (B,) int64, equal for captions of the same tokens
    image_captions: Tensor | None = None  # (B, K) int64: ids of all its captions; -1 = none

    def __len__(self) -> int:
        return len(self.sample_ids)

    def _map(self, f: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        parts: Any = {name: None if x is None else f(x) for name, x in values.items()}
        return Batch(**parts)

    @property
    def partners(self) -> tuple[Tensor, Tensor] | None:
        """(caption_ids, image_captions), as the losses take them; None = one to one."""
        if self.caption_ids is None or self.image_captions is None:
            return None
        return self.caption_ids, self.image_captions

    def correct(self) -> Tensor:
        """(B, B) bool: is caption j one of the captions of image i?"""
        if self.caption_ids is None or self.image_captions is None:
            return torch.eye(len(self), dtype=torch.bool, device=self.sample_ids.device)
        return correct_pairs(self.image_captions, self.caption_ids)

    def __getitem__(self, rows) -> "Batch":
        """The batch of these rows (a slice or an index tensor)."""
        return self._map(lambda x: x[rows])

    def to(self, device) -> "Batch":
        """The batch on a device; a copy to a GPU is asynchronous."""
        to_gpu = torch.device(device).type == "cuda"  # a copy to the CPU must be waited for
        return self._map(lambda x: x.to(device, non_blocking=to_gpu))

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory."""
        return self._map(lambda x: torch.as_tensor(x).pin_memory())

    def split(self, parts: int) -> list["Batch"]:
        """`parts` micro-batches in order, their sizes differing by at most one, none empty."""
        rows = torch.arange(len(self)).tensor_split(min(parts, len(self)))
        return [self[int(part[0]) : int(part[-1]) + 1] for part in rows]


def checked_ids(sample_ids: Sequence[int] | Tensor | None, count: int) -> Tensor:
    """The ids (N,) int64 of `count` rows, None = 0, 1, 2, …; ValueError for repeated ones."""
    ids = torch.arange(count) if sample_ids is None else torch.as_tensor(sample_ids)
    if len(ids) != count:
        raise ValueError(f"{len(ids)} sample_ids for {count} rows; give one per row")
    ids = ids.to(torch.int64)
    if len(ids.unique()) < count:
        repeated, times = Counter(ids.tolist()).most_common(1)[0]
        raise ValueError(
            f"sample id {repeated} occurs in {times} rows; give each row its own, as order and "
            "masks are drawn by it"
        )
    return ids
