"""Everything that would make a launch fail is said before it, with a remedy."""

import socket
import sys

import pytest
import torch

import mmkit as mm
from mmkit.training.launch.preflight import preflight
from tests.training.launch.cells import run


@pytest.mark.parametrize("number", [0, -2, 2.0, "2", None, True])
def test_a_wrong_number_is_refused(number):
    with pytest.raises(ValueError, match=f"num_processes={number!r} must be a whole number"):
        preflight(print, num_processes=number)


def test_something_that_cannot_be_called_is_refused():
    with pytest.raises(ValueError, match=r"fn=7 cannot be called; give the function itself"):
        mm.launch(7, num_processes=1)


def test_a_busy_port_is_refused():
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(
            ValueError, match=f"port={port} cannot be used .*in use.*leave port out"
        ):
            preflight(print, port=port)
    preflight(print, port=port)
    for port in (-1, 70000, "here"):
        with pytest.raises(ValueError, match=f"port={port!r} cannot be used"):
            preflight(print, port=port)


def test_several_problems_are_toldat_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ValueError) as caught:
        mm.launch("train", num_processes=2, port=-1)
    problems = str(caught.value).split("\n- ")[1:]
    words = ["fn='train'", "port=-1", "rank 1 of 3", "GPUs: 1", "CUDA was already used"]
    assert len(problems) == len(words)
    assert all(word in problem for word, problem in zip(words, problems, strict=True))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    preflight(print, num_processes=3)
    with pytest.raises(RuntimeError, match=r"num_processes=5 but GPUs: 3.*take at most 3"):
        preflight(print, num_processes=5)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    preflight(print, num_processes=5)


@pytest.mark.skipif(
    not hasattr(torch._C, "_cuda_isInBadFork"), reason="needs a torch that was built for CUDA"
)
def test_cuda_that_was_only_asked_for_is_told():
    """is_available() leaves is_initialized() False, yet no forked process can use CUDA then."""
    done = run(
        """
        torch.cuda.device_count = lambda: 2
        refused(print, num_processes=3)
        torch.cuda.is_available()
        assert not torch.cuda.is_initialized()
        refused(print, num_processes=2)
        """,
        PYTORCH_NVML_BASED_CUDA_CHECK="0",
    )
    first, second = done.stdout.split("mm.launch cannot start:")[1:]
    assert "GPUs: 2" in first and "CUDA" not in first
    assert "CUDA was already used in this kernel" in second and "restart the kernel" in second


@pytest.mark.gpu
@pytest.mark.parametrize("use", ["torch.ones(3).cuda()", "torch.cuda.is_available()"])
def test_cuda_that_was_used_is_told(use):
    done = run(
        f"refused(print, num_processes=2); {use}; refused(print, num_processes=2)",
        PYTORCH_NVML_BASED_CUDA_CHECK="0",
    )
    first, second = done.stdout.split("mm.launch cannot start:")[-2:]
    assert "CUDA was already used" not in first and "CUDA was already used" in second


@pytest.mark.parametrize("made", ["Accelerator(cpu=True)", "PartialState(cpu=True)"])
def test_a_kernel_that_made_an_accelerator_is_told_to_restart(made):
    done = run(f"from accelerate import *; {made}; refused(print, num_processes=2)")
    assert "an Accelerator was already made in this kernel" in done.stdout
    assert "restart the kernel" in done.stdout


def test_a_process_of_several_or_a_daemon_is_told_so():
    done = run("""
        worker = multiprocessing.Process(target=refused, args=(print,),
                                         kwargs={"num_processes": 2}, daemon=True)
        worker.start()
        worker.join()
        def nested():
            refused(print, num_processes=2)
            return mm.launch(rank_and_world_size, num_processes=1)  # a plain call
        print(mm.launch(nested, num_processes=2))
    """)
    daemon, nested = done.stdout.split("mm.launch cannot start:")[1:]
    assert "this is a daemonic process" in daemon and "daemon=False" in daemon
    assert "one of several (rank 0 of 2" in nested and "call the function directly" in nested
    assert nested.endswith("(0, 2)\n")


def test_where_processes_start_anew_a_function_of_the_notebook_is_refused(monkeypatch):
    """As on ROCm: accelerate asks the same two things of torch."""
    monkeypatch.setattr(torch.version, "hip", "6.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    preflight(mm.train_model, ((mm.TrainingConfig(),), {}))

    def inner():
        pass

    def in_cell():
        pass

    in_cell.__module__, in_cell.__qualname__ = "__main__", "in_cell"
    monkeypatch.delattr(sys.modules["__main__"], "__file__")  # as in a notebook
    monkeypatch.setattr(sys.modules["__main__"], "in_cell", in_cell, raising=False)
    for function, name in [(lambda: 1, "<lambda>"), (inner, "inner"), (in_cell, "in_cell")]:
        with pytest.raises(RuntimeError, match=rf"{name} \(fn\) cannot be sent .*into a .py file"):
            preflight(function)
    with pytest.raises(RuntimeError, match=r"generator \(argument rows\) cannot be sent"):
        preflight(print, ((1,), {"rows": (i for i in range(3))}))
