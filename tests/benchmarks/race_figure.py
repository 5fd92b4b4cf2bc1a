"""Table and figure of race.py: R@1 over seconds, and when 45 % was reached."""

import math
import statistics

from mmkit.plots.figures import BLUE, GREEN, ORANGE, new_figure, plain_axes

TARGET = 0.45  # R@1, mean of both directions
GOALS = {"open_clip": 3.0, "transformers": 6.0}  # their seconds over ours, at least
COLOURS = {"mmkit": BLUE, "open_clip": ORANGE, "transformers": GREEN}
TICKS = (2, 5, 10, 20, 30, 60, 120, 180, 300, 600, 1200)


def reached_at(run: dict) -> float | None:
    """Seconds of the first score at the target; None if there is none."""
    return next((seconds for seconds, score in run["curve"] if score >= TARGET), None)


def raced(runs: list[dict]) -> dict[str, list[dict]]:
    """Each contender's runs over the seeds, of the plan that was run last."""
    found = {}
    for who in COLOURS:
        own = [run for run in runs if run["phase"] == "race" and run["who"] == who]
        plan = ("learning_rate", "minutes", "cap", "every")
        found[who] = [run for run in own if all(run[k] == own[-1][k] for k in plan)]
    return {who: own for who, own in found.items() if own}


def median_seconds(runs: list[dict]) -> tuple[float, bool]:
    """(median seconds to the target, True); if it was not reached, (seconds tried, False)."""
    times = [reached_at(run) or math.inf for run in runs]
    middle = statistics.median(times)
    if math.isinf(middle):
        return min(run["seconds"] for run in runs if reached_at(run) is None), False
    return middle, True


def ratio(who: str, groups: dict[str, list[dict]]) -> str:
    """Their seconds over ours as text: "3.1", "> 8.0" if they did not reach the target, or ""."""
    if "mmkit" not in groups or who == "mmkit":
        return ""
    (ours, there), (theirs, reached) = (median_seconds(groups[name]) for name in ("mmkit", who))
    if not there:
        return ""
    return f"{'' if reached else '> '}{theirs / ours:.1f}"


def table(runs: list[dict], phase: str) -> list[dict]:
    """A row per contender (race), or per learning rate and horizon (search)."""
    if phase == "search":
        return [
            {"who": run["who"], "learning rate": f"{run['learning_rate']:g}",
             "minutes": run["minutes"], "steps": run["steps"], "seconds to 45 %": seconds_text(run),
             "R@1 at the end, %": 100 * run["curve"][-1][1]}
            for run in runs if run["phase"] == "search"
        ]  # fmt: skip
    rows, groups = [], raced(runs)
    for who, own in groups.items():
        middle, reached = median_seconds(own)
        rate = own[0]["learning_rate"]
        rows.append(
            {"who": who, "learning rate": f"{rate:g}" if rate else "default",
             "seconds to 45 %, median": f"{middle:.0f}" if reached else f"> {middle:.0f}",
             "of each seed": ", ".join(map(seconds_text, own)),
             "R@1 at the end, %": ", ".join(f"{100 * run['curve'][-1][1]:.0f}" for run in own),
             "over mmkit's": ratio(who, groups), "goal": GOALS.get(who)}
        )  # fmt: skip
    return rows


def seconds_text(run: dict) -> str:
    """ "152", or "not reached in 360"."""
    seconds = reached_at(run)
    return f"not reached in {run['seconds']:.0f}" if seconds is None else f"{seconds:.0f}"


def label(who: str, groups: dict[str, list[dict]]) -> str:
    """ "open_clip: 310 s (3.1 x)"."""
    middle, reached = median_seconds(groups[who])
    text = f"{who}: {middle:.0f} s" if reached else f"{who}: not reached in {middle:.0f} s"
    times = ratio(who, groups)
    return f"{text} ({times} ×)" if times else text


def draw_figure(runs: list[dict]):
    """A line per seed, a colour per contender; a dot where 45 % was reached."""
    figure, groups = new_figure(7.5, 4.2), raced(runs)
    ax = figure.subplots()
    for who, own in groups.items():
        for number, run in enumerate(own):
            seconds, scores = zip(*run["curve"], strict=True)
            text = None if number else label(who, groups)
            ax.plot(seconds, [100 * score for score in scores], color=COLOURS[who], linewidth=1.5,
                    alpha=0.85, label=text)  # fmt: skip
            if at := reached_at(run):
                score = 100 * dict(map(tuple, run["curve"]))[at]
                ax.plot(at, score, "o", color=COLOURS[who], ms=5)
    ax.axhline(100 * TARGET, color="0.45", linestyle=":", linewidth=1.2, zorder=1)
    ends = [seconds for own in groups.values() for run in own for seconds, _ in run["curve"]]
    if ends:
        ticks = [tick for tick in TICKS if min(ends) / 2 <= tick <= 1.1 * max(ends)]
        ax.set_xscale("log")
        ax.set_xticks(ticks, list(map(str, ticks)))
        ax.minorticks_off()
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("seconds of loading and training, from the image files (log scale)")
    ax.set_ylabel("R@1 on new combinations, %")
    ax.set_title("From image files to R@1 of 45 %: median seconds of the seeds", fontsize=10)
    plain_axes(ax)
    return figure
