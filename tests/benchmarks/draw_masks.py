"""What drawing masks costs, compared with a training step of the tiny encoder and with other kits.

    python -m tests.benchmarks.draw_masks      # about four minutes on two CPU cores
    pip install -e ".[bench]"                  # the other kits; if missing, they are left out

One run times everything in turns, round after round, in another order each, and takes medians: a
busy machine then slows all alike, and only ratios count. There are 1,024 real images of 14 x 14
patches and their captions; masks are drawn by `mm.masking.draw_maskings`, noise included, at once
and, as in the trainer, in 8 batches of 128. A fraction is the SLOWEST of a masker's timings (any
ratio, either way) over 8 training steps: a = tiny as it is (64 px, so that masks of 196 patches are
compared with a step of 64: stricter than in use), b = the same towers on 112 px, 196 patches.
Maskers that use a model do so as in the trainer (its moving average, half resolution), at the
step's own size, and the update of the moving average counts for them. Writes
results/draw_masks.json and .png.
"""

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import platform
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

import mmkit as mm
from mmkit.device import autocast_for
from mmkit.masking.image import ATTENTION_MASKERS, IMAGE_MASKERS
from mmkit.masking.plan import draw_maskings, mask_ratios
from mmkit.masking.text import TEXT_MASKERS
from mmkit.models.attention import class_attention
from mmkit.models.patches import pick_tokens
from mmkit.models.presets import PRESETS
from mmkit.plots.figures import BLUE, ORANGE, RED, SKY
from tests.benchmarks.places import FOLDER

NUM_IMAGES, BATCH = 1024, 128
STEPS = NUM_IMAGES // BATCH
SIDES = {"64 px": "a", "112 px": "b"}
VARIED = "50 to 75 %"
RATIOS = {"50 %": 0.5, "75 %": 0.75, VARIED: None}  # the last: each image has its own ratio
ANY = "any ratio"  # of the maskers that use none
AT_ONCE, IN_BATCHES = "1,024 at once", "8 x 128"
TIMES_8 = "1 x 128, times 8"  # slow ones: one batch per round, counted 8 times
GOALS = {"random": 2, "cluster": 15, "attentive": 20, "inattentive": 20}  # % of a step; others 10

Calls = dict[tuple[str, ...], Callable[[], object]]


# -- what is timed -----------------------------------------------------------------------------


def tiny(side: int, tokenizer) -> mm.MultimodalEncoder:
    """The tiny encoder for images of another side: more patches, the same towers."""
    from transformers import ViTConfig

    model = mm.MultimodalEncoder.preset("tiny", tokenizer=tokenizer)
    vit = ViTConfig(**model.vit.config.to_dict() | {"image_size": side})
    return mm.MultimodalEncoder(vit, model.bert.config, tokenizer, PRESETS["tiny"]["embed_dim"])


def trainers(side: int, data, folder: str) -> dict[str, mm.MaskedMultimodalTrainer]:
    """Two trainers of one recipe, half of the patches masked: by noise, or by attention."""
    model = tiny(side, data.tokenizer)
    settings = dict(batch_size=BATCH, image_mask_ratio=0.5, output_dir=folder)
    return {
        masker: mm.MaskedMultimodalTrainer(
            mm.TrainingConfig(image_mask=masker, **settings), data, model=model
        )
        for masker in ("random", "attentive")
    }


def ratio_of(label: str, sample_ids: Tensor) -> float | Tensor:
    """The ratio of that name; drawing one per image is timed, too."""
    if label != VARIED:
        return RATIOS[label]
    return mask_ratios("uniform", 0.5, 0.75, 0.0, sample_ids, seed=0, epoch=0)


def both_ways(draw: Callable, name: str, label: str, batch: mm.Batch) -> Calls:
    """draw(batch) for all images at once, and batch by batch as in training."""
    batches = batch.split(STEPS)
    return {
        (name, label, AT_ONCE): lambda: draw(batch),
        (name, label, IN_BATCHES): lambda: [draw(part) for part in batches],
    }


