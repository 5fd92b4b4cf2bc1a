"""Code as of a notebook's cell, run in a process of its own."""

import os
import subprocess
import sys
import textwrap

BEGIN = """
import multiprocessing, os, signal, sys, threading, time
import torch, torch.distributed as dist
import mmkit as mm
from mmkit.distributed import rank_and_world_size
"""
REFUSED = """
def refused(*args, **options):
    try:
        mm.launch(*args, **options)
    except (RuntimeError, ValueError) as error:
        print(type(error).__name__, error)
"""


def run(code: str, seconds: int = 60, **environment) -> subprocess.CompletedProcess:
    """Run code as a cell of a fresh process and return what it printed."""
    command = [sys.executable, "-c", BEGIN + REFUSED + textwrap.dedent(code)]
    environment = {**os.environ, "TQDM_DISABLE": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


FAILING = """
import warnings
def attempt(function):
    started = time.monotonic()
    try:
        print(mm.launch(function, num_processes=2))
    except RuntimeError as error:
        print(error, "| from", repr(error.__cause__))
    assert multiprocessing.active_children() == [] and time.monotonic() - started < 20
    print("-----")
"""
