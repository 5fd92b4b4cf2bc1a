"""One training step of the same towers: mmkit, open_clip, transformers.

    pip install -e ".[bench]"
    python -m tests.benchmarks.step_speed                 # tiny and small, about 15 minutes
    python -m tests.benchmarks.step_speed --savings       # ours without one part each; savings.py
    python -m tests.benchmarks.step_speed --sizes base --rounds 4 --name step_speed_base
    python -m tests.benchmarks.step_speed --avx2 --sizes tiny --ratios 0.5 \
        --peers mmkit Muon open_clip --name step_speed_avx2    # as a CPU without bfloat16 units

Every cell (who, size, masked fraction) is a fresh process that reports its highest memory; the
cells of a size and fraction take turns step by step, so that a busy moment of the machine does not
affect one of them alone. Ratios are taken within a round. `peers.py` says what each of them does.
Writes mmkit/results/step_speed.json and results/step_speed.png, or those of `--name`. This is for
a CPU: on a GPU, gpu.py times one cell after another.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import mmkit as mm
from mmkit import cost
from mmkit.device import pick_precision
from mmkit.models.presets import PRESETS
from mmkit.plots.figures import BLUE, COLOURS, ORANGE, new_figure, plain_axes
from tests import AVX2
from tests.benchmarks.draw_masks import FOLDER, machine, show
from tests.benchmarks.exact_step import spread
from tests.benchmarks.peers import COMPILED, PEERS
from tests.benchmarks.places import json_file
from tests.benchmarks.savings import SAVINGS

BATCH = {"tiny": 128, "small": 32, "base": 16}
ALL = PEERS | COMPILED | SAVINGS
RATIOS = (0.0, 0.5, 0.75)
GOALS = {  # (size, masked at least this fraction) -> our speed over theirs
    ("tiny", 0.5, "open_clip"): 1.5, ("tiny", 0.5, "transformers"): 3.0,
    ("small", 0.5, "open_clip"): 1.3, ("small", 0.5, "transformers"): 2.5,
    ("tiny", 0.0, "open_clip"): 1.15, ("small", 0.0, "open_clip"): 1.15,
}  # fmt: skip


# -- a cell: a process that makes one step on request -------------------------------------------


def cell(who: str, size: str, ratio: float, batch_size: int, precision: str) -> None:
    torch.set_num_threads(int(os.environ.get("BENCH_THREADS", torch.get_num_threads())))
    data, _, _ = mm.openmoji(PRESETS[size]["image"])
    with tempfile.TemporaryDirectory() as folder:
        options = {"output_dir": folder} if who in ("mmkit", *SAVINGS) else {}
        peer = ALL[who](size, ratio, data, batch_size, precision, **options)
        for _ in range(2):  # warm up
            peer.step()
        say(parameters=sum(p.numel() for p in peer.model.parameters()))
        for line in sys.stdin:
            if line.strip() != "step":
                break
            start = time.perf_counter()
            loss = peer.step()
            say(seconds=time.perf_counter() - start, loss=loss)
        say(peak_mb=peak_bytes() / 1e6)


def peak_bytes() -> int:
    """The highest memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def say(**message) -> None:
    print(json.dumps(message), flush=True)


