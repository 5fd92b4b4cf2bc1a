"""Problems are reported before a launch, errors of a rank after it; a result is returned.

Each launch is made in a process of its own: what one kernel did must not matter to another.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch

import mmkit as mm
from mmkit.training.launch.preflight import preflight

BEGIN = """
import multiprocessing, os, signal, sys, threading, time
import torch, torch.distributed as dist
import mmkit as mm
from mmkit.distributed import rank_and_world_size
"""
REFUSED = """
def refused(*args, **options):
    try:
        mm.launch(*args, **options)
    except (RuntimeError, ValueError) as error:
        print(type(error).__name__, error)
"""


def run(code: str, seconds: int = 60, **environment) -> subprocess.CompletedProcess:
    """Run code as a cell of a fresh process and return what it printed."""
    command = [sys.executable, "-c", BEGIN + REFUSED + textwrap.dedent(code)]
    environment = {**os.environ, "TQDM_DISABLE": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    """Isolate from what other tests have trained in this process."""
    from accelerate.state import AcceleratorState, PartialState

    for state in (AcceleratorState, PartialState):
        monkeypatch.setattr(state, "_shared_state", {})


# -- before --------------------------------------------------------------------------------------


def test_one_process_is_a_plain_call():
    assert mm.launch(lambda a, b: a + b, 2, b=3, num_processes=1) == 5


@pytest.mark.slow
def test_one_process_of_its_own_leaves_this_one_free_for_more():
    """Training in a child process makes the Accelerator there; a launch of two can follow."""
    done = run("""
        def one():
            from accelerate import Accelerator
            return os.getpid(), Accelerator(cpu=True).num_processes

        pid, seen = mm.launch(one, num_processes=1, child=True)
        print(pid != os.getpid(), seen, torch.get_num_threads())
        print(mm.launch(lambda: rank_and_world_size()[1], num_processes=2))
        try:
            mm.launch(lambda: 1 / 0, num_processes=1, child=True)
        except RuntimeError as error:
            print(str(error).splitlines()[0])
    """)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("True 1 ") and lines[1] == "2"
    assert lines[2] == "rank 0 of 1 failed with ZeroDivisionError: division by zero"
    assert done.stderr == ""


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


@pytest.mark.gpu
def test_a_launch_on_gpus_gives_each_process_its_own():
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs two GPUs")
    done = run("""
        def mine():
            x = torch.full((3,), rank_and_world_size()[0] + 1.0, device="cuda", requires_grad=True)
            return mm.distributed.all_gather_with_grad(x).sum().item(), x.device, x
        print(mm.launch(mine, num_processes=2))
    """)
    assert done.stdout.startswith("(9.0, device(type='cuda', index=0), tensor([1., 1., 1.]")


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


# -- while it runs, and after --------------------------------------------------------------------


def test_processes_that_start_anew_work():
    done = run("""
        from accelerate import launchers
        from tests.launched import who
        launchers.is_rocm_available = lambda: True
        torch.set_num_threads(7)
        print(mm.launch(who, "new", num_processes=2))
    """)
    assert done.stdout == "('new', (0, 2), 3)\n"


def test_threads_are_shared_out_and_do_not_hang():
    """After OpenMP work here, children that compute with several threads would wait forever."""
    done = run("""
        def work():
            x = torch.randn(300, 300)
            torch.nn.Linear(300, 300)(x @ x).sum().backward()
            return torch.randn(1_000_000).exp().sum()

        def threads():
            work()
            counts = [None, None]
            dist.all_gather_object(counts, torch.get_num_threads())
            return counts, os.environ["OMP_NUM_THREADS"]

        torch.set_num_threads(7)
        work()
        environment = dict(os.environ)
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        print(mm.launch(threads, num_processes=2))
        work()
        print(mm.launch(threads, num_processes=2))
        assert torch.get_num_threads() == 7
        assert environment == dict(os.environ)
        assert handlers == [signal.getsignal(s) for s in (2, 15, 1)]
        torch.set_num_threads(1)
        print(mm.launch(threads, num_processes=2))
    """)
    assert done.stdout.splitlines() == 2 * ["([3, 3], '3')"] + ["([1, 1], '1')"]
    assert "OMP_NUM_THREADS" not in done.stderr


def test_a_result_comes_back_and_only_rank_0_is_heard():
    done = run("""
        class Mine:
            pass

        def speak(word, times=1):
            print(word * times, rank_and_world_size()[0])
            os.write(1, b"C\\n")
            os.write(2, f"stderr of {rank_and_world_size()[0]}\\n".encode())  # others, too
            mine = Mine()
            mine.rows = torch.arange(3) + rank_and_world_size()[0]
            return mine

        print("before, without an end", end="; ")
        print(mm.launch(speak, "ab", times=2, num_processes=3).rows)
    """)
    assert done.stdout == "before, without an end; abab 0\nC\ntensor([0, 1, 2])\n"
    assert sorted(done.stderr.splitlines()) == [f"stderr of {rank}" for rank in range(3)]


def test_a_port_of_ones_own():
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    done = run(f"""
        def port():
            return os.environ["MASTER_PORT"]
        for _ in range(2):  # also a second time at once
            print(mm.launch(port, num_processes=2, port={port}))
    """)
    assert done.stdout.split() == [str(port)] * 2


FAILING = """
import warnings
def attempt(function):
    started = time.monotonic()
    try:
        print(mm.launch(function, num_processes=2))
    except RuntimeError as error:
        print(error, "| from", repr(error.__cause__))
    assert multiprocessing.active_children() == [] and time.monotonic() - started < 20
    print("-----")
