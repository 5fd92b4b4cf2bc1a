"""Worker processes are started where they can do their task, and nowhere else."""

import sys
import types

import pytest
import torch

from mmkit.data import workers


class Local:
    """A class of this module."""


@pytest.fixture
def spawned(monkeypatch):
    """As where processes start anew."""
    monkeypatch.setattr(workers, "_start_method", lambda: "spawn")


def test_workers_that_are_forked_are_as_many_as_were_asked_for(monkeypatch):
    monkeypatch.setattr(workers, "_start_method", lambda: "fork")
    assert workers.workers_for(lambda: 0, 3, items=1) == 3


def test_workers_that_start_anew_are_for_many_images(spawned):
    assert workers.workers_for(Local(), 3, items=workers.FEW) == 0
    assert workers.workers_for(Local(), 3, items=workers.FEW + 1) == 3
    assert workers.workers_for(Local(), 0, items=10_000) == 0


def test_a_transform_that_cannot_be_sent_is_used_in_this_process(spawned):
    with pytest.warns(UserWarning, match=r"decoded in this process: .*lambda.*num_workers=0"):
        assert workers.workers_for([lambda image: image], 3, items=10_000) == 0


def test_what_stands_in_a_notebook_cannot_be_sent_however_deep_it_lies(monkeypatch):
    here = types.ModuleType("__main__")  # a notebook's has no file
    exec("class Seen: pass\ndef brighter(image): return image", here.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", here)
    for thing in (here.brighter, [{"transform": here.brighter}], here.Seen()):
        assert "is defined in the notebook" in workers.cannot_be_sent(thing)
    assert workers.cannot_be_sent([Local(), Local, len, torch.zeros(3)]) == ""
    here.__file__ = "a_program.py"
    assert workers.cannot_be_sent([here.brighter]) == ""
