"""The masking lab as a reader uses it: keys on its controls, mouse and keys on its image."""

import re

import pytest

from tests.browser.harness import CELLS, open_notebook, run_notebook_in_browser
from tests.browser.test_notebooks_in_browser import notebook_of

pytestmark = pytest.mark.browser

SETUP = """
import torch
import mmkit as mm
train, val, test = mm.openmoji(image_size=64)
torch.manual_seed(0)
model = mm.MultimodalEncoder.preset("tiny", tokenizer=train.tokenizer).to_device("cpu")
lab = mm.widgets.MaskLab(train, model)
"""
PAINTED = "print(lab.masking.mask[0].nonzero()[:, 0].tolist())"
RUN_LAST = """() => {
  const panel = window.jupyterapp.shell.currentWidget;
  panel.content.activeCellIndex = panel.content.widgets.length - 1;
  return window.jupyterapp.commands.execute('notebook:run-cell');
}"""


class Page:
    """A page with a lab on it."""

    def __init__(self, page, errors):
        self.page, self.errors = page, errors
        self.canvas = page.locator(".mmkit-canvas canvas")

    def slider(self, name):
        return self.page.get_by_role("slider", name=name, exact=True)

    def pixels(self):
        return self.canvas.evaluate("canvas => canvas.toDataURL()")

    def masked(self):
        return int(self.canvas.get_attribute("data-masked"))

    def ranking(self):
        return self.page.locator(".mmkit-rank").inner_text()

    def wait_for_words(self, words):
        """Wait for a text that Python sends."""
        self.page.locator(".mmkit-lab").get_by_text(words).wait_for(timeout=20_000)

    def masked_in_python(self):
        self.page.evaluate(RUN_LAST)
        printed = self.page.evaluate(CELLS)[-1]["outputs"][0]["text"]
        return [int(number) for number in re.findall(r"\d+", "".join(printed))]

    def point(self, row, column):
        """The middle of a patch in page coordinates."""
        box = self.canvas.bounding_box()
        return (box["x"] + (column + 0.5) * box["width"] / 8,
                box["y"] + (row + 0.5) * box["height"] / 8)  # fmt: skip

    def drag(self, *patches):
        self.page.mouse.move(*self.point(*patches[0]))
        self.page.mouse.down()
        for patch in patches[1:]:
            self.page.mouse.move(*self.point(*patch))
        self.page.mouse.up()

    def start(self):
        """Nothing is masked, and nothing is painted."""
        self.page.get_by_label("image masker").select_option("random")
        self.slider("patches masked (%)").press("Home")
        self.wait_for_words("64 of 64 patches")


@pytest.fixture(scope="module")
def lab_page(lab, browser, tmp_path_factory):
    path = notebook_of(tmp_path_factory.mktemp("lab") / "lab.ipynb", SETUP, "lab", PAINTED)
    errors = []
    page = run_notebook_in_browser(
        browser,
        lab,
        path,
        mode="doc",
        width=1200,
        on_console=lambda message: message.type == "error" and errors.append(message.text),
    )
    page.locator(".mmkit-canvas canvas[data-drawn]").scroll_into_view_if_needed()
    yield Page(page, errors)
    page.close()


def test_keys_on_a_slider_change_the_image_and_the_ranking(lab_page):
    lab_page.start()
    before, ranking = lab_page.pixels(), lab_page.ranking()
    for _ in range(25):
        lab_page.slider("patches masked (%)").press("ArrowRight")
    lab_page.wait_for_words("48 of 64 patches")
    assert lab_page.masked() == 16 == len(lab_page.masked_in_python())
    assert lab_page.pixels() != before and lab_page.ranking() != ranking
    dropped, ranking = lab_page.pixels(), lab_page.ranking()
    lab_page.page.get_by_label("masked patches are").select_option("mask token (replace)")
    lab_page.page.wait_for_function(
        "old => document.querySelector('.mmkit-rank').innerText !== old", arg=ranking
    )
    assert lab_page.masked() == 16 and lab_page.pixels() != dropped
    lab_page.page.get_by_label("masked patches are").select_option("removed (drop)")


def test_another_row_is_another_image(lab_page):
    lab_page.start()
    before = lab_page.pixels()
    lab_page.slider("image (row)").press("ArrowRight")
    lab_page.page.wait_for_function(
        "old => document.querySelector('.mmkit-canvas canvas').toDataURL() !== old", arg=before
    )
    lab_page.slider("image (row)").press("ArrowLeft")
    lab_page.page.wait_for_function(
        "old => document.querySelector('.mmkit-canvas canvas').toDataURL() === old", arg=before
    )


def test_the_mouse_paints_and_erases(lab_page):
    lab_page.start()
    before, ranking = lab_page.pixels(), lab_page.ranking()
    lab_page.drag((2, 1), (2, 6))  # one jump: the patches between are painted as well
    lab_page.wait_for_words("58 of 64 patches")
    assert lab_page.page.get_by_label("image masker").input_value() == "painted"
    assert lab_page.masked_in_python() == [17, 18, 19, 20, 21, 22]
    assert lab_page.pixels() != before and lab_page.ranking() != ranking
    lab_page.drag((2, 6), (2, 5), (7, 5))  # a stroke that begins on a masked patch unmasks
    lab_page.wait_for_words("60 of 64 patches")
    assert lab_page.masked_in_python() == [17, 18, 19, 20]


