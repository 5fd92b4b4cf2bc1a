"""The README points at things that exist and quotes its notebooks; CONTRIBUTING lists modules."""

import json
import re
from pathlib import Path

import nbformat

from tests.module_tree import PAGE, page

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(targets) > 5
    assert [t for t in targets if not (ROOT / t).exists()] == []
    assert "@@" not in README


def test_the_tree_of_modules_is_that_of_their_docstrings():
    """`python -m tests.module_tree` writes it."""
    written = PAGE.read_text()
    assert page(written) == written


def plain(text):
    """On one line, without what only marks words."""
    return " ".join(re.sub(r"[*`]", "", text).split())


def printed(notebook):
    """What the cells of a notebook printed when it was last run."""
    cells = nbformat.read(ROOT / f"notebooks/{notebook}.ipynb", as_version=4).cells
    return "".join(o.get("text", "") for cell in cells for o in cell.get("outputs", []))


def test_what_maskers_take_away_is_what_the_notebook_measured():
    rows = re.findall(
        r"^(\w+) .* ([\d.]+) % +[\d.]+ % at 0.25 0.5 0.75 0.9$", printed("02_masking"), re.M
    )
    at = {name: f"{float(share):.0f}" for name, share in rows}
    said = [f"at 75 % hidden {at['grid']} % with a grid", f"{at['random']} at random"]
    said += [f"{at['attentive']} where the model's own attention", f"{at['block']} with blocks"]
    assert all(words in plain(README) for words in said)


def test_what_plain_accumulation_loses_is_what_the_notebook_measured():
    row = r"naive, 8 pieces +R@1 \(points\) .* -([\d.]+) ± ([\d.]+)\n"
    lost, wide = map(float, re.search(row, printed("06_many_processes")).groups())
    said = f"{lost:.1f} points of R@1 at equal steps (95 % interval ± {wide:.1f})"
    assert said in plain(README)


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