def image_calls(model, batch: mm.Batch, layers) -> Calls:
    """Every image masker that uses no model."""
    painted = torch.zeros(14, 14, dtype=torch.bool)
    painted[2:12, 2:12] = True  # 100 of 196
    calls: Calls = {}
    for name in IMAGE_MASKERS:
        if name in ATTENTION_MASKERS:
            continue
        for label in [ANY] if name in ("layers", "painted") else RATIOS:

            def draw(part, name=name, label=label):
                by = 0.5 if label == ANY else ratio_of(label, part.sample_ids)
                by = painted if name == "painted" else by
                return draw_maskings(
                    part, model.token_info, seed=0, epoch=0, image=(name, by), layers=layers
                )

            calls |= both_ways(draw, f"image {name}", label, batch)
    return calls


def text_calls(model, batch: mm.Batch, frequency: Tensor) -> Calls:
    """Every text masker; and BERT's 80/10/10, which also draws what replaces a token."""
    calls: Calls = {}
    tokens = dataclasses.replace(model.token_info, frequency=frequency)
    choices = [(name, label, "replace") for name in TEXT_MASKERS for label in RATIOS]
    for name, label, mode in [*choices, ("random", "50 %", "80/10/10")]:

        def draw(part, name=name, label=label, mode=mode):
            by = (name, ratio_of(label, part.sample_ids))
            return draw_maskings(part, tokens, seed=0, epoch=0, text=by, text_mode=mode)

        calls |= both_ways(draw, f"text {name}{', 80/10/10' * (mode != 'replace')}", label, batch)
    return calls


def attention_calls(trainer: mm.MaskedMultimodalTrainer, batch: mm.Batch) -> Calls:
    """The work of the attentive maskers in the trainer, and its cost at full resolution."""
    model, ema, batches = trainer.model, trainer.attention_ema, itertools.cycle(batch.split(STEPS))
    side = f"{model.image_size} px"

    def look(half):
        with autocast_for(trainer.config.mixed_precision, trainer.device):
            pixels = model.normalize(next(batches).pixel_values)
            return class_attention(ema.module, pixels, half, model.pooling)

    def draw(name, label):
        part = next(batches)
        by = (name, ratio_of(label, part.sample_ids))
        return draw_maskings(part, trainer.plan.tokens, seed=0, epoch=0, image=by)

    calls: Calls = {
        ("EMA update", side, TIMES_8): lambda: ema.update(model.vit),
        ("attention", side, "half resolution", TIMES_8): lambda: look(True),
        ("attention", side, "full resolution", TIMES_8): lambda: look(False),
    }
    for name, label in itertools.product(ATTENTION_MASKERS, RATIOS):
        calls[f"image {name}", label, side, TIMES_8] = partial(draw, name, label)
    return calls


def step_calls(both: dict[str, mm.MaskedMultimodalTrainer], batch: mm.Batch) -> Calls:
    """One training step per call, on the batches in turn (captions differ in length)."""
    calls: Calls = {}
    for masker, trainer in both.items():
        batches = itertools.cycle(batch.split(STEPS))
        trainer.net.train()

        def step(trainer=trainer, batches=batches):
            return trainer.train_step(next(batches), 0)

        calls["training step", masker, f"{trainer.model.image_size} px", TIMES_8] = step
    return calls


# -- the others --------------------------------------------------------------------------------


