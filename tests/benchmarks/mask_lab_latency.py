"""How long the masking lab takes from a key press to the image, in a real JupyterLab and browser.

    python -m tests.benchmarks.mask_lab_latency      # about two minutes and a half on two CPU cores

Three labs: images of 224 px (14 x 14 patches) without a model; images of 64 px (8 x 8), drawn at
336, with an untrained tiny encoder, which takes as long as a trained one; and the same with a
cross-modal decoder, whose image is timed as "reconstructed". In each, 30 key presses on the slider
"patches masked" change the mask, and 30 moves of the mouse paint one more patch each. The clock is
the page's own (performance.now), from the arrival of the event. A key press goes to Python and back
before the canvas is redrawn; a stroke is drawn at once, so that for it the other columns matter:
the caption beside the image and the ranking, which come from Python. "painted" is after the
browser's next frame. A ranking may stay the same in the two digits shown; `events` says how often
it changed. Writes results/mask_lab_latency.json.
"""

import json
import statistics
import tempfile
from pathlib import Path

from tests.benchmarks.draw_masks import machine
from tests.browser.harness import run_notebook_in_browser, start_browser, start_lab
from tests.browser.test_notebooks_in_browser import notebook_of

COUNT, WARM_UP = 30, 5
RESULTS = Path(__file__).parent / "results"

LARGE = """
import mmkit as mm
from mmkit.data.openmoji.names import caption
from mmkit.data.openmoji.images import named_drawings, render
stems = named_drawings()[:48]
pixels = render(stems, 224, "cache")
data = mm.MultimodalDataset.from_pixels(pixels, [caption(stem) for stem in stems])
mm.widgets.MaskLab(data)
"""
TINY = """
import torch
import mmkit as mm
torch.manual_seed(0)
data, _, _ = mm.openmoji(image_size=64)
model = mm.MultimodalEncoder.preset("tiny", tokenizer=data.tokenizer).to_device("cpu")
mm.widgets.MaskLab(data, model)
"""
DECODER = TINY.replace(
    "mm.widgets.MaskLab",
    "model.add_decoder(pixels=True, words=True, across=True)\nlab = mm.widgets.MaskLab",
)
DECODER += "lab.text_percent.value = 60  # there are words to guess\nlab\n"
LABS = {
    "224 px, no model": (LARGE, 14),
    "64 px, tiny model": (TINY, 8),
    "64 px, tiny model with a decoder": (DECODER, 8),
}

# `window.times`: milliseconds since the last key press or move of the mouse, by what changed
CLOCK = """() => {
  let start = 0;
  window.times = {};
  const note = (name) => { window.times[name] = performance.now() - start; };
  const watch = (element, name, options) =>
    new MutationObserver(() => note(name)).observe(element, options);
  for (const kind of ['keydown', 'pointermove'])
    window.addEventListener(kind, () => { start = performance.now(); window.times = {}; }, true);
  const canvas = document.querySelector('.mmkit-canvas canvas');
  new MutationObserver(() => {
    note('redrawn');
    requestAnimationFrame(() => setTimeout(() => note('painted'), 0));
  }).observe(canvas, {attributeFilter: ['data-drawn']});
  const texts = document.querySelectorAll('.mmkit-lab .widget-html-content');
  const names = texts.length === 3 ? ['words', 'guesses', 'ranking'] : ['words', 'ranking'];
  texts.forEach((text, i) => watch(text, names[i], {childList: true, subtree: true}));
  const back = document.querySelector('.mmkit-back canvas');
  if (back) watch(back, 'reconstructed', {attributeFilter: ['data-drawn']});
}"""


def kept(patches: int, percent: int) -> int:
    return max(1, round(patches * (1 - percent / 100)))


def wait(page) -> dict[str, float]:
    """The times of one event."""
    page.wait_for_function("'painted' in window.times && 'words' in window.times")
    page.wait_for_timeout(400)  # milliseconds: nothing more of this event comes later
    return page.evaluate("window.times")


def time_keys(page, patches: int) -> list[dict[str, float]]:
    slider = page.get_by_role("slider", name="patches masked (%)")
    slider.press("Home")
    page.wait_for_timeout(1000)
    times, percent = [], 0
    while len(times) < WARM_UP + COUNT:
        slider.press("ArrowRight")
        percent += 1
        if kept(patches, percent) != kept(patches, percent - 1):  # else nothing is drawn
            times.append(wait(page))
        else:
            page.wait_for_timeout(200)
    return times[WARM_UP:]


def time_strokes(page, side: int) -> list[dict[str, float]]:
    page.get_by_role("slider", name="patches masked (%)").press("Home")
    page.wait_for_timeout(1000)
    box = page.locator(".mmkit-canvas canvas").bounding_box()
    times = []
    for number in range(WARM_UP + COUNT + 1):
        row, column = divmod(number, side)
        column = side - 1 - column if row % 2 else column  # to and fro, row by row
        x = box["x"] + (column + 0.5) * box["width"] / side
        y = box["y"] + (row + 0.5) * box["height"] / side
        page.mouse.move(x, y)
        if number:
            times.append(wait(page))
        else:
            page.mouse.down()
            page.wait_for_timeout(300)
    page.mouse.up()
    return times[WARM_UP:]


def summary(times: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, 90th percentile and largest, in milliseconds, of each part that changed."""
    found = {}
    for name in sorted({name for event in times for name in event}):
        values = sorted(event[name] for event in times if name in event)
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        named = dict(median=statistics.median(values), p90=tenths[-1], largest=values[-1])
        found[name] = {key: round(value, 1) for key, value in named.items()}
        found[name]["events"] = len(values)
    return found


def main():
    results = {"machine": machine(), "milliseconds": {}}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        start_lab(folder) as lab,
        start_browser() as browser,
    ):
        results["machine"]["browser"] = f"chromium {browser.version}"
        for number, (name, (cell, side)) in enumerate(LABS.items()):
            path = notebook_of(Path(folder) / f"lab{number}.ipynb", cell)
            page = run_notebook_in_browser(browser, lab, path, mode="doc", width=1200)
            page.locator(".mmkit-canvas canvas[data-drawn]").scroll_into_view_if_needed()
            page.evaluate(CLOCK)
            for kind, times in (
                ("key", time_keys(page, side**2)),
                ("stroke", time_strokes(page, side)),
            ):
                found = results["milliseconds"][f"{name}: {kind}"] = summary(times)
                for what, values in found.items():
                    numbers = ", ".join(f"{key} {value:5.1f}" for key, value in values.items())
                    print(f"{name:33} {kind:7} {what:8} {numbers}")
            page.close()
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "mask_lab_latency.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}")


if __name__ == "__main__":
    main()
