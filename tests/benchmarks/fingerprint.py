"""How long it takes to check whether the images of a run are still the same.

    python -m tests.benchmarks.fingerprint            # 50,000 files: about two minutes

50,000 files of 6 kB in 100 folders (random bytes: nothing is decoded), and as many images of 64
pixels in memory. Each number is the best of three. Writes results/fingerprint.json.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

import mmkit as mm
from mmkit.training import fingerprint
from tests.benchmarks.draw_masks import FOLDER, machine

BYTES, SIDE, LONG_AGO = 6000, 64, 1e9


def written(folder: Path, count: int) -> list[Path]:
    """Files of different bytes whose time of modification is long ago."""
    paths = [folder / f"{number % 100:03d}" / f"{number:06d}.jpg" for number in range(count)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(BYTES))
        os.utime(path, (LONG_AGO, LONG_AGO))
    time.sleep(3)  # files that have just changed are read again each time
    return paths


def best_of_three(work: Callable[[], object], prepare: Callable[[], object] = lambda: None):
    times = []
    for _ in range(3):
        prepare()
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return round(min(times), 3)


def in_files(folder: Path, count: int) -> dict[str, float]:
    """Seconds for each of the ways in which files are checked."""
    captions, cache = [f"thing number {number}" for number in range(count)], folder / "cache"
    paths = written(folder, count)
    data = mm.MultimodalDataset(paths, captions)
    data.cache_dir, trainer = cache, SimpleNamespace(train=data)

    def start() -> dict:
        found = {"train": fingerprint.of_data(data), "val": None}
        fingerprint.add_contents(found, trainer)
        return found

    seconds = {
        "a first start: every file read once": best_of_three(
            start, lambda: shutil.rmtree(cache, ignore_errors=True)
        ),
        "a later start": best_of_three(start),
    }
    then = start()["train"]

    def resume() -> None:
        found = fingerprint.compare_data(then, fingerprint.of_data(data), data)
        assert found == ([], []), found

    def touch() -> None:
        for path in paths:
            os.utime(path, (LONG_AGO + 1, LONG_AGO + 1))
        time.sleep(3)
        shutil.rmtree(cache)

    seconds["a resume"] = best_of_three(resume)
    seconds["a resume, the time of every file another: all read"] = best_of_three(resume, touch)
    return seconds


def in_memory(count: int) -> float:
    """Seconds for the pixels of a data set in memory."""
    pixels = torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8)
    data = mm.MultimodalDataset.from_pixels(pixels, [f"thing number {i}" for i in range(count)])
    return best_of_three(lambda: fingerprint.of_data(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50_000)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as folder:
        seconds = in_files(Path(folder), count)
    seconds[f"pixels in memory, {SIDE} x {SIDE}"] = in_memory(count)
    found = {"machine": machine(), "images": count, "bytes_each": BYTES, "seconds": seconds}
    (FOLDER / "fingerprint.json").write_text(json.dumps(found, indent=2) + "\n")
    for what, number in seconds.items():
        print(f"{number:6.2f} s  {what}")


if __name__ == "__main__":
    main()
