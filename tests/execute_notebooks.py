"""Run notebooks top to bottom in fresh kernels and write their outputs (`make notebooks`).

    python -m tests.execute_notebooks notebooks/02_masking.ipynb …

In full mode unless MMKIT_FAST=1 is set. What changes from run to run or from machine to machine
(times, kernel versions, paths, widget ids, progress bars) is taken out, so that a diff shows what
a change really did. A notebook that raises, or that tests/notebook_hygiene.py refuses, is not
written.
"""

import base64
import io
import os
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

from tests.notebook_hygiene import PROGRESS_BAR, WIDGET_STATE, WIDGET_VIEW, problems, texts

ROOT = Path(__file__).parents[1]
CELL_SECONDS = 3600
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
WIDGET_NOTE = "[an interactive widget: run this cell to use it]"


def relative(text):
    """Paths as seen from the project, and the home folder as ~."""
    for folder, short in [(f"{ROOT}/", ""), (str(ROOT), "."), (str(Path.home()), "~")]:
        if folder != "/":
            text = text.replace(folder, short)
    return text


def small_png(encoded):
    """A base64 PNG with a palette of 192 colours: a third of the bytes, the same to the eye.

    Of 64, where that changes nearly no pixel by more than a tenth. The palette covers all colours
    that occur, however rare; by frequency, a red helmet turns beige.
    """
    picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
    if picture.mode == "P":
        return encoded
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    buffer = io.BytesIO()
    few = flat.quantize(64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    gap = np.abs(np.asarray(few.convert("RGB"), int) - np.asarray(flat, int)).max(2)
    if (gap > 24).mean() > 0.002:
        few = flat.quantize(192, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def clean_output(output):
    """The output as it is committed; None when nothing of it is worth keeping."""
    if any(PROGRESS_BAR.search(text) for text in texts(output)):
        if output.output_type != "stream":
            return None
        lines = output.text.splitlines(keepends=True)
        output.text = "".join(line for line in lines if not PROGRESS_BAR.search(line))
    if output.output_type == "stream":
        output.text = relative(output.text)
        return output if output.text.strip() else None
    if WIDGET_VIEW in output.get("data", {}):  # saved, it is an empty box on a web page
        output.data = {"text/plain": WIDGET_NOTE}
    for kind, value in output.get("data", {}).items():
        if kind == "image/png":
            output.data[kind] = small_png(value)
        if kind.startswith("text/"):
            output.data[kind] = relative(value)
    return output


def clean(notebook):
    """Take out, in place, all that a second run would not give again."""
    notebook.metadata.pop(WIDGET_STATE, None)
    notebook.metadata["kernelspec"] = dict(KERNEL)
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := clean_output(output))]


def execute(path):
    """Run one notebook and write it back. Returns what is wrong with it; then it is not written."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return [str(error)]
    clean(notebook)
    text = nbformat.writes(notebook)
    found = problems(notebook, path.name, len(text.encode()))
    unfinished = path.with_suffix(".refused" if found else ".tmp")
    unfinished.write_text(text + "\n", encoding="utf-8")
    if found:  # kept beside, to look at what took so long to make
        return [*found, f"what came out is in {unfinished.name}"]
    unfinished.replace(path)
    return []


def main(paths):
    os.environ.setdefault("MMKIT_FAST", "0")
    os.environ.setdefault("TQDM_DISABLE", "1")  # a saved progress bar is noise
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("TENSORBOARD_BINARY", str(Path(sys.executable).with_name("tensorboard")))
    failed = False
    for path in map(Path, paths):
        start = time.perf_counter()
        found = execute(path.resolve())
        seconds, kilobytes = time.perf_counter() - start, path.stat().st_size / 1000
        verdict = "NOT WRITTEN" if found else f"{kilobytes:.0f} kB"
        print(f"{path}: {seconds:.0f} s, {verdict}", *found, sep="\n    ", flush=True)
        failed = failed or bool(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
