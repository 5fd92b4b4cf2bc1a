"""Two machines in one: torchrun agents on the loopback interface, for tests.

Every agent has its own output; all processes are ended when the block is left, whatever happens.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

SECONDS = 150  # after which a test gives up
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",  # whatever this machine's name is resolved to
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # docs/cluster.md
    "TQDM_DISABLE": "1",
}


class Nodes:
    """Agents of one job. `with Nodes(folder) as nodes: nodes.start(…); nodes.finish()`"""

    def __init__(self, folder: Path, nnodes: str = "2", max_restarts: int = 0):
        self.folder = folder / f"nodes-{time.monotonic_ns()}"
        self.folder.mkdir()
        self.agents: list[subprocess.Popen] = []
        self.options = (
            f"--nnodes={nnodes} --nproc-per-node=1 --max-restarts={max_restarts} "
            f"--rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{free_port()} "
            # The address, so that nothing depends on how this machine's name is resolved.
            "--local-addr=127.0.0.1 --rdzv-conf=last_call_timeout=1"
        ).split()

    def start(self, *words):
        """One more agent, to run these words after `torchrun OPTIONS`."""
        number = len(self.agents)
        env = os.environ | ENVIRONMENT
        with (
            open(self.folder / f"out{number}", "w") as out,
            open(self.folder / f"err{number}", "w") as err,
        ):
            command = [*TORCHRUN, *self.options, *map(str, words)]
            self.agents.append(subprocess.Popen(command, stdout=out, stderr=err, env=env))

    def said(self) -> list[str]:
        """What each agent and its worker has printed so far, rank 0's machine first."""
        told = [(self.folder / f"out{i}").read_text() for i in range(len(self.agents))]
        return sorted(told, key=len, reverse=True)

    def errors(self) -> str:
        parts = [(self.folder / f"err{i}").read_text() for i in range(len(self.agents))]
        return "\n".join(parts)

    def wait_for(self, words: str):
        """Until one of them has printed these words."""
        end = time.monotonic() + SECONDS
        while not any(words in told for told in self.said()):
            assert time.monotonic() < end, f"{words!r} was not said\n{self.said()}{self.errors()}"
            assert any(agent.poll() is None for agent in self.agents), self.errors()
            time.sleep(0.1)

    def finish(self) -> list[int]:
        """Exit codes of all agents."""
        end = time.monotonic() + SECONDS
        while any(agent.poll() is None for agent in self.agents):
            assert time.monotonic() < end, f"still running\n{self.said()}\n{self.errors()}"
            time.sleep(0.1)
        return [agent.returncode for agent in self.agents]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for agent in self.agents:
            if agent.poll() is None:
                process = psutil.Process(agent.pid)
                process.suspend()  # or it would start new workers
                for child in process.children(recursive=True):
                    child.kill()
                agent.kill()
                agent.wait()
