"""The result of rank 0 is returned, its output is live, a rank that failed is named.

Each launch is made in a process of its own: what one kernel did must not matter to another.
"""

import os
import queue
import signal
import socket
import subprocess
import sys
import textwrap
import time

import nbformat
import pytest
import torch
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

import mmkit as mm
from tests.training.launch.cells import BEGIN, FAILING, run


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


# -- in a Jupyter kernel ------------------------------------------------------------------------

SETUP = """
import os, sys, time
import torch, torch.distributed as dist
import mmkit as mm
from mmkit.distributed import rank_and_world_size
torch.set_num_threads(4)
torch.randn(2_000_000).exp().sum()  # OpenMP, before the fork

class Found:
    pass

def meet(start):
    print(f"rank {rank_and_world_size()[0]} starts")
    print("not again", file=sys.stderr) if rank_and_world_size()[0] else os.write(1, b"C, too\\n")
    total = torch.randn(2_000_000).exp().sum()  # OpenMP again: hangs after a careless fork
    total = torch.tensor(start + rank_and_world_size()[0])
    dist.all_reduce(total)
    found = Found()
    found.total, found.threads = total, torch.get_num_threads()
    return found

print("said once")
found = mm.launch(meet, 10, num_processes=2)
found.total, found.threads
"""


FAILS = """
def fails():
    if rank_and_world_size()[0] == 1:
        raise ValueError("of rank 1")
    dist.barrier()
mm.launch(fails, num_processes=2)
"""


SLEEPS = """
def sleeps():
    pids = [None, None]
    dist.all_gather_object(pids, os.getpid())
    print(*pids)
    time.sleep(1000) if rank_and_world_size()[0] else dist.barrier()
mm.launch(sleeps, num_processes=2)
"""


COUNTS = """
def counts(lines):
    for line in range(lines):
        print(line, "of", lines, "·" * (line % 3))
    print("the end", end="", flush=True)
    print("once", file=sys.stderr) if rank_and_world_size()[0] else None
mm.launch(counts, 500, num_processes=2)
"""


CAUGHT = """
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()) as caught:
    mm.launch(counts, 2, num_processes=2)
caught.getvalue()
"""


def streams(cell, name: str) -> str:
    outputs = [o for o in cell.outputs if o.output_type == "stream" and o.name == name]
    return "".join(o.text for o in outputs)


@pytest.mark.slow
def test_a_notebook_launches_its_own_functions(tmp_path):
    cells = [SETUP, FAILS, "mm.launch(meet, 20, num_processes=2).total.item()"]
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        allow_errors=True,
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    works, fails, again = notebook.cells
    lines = streams(works, "stdout").splitlines()
    assert sorted(set(lines) - {"C, too"}) == ["rank 0 starts", "said once"]
    assert len(lines) - lines.count("C, too") == 2
    assert streams(works, "stderr") == "not again\n"
    assert works.outputs[-1].data["text/plain"] == "(tensor(21), 2)"
    (error,) = [o for o in fails.outputs if o.output_type == "error"]
    assert error.ename == "RuntimeError"
    assert error.evalue.startswith("rank 1 of 2 failed with ValueError: of rank 1")
    assert "in fails" in error.evalue and 'raise ValueError("of rank 1")' in error.evalue
    assert again.outputs[-1].data["text/plain"] == "41"
    assert nbformat.validate(notebook) is None


@pytest.mark.slow
def test_lines_come_in_the_order_they_were_said_and_can_be_redirected(tmp_path):
    cells = [SETUP, COUNTS, CAUGHT]
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    said, caught = notebook.cells[1:]
    words = "".join(f"{line} of 500 {'·' * (line % 3)}\n" for line in range(500))
    assert streams(said, "stdout") == words + "the end"
    assert streams(said, "stderr") == streams(caught, "stderr") == "once\n"
    assert caught.outputs[-1].data["text/plain"] == repr("0 of 2 \n1 of 2 ·\nthe end")


class Kernel:
    """A kernel whose messages are read as they come."""

    def __init__(self):
        self.manager, self.client = start_new_kernel(kernel_name="python3")

    def stop(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def first_words(self) -> str:
        """The first output of the running cell, while it runs."""
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            if message["header"]["msg_type"] == "stream":
                return message["content"]["text"]

    def reply(self) -> dict:
        return self.client.get_shell_msg(timeout=60)["content"]

    def drain(self):
        try:
            while True:
                self.client.get_iopub_msg(timeout=0.3)
        except queue.Empty:
            pass


@pytest.fixture
def kernel():
    pytest.importorskip("ipykernel")
    kernel = Kernel()
    yield kernel
    kernel.stop()


@pytest.mark.slow
def test_output_is_live_and_the_stop_button_ends_the_processes(kernel):
    kernel.client.execute(SETUP)
    assert kernel.reply()["status"] == "ok"
    kernel.drain()
    kernel.client.execute(SLEEPS)
    pids = [int(pid) for pid in kernel.first_words().split()]  # arrives while the cell runs
    kernel.manager.interrupt_kernel()
    reply = kernel.reply()
    assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
    kernel.drain()
    kernel.client.execute(f"print([os.path.exists(f'/proc/{{pid}}') for pid in {pids}])")
    assert kernel.first_words() == "[False, False]\n"
    kernel.reply()
    kernel.client.execute("assert mm.launch(rank_and_world_size, num_processes=2) == (0, 2)")
    assert kernel.reply()["status"] == "ok"
