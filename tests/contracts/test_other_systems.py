"""mmkit runs where there is no fork, no flock and no pread, on Windows and macOS, and on MPS."""

import json
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from mmkit import device, files
from mmkit.cli.commands import _peak_gigabytes
from mmkit.training import optim
from mmkit.training.run import run_folder
from tests.other_system import GONE, use

ROOT = Path(__file__).parents[2]
LINUX_ONLY = re.compile(
    rf"\bos\.({'|'.join(GONE)}|O_DIRECT|statvfs|fchmod|posix_\w+)\b"
    r"|\bimport (fcntl|resource|msvcrt|pwd|grp|termios|ctypes)\b|\bctypes\.|malloc_trim"
    r"|\bsignal\.SIG(KILL|HUP|USR\d|ALRM)\b|/proc/|[\"']fork[\"']"
)
MOVE = torch.Tensor.to


@pytest.mark.skipif(sys.platform != "linux", reason="imitates Windows on Linux")
def test_all_gives_the_same_without_linux_s_own_calls(tmp_path, monkeypatch, capfd):
    """Built-in images, files, cache, shards; two steps with a worker, saved, resumed, loaded."""
    command = [sys.executable, "-m", "tests.other_system", str(tmp_path / "there")]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 0, other.stderr
    assert json.loads(other.stdout.splitlines()[-1]) == use(tmp_path / "here")


def test_calls_that_only_linux_has_stand_where_they_have_a_fallback():
    found = {}
    for path in sorted((ROOT / "mmkit").rglob("*.py")):
        for match in LINUX_ONLY.finditer(path.read_text(encoding="utf-8")):
            found.setdefault(path.relative_to(ROOT / "mmkit").as_posix(), set()).add(match[0])
    assert found == {
        "cli/commands.py": {"import resource"},
        "data/workers.py": {'"fork"'},
        "files.py": {"import fcntl", "import msvcrt", "os.preadv", "os.pread"},
        "training/launch/notebook.py": {'"fork"'},
        "training/launch/preflight.py": {'"fork"', "os.fork"},
        "training/run.py": {"os.register_at_fork"},
    }


LOCKING = """
import sys
from tests import other_system
import torch
other_system.take_away()
from mmkit.files import lock
file = open(sys.argv[1], "ab+")
file.write(b"owner"), file.flush()
print(lock(file, wait=False), file.tell(), flush=True)
sys.stdin.read()
"""


def locking(path):
    """A process that tries to lock a file, and ends when its input does."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", LOCKING, str(path)], cwd=ROOT, **pipes)


@pytest.mark.skipif(sys.platform != "linux", reason="imitates Windows on Linux")
def test_a_lock_of_windows_keeps_others_out_and_moves_nothing(tmp_path):
    first = locking(tmp_path / "x")
    assert first.stdout.readline().split() == ["True", "5"]
    second = locking(tmp_path / "x")
    assert second.stdout.readline().split() == ["False", "10"]
    assert (tmp_path / "x").read_bytes() == b"ownerowner"  # what is locked can be read
    first.communicate("")
    third = locking(tmp_path / "x")
    assert third.stdout.readline().split() == ["True", "15"]
    second.communicate(""), third.communicate("")


def test_a_lock_of_windows_waits_and_tells_a_system_without_locks(tmp_path, monkeypatch):
    held = [13, 13, 13]  # EACCES, three times

    def locking(number, mode, count):
        if held:
            raise OSError(held.pop(), "")

    monkeypatch.setattr(files, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    with open(tmp_path / "x", "wb") as file:
        assert files.lock(file) is True and not held
        held.append(22)  # EINVAL
        assert files.lock(file) is None


@pytest.mark.parametrize("name", ["con", "NUL.txt", "a/com1", "a:b", "what?", "dot.", "space "])
def test_windows_refuses_names_that_it_would_change(tmp_path, monkeypatch, name):
    monkeypatch.setattr("mmkit.training.run.WINDOWS", True)
    with pytest.raises(ValueError, match="Windows has no folder"):
        run_folder(tmp_path, name)
    assert run_folder(tmp_path, "a/context-2 b") == tmp_path / "a" / "context-2 b"
    monkeypatch.setattr("mmkit.training.run.WINDOWS", False)
    assert run_folder(tmp_path, name).is_relative_to(tmp_path)


def test_reads_by_offset_need_neither_pread_nor_preadv(tmp_path, monkeypatch):
    """From many threads at once, and beyond the end."""
    (tmp_path / "x").write_bytes(bytes(range(251)))
    for name in ("pread", "preadv"):
        monkeypatch.delattr(os, name, raising=False)
    file, wrong = files.OpenFile(files.open_to_read(tmp_path / "x"), start=1), []

    def read(offset):
        for _ in range(200):
            buffer = bytearray(7)
            assert files.read_at(file, offset, buffer) == 7
            if bytes(buffer) != bytes(range(offset + 1, offset + 8)):
                wrong.append(buffer)

    threads = [threading.Thread(target=read, args=(offset,)) for offset in (3, 50, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert files.read_at(file, 248, bytearray(7)) == 2
    assert files.pread(file.number, 9, 249) == bytes([249, 250])


def test_the_largest_memory_is_known_without_the_module_resource(monkeypatch):
    there = _peak_gigabytes()
    monkeypatch.setitem(sys.modules, "resource", None)
    assert 0.3 * there < _peak_gigabytes() <= 1.1 * there


# ---- Apple's GPUs --------------------------------------------------------------------------------


def moved(tensor, *where):
    """`Tensor.to`, with the CPU in the place of Apple's GPU."""
    return tensor if where == ("mps",) else MOVE(tensor, *where)


def moved_wrongly(tensor, *where):
    """A GPU whose integers have other bits."""
    return tensor + 1 if where == ("mps",) else MOVE(tensor, *where)


@pytest.mark.parametrize(("to", "computes"), [(moved, True), (moved_wrongly, False), (MOVE, False)])
def test_an_apple_gpu_is_used_where_it_computes_as_a_step_needs(monkeypatch, to, computes):
    """Not where it is listed only (here "mps" raises), nor where its noise is other noise."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "to", to)
    assert device.mps_computes.__wrapped__() is computes


def test_one_process_uses_an_apple_gpu_and_several_do_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "mps_computes", lambda: True)
    assert device.trains_on_gpu()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not device.trains_on_gpu()


def test_an_apple_gpu_computes_in_float32_and_with_plain_kernels():
    mps = torch.device("mps")
    assert device.pick_precision("auto", mps) is None
    assert device.why_precision("auto", mps) == "auto: on Apple's GPUs"
    assert not device.autocast_for("auto", mps)._enabled
    assert optim.orthogonalizing_type(mps) is torch.float32
    assert not torch.amp.GradScaler("mps", enabled=False).is_enabled()
