"""What the exact step costs and what it gives: memory, time, several processes, the gradient.

    python -m tests.benchmarks.exact_step             # about 20 minutes on two CPU cores
    python -m tests.benchmarks.exact_step processes   # one part again, the others are kept

Parts: memory-no and memory-bf16 (peak of a step against its batch, see step_memory.py), time-no and
time-bf16 (exact against naive accumulation, whole train_step, in turns in one process), processes
(two against one, see two_processes.py), gradient (cosine of the naive gradient to the true one).
Ratios are taken within a round and their median is given, with quartiles, so that other load on the
machine slows all alike. The parts with bf16 are left out, unless named, on a machine without units
for it. Writes results/exact_step.json and .png.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import mmkit as mm
from mmkit.device import multiplies_bfloat16
from tests.benchmarks import step_memory, two_processes
from tests.benchmarks.draw_masks import FOLDER, machine, show
from tests.benchmarks.exact_step_figure import PRECISIONS, TARGETS, draw_figure
from tests.benchmarks.step_memory import MICRO

MICRO_BATCHES = (2, 4, 8)  # of a step, where time is measured
BATCHES = (128, 256)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUTS = (1, 2, 4, 8, 16, 32)  # micro-batches of a step, where gradients are compared


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower": low, "upper": high}


# -- time --------------------------------------------------------------------------------------


class TimedTrainer(mm.MaskedMultimodalTrainer):
    """Notes how long the gradients of a step took, without the optimizers."""

    def gradients(self, batch, epoch):
        start = time.perf_counter()
        loss = super().gradients(batch, epoch)
        self._wait()
        self.gradient_seconds = time.perf_counter() - start
        return loss

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed_step(self, batch: mm.Batch, accumulation: str, parts: int) -> tuple[float, float]:
        """Seconds of a step in so many micro-batches: of its gradients, and of all of it."""
        self.config.accumulation = accumulation
        self.config.gradient_accumulation_steps = parts
        start = time.perf_counter()
        self.train_step(batch, 0)
        self._wait()
        return self.gradient_seconds, time.perf_counter() - start


def trainer_of(kind: type, folder: str, **settings) -> mm.MaskedMultimodalTrainer:
    """A trainer on the built-in images that writes into the folder."""
    config = mm.TrainingConfig(output_dir=folder, run_name="run", **settings)
    trainer = kind(config, mm.openmoji(64)[0])
    trainer.net.train()
    return trainer


def measure_time(precision: str, rounds: int) -> list[dict]:
    """A row per batch size and number of micro-batches: seconds and exact / naive."""
    rows = []
    for batch_size in BATCHES:
        with tempfile.TemporaryDirectory() as folder:
            settings = dict(batch_size=batch_size, mixed_precision=precision)
            trainer = trainer_of(TimedTrainer, folder, **settings)
            rows += time_of_batch(trainer, trainer.first_batch(), rounds)
    return rows


def time_of_batch(trainer: TimedTrainer, batch: mm.Batch, rounds: int) -> list[dict]:
    """All ways to cut one batch, in turns, in another order each round."""
    ways = [(how, k) for k in MICRO_BATCHES for how in ("exact", "naive")] + [("exact", 1)]
    seconds: dict[tuple, list] = {way: [] for way in ways}
    for number in range(rounds + 1):  # one more, to warm up
        for way in random.Random(number).sample(ways, len(ways)):
            seconds[way].append(trainer.timed_step(batch, *way))
    rows = []
    for k in MICRO_BATCHES:
        row: dict = {"batch": len(batch), "micro-batches": k}
        for i, what in enumerate(("gradients", "step")):
            times = {how: [t[i] for t in seconds[how, k][1:]] for how in ("exact", "naive")}
            whole = [t[i] for t in seconds["exact", 1][1:]]
            row |= {f"{what} whole": statistics.median(whole)}
            row |= {f"{what} {how}": statistics.median(times[how]) for how in times}
            ratios = [a / b for a, b in zip(times["exact"], times["naive"], strict=True)]
            row |= {f"{what} exact/naive {name}": v for name, v in spread(ratios).items()}
        rows.append(row)
        print(f"batch {len(batch)}, {k} micro-batches: exact {row['step exact']:.2f} s, naive "
              f"{row['step naive']:.2f} s, ratio {row['step exact/naive median']:.2f}",
              flush=True)  # fmt: skip
    return rows


# -- several processes -------------------------------------------------------------------------


def measure_processes(rounds: int) -> dict:
    """Images per second of each arm, and two processes over one, for both optimizers."""
    speeds = two_processes.measure(rounds)
    found: dict = {arm: spread(values) for arm, values in speeds.items()}
    for optimizer in ("muon", "adamw"):
        pairs = zip(speeds[f"2 x {optimizer}"], speeds[f"1 x {optimizer}"], strict=True)
        ratios = [two / one for two, one in pairs]
        found[f"two / one, {optimizer}"] = spread(ratios) | {"rounds": ratios}
    return found


# -- the gradient ------------------------------------------------------------------------------


def gradient_of(model) -> Tensor:
    """All gradients as one float64 vector; the model's are cleared."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat.double()


