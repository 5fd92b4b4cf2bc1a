"""A launch is refused where an Accelerator was made: the tests of launches start without one."""

import pytest


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    """Isolate from what other tests have trained in this process."""
    from accelerate.state import AcceleratorState, PartialState

    for state in (AcceleratorState, PartialState):
        monkeypatch.setattr(state, "_shared_state", {})
