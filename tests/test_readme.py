"""The README points at things that exist, lists every module, and quotes its notebooks."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(targets) > 5
    assert [t for t in targets if not (ROOT / t).exists()] == []
    assert "@@" not in README


def test_every_module_has_its_line():
    modules = {path.name for path in (ROOT / "mmkit").glob("*.py")} - {"__init__.py"}
    listed = set(re.findall(r"^  (\w+\.py) ", README, re.MULTILINE))
    assert listed == modules


def plain(text):
    """On one line, without what only marks words."""
    return " ".join(re.sub(r"[*`]", "", text).split())


@pytest.mark.parametrize(
    "notebook, quoted",
    [
        ("02_masking", r"With everything visible .*? under block"),
        ("06_many_processes", r"[\d.]+ points of R@1 at equal steps \(95 % interval ± [\d.]+\)"),
    ],
)
def test_numbers_are_those_that_a_notebook_shows(notebook, quoted):
    """What a cell computed when the notebook was last run stands in the README, word by word."""
    cells = nbformat.read(ROOT / f"notebooks/{notebook}.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}).get("text/markdown", "") for output in outputs]
    sentence = re.search(quoted, plain(" ".join(shown)))
    assert sentence and sentence[0] in plain(README)
