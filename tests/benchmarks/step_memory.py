"""Peak memory of a training step against its batch, each cell in a fresh process.

Real train_step (Muon, AdamW, clipping) of the tiny encoder on made-up images with captions of
about ten tokens, half of the patches masked. All cells hold the same 4,096 images (uint8, 50 MB),
so that the data makes no difference; the batch is a copy of its rows. On a CPU the peak is the
process's largest resident memory, libraries included, and "step" the part of it that was added
after model, data and batch existed; on a GPU both are what torch has allocated. Run by
exact_step.py.
"""

import gc
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import mmkit as mm

MICRO, IMAGES = 256, 4096
BATCHES = (256, 512, 1024, 2048, 4096)
MOST = 8e9  # bytes; above this no batch is tried in one pass
STEPS = 2  # the first makes the optimizer state
WORDS = "red green blue old new small big cat dog house tree boat star moon bread shoe".split()


def made_up() -> mm.MultimodalDataset:
    """Noise, and different captions of eight words."""
    pixels = torch.randint(0, 256, (IMAGES, 3, 64, 64), dtype=torch.uint8)
    rng = random.Random(0)
    texts = [
        " ".join([WORDS[i >> shift & 15] for shift in (0, 4, 8)] + rng.choices(WORDS, k=5))
        for i in range(IMAGES)
    ]
    return mm.MultimodalDataset.from_pixels(pixels, texts)


def resident() -> int:
    """Bytes of this process that are resident in memory now."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def cell(batch_size: int, parts: int, precision: str) -> dict[str, float]:
    """Megabytes of a step, in this process; call it once per process."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = mm.TrainingConfig(
            batch_size=batch_size,
            gradient_accumulation_steps=parts,
            mixed_precision=precision,
            image_mask_ratio=0.5,
            output_dir=folder,
            run_name="run",
        )
        trainer = mm.MaskedMultimodalTrainer(config, made_up())
        batch = trainer.first_batch()
        trainer.net.train()
        gc.collect()
        cuda = trainer.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else resident()
        for _ in range(STEPS):
            loss, _ = trainer.train_step(batch, 0)
        assert torch.isfinite(loss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if cuda else peak
    return {"peak": peak / 1e6, "before": before / 1e6, "step": (peak - before) / 1e6}


def fresh_cell(batch_size: int, parts: int, precision: str) -> dict:
    """`cell` in a process of its own."""
    command = ["-m", "tests.benchmarks.step_memory", str(batch_size), str(parts), precision]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    row = {"batch": batch_size, "micro-batches": parts} | json.loads(done.stdout.splitlines()[-1])
    print(precision, {key: round(value) for key, value in row.items()}, flush=True)
    return row


def measure(precision: str) -> list[dict]:
    """A row per batch: in micro-batches of 256, and in one pass as far as it fits."""
    rows = []
    for batch_size in BATCHES:
        rows.append(fresh_cell(batch_size, batch_size // MICRO, precision))
    for batch_size in BATCHES[1:]:
        last = rows[-1] if rows[-1]["micro-batches"] == 1 else rows[0]
        if last["before"] + 1e-6 + 2 * last["step"] > MOST / 1e6:
            break
        rows.append(fresh_cell(batch_size, 1, precision))
    return rows


if __name__ == "__main__":
    print(json.dumps(cell(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
