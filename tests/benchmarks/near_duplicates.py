"""Which changed copies of an image are recognised, and how often different images are joined.

    python -m tests.benchmarks.near_duplicates    # half a minute

Originals: every 13th built-in drawing, and photographs of scikit-image and scikit-learn with the
four quarters of the large ones, textures and pages of text among them. Each is changed at 256
pixels and loaded at 64, as a file would be. Recall: how many are in one cluster with their
original. False matches: pairs of different images in one cluster, of all built-in drawings, of the
photographs and of the 200 small grey crops (half of them faces) that scikit-image ships. Writes
results/near_duplicates.json.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from mmkit.data.image_duplicates import image_signature, near_duplicates
from mmkit.data.openmoji.drawings import read_table
from mmkit.data.openmoji.images import render
from tests.benchmarks.draw_masks import FOLDER, machine

SIZE, LARGE = 64, 256
NAMES = (
    "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png "
    "grass.png gravel.png ihc.png microaneurysms.png moon.png motorcycle_left.png page.png "
    "text.png hubble_deep_field.jpg retina.jpg rocket.jpg"
)
Change = Callable[[Image.Image], Image.Image]


def recompressed(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    return Image.open(file).convert("RGB")


def resized(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)


def brighter(factor: float) -> Change:
    return lambda image: image.point(lambda value: min(255, round(value * factor)))


def grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def cut(left: float, top: float, right: float, bottom: float) -> Change:
    def change(image: Image.Image) -> Image.Image:
        w, h = image.size
        box = round(left * w), round(top * h), round((1 - right) * w), round((1 - bottom) * h)
        return image.crop(box)

    return change


def border(fraction: float, colour: str) -> Change:
    return lambda image: ImageOps.expand(image, round(fraction * image.width), colour)


CHANGES: dict[str, Change] = {
    "recompressed": recompressed,
    "half the size": resized,
    "5 % brighter": brighter(1.05),
    "10 % brighter": brighter(1.1),
    "10 % darker": brighter(0.9),
    "cut by 1 % at each side": cut(0.01, 0.01, 0.01, 0.01),
    "cut by 2 % at each side": cut(0.02, 0.02, 0.02, 0.02),
    "cut by 5 % at each side": cut(0.05, 0.05, 0.05, 0.05),
    "cut by 5 % on the left": cut(0.05, 0, 0, 0),
    "cut by 5 % at the bottom": cut(0, 0, 0, 0.05),
    "white border of 5 %": border(0.05, "white"),
    "black border of 5 %": border(0.05, "black"),
    "mirrored": ImageOps.mirror,
    "grey": grey,
}


def drawings() -> list[Image.Image]:
    stems = [entry["codepoints"] for entry in read_table()][::13]
    return [Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in render(stems, LARGE)]


def photographs() -> list[Image.Image]:
    """Squares of 256 pixels: the centres of all, and the quarters of the large ones."""
    import skimage
    import sklearn

    files = [Path(skimage.__path__[0]) / "data" / name for name in NAMES.split()]
    more = Path(sklearn.__path__[0]) / "datasets" / "images"
    found = []
    for file in [*files, more / "china.jpg", more / "flower.jpg"]:
        image = Image.open(file).convert("RGB")
        w, h = image.width // 2, image.height // 2
        parts = [image]
        if min(image.size) >= 384:
            parts += [image.crop((x, y, x + w, y + h)) for x in (0, w) for y in (0, h)]
        found += [ImageOps.fit(part, (LARGE, LARGE), Image.Resampling.BICUBIC) for part in parts]
    return found


def small_crops() -> torch.Tensor:
    import skimage

    crops = np.load(Path(skimage.__path__[0]) / "data" / "lfw_subset.npy")
    scaled = (crops - crops.min()) / (crops.max() - crops.min()) * 255
    return torch.from_numpy(scaled).byte()[:, None].expand(-1, 3, -1, -1)


def signatures(images: list[Image.Image]) -> torch.Tensor:
    loaded = [np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for image in images]
    return image_signature(torch.from_numpy(np.stack(loaded)).permute(0, 3, 1, 2))


def recall(images: list[Image.Image], change: Change) -> float:
    both = torch.cat([signatures(images), signatures([change(image) for image in images])])
    group = near_duplicates(both)
    return float((group[: len(images)] == group[len(images) :]).mean())


def false_matches(signature: torch.Tensor) -> dict[str, float]:
    """How many pairs of different images are in one cluster, and how many images that concerns."""
    size = np.bincount(near_duplicates(signature))
    pairs = len(signature) * (len(signature) - 1) // 2
    joined = int((size * (size - 1) // 2).sum())
    return {
        "images": len(signature),
        "pairs": pairs,
        "pairs joined": joined,
        "per million pairs": 1e6 * joined / pairs,
        "images joined": int(size[size > 1].sum()),
    }


def main() -> None:
    originals = {"drawings": drawings(), "photographs": photographs()}
    found = {
        name: {kind: recall(images, change) for kind, images in originals.items()}
        for name, change in CHANGES.items()
    }
    every = torch.from_numpy(np.array(render([e["codepoints"] for e in read_table()], SIZE)))
    sets = {
        "built-in drawings": image_signature(every),
        "photographs": signatures(originals["photographs"]),
        "small grey crops": image_signature(small_crops()),
    }
    result = {
        "machine": machine(),
        "originals": {kind: len(images) for kind, images in originals.items()},
        "recall": found,
        "false matches": {name: false_matches(signature) for name, signature in sets.items()},
    }
    (FOLDER / "near_duplicates.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, rates in found.items():
        print(f"{name:26} " + "  ".join(f"{kind} {100 * r:5.1f} %" for kind, r in rates.items()))
    for name, rates in result["false matches"].items():
        print(f"{name}: {rates}")


if __name__ == "__main__":
    main()
