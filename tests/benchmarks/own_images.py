"""Your own images: indexed, decoded, cached, trained on; against Pillow, torchvision, open_clip.

    python -m tests.benchmarks.own_images --folder DIR    # 50,000 images, about 7 minutes
    pip install -e ".[bench]" webdataset                  # the others; left out if missing

The images (about 160 pixels, 7 KB) are made once in that folder; all are read from the system's
page cache, so that work is measured, not the disk. Every way reads the same part in turn, in
another order each round, by two processes into 64-pixel squares; ratios are taken within a round.
Memory is that of all processes together, with a page shared by n of them counted once, in a fresh
process per cell, for each phase of its work. Writes results/own_images.json and .png.
"""

import argparse
import contextlib
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mmkit as mm
from mmkit.data.loader import load_batches
from mmkit.plots.figures import BLUE, ORANGE, SKY, plain_axes
from tests.benchmarks.draw_masks import FOLDER, machine, show
from tests.benchmarks.exact_step import spread
from tests.benchmarks.image_ways import BATCH, SIDE, WORKERS, all_ways, keys_of, parts_of
from tests.benchmarks.made_images import make

GOALS = {
    "indexing, seconds": ("below", 20.0),
    "first epoch / Pillow alone": ("at least", 0.9),
    "first epoch / torchvision alone": ("at least", 0.9),
    "later epochs / first epoch": ("at least", 10.0),
    "memory above the model's, MB": ("below", 1000.0),
    "waiting for data, % of a training run from the cache": ("below", 3.0),
}
OURS = ("mmkit, into the cache", "mmkit, streamed")
EPOCHS, STEPS, TOKENIZER_CAPTIONS = 3, 150, ["a red card over the coffee"]


# -- rates -------------------------------------------------------------------------------------


def rates(folder: Path, count: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Images per second of every way in every round; versions of the other packages."""
    with tempfile.TemporaryDirectory() as scratch:
        ways, versions = all_ways(folder, Path(scratch))
        found: dict[str, list[float]] = {name: [] for name in ways}
        for number, part in enumerate(parts_of(count, rounds)):
            for name in random.Random(number).sample(list(ways), len(ways)):
                start = time.perf_counter()
                images = ways[name](part)
                found[name].append(images / (time.perf_counter() - start))
                print(f"round {number + 1}: {name:32} {found[name][-1]:6.0f} a second", flush=True)
    return found, versions


def rate_rows(found: dict[str, list[float]]) -> list[dict]:
    """Medians, and our ratio to each within a round."""
    rows = []
    for name, values in found.items():
        row: dict = {"way": name, "images a second": spread(values), "each round": values}
        for ours in OURS:
            ratios = [a / b for a, b in zip(found[ours], values, strict=True)]
            row[f"{ours} / this"] = spread(ratios)
        rows.append(row)
    return rows


# -- cells: each in a process of its own, which reports its phases ------------------------------


def say(**message) -> None:
    """A line for the process that watches: a phase that begins, or a result."""
    print(json.dumps(message), flush=True)


@contextlib.contextmanager
def timed(phase: str, **more):
    say(phase=phase)
    start = time.perf_counter()
    yield
    say(phase="between", result={f"{phase}, seconds": time.perf_counter() - start, **more})


def cell(kind: str, table: str, steps: int) -> None:
    """Index a table, then read epochs (kind "cache" or "stream") or train (kind "train")."""
    model = mm.MultimodalEncoder.preset("tiny", tokenizer=mm.train_wordpiece(TOKENIZER_CAPTIONS))
    say(phase="libraries and model")
    time.sleep(1)
    with tempfile.TemporaryDirectory() as scratch:
        options: dict = dict(image_size=SIDE, cache_dir=Path(scratch) / "cache")
        with timed("index"):
            data = mm.from_table(table, **options)
        if kind == "cache":
            time.sleep(2.1)  # hashes of more recent files are not remembered
            with timed("index again"):
                data = mm.from_table(table, **options)
        with timed("captions"):
            data.encoded_captions()
        if kind != "stream":
            with timed("first epoch"):
                data.cached(WORKERS)
        if kind in ("cache", "stream"):
            for epoch in range(EPOCHS if kind == "cache" else 1):
                with timed("epoch from the cache" if kind == "cache" else "epoch, streamed"):
                    count = sum(
                        len(batch)
                        for batch in load_batches(
                            data, keys_of(range(len(data)), epoch), WORKERS, False
                        )
                    )
                assert count == len(data)
        else:
            train(data, scratch, steps)
        say(result={"images": len(data)})
    del model


def train(data: mm.MultimodalDataset, scratch: str, steps: int) -> None:
    """Train the tiny preset from the cache; the fraction of waiting is in metrics.jsonl."""
    config = mm.TrainingConfig(
        max_steps=steps, batch_size=BATCH, image_mask_ratio=0.5, output_dir=scratch, run_name="run",
        log_every=10,
    )  # fmt: skip
    with timed("train"):
        run = mm.train_model(config, data)
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").open()]
    waited = [r["waiting_for_data"] for r in records if r["split"] == "train"]
    say(result={"waiting": waited, "steps": steps})


# -- memory ------------------------------------------------------------------------------------


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [p for child in task.read_text().split() for p in tree(int(child))]
    return found


def memory(pid: int) -> dict[str, float]:
    """Megabytes of a tree of processes: own pages, shared memory, mapped files, and their sum.

    An own page that n processes share counts once. Mapped files are those of the first process:
    Linux would divide them by all processes that map them, those of other users, too.
    """
    sums = dict.fromkeys(("own", "shared", "files"), 0.0)
    names = {"Pss_Anon": "own", "Pss_Shmem": "shared", "RssFile": "files"}
    paths = [f"/proc/{one}/smaps_rollup" for one in tree(pid)] + [f"/proc/{pid}/status"]
    for path in paths:
        with contextlib.suppress(OSError):  # it has ended in the meantime
            for line in Path(path).read_text().splitlines():
                name, _, value = line.partition(":")
                if name in names:
                    sums[names[name]] += int(value.split()[0]) * 1024 / 1e6
    return sums | {"all": sum(sums.values())}


def watched(kind: str, table: Path, steps: int = STEPS) -> dict:
    """A cell's results, and its highest memory in each phase."""
    command = [sys.executable, "-m", "tests.benchmarks.own_images", "--cell", kind, str(table)]
    peaks: dict[str, dict] = {}
    results: dict[str, list] = {}
    with tempfile.TemporaryDirectory() as folder:
        log, errors = Path(folder) / "log", Path(folder) / "errors"
        with open(log, "w") as out, open(errors, "w") as err:
            process = subprocess.Popen([*command, str(steps)], stdout=out, stderr=err)
        phase = "start"
        while process.poll() is None:
            now, before = memory(process.pid), phase
            phase = next((m["phase"] for m in reversed(messages(log)) if "phase" in m), phase)
            if phase == before and now["all"] > peaks.get(phase, {"all": 0.0})["all"]:
                peaks[phase] = now
            time.sleep(0.15)
        if process.returncode:
            raise RuntimeError(f"{kind} of {table} failed:\n{errors.read_text()[-3000:]}")
        for message in messages(log):
            for name, value in message.get("result", {}).items():
                results.setdefault(name, []).append(value)
    print(kind, table.name, {p: round(m["all"]) for p, m in peaks.items()}, results, flush=True)
    return {"kind": kind, "peaks": peaks} | results


def messages(log: Path) -> list[dict]:
    """The messages of a cell so far."""
    lines = log.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]


