"""The figure of exact_step.py: memory, time, several processes, the gradient."""

import random

from mmkit.plots.figures import BLUE, GREEN, ORANGE, RED, SKY
from tests.benchmarks.step_memory import BATCHES, MICRO

PRECISIONS = {"no": "float32", "bf16": "bf16"}
TARGETS = {"memory": 1.25, "time": 1.4, "processes": 0.9}


def draw_figure(parts: dict):
    """Memory, time, processes, gradient: those that were measured."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 8.5), layout="constrained")
    axes = figure.subplots(2, 2).flat
    drawings = (draw_memory, draw_time, draw_processes, draw_gradient)
    for ax, draw in zip(axes, drawings, strict=True):
        draw(ax, parts)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure


def draw_memory(ax, parts: dict) -> None:
    """Peak memory over the batch, in micro-batches and in one pass; both start at 256 pairs."""
    for precision, colours in (("no", (BLUE, ORANGE)), ("bf16", (SKY, RED))):
        rows = parts.get(f"memory-{precision}", [])
        for whole, colour in zip((False, True), colours, strict=True):
            chosen = [r for r in rows if r["batch"] == MICRO or (r["micro-batches"] == 1) == whole]
            label = "in one pass" if whole else f"in micro-batches of {MICRO}"
            ax.plot([r["batch"] for r in chosen], [r["peak"] / 1000 for r in chosen], "o-",
                    color=colour, label=f"{PRECISIONS[precision]}, {label}")  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(BATCHES, [f"{b:,}" for b in BATCHES])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("images per step (log scale)")
    ax.set_ylabel("peak memory of the process (GB)")
    ax.set_title("Memory grows with the micro-batch, not with the batch", fontsize=10)
    ax.legend(fontsize=8)


def draw_time(ax, parts: dict) -> None:
    """Exact over naive accumulation, whole steps: median and quartiles."""
    counts = sorted({r["micro-batches"] for p in PRECISIONS for r in parts.get(f"time-{p}", [])})
    styles = [("no", 128, BLUE), ("no", 256, SKY), ("bf16", 128, RED), ("bf16", 256, ORANGE)]
    for i, (precision, batch, colour) in enumerate(styles):
        rows = [r for r in parts.get(f"time-{precision}", []) if r["batch"] == batch]
        middle = [r["step exact/naive median"] for r in rows]
        ends = [
            [m - r["step exact/naive lower"] for m, r in zip(middle, rows, strict=True)],
            [r["step exact/naive upper"] - m for m, r in zip(middle, rows, strict=True)],
        ]
        positions = [counts.index(r["micro-batches"]) + 0.12 * (i - 1.5) for r in rows]
        label = f"{PRECISIONS[precision]}, batch {batch}"
        ax.errorbar(positions, middle, ends, fmt="o", color=colour, capsize=3, label=label)
    ax.axhline(TARGETS["time"], color=RED, linewidth=1, linestyle="--")
    ax.annotate("limit", (-0.35, TARGETS["time"]), (0, 3), textcoords="offset points", fontsize=8)
    ax.axhline(1, color="0.3", linewidth=0.8)
    ax.set_xticks(range(len(counts)), list(map(str, counts)))
    ax.set_xlim(-0.4, max(1, len(counts)) - 0.6)
    ax.set_ylim(0.9, 1.6)
    ax.set_xlabel("micro-batches per step")
    ax.set_ylabel("time of an exact step / of a naive one")
    ax.set_title("The price of exactness (bars: quartiles)", fontsize=10)
    ax.legend(fontsize=8, loc="upper left", ncols=2, bbox_to_anchor=(0, 0.93))


def draw_processes(ax, parts: dict) -> None:
    """Every round's ratio of two processes to one, and the median."""
    for x, (optimizer, colour) in enumerate((("muon", BLUE), ("adamw", GREEN))):
        found = parts.get("processes", {}).get(f"two / one, {optimizer}")
        if found:
            shifts = random.Random(0).choices([i / 100 for i in range(-12, 13)], k=99)
            positions = [x + s for s, _ in zip(shifts, found["rounds"], strict=False)]
            ax.plot(positions, found["rounds"], "o", color=colour, alpha=0.4, ms=5)
            ax.plot([x - 0.25, x + 0.25], [found["median"]] * 2, color=colour, linewidth=2.5)
            label = f"median {found['median']:.2f}"
            ax.annotate(label, (x + 0.27, found["median"]), va="center", fontsize=9)
    ax.axhline(TARGETS["processes"], color=RED, linewidth=1, linestyle="--")
    ax.annotate("at least", (-0.45, TARGETS["processes"]), (0, 3), textcoords="offset points",
                fontsize=8)  # fmt: skip
    ax.axhline(1, color="0.3", linewidth=0.8)
    ax.set_xticks((0, 1), ("Muon (the default)", "AdamW"))
    ax.set_xlim(-0.5, 1.7)
    ax.set_ylabel("images per second, two processes / one")
    ax.set_title("Two processes of one thread against one of two (one dot per round)", fontsize=10)


def draw_gradient(ax, parts: dict) -> None:
    """Cosine to the true gradient over the number of micro-batches."""
    rows = parts.get("gradient", [])
    ax.set_xscale("log", base=2)
    for state, colour in (("at the start", ORANGE), ("after one epoch", RED)):
        chosen = [r for r in rows if r["model"] == state]
        counts = [r["micro-batches"] for r in chosen]
        ax.plot(counts, [r["naive cosine"] for r in chosen], "o-", color=colour,
                label=f"naive, {state}")  # fmt: skip
    if rows:
        largest = max(r["exact error, largest"] for r in rows)
        ax.plot(counts, [1] * len(counts), "o-", color=BLUE,
                label=f"exact (relative error at most {largest:.0e})")  # fmt: skip
        ax.set_xticks(counts, list(map(str, counts)))
    ax.set_ylim(0, 1.05)
    ax.set_xlabel("micro-batches of a batch of 128 (log scale)")
    ax.set_ylabel("cosine to the gradient of the whole batch")
    ax.set_title("What naive accumulation loses", fontsize=10)
    ax.legend(fontsize=8, loc="lower left")
