"""The README links to existing files and quotes its notebooks; CONTRIBUTING lists the modules."""

import re
from pathlib import Path

import nbformat

from mmkit import results
from tests.module_tree import PAGE, page

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_links_lead_to_existing_files():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(targets) > 5
    assert [t for t in targets if not (ROOT / t).exists()] == []
    assert "@@" not in README


def test_the_tree_of_modules_is_that_of_their_docstrings():
    """`python -m tests.module_tree` writes it."""
    written = PAGE.read_text()
    assert page(written) == written


def plain(text):
    """The text on one line, without Markdown's marks for emphasis and code."""
    return " ".join(re.sub(r"[*`]", "", text).split())


def printed(notebook):
    """What the cells of a notebook printed when it was last run."""
    cells = nbformat.read(ROOT / f"notebooks/{notebook}.ipynb", as_version=4).cells
    return "".join(o.get("text", "") for cell in cells for o in cell.get("outputs", []))


def test_what_maskers_take_away_is_what_the_notebook_measured():
    rows = re.findall(
        r"^(\w+) .* ([\d.]+) % +[\d.]+ % at 0.25 0.5 0.75 0.9$", printed("02_masking"), re.M
    )
    at = {name: f"{float(fraction):.0f}" for name, fraction in rows}
    quoted = [f"at 75 % masked {at['grid']} % with a grid", f"{at['random']} at random"]
    quoted += [f"{at['attentive']} where the model's own attention", f"{at['block']} with blocks"]
    assert all(text in plain(README) for text in quoted)


def test_what_naive_accumulation_loses_is_what_the_notebook_measured():
    row = r"naive, 8 micro-batches +R@1 \(points\) .* -([\d.]+) ± ([\d.]+)\n"
    lost, half_width = map(float, re.search(row, printed("06_many_processes")).groups())
    quoted = f"{lost:.1f} points of R@1 at equal steps (95 % interval ± {half_width:.1f})"
    assert quoted in plain(README)


def test_the_table_of_equal_times_is_that_of_its_results():
    """Time of a step and R@1 after each time, a row for each masked fraction."""
    table = {}
    for row in results.read("equal_time")["rows"]:
        line = table.setdefault(row["masked"], [f"{row['ms of a step']:.0f} ms"])
        line.append(f"{row['mean']:.1f} %")
    for masked, cells in table.items():
        fraction = f"{100 * masked:.0f} %" if masked else "none"
        assert f"| {' | '.join([fraction, *cells])} |" in plain(README)