"""


def test_a_failing_rank_is_named_and_its_traceback_shown():
    """Rank 1 fails while rank 0 waits for it, rank 0 while rank 1 sleeps, both at once."""
    done = run(
        FAILING
        + textwrap.dedent("""
        class Odd(Exception):
            def __init__(self, a, b):
                super().__init__("odd")

        def deep():
            raise ValueError("only here", 17)
        def second():
            if rank_and_world_size()[0] == 1:
                deep()
            dist.barrier()
        def first():
            if rank_and_world_size()[0] == 0:
                raise Odd(1, 2)
            time.sleep(1000)
        def both():
            raise KeyError("both")
        def leaves():
            sys.exit(0)
        for function in (second, first, both, leaves):
            attempt(function)
        print(mm.launch(rank_and_world_size, num_processes=2))  # and this kernel can launch again
        """)
    )
    second, first, both, leaves, after = done.stdout.split("-----\n")
    assert second.startswith("rank 1 of 2 failed with ValueError: ('only here', 17)\n\nTraceback")
    assert "in second\n" in second and "in deep\n" in second
    assert second.endswith("| from ValueError('only here', 17)\n")
    assert first.startswith("rank 0 of 2 failed with Odd: odd") and "in first" in first
    assert first.endswith("| from None\n")  # an error that cannot be pickled
    assert "failed with KeyError: 'both'" in both
    assert "failed with SystemExit: 0" in leaves
    assert after == "(0, 2)\n"
    assert done.stderr == ""  # reported once


@pytest.mark.parametrize(
    "end, words",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL: most likely no memory"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV: it crashed outside"),
        ("os._exit(3)", "ended itself with exit code 3"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named(end, words, rank):
    """And not the other rank, which failed because of it."""
    done = run(
        FAILING
        + textwrap.dedent(f"""
        def dies():
            if rank_and_world_size()[0] == {rank}:
                {end}
            dist.barrier()
        attempt(dies)
        attempt(rank_and_world_size)
        """)
    )
    assert done.stdout.startswith(f"rank {rank} of 2 {words}"), done.stdout
    assert done.stdout.endswith("-----\n(0, 2)\n-----\n")


def test_a_rank_that_leaves_early_does_not_make_the_others_wait_for_ever():
    done = run(
        FAILING
        + textwrap.dedent("""
        def uneven():
            if rank_and_world_size()[0] == 0:
                dist.barrier()
        attempt(uneven)
        """)
    )
    assert done.stdout.startswith("rank 0 of 2 failed with RuntimeError")


def test_what_cannot_be_sent_back_is_named():
    done = run(
        FAILING
        + textwrap.dedent("""
        def generator():
            return (i for i in range(3))
        def lock():
            return {"lock": threading.Lock()}
        def foreign():
            class Foreign:
                pass
            Foreign.__qualname__ = "Foreign"
            globals()["Foreign"] = Foreign
            return Foreign()
        for function in (generator, lock, foreign):
            attempt(function)
        """)
    )
    generator, lock, foreign, _ = done.stdout.split("-----\n")
    assert "TypeError: the function returned generator, which cannot be sent back" in generator
    assert "returned dict, which cannot be sent back (cannot pickle '_thread.lock'" in lock
    assert "cannot be read in this process" in foreign and "Foreign" in foreign


def test_each_process_checks_that_it_sees_the_others():
    """Otherwise each would train a model of its own without any error."""
    done = run(
        FAILING
        + textwrap.dedent("""
        from accelerate.state import DistributedType, PartialState
        PartialState._prepare_backend = lambda self, *args: (None, DistributedType.NO)
        attempt(print)
        """)
    )
    assert "2 processes were asked for, each sees 1" in done.stdout


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_output_is_live_and_an_interrupt_ends_the_processes(number):
    """The output of rank 0 is read while it runs. Signals go only to the launching process."""
    code = BEGIN + textwrap.dedent("""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
        def sleeps():
            pids = [None, None]
            dist.all_gather_object(pids, os.getpid())
            print(*pids)
            time.sleep(1000) if rank_and_world_size()[0] else dist.barrier()  # Python, C
        try:
            mm.launch(sleeps, num_processes=2)
        except KeyboardInterrupt:
            assert multiprocessing.active_children() == []
            print("interrupted")
    """)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        process.send_signal(number)
        rest, errors = process.communicate(timeout=60)
    assert rest == ("interrupted\n" if number == signal.SIGINT else ""), errors
    assert process.returncode == (0 if number == signal.SIGINT else -number)
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_what_was_slow_to_import_is_imported_before_the_next_fork():
    done = run("""
        def imports():
            there = "torch._dynamo" in sys.modules
            import torch._dynamo
            return there
        print(*[mm.launch(imports, num_processes=2) for _ in range(2)])
    """)
    assert done.stdout == "False True\n"


@pytest.mark.slow
def test_a_training_in_two_processes_returns_its_run(tmp_path):
    """With the losses of the same training run in one process."""
    done = run(
        f"""
        from tests.train_small import DEFAULTS, data, model
        train, val = data(53), data(17, seed=1)

        def training(name):
            options = DEFAULTS | dict(output_dir={str(tmp_path)!r}, run_name=name, num_epochs=2)
            encoder = model(train.tokenizer, 0.0)
            return mm.train_model(mm.TrainingConfig(**options), train, val, model=encoder)

        print("found", type(mm.launch(training, "two", num_processes=2)).__name__)
        training("one")
        """
    )
    assert "processes: 2" in done.stdout and "found Run" in done.stdout
    one, two = (mm.training.run.Run.load(tmp_path / name).curve("loss") for name in ("one", "two"))
    assert one[0] == two[0] == list(range(1, 11))
    assert two[1] == pytest.approx(one[1], rel=1e-2)  # sums in another order, after ten steps
    assert two[1][0] == pytest.approx(one[1][0], rel=1e-5)


# -- calls that all processes must make ----------------------------------------------------------


TRAINED = """
    from tests.train_small import DEFAULTS, data, model

    def train(folder, callback):
        train, val = data(23), data(13, seed=1)
        config = mm.TrainingConfig(**DEFAULTS | dict(output_dir=folder, num_epochs=1))
        trainer = mm.MaskedMultimodalTrainer(
            config, train, val, model(train.tokenizer, 0.1), callbacks=[callback]
        )
        trainer.extra = data(7, train.tokenizer)
        return trainer.fit().history[-1]["loss"]
