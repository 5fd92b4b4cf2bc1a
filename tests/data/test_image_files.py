"""Files are found wherever the process is, and a changed one is noticed."""

import os

from mmkit.data.image_files import Files


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
