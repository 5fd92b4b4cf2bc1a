"""Seven images of different sizes with two captions each, and loaders of them."""

import numpy as np
import torch
from PIL import Image

import mmkit as mm
from tests.conftest import centre_square

SIDE = 8
KINDS = ["bird", "cat", "cat", "dog", "eel", "fox", "gnu"]  # two cats, which share their captions
NAMES = [f"{kind}/{i}.{'jpg' if i % 2 else 'png'}" for i, kind in enumerate(KINDS)]
TEMPLATES = ["a photo of a {}", "this is my {}"]
TEXTS = [[template.format(kind) for template in TEMPLATES] for kind in KINDS]
OPTIONS = dict(image_size=SIDE, num_workers=0)


def images(root, seed=0):
    generator = np.random.default_rng(seed)
    for i, name in enumerate(NAMES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (11 + 2 * i, 29 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text("\n".join(TEXTS[i]))
    return root


def lists(root, **options):
    return mm.from_lists([root / name for name in NAMES], TEXTS, **options)


def parquet(values):
    def way(root, **options):
        import pyarrow
        import pyarrow.parquet

        columns = {"image": [values(root / name, name) for name in NAMES], "text": TEXTS}
        pyarrow.parquet.write_table(pyarrow.table(columns), root / "pairs.parquet")
        return mm.from_table(root / "pairs.parquet", **options)

    return way


def folder(root, **options):
    return mm.from_folder(root, **options)


def by_hand(root):
    """The expected images (7, 3, 8, 8), uint8."""
    return torch.stack([centre_square(Image.open(root / name), SIDE) for name in NAMES])