"""


@pytest.mark.parametrize(
    ("who", "call", "words"),
    [
        (0, "mm.evaluate(trainer.model, trainer.extra)", "mm.embed, by itself or in mm.evaluate"),
        pytest.param(
            1,
            "mm.Index(trainer.model, trainer.extra)",
            "mm.embed, by itself",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            0,
            "trainer.train_step(trainer.first_batch(), 0)",
            "the trainer's train_step",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_call_by_one_rank_alone_ends_in_words(tmp_path, who, call, words):
    """In a callback, while the other rank goes on training: an error instead of a deadlock."""
    done = run(
        TRAINED
        + f"""
    def callback(trainer, record):
        if trainer.rank == {who}:
            {call}

    refused(train, {str(tmp_path)!r}, callback, num_processes=2)
    """,
        seconds=150,
        OMP_NUM_THREADS="1",
    )
    assert "RuntimeError" in done.stdout and "all processes must make a call" in done.stdout
    assert words in done.stdout and "training, after the callbacks" in done.stdout


@pytest.mark.slow
def test_a_call_by_all_ranks_works_and_one_whose_others_have_gone_home_is_said(tmp_path):
    done = run(
        TRAINED
        + f"""
    from mmkit import joint_calls

    found = []
    def callback(trainer, record):
        found.append(mm.evaluate(trainer.model, trainer.extra)["loss"])
        if trainer.rank == 0:
            torch.rand(record["step"])  # ranks may differ in calls that are not joint

    def both(folder, callback):
        return train(folder, callback), found

    watched = mm.launch(both, {str(tmp_path / "a")!r}, callback, num_processes=2)
    alone = mm.launch(both, {str(tmp_path / "b")!r}, lambda *_: None, num_processes=2)
    print(watched[0] == alone[0], len(watched[1]) > 1, len(alone[1]))

    def one_only(who):
        train = data(13)
        if rank_and_world_size()[0] == who:
            mm.evaluate(model(train.tokenizer, 0.0), train)

    refused(one_only, 0, num_processes=2)
    refused(one_only, 1, num_processes=2)

    def waits_long():
        joint_calls._SAID, joint_calls._LIMIT = 0.2, 1.0
        if rank_and_world_size()[0]:
            return time.sleep(3)
        joint_calls.meet("this call")
    refused(waits_long, num_processes=2)
    """,
        seconds=300,
        OMP_NUM_THREADS="1",
    )
    assert "\nTrue True 0\n" in done.stdout
    for rank in (0, 1):
        words = f"process {rank} of 2 is in mm.embed, .*process {1 - rank} is in no call: it has e"
        assert re.search(words, done.stdout)
    assert "has waited 1 s in this call for process [1]" in done.stdout
    assert "has waited 0 s in this call for process [1], which has not called it" in done.stderr