class Cell:
    """A cell as seen by the process that starts it."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "tests.benchmarks.step_speed", "--cell"]
        command += map(str, arguments)
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(command, text=True, bufsize=1, **pipes)  # type: ignore
        self.about = self.answer()

    def answer(self) -> dict:
        for line in self.process.stdout:  # type: ignore[union-attr]
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"a cell ended: {self.process.args}")

    def ask(self, request: str) -> dict:
        self.process.stdin.write(f"{request}\n")  # type: ignore[union-attr]
        return self.answer()


# -- the run -----------------------------------------------------------------------------------


def measure(
    size: str, ratio: float, batch: int, names: list[str], rounds: int, precision: str
) -> dict:
    """Seconds of every step and the highest memory of each peer."""
    cells = {name: Cell(name, size, ratio, batch, precision) for name in names}
    found: dict[str, dict] = {name: {"seconds": []} for name in names}
    for _ in range(rounds):
        for name, one in cells.items():
            found[name]["seconds"].append(one.ask("step")["seconds"])
    for name, one in cells.items():
        found[name] |= one.about | one.ask("end")
        one.process.wait()
    return found


def row(size: str, ratio: float, batch: int, found: dict) -> dict:
    """Medians, and our speed and memory over theirs."""
    ours = found["mmkit"]
    entry: dict = {"size": size, "masked": ratio, "batch": batch, "steps": {}}
    for name, theirs in found.items():
        ratios = [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
        entry["steps"][name] = {
            "milliseconds": spread([1000 * s for s in theirs["seconds"]]),
            "peak_mb": theirs["peak_mb"],
            "parameters": theirs["parameters"],
            "our speed / theirs": spread(ratios),
            "our memory / theirs": ours["peak_mb"] / theirs["peak_mb"],
        }
    return entry


def limit(size: str, ratio: float, batch: int, milliseconds: float, precision: str) -> dict:
    """Rate of our step's useful operations over that of matrix products of the same shapes."""
    data, _, _ = mm.openmoji(PRESETS[size]["image"])
    model = mm.MultimodalEncoder.preset(size, tokenizer=data.tokenizer)
    data = data.encoded_by(model.tokenizer, model.max_length)
    tokens = float(data.encoded_captions()[1].float().mean())
    kept = max(1, round(model.num_patches * (1 - ratio)))
    gflop = batch * cost.step_flops(model, kept, tokens, replay=False) / 1e9
    dtype = pick_precision(precision, torch.device("cpu")) or torch.float32
    rate = cost.matmul_rate(model, batch, kept, tokens, dtype)
    reached = gflop / (milliseconds / 1000)
    return {
        "gflop": gflop, "gflop_per_second": reached, "matmul_rate": rate, "share": reached / rate
    }  # fmt: skip


