"""What share of a training goes into writing checkpoints: one save per epoch, as in `make train`.

    python -m tests.benchmarks.checkpoint_cost       # about two minutes on two CPU cores

`make train` for six epochs instead of fourteen. Timed are the writes of best_model.pth and
last/state.pth as they happen (collecting the state, writing, fsync of file and folder), and, from
metrics.jsonl, the epochs they belong to; then 15 more of each on their own, and what the fsync is
of them. The share is the median of both writes together over the median epoch. An epoch that is not
the best so far writes one file only. Writes results/checkpoint_cost.json.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mmkit as mm
from tests.benchmarks.draw_masks import machine

EPOCHS, ALONE, GOAL = 6, 15, 2.0  # GOAL: per cent of the training time
RESULTS = Path(__file__).parent / "results"


def timed(function: Callable, seconds: list[float]) -> Callable:
    """The same function; each call adds its seconds."""

    def call(*args):
        start = time.perf_counter()
        function(*args)
        seconds.append(time.perf_counter() - start)

    return call


def summary(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    named = dict(median=statistics.median(seconds), smallest=min(seconds), largest=max(seconds))
    return {key: round(1000 * value, 1) for key, value in named.items()} | {"writes": len(seconds)}


def measure(folder: str) -> dict:
    train, val, _ = mm.openmoji(image_size=64)
    config = mm.TrainingConfig(num_epochs=EPOCHS, output_dir=folder, run_name="cost")
    trainer = mm.MaskedMultimodalTrainer(config, train, val)
    best, last, syncs = [], [], []
    trainer._save_best = timed(trainer._save_best, best)
    trainer._save_last = timed(trainer._save_last, last)
    run = trainer.fit()
    ends = [record["seconds"] for record in run.history if record["split"] == "val"]
    epochs = [b - a for a, b in itertools.pairwise(ends)]
    both = statistics.median(best) + statistics.median(last)

    alone = {"best_model.pth": [], "last/state.pth": []}
    fsync, os.fsync = os.fsync, timed(os.fsync, syncs)
    for _ in range(ALONE):
        timed(lambda: trainer._save_best(0), alone["best_model.pth"])()
        timed(trainer._save_last, alone["last/state.pth"])()
    os.fsync = fsync
    size = {name: (run.path / name).stat().st_size / 1e6 for name in alone}
    written = sum(map(sum, alone.values()))
    return {
        "epoch_seconds": round(statistics.median(epochs), 2),
        "megabytes": {name: round(value, 1) for name, value in size.items()},
        "milliseconds": {
            "best_model.pth": summary(best),
            "last/state.pth": summary(last[:EPOCHS]),
            "best_model.pth, alone": summary(alone["best_model.pth"]),
            "last/state.pth, alone": summary(alone["last/state.pth"]),
        },
        "share_of_fsync_alone_%": round(100 * sum(syncs) / written, 1),
        "share_of_training_%": round(100 * both / statistics.median(epochs), 2),
        "goal_%": GOAL,
        "verdict": "reached" if both < GOAL / 100 * statistics.median(epochs) else "missed",
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", help="on the disk to be measured; default: here")
    folder = parser.parse_args().folder or "."
    results = {"machine": machine()}
    with tempfile.TemporaryDirectory(dir=folder) as runs:  # /tmp may be memory
        results |= measure(runs)
    results["machine"]["load_after"] = os.getloadavg()[0]
    text = json.dumps(results, indent=1)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "checkpoint_cost.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
