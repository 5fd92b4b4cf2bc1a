"""Drawings are rendered once, whole, by any number of processes."""

import subprocess
import sys

import numpy as np
import pytest

from mmkit.data.openmoji import images as module
from mmkit.data.openmoji.images import render


def test_a_second_call_renders_nothing(tmp_path, monkeypatch):
    stems = ["1F34E", "1F600", "1F1EB-1F1F7"]
    first = np.array(render(stems, 11, tmp_path))
    monkeypatch.setattr(module, "_render", lambda *args: pytest.fail("rendered again"))
    second = render(stems, 11, tmp_path)
    assert isinstance(second, np.memmap) and not second.flags.writeable
    assert second.dtype == np.uint8 and second.shape == (3, 3, 11, 11)
    assert np.array_equal(first, second)


def test_a_render_that_dies_leaves_nothing_behind(tmp_path, monkeypatch):
    stems, whole = ["1F34E", "1F600", "1F1EB-1F1F7"], module._render

    def dies_at_the_second(stem, size):
        return whole(stem, size) if stem == "1F34E" else 1 / 0

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(module, "_render", dies_at_the_second)
        render(stems, 11, tmp_path)
    assert list(tmp_path.iterdir()) == []
    # a killed process leaves half a file under another name, which is never read
    (tmp_path / "openmoji-half.tmp").write_bytes(b"\x93NUMPY half of it")
    assert render(stems, 11, tmp_path).shape == (3, 3, 11, 11)


def test_two_processes_may_render_at_once(tmp_path):
    program = (
        "import sys, numpy as np; from mmkit.data.openmoji.images import named_drawings, render;"
        "print(int(np.array(render(named_drawings()[::40], 13, sys.argv[1])).sum()))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    sums = [process.communicate(timeout=100)[0] for process in both]
    assert sums[0] == sums[1] and int(sums[0]) > 0
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]
