"""Start several processes from a notebook, show the output of rank 0 and return its result.

Each process is a rank.
Walk-through: notebooks/06_many_processes.ipynb.
"""

import codecs
import contextlib
import contextvars
import gc
import importlib
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from ...files import WINDOWS
from .preflight import gpus, preflight, start_method
from .ranks import run_rank

_needed: set[str] = set()  # slow imports that an earlier launch used


def launch(
    fn: Callable,
    *args,
    num_processes: int = 1,
    port: int | None = None,
    child: bool = False,
    **kwargs,
):
    """Run `fn(*args, **kwargs)` in several processes of this machine; returns rank 0's result.

    Works in a notebook (accelerate's notebook_launcher forks, so that `fn` may be defined in a
    cell), on GPUs (one process each) or on a CPU (gloo). The output of rank 0 is shown while it
    runs; of the other ranks only stderr. Each process computes with an equal part of this process's
    threads.

    Args:
        fn: the function.
        *args: its positional arguments.
        **kwargs: its arguments by name.
        num_processes: number of processes, at least 1.
        port: port at which the processes meet; None = any free one.
        child: with 1 process, call `fn` in a process of its own instead of this one, so that later
            launches from here stay possible.
    Returns:
        The result of `fn` in rank 0. Unless `fn` ran in this process, it is pickled and its tensors
        are on the CPU.
    Raises:
        ValueError, RuntimeError: this kernel cannot launch; the message lists every reason and its
            remedy.
        RuntimeError: a rank failed; the message has the traceback of the rank that failed first,
            and the cause is that rank's error.
    """
    preflight(fn, (args, kwargs), num_processes, port, child)
    if num_processes == 1 and not child:
        return fn(*args, **kwargs)
    with tempfile.TemporaryDirectory(prefix="mmkit-launch-") as folder:
        job: dict = {
            "call": (fn, args, kwargs),
            "processes": num_processes,
            "threads": max(1, torch.get_num_threads() // num_processes),
            "folder": Path(folder),
            "parent": os.getpid(),
        }
        with (
            _environment(job["threads"]),
            _quiet("torch.distributed.elastic", "torch.multiprocessing.spawn"),
        ):
            for name in sorted(_needed):
                importlib.import_module(name)
            with _heard() as job["pipes"]:
                _run(job, port or _free_port())
        return _receive(job)


@contextlib.contextmanager
def _environment(threads: int):
    """Set the environment that the processes inherit, and restore it fully at the end."""
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # or accelerate decides, and warns
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for GPUs must not start CUDA
    if WINDOWS:
        os.environ["USE_LIBUV"] = "0"  # torch is built without it there
    if not gpus():  # or each rank trains an independent copy without any error
        os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _quiet(*names: str):
    """Silence the loggers of these names: `launch` reports an error once."""
    loggers, nowhere = [logging.getLogger(name) for name in names], logging.NullHandler()
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.propagate = False
        logger.addHandler(nowhere)
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.propagate = propagate
            logger.removeHandler(nowhere)


@contextlib.contextmanager
def _heard():
    """Pipes for the output of the ranks, where stdout or stderr is not this process's own.

    That is so in a notebook, and for redirected streams. A forked kernel sends each line over a
    connection of its own, so that lines may change places; in one pipe they keep their order.
    """
    with contextlib.ExitStack() as ends:
        pipes = {}
        for name in ("stdout", "stderr") if start_method() == "fork" else ():
            stream = getattr(sys, name)
            if stream is not None and stream is not getattr(sys, f"__{name}__"):
                pipes[name] = ends.enter_context(_pipe_to(stream))
        yield pipes


@contextlib.contextmanager
def _pipe_to(stream):
    """The two ends of a pipe, whose content a thread writes to the stream at once."""
    source, way = os.pipe()

    def hand_on():
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while said := os.read(source, 65536):
            stream.write(decoder.decode(said))
        os.close(source)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(hand_on,), daemon=True)
    thread.start()
    try:
        yield source, way
    finally:
        os.close(way)
        thread.join(1.0)  # seconds; longer only where a process that a rank started still lives
        stream.flush()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _run(job: dict, port: int) -> None:
    """Run all ranks to their end; RuntimeError where one of them fails."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    gc.freeze()  # a rank that freed our garbage would wait for threads that it does not have
    try:
        _in_a_fresh_thread(lambda: _start(job, port))
    except ChildFailedError as failure:
        message, original = _first_failure(job, failure)
        traceback.clear_frames(failure.__traceback__)  # ends the server at which the ranks met
        raise RuntimeError(message) from original
    finally:
        gc.unfreeze()


def _in_a_fresh_thread(start: Callable[[], None]) -> None:
    """Call `start`, which forks, and wait for it; an interrupt ends the processes it started.

    A new thread is needed because a forked process has one thread, but its OpenMP waits forever for
    all those that the forking thread ever computed with. A new thread has had none.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # or every rank prints again what is still in the buffer
    raised: list[BaseException] = []
    ended = threading.Event()  # an interrupted join() treats a running thread as ended

    def run():
        try:
            start()
        except BaseException as error:
            raised.append(error)
        finally:
            ended.set()

    others = set(multiprocessing.active_children())
    threading.Thread(target=contextvars.copy_context().run, args=(run,)).start()
    try:
        ended.wait()
    except BaseException:
        while not ended.wait(0.1):  # `start` may fork only now
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
        raise
    if raised:
        raise raised[0]


