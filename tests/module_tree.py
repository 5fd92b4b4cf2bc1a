"""The tree of modules in CONTRIBUTING.md, made from the first line of each module's docstring.

python -m tests.module_tree        write it (a test compares)
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
MARKS = "<!-- modules -->\n```\n", "```\n<!-- end of modules -->\n"
WIDTH = 22


def line(path: Path, depth: int) -> str:
    """A file or folder with what it is for."""
    folder = path.is_dir()
    file = path / "__init__.py" if folder else path
    doc = ast.get_docstring(ast.parse(file.read_text())) or ""
    name = "  " * depth + path.name + "/" * folder
    return f"{name:{WIDTH}}  {doc.splitlines()[0]}"


def tree(folder: Path, depth: int = 0) -> list[str]:
    """The folder's line, then its files, then its folders."""
    lines = [line(folder, depth)]
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("_"))
    lines += [line(path, depth + 1) for path in inside if path.suffix == ".py"]
    for path in inside:
        if (path / "__init__.py").exists():
            lines += tree(path, depth + 1)
    return lines


def page(text: str) -> str:
    """The page with its tree as the modules are now."""
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    lines = "\n".join(tree(ROOT / "mmkit"))
    return f"{before}{MARKS[0]}{lines}\n{MARKS[1]}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
