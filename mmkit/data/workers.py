"""Worker processes: how many can be started for a task, on systems that fork and on others.

Linux forks: a worker has all that its parent has. On macOS and Windows it starts anew, gets its
task pickled, and has nothing that was defined in a notebook.
Walk-through: notebooks/01_data.ipynb.
"""

import io
import multiprocessing
import pickle
import sys
import warnings
from typing import Any

FEW = 500  # items; to decode more takes longer than a new process needs to import torch


def workers_for(task: Any, wanted: int, items: int) -> int:
    """How many of the `wanted` workers are started for a task of so many items.

    Where processes are not forked: none for a few items, and none, with a warning, for a task that
    cannot be sent to them.
    """
    if wanted == 0 or _start_method() == "fork":
        return wanted
    if items <= FEW:
        return 0
    if why := cannot_be_sent(task):
        warnings.warn(
            f"images are decoded in this process: worker processes start anew on this system, and "
            f"{why}; put it into a .py file beside the notebook and import it, or set "
            "num_workers=0",
            stacklevel=2,
        )
        return 0
    return wanted


def _start_method() -> str:
    """How a DataLoader starts its workers; asking does not fix it."""
    chosen = multiprocessing.get_start_method(allow_none=True)
    return chosen or multiprocessing.get_all_start_methods()[0]


def cannot_be_sent(task: Any) -> str:
    """The reason why a new process cannot be given an object; "" where it can."""
    try:
        _Sent(io.BytesIO()).dump(task)
    except Exception as error:  # whatever a __reduce__ raises
        return str(error)
    return ""


class _Sent(pickle.Pickler):
    def reducer_override(self, value):
        """Refuse what stands in the notebook itself, which pickle only names."""
        here = getattr(value, "__module__", None) == "__main__" and hasattr(value, "__qualname__")
        if here and not hasattr(sys.modules["__main__"], "__file__"):
            raise pickle.PicklingError(f"{value.__qualname__} is defined in the notebook")
        return NotImplemented
