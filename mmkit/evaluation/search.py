"""Search the images of a data set by a text or by an image.

Walk-through: notebooks/04_retrieval.ipynb.
"""

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import MultimodalDataset
from ..data.images import read_image, square, to_rgb
from ..data.loader import as_dataset
from ..losses import similarity
from ..models.attention import eval_mode
from ..models.encoder import MultimodalEncoder
from .features import _say_if_not_normalised, embed, embed_texts


@dataclass
class Hit:
    """One result of a search."""

    row: int  # row of the data set
    score: float  # cosine with the query, in [-1, 1]
    text: str  # the image's canonical caption
    sample_id: int


class Index:
    """The encoded images of a data set, to be searched by a text or by an image.

    Args:
        model: the encoder of images and queries.
        dataset: the N images to search.
        mixed_precision: as in `TrainingConfig`; "auto" is faster, "no" is exact.
    Example:
        >>> index = mm.Index(model, data)
        >>> [hit.row for hit in index.search(data[7]["image"], k=1)]  # by an image
        [7]
        >>> len(index.search("a red cat", k=5))  # by a text
        5
    """

    def __init__(
        self, model: MultimodalEncoder, dataset: MultimodalDataset, mixed_precision: str = "auto"
    ):
        self.model, self.dataset = model, as_dataset(dataset, "dataset")
        self.features = embed(model, dataset, mixed_precision=mixed_precision)

    def query(self, query) -> Tensor:
        """Encode a text or an image (see `search`) as a unit-length feature (D,).

        Raises:
            ValueError: the query is empty, or neither a text nor an image.
        """
        if isinstance(query, str) and not query.lower().endswith(
            (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
        ):
            return embed_texts(self.model, [query])[0]
        if not (isinstance(query, str | os.PathLike | Tensor | np.ndarray)
                or hasattr(query, "convert") or hasattr(query, "read")):  # fmt: skip
            raise ValueError(
                f"query={query!r} is neither a text nor an image; give a text, the path of a file, "
                "a PIL image or a tensor (3, H, W)"
            )
        if isinstance(query, Tensor | np.ndarray):
            pixels = torch.as_tensor(query)
            _say_if_not_normalised(self.model, pixels)
        else:
            image = to_rgb(query) if hasattr(query, "convert") else read_image(query)
            pixels = square(self.model.image_size)(image)
        device = self.model.logit_scale.device
        with eval_mode(self.model):
            return self.model.encode_image(pixels[None].to(device))[0].cpu()

    def search(self, query, k: int = 10) -> list[Hit]:
        """Find the k images nearest to a query, best first.

        Args:
            query: a text, or an image: a file name with the extension of an image, a PIL image or
                a uint8 tensor (3, H, W).
            k: number of results, in [1, N].
        Returns:
            A list of `Hit`.
        Raises:
            ValueError: k is out of range, or the query is as `query` refuses it.
        """
        if not 1 <= k <= len(self.dataset):
            raise ValueError(
                f"k={k} must be between 1 and the {len(self.dataset)} images of the index"
            )
        scores = similarity(self.features.image_features, self.query(query)[None])[:, 0]
        best = scores.topk(k)
        return [
            Hit(row, value, self.dataset.texts[row][0], int(self.dataset.sample_ids[row]))
            for value, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