def true_gradient(trainer, batch: mm.Batch) -> Tensor:
    """By plain backpropagation of one loss over the whole batch, without step.py."""
    trainer.model.zero_grad()
    out = trainer.encode(batch, trainer.maskings(batch, 0))
    features = (out.image_features, out.text_features)
    loss = mm.info_nce(*features, out.logit_scale.exp(), batch.partners)
    (loss + 0 * out.logit_bias).backward()  # unused by info_nce: a zero gradient, as ours
    return gradient_of(trainer.model)


def gradient_rows(trainer, batches: list[mm.Batch], state: str) -> list[dict]:
    """Cosine and length of the accumulated gradient against the true one; means over batches."""
    found: dict[int, list[dict]] = {k: [] for k in CUTS}
    for batch in batches:
        true = true_gradient(trainer, batch)
        for k in CUTS:
            row = {}
            for how in ("naive", "exact"):
                trainer.config.accumulation = how
                trainer.config.gradient_accumulation_steps = k
                trainer.gradients(batch, 0)
                ours = gradient_of(trainer.model)
                row[f"{how} cosine"] = float(ours @ true / ours.norm() / true.norm())
                row[f"{how} length"] = float(ours.norm() / true.norm())
                row[f"{how} error"] = float((ours - true).norm() / true.norm())
            found[k].append(row)
    rows = []
    for k, values in found.items():
        means = {name: statistics.mean(row[name] for row in values) for name in values[0]}
        lowest = min(row["naive cosine"] for row in values)
        largest = max(row["exact error"] for row in values)
        ends = {"naive cosine, lowest": lowest, "exact error, largest": largest}
        rows.append({"model": state, "micro-batches": k, **means, **ends})
    return rows


def measure_gradient(batches: int) -> list[dict]:
    """At the start and after one epoch of the default recipe (float32); the same batches of 128."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(
            mm.MaskedMultimodalTrainer, folder, batch_size=128, mixed_precision="no"
        )
        keys = trainer.epoch_batches(1)[:batches]
        chosen = [trainer.train.batch(*key).to(trainer.device) for key in keys]
        rows += gradient_rows(trainer, chosen, "at the start")
        trainer.config.accumulation, trainer.config.gradient_accumulation_steps = "exact", 1
        for key in trainer.epoch_batches(0):
            trainer.train_step(trainer.train.batch(*key).to(trainer.device), 0)
            trainer.step += 1
        rows += gradient_rows(trainer, chosen, "after one epoch")
    return rows


# -- the run -----------------------------------------------------------------------------------


def verdicts(parts: dict) -> list[dict]:
    """Each target with the measured value."""
    found: list[tuple[str, str, float]] = []
    for precision, label in PRECISIONS.items():
        rows = parts.get(f"memory-{precision}", [])
        cells = {r["batch"]: r for r in rows if r["batch"] == r["micro-batches"] * MICRO}
        for what in ("peak", "step") if cells else ():
            ratio = cells[4096][what] / cells[256][what]
            found.append(("memory", f"{what} at 4,096 / at 256, {label}", ratio))
        for row in parts.get(f"time-{precision}", []):
            if row["micro-batches"] == 8:
                name = f"exact / naive, 8 micro-batches, batch {row['batch']}, {label}"
                found.append(("time", name, row["step exact/naive median"]))
    if "processes" in parts:
        ratio = parts["processes"]["two / one, muon"]["median"]
        found.append(("processes", "two / one, images per second", ratio))
    return [
        {
            "what": f"{name}: {label}",
            "measured": ratio,
            "target": f"{'>=' if name == 'processes' else '<='} {TARGETS[name]}",
            "reached": (ratio >= TARGETS[name]) == (name == "processes") or ratio == TARGETS[name],
        }
        for name, label, ratio in found
    ]


def rounded(value):
    """All numbers rounded to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measures() -> dict[str, Callable[[], list | dict]]:
    """Each part by its name."""
    found: dict = {f"memory-{p}": partial(step_memory.measure, p) for p in PRECISIONS}
    found |= {f"time-{p}": partial(measure_time, p, rounds=9) for p in PRECISIONS}
    found["processes"] = partial(measure_processes, rounds=15)
    found["gradient"] = partial(measure_gradient, batches=4)
    return found


def main():
    known = measures()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(known)}; none: all"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the results")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(known):
        parser.error(f"no part {', '.join(unknown)}; known: {', '.join(known)}")
    path = options.output / "exact_step.json"
    record = json.loads(path.read_text()) if options.parts and path.is_file() else {}
    about, parts = record.get("machine", {}), record.get("parts", {})
    emulated = [name for name in known if "bf16" in name] * (not multiplies_bfloat16(DEVICE))
    for name in options.parts or [name for name in known if name not in emulated]:
        print(f"-- {name}", flush=True)
        about[name] = machine()
        parts[name] = rounded(known[name]())
    print()
    show([row | {"measured": f"{row['measured']:.2f}"} for row in verdicts(parts)])
    record = {"machine": about, "verdicts": rounded(verdicts(parts)), "parts": parts}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    draw_figure(parts).savefig(path.with_suffix(".png"), dpi=110)
    print(f"written: {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
