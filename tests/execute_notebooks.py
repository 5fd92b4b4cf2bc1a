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
import zopfli.png
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

from tests.notebook_hygiene import (
    MAX_BYTES,
    PROGRESS_BAR,
    WIDGET_STATE,
    WIDGET_VIEW,
    problems,
    texts,
)

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


def small_png(encoded, most=256):
    """A base64 PNG with a palette: a third of the bytes, the same to the eye.

    Of 32 to 256 colours, and no more than `most`: the fewest that leave 199 of 200 pixels
    within 12 of 255 levels. A photograph, for which 256 are too few, is dithered. Grey stays grey,
    and flat areas keep their colour exactly, dithered or not.
    """
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    if image.mode in ("P", "L", "1") and most == 256:  # packed already
        return encoded
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(white, image).convert("RGB")
    pixels = np.asarray(flat, int)
    for count in [count for count in (32, 64, 128, 256) if count <= most]:
        palette, few, exact = with_palette(pixels, count)
        off = (np.abs(palette[few] - pixels).max(2) > 12).mean()
        if off <= 0.005:
            break
    small = Image.fromarray(few.astype(np.uint8), "P")
    small.putpalette(palette.astype(np.uint8).tobytes())
    if off > 0.005 and most == 256:
        dithered = flat.quantize(palette=small, dither=Image.Dither.FLOYDSTEINBERG)
        dithered.paste(small, mask=Image.fromarray(exact))
        small = dithered
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return base64.b64encode(zopfli.png.optimize(buffer.getvalue())).decode()


def with_palette(pixels, count):
    """(palette (count, 3), each pixel's place in it (H, W), where its colour is exact (H, W)).

    A quarter of the palette are the commonest colours as they are, 16 are greys, and what is left
    is spread over all other colours that occur. A grey pixel is given a grey.
    """
    codes, place, often = np.unique(
        pixels @ [65536, 256, 1], return_inverse=True, return_counts=True
    )
    colours = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], 1)
    common = np.argsort(-often, kind="stable")[: count // 4]
    palette = np.concatenate(
        [colours[common], np.linspace(0, 255, 16, dtype=int)[:, None].repeat(3, 1)]
    )
    others = np.delete(np.arange(len(codes)), common)
    if len(others):
        strip = colours[others].repeat(np.minimum(often[others], 50), 0)[None].astype(np.uint8)
        spread = Image.fromarray(strip).quantize(count - len(palette), kmeans=3).getpalette()
        palette = np.concatenate([palette, np.reshape(spread, (-1, 3))])[:count]
    grey, grey_entries = np.ptp(colours, axis=1) == 0, np.ptp(palette, axis=1) == 0
    nearest = np.empty(len(codes), int)
    for start in range(0, len(codes), 4096):
        part = slice(start, start + 4096)
        far = np.square(colours[part, None] - palette).sum(2)
        far[np.ix_(grey[part], ~grey_entries)] = 1 << 20
        nearest[part] = far.argmin(1)
    exact = (palette[nearest] == colours).all(1)
    place = place.reshape(pixels.shape[:2])
    return palette, nearest[place], exact[place]


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


def shrink(notebook, colours):
    """Its larger figures in so many colours."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            encoded = output.get("data", {}).get("image/png", "")
            if len(encoded) > 20_000:
                output.data["image/png"] = small_png(encoded, colours)


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
    for colours in (128, 64):  # rather than leave a figure out
        if len(text.encode()) > MAX_BYTES:
            shrink(notebook, colours)
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