def open_clip_calls(batch: mm.Batch, model) -> Calls:
    """PatchDropout and the text maskers of open_clip."""
    from open_clip.tokenizer import random_mask_tokenize, simple_mask_tokenize
    from open_clip.transformer import PatchDropout

    calls: Calls = {}
    wide, narrow = torch.randn(NUM_IMAGES, 197, 192), torch.randn(NUM_IMAGES, 197, 1)
    for label in ("50 %", "75 %"):
        drop = PatchDropout(RATIOS[label]).train()
        calls["open_clip PatchDropout, width 1", label] = partial(drop, narrow)
        calls["open_clip PatchDropout, width 192", label] = partial(drop, wide)
        calls["random + pick_tokens, width 192", label] = partial(
            drop_tokens, batch, model, RATIOS[label], wide
        )
    # Captions are looked up, not encoded, so that only the masking is timed.
    special = model.special_ids.tolist()
    tokens = [[i for i in row if i not in special] for row in batch.input_ids.tolist()]
    length = 2 + round(statistics.mean(map(len, tokens)) / 2)
    for name, mask in (("random", random_mask_tokenize), ("simple", simple_mask_tokenize)):
        calls[f"open_clip {name}_mask_tokenize", "50 %"] = partial(
            mask, range(NUM_IMAGES), length, 0, 1, tokens.__getitem__
        )
    return calls


def drop_tokens(batch: mm.Batch, model, mask_ratio: float, tokens: Tensor) -> Tensor:
    """What PatchDropout does, done by mmkit: class token and kept patches of (B, 1 + N, D)."""
    masking, _ = draw_maskings(
        batch, model.token_info, seed=0, epoch=0, image=("random", mask_ratio)
    )
    return torch.cat([tokens[:, :1], pick_tokens(tokens[:, 1:], masking.ids_keep)], 1)


def lightly_calls() -> Calls:
    """lightly's generators; blocks and inverse blocks are drawn image by image there."""
    from lightly.models import utils

    calls: Calls = {}
    size, grid = (NUM_IMAGES, 197), (NUM_IMAGES, 14, 14)
    for label in ("50 %", "75 %"):
        by = RATIOS[label]
        calls["lightly random_token_mask", label] = partial(utils.random_token_mask, size, by)
        calls["lightly random_block_mask", label] = partial(
            utils.random_block_mask, grid, 1.0, by, by
        )
        calls["lightly random_inverse_block_mask", label] = partial(
            utils.random_inverse_block_mask, size, by
        )
        calls["lightly random_grid_token_mask", label] = partial(
            utils.random_grid_token_mask, size, by, grid_size=2
        )
    return calls


# the other kit's -> ours, and how the two differ
COMPARED = {
    "open_clip PatchDropout, width 1": (
        "image random",
        "indices by topk of CPU noise, and the gather of one number per token",
    ),
    "open_clip PatchDropout, width 192": (
        "random + pick_tokens, width 192",
        "indices and the gather of (1024, 197, 192) float32, on both sides",
    ),
    "lightly random_token_mask": ("image random", "kept and masked indices by one argsort"),
    "lightly random_block_mask": ("image block", "DINOv2's rectangles, a loop over images"),
    "lightly random_inverse_block_mask": (
        "image inverse_block",
        "CAPI's, one rectangle kept, a loop over images; ours keeps many of 3 x 3",
    ),
    "lightly random_grid_token_mask": (
        "image grid",
        "Pixio's, 2 x 2 patches go together at random; ours is a regular grid",
    ),
    "open_clip random_mask_tokenize": ("text random", "ids only, a loop over captions"),
    "open_clip simple_mask_tokenize": ("text block", "ids only, a loop over captions"),
}


def peers(batch: mm.Batch, model) -> tuple[Calls, dict[str, str]]:
    """The calls of the installed kits; every kit's version, or why it is left out."""
    calls, versions = {}, {}
    for package, make in (
        ("open_clip_torch", lambda: open_clip_calls(batch, model)),
        ("lightly", lightly_calls),
    ):
        try:
            calls |= make()
            versions[package] = version(package)
        except (ImportError, AttributeError) as missing:  # not there, or too old
            versions[package] = f"left out ({missing})"
    return calls, versions


# -- timing ------------------------------------------------------------------------------------


