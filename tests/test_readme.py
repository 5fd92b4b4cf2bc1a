"""The README points at things that exist, and lists every module."""

import re
from pathlib import Path

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
