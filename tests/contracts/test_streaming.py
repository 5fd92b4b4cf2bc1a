"""Training from tar shards: every sample once an epoch, on any processes, workers, after kills."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mmkit.training.run import Run
from tests.train_small import data, data_in_shards

ROOT = Path(__file__).parents[2]
IMAGES, EPOCHS = 53, 2  # 8 shards of 7 images at most; 5 steps an epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streaming")
    data_in_shards(folder / "shards", IMAGES)  # written and indexed once, not by every process
    return folder


def train(folder, name, *options, processes=1, **values):
    """A real training run in a process of its own, or several; its exit status."""
    values = json.dumps({"num_epochs": EPOCHS, "checkpoint_every": 1} | values)
    command = [sys.executable, "-m", "tests.train_small", str(folder), name, values, "--shards",
               "--record", "--processes", str(processes), *options]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode


def seen(folder, name) -> dict[int, Counter]:
    """How often each sample was trained on in each epoch, over all processes."""
    counts = {epoch: Counter() for epoch in range(EPOCHS)}
    for file in (folder / name).glob("masks-*.jsonl"):
        for line in file.read_text().splitlines():
            epoch, sample, *_ = json.loads(line)
            counts[epoch][sample] += 1
    return counts


def losses(folder, name) -> list[float]:
    return [r["loss"] for r in Run.load(folder / name).history if r["split"] == "train"]


ONCE = {epoch: Counter(range(IMAGES)) for epoch in range(EPOCHS)}


@pytest.fixture(scope="module")
def plain(folder):
    """One process, no worker."""
    assert train(folder, "plain", num_workers=0) == 0
    return losses(folder, "plain")


@pytest.mark.slow
@pytest.mark.parametrize("processes, workers", [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2)])
def test_every_sample_once_an_epoch(folder, plain, processes, workers):
    name = f"{processes}-{workers}"
    assert train(folder, name, processes=processes, num_workers=workers) == 0
    assert seen(folder, name) == seen(folder, "plain") == ONCE
    if processes == 1:
        assert losses(folder, name) == plain
    else:
        assert losses(folder, name) == pytest.approx(plain, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, workers",
    [(1, (2, 2, 2)), (2, (1, 1, 1)), (1, (0, 1, 0)), (2, (2, 0, 2))],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_every_sample_once_though_killed_in_the_middle(folder, plain, processes, workers):
    """Twice, with the same number of workers or another one, which changes nothing."""
    name = f"killed-{processes}-{workers[0]}"
    begin, go_on, finish = (dict(processes=processes, num_workers=count) for count in workers)
    assert train(folder, name, "--kill-at", "3", **begin) != 0
    assert sum(seen(folder, name)[0].values()) < IMAGES
    assert train(folder, name, "--resume", "--kill-at", "7", **go_on) != 0
    assert train(folder, name, "--resume", **finish) == 0
    assert seen(folder, name) == ONCE
    assert losses(folder, name) == (plain if processes == 1 else pytest.approx(plain, rel=1e-3))


def test_shards_give_the_batches_of_the_images(folder):
    """The same images, captions and ids as in memory; an epoch reads them shard by shard."""
    shards, memory = data_in_shards(folder / "shards", IMAGES), data(IMAGES)
    one, other = shards.batch(range(IMAGES)), memory.batch(range(IMAGES))
    for name in ("pixel_values", "input_ids", "valid", "sample_ids"):
        assert getattr(one, name).equal(getattr(other, name)), name
    assert one.correct().equal(other.correct())
    batches = shards.epoch_rows(seed=3, epoch=1, steps=5)
    assert sorted(row for rows in batches for row in rows.tolist()) == list(range(IMAGES))
    assert [len(rows) for rows in batches] == [11, 11, 11, 10, 10]
    again, later = (shards.epoch_rows(seed=3, epoch=e, steps=5) for e in (1, 2))
    assert all(a.equal(b) for a, b in zip(batches, again, strict=True))
    assert not all(a.equal(b) for a, b in zip(batches, later, strict=True))
