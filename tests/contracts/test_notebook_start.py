"""Every notebook opens on Colab and Kaggle and installs mmkit there, from the one address."""

import copy
import subprocess
import sys
import types

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.notebook_start import (
    ROOT,
    begin,
    fault,
    install_source,
    links,
    notebooks,
    repository,
)

PATH = ROOT / "notebooks" / "01_data.ipynb"


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.name)
def test_a_notebook_begins_with_links_and_the_cell_that_installs(path):
    """`python -m tests.notebook_start` writes them."""
    assert fault(nbformat.read(path, as_version=4), path) == ""


def made():
    """A notebook that was run, without links and without the first cell."""
    output = new_output("execute_result", {"text/plain": "2"}, execution_count=1)
    cells = [new_code_cell("1 + 1", execution_count=1, outputs=[output]), new_code_cell("")]
    last = new_code_cell("3", execution_count=2)
    return new_notebook(cells=[new_markdown_cell("# Why?\n\nBecause.\n"), *cells, last])


def test_writing_the_start_keeps_sources_and_outputs_and_is_done_once():
    notebook, before = made(), made()
    assert "links" in fault(notebook, PATH)
    begin(notebook, PATH)
    assert fault(notebook, PATH) == ""
    once = copy.deepcopy(notebook)
    begin(notebook, PATH)
    assert notebook == once
    title, first, *rest = notebook.cells
    assert title.source == f"# Why?\n\nBecause.\n\n{links(PATH)}"
    assert [cell.source for cell in rest] == [cell.source for cell in before.cells[1:]]
    assert rest[0].outputs[0].data == before.cells[1].outputs[0].data
    assert [cell.execution_count for cell in (first, *rest)] == [1, 2, None, 3]
    assert rest[0].outputs[0].execution_count == 2


def test_a_notebook_that_was_not_run_stays_so():
    notebook = new_notebook(cells=[new_markdown_cell("# Why?"), new_code_cell("1")])
    begin(notebook, PATH)
    assert [cell.get("execution_count") for cell in notebook.cells] == [None, None, None]


@pytest.mark.parametrize("change", ["link", "cell", "second", "order", "output"])
def test_each_other_start_is_named(change):
    notebook = made()
    begin(notebook, PATH)
    if change == "link":
        notebook.cells[0].source = notebook.cells[0].source.replace("/01_data", "/02_masking")
    if change == "cell":
        notebook.cells[1].source += " mmkit"
    if change == "second":
        notebook.cells.append(copy.deepcopy(notebook.cells[1]))
    if change == "order":
        notebook.cells.insert(1, new_code_cell("0"))
    if change == "output":
        notebook.cells[1].outputs = [new_output("stream", text="installed")]
    assert fault(notebook, PATH)
    begin(notebook, PATH)
    assert not fault(notebook, PATH)


class Shell:
    """IPython's own reading of a cell, with pip written down instead of run."""

    def __init__(self, monkeypatch, there: bool):
        from IPython.core.inputtransformer2 import TransformerManager

        self.ran: list[str] = []
        self.code = TransformerManager().transform_cell(install_source())
        self.names = {"get_ipython": lambda: self}
        spec = types.SimpleNamespace() if there else None
        monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)

    def run_line_magic(self, magic, line):
        self.ran.append(f"{magic} {line.format(**self.names)}")

    def run(self) -> list[str]:
        exec(self.code, self.names)
        return self.ran


def test_the_cell_does_nothing_where_mmkit_is_there(monkeypatch):
    assert Shell(monkeypatch, there=True).run() == []


def test_the_cell_installs_a_wheel_beside_the_notebook_or_the_source(monkeypatch, tmp_path):
    """Never by the name, which on PyPI is that of another project."""
    monkeypatch.chdir(tmp_path)
    (found,) = Shell(monkeypatch, there=False).run()
    assert found == f"pip install -q git+{repository()} anywidget scikit-image"
    (tmp_path / "mmkit-0.1.0-py3-none-any.whl").touch()
    (found,) = Shell(monkeypatch, there=False).run()
    assert found == "pip install -q mmkit-0.1.0-py3-none-any.whl anywidget scikit-image"
    assert len(install_source().splitlines()) <= 6


def test_the_cell_is_in_the_style_of_all_notebooks(tmp_path):
    path = tmp_path / "x.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(install_source())]), path)
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml")]
        done = subprocess.run([*ruff, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_no_page_and_no_program_installs_another_project():
    found = subprocess.run(
        ["git", "grep", "-nE", r"pip install (-\w+ |--\w+ )*mmkit( |$|\[|\")", "--", ":!tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.stdout == ""
