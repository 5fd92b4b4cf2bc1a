"""A path is shown from the working folder on."""

import mmkit as mm


def test_a_path_is_shown_from_the_working_folder_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mm.files.shown(tmp_path / "runs/x") == "runs/x"
    assert mm.files.shown("runs/x") == "runs/x"
    assert mm.files.shown("/proc/self") == "/proc/self"
