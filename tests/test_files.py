"""Files are complete or absent, whatever ends the process or fills the disk."""

import errno
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import mmkit as mm
from mmkit.files import renamed, write_atomically
from mmkit.models.checkpoint import read_checkpoint


def test_a_write_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    """Bytes, then name, then folder: after a power cut there is a complete file or none."""
    done = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(number):
        name = Path(os.readlink(f"/proc/self/fd/{number}")).name
        done.append(("fsync", "temporary" if name.endswith(".tmp") else name))
        fsync(number)

    def noting_replace(source, target):
        done.append(("size", os.path.getsize(source)))  # nothing is left in Python's buffer
        done.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    write_atomically({"step": torch.arange(1007)}, tmp_path / "state.pth")
    size = (tmp_path / "state.pth").stat().st_size
    assert done == [
        ("fsync", "temporary"), ("size", size), ("rename", "state.pth"), ("fsync", tmp_path.name)
    ]  # fmt: skip


def check_no_room(folder, why):
    """Check that writing `BIG` fails with a message and leaves the earlier file alone."""
    path = folder / "last" / "state.pth"
    with pytest.raises(OSError) as failed:
        write_atomically(BIG, path)
    words = str(failed.value)
    assert failed.value.errno == why
    assert f"cannot write {path}: {os.strerror(why)}" in words
    assert "It takes 8.0 MB, " in words and " MB are free there" in words
    assert "the earlier state.pth is intact, and no unfinished file remains" in words
    for remedy in ("free some space", "output_dir", "keep_last"):
        assert remedy in words
    assert read_checkpoint(path)["step"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["state.pth"]
    return words


BIG = {"step": 2, "weights": [torch.zeros(1_000_000), torch.zeros(1_000_000)]}


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A real disk, of 3 MB, that becomes full in the middle of the write."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        path = tmp_path / "last" / "state.pth"
        write_atomically({"step": 1}, path)
        assert re.search(r"3\.[01] MB are free", check_no_room(tmp_path, errno.ENOSPC))
        BIG["weights"].pop()
        with pytest.raises(OSError, match=r"It takes 4\.0 MB"):
            write_atomically(BIG, path)
        write_atomically({"step": 3}, path)  # there is room for this
        assert read_checkpoint(path)["step"] == 3
    finally:
        BIG["weights"] = [torch.zeros(1_000_000), torch.zeros(1_000_000)]
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_limit_on_file_size_is_as_a_full_disk(tmp_path):
    """The same without root: the kernel refuses more than 1 MB."""
    write_atomically({"step": 1}, tmp_path / "last" / "state.pth")
    code = f"""
        import errno, pathlib, resource
        from tests.test_files import check_no_room

        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # Python ignores SIGXFSZ
        check_no_room(pathlib.Path({str(tmp_path)!r}), errno.EFBIG)
        print("as it should")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "as it should" in done.stdout, done.stderr


def test_what_is_no_disk_error_is_not_called_one(tmp_path):
    with pytest.raises((AttributeError, pickle.PicklingError)):
        write_atomically({"step": lambda: 1}, tmp_path / "state.pth")
    try:
        raise FileNotFoundError("of something else, being handled")
    except FileNotFoundError:
        with pytest.raises(RuntimeError, match="of something else, too"):
            write_atomically(Failing(), tmp_path / "state.pth")
    with pytest.raises(OSError, match=r"there is no earlier one.*check that folder") as refused:
        write_atomically({"step": 1}, "/proc/nowhere/state.pth")
    assert "free some space" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


class Failing(dict):
    def __reduce_ex__(self, protocol):
        raise RuntimeError("of something else, too")


def test_only_what_killed_processes_left_is_removed(tmp_path):
    """The file of another running process that writes the same file is not touched."""
    path, other = tmp_path / "state.pth", tmp_path / "other.pth"
    stale = [tmp_path / ".state.pth.4711.tmp", tmp_path / ".state.pth.0123456789ab.tmp"]
    foreign = tmp_path / ".other.pth.0123456789ab.tmp"
    for file in (*stale, foreign):
        file.write_bytes(b"half")
    with renamed(path) as living:
        living.write(b"half of another")
        write_atomically({"step": 1}, path)
        assert not any(file.exists() for file in stale)
        assert Path(living.name).exists() and foreign.exists()
        torch.save({"step": 2}, living)
    assert sorted(p.name for p in tmp_path.iterdir()) == [foreign.name, path.name]
    write_atomically({}, other)
    assert not foreign.exists()


def test_two_processes_may_write_the_same_file(tmp_path):
    """The last one wins, and every reader finds a complete file."""
    path = tmp_path / "state.pth"
    write_atomically({"step": -1}, path)
    children = []
    for number in range(3):
        code = f"""
            import torch
            from mmkit.files import write_atomically
            weights = torch.full((7919,), {number})
            for step in range(40):
                write_atomically({{"step": step, "w": weights}}, {str(path)!r})
        """
        children.append(subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)]))
    read = 0
    while any(child.poll() is None for child in children):
        read_checkpoint(path)
        read += 1
    assert [child.wait() for child in children] == [0, 0, 0] and read > 10
    last = read_checkpoint(path)
    assert last["step"] == 39 and len(last["w"].unique()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["state.pth"]


def test_a_path_is_shown_from_the_working_folder_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mm.files.shown(tmp_path / "runs/x") == "runs/x"
    assert mm.files.shown("runs/x") == "runs/x"
    assert mm.files.shown("/proc/self") == "/proc/self"
