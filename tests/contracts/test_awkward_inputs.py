"""Nothing is lost silently: every awkward or hostile input is loaded, skipped or rejected."""

import json
import re

import pytest

from tests.data.awkward import OPTIONS, watched
from tests.data.awkward_any import ANY
from tests.data.awkward_files import CHECKPOINTS, PUBLISHED
from tests.data.awkward_images import IMAGES
from tests.data.awkward_seams import SEAMS
from tests.data.awkward_shards import SHARDS
from tests.data.awkward_sources import FOLDERS, HUB
from tests.data.awkward_tables import PATHS, TABLES

CASES = [*TABLES, *PATHS, *IMAGES, *HUB, *FOLDERS, *ANY, *PUBLISHED, *SHARDS, *SEAMS]
CASES += CHECKPOINTS


@pytest.fixture(autouse=True)
def watch(tmp_path_factory, monkeypatch):
    """Nothing is started, nothing waits for ever, see `watched`."""
    with watched(tmp_path_factory.mktemp("cache"), monkeypatch):
        yield


def test_there_are_enough_cases_and_each_has_a_name():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 60
    assert {case.expect for case in CASES} == {"load", "skip", "reject"}
    assert all(case.words for case in CASES if case.expect != "load")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on broken files
@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_each_input_is_loaded_skipped_or_rejected(case, tmp_path):
    load = case.make(tmp_path)
    if case.expect == "load":
        for on_error in ("raise", "skip"):
            data = load(on_error=on_error, **OPTIONS)
            assert not data.report.skipped and data.report.loaded == data.report.rows > 0
            if case.check:
                case.check(data)
    elif case.expect == "skip":
        with pytest.raises((ValueError, FileNotFoundError)) as refused:
            load(on_error="raise", **OPTIONS)
        assert re.search(case.words, str(refused.value), re.DOTALL), refused.value
        report = load(on_error="skip", **OPTIONS).report
        assert (report.loaded, sum(report.skipped.values())) == (case.loaded, case.bad_rows)
        assert report.loaded + case.bad_rows == report.rows
        said = "\n".join(line for lines in report.examples.values() for line in lines)
        assert re.search(case.words, said, re.DOTALL), said
        assert len(said) < 2000
        json.loads(report.save(tmp_path / "report.json").read_text("utf-8"))
        str(report).encode()
    else:
        for on_error in ("raise", "skip"):
            with pytest.raises((ValueError, OSError)) as refused:
                load(on_error=on_error, **OPTIONS)
            assert re.search(case.words, str(refused.value), re.DOTALL), refused.value
            assert len(str(refused.value)) < 2000
