"""One JupyterLab server and one chromium for all browser tests."""

import pytest

from tests.browser import harness


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    pytest.importorskip("jupyterlab")
    with harness.start_lab(tmp_path_factory.mktemp("lab")) as server:
        yield server


@pytest.fixture(scope="session")
def browser():
    pytest.importorskip("playwright")
    if not harness.find_chromium():
        pytest.skip("no chromium on this machine")
    with harness.start_browser() as chromium:
        yield chromium
