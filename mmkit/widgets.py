"""Thin controls over plots, for JupyterLab.

A control only sets arguments of a function that also runs without it; pictures are composed with
tensors and sent as PNG bytes, because drawing a new matplotlib figure on each move of a slider
takes twice as long. Walk-through: notebooks/02_masking.ipynb.
"""

import io

import numpy as np
import torch
from torch import Tensor

from .data import MultimodalDataset
from .masking import IMAGE_MASKERS, find_masker, mask_noise
from .plots import paint_mask


def png(picture: Tensor, side: int) -> bytes:
    """A picture (3, H, W) uint8 as PNG bytes, enlarged by whole factors to at least `side` px."""
    from PIL import Image

    image = Image.fromarray(np.asarray(picture).transpose(1, 2, 0))
    factor = max(1, -(-side // image.width))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class MaskExplorer:
    """Sliders over the mask of a picture: which patches would the encoder see?

    `MaskExplorer(dataset)` as the last line of a cell shows it. Controls: picture, hidden share in
    per cent, seed, epoch; arrow keys move them. `explorer.masking` is the current `Masking`: the
    same that training draws for this sample, seed and epoch.
    """

    def __init__(self, dataset: MultimodalDataset, patch_size: int = 8, masker: str = "random"):
        import ipywidgets as w

        self.dataset, self.patch_size = dataset, patch_size
        self.masker = find_masker(masker, IMAGE_MASKERS)
        style = dict(style={"description_width": "9em"}, layout=w.Layout(width="26em"))
        self.row = w.IntSlider(0, 0, len(dataset) - 1, description="picture", **style)
        self.ratio = w.IntSlider(50, 0, 99, description="hidden (%)", **style)
        self.seed = w.IntSlider(0, 0, 99, description="seed", **style)
        self.epoch = w.IntSlider(0, 0, 99, description="epoch", **style)
        edge = w.Layout(border="1px solid #ccc")  # white patches end at a white page
        self.image = w.Image(format="png", width=320, height=320, layout=edge)
        self.image.add_class("mmkit-picture")
        self.words = w.HTML()
        self.controls = (self.row, self.ratio, self.seed, self.epoch)
        for control in self.controls:
            control.observe(self._update, "value")
        self.view = w.HBox([self.image, w.VBox([*self.controls, self.words])])
        self._update()

    def _update(self, change=None):
        row = self.row.value
        pixels = self.dataset.batch([row]).pixel_values.cpu()
        num_patches = (pixels.shape[2] // self.patch_size) * (pixels.shape[3] // self.patch_size)
        sample = self.dataset.sample_ids[row : row + 1]
        noise = mask_noise(self.seed.value, self.epoch.value, sample, num_patches, "image")
        self.masking = self.masker(noise, self.ratio.value / 100)
        hidden = int(self.masking.mask.sum())
        self.image.value = png(paint_mask(pixels, self.masking.mask, self.patch_size)[0], 320)
        self.words.value = (
            f"<b>{self.dataset.texts[row][0]}</b><br>{num_patches - hidden} of {num_patches} "
            f"patches are seen; {100 * hidden / num_patches:.1f} % are hidden"
        )

    def _ipython_display_(self):
        from IPython.display import display

        display(self.view)

    def still(self) -> torch.Tensor:
        """The picture as it is now, (3, H, W) uint8: for a saved page, which has no sliders."""
        pixels = self.dataset.batch([self.row.value]).pixel_values.cpu()
        return paint_mask(pixels, self.masking.mask, self.patch_size)[0]
