"""How the learning rate, the weights of the terms and the ratios of masks change over a run.

Walk-through: notebooks/03_training.ipynb.
"""

import math
from collections.abc import Callable
from typing import Any


def fraction(name: str, value: Any, where: str) -> float:
    """The value of a schedule as a float; ValueError unless it is a number in [0, 1]."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not -1e-9 <= number <= 1 + 1e-9:  # beyond [0, 1] by rounding only: clipped
        raise ValueError(
            f"{name} gives {value!r} at {where}; it must give a number in [0, 1]: 1 is the full "
            "setting, 0 none of it"
        )
    return min(1.0, max(0.0, number))


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """A straight line from 1 to 0."""
    return 1 - progress


def constant(progress: float) -> float:
    """Always 1: the learning rate stays as it is after the warmup, without `final_lr_fraction`."""
    return 1.0


# name -> f(progress after the warmup, in [0, 1]) in [0, 1]: 1 = peak learning rate, 0 = the final
# one
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
}

# name -> f(fraction of the steps done, in [0, 1]) -> fraction of a term's weight, in [0, 1]
TERM_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "rising": lambda progress: progress,
    "falling": linear,
    "first_half": lambda progress: float(progress < 0.5),
    "last_half": lambda progress: float(progress >= 0.5),
    "last_fifth": lambda progress: float(progress >= 0.8),  # where SigLIP 2 reconstructs
}

# name -> f(start, final, progress in [0, 1], noise (B,)) -> one ratio, or one per sample
RATIO_SCHEDULES: dict[str, Callable[..., Any]] = {
    "constant": lambda start, final, progress, noise: start,
    "linear": lambda start, final, progress, noise: start + (final - start) * progress,
    "cosine": lambda start, final, progress, noise: (
        start + (final - start) * (1 - math.cos(math.pi * progress)) / 2
    ),
    "uniform": lambda start, final, progress, noise: start + (final - start) * noise.cpu().double(),
}
