"""Generators and global flags of a run, separate from those of its caller.

Walk-through: notebooks/05_checkpoints.ipynb.
"""

import contextlib
import functools
import os
import random
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ..joint_calls import joint


def random_state() -> dict:
    """The state of every generator that a step may draw from, as plain values and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_initialized():  # reading the state would start CUDA, on the first GPU
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Restore what `random_state` saved."""
    torch.set_rng_state(state["torch"].cpu())
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """A context that restores the state of the generators at its end."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


class OwnState:
    """Generators and global flags of a training run, separate from those of its caller.

    `inside()` puts the run's state in place, `outside()` (for callbacks) the caller's. Both restore
    what they found, and do nothing where the right state is in place already.

    Args:
        deterministic: use deterministic algorithms inside.
    """

    def __init__(self, deterministic: bool):
        self._deterministic = deterministic
        self._inside = False
        self._other: dict | None = None  # the state of the generators that is not in place

    def inside(self) -> contextlib.AbstractContextManager:
        """A context in which the run's own state is in place."""
        return contextlib.nullcontext() if self._inside else self._swapped()

    def outside(self) -> contextlib.AbstractContextManager:
        """A context in which the caller's state is in place."""
        return self._swapped() if self._inside else contextlib.nullcontext()

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def cuda_has_started(self) -> None:
        """Note the state of CUDA's generators, just started, as the caller's."""
        if self._other is not None and "every cuda" not in self._other:
            self._other |= self._cuda()

    @staticmethod
    def _cuda() -> dict:
        return {"every cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_initialized() else {}

    def _swap(self) -> None:
        now = random_state() | self._cuda()
        if self._other is not None:
            set_random_state(self._other)
            if "every cuda" in self._other:
                torch.cuda.set_rng_state_all(self._other["every cuda"])
        self._other, self._inside = now, not self._inside
        if not self._deterministic:  # the caller's setting holds in the run, too
            return
        if self._inside:
            self._asked = torch.are_deterministic_algorithms_enabled()
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        if not self._asked:
            torch.use_deterministic_algorithms(self._inside, warn_only=self._inside)


Method = TypeVar("Method", bound=Callable[..., Any])


def with_own_state(method: Method) -> Method:
    """Decorate a method to draw from the run's own generators and not from the caller's.

    All processes must call the method.
    """

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with self.own_state.inside(), joint(f"the trainer's {method.__name__}"):
            return method(self, *args, **kwargs)

    return cast(Method, run)


def random_states(device: torch.device) -> list[Tensor]:
    """The state of the generators that dropout draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    elif device.type == "mps":
        states.append(torch.mps.get_rng_state())
    return states


def set_random_states(states: list[Tensor], device: torch.device):
    """Restore what `random_states` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states[1])
