"""The README links to existing files and quotes result files; CONTRIBUTING lists the modules."""

import re
import statistics
from pathlib import Path

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


def number(text: str, row: str) -> list[float]:
    """The numbers in the second cell of the README's row that begins like this."""
    (cell,) = re.findall(rf"^\| {re.escape(row)}[^|]*\|([^|]*)\|", text, re.MULTILINE)
    return [float(found) for found in re.findall(r"\d+\.?\d*", cell)]


def test_the_table_is_that_of_its_result_files():
    at = {
        (row["seconds"], row["masked"]): row["mean"] for row in results.read("equal_time")["rows"]
    }
    for row, masked in (("R@1 after 20 and 60 s", 0.5), ("the same, nothing masked", 0.0)):
        measured = [round(at[seconds, masked], 1) for seconds in (20, 60)]
        assert number(README, row)[-2:] == measured
    race = results.read("race")["runs"]
    for row, who in (("from image files", "mmkit"), ("the same, open_clip", "open_clip")):
        curves = [r["curve"] for r in race if (r["phase"], r["who"]) == ("race", who)]
        first = [next(s for s, score in curve if score >= 0.45) for curve in curves]
        assert number(README, row) == [round(statistics.median(first))]
    rows = {(row["size"], row["masked"]): row for row in results.read("step_speed")["rows"]}
    speed = rows["tiny", 0.5]["steps"]["open_clip"]["our speed / theirs"]["median"]
    assert number(README, "a whole training step") == [round(speed, 1)]


def test_it_is_short_and_its_twelve_lines_are_those_of_the_book():
    assert len(README.splitlines()) <= 160
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert code[0] in (ROOT / "docs/index.md").read_text()
