"""What reconstruction costs: a training step with more terms compared with the contrastive step.

    python -m tests.benchmarks.term_cost        # about three minutes on two CPU cores

The whole step (masks, gradients, clipping, optimizers) of the tiny preset on the built-in images,
128 pairs, half of the patches and 30 % of the words masked in all, the variants in turns in one
process, so that a busy moment of the machine affects all alike. Ratios are taken within a round;
their median and quartiles are written to results/term_cost.json.
"""

import argparse
import json
import random
import time

import mmkit as mm
from tests.benchmarks.draw_masks import FOLDER, machine
from tests.benchmarks.exact_step import spread

MASKED = dict(image_mask_ratio=0.5, text_mask_ratio=0.3)
ACROSS = dict(cross_modal=True)
VARIANTS = {
    "contrast": {},
    "+ pixels": dict(mim_weight=1.0),
    "+ words": dict(mlm_weight=0.3),
    "+ pixels + words": dict(mim_weight=1.0, mlm_weight=0.3),
    "+ pixels + words, across": dict(mim_weight=1.0, mlm_weight=0.3, **ACROSS),
    "all terms": dict(mim_weight=1.0, mlm_weight=0.3, itm_weight=0.3, **ACROSS),
    "all terms, contrast on an unmasked view": dict(
        mim_weight=1.0, mlm_weight=0.3, itm_weight=0.3, contrastive_view="unmasked",
        **ACROSS,
    ),
    "pixels alone (MAE), 75 % masked": dict(
        contrastive_weight=0.0, mim_weight=1.0, image_mask_ratio=0.75, text_mask_ratio=0.0
    ),
}  # fmt: skip


def measure(rounds: int, precision: str) -> dict:
    train, _, _ = mm.openmoji(image_size=64)
    trainers = {
        name: mm.MaskedMultimodalTrainer(
            mm.TrainingConfig(mixed_precision=precision, **MASKED | values), train
        )
        for name, values in VARIANTS.items()
    }
    for trainer in trainers.values():
        trainer.net.train()
    batch = trainers["contrast"].first_batch()
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    draw = random.Random(0)
    for number in range(rounds + 1):
        for name in draw.sample(list(trainers), len(trainers)):
            start = time.perf_counter()
            trainers[name].train_step(batch, number)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "milliseconds": spread([1e3 * s for s in times]),
            "ratio": spread([a / b for a, b in zip(times, seconds["contrast"], strict=True)]),
        }
        for name, times in seconds.items()
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    results = {"machine": machine(), "rounds": args.rounds, "precision": args.precision}
    results["variants"] = measure(args.rounds, args.precision)
    for name, found in results["variants"].items():
        ratio = found["ratio"]
        print(
            f"{name:42} {found['milliseconds']['median']:7.0f} ms   "
            f"x {ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})"
        )
    (FOLDER / "term_cost.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
