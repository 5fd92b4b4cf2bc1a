"""What every pytest run needs, `pytest --nbmake notebooks/` alone included."""

import os
import sys
from pathlib import Path

import pytest

# Kernels that nbmake starts inherit these.
os.environ.setdefault("MMKIT_FAST", "1")  # MMKIT_FAST=0 runs the notebooks in full
# Asking whether there is a GPU must not start CUDA: a later fork would die.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as mmkit sets it
tensorboard = Path(sys.executable).with_name("tensorboard")
if tensorboard.exists():  # else %tensorboard shows an error, which nbmake does not see
    os.environ.setdefault("TENSORBOARD_BINARY", str(tensorboard))


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` where there is no CUDA GPU, and say so."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch  # only now: collecting stays quick

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; none here"))
