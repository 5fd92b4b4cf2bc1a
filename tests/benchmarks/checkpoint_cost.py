"""The fraction of a training run spent on writing checkpoints, one per epoch as in `make train`.

    python -m tests.benchmarks.checkpoint_cost       # about a minute on two CPU cores

A trainer with the default configuration on the built-in images; eleven rounds, each of four
training steps, one validation and one write of best_model.pth and of last/state.pth (collecting the
state, writing, fsync of file and folder). The fraction is both writes over an epoch: its steps, its
validation and both writes, all at the pace of the same round, so that other load on the machine
slows all alike. Medians over the rounds are reported. An epoch that is not the best so far writes
one file only, and costs half. Writes results/checkpoint_cost.json.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import mmkit as mm
from mmkit.training import resume
from tests.benchmarks.draw_masks import machine

ROUNDS, STEPS, GOAL = 11, 4, 2.0  # GOAL: per cent of the training time
RESULTS = Path(__file__).parent / "results"
FILES = ("best_model.pth", "last/state.pth")


def seconds(function: Callable, *args, **options) -> float:
    start = time.perf_counter()
    function(*args, **options)
    return time.perf_counter() - start


def rounds(trainer: mm.MaskedMultimodalTrainer) -> list[dict[str, float]]:
    """The seconds of one step, of a validation and of each write, round by round."""
    keys, synced, found = cycle(trainer.epoch_batches(0)), [], []
    fsync = os.fsync
    os.fsync = lambda number: synced.append(seconds(fsync, number))

    def steps():
        for key in islice(keys, STEPS):
            trainer.train_step(trainer.train.batch(*key).to(trainer.device), 0)
            trainer.step += 1

    def validate():
        precision = trainer.config.mixed_precision
        mm.retrieval.score(
            trainer.model,
            mm.embed(trainer.model, trainer.val, mixed_precision=precision),
            trainer.config.loss,
        )
        trainer.net.train()

    trainer.net.train()
    steps()  # warm up
    for _ in range(ROUNDS):
        synced.clear()
        times = dict(step=seconds(steps) / STEPS, validation=seconds(validate))
        times["best"] = seconds(resume.save_best, trainer, 0)
        times["last"] = seconds(resume.save_last, trainer)
        found.append(times | dict(fsync=sum(synced)))
    os.fsync = fsync
    return found


def summary(values: list[float]) -> dict[str, float]:
    """In milliseconds."""
    named = dict(median=statistics.median(values), smallest=min(values), largest=max(values))
    return {key: round(1000 * value, 1) for key, value in named.items()}


def measure(folder: str) -> dict:
    train, val, _ = mm.openmoji(image_size=64)
    config = mm.TrainingConfig(output_dir=folder, run_name="cost")
    trainer = mm.MaskedMultimodalTrainer(config, train, val)
    found = rounds(trainer)
    writes = [r["best"] + r["last"] for r in found]
    epochs = [
        trainer.steps_per_epoch * r["step"] + r["validation"] + write
        for r, write in zip(found, writes, strict=True)
    ]
    fractions = [100 * write / epoch for write, epoch in zip(writes, epochs, strict=True)]
    fraction = statistics.median(fractions)
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "rounds": ROUNDS,
        "epoch_seconds": round(statistics.median(epochs), 2),
        "milliseconds": {key: summary([r[key] for r in found]) for key in found[0]},
        "megabytes": {f: round((trainer.path / f).stat().st_size / 1e6, 1) for f in FILES},
        "fraction_of_training_%": {
            "median": round(fraction, 2),
            "smallest": round(min(fractions), 2),
            "largest": round(max(fractions), 2),
        },
        "goal_%": GOAL,
        "verdict": "reached" if fraction < GOAL else "missed",
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default="runs", help="on the disk to be measured")
    folder = parser.parse_args().folder
    os.makedirs(folder, exist_ok=True)
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
