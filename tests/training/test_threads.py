"""Parts computed in parallel equal those computed one after the other."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

import mmkit as mm
from mmkit.training.threads import parts_at_once, side_by_side

ROOT = Path(__file__).parents[2]


def test_results_come_in_the_order_of_the_items_and_at_the_same_time():
    together = threading.Barrier(3, timeout=10)

    def work(item):
        together.wait()  # passes only if all three run at the same time
        time.sleep(0.01 * (3 - item))
        return item * item, threading.current_thread() is threading.main_thread()

    assert side_by_side(work, [0, 1, 2]) == [(0, False), (1, False), (4, False)]
    assert side_by_side(lambda x: (x, threading.current_thread().name), [5]) == [(5, "MainThread")]
    assert side_by_side(work, []) == []


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_gradients_are_as_before(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        seen = side_by_side(lambda _: (torch.get_num_threads(), torch.is_grad_enabled()), [0, 1])
        assert seen == [(max(1, threads // 2), True)] * 2
        with torch.no_grad():
            seen = side_by_side(lambda _: torch.is_grad_enabled(), [0, 1])
        assert seen == [False, False]
        assert torch.get_num_threads() == threads and torch.is_grad_enabled()
    finally:
        torch.set_num_threads(before)


def test_what_one_raises_is_raised_and_threads_are_given_back():
    before = torch.get_num_threads()

    def work(item):
        if item:
            raise ValueError(f"part {item} failed")
        return item

    with pytest.raises(ValueError, match="part 1 failed"):
        side_by_side(work, [0, 1])
    assert torch.get_num_threads() == before
    assert side_by_side(work, [0, 0]) == [0, 0]


def test_a_forked_process_has_threads_of_its_own():
    side_by_side(lambda x: x, [0, 1])  # the parent's threads exist

    def child():
        torch.set_num_threads(1)
        assert side_by_side(lambda x: x + 1, [0, 1]) == [1, 2]

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(20)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, 3),
        ({"gradient_accumulation_steps": 2}, 3),
        ({"mim_weight": 1.0}, 3),
        ({"gradient_checkpointing": True}, 3),
        ({"accumulation": "naive"}, 1),
        ({"itm_weight": 1.0, "cross_modal": True}, 1),
    ],
    ids=str,
)
def test_a_step_is_cut_where_nothing_stands_against_it(
    settings, parts, make_model, make_data, tmp_path
):
    """By threads and size; never under DDP, with dropout, or where a micro-batch must be whole."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        config = mm.TrainingConfig(batch_size=23, output_dir=str(tmp_path), **settings)
        trainer = mm.MaskedMultimodalTrainer(config, make_data(23), None, make_model())
        assert parts_at_once(trainer, 3 * 16) == parts
        assert (
            parts_at_once(trainer, 2 * 16 + 15) == min(parts, 2) and parts_at_once(trainer, 5) == 1
        )
        dropping = trainer.model.image_projection[1]
        dropping.p = 0.1
        assert parts_at_once(trainer, 3 * 16) == 1
        dropping.p = 0.0
        trainer.net = torch.nn.Sequential(trainer.model)  # as DDP wraps it, even for one process
        assert parts_at_once(trainer, 3 * 16) == 1
    finally:
        torch.set_num_threads(before)


def test_a_child_of_one_process_trains_with_several_threads():
    """Under DDP, which expects a single backward pass."""
    code = """
import torch, mmkit as mm
torch.set_num_threads(2)
train, _, _ = mm.openmoji(64)
def fit():
    config = mm.TrainingConfig(max_steps=2, warmup_steps=1, batch_size=64, run_name="child")
    return mm.train_model(config, train.subset(range(64)))
run = mm.launch(fit, num_processes=1, child=True)
print(len(run.curve("loss")[1]))
"""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-2000:]
