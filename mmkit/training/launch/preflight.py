"""Checks before a launch of several processes from this kernel, with remedies.

Walk-through: notebooks/06_many_processes.ipynb.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from ...data.workers import cannot_be_sent


def preflight(
    fn: Callable,
    call=((), {}),
    num_processes: int = 2,
    port: int | None = None,
    child: bool = False,
) -> None:
    """Raise one error that lists everything that would make a launch from this kernel fail.

    Args:
        fn: see `launch`.
        call: (args, kwargs) of `fn`.
        num_processes: see `launch`.
        port: see `launch`.
        child: see `launch`.
    Raises:
        ValueError: an argument is wrong.
        RuntimeError: the arguments are right, but this kernel or machine cannot launch.
    """
    wrong, here = _wrong_arguments(fn, num_processes, port, child), []
    if num_processes != 1 or child:
        here = [*_wrong_kernel(), *_wrong_devices(num_processes)]
        if start_method() == "spawn":
            here += _unsendable(fn, *call)
    if wrong or here:
        problems = "".join(f"\n- {problem}" for problem in wrong + here)
        raise (ValueError if wrong else RuntimeError)(f"mm.launch cannot start:{problems}")


def start_method() -> str:
    """How processes start on this machine: "fork", or "spawn" where that would fail.

    Windows cannot fork, and on macOS the libraries behind torch fail in a forked process.
    """
    rocm = torch.version.hip is not None and gpus() > 0
    forks = sys.platform == "linux" and hasattr(os, "fork")
    return "fork" if forks and not torch.xpu.is_available() and not rocm else "spawn"


def gpus() -> int:
    """The number of GPUs that a launch would use; 0 where it runs on the CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return 0
    return torch.cuda.device_count()  # by NVML: CUDA is not started, so that forking stays possible


def _wrong_arguments(fn, num_processes, port, child) -> list[str]:
    wrong = []
    if not callable(fn):
        wrong.append(
            f"fn={fn!r:.60} cannot be called; give the function itself, then its arguments: "
            "mm.launch(train, config, num_processes=2)"
        )
    if type(num_processes) is not int or num_processes < 1:
        wrong.append(
            f"num_processes={num_processes!r} must be a whole number of at least 1; on a CPU take "
            "at most its cores, else the number of GPUs"
        )
    if port is not None and (num_processes != 1 or child):
        try:
            with socket.socket() as probe:  # opened as the processes' meeting point will be
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
                probe.listen()
        except (OSError, OverflowError, TypeError) as error:
            wrong.append(
                f"port={port!r} cannot be used ({error}); choose another from 1024 to 65535, or "
                "leave port out for any free one"
            )
    return wrong


def _wrong_kernel() -> list[str]:
    """Messages on the state of this process that prevents a launch."""
    from accelerate.state import AcceleratorState, PartialState

    wrong = []
    if dist.is_initialized() or os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        rank, size = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
        wrong.append(
            f"this process is itself one of several (rank {rank} of {size}, by mm.launch, torchrun "
            "or init_process_group); call the function directly here, or launch from a process "
            "of its own"
        )
    elif PartialState._shared_state or AcceleratorState._shared_state:
        wrong.append(
            "an Accelerator was already made in this kernel (train_model and trainers make one), "
            "which ties it to one process; restart the kernel and start every training run of this "
            "notebook by mm.launch"
        )
    if multiprocessing.current_process().daemon:
        wrong.append(
            "this is a daemonic process (a worker of a pool or of a data loader), which may not "
            "start others; launch from the main process, or start this one with daemon=False"
        )
    return wrong


def _wrong_devices(num_processes) -> list[str]:
    wrong, count = [], gpus()
    if count and isinstance(num_processes, int) and count < num_processes:
        wrong.append(
            f"num_processes={num_processes} but GPUs: {count}, and each process needs one; take at "
            f"most {count}, or set ACCELERATE_USE_CPU=1 to run on the CPU"
        )
    if count and start_method() == "fork" and _cuda_was_used():
        wrong.append(
            "CUDA was already used in this kernel (a tensor on a GPU, torch.cuda.is_available(), "
            "a backward pass), so that no process forked from it can use a GPU; restart the kernel "
            "and call mm.launch before that. PYTORCH_NVML_BASED_CUDA_CHECK=1, set before torch is "
            "imported, makes is_available() harmless"
        )
    return wrong


def _cuda_was_used() -> bool:
    """Whether a process forked now could not use CUDA or autograd, found out by forking one.

    torch.cuda.is_initialized() does not tell: after is_available() it is still False.
    """
    if torch.cuda.is_initialized():
        return True
    pid, lost = os.fork(), True
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    try:
        lost = torch.cuda._is_in_bad_fork()
        torch.zeros(1, requires_grad=True).sum().backward()
    except RuntimeError:  # autograd's threads for the GPUs are in the parent only
        lost = True
    finally:
        os._exit(lost)


def _unsendable(fn, args: tuple, kwargs: dict) -> list[str]:
    """Messages on what cannot be pickled, which a process that is not forked needs."""
    wrong = []
    for name, thing in [("fn", fn), *enumerate(args, 1), *kwargs.items()]:
        if reason := cannot_be_sent(thing):
            kind = type(thing).__name__
            what = getattr(thing, "__name__", kind) if callable(thing) else kind
            wrong.append(
                f"{what} ({name if name == 'fn' else f'argument {name}'}) cannot be sent to the "
                f"processes, which start anew (spawn) on this machine: {reason}; put it "
                "into a .py file beside the notebook and import it"
            )
    return wrong
