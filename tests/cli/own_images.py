"""A user's images in every form that the command line takes, and a training run on them."""

import re

import numpy as np
from PIL import Image

import mmkit as mm

ARTISTS = [f"artist {letter}" for letter in "abcdefghijklmnopqrstuvwx"]


def scene(i: int) -> Image.Image:
    """Patterns of 4 x 4 colours, 32 px: images that are clearly different."""
    coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse.repeat(8, 0).repeat(8, 1))


FLAGS = ["--image", "file", "--text", "words"]


def with_bad_rows(folder, count: int = 3):
    """pairs.csv with rows that cannot be loaded."""
    (folder / "pics/broken.png").write_bytes(b"<html>")
    bad = ["gone.png,a word,Ann", "broken.png,a word,Ann", "1.png,,Ann"][:count]
    with open(folder / "pairs.csv", "a") as file:
        file.write("\n".join(bad) + "\n")


def as_words(own):
    for i in range(48):
        (own / f"pics/{i}.txt").write_text(f"image of number {i}")
    return own / "pics"


def as_classes(own):
    for i in range(48):
        (own / f"classes/{ARTISTS[i % 24]}").mkdir(parents=True, exist_ok=True)
        (own / f"pics/{i}.png").rename(own / f"classes/{ARTISTS[i % 24]}/{i}.png")
    return own / "classes"


def as_shards(own):
    data = mm.from_table(own / "pairs.csv", image="file", text="words", root=own / "pics",
                         meta=["artist"])  # fmt: skip
    mm.write_shards(data, own / "shards", samples_per_shard=20)
    return own / "shards"


def as_parquet(own):
    import pyarrow
    import pyarrow.parquet

    images = [(own / f"pics/{i}.png").read_bytes() for i in range(48)]
    texts = [f"image of number {i}" for i in range(48)]
    artists = [ARTISTS[i % 24] for i in range(48)]
    columns = {"image": images, "text": texts, "artist": artists}
    pyarrow.parquet.write_table(pyarrow.table(columns), own / "pairs.parquet")
    return own / "pairs.parquet"


def as_saved(own):
    import datasets

    made = datasets.Dataset.from_parquet(str(as_parquet(own)), cache_dir=str(own / "made"))
    datasets.DatasetDict(train=made, other=made.select(range(5))).save_to_disk(own / "saved")
    return own / "saved"


def run_on(folder, *flags, steps: int = 2):
    where = ["--output-dir", folder / "runs", "--run-name", "my own"]
    small = ["--max-steps", steps, "--batch-size", 8, "--num-workers", 0]
    return ["train", *where, *small, "--data", *flags]


def table(said: str) -> list[str]:
    """The lines of scores, without the last one, which is chance."""
    return re.findall(r"^(?:nothing masked|50 % of patches masked) .*$", said, re.MULTILINE)
