"""Images in files, tables and shards that the tests of several modules read."""

import json
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmkit import MultimodalDataset, from_table
from tests.data.awkward import watched
from tests.data.seven_images import images
from tests.data.tars import pair, write_tar
from tests.data.two_colours import BLUE, RED


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


class Server(ThreadingHTTPServer):
    """Serves a folder on 127.0.0.1 and keeps what it was asked for."""

    def __init__(self, folder: Path):
        self.asked: list[str] = []
        self.wait, self.cut_at = 0.0, None
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def copyfile(self, source, outputfile):
        server: Any = self.server
        server.asked.append(self.path)
        time.sleep(server.wait)
        outputfile.write(source.read(server.cut_at))


@pytest.fixture
def serve(tmp_path):
    """A server of `tmp_path`: its `url`, what was `asked`, `wait` seconds, `cut_at` bytes."""
    with Server(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
