"""As a reader does: open a notebook, run it all, move a slider, see the image change."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.browser.harness import run_notebook_in_browser
from tests.execute_notebooks import KERNEL

pytestmark = pytest.mark.browser
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"

SLIDER = """
import io, ipywidgets, numpy, PIL.Image
def png(level):
    buffer = io.BytesIO()
    PIL.Image.fromarray(numpy.full((64, 64), level, numpy.uint8)).save(buffer, "png")
    return buffer.getvalue()
slider = ipywidgets.IntSlider(100, 0, 255)
image = ipywidgets.Image(value=png(100))
image.add_class("mmkit-image")
slider.observe(lambda change: setattr(image, "value", png(change.new)), "value")
ipywidgets.VBox([slider, image])
"""


def notebook_of(path, *cells):
    cells = [new_code_cell(cell) for cell in cells]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), path)
    return path


def move_slider(page):
    """Move the first slider beside the first `mmkit-image` by one key.

    Returns screenshots of the image before and after."""
    image = page.locator(".mmkit-image").first
    image.scroll_into_view_if_needed()
    address, before = image.get_attribute("src"), image.screenshot()
    handle = page.locator(".jp-OutputArea-output:has(.mmkit-image) .noUi-handle").first
    handle.focus()
    handle.press("ArrowRight")
    page.wait_for_function(
        "old => { const image = document.querySelector('.mmkit-image');"
        " return image.src !== old && image.complete; }",
        arg=address,
        timeout=20_000,
    )
    return before, image.screenshot()


def test_a_slider_changes_an_image(lab, browser, tmp_path):
    """The harness itself, on the smallest notebook with a widget."""
    page = run_notebook_in_browser(browser, lab, notebook_of(tmp_path / "slider.ipynb", SLIDER))
    before, after = move_slider(page)
    assert before != after
    page.close()


def test_a_cell_that_raises_fails_the_run(lab, browser, tmp_path):
    path = notebook_of(tmp_path / "raises.ipynb", "1 / 0", "2")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_notebook_in_browser(browser, lab, path)


WITH_A_LAB = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if "MaskLab(" in path.read_text()]


@pytest.mark.parametrize("path", WITH_A_LAB, ids=lambda path: path.stem)
def test_notebook_with_a_masking_lab(lab, browser, path):
    page = run_notebook_in_browser(browser, lab, path)
    canvas = page.locator(".mmkit-canvas canvas").first
    masked = canvas.get_attribute("data-masked")
    page.get_by_role("slider", name="patches masked (%)").first.press("PageUp")
    page.wait_for_function(
        "old => document.querySelector('.mmkit-canvas canvas').dataset.masked !== old", arg=masked
    )
    page.close()
