"""Files are found wherever the process is, and a changed one is noticed."""

import functools
import os

import pytest
from PIL import Image

from mmkit.data.image_files import Cells, Files
from mmkit.data.rows import within
from mmkit.errors import Refused


def test_relative_paths_stay_valid_when_the_process_changes_its_folder(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"the image")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = Files(["a.png"])
    stamp = store.stamp(0)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with store.open(0) as file:
        assert file.read() == b"the image"
    assert store.name(0) == "a.png" and store.stamp(0) == stamp != ""


def test_a_file_of_another_size_or_time_has_another_stamp(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    store, stamps = Files([path]), set()
    stamps.add(store.stamp(0))
    path.write_bytes(b"four")
    stamps.add(store.stamp(0))
    os.utime(path, ns=(10**9, 10**9))
    stamps.add(store.stamp(0))
    assert len(stamps) == 3 and store.stamp(0) in stamps
    path.unlink()
    assert store.stamp(0) == ""


def test_cells_give_bytes_images_and_files_of_their_folder_alone(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/two.png").write_bytes(b"two")
    (tmp_path / "secret.png").write_bytes(b"secret")
    drawn = Image.new("RGB", (5, 7), (1, 2, 3))
    cells = [b"zero", {"bytes": b"one", "path": None}, "two.png", drawn, "../secret.png", None, []]
    store = Cells(cells, "birds, image", functools.partial(within, str(tmp_path / "in")))
    assert len(store) == 7 and store.name(1) == "birds, image of row 1"
    assert [store.open(row).read() for row in (0, 1, 2)] == [b"zero", b"one", b"two"]
    assert Image.open(store.open(3)).getpixel((0, 0)) == (1, 2, 3)
    with pytest.raises(Refused, match=r"image of row 4: .*secret\.png, outside"):
        store.open(4)
    with pytest.raises(Refused, match="birds, image of row 5 is empty"):
        store.open(5)
    with pytest.raises(Refused, match="birds, image of row 6 holds list, not an image"):
        store.open(6)
