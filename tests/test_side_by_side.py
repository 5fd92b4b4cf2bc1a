"""Parts computed at the same time are those computed one after the other."""

import multiprocessing
import threading
import time

import pytest
import torch

from mmkit.side_by_side import side_by_side


def test_results_come_in_the_order_of_the_items_and_at_the_same_time():
    together = threading.Barrier(3, timeout=10)

    def work(item):
        together.wait()  # passes only where all three run at once
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
    side_by_side(lambda x: x, [0, 1])  # the parent's are there

    def child():
        torch.set_num_threads(1)
        assert side_by_side(lambda x: x + 1, [0, 1]) == [1, 2]

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(20)
    assert process.exitcode == 0
