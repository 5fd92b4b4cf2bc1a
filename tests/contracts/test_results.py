"""Measured results are found by name, lie in the package, and stay small."""

from pathlib import Path

import pytest

from mmkit import results
from tests.benchmarks.places import FOLDER, PUBLISHED, json_file

MOST_BYTES = 1_000_000
NAMES = sorted(path.stem for path in PUBLISHED.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_results_name_their_machine(name):
    found = results.read(name)
    assert {"cpu", "cores", "torch", "date"} <= found["machine"].keys()
    assert len(found) > 1


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"no results 'step_sped'; .*'step_speed'"):
        results.read("step_sped")


def test_they_are_small_and_only_there():
    assert sum(path.stat().st_size for path in PUBLISHED.iterdir()) < MOST_BYTES
    assert [name for name in NAMES if (FOLDER / f"{name}.json").exists()] == []


def test_a_benchmark_writes_where_its_results_are_read(tmp_path):
    assert json_file("race") == Path(results.__file__).with_name("race.json")
    assert json_file("draw_masks") == FOLDER / "draw_masks.json"
    assert json_file("race", tmp_path) == tmp_path / "race.json"
