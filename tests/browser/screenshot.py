"""Images of a notebook as JupyterLab shows it.

    python -m tests.browser.screenshot NOTEBOOK OUT.png            OUT-01.png, … one per screen
    python -m tests.browser.screenshot NOTEBOOK OUT.png --full     one tall image
    python -m tests.browser.screenshot NOTEBOOK OUT.png --saved    the saved outputs, nothing is run

In fast mode unless MMKIT_FAST=0 is set.
"""

import argparse
import os
import tempfile
from pathlib import Path

from tests.browser.harness import (
    open_notebook,
    run_notebook_in_browser,
    start_browser,
    start_lab,
)

SCROLLER = ".jp-WindowedPanel-outer"  # the part of a notebook that scrolls
TALLEST = 16_000  # pixels; chromium paints nothing below about 16,384


def scroller_height(page):
    """(visible, whole) height of the notebook in pixels."""
    return page.eval_on_selector(SCROLLER, "e => [e.clientHeight, e.scrollHeight]")


def scroll_to(page, top):
    page.eval_on_selector(SCROLLER, "(e, top) => { e.scrollTop = top; }", top)


def one_tall_image(page, out, width):
    visible, whole = scroller_height(page)
    height = min(TALLEST, page.viewport_size["height"] - visible + whole)
    page.set_viewport_size({"width": width, "height": height})
    scroll_to(page, 0)
    page.wait_for_timeout(1000)
    page.locator(SCROLLER).screenshot(path=out)
    return [out]


def one_image_per_screen(page, out):
    visible, whole = scroller_height(page)
    step = visible - 40  # a little is shown twice, so that no line is cut in both
    starts = range(0, max(1, whole - 40), step)
    files = []
    for number, start in enumerate(starts, 1):
        scroll_to(page, start)
        page.wait_for_timeout(200)
        files.append(out.with_stem(f"{out.stem}-{number:02d}"))
        page.locator(SCROLLER).screenshot(path=files[-1])
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--full", action="store_true", help="one tall image")
    parser.add_argument("--saved", action="store_true", help="show the saved outputs, run nothing")
    parser.add_argument("--width", type=int, default=1200, help="pixels")
    parser.add_argument("--height", type=int, default=1500, help="pixels of one screen")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for all cells")
    options = parser.parse_args()
    os.environ.setdefault("MMKIT_FAST", "1")
    view = {"mode": "doc", "width": options.width, "height": options.height}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        start_lab(folder) as lab,
        start_browser() as browser,
    ):
        if options.saved:
            page = open_notebook(browser, lab, options.notebook, **view)
            page.wait_for_timeout(1500)
        else:
            page = run_notebook_in_browser(
                browser, lab, options.notebook, timeout=options.timeout, **view
            )
        page.evaluate("document.activeElement?.blur()")
        if options.full:
            files = one_tall_image(page, options.out, options.width)
        else:
            files = one_image_per_screen(page, options.out)
    print(*files, sep="\n")


if __name__ == "__main__":
    main()
