"""Does masking patches pay in time? Equal training time for each masked fraction.

    python -m tests.benchmarks.equal_time        # 10, 20 and 60 s, three seeds: about 15 minutes

The tiny preset and its default recipe on the built-in images. The time of a step is measured
first, all fractions in turns; each run gets as many steps as fit into its seconds, and its schedule
ends with them. R@1 of the compose test, nothing masked, mean of both directions; the runs follow
each other seed by seed. Writes mmkit/results/equal_time.json.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import mmkit as mm
from tests.benchmarks.draw_masks import FOLDER, machine
from tests.benchmarks.exact_step import rounded
from tests.benchmarks.places import json_file


def trained(config: mm.TrainingConfig, data) -> tuple[float, float]:
    """(R@1 in per cent, seconds that the training took)."""
    train, _, test = data
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run = mm.train_model(config, train)
    took = time.perf_counter() - start
    return 100 * mm.mean_recall(mm.evaluate(run.model, test), 1), took


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    parser.add_argument("--seconds", type=float, nargs="+", default=[10, 20, 60])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args()
    data, rows = mm.openmoji(64), []
    with tempfile.TemporaryDirectory() as folder:

        def config(ratio: float, **settings) -> mm.TrainingConfig:
            where = dict(output_dir=folder, run_name="run")
            return mm.TrainingConfig(image_mask_ratio=ratio, **where, **settings)

        with contextlib.redirect_stdout(io.StringIO()):
            prices = mm.cost.step_seconds(
                {r: mm.MaskedMultimodalTrainer(config(r), data[0]) for r in options.ratios},
                rounds=15,
            )
        print({ratio: f"{1000 * price:.0f} ms" for ratio, price in prices.items()})
        for seconds in options.seconds:
            scores: dict[float, list[tuple[float, float]]] = {ratio: [] for ratio in options.ratios}
            for seed in range(options.seeds):
                for ratio in options.ratios:
                    steps = max(2, round(seconds / prices[ratio]))
                    scores[ratio].append(trained(config(ratio, max_steps=steps, seed=seed), data))
            for ratio, found in scores.items():
                recalls, took = map(list, zip(*found, strict=True))
                row = {"seconds": seconds, "masked": ratio, "ms of a step": 1000 * prices[ratio],
                       "steps": round(seconds / prices[ratio]), "took (s)": took,
                       "R@1, %": recalls, "mean": statistics.mean(recalls)}  # fmt: skip
                rows.append(rounded(row))
                print(rows[-1], flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    path = json_file("equal_time", options.output)
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
