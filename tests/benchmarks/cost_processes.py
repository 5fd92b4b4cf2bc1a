"""Step times of one and of two processes, each with one thread, cell by cell; see cost_growth.py.

Both arms run at once and are measured in turns; an arm is a Python process that calls `mm.launch`
and reads from a small store which cell comes next (as in two_processes.py, which compares whole
recipes). The cells of one process fit its rates, every third cell of two processes fits the cost of
the exchange, and the others test the prediction.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import timedelta
from itertools import count

import torch
from torch.distributed import TCPStore

import mmkit as mm
from mmkit import cost

PATIENCE = timedelta(seconds=120)
WORLDS = (1, 2)


def cells(quick: bool) -> list[tuple[float, int]]:
    """(masked fraction, pairs of one process)."""
    if quick:
        return [(ratio, size) for ratio in (0.0, 0.5, 0.75) for size in (16, 32)]
    return [(ratio, size) for ratio in (0.0, 0.5, 0.75) for size in (32, 64, 128)]


def work(port: int, most: int):
    """What every process of an arm runs: a step of each cell that is requested."""
    from tests.benchmarks import cost_growth

    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, timeout=PATIENCE)
    with tempfile.TemporaryDirectory() as folder:
        world = mm.distributed.rank_and_world_size()[1]
        trainer = cost_growth.trainer_of(64, 10, most * world, folder)
        batch, me = trainer.first_batch(), f"{world}: {trainer.rank}"
        store.set(f"{me} is ready", "yes")
        for turn in count():
            message = store.get(f"{world}: turn {turn}").decode()
            if message == "end":
                return
            ratio, size = json.loads(message)
            trainer.config.image_mask_ratio = ratio
            trainer.config.batch_size = size * world
            took = cost.step_time(trainer, batch[:size])
            predicted = cost.predict_batch(trainer, batch[:size])
            answer = {"seconds": took, "prediction": dataclasses.asdict(predicted)}
            store.set(f"{me} did turn {turn}", json.dumps(answer))


def ask(store: TCPStore, world: int, turn: int, cell: tuple[float, int]) -> dict:
    """The slowest process's answer."""
    store.set(f"{world}: turn {turn}", json.dumps(cell))
    answers = [json.loads(store.get(f"{world}: {rank} did turn {turn}")) for rank in range(world)]
    return max(answers, key=lambda answer: answer["seconds"])


def measure(quick: bool, rounds: int) -> dict:
    """Rates of a process with one thread, and a row per world and cell, with errors."""
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=PATIENCE, wait_for_workers=False)
    chosen, started = cells(quick), []
    most = max(size for _, size in chosen)
    answers: dict = {(world, cell): [] for world in WORLDS for cell in chosen}
    try:
        for world in WORLDS:
            command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.cost_processes"]
            arguments = [*command, str(store.port), str(most), str(world)]
            started.append(subprocess.Popen(arguments, start_new_session=True))
            for rank in range(world):
                store.get(f"{world}: {rank} is ready")
        turn = 0
        for _ in range(rounds + 1):  # the first warms up
            for cell in chosen:
                for world in WORLDS:
                    answers[world, cell].append(ask(store, world, turn, cell))
                turn += 1
        for world in WORLDS:
            store.set(f"{world}: turn {turn}", "end")
        for process in started:
            process.wait(PATIENCE.seconds)
    finally:
        for process in started:
            if process.poll() is None:  # something went wrong
                process.terminate()  # mm.launch ends what it has started
                process.wait()
    return with_errors([row(*key, found[1:]) for key, found in answers.items()])


def row(world: int, cell: tuple[float, int], answers: list[dict]) -> dict:
    prediction = cost.Prediction(**answers[0]["prediction"])
    seconds = statistics.median(answer["seconds"] for answer in answers)
    return {"processes": world, "ratio": cell[0], "pairs of a process": cell[1],
            "seconds": seconds, "prediction": prediction}  # fmt: skip


def with_errors(rows: list[dict]) -> dict:
    """One process fits its rates, every third cell of two processes the cost of the exchange."""
    alone = [row for row in rows if row["processes"] == 1]
    both = [row for row in rows if row["processes"] > 1]
    rates = cost.fit_rates([r["prediction"] for r in alone], [r["seconds"] for r in alone])
    for i, row_ in enumerate(rows):
        row_["fitted"] = row_["processes"] == 1 or i % 3 == 0
    exchange = [
        (r["seconds"] - r["prediction"].time(rates)) / (r["prediction"].exchanged / 1e9)
        for r in both
        if r["fitted"]
    ]
    rates.seconds_per_exchanged_gigabyte = max(0.0, statistics.median(exchange))
    for row_ in rows:
        row_["predicted"] = row_["prediction"].time(rates)
        row_["error"] = row_["predicted"] / row_["seconds"] - 1
    return {"rates": rates, "rows": rows}


if __name__ == "__main__":
    port, most, processes = map(int, sys.argv[1:])
    mm.launch(work, port, most, num_processes=processes)