def time_all(calls: Calls, rounds: int) -> dict[tuple[str, ...], list[float]]:
    """Milliseconds per 1,024 images of every call in every round, in another order each."""
    times: dict[tuple[str, ...], list[float]] = {name: [] for name in calls}
    for number in range(-1, rounds):  # one more, to warm up
        order = random.Random(number).sample(list(calls), len(calls))
        for name in order:
            start = time.perf_counter()
            calls[name]()
            times[name].append(1000 * (time.perf_counter() - start))
        print(f"round {max(0, number + 1)} of {rounds}", flush=True)
    return {
        name: [(STEPS if name[-1] == TIMES_8 else 1) * value for value in values[1:]]
        for name, values in times.items()
    }


# -- tables ------------------------------------------------------------------------------------


def masker_rows(ms: dict[tuple[str, ...], float]) -> list[dict]:
    """One row per masker: milliseconds, fractions of 8 training steps in per cent, the goal."""
    rows = []
    for name in dict.fromkeys(key[0] for key in ms if key[0].startswith(("image ", "text "))):
        row: dict = {"masker": name}
        of_name = {key[1:]: value for key, value in ms.items() if key[0] == name}
        looks = name.removeprefix("image ") in ATTENTION_MASKERS
        for label in (*RATIOS, ANY):
            row[label] = of_name.get((label, "112 px", TIMES_8) if looks else (label, AT_ONCE))
        for side, letter in SIDES.items():
            slowest = max(v for key, v in of_name.items() if not looks or side in key)
            if looks:
                slowest += ms["EMA update", side, TIMES_8]
            step = ms["training step", "random", side, TIMES_8]
            row |= {f"slowest, {letter}": slowest, f"fraction of {letter}": 100 * slowest / step}
        row["goal"] = GOALS.get(re.split(r"[ ,]+", name)[1], 10)
        reached = max(row[f"fraction of {letter}"] for letter in SIDES.values()) < row["goal"]
        row["verdict"] = "reached" if reached else "not reached"
        rows.append(row)
    return rows


def peer_rows(ms: dict[tuple[str, ...], float]) -> list[dict]:
    """One row per generator of another kit, beside ours at the same ratio."""
    rows = []
    for key in sorted(ms):
        if key[0] in COMPARED:
            ours, note = COMPARED[key[0]]
            mine = ms.get((ours, key[1])) or ms[ours, key[1], AT_ONCE]
            times = {"their ms": ms[key], "our ms": mine, "ours / theirs": mine / ms[key]}
            rows.append({"theirs": key[0], "ratio": key[1], "ours": ours, **times, "note": note})
    return rows


