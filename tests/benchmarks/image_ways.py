"""Ways to read images from the disk into squares of 64 pixels, ours and those of others.

Each way is a function of a part (a range of image numbers) that reads it with two processes and
returns how many images it has read. "alone" ways only decode: nothing is sent to another process,
there are no captions. Loaders give batches of 128. Used by own_images.py.
"""

import functools
import itertools
import shutil
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch

import mmkit as mm
from mmkit.data.loader import load_batches
from tests.benchmarks.made_images import PER_SHARD, path_of

SIDE, BATCH, WORKERS = 64, 128, 2
Way = Callable[[range], int]


# -- decoding alone ----------------------------------------------------------------------------


def with_pillow(path: Path, draft: bool = False) -> None:
    """The shortest loop body: open, convert, crop a square; draft: at half size if enough."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        if draft:
            image.draft("RGB", (SIDE, SIDE))
        ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), method=Image.Resampling.BICUBIC)


def with_torchvision(path: Path) -> None:
    """torchvision's decoder, resize and centre crop on tensors."""
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms.v2.functional import center_crop, resize

    pixels = decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)
    center_crop(resize(pixels, [SIDE], interpolation=3, antialias=True), [SIDE])  # 3 = bicubic


def _each(read: Callable[[Path], None], paths: list[Path]) -> int:
    torch.set_num_threads(1)
    for path in paths:
        read(path)
    return len(paths)


def alone(folder: Path, read: Callable[[Path], None]) -> Way:
    """A plain loop in each of two processes."""

    def run(part: range) -> int:
        paths = [folder / path_of(number) for number in part]
        chunks = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
        with get_context("fork").Pool(WORKERS) as pool:
            return sum(pool.imap_unordered(functools.partial(_each, read), chunks))

    return run


# -- mmkit -------------------------------------------------------------------------------------


def keys_of(rows: range, epoch: int = 0) -> list:
    """(rows, caption noise) of each batch, shuffled, as the trainer makes them."""
    draw = torch.Generator().manual_seed(epoch)
    shuffled = torch.tensor(rows)[torch.randperm(len(rows), generator=draw)]
    return [(part, torch.rand(len(part), generator=draw)) for part in shuffled.split(BATCH)]


def stream(data: mm.MultimodalDataset) -> Way:
    """Decoded in worker processes, captions included: an epoch without a cache."""

    def run(part: range) -> int:
        return sum(map(len, load_batches(data, keys_of(part), WORKERS, False)))

    return run


def fill(data: mm.MultimodalDataset) -> Way:
    """Decoded into the cache, written and synced: the first epoch with a cache."""

    def run(part: range) -> int:
        some = data.subset(part)
        some.cached(WORKERS)
        shutil.rmtree(some._decoded.pixels.folder)  # or the next round finds it
        return len(some)

    return run


# -- other loaders -----------------------------------------------------------------------------


def image_folder(folder: Path) -> Way:
    """torchvision's ImageFolder and a DataLoader."""
    from torchvision import datasets, transforms

    steps = [transforms.Resize(SIDE, interpolation=transforms.InterpolationMode.BICUBIC)]
    steps += [transforms.CenterCrop(SIDE), transforms.PILToTensor()]
    everything = datasets.ImageFolder(str(folder / "images"), transforms.Compose(steps))
    number = {int(Path(path).stem): i for i, (path, _) in enumerate(everything.samples)}

    def run(part: range) -> int:
        some = torch.utils.data.Subset(everything, [number[n] for n in part])
        options: dict = dict(batch_size=BATCH, shuffle=True, num_workers=WORKERS)
        return sum(len(batch[0]) for batch in torch.utils.data.DataLoader(some, **options))

    return run


def open_clip_way(folder: Path, kind: str, scratch: Path, captions: list[str]) -> Way:
    """open_clip's training loaders with its validation transform (floats, normalised) at 64 px.

    kind: "csv" or "webdataset". Its last batch is dropped, or samples are repeated.
    """
    import open_clip
    import open_clip_train.data as theirs

    # webdataset 1.0 marks the end of each shard by an empty sample, at which open_clip 3.3 fails.
    theirs.tar_file_expander = functools.partial(theirs.tar_file_expander, eof_value=None)
    transform = open_clip.transform.image_transform(SIDE, is_train=False)
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    make = theirs.get_csv_dataset if kind == "csv" else theirs.get_wds_dataset

    def run(part: range) -> int:
        if kind == "csv":
            source = scratch / "part.tsv"
            rows = [f"{folder / path_of(n)}\t{captions[n]}" for n in part]
            source.write_text("\n".join(["filepath\ttitle", *rows]) + "\n", encoding="utf-8")
        else:
            shards = range(part.start // PER_SHARD, -(-part.stop // PER_SHARD))
            source = f"{folder}/shards/{{{shards[0]:05d}..{shards[-1]:05d}}}.tar"
        args = Namespace(
            train_data=str(source), csv_img_key="filepath", csv_caption_key="title",
            csv_separator="\t", distributed=False, batch_size=BATCH, workers=WORKERS,
            train_num_samples=len(part), train_data_upsampling_factors=None, seed=0, world_size=1,
        )  # fmt: skip
        loader = make(args, transform, is_train=True, tokenizer=tokenizer).dataloader
        return sum(len(batch[0]) for batch in loader)

    return run


# -- all ---------------------------------------------------------------------------------------


def all_ways(folder: Path, scratch: Path) -> tuple[dict[str, Way], dict[str, str]]:
    """Every way by its name; every package's version, or why it is left out."""
    data = mm.from_table(folder / "pairs.csv", image_size=SIDE, cache_dir=scratch / "cache")
    captions = [texts[0] for texts in data.texts]
    data.encoded_captions()
    ways = {
        "Pillow alone": alone(folder, with_pillow),
        "Pillow alone, draft": alone(folder, functools.partial(with_pillow, draft=True)),
        "mmkit, into the cache": fill(data),
        "mmkit, streamed": stream(data),
    }
    versions = {"pillow": version("pillow")}
    others = {
        "torchvision alone": ("torchvision", lambda: alone(folder, with_torchvision)),
        "torchvision ImageFolder": ("torchvision", lambda: image_folder(folder)),
        "open_clip CSV": (
            "open_clip_torch", lambda: open_clip_way(folder, "csv", scratch, captions)
        ),
        "open_clip webdataset": (
            "open_clip_torch", lambda: open_clip_way(folder, "webdataset", scratch, captions)
        ),
        "mmkit, streamed from shards": ("mmkit", lambda: stream(shards(folder, scratch))),
    }  # fmt: skip
    for name, (package, make) in others.items():
        try:
            ways[name] = make()
            versions[package] = version(package)
        except (ImportError, AttributeError) as missing:  # not there, or too old
            versions[name] = f"left out ({missing})"
    return ways, versions


def shards(folder: Path, scratch: Path) -> mm.MultimodalDataset:
    """The same images in tar shards."""
    tars = sorted(map(str, (folder / "shards").glob("*.tar")))
    data = mm.from_shards(tars, image_size=SIDE, cache_dir=scratch / "cache")
    data.encoded_captions()
    return data


def parts_of(count: int, rounds: int) -> list[range]:
    """Ranges of whole shards, one per round, each of the same size, 8,000 images at most."""
    size = max(2 * PER_SHARD, min(8000, count // rounds) // PER_SHARD * PER_SHARD)
    starts = itertools.cycle(range(0, max(1, count - size + 1), size))
    return [range(start, min(start + size, count)) for start in itertools.islice(starts, rounds)]