def above_model(found: dict) -> float:
    """Megabytes that the highest phase takes above libraries and model."""
    base = found["peaks"]["libraries and model"]["all"]
    return max(peak["all"] for phase, peak in found["peaks"].items() if phase != "start") - base


def first_rows(folder: Path, count: int) -> Path:
    """A table of the first images, beside the table of all."""
    path = folder / f"first_{count}.csv"
    with open(folder / "pairs.csv", newline="", encoding="utf-8") as whole:
        rows = [row for row, _ in zip(csv.reader(whole), range(count + 1), strict=False)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def cells(folder: Path, count: int, steps: int) -> dict[str, dict]:
    """ "kind count" -> results, for a tenth of the images and for all."""
    return {
        f"{kind} {some}": watched(kind, first_rows(folder, some), steps if some == count else 20)
        for some in (count // 10, count)
        for kind in ("cache", "stream", "train")
    }


# -- tables ------------------------------------------------------------------------------------


def memory_rows(found: dict[str, dict]) -> list[dict]:
    """Peaks of every phase of every cell, above those of libraries and model."""
    rows = []
    for name, one in found.items():
        base = one["peaks"]["libraries and model"]
        for phase, peak in one["peaks"].items():
            if phase not in ("start", "between", "libraries and model"):
                above = {key: peak[key] - base[key] for key in base}
                rows.append({"cell": name, "phase": phase, "MB": peak["all"], "above": above})
    return rows


def growth(found: dict[str, dict], count: int) -> dict[str, float]:
    """KB that each further image takes at the peak; and the MB that a million images take."""
    small, result = count // 10, {}
    for kind in ("cache", "stream", "train"):
        low, high = (above_model(found[f"{kind} {n}"]) for n in (small, count))
        slope = (high - low) / (count - small)  # MB per image
        result[f"{kind}, KB an image"] = 1000 * slope
        result[f"{kind}, MB at 1,000,000"] = high + slope * (1_000_000 - count)
    return result


def reached(found: dict[str, list[float]], of: dict[str, dict], count: int) -> dict[str, dict]:
    """Each goal with the measured value (of our two ways the slower), and if it is reached."""
    cache, train = of[f"cache {count}"], of[f"train {count}"]
    first = {
        f"first epoch / {name}": min(
            spread([a / b for a, b in zip(found[ours], found[name], strict=True)])["median"]
            for ours in OURS
        )
        for name in ("Pillow alone", "torchvision alone")
        if name in found
    }
    epoch = spread(cache["epoch from the cache, seconds"])["median"]
    # above the smaller training run: the model's own activations are in both
    memories = [above_model(of[f"{kind} {count}"]) for kind in ("cache", "stream")]
    memories.append(above_model(train) - above_model(of[f"train {count // 10}"]))
    waiting = train["waiting"][0]
    values = first | {
        "indexing, seconds": cache["index, seconds"][0],
        "later epochs / first epoch": cache["first epoch, seconds"][0] / epoch,
        "memory above the model's, MB": max(memories),
        "waiting for data, % of a training run from the cache": 100 * sum(waiting) / len(waiting),
    }
    table = {}
    for name, (way, limit) in GOALS.items():
        if name not in values:
            continue
        good = values[name] < limit if way == "below" else values[name] >= limit
        table[name] = {"goal": f"{way} {limit:g}", "measured": values[name], "reached": good}
    return table


# -- the figure --------------------------------------------------------------------------------


def draw_figure(rows: list[dict], memories: list[dict], count: int):
    """Images per second of every way, and each phase's memory above that of the model."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = sorted(rows, key=lambda row: row["images a second"]["median"])
    for y, row in enumerate(rows):
        speed, ours = row["images a second"], row["way"].startswith("mmkit")
        left.barh(
            y, speed["median"], color=BLUE if ours else SKY if "alone" in row["way"] else ORANGE
        )
        left.plot([speed["lower"], speed["upper"]], [y, y], color="0.2")
        left.text(speed["upper"], y, f"  {speed['median']:,.0f}", va="center", fontsize=8)
    left.set_yticks(range(len(rows)), [row["way"] for row in rows], fontsize=8)
    left.set_xlabel("images per second (two processes; line: quartiles of the rounds)")
    left.set_title(f"JPEGs of about 160 px to {SIDE} px squares", fontsize=10)
    left.margins(x=0.15)
    for y, row in enumerate(reversed(memories)):
        start = 0.0
        for part, colour in (("own", BLUE), ("files", SKY), ("shared", ORANGE)):
            right.barh(y, max(0.0, row["above"][part]), left=start, color=colour)
            start += max(0.0, row["above"][part])
    names = [f"{row['phase']} ({int(row['cell'].split()[1]):,})" for row in reversed(memories)]
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.axvline(1000, color="0.3", linestyle=":")
    for label, colour in (("own pages", BLUE), ("mapped files", SKY), ("shared", ORANGE)):
        right.barh(0, 0, color=colour, label=label)
    right.legend(fontsize=8, loc="center right")
    right.set_xlabel("MB above libraries and model (dotted: the goal, 1 GB)")
    right.set_title(f"Peak memory, a tenth and all of {count:,} images", fontsize=10)
    for ax in (left, right):
        plain_axes(ax)
    return figure


# -- the run -----------------------------------------------------------------------------------


def rounded(value):
    """All numbers rounded to a thousandth."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, 3) if isinstance(value, float) else value


def report(found: dict, of: dict, about: dict, count: int, output: Path) -> None:
    """Print the tables, write the record and the figure."""
    goals, rows, memories = reached(found, of, count), rate_rows(found), memory_rows(of)
    print()
    show([{"way": row["way"], "a second": row["images a second"]["median"],
           **{f"{ours} / this": row[f"{ours} / this"]["median"] for ours in OURS}}
          for row in rows])  # fmt: skip
    print()
    show([{"what": name, **goal} for name, goal in goals.items()])
    record = {"machine": about, "goals": goals, "images_a_second": rows, "cells": of}
    record["growth"] = growth(of, count)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "own_images.json"
    path.write_text(json.dumps(rounded(record), indent=1) + "\n")
    draw_figure(rows, memories, count).savefig(path.with_suffix(".png"), dpi=110)
    print(f"written: {path.name} and {path.with_suffix('.png').name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "own_images")
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the training run")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        kind, table, steps = options.cell
        return cell(kind, table, int(steps))
    about = machine() | {"rounds": options.rounds}
    folder = make(options.folder, options.count)
    found, versions = rates(folder, options.count, options.rounds)
    of = cells(folder, options.count, options.steps)
    report(found, of, about | versions, options.count, options.output)


if __name__ == "__main__":
    main()