def show(rows: list[dict]) -> None:
    """A table in plain text."""
    cells = [list(rows[0]), *([shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print(
            "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        )


def shown(value) -> str:
    """A number with one figure after the point, two below one; nothing for None."""
    if isinstance(value, float):
        return f"{value:.1f}" if value >= 1 else f"{value:.2f}"
    return "" if value is None else str(value)


def rounded(row: dict) -> dict:
    """The row with its numbers to a thousandth."""
    return {
        key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()
    }


def draw_figure(rows: list[dict], others: list[dict]):
    """Fractions of a training step with their goals; our times over those of other kits."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(1, 2 if others else 1, squeeze=False)[0]
    draw_fractions(axes[0], rows)
    if others:
        draw_ratios(axes[1], others)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure


def draw_fractions(ax, rows: list[dict]) -> None:
    """Two bars per masker, its fraction of either step in per cent, and a mark at the goal."""
    positions = range(len(rows))[::-1]
    for letter, shift, colour, label in (
        ("a", 0.2, SKY, "of a: 64 px, 64 patches"),
        ("b", -0.2, BLUE, "of b: 112 px, 196 patches"),
    ):
        fractions = [row[f"fraction of {letter}"] for row in rows]
        drawn = ax.barh([y + shift for y in positions], fractions, 0.38, color=colour, label=label)
        ax.bar_label(drawn, fmt="%.2f", padding=3, fontsize=7)
    goals = [row["goal"] for row in rows]
    ax.plot(goals, positions, "|", color=RED, ms=13, mew=2, ls="", label="goal: at most this")
    ax.set_yticks(positions, [row["masker"] for row in rows], fontsize=8)
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.set_xlabel(f"drawing masks for {NUM_IMAGES:,} images, % of {STEPS} training steps")
    ax.set_title("Fraction of a training step (tiny encoder, batch 128)", fontsize=10)
    ax.legend(fontsize=8, loc="lower right")


def draw_ratios(ax, others: list[dict]) -> None:
    """A bar from 1 for each generator of another kit, to the left if ours takes less time."""
    positions = range(len(others))[::-1]
    for y, row in zip(positions, others, strict=True):
        ratio = row["ours / theirs"]
        ax.barh(y, ratio - 1, 0.6, left=1, color=BLUE if ratio < 1 else ORANGE)
        label = f"{ratio:.2g}  ({shown(row['our ms'])} : {shown(row['their ms'])} ms)"
        ax.annotate(label, (max(ratio, 1), y), (4, 0), textcoords="offset points", va="center",
                    fontsize=7)  # fmt: skip
    ax.axvline(1, color="0.3", linewidth=0.8)
    ax.set_yticks(positions, [f"{row['theirs']}\n{row['ratio']}" for row in others], fontsize=7)
    ax.set_ylim(-0.7, len(others) - 0.3)
    ax.set_xscale("log")
    ax.margins(x=0.25)
    ticks = [0.1, 0.2, 0.5, 1, 2, 5]
    ax.set_xticks(ticks, list(map(str, ticks)))
    ax.minorticks_off()
    ax.set_xlabel("mmkit's time / the other kit's time (log scale; below 1 mmkit is faster)")
    ax.set_title("Compared with other kits", fontsize=10)


# -- the run -----------------------------------------------------------------------------------


def machine() -> dict:
    """The machine that the numbers come from."""
    names = []
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def gather(folder: str) -> tuple[Calls, dict[str, str], str]:
    """Everything that is timed, the versions of the other kits, and the steps' number type."""
    calls: Calls = {}
    rows = torch.randperm(2800, generator=torch.Generator().manual_seed(0))[:NUM_IMAGES]
    for side in (64, 112):
        data = mm.openmoji(side)[0]
        both, batch = trainers(side, data, folder), data.batch(rows)
        calls |= step_calls(both, batch) | attention_calls(both["attentive"], batch)
    model = both["random"].model
    calls |= image_calls(model, batch, data.layers)
    calls |= text_calls(model, batch, data.token_frequency())
    others, versions = peers(batch, model)
    return calls | others, versions, str(both["random"].precision or "float32")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="rounds for the medians")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the results")
    options = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        calls, versions, precision = gather(folder)
        times = time_all(calls, options.rounds)
    ms = {key: statistics.median(values) for key, values in times.items()}
    rows, others = masker_rows(ms), peer_rows(ms)
    print("\nMasks for 1,024 images of 196 patches and their captions: ms, and % of 8 steps\n")
    show(rows)
    if others:
        print("\nCompared with other kits, 1,024 images or captions at once\n")
        show(others)
    print("\nThe moving average, its attention, and whole training steps: ms\n")
    rest = [key for key in ms if key[0] in ("training step", "attention", "EMA update")]
    show([{"what": ", ".join(key), "median ms": ms[key]} for key in sorted(rest)])
    print(f"\n{', '.join(f'{name}: {number}' for name, number in versions.items())}")
    about |= {"precision": precision, "rounds": options.rounds, "load_after": os.getloadavg()[0]}
    options.output.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": about | versions,
        "maskers": [rounded(row) for row in rows],
        "other_kits": [rounded(row) for row in others],
        "milliseconds": {
            " / ".join(key): rounded(
                {"median": ms[key], "fastest": min(values), "slowest": max(values)}
            )
            for key, values in times.items()
        },
    }
    path = options.output / "draw_masks.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    draw_figure(rows, others).savefig(path.with_suffix(".png"), dpi=110)
    print(f"written: {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
