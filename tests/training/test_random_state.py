"""A run draws from generators of its own, which go on where they were, as do its caller's."""

import random

import numpy as np
import torch

from mmkit.files import write_atomically
from mmkit.models.checkpoint import read_checkpoint
from mmkit.training.random_state import OwnState, random_state, random_state_kept, set_random_state


def draws(count: int) -> list[tuple]:
    return [(float(torch.rand(())), np.random.rand(), random.random()) for _ in range(count)]


def seed(number: int):
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def test_what_is_drawn_in_between_moves_nothing():
    seed(3)
    expected = draws(2)
    seed(3)
    found = draws(1)
    with random_state_kept():
        seed(7)
        draws(5)
    assert found + draws(1) == expected


def test_draws_of_a_run_and_of_its_caller_do_not_move_each_other():
    """Both go on where they were, however often and deeply they alternate, also after an error."""
    seed(3)
    caller = draws(5)
    seed(7)
    run = draws(4)
    own, found = OwnState(deterministic=False), []
    with own.inside():
        seed(7)
    seed(3)
    found += draws(1)
    try:
        with own.inside():
            assert draws(1) == run[:1]
            with own.outside():
                found += draws(2)
                with own.inside(), own.inside():
                    assert draws(2) == run[1:3]
                found += draws(1)
            raise KeyError
    except KeyError:
        assert found + draws(1) == caller
    with own.inside():
        assert draws(1) == run[3:]


def test_random_state_goes_through_a_file(tmp_path):
    """Python, NumPy and torch draw the same numbers after the state went to disk and back."""
    import numpy as np

    write_atomically(random_state(), tmp_path / "random.pth")
    drawn = random.random(), np.random.rand(), torch.rand(3)
    set_random_state(read_checkpoint(tmp_path / "random.pth"))
    again = random.random(), np.random.rand(), torch.rand(3)
    assert drawn[:2] == again[:2] and torch.equal(drawn[2], again[2])
