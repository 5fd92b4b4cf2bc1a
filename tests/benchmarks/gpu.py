"""A training step on a GPU: mmkit, open_clip and transformers, one cell after another.

    pip install -e ".[bench]"                        # the row of a missing peer says so
    python -m tests.benchmarks.gpu                   # at most 5 minutes
    python -m tests.benchmarks.gpu --minutes 2 --cells base    # those whose name contains "base"

A GPU keeps its speed, so that cells need not be measured in turns; only one of them holds memory at
a time. All batches are on the device before the clock starts, for mmkit and for the peers. Images
are noise at the preset's size, captions those of the built-in set, each with a number. Each cell
warms up for three steps and is the median of ten, synchronised. A cell that does not fit gives a
row with its batch and "out of memory", and is tried again with half the batch; the row of a cell
that fails says why; cells for which no time is left are rows, too. "mfu" is relative to the data
sheet's dense bfloat16 rate, "fraction" to the rate at which this card multiplies at 8192 x 8192.
Writes results/gpu.json after every cell. Without a GPU it runs on the CPU, tiny cells first.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

import mmkit as mm
from mmkit import cost
from mmkit.models.presets import PRESETS
from tests.benchmarks.draw_masks import FOLDER, machine
from tests.benchmarks.peers import COMPILED, PEERS
from tests.benchmarks.step_speed import versions

ALL = PEERS | COMPILED
WARM_UP, STEPS = 3, 10
PEAK = {
    "A100": 312,
    "H100": 989,
    "H200": 989,
}  # TFLOP/s in bfloat16, dense, by NVIDIA's data sheets
ACCUMULATED = dict(gradient_accumulation_steps=8)


@dataclass
class Cell:
    """One training step, timed."""

    who: str
    size: str
    masked: float  # fraction of the patches
    batch: int
    options: dict = field(default_factory=dict)  # of the TrainingConfig; mmkit's alone

    def __str__(self) -> str:
        options = "".join(f" {name}={value}" for name, value in self.options.items())
        return f"{self.who} {self.size} {100 * self.masked:.0f} % {self.batch}{options}"


def cells() -> list[Cell]:
    """All of them, the most important first."""
    compiled = dict(compile=True)
    return [
        *(Cell(who, "tiny", 0.5, 128) for who in ("mmkit", "open_clip")),
        Cell("mmkit", "tiny", 0.5, 128, dict(optimizer="muon")),
        *(Cell(who, "base", r, 1024) for r in (0.5, 0.75, 0.0) for who in ("mmkit", "open_clip")),
        Cell("transformers", "base", 0.5, 1024),
        Cell("mmkit", "base", 0.5, 1024, dict(optimizer="muon")),
        Cell("mmkit", "base", 0.5, 1024, compiled),
        Cell("open_clip compiled", "base", 0.5, 1024),
        Cell("mmkit", "base", 0.5, 4096, ACCUMULATED),
        *(Cell(who, "small", 0.5, 1024) for who in ("mmkit", "open_clip")),
        *(Cell(who, "tiny", 0.5, 1024) for who in ("mmkit", "open_clip")),
        Cell("mmkit", "base", 0.75, 1024, compiled),
        Cell("mmkit", "base", 0.0, 1024, compiled),
        Cell("open_clip compiled", "base", 0.0, 1024),
    ]


def made_data(count: int, side: int, texts: list[str]) -> mm.MultimodalDataset:
    """Noise with different captions of realistic lengths."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=draw)
    captions = [f"{texts[i % len(texts)]} {i}" for i in range(count)]
    return mm.MultimodalDataset.from_pixels(pixels, captions)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(cell: Cell, texts: list[str], precision: str, folder: str) -> dict:
    """Milliseconds, pairs per second, peak memory and rate of one cell's step."""
    started = time.perf_counter()
    data = made_data(max(2 * cell.batch, 2048), PRESETS[cell.size]["image"], texts)
    options = cell.options | ({"output_dir": folder} if cell.who == "mmkit" else {})
    peer = ALL[cell.who](cell.size, cell.masked, data, cell.batch, precision, **options)
    peer.batches = [
        batch.to(peer.device) if cell.who == "mmkit" else tuple(x.to(peer.device) for x in batch)
        for batch in peer.batches
    ]
    for _ in range(WARM_UP):
        peer.step()
    synchronize()
    ready = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    took, loss = [], 0.0
    for _ in range(STEPS):
        start = time.perf_counter()
        loss = peer.step()
        synchronize()
        took.append(time.perf_counter() - start)
    seconds = statistics.median(took)
    found = {
        "milliseconds": 1000 * seconds,
        "fastest and slowest": [1000 * min(took), 1000 * max(took)],
        "pairs_per_second": cell.batch / seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
        "seconds_to_start": ready - started,
        "loss": loss,
    }
    if cell.who == "mmkit":
        model, train = peer.model, peer.trainer.train
        tokens = float(train.encoded_captions()[1].float().mean())
        kept = max(1, round(model.num_patches * (1 - cell.masked)))
        flops = cell.batch * cost.step_flops(model, kept, tokens, replay=False)
        found["tflop_per_second"] = flops / seconds / 1e12
    return found


def row(cell: Cell, texts: list[str], precision: str, folder: str) -> dict:
    """The cell with its measurements, or with what stopped it."""
    try:
        return asdict(cell) | measure(cell, texts, precision, folder)
    except torch.OutOfMemoryError:
        return asdict(cell) | {"stopped": "out of memory"}
    except Exception as error:  # a peer that is missing, or does not compile: the others still run
        return asdict(cell) | {"stopped": f"{type(error).__name__}: {error}"[:300]}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def rows(chosen: list[Cell], precision: str, minutes: float) -> Iterator[dict]:
    """Each cell in turn; one that does not fit again with half and a quarter of the batch."""
    built_in = mm.openmoji(64)[2]
    texts = [captions[0] for captions in built_in.texts]
    ends = time.perf_counter() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        for cell in chosen:
            for batch in (cell.batch, cell.batch // 2, cell.batch // 4):
                tried = replace(cell, batch=batch)
                if time.perf_counter() > ends:
                    found = asdict(tried) | {"stopped": "no time left"}
                else:
                    found = row(tried, texts, precision, folder)
                yield found
                if found.get("stopped") != "out of memory":
                    break


def matmul_rate(size: int) -> float:
    """TFLOP per second of square products in bfloat16 (float32 on a CPU)."""
    cuda = torch.cuda.is_available()
    kind = dict(device="cuda", dtype=torch.bfloat16) if cuda else {}
    a, b = (torch.randn(size, size, **kind) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - start) / 1e12


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="no cell starts after this time")
    parser.add_argument("--cells", nargs="*", default=[""], help="only those with this in the name")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    rate = matmul_rate(8192 if cuda else 1024)
    name = torch.cuda.get_device_name() if cuda else "none"
    peak = next((tflops for known, tflops in PEAK.items() if known in name), None)
    about = machine() | versions() | {"gpu": name, "matmul_tflops": rate, "peak_tflops": peak}
    options.output.mkdir(parents=True, exist_ok=True)
    path, found = options.output / "gpu.json", []
    chosen = [cell for cell in cells() if any(word in str(cell) for word in options.cells)]
    for one in rows(chosen, options.precision, options.minutes):
        if reached := one.get("tflop_per_second"):
            one["fraction"] = reached / rate
            one["mfu"] = peak and reached / peak
        found.append({k: round(v, 4) if isinstance(v, float) else v for k, v in one.items()})
        print(json.dumps(found[-1]), flush=True)
        path.write_text(json.dumps({"machine": about, "rows": found}, indent=1) + "\n")
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
