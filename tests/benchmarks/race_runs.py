"""A run of race.py, in a process of its own: what is timed, and what each contender does.

race.py says what is done for each contender, and why.
"""

import contextlib
import csv
import importlib
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import mmkit as mm
from mmkit.device import autocast_for
from mmkit.models.attention import eval_mode
from mmkit.schedules import cosine, linear
from tests.benchmarks import peers

SIZE, PRECISION = "tiny", "auto"
TRIAL = 8  # steps that measure how long one takes


@dataclass(frozen=True)
class Recipe:
    """The recipe of a peer's own documentation."""

    peer: type[peers.Peer]
    masked: float  # fraction of the patches dropped in training
    batch_size: int
    weight_decay: float
    adamw: dict  # what differs from torch's defaults
    warmup: float  # fraction of the steps
    shape: Callable[[float], float]  # of the learning rate after the warmup, from 1 to 0
    rates: tuple[float, ...]  # learning rates that a search tries


RECIPES = {
    "open_clip": Recipe(
        peers.OpenClip, 0.5, 128, 0.2, dict(betas=(0.9, 0.98), eps=1e-6), 0.1, cosine,
        (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    ),
    # The example's own rate is 5e-5; at 5e-4 and above five minutes teach it nothing (race.json).
    "transformers": Recipe(
        peers.Transformers, 0.0, 64, 0.1, {}, 0.0, linear, (5e-5, 1e-4, 2e-4, 5e-4)
    ),
}  # fmt: skip
TOWERS = tuple(f"transformers.models.{name}.modeling_{name}" for name in ("vit", "bert"))
IMPORTS = {  # not timed
    "mmkit": ("accelerate.utils", "torch.utils.tensorboard", *TOWERS),
    "open_clip": ("open_clip",),
    "transformers": ("transformers.models.vision_text_dual_encoder", *TOWERS),
}


# -- files ---------------------------------------------------------------------------------------


def write_files(folder: Path) -> None:
    """The training images as PNG files, and pairs.csv with a line per caption."""
    from PIL import Image

    data = mm.openmoji(64)[0]
    with open(folder / "pairs.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filepath", "caption"])
        for row, captions in enumerate(data.texts):
            name = f"{row:04d}.png"
            pixels = data[row]["image"].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / name)
            rows.writerows([name, caption] for caption in captions)


def read_captions(folder: Path) -> dict[str, list[str]]:
    """The captions of each image's file name."""
    found: dict[str, list[str]] = {}
    with open(folder / "pairs.csv", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["filepath"], []).append(row["caption"])
    return found


def decoded(folder: Path, tokenizer) -> mm.MultimodalDataset:
    """All images decoded into memory: the peers' training set."""
    from PIL import Image

    captions = read_captions(folder)
    images = [np.asarray(Image.open(folder / name).convert("RGB")) for name in captions]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return mm.MultimodalDataset.from_pixels(pixels, list(captions.values()), tokenizer=tokenizer)


# -- the clock and the score -----------------------------------------------------------------------