def draw_figure(rows: list[dict]):
    """Pairs per second of each peer, by size and masked fraction."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure = new_figure(5 * len(sizes), 3.6)
    for ax, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        own = [row for row in rows if row["size"] == size]
        for i, row in enumerate(own):
            width = 0.8 / len(row["steps"])
            for j, (name, step) in enumerate(row["steps"].items()):
                x = i + width * (j - (len(row["steps"]) - 1) / 2)
                speed = row["batch"] / step["milliseconds"]["median"] * 1000
                ax.bar(x, speed, 0.92 * width, color=COLOURS[j % len(COLOURS)],
                       label=name if i == 0 else None)  # fmt: skip
                ax.annotate(f"{speed:.0f}", (x, speed), ha="center", va="bottom",
                            fontsize=8)  # fmt: skip
        ax.set_xticks(range(len(own)), [f"{100 * row['masked']:.0f} %" for row in own])
        ax.set(xlabel="patches masked", ylabel="pairs per second", title=f"{size}, a training step")
        plain_axes(ax)
        ax.legend(fontsize=8)
    return figure


def draw_savings(rows: list[dict]):
    """How many times as long a step takes without each part, with quartiles of the rounds."""
    names = [name for name in rows[0]["steps"] if name != "mmkit"][::-1]
    figure = new_figure(7, 0.8 + 0.4 * len(names))
    ax = figure.subplots()
    for number, (row, colour) in enumerate(zip(rows, (BLUE, ORANGE), strict=False)):
        of = [row["steps"][name]["our speed / theirs"] for name in names]
        positions = [i + 0.2 - 0.4 * number for i in range(len(names))]
        ends = [[abs(x[end] - x["median"]) for x in of] for end in ("lower", "upper")]
        ax.barh(positions, [x["median"] - 1 for x in of], 0.36, left=1, xerr=ends, color=colour,
                label=f"{100 * row['masked']:.0f} % of the patches masked",
                error_kw=dict(ecolor="0.4", capsize=2, lw=1))  # fmt: skip
        for y, x in zip(positions, of, strict=True):
            ax.annotate(f"{x['median']:.2f}", (max(1, x["upper"]), y), (4, 0),
                        textcoords="offset points", va="center", fontsize=7)  # fmt: skip
    ax.axvline(1, color="0.4", linewidth=1)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="times as long as mmkit's step (tiny, medians and quartiles of the rounds)")
    plain_axes(ax)
    ax.legend(fontsize=8)
    return figure


def versions() -> dict[str, str]:
    found = {}
    for package in ("open_clip_torch", "transformers", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def goals(rows: list[dict]) -> list[dict]:
    """Each goal with the measured value."""
    table = []
    for row_ in rows:
        for name, step in row_["steps"].items():
            masked = 0.5 if row_["masked"] >= 0.5 else 0.0
            goal = GOALS.get((row_["size"], masked, name))
            if goal:
                speed = step["our speed / theirs"]["median"]
                what = f"{row_['size']}, {100 * row_['masked']:.0f} % masked, over {name}"
                table.append({"what": what, "goal": goal, "speed": speed, "reached": speed >= goal})
            if name == "open_clip":
                memory = step["our memory / theirs"]
                what = f"{row_['size']}, {100 * row_['masked']:.0f} % masked, memory of open_clip"
                table.append({"what": what, "goal": 0.8, "speed": memory, "reached": memory <= 0.8})
        fraction = row_["limit"]["share"]
        goal = {"tiny": 0.6, "small": 0.7}.get(row_["size"])
        if goal and row_["masked"]:
            what = (
                f"{row_['size']}, {100 * row_['masked']:.0f} % masked, fraction of the matmul rate"
            )
            table.append(
                {"what": what, "goal": goal, "speed": fraction, "reached": fraction >= goal}
            )
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"], choices=list(BATCH))
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(ALL))
    parser.add_argument("--batch", type=int, help="pairs per step; by default by size")
    parser.add_argument("--avx2", action="store_true", help="compute as a CPU with AVX2 alone")
    parser.add_argument("--savings", action="store_true", help="ours without one part each")
    parser.add_argument("--name", help="of the results (step_speed)")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--cell", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.avx2 and not AVX2.items() <= os.environ.items():  # torch reads it when it is loaded
        os.execve(sys.executable, [*sys.orig_argv], os.environ | AVX2)
    if options.cell:
        who, size, ratio, batch_size, precision = options.cell
        return cell(who, size, float(ratio), int(batch_size), precision)
    if options.savings:
        options.sizes, options.ratios = ["tiny"], [r for r in options.ratios if r]
        options.peers, options.name = ["mmkit", *SAVINGS], options.name or "savings"
    rows, about = [], machine() | versions() | {"rounds": options.rounds}
    about["capability"] = torch.backends.cpu.get_cpu_capability()
    about["precision"] = str(pick_precision(options.precision, torch.device("cpu")) or "float32")
    for size in options.sizes:
        for ratio in options.ratios:
            rounds = options.rounds if size == "tiny" else max(5, options.rounds // 2)
            batch = options.batch or BATCH[size]
            found = measure(size, ratio, batch, options.peers, rounds, options.precision)
            rows.append(row(size, ratio, batch, found))
            ours = statistics.median(found["mmkit"]["seconds"]) * 1000
            rows[-1]["limit"] = limit(size, ratio, batch, ours, options.precision)
            show([{"size": size, "masked": ratio, "who": name,
                   "ms": step["milliseconds"]["median"], "peak MB": step["peak_mb"],
                   "our speed / theirs": step["our speed / theirs"]["median"],
                   "our memory / theirs": step["our memory / theirs"]}
                  for name, step in rows[-1]["steps"].items()])  # fmt: skip
            print(rows[-1]["limit"], flush=True)
    if not options.savings:
        show(goals(rows))
    options.output.mkdir(parents=True, exist_ok=True)
    name = options.name or "step_speed"
    path = json_file(name, options.output)
    path.write_text(json.dumps({"machine": about, "rows": rows, "goals": goals(rows)}, indent=1))
    figure = draw_savings(rows) if options.savings else draw_figure(rows)
    figure.savefig(options.output / f"{name}.png", dpi=110)
    print(f"written: {path.name} and {name}.png")


if __name__ == "__main__":
    main()
