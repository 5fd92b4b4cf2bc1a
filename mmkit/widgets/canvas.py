"""The two canvases of the masking lab: one whose patches are hidden by mouse and keyboard, and one
that shows what a model puts back.

Imported where they are used and not by `import mmkit`, which works without Jupyter, too. The
drawing is done by mask_canvas.js and image_canvas.js. Walk-through: notebooks/02_masking.ipynb.
"""

from pathlib import Path

import anywidget
import traitlets


class MaskCanvas(anywidget.AnyWidget):
    """`mask` is one byte per patch, 1 = hidden; the browser sends back what is painted."""

    _esm = Path(__file__).with_name("mask_canvas.js")
    _css = Path(__file__).with_name("mask_canvas.css")
    rows = traitlets.Int(1).tag(sync=True)  # of patches
    columns = traitlets.Int(1).tag(sync=True)
    mode = traitlets.Unicode("drop").tag(sync=True)  # how hidden ones look: "drop" or "replace"
    picture = traitlets.Bytes(b"").tag(sync=True)  # PNG
    still = traitlets.Unicode("").tag(sync=True)  # the end of a saved picture's data, to hide it by
    # C for cast: from JavaScript comes a memoryview, which plain Bytes refuses.
    mask = traitlets.CBytes(b"").tag(sync=True, echo_update=False)


class PictureCanvas(anywidget.AnyWidget):
    """A picture of the same size on the page as a `MaskCanvas`, to look at, with words below it."""

    _esm = Path(__file__).with_name("image_canvas.js")
    _css = MaskCanvas._css
    rows = traitlets.Int(1).tag(sync=True)  # of patches
    columns = traitlets.Int(1).tag(sync=True)
    picture = traitlets.Bytes(b"").tag(sync=True)  # PNG
    words = traitlets.Unicode("").tag(sync=True)
