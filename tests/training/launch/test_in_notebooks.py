"""mm.launch in a Jupyter kernel: functions of a cell, live output, errors, interrupts."""

import queue

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

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
