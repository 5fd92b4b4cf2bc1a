"""The files of a release agree with pyproject.toml and have the form that their readers expect."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import mmkit as mm
from tests.notebook_start import repository

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
INPUTS = {"markdown", "input", "textarea", "dropdown", "checkboxes"}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_stands_in_pyproject_alone():
    assert mm.__version__ == PROJECT["version"]
    for name in ("mmkit/__init__.py", "CITATION.cff", "Makefile"):
        assert PROJECT["version"] not in text_of(name)


def test_the_changelog_has_what_is_not_released_and_every_release():
    headings = re.findall(r"^## (.+)$", text_of("CHANGELOG.md"), re.M)
    assert headings[0] == "[Unreleased]"
    releases = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d", h) for h in headings[1:]]
    assert all(releases) and releases[0][1] == PROJECT["version"]
    kinds = set(re.findall(r"^### (.+)$", text_of("CHANGELOG.md"), re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_is_of_this_project():
    """Its form was checked by `cffconvert --validate`."""
    found = yaml.safe_load(text_of("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    assert found["repository-code"] == repository() == PROJECT["urls"]["Repository"]
    assert found["license"] == PROJECT["license"]
    assert [author["name"] for author in found["authors"]] == [
        author["name"] for author in PROJECT["authors"]
    ]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_for_issues_has_what_github_asks_for(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert form.keys() <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= form.keys()
    assert form.keys() <= {"name", "description", "body", "labels", "title", "assignees"}
    inputs = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in form["body"]} <= INPUTS and inputs
    names = [part["id"] for part in inputs]
    assert len(set(names)) == len(names)
    assert all(part["attributes"]["label"] for part in inputs)
    assert any(part.get("validations", {}).get("required") for part in inputs)


def test_bugs_questions_and_ideas_have_forms():
    assert {"bug", "question", "idea", "config"} == {path.stem for path in FORMS}


def test_continuous_integration_runs_files_that_exist():
    """Its form was checked by `check-jsonschema --builtin-schema vendor.github-workflows`."""
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]
    commands = {n: [s["run"] for s in job["steps"] if "run" in s] for n, job in jobs.items()}
    assert commands["all"] == [".ci/run"]
    paths = re.findall(r"\btests/[\w/.]+", " ".join(commands["quick"]))
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_ci_ends_with_the_tests_whose_summary_is_last():
    lines = [line for line in text_of(".ci/run").splitlines() if line.startswith("make ")]
    assert [line.split()[1:] for line in lines[:2]] == [["setup"], ["lint", "docs", "wheel-check"]]
    assert lines[2].startswith("make test ") and text_of(".ci/run").splitlines()[-1] == lines[2]
