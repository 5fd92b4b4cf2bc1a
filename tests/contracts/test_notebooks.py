"""Committed notebooks are clean, and the check and the cleaning work."""

import base64
import io
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from tests.execute_notebooks import KERNEL, ROOT, WIDGET_NOTE, clean, small_png
from tests.notebook_hygiene import WIDGET_VIEW, problems, problems_of_file

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def png():
    """A small image of many colours, as a figure is sent to a page (base64)."""
    buffer = io.BytesIO()
    Image.effect_noise((23, 17), 90).convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


IMAGE = new_output("display_data", {"image/png": png(), "text/plain": "<Figure>"})


def notebook_with(*outputs, source="1"):
    """A notebook of one executed cell, with an image and these outputs."""
    cell = new_code_cell(source, execution_count=1, outputs=[IMAGE, *outputs])
    return new_notebook(cells=[cell], metadata={"kernelspec": KERNEL})


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_committed_notebook_is_clean(path):
    assert problems_of_file(path) == []


def test_a_clean_notebook_passes():
    harmless = "loss 0.1; see https://x.org/data/a.csv, runs/a/best_model.pth, 3/4 and 50% | 2"
    assert problems(notebook_with(stream(harmless)), "01_data.ipynb") == []


@pytest.mark.parametrize(
    "output, complaint",
    [
        (new_output("error", ename="ValueError", evalue="bad", traceback=[]), "raised ValueError"),
        (stream("saved to /home/ada/runs/x"), "an absolute path: '/home/ada'"),
        (stream(r"saved to C:\Users"), "an absolute path"),
        (stream("careful", name="stderr"), "wrote to stderr"),
        (stream(" 40%|████      | 4/10"), "a progress bar"),
        (stream("<Legend at 0x7f00aa11bb22>"), "a memory address"),
        (new_output("display_data", {WIDGET_VIEW: {}, "text/plain": "VBox()"}), "a widget"),
    ],
)
def test_each_fault_is_named(output, complaint):
    (found,) = problems(notebook_with(output), "01_data.ipynb")
    assert complaint in found


def test_faults_of_the_whole_file_are_named():
    notebook = notebook_with()
    notebook.cells[0].outputs = []
    notebook.cells[0].execution_count = 3
    found = " ".join(problems(notebook, "Data.ipynb", size=400_001))
    for complaint in ["name", "400,001 bytes", "top to bottom", "no image"]:
        assert complaint in found


def test_cleaning_leaves_nothing_to_complain_about():
    """Paths, bars and widgets go; numbers and images stay; a second time nothing changes."""
    notebook = notebook_with(
        stream(f"{ROOT}/runs/x\n 40%|████      | 4/10\nloss 0.1\n"),
        new_output("display_data", {WIDGET_VIEW: {}, "text/plain": "VBox()", "text/html": "<b>"}),
        new_output("display_data", {WIDGET_VIEW: {}, "text/plain": "HBox((FloatProgress(0),))"}),
    )
    notebook.cells[0].metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    notebook.metadata["widgets"] = {}
    clean(notebook)
    assert problems(notebook, "01_data.ipynb") == []
    image, text, widget = notebook.cells[0].outputs
    shown = Image.open(io.BytesIO(base64.b64decode(image.data["image/png"])))
    assert shown.mode in ("P", "L") and shown.size == (23, 17)
    assert text.text == "runs/x\nloss 0.1\n"
    assert widget.data == {"text/plain": WIDGET_NOTE}
    assert not notebook.cells[0].metadata
    before = nbformat.writes(notebook)
    clean(notebook)
    assert nbformat.writes(notebook) == before


def encoded(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def scene(height, width):
    """Soft shades of all colours with fine noise, as in a photograph."""
    y, x = np.mgrid[0:height, 0:width]
    shades = [np.sin(x / (17 + 7 * i) + i) * np.cos(y / (29 - 5 * i) - 2 * i) for i in range(3)]
    grain = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    return (128 + 110 * np.stack(shades, 2) + grain).clip(0, 255).round()


@pytest.mark.parametrize("drawing", [True, False])
def test_an_image_is_smaller_and_looks_the_same(drawing):
    """The grey of masks keeps its colour; greys have no tint; shades keep their mean."""
    pixels = scene(211, 307)
    if drawing:
        colours = np.random.default_rng(1).integers(0, 256, (31, 3))
        pixels = colours[(pixels[..., 0] // 9).astype(int)]
    pixels[:61, :59] = 208
    pixels[:61, 67:131] = np.linspace(0, 255, 64)[:, None]
    pixels = pixels.round()
    small = small_png(encoded(pixels))
    assert len(small) < 0.75 * len(encoded(pixels)) and small_png(small) == small
    shown = Image.open(io.BytesIO(base64.b64decode(small))).convert("RGB")
    shown = np.asarray(shown, float)
    assert (shown[:61, :59] == 208).all()
    ramp = shown[:61, 67:131]
    assert np.ptp(ramp, axis=2).max() == 0 and np.abs(ramp - pixels[:61, 67:131]).max() <= 9
    error = (shown - pixels)[61:]
    if drawing:
        assert not error.any()
    near = error[:144, :304].reshape(18, 8, 38, 8, 3).mean((1, 3))  # averaged, as from a distance
    assert np.abs(near).mean() < 2
