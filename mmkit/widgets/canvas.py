"""The canvases of the masking lab: one to mask patches on, one that shows a reconstruction.

Imported where they are used and not by `import mmkit`, which also works without Jupyter. The
drawing is done by mask_canvas.js and image_canvas.js. Walk-through: notebooks/02_masking.ipynb.
"""

from pathlib import Path

import anywidget
import traitlets


class MaskCanvas(anywidget.AnyWidget):
    """An image whose patches are masked with the mouse or the keyboard.

    `mask` is one byte per patch, 1 = masked; the browser sends it back when the reader paints.
    """

    _esm = Path(__file__).with_name("mask_canvas.js")
    _css = Path(__file__).with_name("mask_canvas.css")
    rows = traitlets.Int(1).tag(sync=True)  # of patches
    columns = traitlets.Int(1).tag(sync=True)
    mode = traitlets.Unicode("drop").tag(sync=True)  # how masked patches look: or "replace"
    image = traitlets.Bytes(b"").tag(sync=True)  # PNG
    still = traitlets.Unicode("").tag(sync=True)  # end of the still's data, by which to hide it
    # CBytes casts the memoryview that JavaScript sends, which plain Bytes refuses.
    mask = traitlets.CBytes(b"").tag(sync=True, echo_update=False)


class ImageCanvas(anywidget.AnyWidget):
    """An image with a text below it, of the same size on the page as a `MaskCanvas`."""

    _esm = Path(__file__).with_name("image_canvas.js")
    _css = MaskCanvas._css
    rows = traitlets.Int(1).tag(sync=True)  # of patches
    columns = traitlets.Int(1).tag(sync=True)
    image = traitlets.Bytes(b"").tag(sync=True)  # PNG
    words = traitlets.Unicode("").tag(sync=True)  # the text