def test_keys_paint_and_leave_the_notebook_alone(lab_page):
    lab_page.start()
    page = lab_page.page
    state = "() => { const notebook = window.jupyterapp.shell.currentWidget.content;"
    state += " return [notebook.activeCellIndex, notebook.widgets.length, notebook.mode,"
    state += " document.querySelector('.jp-WindowedPanel-outer').scrollTop]; }"
    lab_page.slider("tokens masked (%)").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")  # past the slider's number
    page.keyboard.press("Tab")  # past the last drop-down
    assert page.evaluate("document.activeElement.getAttribute('role')") == "application"
    before, pixels = page.evaluate(state), lab_page.pixels()
    to_the_corner = 8 * ["ArrowUp"] + 8 * ["ArrowLeft"]  # no further than that
    for key in (*to_the_corner, "ArrowDown", "ArrowDown", "ArrowRight", "Enter", "ArrowRight", " "):
        page.keyboard.press(key)
    lab_page.wait_for_words("62 of 64 patches")
    lab_page.wait_for_words("Row 3, column 3: masked")
    assert page.evaluate(state) == before
    page.keyboard.press("Tab")
    assert lab_page.pixels() != pixels
    assert lab_page.masked_in_python() == [17, 18]


def test_painting_everything_leaves_one_patch_and_says_so(lab_page):
    lab_page.start()
    rows = [((row, 0), (row, 7)) for row in range(8)]
    lab_page.drag(*(patch for row in rows for patch in row))
    lab_page.wait_for_words("One patch must stay")
    lab_page.wait_for_words("1 of 64 patches")
    assert lab_page.masked() == 63 == len(lab_page.masked_in_python())


def test_no_scrollbars_and_one_image(lab_page):
    """At a page width of 1200 all of it is in view; the live view hides the still."""
    overflow = "e => [e.scrollWidth - e.clientWidth, e.scrollHeight - e.clientHeight]"
    assert lab_page.page.locator(".mmkit-lab").evaluate(overflow) == [0, 0]
    for name in (".mmkit-canvas", ".mmkit-rank"):
        box = lab_page.page.locator(name).bounding_box()
        assert box["y"] + box["height"] < lab_page.page.viewport_size["height"]
    tops = lab_page.page.locator(".mmkit-canvas, .mmkit-lab .widget-html").evaluate_all(
        "all => all.map(e => Math.round(e.getBoundingClientRect().top))"
    )
    assert len(tops) == 3 and max(tops) - min(tops) <= 4  # side by side
    assert not lab_page.page.locator(".jp-OutputArea-child img").is_visible()


def test_the_browser_reported_no_errors(lab_page):
    assert not lab_page.errors


def test_a_saved_notebook_shows_an_image(lab, browser, lab_page, tmp_path):
    """In the same JupyterLab, which trusts it, with a new kernel; and as a copy from elsewhere."""
    name = "lab.ipynb"
    lab_page.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    lab_page.page.evaluate(
        "() => window.jupyterapp.shell.currentWidget.sessionContext.restartKernel()"
    )
    stranger = tmp_path / "stranger.ipynb"
    stranger.write_text((lab.folder / name).read_text().replace('"lab"', '"lab  # not mine"'))
    for path, copy in ((name, False), (stranger, True)):
        page = open_notebook(browser, lab, path, mode="doc", copy=copy)
        image = page.locator(".jp-OutputArea-child img")
        image.wait_for()
        assert image.is_visible() and image.bounding_box()["width"] > 600
        page.close()


DECODER = SETUP.replace("lab =", "model.add_decoder(pixels=True, words=True, across=True)\nlab =")


def test_painting_changes_what_is_reconstructed(lab, browser, tmp_path):
    """At a page width of 960 nothing is cut off; the choice is made with the keyboard."""
    path = notebook_of(tmp_path / "decoder.ipynb", DECODER, "lab", PAINTED)
    errors = []
    lab_page = Page(
        run_notebook_in_browser(
            browser,
            lab,
            path,
            mode="doc",
            width=960,
            on_console=lambda message: message.type == "error" and errors.append(message.text),
        ),
        errors,
    )
    page, back = lab_page.page, lab_page.page.locator(".mmkit-back canvas")
    page.locator(".mmkit-back canvas[data-drawn]").wait_for()
    lab_page.canvas.scroll_into_view_if_needed()
    lab_page.start()
    lab_page.wait_for_words("No patch is masked: this is the image itself.")
    assert back.bounding_box()["width"] == lab_page.canvas.bounding_box()["width"]
    pixels = "() => document.querySelector('.mmkit-back canvas').toDataURL()"
    changed = f"old => ({pixels})() !== old"
    before = page.evaluate(pixels)
    lab_page.drag((2, 1), (2, 6))
    lab_page.wait_for_words("of 6 masked patches")
    page.wait_for_function(changed, arg=before)
    assert "of 6 masked patches" in back.get_attribute("aria-label")
    lab_page.slider("tokens masked (%)").press("End")
    page.locator(".mmkit-guesses tbody tr").first.wait_for()
    before = page.evaluate(pixels)
    page.get_by_label("decoder sees", exact=True).focus()
    page.keyboard.press("End")
    lab_page.wait_for_words("The decoder sees a mismatched caption")
    page.wait_for_function(changed, arg=before)
    assert page.locator(".mmkit-lab").evaluate("e => e.scrollWidth - e.clientWidth") == 0
    assert not errors
    page.close()
