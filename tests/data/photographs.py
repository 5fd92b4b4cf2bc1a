"""Photographs, and the ways in which people save them again."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "moon", "motorcycle_left", "rocket")


def photographs(size=224):
    """Photographs from scikit-image, cropped to a square."""
    skimage = pytest.importorskip("skimage")
    folder = f"{skimage.__path__[0]}/data"
    found = []
    for name in PHOTOGRAPHS:
        ending = "jpg" if name == "rocket" else "png"
        image = Image.open(f"{folder}/{name}.{ending}").convert("RGB")
        side = min(image.size)
        found.append(image.crop((0, 0, side, side)).resize((size, size), Image.BICUBIC))
    return found


def jpeg(image, quality=50):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def brighter(image, factor=1.05):
    return Image.fromarray(np.clip(np.asarray(image) * factor, 0, 255).astype(np.uint8))


def cut(image):
    """1 % cropped at each side: 2 % of the width and of the height."""
    w, h = image.size
    edge = round(w / 100)
    return image.crop((edge, edge, w - edge, h - edge)).resize((w, h), Image.BICUBIC)


def smaller(image):
    return image.resize((image.width // 2, image.height // 2), Image.BICUBIC)


def as_pixels(images):
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in images])
