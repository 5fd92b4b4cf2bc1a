"""Two processes with one thread each against one with two: images per second of a real trainer.

All arms run at once and work in turns of a few steps, so that other load on the machine slows all
alike; only the ratio within a round counts. An arm is a Python process of its own that calls
`mm.launch`; it reads from a small store of this process when to continue. Real images, default
recipe, the same global batch, whole steps (making the batch, train_step). Run by exact_step.py.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import count, cycle

import torch
from torch.distributed import TCPStore

import mmkit as mm

BATCH, STEPS_PER_TURN = 128, 4
ARMS = [(1, "muon"), (2, "muon"), (1, "adamw"), (2, "adamw")]
PATIENCE = timedelta(seconds=300)


def work(port: int, arm: str, optimizer: str):
    """What every process of an arm runs: a turn of steps on request."""
    store = TCPStore("127.0.0.1", port, timeout=PATIENCE)
    with tempfile.TemporaryDirectory() as folder:
        config = mm.TrainingConfig(
            batch_size=BATCH, optimizer=optimizer, output_dir=folder, run_name="run"
        )
        data = mm.openmoji(64)[0]
        trainer = mm.MaskedMultimodalTrainer(config, data)
        keys = cycle(trainer.epoch_batches(0))
        trainer.net.train()
        store.set(f"{arm}: {trainer.rank} is ready", f"{torch.get_num_threads()}")
        for turn in count():
            steps = int(store.get(f"{arm}: turn {turn}"))
            for _ in range(steps):
                trainer.train_step(data.batch(*next(keys)).to(trainer.device), 0)
                trainer.step += 1
            store.set(f"{arm}: {trainer.rank} did turn {turn}", "done")
            if steps == 0:
                return


def replies(store: TCPStore, arm: str, processes: int, key: str) -> list[str]:
    """The reply of every process of the arm; fails if one takes too long."""
    return [store.get(f"{arm}: {rank} {key}").decode() for rank in range(processes)]


def seconds(store: TCPStore, arm: str, processes: int, turn: int, steps: int) -> float:
    """How long an arm takes for a turn."""
    start = time.perf_counter()
    store.set(f"{arm}: turn {turn}", str(steps))
    replies(store, arm, processes, f"did turn {turn}")
    return time.perf_counter() - start


@contextlib.contextmanager
def arms_at_work(store: TCPStore) -> Iterator[dict[str, int]]:
    """Start all arms and yield the number of processes of each; always end them."""
    found, started = {}, []
    try:
        for processes, optimizer in ARMS:
            arm = f"{processes} x {optimizer}"
            command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.two_processes"]
            arguments = [*command, str(store.port), arm, optimizer, str(processes)]
            started.append(subprocess.Popen(arguments, start_new_session=True))
            found[arm] = processes
            threads = replies(store, arm, processes, "is ready")
            print(f"{arm}: threads of each process {', '.join(threads)}", flush=True)
        yield found
        for process in started:
            process.wait(PATIENCE.seconds)
    finally:
        for process in started:
            if process.poll() is None:  # something went wrong
                os.killpg(process.pid, signal.SIGTERM)  # with the processes it has launched
                process.wait()


def measure(rounds: int) -> dict[str, list[float]]:
    """Images per second of every arm in every round."""
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=PATIENCE, wait_for_workers=False)
    with arms_at_work(store) as arms:
        speeds: dict[str, list[float]] = {arm: [] for arm in arms}
        for turn in range(rounds + 1):  # the first warms up
            order = list(arms)[:: -1 if turn % 2 else 1]
            for arm in order:
                took = seconds(store, arm, arms[arm], turn, STEPS_PER_TURN)
                speeds[arm].append(STEPS_PER_TURN * BATCH / took)
            print(f"round {turn} of {rounds}", {a: round(s[-1]) for a, s in speeds.items()},
                  flush=True)  # fmt: skip
        for arm, processes in arms.items():
            seconds(store, arm, processes, rounds + 1, steps=0)
    return {arm: values[1:] for arm, values in speeds.items()}


if __name__ == "__main__":
    port, arm, optimizer, processes = sys.argv[1:]
    mm.launch(work, int(port), arm, optimizer, num_processes=int(processes))
