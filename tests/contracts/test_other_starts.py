"""A launch where processes are not forked, and on Colab."""

import sys
import types

import pytest

import mmkit as mm
from mmkit.distributed import rank_and_world_size
from mmkit.training.launch import notebook, preflight
from tests.launched import who


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    """Isolate from what other tests have trained in this process."""
    from accelerate.state import AcceleratorState, PartialState

    for state in (AcceleratorState, PartialState):
        monkeypatch.setattr(state, "_shared_state", {})


def test_processes_are_forked_on_linux_only(monkeypatch):
    for system in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", system)
        assert preflight.start_method() == "spawn"
    with pytest.raises(RuntimeError, match=r"lambda.* cannot be sent to the processes.*\.py file"):
        mm.launch(lambda: 1, num_processes=2)


@pytest.mark.slow
def test_a_launch_works_where_processes_start_anew(monkeypatch):
    monkeypatch.setattr(notebook, "start_method", lambda: "spawn")
    monkeypatch.setattr(preflight, "start_method", lambda: "spawn")
    word, (rank, processes), _ = mm.launch(who, "hello", num_processes=2)
    assert (word, rank, processes) == ("hello", 0, 2)


@pytest.mark.slow
def test_a_launch_starts_two_processes_on_colab_too(monkeypatch):
    """accelerate would call the function in the kernel."""
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    assert mm.launch(lambda: rank_and_world_size(), num_processes=2) == (0, 2)
