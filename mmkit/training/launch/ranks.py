"""The work of each process of a launch: meet the others, compute, save the result or the error.

Walk-through: notebooks/06_many_processes.ipynb.
"""

import io
import os
import pickle
import signal
import sys
import time
import traceback

import torch
import torch.distributed as dist

from ...files import renamed
from ...joint_calls import depart
from .preflight import gpus

_LINGER = 1.0  # seconds
# Modules that take seconds to import. A forked process has those of its parent.
SLOW_IMPORTS = (
    "torch._dynamo",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
    "transformers.models.vit.modeling_vit",
)


def run_rank(job: dict) -> None:
    """Run the function in one rank, and save its result or its error to a file."""
    if os.getpid() == job["parent"]:
        raise RuntimeError(
            "accelerate called the function in this kernel instead of starting processes, as it "
            "does on Colab with fewer than two GPUs; take num_processes=1 here"
        )
    rank = int(os.environ["RANK"])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # end at once, even where Python cannot react
    _speak(rank, job["pipes"])
    try:
        _meet(job)
        fn, args, kwargs = job["call"]
        value = fn(*args, **kwargs)
        depart()
        if rank == 0:
            _send(job, value)
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:
        report = _report(rank, error)
        with renamed(job["folder"] / f"error-{rank}") as file:  # we may be killed at any time
            file.write(report)
        time.sleep(_LINGER)  # a killed rank that caused this error must be noticed first
        raise SystemExit(1) from None


def _speak(rank: int, pipes: dict[str, tuple[int, int]]) -> None:
    """Show the output of rank 0 line by line; of the other ranks, which repeat it, only stderr.

    pipes: to the "stdout" and "stderr" that only the parent has.
    """
    for name, (source, way) in pipes.items():
        os.close(source)  # or writing would wait forever once the parent is gone
        setattr(sys, name, open(way, "w", buffering=1, encoding="utf-8", closefd=False))
    if rank:
        sys.stdout = open(os.devnull, "w")
        os.dup2(sys.stdout.fileno(), 1)  # C's stdout
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


def _meet(job: dict) -> None:
    from accelerate.state import PartialState

    seen, expected = PartialState(cpu=not gpus()).num_processes, job["processes"]
    if seen != expected:  # or every process would silently train a model of its own
        raise RuntimeError(f"{expected} processes were asked for, each sees {seen}")
    torch.set_num_threads(job["threads"])


def _send(job: dict, value) -> None:
    imported = [name for name in SLOW_IMPORTS if name in sys.modules]
    try:
        torch.save({"value": value, "imported": imported}, job["folder"] / "result")
    except Exception as error:
        raise TypeError(
            f"the function returned {type(value).__qualname__}, which cannot be sent back "
            f"({error}); return numbers, text, tensors, lists of them or a Run, or write a file"
        ) from error


def _report(rank: int, error: BaseException) -> bytes:
    """Time, rank, one-line message, traceback, and the error itself where it can be pickled."""
    what = "".join(traceback.format_exception_only(error)).strip()
    try:
        original = pickle.dumps(error)
        pickle.loads(original)
    except Exception:
        original = b""
    return pickle.dumps((time.monotonic(), rank, what, traceback.format_exc(), original))
