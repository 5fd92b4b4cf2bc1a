"""How long `mm.inspect` takes with long captions.

    python -m tests.benchmarks.inspection             # 100,000 captions of 200 words: two minutes

Five captions for each image of 32 pixels; words drawn from 20,000 as in a natural text (the n-th
word with a frequency of 1/n). A quarter, half and all of them, to see that time grows linearly.
Writes results/inspection.json.
"""

import argparse
import json
import time

import numpy as np
import torch

import mmkit as mm
from tests.benchmarks.draw_masks import FOLDER, machine

CAPTIONS, WORDS, VOCABULARY, PER_IMAGE, SIDE = 100_000, 200, 20_000, 5, 32


def made(count: int) -> mm.MultimodalDataset:
    """`count` captions, PER_IMAGE for each image of noise."""
    random = np.random.default_rng(0)
    frequency = 1 / np.arange(1, VOCABULARY + 1)
    drawn = random.choice(VOCABULARY, (count, WORDS), p=frequency / frequency.sum())
    captions = [" ".join(f"w{word}" for word in row) for row in drawn]
    images = random.integers(0, 256, (count // PER_IMAGE, 3, SIDE, SIDE), dtype=np.uint8)
    grouped = [captions[start : start + PER_IMAGE] for start in range(0, count, PER_IMAGE)]
    return mm.MultimodalDataset.from_pixels(torch.from_numpy(images), grouped)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time mm.inspect with long captions.")
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="how many, at most")
    most = parser.parse_args().captions
    seconds = {}
    for count in (most // 4, most // 2, most):
        data = made(count)
        start = time.perf_counter()
        report = mm.inspect(data)
        seconds[count] = round(time.perf_counter() - start, 2)
        print(f"{report.captions:,} captions of {WORDS} words: {seconds[count]} s", flush=True)
    found = {"machine": machine(), "words": WORDS, "seconds": seconds}
    (FOLDER / "inspection.json").write_text(json.dumps(found, indent=1) + "\n")
