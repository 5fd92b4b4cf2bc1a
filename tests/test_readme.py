"""The README points at things that exist, lists every module, and quotes its notebooks."""

import json
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


def test_the_table_of_equal_times_is_that_of_its_results():
    """Price of a step and R@1 after each time, a row for each hidden share."""
    results = ROOT / "tests/benchmarks/results/equal_time.json"
    table = {}
    for row in json.loads(results.read_text())["rows"]:
        line = table.setdefault(row["hidden"], [f"{row['ms of a step']:.0f} ms"])
        line.append(f"{row['mean']:.1f} %")
    for hidden, cells in table.items():
        share = f"{100 * hidden:.0f} %" if hidden else "none"
        assert f"| {' | '.join([share, *cells])} |" in plain(README)
