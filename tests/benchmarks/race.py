"""Time to quality: from image files on the disk to R@1 of 45 %, by three recipes.

    pip install -e ".[bench]"
    python -m tests.benchmarks.race --quick             # does it run? less than a minute
    python -m tests.benchmarks.race --search --seeds 0  # the peers' learning rates
    python -m tests.benchmarks.race                     # three seeds of each, in turns
    python -m tests.benchmarks.race --resume            # continues where it was interrupted

The built-in training images (64 px, compose split) are written once as PNG files with a table of
captions; that is not timed. Each run is a fresh process. Its clock starts when its packages are
imported, counts loading and training, and stops every `--every` seconds while the model is scored:
R@1 of the compose test split, nothing masked, mean of both directions, by the same code for all.
All compute in bf16 if the machine does (`mixed_precision="auto"`), with towers of equal size.

- mmkit: `mm.from_table` with an empty cache, then `TrainingConfig()` as it is. Reading and caching
  images, training the tokenizer and the checkpoints of every epoch count.
- open_clip: its `CLIP`, patch dropout 50 %, and its recipe: AdamW with betas 0.9 and 0.98, eps
  1e-6, weight decay 0.2, warmup (a tenth of the steps), cosine to 0, batch 128.
- transformers: `VisionTextDualEncoderModel` and the recipe of its contrastive-image-text example:
  AdamW, weight decay 0.1, no warmup, linear to 0, batch 64.

The peers get some advantages that their users would not have: images are decoded once, into memory;
captions become tokens before training, by a tokenizer that exists already, padded to the longest
one only; an image with several captions comes once per epoch, with one of them; gradients are
clipped (`peers.py`); there are no checkpoints. Their schedule ends at a horizon
(`--minutes-open-clip`, `--minutes-transformers`; several can be searched), in as many steps as an
untimed trial says. `--search` runs each learning rate with seed 0; the one that first reaches 45 %,
otherwise the one that ends highest, is used for the seeds. Other load on the machine shows in
`longest_step` (seconds) and in the loads, which are saved with the curve. Writes
mmkit/results/race.json and results/race.png.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.draw_masks import FOLDER, machine, show
from tests.benchmarks.peers import PEERS
from tests.benchmarks.places import json_file
from tests.benchmarks.race_figure import TARGET, draw_figure, reached_at, table
from tests.benchmarks.race_runs import RECIPES, write_files
from tests.benchmarks.step_speed import versions

# -- the race --------------------------------------------------------------------------------------

KEY = ("phase", "who", "learning_rate", "minutes", "seed", "cap", "every")


def key(work: dict) -> tuple:
    return tuple(work[name] for name in KEY)


def run(work: dict, folder: Path) -> dict:
    """What `race_runs.one` found, in a fresh process."""
    out = folder / "found.json"
    order = json.dumps(work | {"folder": str(folder), "out": str(out)})
    subprocess.run([sys.executable, "-m", "tests.benchmarks.race_runs", order], check=True)
    return work | json.loads(out.read_text())


class Results:
    """race.json: every run is written to it as soon as it is finished."""

    def __init__(self, path: Path):
        self.path, self.runs = path, []
        if path.is_file():
            self.runs = json.loads(path.read_text())["runs"]

    def drop(self, phase: str, who: list[str]) -> None:
        self.runs = [r for r in self.runs if r["phase"] != phase or r["who"] not in who]

    def add(self, found: dict) -> None:
        self.runs.append(found)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine() | versions(), "target": TARGET, "runs": self.runs}
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(self.path)

    def best(self, who: str, minutes: list[float]) -> tuple[float, float]:
        """(learning rate, minutes) of the search: first at the target, otherwise highest."""
        searched = [r for r in self.runs if r["phase"] == "search" and r["who"] == who]
        if not searched:
            print(f"{who}: no search in {self.path.name}; the learning rate is 1e-3")
            return 1e-3, minutes[0]
        first = min(searched, key=lambda r: (reached_at(r) or math.inf, -r["curve"][-1][1]))
        return first["learning_rate"], first["minutes"]


def searches(options) -> list[dict]:
    """The runs of the search: learning rates, and horizons if several are given."""
    return [
        dict(phase="search", who=who, learning_rate=rate, minutes=minutes, seed=0)
        for who in options.who if who in RECIPES
        for minutes, rate in itertools.product(options.minutes[who], options.rates[who])
    ]  # fmt: skip


def seeds(options, results: Results) -> list[dict]:
    """The runs of the race: contenders take turns."""
    plans = {
        who: results.best(who, options.minutes[who]) if who in RECIPES else (None, None)
        for who in (options.who if options.seeds else ())
    }
    return [
        dict(phase="race", who=who, learning_rate=rate, minutes=minutes, seed=seed)
        for seed in range(options.seeds)
        for who, (rate, minutes) in plans.items()
    ]


def go(works: list[dict], options, results: Results, folder: Path) -> None:
    """Run them one after the other, except those whose results exist already."""
    common = {"cap": options.cap, "every": options.every}
    there = {key(found) for found in results.runs}
    for work in works:
        if key(work | common) not in there:
            results.add(run(work | common, folder))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--who", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--seeds", type=int, default=3, help="0: no race, only the search")
    parser.add_argument("--search", action="store_true", help="the peers' learning rates first")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates to search")
    parser.add_argument("--minutes-open-clip", nargs="+", type=float, default=[6.0])
    parser.add_argument("--minutes-transformers", nargs="+", type=float, default=[20.0])
    parser.add_argument("--cap", type=float, default=20.0, help="minutes after which a run ends")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two scores")
    parser.add_argument("--resume", action="store_true", help="keep the finished runs")
    parser.add_argument("--draw", action="store_true", help="only table and figure")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; a test")
    parser.add_argument("--output", type=Path, help="folder of the results")
    options = parser.parse_args()
    if options.quick:
        options.minutes_open_clip = options.minutes_transformers = [0.06]
        options.cap, options.every, options.seeds = 0.06, 1.0, min(options.seeds, 1)
    rates = {who: options.rates or recipe.rates for who, recipe in RECIPES.items()}
    options.rates = {who: own[:2] if options.quick else own for who, own in rates.items()}
    elsewhere = Path(tempfile.gettempdir()) / "mmkit-race"
    options.output = options.output or (elsewhere if options.quick else FOLDER)
    options.minutes = {
        "open_clip": options.minutes_open_clip,
        "transformers": options.minutes_transformers,
    }
    return options


def main():
    options = arguments()
    results = Results(json_file("race", options.output))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not options.draw:
            write_files(folder)
            for phase in ("search",) * options.search + ("race",) * bool(options.seeds):
                if not options.resume:
                    results.drop(phase, options.who)
                works = searches(options) if phase == "search" else seeds(options, results)
                go(works, options, results, folder)
    for phase in ("search", "race"):
        if rows := table(results.runs, phase):
            print(f"\n{phase}")
            show(rows)
    draw_figure(results.runs).savefig(options.output / "race.png", dpi=110)
    print(f"\nwritten: {results.path} and race.png")


if __name__ == "__main__":
    main()
