"""Steps to R@1 of 45 %, by initial weights and by learning rates.

    python -m tests.benchmarks.start                      # two seeds: about 6 minutes
    python -m tests.benchmarks.start --full default both  # and whole training runs: 5 more

The tiny preset on the built-in images, 50 % masked; R@1 of the compose test, nothing masked, mean
of both directions, every five steps, until it is 45 %. "transformers' start" are the initial
weights that ViTModel and BertModel draw by themselves. Writes mmkit/results/start.json.
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

import torch

import mmkit as mm
from tests.benchmarks.draw_masks import FOLDER, machine
from tests.benchmarks.exact_step import rounded
from tests.benchmarks.places import json_file
from tests.benchmarks.race_runs import r_at_1

FORMER = dict(learning_rate=2e-3, matrix_learning_rate=6e-3, warmup_steps=30)
ADAMW = dict(optimizer="adamw", learning_rate=5e-4)
WAYS: dict[str, tuple[bool, dict]] = {  # -> (transformers' start?, changes of the recipe)
    "default": (False, {}),
    "transformers' start": (True, {}),
    "other rates, longer warmup": (False, FORMER),
    "both": (True, FORMER),
    "AdamW": (False, ADAMW),
    "AdamW, transformers' start": (True, ADAMW),
}


def start_of_transformers(tokenizer) -> mm.MultimodalEncoder:
    """The tiny towers with the initial weights that transformers' classes draw."""
    spec = mm.MultimodalEncoder.preset("tiny", tokenizer=tokenizer).architecture()
    del spec["vit"]["initializer_range"]
    return mm.MultimodalEncoder.from_architecture(spec)


class Scored(mm.MaskedMultimodalTrainer):
    """Notes R@1 every five steps and ends at 45 %, or after `most` steps."""

    most, every = 150, 5

    def watch(self, test: mm.MultimodalDataset) -> None:
        test = test.encoded_by(self.model.tokenizer, self.model.max_length)
        self.test, self.curve, self.made = test, [0.0], 0

    def train_step(self, batch, epoch):
        found = super().train_step(batch, epoch)
        self.made += 1
        if self.made % self.every == 0:
            model = self.model
            self.curve.append(r_at_1(model, model.encode_image, model.encode_text, self.test))
            if self.curve[-1] >= 0.45 or len(self.curve) > self.most // self.every:
                self.stop()
                self.stopping = True
        return found

    def steps(self) -> float | None:
        """Where the curve crosses 45 %, by linear interpolation between two scores."""
        *_, before, last = self.curve
        if last < 0.45:
            return None
        return self.every * (len(self.curve) - 2 + (0.45 - before) / (last - before))


def one(data, way: str, seed: int, folder: str, full: bool) -> dict:
    train, val, test = data
    theirs, settings = WAYS[way]
    torch.manual_seed(seed)
    model = start_of_transformers(train.tokenizer) if theirs else None
    config = mm.TrainingConfig(seed=seed, output_dir=folder, run_name="run", **settings)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if full:
            run = mm.train_model(config, train, val, model)
            return {"R@1": 100 * mm.mean_recall(mm.evaluate(run.model, test), 1)}
        trainer = Scored(config, train, model=model)
        trainer.watch(test)
        trainer.fit()
    return {"steps": trainer.steps(), "R@1": 100 * trainer.curve[-1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", nargs="*", default=[], choices=list(WAYS), help="to the end, too")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args()
    data, rows = mm.openmoji(64), []
    with tempfile.TemporaryDirectory() as folder:
        for way, full in [(way, False) for way in options.ways] + [(w, True) for w in options.full]:
            found = [one(data, way, seed, folder, full) for seed in range(options.seeds)]
            row: dict = {"way": way, "training": "whole" if full else "until 45 %"}
            if not full:
                row["steps to 45 %"] = [each["steps"] for each in found]
            row["R@1 at the end, %"] = [each["R@1"] for each in found]
            rows.append(rounded(row))
            print(rows[-1], flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    path = json_file("start", options.output)
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
