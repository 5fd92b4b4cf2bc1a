"""How the cost of a step grows, and how well `mm.cost.predict` predicts it.

    python -m tests.benchmarks.cost_growth            # about six minutes on two CPU cores
    python -m tests.benchmarks.cost_growth --quick    # fewer and smaller cells, under a minute

Whole train_steps (Muon, AdamW, clipping) of the tiny towers on made-up images: time over the
fraction masked, the image's side, the captions' length, the batch, and one or two processes; memory
over the batch, each cell in a fresh process. All cells of a part are measured in turns, in another
order each round; medians. Every second cell fits the model, the others measure its error. Two
processes are compared with one, each on one thread, see cost_processes.py. Then FLIP's published
times (1.00, 0.50, 0.33 at 0, 50, 75 % masked; ViT-L/16) are compared with those measured here, and
the image size from which the fitted model reaches them is found for each tower. Writes
results/cost_growth.json and .png.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import mmkit as mm
from mmkit import cost
from mmkit.models.encoder import MultimodalEncoder
from mmkit.plots.figures import BLUE, GREEN, ORANGE, PURPLE, new_figure, plain_axes
from tests.benchmarks import cost_processes
from tests.benchmarks.draw_masks import FOLDER, machine, show, tiny
from tests.benchmarks.exact_step import rounded, spread
from tests.benchmarks.step_memory import WORDS, resident

FLIP = {0.0: 1.0, 0.5: 0.5, 0.75: 0.33}  # fraction masked -> time; Li et al. 2023, table 1a
TOWERS: dict[str, tuple] = {  # image, patch; width, depth, heads of each; pairs, tokens
    "tiny (192 wide, patch 8)": (64, 8, (192, 6, 3), (192, 4, 3), 128, 10),
    "small (384 wide, patch 16)": (224, 16, (384, 12, 6), (384, 6, 6), 128, 10),
    "base (768 wide, patch 16)": (224, 16, (768, 12, 12), (768, 12, 12), 1024, 10),
    "FLIP's (1024 wide, patch 16)": (224, 16, (1024, 24, 16), (768, 12, 12), 16384, 32),
}
BASE = dict(ratio=0.5, side=64, words=10, batch=128)  # each axis keeps the others at these
AXES: dict[str, list] = {
    "ratio": [0.0, 0.25, 0.5, 0.75, 0.9],
    "side": [32, 48, 64, 96, 128],
    "words": [5, 10, 20, 30],
    "batch": [16, 32, 64, 128, 256],
}
BESIDE = [dict(ratio=r, side=s, words=10, batch=32) for s in (96, 128) for r in (0.0, 0.75)]
MEMORY = [(ratio, batch) for ratio in (0.0, 0.75) for batch in (32, 64, 128, 256, 512)]


def cells(quick: bool) -> list[dict]:
    """Every cell once: each axis through `BASE`, and large images with nothing or most masked."""
    base, axes, beside = BASE, AXES, BESIDE
    if quick:
        base, beside = BASE | dict(batch=32), []
        axes = dict(ratio=[0.0, 0.25, 0.5, 0.75], side=[32, 64, 96])
        axes |= dict(words=[5, 10, 20], batch=[16, 32, 48, 64])
    found = [base | {name: value} for name, values in axes.items() for value in values] + beside
    return list({tuple(cell.items()): cell for cell in found}.values())


# -- time --------------------------------------------------------------------------------------


def made_up(count: int, side: int, words: int, tokenizer=None) -> mm.MultimodalDataset:
    """Noise, and captions of `words` tokens each, [CLS] and [SEP] included."""
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=words - 2)) for _ in range(count)]
    return mm.MultimodalDataset.from_pixels(pixels, texts, tokenizer=tokenizer)


def trainer_of(side: int, words: int, count: int, folder: str) -> mm.MaskedMultimodalTrainer:
    """The tiny towers for images of that side; all of the data is one batch."""
    tokenizer = mm.train_wordpiece([" ".join(WORDS)] * 3)
    data = made_up(count, side, words, tokenizer)
    config = mm.TrainingConfig(batch_size=count, output_dir=folder, run_name="run")
    trainer = mm.MaskedMultimodalTrainer(config, data, model=tiny(side, tokenizer))
    trainer.net.train()
    return trainer


def set_to(trainer, cell: dict) -> mm.Batch:
    """The batch of a cell, with the trainer set to its masked fraction and its size."""
    trainer.config.image_mask_ratio = cell["ratio"]
    trainer.config.batch_size = cell["batch"]
    return trainer.batch[: cell["batch"]]


def measure_time(chosen: list[dict], rounds: int) -> list[dict]:
    """Each cell with its seconds and its work; see `cost.Prediction.work`."""
    with tempfile.TemporaryDirectory() as folder:
        trainers: dict = {}
        for side, words in {(cell["side"], cell["words"]) for cell in chosen}:
            same = [c["batch"] for c in chosen if (c["side"], c["words"]) == (side, words)]
            trainers[side, words] = trainer_of(side, words, max(same), folder)
            trainers[side, words].batch = trainers[side, words].first_batch()
        seconds: list[list[float]] = [[] for _ in chosen]
        for number in range(rounds + 1):  # the first warms up
            for i in random.Random(number).sample(range(len(chosen)), len(chosen)):
                trainer = trainers[chosen[i]["side"], chosen[i]["words"]]
                batch = set_to(trainer, chosen[i])
                seconds[i].append(cost.step_time(trainer, batch))
        rows = []
        for cell, took in zip(chosen, seconds, strict=True):
            trainer = trainers[cell["side"], cell["words"]]
            prediction = cost.predict_batch(trainer, set_to(trainer, cell))
            row: dict = {**cell, "seconds": spread(took[1:]), "prediction": prediction}
            rows.append(row)
    return rows


def fit(rows: list[dict]) -> cost.Rates:
    """Rates from every second cell; adds the predicted seconds and the error to all rows."""
    for i, row in enumerate(rows):
        row["fitted"] = i % 2 == 0
    used = [row for row in rows if row["fitted"]]
    rates = cost.fit_rates(
        [row["prediction"] for row in used], [row["seconds"]["median"] for row in used]
    )
    for row in rows:
        row["predicted"] = row["prediction"].time(rates)
        row["error"] = row["predicted"] / row["seconds"]["median"] - 1
    return rates


def errors(rows: list[dict], name: str = "error") -> dict[str, float]:
    """Median and largest error in per cent."""
    wrong = [100 * abs(row[name]) for row in rows]
    return {"median": statistics.median(wrong), "worst": max(wrong), "cells": len(wrong)}


# -- memory ------------------------------------------------------------------------------------


def memory_cell(ratio: float, batch_size: int) -> dict:
    """Megabytes of a step, in this process; call it once per process.

    A small step comes first, so that libraries loaded by it and the optimizer state are already in
    memory. Then the kernel's record of the highest memory is reset.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(64, 10, batch_size, folder)
        trainer.config.image_mask_ratio = ratio
        batch = trainer.first_batch()
        trainer.train_step(batch[:16], 0)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident()
        trainer.train_step(batch, 0)
        peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        expected = cost.predict_batch(trainer, batch)
        step = expected.memory - expected.weights - expected.optimizer_state
    return {"before": before / 1e6, "added": (peak - before) / 1e6, "counted": step / 1e6}


