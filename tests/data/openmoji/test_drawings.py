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
    monkeypatch.setattr(module, "render_one", lambda *args: pytest.fail("rendered again"))
    second = render(stems, 11, tmp_path)
    assert isinstance(second, np.memmap) and not second.flags.writeable
    assert second.dtype == np.uint8 and second.shape == (3, 3, 11, 11)
    assert np.array_equal(first, second)


def test_a_render_that_dies_leaves_nothing_behind(tmp_path, monkeypatch):
    stems, whole = ["1F34E", "1F600", "1F1EB-1F1F7"], module.render_one

    def dies_at_the_second(stem, size):
        return whole(stem, size) if stem == "1F34E" else 1 / 0

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(module, "render_one", dies_at_the_second)
        render(stems, 11, tmp_path)
    (keys,) = (tmp_path / "drawings").glob("*.keys")
    assert keys.stat().st_size == 16  # the one that was finished
    # a killed process leaves a part of a row, which is never read
    with open(keys.with_suffix(".rows"), "ab") as file:
        file.write(b"half of a row")
    found = render(stems, 11, tmp_path)
    assert found.shape == (3, 3, 11, 11)
    assert all((found[row] == whole(stem, 11)).all() for row, stem in enumerate(stems))


def test_two_processes_may_render_at_once(tmp_path):
    program = (
        "import sys, numpy as np; from mmkit.data.openmoji.images import render;"
        "from mmkit.data.openmoji.drawings import read_table;"
        "some = [entry['codepoints'] for entry in read_table()][::40];"
        "print(int(np.array(render(some, 13, sys.argv[1])).sum()))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    sums = [process.communicate(timeout=100)[0] for process in both]
    assert sums[0] == sums[1] and int(sums[0]) > 0
    assert len(list((tmp_path / "drawings").glob("*.rows"))) == 1
