"""Search the images of a data set by words or by an image.

Walk-through: notebooks/04_retrieval.ipynb.
"""

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import MultimodalDataset
from ..data.images import read_picture, square, to_rgb
from ..data.loader import as_dataset
from ..losses import similarity
from ..models.attention import eval_mode
from ..models.encoder import MultimodalEncoder
from .retrieval import _say_if_not_normalised, embed, embed_texts


@dataclass
class Hit:
    """One result of a search."""

    row: int  # row of the data set
    score: float  # cosine with the query, in [-1, 1]
    text: str  # the picture's canonical caption
    sample_id: int


class Index:
    """A data set's pictures, ready to be searched by words or by a picture.

    Raises ValueError for an empty query or more results than pictures.
    """

    def __init__(
        self, model: MultimodalEncoder, dataset: MultimodalDataset, mixed_precision: str = "auto"
    ):
        self.model, self.dataset = model, as_dataset(dataset, "dataset")
        self.features = embed(model, dataset, mixed_precision=mixed_precision)

    def query(self, query) -> Tensor:
        """Unit-length feature (D,) of a text or a picture (see `search`)."""
        if isinstance(query, str) and not query.lower().endswith(
            (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
        ):
            return embed_texts(self.model, [query])[0]
        if not (isinstance(query, str | os.PathLike | Tensor | np.ndarray)
                or hasattr(query, "convert") or hasattr(query, "read")):  # fmt: skip
            raise ValueError(
                f"query={query!r} is neither words nor an image; give a text, the path of a file, "
                "a PIL image or a tensor (3, H, W)"
            )
        if isinstance(query, Tensor | np.ndarray):
            pixels = torch.as_tensor(query)
            _say_if_not_normalised(self.model, pixels)
        else:
            picture = to_rgb(query) if hasattr(query, "convert") else read_picture(query)
            pixels = square(self.model.image_size)(picture)
        device = self.model.logit_scale.device
        with eval_mode(self.model):
            return self.model.encode_image(pixels[None].to(device))[0].cpu()

    def search(self, query, k: int = 10) -> list[Hit]:
        """The k pictures nearest to a text or a picture, best first.

        A picture is a file name with a picture's ending, a PIL image or a uint8 tensor (3, H, W).
        """
        if not 1 <= k <= len(self.dataset):
            raise ValueError(
                f"k={k} must be between 1 and the {len(self.dataset)} pictures of the index"
            )
        scores = similarity(self.features.image_features, self.query(query)[None])[:, 0]
        best = scores.topk(k)
        return [
            Hit(row, value, self.dataset.texts[row][0], int(self.dataset.sample_ids[row]))
            for value, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