def _start(job: dict, port: int) -> None:
    from accelerate import launchers, notebook_launcher

    # accelerate would run one process, and on Colab two without GPUs, in this kernel; and it forks.
    in_kernel = job["processes"] == 1 or ("google.colab" in sys.modules and gpus() < 2)
    if in_kernel or start_method() == "spawn":
        return _start_by_torch(job, port)
    launchers.print = lambda *text: None  # "Launching training on 2 CUDAs.", even on a CPU
    try:
        notebook_launcher(run_rank, (job,), job["processes"], use_port=str(port))
    finally:
        del launchers.print


def _start_by_torch(job: dict, port: int) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job["processes"],
        run_id="mmkit",  # without one torch invents one, and warns
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_backend="static",
        rdzv_configs={"rank": 0},
        max_restarts=0,
        start_method=start_method(),
    )
    elastic_launch(config, run_rank)(job)


def _receive(job: dict):
    """Rank 0's result, from the file that it has just written into our private folder."""
    try:
        answer = torch.load(job["folder"] / "result", map_location="cpu", weights_only=False)
    except Exception as error:
        raise RuntimeError(
            f"the result of rank 0 cannot be read in this process: {error}; define its class "
            "before the launch, or return numbers, text and tensors"
        ) from error
    _needed.update(answer["imported"])
    return answer["value"]


_LIKELY = {
    "SIGKILL": "most likely no memory was left (see `dmesg`); take a smaller batch_size or "
    "fewer processes",
    "SIGBUS": "most likely shared memory (/dev/shm) is full; take fewer num_workers",
    "SIGTERM": "a user or a time limit ended it",
}


def _first_failure(job: dict, failure) -> tuple[str, BaseException | None]:
    """The message for an elastic ChildFailedError, and the original error, where there is one."""
    reports = sorted(pickle.loads(path.read_bytes()) for path in job["folder"].glob("error-*"))
    rank, end = failure.get_first_failure()
    if rank in [report[1] for report in reports]:  # it raised, perhaps because another rank had
        _, rank, what, text, original = reports[0]
        message = f"rank {rank} of {job['processes']} failed with {what}\n\n{text}"
        return message, pickle.loads(original) if original else None
    which = f"rank {rank} of {job['processes']}"
    if end.exitcode >= 0:
        which += f" ended itself with exit code {end.exitcode} (os._exit?)"
        return f"{which}; return from the function, or raise", None
    name = signal.Signals(-end.exitcode).name
    likely = _LIKELY.get(name, "it crashed outside Python; its last output is above")
    return f"{which} was killed by {name}: {likely}", None