def measure_memory(quick: bool) -> list[dict]:
    """A row per cell: what a step adds, as counted and as measured, and the model of it.

    An allocator holds more than is requested: a constant and a factor are fitted to every second
    cell, and tested on the others.
    """
    rows = []
    for ratio, batch_size in [(0.0, 32), (0.0, 128), (0.75, 128)] if quick else MEMORY:
        command = [sys.executable, "-m", "tests.benchmarks.cost_growth", "--cell"]
        arguments = [*command, str(ratio), str(batch_size)]
        done = subprocess.run(arguments, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
        row = {"ratio": ratio, "batch": batch_size} | json.loads(done.stdout.splitlines()[-1])
        row["counted error"] = row["counted"] / row["added"] - 1
        rows.append(row | {"fitted": len(rows) % 2 == 0})
    used = [row for row in rows if row["fitted"]]
    work = torch.tensor([[1 / row["added"], row["counted"] / row["added"]] for row in used])
    constant, factor = torch.linalg.lstsq(work, torch.ones(len(used))).solution.tolist()
    for row in rows:
        row["model"] = constant + factor * row["counted"]
        row["error"] = row["model"] / row["added"] - 1
    show([{k: float(v) if k != "fitted" else v for k, v in row.items()} for row in rows])
    print(f"memory of a step = {constant:.0f} MB + {factor:.2f} x the counted memory")
    return rows


# -- FLIP --------------------------------------------------------------------------------------


def towers(name: str) -> MultimodalEncoder:
    """An encoder of `TOWERS` on the meta device, without weights in memory."""
    from transformers import BertConfig, ViTConfig

    side, patch, vit, bert, *_ = TOWERS[name]
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    image, text = (dict(zip(keys, (*t, 4 * t[0]), strict=True)) for t in (vit, bert))
    with torch.device("meta"):
        return MultimodalEncoder(
            ViTConfig(image_size=side, patch_size=patch, **image),
            BertConfig(vocab_size=4096, max_position_embeddings=77, **text),
            mm.train_wordpiece(["a b"]),
            embed_dim=512,
        )


def beside_flip(rates: cost.Rates, rows: list[dict]) -> dict:
    """Time at 0, 50 and 75 % over that at 0: published, measured (tiny), and by the model.

    For each tower also the side in pixels from which 50 % (75 %) masked takes FLIP's fraction.
    """
    at = {row["ratio"]: row["seconds"]["median"] for row in on_axis(rows, "ratio")}
    found: dict = {"published": FLIP, "measured": {r: at[r] / at[0.0] for r in FLIP if r in at}}
    for name, (*_, pairs, tokens) in TOWERS.items():
        model, took, reached = towers(name), {}, {}
        given: dict = dict(caption_length=tokens, rates=rates)
        for ratio, published in FLIP.items():
            optimizer = "adamw" if name.startswith("FLIP") else "muon"
            settings = dict(batch_size=pairs, image_mask_ratio=ratio, optimizer=optimizer)
            config = mm.TrainingConfig(**settings)
            took[ratio] = cost.predict(config, model, **given).seconds
            if ratio:
                reached[ratio] = cost.crossover(
                    config, model, caption_length=tokens, rates=rates, gain=1 / published
                )
        fraction = {ratio: seconds / took[0.0] for ratio, seconds in took.items()}
        row = {"batch": pairs, "tokens": tokens, "at its own size": fraction}
        row["reached from (px)"] = reached
        found[name] = row
    return found


# -- the figure --------------------------------------------------------------------------------


def on_axis(rows: list[dict], axis: str) -> list[dict]:
    """The cells that differ from the base in this axis alone, sorted by it."""
    base = BASE | {"batch": statistics.mode(row["batch"] for row in rows)}
    others = [name for name in base if name != axis]
    same = [row for row in rows if all(row[name] == base[name] for name in others)]
    return sorted(same, key=lambda row: row[axis])


def draw_time(ax, rows: list[dict], axis: str, xlabel: str, factor: float = 1.0) -> None:
    """Measured points (filled: the rates were fitted to them), and the model's line."""
    for fitted, colour, label in ((True, BLUE, "used for the fit"), (False, ORANGE, "not used")):
        own = [row for row in rows if row["fitted"] == fitted]
        middle = [1000 * row["seconds"]["median"] for row in own]
        ends = [[1000 * abs(row["seconds"][end] - row["seconds"]["median"]) for row in own]
                for end in ("lower", "upper")]  # fmt: skip
        ax.errorbar([factor * row[axis] for row in own], middle, ends, fmt="o", color=colour,
                    markersize=5, capsize=2, label=f"measured, {label}")  # fmt: skip
    ax.plot([factor * row[axis] for row in rows], [1000 * row["predicted"] for row in rows],
            color="0.4", linewidth=1.4, zorder=1, label="model")  # fmt: skip
    ax.set(xlabel=xlabel, ylabel="step (ms, median)", ylim=(0, None))
    ax.legend(fontsize=7)


def draw_memory(ax, rows: list[dict]) -> None:
    for ratio, colour in ((0.0, GREEN), (0.75, PURPLE)):
        own = [row for row in rows if row["ratio"] == ratio]
        batch = [row["batch"] for row in own]
        ax.plot(batch, [row["added"] for row in own], "o", color=colour,
                label=f"measured, {100 * ratio:.0f} % masked")  # fmt: skip
        ax.plot(batch, [row["counted"] for row in own], color=colour, linewidth=1, linestyle=":",
                label=f"counted, {100 * ratio:.0f} % masked")  # fmt: skip
        ax.plot(batch, [row["model"] for row in own], color=colour, linewidth=1.4,
                label=f"model, {100 * ratio:.0f} % masked")  # fmt: skip
    ax.set(xlabel="batch (pairs)", ylabel="memory that a step adds (MB)", ylim=(0, None))
    ax.legend(fontsize=7)


def draw_figure(rows: list[dict], memory: list[dict]):
    """Time over masked fraction, side and batch; memory over batch."""
    figure = new_figure(9.5, 6.2)
    (over_ratio, over_side), (over_batch, of_memory) = figure.subplots(2, 2)
    draw_time(over_ratio, on_axis(rows, "ratio"), "ratio", "masked patches (%)", 100)
    draw_time(over_side, on_axis(rows, "side"), "side", "side of an image (pixels)")
    draw_time(over_batch, on_axis(rows, "batch"), "batch", "batch (pairs)")
    draw_memory(of_memory, memory)
    for ax in (over_ratio, over_side, over_batch, of_memory):
        plain_axes(ax)
    return figure


# -- the run -----------------------------------------------------------------------------------


def plain(row: dict) -> dict:
    """A row for JSON, its prediction as plain numbers."""
    if "prediction" in row:
        work = zip(("passes", "gflop", "moved_gb", "exchanged_gb"), row["prediction"].work(),
                   strict=True)  # fmt: skip
        row = {k: v for k, v in row.items() if k != "prediction"} | dict(work)
    return rounded(row)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test that everything runs")
    parser.add_argument("--rounds", type=int, help="rounds for the medians (7; quick: 2)")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(memory_cell(float(options.cell[0]), int(options.cell[1]))))
        return
    about, rounds = machine(), options.rounds or (2 if options.quick else 7)
    rows = measure_time(cells(options.quick), rounds)
    rates = fit(rows)
    memory = measure_memory(options.quick)
    processes = cost_processes.measure(options.quick, rounds)
    apart = [row for row in rows if not row["fitted"]]
    wrong = {
        "time, cells that were not fitted": errors(apart),
        "memory of a step, cells that were not fitted": errors(
            [row for row in memory if not row["fitted"]]
        ),
        "memory of a step as counted, nothing fitted": errors(memory, "counted error"),
        "two processes, cells that were not fitted": errors(
            [row for row in processes["rows"] if not row["fitted"]]
        ),
    }
    flip = beside_flip(rates, rows)
    show([{name: row[name] for name in BASE} | {"ms": 1000 * row["seconds"]["median"],
           "model": 1000 * row["predicted"], "error %": 100 * row["error"],
           "fitted": row["fitted"]} for row in rows])  # fmt: skip
    print(rates, f"{rates.gflop_per_second:.0f} GFLOP/s\n", json.dumps(rounded(flip), indent=1))
    show([{"what": name, **values} for name, values in wrong.items()])
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "cost_growth.json"
    record = {
        "machine": about | {"rounds": rounds, "quick": options.quick},
        "rates": dataclasses.asdict(rates),
        "errors in per cent": rounded(wrong),
        "flip": rounded(flip),
        "time": [plain(row) for row in rows],
        "memory": [plain(row) for row in memory],
        "processes": {
            "rates": dataclasses.asdict(processes["rates"]),
            "rows": [plain(row) for row in processes["rows"]],
        },
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    draw_figure(rows, memory).savefig(path.with_suffix(".png"), dpi=110)
    print(f"written: {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
