"""What a committed notebook must look like: run top to bottom, with images, and with nothing in
it that belongs to one machine or one moment.

    python -m tests.notebook_hygiene notebooks/*.ipynb

lists what is wrong; the exit status is 1 if anything is.
"""

import re
import sys
from pathlib import Path

import nbformat

MAX_BYTES = 400_000
FILE_NAME = re.compile(r"\d\d_[a-z0-9_]+\.ipynb")
ABSOLUTE_PATH = re.compile(
    r"(?<![\w./:~-])/(?:home|root|Users|tmp|work|mnt|media|opt|usr|var|private|content|data)/[\w.-]+"
    r"|\b[A-Z]:\\\w+|\bfile://"
)
MEMORY_ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")
PROGRESS_BAR = re.compile(r"\d+%\|[ #\d█▏▎▍▌▋▊▉]|\bFloatProgress\(|\bIntProgress\(")
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "widgets"


def texts(output):
    """Every token of text in an output: what it printed, or its text and HTML forms."""
    if output.output_type == "stream":
        return [output.text]
    data = output.get("data", {})
    return [value for kind, value in data.items() if kind.startswith("text/")]


def problems(notebook, name, size=0):
    """What is wrong with a notebook, one sentence each; an empty list when nothing is."""
    found = []
    if not FILE_NAME.fullmatch(name):
        found.append("its name is not like 02_masking.ipynb")
    if size > MAX_BYTES:
        found.append(f"it has {size:,} bytes, more than {MAX_BYTES:,}")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("its kernel is not python3")
    if WIDGET_STATE in notebook.metadata:
        found.append("it holds saved widget state")
    if notebook.metadata.get("execution", {}).get("allow_errors"):
        found.append("it allows errors")

    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("its cells were not run once each, top to bottom")
    outputs = [(cell, output) for cell in cells for output in cell.outputs]
    if not any("image/png" in output.get("data", {}) for _, output in outputs):
        found.append("it has no image in its outputs")

    for cell in notebook.cells:
        if match := ABSOLUTE_PATH.search(cell.source):
            found.append(f"{cell.cell_type} source names {match[0]}")
    for cell, output in outputs:
        where = f"cell [{cell.execution_count}]"
        if output.output_type == "error":
            found.append(f"{where} raised {output.ename}: {output.evalue}")
        if output.get("name") == "stderr":
            found.append(f"{where} wrote to stderr: {output.text.strip()[:80]!r}")
        if WIDGET_VIEW in output.get("data", {}):
            found.append(f"{where} holds a widget that no reader of the file can see")
        for text in texts(output):
            for what, pattern in [
                ("an absolute path", ABSOLUTE_PATH),
                ("a memory address", MEMORY_ADDRESS),
                ("a progress bar", PROGRESS_BAR),
            ]:
                if match := pattern.search(text):
                    found.append(f"{where} shows {what}: {match[0]!r}")
    return found


def problems_of_file(path):
    path = Path(path)
    notebook = nbformat.read(path, as_version=4)
    return problems(notebook, path.name, path.stat().st_size)


def main(paths):
    found = [f"{path}: {problem}" for path in paths for problem in problems_of_file(path)]
    print("\n".join(found) or f"{len(paths)} notebooks, all clean")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
