"""Images in files, tables and shards that the tests of several modules read."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmkit import MultimodalDataset, from_table
from tests.data.awkward import watched
from tests.data.seven_images import images
from tests.data.tars import pair, write_tar
from tests.data.two_colours import BLUE, RED


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    """A folder of its own for all that is cached."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MMKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def watch(tmp_path_factory, monkeypatch):
    """Nothing is started, nothing waits for ever, see `watched`."""
    with watched(tmp_path_factory.mktemp("cache"), monkeypatch):
        yield


@pytest.fixture
def make_shards(cache, tmp_path):
    """Shards of the given numbers of samples; sample i is `image(i)`, "caption i"."""

    def make(*counts: int, folder: str = "set") -> Path:
        (tmp_path / folder).mkdir()
        i = 0
        for number, count in enumerate(counts):
            members = []
            for i in range(i, i + count):  # noqa: B020
                members += pair(f"{i:06d}", i, f"caption {i}")
            i += 1
            write_tar(tmp_path / folder / f"{number:05d}.tar", members)
        return tmp_path / folder

    return make


@pytest.fixture
def real(cache, tmp_path):
    """Seven images in files of several kinds, one of them with a wrong name."""
    kinds = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]
    paths = []
    for i, kind in enumerate(kinds):
        paths.append(tmp_path / f"{i}.{'jpg' if i == 0 else kind.lower()}")
        Image.new("RGB", (20 + i, 11 + 2 * i), (30 * i, 255 - 30 * i, 99)).save(paths[-1], kind)
    texts = ["a flag", "zwei Hälften\n", ["red", "rouge", "röd"], "four", "five", ["six"], "seven"]
    return MultimodalDataset(paths, texts, image_size=13)


ARTISTS = ["Ann", "Bob", "Cy", "Dee", "Eve", "Flo", "Gus", "Hal", "Ida", "Jo", "Kit"]


@pytest.fixture
def by_artists(cache, tmp_path):
    """Sixty images in files, some with two captions; each has an artist, a year, a list."""
    lines = []
    for i in range(60):
        pixels = np.random.default_rng(i).integers(0, 256, (17, 13, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        texts = [f"image {i}"] + [f"once more {i}"] * (i % 3 == 0)
        metadata = {"artist": ARTISTS[i % 11], "year": 1900 + i, "tags": ["é", None, 0.5]}
        lines.append(json.dumps({"image": f"{i}.png", "text": texts} | metadata))
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    return from_table(tmp_path / "set.jsonl", meta=["artist", "year", "tags"], image_size=11)


@pytest.fixture
def root(cache, tmp_path):
    """Seven images of different sizes with a .txt beside each."""
    return images(tmp_path / "images")


@pytest.fixture
def files(tmp_path):
    """Seven images of different sizes, left half red and right half blue."""
    paths = []
    for i in range(7):
        image = Image.new("RGB", (20 + i, 11 + 2 * i), RED)
        image.paste(BLUE, (10, 0, 40, 40))
        paths.append(tmp_path / f"{i}.png")
        image.save(paths[-1])
    return paths
