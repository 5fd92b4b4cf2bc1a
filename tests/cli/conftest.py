"""The command line, called in this process, and a folder of a user's images."""

import sys

import pytest

from mmkit.cli.commands import main
from tests.cli.own_images import ARTISTS, scene


@pytest.fixture
def mmkit(cache, monkeypatch, capsys):
    """Call `main` as `python -m mmkit` would; (exit status, output, error message)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["mmkit", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, said.out, said.err

    return call


@pytest.fixture
def own(cache, tmp_path):
    """A folder named "my set": 48 images in pics/, pairs.csv, and files that a test adds."""
    folder = tmp_path / "my set"
    (folder / "pics").mkdir(parents=True)
    rows = ["file,words,artist"]
    for i in range(48):
        scene(i).save(folder / f"pics/{i}.png")
        rows.append(f"{i}.png,image of number {i},{ARTISTS[i % 24]}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return folder
