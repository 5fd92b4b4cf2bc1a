"""Images for own_images.py: emoji laid over photographs, as files, tables and tar shards.

In a folder named by the number of images: images/<class>/<number>.jpg (ImageFolder's tree; about
160 pixels, 5 to 8 KB, quality 85), pairs.csv (columns filepath and caption, paths relative to that
folder) and shards/. Made once: a folder with shards is complete. An image is a function of its
number.
"""

import csv
import io
import random
from multiprocessing import get_context
from pathlib import Path

import numpy as np

import mmkit as mm

PHOTOGRAPHS = "astronaut coffee chelsea rocket motorcycle_left hubble_deep_field retina".split()
COLOURS = {
    "red": (214, 60, 50),
    "orange": (240, 160, 40),
    "yellow": (245, 225, 90),
    "green": (70, 160, 80),
    "blue": (70, 110, 200),
    "purple": (150, 90, 180),
    "pink": (240, 160, 190),
    "grey": (150, 150, 150),
}
CLASSES, PER_SHARD, QUALITY = 100, 1000, 85


def path_of(number: int) -> str:
    """The path of an image, relative to the folder."""
    return f"images/{number % CLASSES:03d}/{number:06d}.jpg"


def photographs() -> dict:
    """scikit-image's photographs, the shorter side about 300 pixels."""
    import skimage.data
    from PIL import Image

    folder = Path(skimage.data.__file__).parent
    found = {}
    for name in PHOTOGRAPHS:
        image = Image.open(next(folder.glob(f"{name}.*"))).convert("RGB")
        scale = 300 / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        found[name] = image.resize(size, Image.Resampling.LANCZOS)
    return found


def image_of(number: int, emoji: mm.MultimodalDataset, photos: dict) -> tuple[bytes, str]:
    """(JPEG, caption) of a number: part of a photograph and, on it, an emoji on a coloured card."""
    from PIL import Image, ImageChops

    rng = random.Random(number)
    name, colour = rng.choice(PHOTOGRAPHS), rng.choice(list(COLOURS))
    width, height = rng.randint(136, 184), rng.randint(136, 184)
    photo, side = photos[name], rng.uniform(0.8, 1.5)
    wide, high = round(width * side), round(height * side)
    left, top = rng.randint(0, photo.width - wide), rng.randint(0, photo.height - high)
    image = photo.resize((width, height), box=(left, top, left + wide, top + high))
    row = emoji[rng.randrange(len(emoji))]
    drawing = Image.fromarray(row["image"].permute(1, 2, 0).numpy())
    drawing = drawing.resize((rng.randint(64, 120),) * 2)
    card = ImageChops.multiply(drawing, Image.new("RGB", drawing.size, COLOURS[colour]))
    x, y = rng.randint(0, width - card.width), rng.randint(0, height - card.height)
    image.paste(card, (x, y))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    where = f"{'upper' if y + card.height / 2 < height / 2 else 'lower'} "
    where += "left" if x + card.width / 2 < width / 2 else "right"
    scene = name.replace("_", " ")
    return file.getvalue(), f"{row['text']} on a {colour} card, {where}, over the {scene}"


def _make_part(folder: Path, numbers: range) -> list[tuple[str, str]]:
    """Files and shards of these numbers; returns (relative path, caption) of each."""
    import webdataset

    emoji, photos = mm.openmoji(image_size=112)[0], photographs()
    rows: list[tuple[str, str]] = []
    for start in range(numbers.start, numbers.stop, PER_SHARD):
        shard = folder / "shards.part" / f"{start // PER_SHARD:05d}.tar"
        with webdataset.TarWriter(str(shard)) as tar:
            for number in range(start, min(start + PER_SHARD, numbers.stop)):
                jpeg, caption = image_of(number, emoji, photos)
                path = path_of(number)
                (folder / path).write_bytes(jpeg)
                tar.write({"__key__": f"{number:06d}", "jpg": jpeg, "txt": caption})
                rows.append((path, caption))
    return rows


def make(folder: Path, count: int) -> Path:
    """The folder of so many images, made by two processes if it does not exist yet."""
    folder = Path(folder) / str(count)
    if (folder / "shards").is_dir():
        return folder
    for name in ("shards.part", *(f"images/{kind:03d}" for kind in range(CLASSES))):
        (folder / name).mkdir(parents=True, exist_ok=True)
    half = PER_SHARD * int(np.ceil(count / PER_SHARD / 2))
    parts = [range(half), range(half, count)] if half < count else [range(count)]
    with get_context("spawn").Pool(len(parts)) as pool:
        made = pool.starmap(_make_part, [(folder, part) for part in parts])
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "caption"])
        writer.writerows(row for part in made for row in part)
    (folder / "shards.part").rename(folder / "shards")
    return folder
