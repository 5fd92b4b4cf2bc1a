"""The start of every notebook: links that open it elsewhere, and a cell that installs mmkit there.

    python -m tests.notebook_start            writes it into all notebooks; outputs stay as they are
    python -m tests.notebook_start --check    names those that begin otherwise; the status is 1 then

The repository's address is taken from `[project.urls]` in pyproject.toml. mmkit is never installed
by its name: on PyPI that is another project.
"""

import re
import sys
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
TAG = "install"
INSTALL = """\
from glob import glob
from importlib.util import find_spec

if find_spec("mmkit") is None:  # Colab, Kaggle: a wheel beside this notebook, or the source
    source = [*glob("mmkit-*.whl"), "git+{repository}"][0]
    %pip install -q {{source}} anywidget scikit-image"""
LINKS = (
    "Open it in [Colab](https://colab.research.google.com/github/{path})"
    " or [Kaggle](https://kaggle.com/kernels/welcome?src=https://github.com/{path})."
)
A_LINK = re.compile(r"^Open it in \[Colab\]\(.*$", re.MULTILINE)


def repository() -> str:
    """The repository's address."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"]


def install_source() -> str:
    """The first code cell."""
    return INSTALL.format(repository=repository())


def links(path: Path) -> str:
    """The line of links of a notebook; Colab and Kaggle open what lies on GitHub."""
    below = repository().removeprefix("https://github.com/")
    return LINKS.format(path=f"{below}/blob/main/{path.relative_to(ROOT).as_posix()}")


def notebooks() -> list[Path]:
    """All notebooks, those of the course included."""
    found = sorted(FOLDER.rglob("*.ipynb"))
    return [path for path in found if ".ipynb_checkpoints" not in path.parts]


def is_install(cell) -> bool:
    """Is it the cell that installs, in whatever form?"""
    return cell.cell_type == "code" and TAG in cell.metadata.get("tags", [])


def begin(notebook, path: Path) -> None:
    """Write links and first cell into a notebook, in place; what it has of them is replaced.

    Cells that were executed are counted anew, since the first one is new.
    """
    title = notebook.cells[0]
    rest = A_LINK.sub("", title.source).rstrip()
    title.source = f"{rest}\n\n{links(path)}"
    cells = [cell for cell in notebook.cells if not is_install(cell)]
    first = nbformat.v4.new_code_cell(install_source(), id=TAG, metadata={"tags": [TAG]})
    notebook.cells = [cells[0], first, *cells[1:]]
    counts = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    if all(cell.execution_count for cell in counts):
        for number, cell in enumerate([first, *counts], 1):
            cell.execution_count = number
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = number


def fault(notebook, path: Path) -> str:
    """How the start of a notebook differs from what `begin` writes; "" where it does not."""
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [line for cell in notebook.cells for line in A_LINK.findall(cell.source)] != [links(path)]:
        return "its links to Colab and Kaggle are not those of pyproject's URL"
    if not notebook.cells[0].source.endswith(links(path)):
        return "its links do not end the first cell"
    if [cell for cell in codes if is_install(cell)] != codes[:1]:
        return "its first code cell is not the one that installs mmkit, or there is another one"
    if codes[0].source != install_source() or codes[0].outputs:
        return "its first code cell is another one, or has outputs"
    return ""


def main(check: bool) -> int:
    wrong = 0
    for path in notebooks():
        notebook = nbformat.read(path, as_version=4)
        if not (found := fault(notebook, path)):
            continue
        wrong += 1
        if not check:
            begin(notebook, path)
            path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {found}{'' if check else '; written'}")
    return 1 if check and wrong else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
