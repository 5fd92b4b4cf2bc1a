"""The result or the error of a rank comes back, and each rank sees the others."""

import textwrap

from tests.training.launch.cells import FAILING, run


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
