"""Processes meet in the calls that they share, and are told where the others are."""

import subprocess
import sys
import textwrap


def test_processes_meet_in_one_call_and_are_told_of_another():
    """Two processes: together in the first call, each in another one in the second."""
    code = """
        import mmkit as mm
        from mmkit.distributed import rank_and_world_size
        from mmkit.joint_calls import joint

        def calls():
            rank = rank_and_world_size()[0]
            with joint("training"):
                pass
            try:
                with joint("saving" if rank == 0 else "evaluating"):
                    return "they went on"
            except RuntimeError as error:
                return str(error)

        print(mm.launch(calls, num_processes=2))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    words = "process 0 of 2 is in saving, process 1 is in evaluating: all processes must make"
    assert words in done.stdout, done.stderr[-2000:]
