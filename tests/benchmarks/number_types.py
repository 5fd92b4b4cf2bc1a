"""Does Muon learn equally well if it orthogonalises in float32 or in bfloat16?

    python -m tests.benchmarks.number_types       # three seeds each: about 10 minutes

`make train`'s recipe; only the type of Muon's products differs. R@1 of the compose test, nothing
masked, mean of both directions; means with their 95 % intervals over seeds (Student's t), and the
difference of the pairs that share a seed. Writes results/number_types.json.

A processor without bfloat16 units emulates them value by value, which takes minutes. There,
products of bfloat16 are computed as such units do: summed in float32, then rounded.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path

import torch
from scipy import stats
from torch.overrides import TorchFunctionMode

import mmkit as mm
from mmkit.device import multiplies_bfloat16
from mmkit.training import optim
from tests.benchmarks.draw_masks import FOLDER, machine
from tests.benchmarks.exact_step import rounded

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LikeUnits(TorchFunctionMode):
    """Batched products of bfloat16: exact products, summed in float32, rounded once."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.bmm, torch.baddbmm) and args[0].dtype is torch.bfloat16:
            return function(*(x.float() for x in args), **kwargs or {}).bfloat16()
        return function(*args, **kwargs or {})


def like_units(*args, orthogonalize=optim.orthogonalize, **options):
    with LikeUnits():
        return orthogonalize(*args, **options)


def interval(values: list[float]) -> dict[str, float]:
    """Mean and half the width of its 95 % interval."""
    deviation = statistics.stdev(values) / len(values) ** 0.5
    return {
        "mean": statistics.mean(values),
        "plus_minus": float(stats.t.ppf(0.975, len(values) - 1)) * deviation,
    }


def reached(data, dtype: torch.dtype, seed: int) -> float:
    """R@1 in per cent of one training run."""
    optim.orthogonalizing_type = lambda device: dtype  # type: ignore[assignment]
    train, val, test = data
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = mm.train_model(mm.TrainingConfig(seed=seed, output_dir=folder), train, val)
        return 100 * mm.mean_recall(mm.evaluate(run.model, test), 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: an interval needs at least 2")
    if not multiplies_bfloat16(torch.device("cpu")):
        optim.orthogonalize = like_units  # type: ignore[assignment]
    data, found = mm.openmoji(64), {name: [] for name in TYPES}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "number_types.json"
    for seed in range(options.seeds):
        for name, dtype in TYPES.items():
            found[name].append(reached(data, dtype, seed))
            print(f"seed {seed}, {name}: R@1 {found[name][-1]:.1f} %", flush=True)
        if seed:  # an interval needs two
            result = rounded(summary(found, len(data[2])))
            path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["intervals"]), result["float32 - bfloat16"])


def summary(found: dict[str, list[float]], images: int) -> dict:
    """The record to write: R@1 of each run, means and their difference with intervals."""
    differences = [a - b for a, b in zip(*found.values(), strict=True)]
    return {
        "machine": machine(),
        "test_images": images,
        "r_at_1": found,
        "intervals": {name: interval(values) for name, values in found.items()},
        "float32 - bfloat16": interval(differences),
    }


if __name__ == "__main__":
    main()
