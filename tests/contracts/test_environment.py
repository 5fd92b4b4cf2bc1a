"""The two lists of dependencies agree, this environment satisfies them, and importing is cheap."""

import re
import statistics
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
CONDA_NAMES = {"pytorch": "torch"}  # every other package has the same name in both lists
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [*PROJECT["dependencies"], *EXTRAS["notebooks"], *EXTRAS["test"]]


def name_and_range(line):
    """'Foo_bar >=1,<2' -> ('foo-bar', SpecifierSet('<2,>=1'))."""
    name, specifier = re.fullmatch(r"([A-Za-z0-9_.-]+)\s*(.*)", line.strip()).groups()
    return canonicalize_name(CONDA_NAMES.get(name, name)), SpecifierSet(specifier)


def test_environment_yml_says_what_pyproject_says():
    from_conda = [line for line in CONDA["dependencies"] if isinstance(line, str)]
    (from_pip,) = [line["pip"] for line in CONDA["dependencies"] if isinstance(line, dict)]
    assert CONDA["channels"] == ["conda-forge"]
    assert from_pip[-1] == "-e ."
    conda = dict(map(name_and_range, [*from_conda, *from_pip[:-1]]))
    assert len(conda) == len(from_conda) + len(from_pip) - 1, "a package is listed twice"
    assert conda.pop("python") == SpecifierSet(PROJECT["requires-python"])
    assert "pip" in conda and not conda.pop("pip")
    assert conda == dict(map(name_and_range, REQUIREMENTS))


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_installed_version_is_in_range(line):
    requirement = Requirement(line)
    assert requirement.specifier.contains(version(requirement.name), prereleases=True)


IMPORT = """
import sys, time
import torch
start = time.perf_counter()
import mmkit
seconds = time.perf_counter() - start
assert not torch.cuda.is_initialized(), "importing mmkit started CUDA"
models = [name for name in sys.modules if name.startswith("transformers.models.")]
assert not models, f"importing mmkit loaded model code: {models[:5]}"
assert "huggingface_hub" not in sys.modules, "importing mmkit loaded a hub's client"
print(seconds)
"""


def test_importing_is_cheap():
    """In a fresh process: no CUDA, no model code, under 1 s on top of torch (median of three)."""
    seconds = []
    for _ in range(3):
        child = subprocess.run(
            [sys.executable, "-c", IMPORT], capture_output=True, text=True, cwd=ROOT
        )
        assert child.returncode == 0, child.stderr
        seconds.append(float(child.stdout))
    assert statistics.median(seconds) < 1.0, seconds