class Clock:
    """Seconds of loading and training, and the scores in the course of it."""

    def __init__(self, every: float, cap: float, name: str):
        self.every, self.cap, self.name = every, cap, name
        self.curve: list[tuple[float, float]] = []
        self.steps, self.scored = 0, -1  # so far, and at the last score
        self.step_end, self.longest = math.inf, 0.0  # of a step, loading its batch included
        self.next, self.off, self.start = every, 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start - self.off

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.off += time.perf_counter() - before

    def note(self, score: Callable[[], float]) -> None:
        """Score the model as it is now, unless that has been done."""
        if self.scored == self.steps:
            return
        self.scored, seconds = self.steps, self.seconds
        with self.stopped():
            self.curve.append((round(seconds, 2), score()))
            print(f"{self.name}  {seconds:6.1f} s  R@1 {100 * self.curve[-1][1]:5.1f} %",
                  flush=True)  # fmt: skip

    def after_step(self, score: Callable[[], float]) -> bool:
        """Score the model if that is due; False when the time is over."""
        self.steps += 1
        self.longest, self.step_end = max(self.longest, self.seconds - self.step_end), self.seconds
        if self.seconds >= self.next:
            self.note(score)
            self.next = self.every * (1 + self.seconds // self.every)
        return self.seconds < self.cap


def r_at_1(model, encode_image: Callable, encode_text: Callable, test) -> float:
    """Mean of both directions, a fraction.

    encode_image(pixels (B, 3, H, W) uint8), encode_text(input_ids (B, L), valid (B, L)): (B, D).
    """
    device = model.logit_scale.device
    input_ids, lengths, _, _ = test.encoded_captions()
    valid = torch.arange(input_ids.shape[1]) < lengths[:, None]
    texts = zip(input_ids.long().split(256), valid.split(256), strict=True)
    with eval_mode(model), autocast_for(PRECISION, device):
        batches = [batch.pixel_values.to(device) for batch in test.batches(256)]
        images = torch.cat([encode_image(pixels).float().cpu() for pixels in batches])
        captions = torch.cat([encode_text(*(x.to(device) for x in t)).float().cpu() for t in texts])
    features = [torch.nn.functional.normalize(x, dim=-1) for x in (images, captions)]
    return mm.mean_recall(mm.recall_at_k(*features, (1,), partners=test.partners()))


# -- mmkit -----------------------------------------------------------------------------------------


class Watched(mm.MaskedMultimodalTrainer):
    """The trainer as it is, with a clock that it checks after each step."""

    def watch(self, clock: Clock, test: mm.MultimodalDataset) -> None:
        self.watching, model = clock, self.model
        test = test.encoded_by(model.tokenizer, model.max_length)
        self.score = lambda: r_at_1(model, model.encode_image, model.encode_text, test)

    def train_step(self, batch, epoch):
        found = super().train_step(batch, epoch)
        if not self.watching.after_step(self.score):
            self.stop()
            self.stopping = True  # now, not at the next record
        return found


def run_mmkit(work: dict, clock: Clock, test, folder: Path) -> dict:
    with tempfile.TemporaryDirectory() as own:
        data = mm.from_table(folder / "pairs.csv", cache_dir=Path(own) / "cache")
        config = mm.TrainingConfig(seed=work["seed"], output_dir=own, run_name="run")
        trainer = Watched(config, data)
        trainer.watch(clock, test)
        trainer.fit()
        clock.note(trainer.score)
    return {"steps": trainer.step, "planned_steps": trainer.total_steps}


# -- the peers -------------------------------------------------------------------------------------


def encoders(peer: peers.Peer) -> tuple[Callable, Callable]:
    """encode_image, encode_text of a peer, as `r_at_1` takes them."""
    model = peer.model

    def pixels_of(pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - 0.5) / 0.5

    def image(pixels: Tensor) -> Tensor:
        if isinstance(peer, peers.OpenClip):
            return model.encode_image(pixels_of(pixels))
        return model.visual_projection(model.vision_model(pixels_of(pixels)).pooler_output)

    def text(ids: Tensor, valid: Tensor) -> Tensor:
        room = (0, peer.length - ids.shape[1])
        ids, valid = (torch.nn.functional.pad(x, room) for x in (ids, valid))
        if isinstance(peer, peers.OpenClip):
            return model.encode_text(ids.masked_fill(ids == peer.end, peer.vocab_size))
        return model.text_projection(model.text_model(ids, valid.long()).pooler_output)

    return image, text


def start_anew(peer: peers.Peer, recipe: Recipe, seed: int, rate: float) -> None:
    """New weights drawn by the seed, and the recipe's optimizer."""
    torch.manual_seed(seed)
    peer.build()
    peer.model.to(peer.device).train()
    parts = peers.groups(peer.model)
    for part in parts:
        part["weight_decay"] = recipe.weight_decay if part["weight_decay"] else 0.0
    peer.optimizer = torch.optim.AdamW(parts, lr=rate, fused=True, **recipe.adamw)


def batches_of(peer: peers.Peer, data, batch_size: int, seed: int) -> Iterator[list[Tensor]]:
    """Batches without end; each epoch in another order, its incomplete last batch dropped."""
    draws = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(data), generator=draws).split(batch_size):
            if len(rows) == batch_size:
                batch = data.batch(rows, torch.rand(batch_size, generator=draws))
                yield [x.to(peer.device) for x in peer.prepare(batch)]


def step_seconds(peer: peers.Peer, batches: Iterator[list[Tensor]]) -> float:
    """Median seconds of a few steps, without the first two."""
    times = []
    for _ in range(TRIAL):
        before = time.perf_counter()
        peer.train_step(*next(batches))
        times.append(time.perf_counter() - before)
    return statistics.median(times[2:])


def run_peer(work: dict, clock: Clock, test, folder: Path, tokenizer) -> dict:
    recipe, seed, rate = RECIPES[work["who"]], work["seed"], work["learning_rate"]
    data = decoded(folder, tokenizer)
    peer = recipe.peer(SIZE, recipe.masked, data, recipe.batch_size, PRECISION)
    data = peer.data
    with clock.stopped():
        start_anew(peer, recipe, seed, rate)
        of_step = step_seconds(peer, batches_of(peer, data, recipe.batch_size, seed))
        test = test.encoded_by(tokenizer, peer.length)
    start_anew(peer, recipe, seed, rate)
    encode = encoders(peer)
    steps = max(1, round((60 * work["minutes"] - clock.seconds) / of_step))
    warmup, done = round(recipe.warmup * steps), 0

    def score() -> float:
        return r_at_1(peer.model, *encode, test)

    for batch in itertools.islice(batches_of(peer, data, recipe.batch_size, seed), steps):
        fraction = recipe.shape(max(0, done - warmup) / max(1, steps - 1 - warmup))
        fraction = (done + 1) / warmup if done < warmup else fraction
        for part in peer.optimizer.param_groups:
            part["lr"] = rate * fraction
        loss, done = peer.train_step(*batch), done + 1
        if not clock.after_step(score) or math.isnan(loss):
            break
    clock.note(score)
    return {"steps": done, "planned_steps": steps, "step_ms": 1000 * of_step}


# -- a run: a process of its own -------------------------------------------------------------------


def one(work: dict) -> None:
    """One run; its results are written to the file that `work` names."""
    who, folder = work["who"], Path(work["folder"])
    for module in IMPORTS[who]:
        importlib.import_module(module)
    test, load = mm.openmoji(64)[2], os.getloadavg()[0]
    name = f"{who}, seed {work['seed']}"
    if who == "mmkit":
        clock = Clock(work["every"], 60 * work["cap"], name)
        found = run_mmkit(work, clock, test, folder)
    else:
        captions = read_captions(folder).values()
        tokenizer = mm.train_wordpiece([text for texts in captions for text in texts])
        name += f", {work['learning_rate']:g}"
        clock = Clock(work["every"], 60 * work["cap"], name)
        found = run_peer(work, clock, test, folder, tokenizer)
    found |= {
        "seconds": clock.curve[-1][0],
        "load_before": load,
        "load_after": os.getloadavg()[0],
    }
    found |= {"longest_step": clock.longest, "curve": clock.curve}
    Path(work["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    one(json.loads(sys.argv[1]))
