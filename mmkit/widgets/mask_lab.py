"""The masking lab: controls over masks, an image to paint on, and the output of a model.

All computations are those of functions elsewhere: masks come from `masking.draw_maskings`, as in
training. `mask` is True where a token is MASKED. Python sends the bytes of the image when it
changes and those of the mask when it changes; the browser draws (mask_canvas.js), because a new
figure for each move of a slider takes three times as long.
Walk-through: notebooks/02_masking.ipynb.
"""

import base64
import contextlib
import dataclasses
import io
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.dataset import MultimodalDataset
from ..data.loader import as_dataset
from ..data.partners import correct_pairs
from ..evaluation.reconstruction import Reconstruction
from ..losses import similarity
from ..masking.core import TokenInfo, patch_grid
from ..masking.image import ATTENTION_MASKERS, IMAGE_MASKERS
from ..masking.plan import draw_maskings
from ..masking.text import TEXT_MASKERS
from ..models.attention import eval_mode
from ..models.encoder import MultimodalEncoder
from ..models.patches import paint_mask
from ..older_names import older_arguments, older_attributes
from .decoder_view import DecoderView, Masked, heads_of
from .lifetime import close_all, weakly
from .parts import (
    caption_html,
    caption_tokens,
    checked_patch,
    count_tokens,
    counts_html,
    png,
    pool_rows,
    rank_of,
    ranking_html,
    relative_cost,
    still_figure,
    visible_in_words,
)

_SHOWN: deque = deque(maxlen=3)  # labs on a page, which stay alive there without a variable
POOL = 24  # captions that the image is compared with


@older_attributes(pieces="tokens", picture="image", sees="context")
class MaskLab:
    """Show the masks of an image and of its caption, to change with controls or to paint.

    `MaskLab(dataset)` as the last line of a cell shows it. Controls, all usable by keyboard: `row`,
    `seed`, `epoch`; `image_masker`, `image_percent`, `image_mode` for the patches; `text_masker`,
    `text_percent`, `text_mode` for the tokens. `masking` and `text_masking` are each the `Masking`
    shown, of one row, None where nothing is masked: bit for bit those that training draws for this
    sample, seed, epoch and ratio. (But "attentive" uses the attention of this model at full
    resolution, training that of its running mean at half; and of several captions this shows the
    first, where training draws one.)

    Painting on the image, or `paint(array)`, makes `painted`, (h, w) bool, the mask; changing the
    masker, its ratio, the seed or the epoch returns to a computed one. With a model there are
    `cosines` of the masked image with the masked captions of `rows`, and `rank`, that of the
    correct one; with a decoder `back`, its reconstruction of the row shown, and with
    cross-attention one more control, `context`: "matched", "none" or "mismatched".

    `close()` removes the view from the page and releases model and data. So does deleting the lab,
    but the last three that were shown stay alive without a variable.

    Args:
        dataset: the pairs to show.
        model: an encoder, or None.
        patch_size: side of a patch in pixels; None: the model's, else 8 up to 96 pixels, else 16.
    Raises:
        ValueError: the patch does not divide the images, or is not the model's.
    """

    def __init__(
        self,
        dataset: MultimodalDataset,
        model: MultimodalEncoder | None = None,
        patch_size: int | None = None,
    ):
        import ipywidgets as w

        from .canvas import MaskCanvas

        dataset = as_dataset(dataset, "dataset")
        if model is not None:
            dataset = dataset.encoded_by(model.tokenizer, model.max_length)
        self.dataset, self.model = dataset, model
        self.patch_size = checked_patch(dataset, model, patch_size)
        self.grid = patch_grid(dataset[0]["image"], self.patch_size)
        self.painted: np.ndarray | None = None
        self._computed, self._warning, self._quiet = "random", "", False
        self._cache: dict[str, tuple] = {}
        columns = self._add_controls()
        self.controls = tuple(control for column in columns for control in column)
        self.canvas = MaskCanvas(rows=self.grid[0], columns=self.grid[1])
        self.words = w.HTML(layout=w.Layout(width="228px" if model else "600px"))
        self.ranking = w.HTML(layout=w.Layout(width="418px", display=None if model else "none"))
        self._update()
        for control in self.controls:
            control.observe(weakly(self._moved), "value")
        self.canvas.observe(weakly(self._painted_by_hand), "mask")
        self.view = self._laid_out(columns)
        self._finalizer = weakref.finalize(self, close_all, self.view)
        me = weakref.ref(self)
        self.view.close = lambda: (lab := me()) and lab.close()

    def _add_controls(self) -> tuple[tuple, ...]:
        """Make the controls and the view of a decoder; returns the columns of controls."""
        import ipywidgets as w

        style: dict = dict(style={"description_width": "128px"}, layout=w.Layout(width="324px"))

        def slider(text, value, most):
            return w.IntSlider(value, 0, most, description=text, tooltip=text, **style)

        def choice(text, options):
            return w.Dropdown(options=options, description=text, tooltip=text, **style)

        missing = ["layers"] if self.dataset.layers is None else []
        missing += [] if self.model else ATTENTION_MASKERS
        modes = [("removed (drop)", "drop"), ("mask token (replace)", "replace")]
        self.row = slider("image (row)", 0, len(self.dataset) - 1)
        self.seed = w.BoundedIntText(0, 0, 2**31 - 1, description="seed", tooltip="seed", **style)
        self.epoch = slider("epoch", 0, 99)
        self.image_masker = choice("image masker", [n for n in IMAGE_MASKERS if n not in missing])
        self.image_percent = slider("patches masked (%)", 50, 99)
        self.image_mode = choice("masked patches are", modes)
        self.text_masker = choice("text masker", list(TEXT_MASKERS))
        self.text_percent = slider("tokens masked (%)", 25, 99)
        self.text_mode = choice("masked tokens are", [*modes, ("80/10/10 (as BERT)", "80/10/10")])
        columns: tuple[tuple, ...] = (
            (self.row, self.seed, self.epoch),
            (self.image_masker, self.image_percent, self.image_mode),
            (self.text_masker, self.text_percent, self.text_mode),
        )
        self.decoder = None
        if self.model is not None and heads_of(self.model):
            self.decoder = DecoderView(self.model, self.dataset, self.grid, style)
            columns += ((self.decoder.context,),) if self.decoder.context else ()
        self.context = self.decoder and self.decoder.context
        return columns

    def _laid_out(self, columns: tuple[tuple, ...]) -> Any:
        """All that is shown, in one widget."""
        import ipywidgets as w

        line = w.Layout(flex_flow="row wrap", grid_gap="4px 16px")
        top = w.HBox([w.VBox(column) for column in columns], layout=line)
        below = [self.canvas, self.words, self.ranking]
        if self.decoder:  # images side by side; then the caption with its guesses, the ranking
            self.words.layout.width = self.ranking.layout.width = "376px"
            texts = w.VBox([self.words, self.decoder.guesses], layout=w.Layout(width="380px"))
            below = [self.canvas, self.decoder.canvas, texts, self.ranking]
        below = w.HBox([part for part in below if part is not None], layout=line)
        view = w.VBox([top, below], layout=w.Layout(grid_gap="10px"))
        view.add_class("mmkit-lab")
        return view

    def close(self):
        """Close all widgets of the lab and release its model, data and results."""
        if not vars(self):  # closed already
            return
        self._finalizer()
        vars(self).clear()
        with contextlib.suppress(ValueError):
            _SHOWN.remove(self)

    # -- changes ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _quietly(self):
        """Changes made within this context do not count as a reader's."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def _moved(self, change):
        if self._quiet:
            return
        self._warning, masker = "", self.image_masker
        if masker.value != "painted":
            self._computed = masker.value
        elif change["owner"] in (self.image_percent, self.seed, self.epoch):
            self._choose(self._computed)
        elif self.painted is None:  # "painted" was chosen: begin with the mask that is shown
            self.painted = self._masked_patches().copy()
        self._update()

    def _choose(self, masker: str):
        with self._quietly():
            self.image_masker.value = masker

    def _painted_by_hand(self, change):
        if not self._quiet:
            self.paint(np.frombuffer(change["new"], dtype=np.uint8).reshape(self.grid))

    @older_arguments(hidden="masked")
    def paint(self, masked):
        """Mask patches as if painted with the mouse; one always stays visible.

        Args:
            masked: array (h, w), true = masked.
        Raises:
            ValueError: the array has another shape.
        """
        masked = np.array(masked, dtype=bool)
        if masked.shape != self.grid:
            raise ValueError(
                f"the painted mask is {masked.shape}, the image is {self.grid[0]} x "
                f"{self.grid[1]} patches; give an array of {self.grid}"
            )
        self._warning = ""
        if masked.all():
            row, column = np.argwhere(~self._masked_patches())[-1]
            masked[row, column] = False
            self._warning = (
                "One patch must stay visible, or nothing is left to encode: the one in row "
                f"{row + 1}, column {column + 1}."
            )
        self.painted = masked
        self._choose("painted")
        self._update()

    def _update(self):
        now = self._masked([self.row.value])
        self.batch, self.masking, self.text_masking = now
        with self._quietly(), self.canvas.hold_sync():  # one message, of what has changed
            self.canvas.image = self._cached("png", self.row.value, lambda: png(self.image()))
            self.canvas.mask = self._masked_patches().tobytes()
            self.canvas.mode = self.image_mode.value
        self.words.value = self._words_html()
        if self.decoder:
            modes = (self.image_mode.value, self.text_mode.value)
            images = (self.image(), self.still())
            self.decoder.update(self.row.value, self._masked, now, modes, images)
        if self.model is not None:
            self._compare(self.model, self._text())
            self.ranking.value = self._ranking_html()

    # -- computations ----------------------------------------------------------------------------

    def _cached(self, name: str, key, compute):
        """The last value of that name, if its key and the model's weights are still the same."""
        weights = sum(p._version for p in self.model.parameters()) if self.model else 0
        if self._cache.get(name, (None,))[0] != (key, weights):
            self._cache[name] = ((key, weights), compute())
        return self._cache[name][1]

    @property
    def _tokens(self) -> TokenInfo:
        """That of the model; without one, that of the tokenizer and the patch size."""
        if self.model is not None:
            return self.model.token_info
        tokenizer = self.dataset.tokenizer
        return self._cached("tokens", tokenizer, lambda: TokenInfo.of(tokenizer, self.patch_size))

    def _batch(self, rows: list[int]) -> Batch:
        if self.model is None:
            return self.dataset.batch(rows).to("cpu")
        return self.dataset.batch(rows).to(self.model.logit_scale.device)

    def _text(self) -> tuple[str, float]:
        return self.text_masker.value, self.text_percent.value / 100

    def _masked(self, rows: list[int]) -> Masked:
        """A batch of these rows and its maskings, as the controls say."""
        batch, masker = self._batch(rows), self.image_masker.value
        ratio = self.painted if masker == "painted" else self.image_percent.value / 100
        return batch, *self._draw(batch, (masker, ratio), self._text())

    def _draw(self, batch: Batch, image: tuple[str, Any], text: tuple[str, float]):
        tokens = dataclasses.replace(self._tokens, attend=lambda _: self._attention(batch))
        if text[0] == "frequency" and tokens.frequency is None:  # that of this data set
            tokens.frequency = self.dataset.token_frequency()
        return draw_maskings(
            batch, tokens, seed=self.seed.value, epoch=self.epoch.value, image=image, text=text,
            text_mode=self.text_mode.value, layers=self.dataset.layers,
        )  # fmt: skip

    def _attention(self, batch: Batch) -> Tensor:
        model = self.model
        assert model is not None

        def attend():
            with eval_mode(model):
                return model.class_attention(batch.pixel_values)

        key = tuple(batch.sample_ids.tolist())
        return self._cached(f"attention of {len(batch)}", key, attend)

    def _compare(self, model: MultimodalEncoder, text: tuple[str, float]):
        """Compare the masked image with the masked captions of `rows`."""
        self.rows = pool_rows(self.row.value, len(self.dataset), POOL)
        key = (self.rows, text, self.text_mode.value, self.seed.value, self.epoch.value)
        captions = self._cached("captions", key, lambda: self._encode_captions(model, text))
        with eval_mode(model):
            mode = self.image_mode.value
            image = model.encode_image(self.batch.pixel_values, self.masking, mode)
            self.cosines = similarity(image, captions)[0].cpu()
        shown = self.dataset.drawn_captions(torch.as_tensor(self.rows))
        captions, images = self.dataset.partners([self.row.value], shown)
        self.right = correct_pairs(images, captions)[0]
        self.rank = rank_of(self.cosines, self.right)

    def _encode_captions(self, model: MultimodalEncoder, text: tuple[str, float]) -> Tensor:
        batch = self._batch(self.rows)
        _, masking = self._draw(batch, ("random", 0.0), text)
        with eval_mode(model):
            mode = self.text_mode.value
            return model.encode_text(batch.input_ids, batch.valid, masking, mode)

    def tokens(self) -> list[tuple[str, str]]:
        """The tokens of the caption as they are shown, each with its kind (figures.KINDS)."""
        ids = self.batch.input_ids[0, self.batch.valid[0]].tolist()
        special, mode = self._tokens.special_ids.tolist(), self.text_mode.value
        return caption_tokens(self.dataset.tokenizer, ids, special, self.text_masking, mode)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Count (visible, all) patches and tokens, and (encoded, all) patches and text tokens."""
        return count_tokens(self.tokens(), self._masked_patches(), self.image_mode.value)

    def cost(self) -> float:
        """The cost of encoding the pair, as a fraction of the cost with nothing masked.

        In operations (`mm.cost.sample_flops`); without a model, in tokens.
        """
        return relative_cost(self.counts(), self.model)[0]

    @property
    def back(self) -> Reconstruction | None:
        """The decoder's reconstruction of the row shown; None without a head for it."""
        return self.decoder.back if self.decoder else None

    # -- views -----------------------------------------------------------------------------------

    def _masked_patches(self) -> np.ndarray:
        """The masked patches of `masking`, (h, w) bool."""
        if self.masking is None:
            return np.zeros(self.grid, dtype=bool)
        return self.masking.mask[0].cpu().numpy().reshape(self.grid)

    def image(self) -> Tensor:
        """The whole image, (3, H, W) uint8; a normalised one is stretched to its own range.

        Beside a reconstructed image it is shown in the range of the model, as that one is.
        """
        pixels = self.batch.pixel_values[0].cpu()
        if pixels.is_floating_point() and self.model is not None and self.decoder:
            mean, std = self.model.pixel_stats.cpu().unbind()
            return (255 * (pixels * std + mean).clamp(0, 1)).round().to(torch.uint8)
        if pixels.is_floating_point():
            low, high = pixels.aminmax()
            pixels = (255 * (pixels - low) / (high - low).clamp(min=1e-6)).to(torch.uint8)
        return pixels

    def still(self) -> Tensor:
        """The masked image as it is now, (3, H, W) uint8, masked patches grey."""
        mask = torch.from_numpy(self._masked_patches()).reshape(1, -1)
        return paint_mask(self.image()[None], mask, self.patch_size)[0]

    def _words_html(self) -> str:
        counts = self.counts()
        html = caption_html(self.dataset.texts[self.row.value][0], self.tokens())
        html += counts_html(counts, relative_cost(counts, self.model)[1])
        return html + (self._warning and f'<p class="warning" role="alert">{self._warning}</p>')

    def _ranking_html(self) -> str:
        texts = [self.dataset.texts[row][0] for row in self.rows]
        return (
            f"<p><b>The correct caption (✓) has rank {self.rank} of {len(self.rows)}</b> by cosine"
            f"</p>{ranking_html(texts, self.cosines, self.right)}<small>Captions, masked as on the "
            f"left, of row {self.row.value} and of rows spread evenly over the data set.</small>"
        )

    def figure(self):
        """Draw a still Figure: the image, the masked image and the caption.

        With a decoder also the reconstructed image, and a table of its guesses of masked tokens.
        """
        counts = self.counts()
        patches, text = visible_in_words(counts)
        titles = f"row {self.row.value}", f"{self.image_masker.value}: {patches} visible"
        text += f" visible\ncost: {relative_cost(counts, self.model)[1]}"
        if self.model is not None:
            text += f"\nthe correct caption has rank {self.rank} of {len(self.rows)}"
        if self.decoder:
            images = [self.image(), self.still()]
            return self.decoder.figure(images, titles, self.tokens(), text)
        return still_figure(self.image(), self.still(), titles, self.tokens(), text)

    def __repr__(self) -> str:
        if not vars(self):
            return "MaskLab(closed)"
        visible = " and ".join(visible_in_words(self.counts()))
        error = None if self.back is None else self.back.pixel_errors
        back = ""
        if error is not None and self._masked_patches().any():
            back = f", reconstructed with an error of {float(error[0]):.4f}"
        return f"MaskLab(row {self.row.value}: {visible} visible{back})"

    def _repr_mimebundle_(self, **kwargs) -> dict[str, Any]:
        """The live view, and a still image for a page without a kernel."""
        if not vars(self):
            return {"text/plain": repr(self)}
        if self not in _SHOWN:
            _SHOWN.append(self)
        buffer = io.BytesIO()
        self.figure().savefig(buffer, dpi=110)
        still = base64.b64encode(buffer.getvalue()).decode()
        live = self.view._repr_mimebundle_(**kwargs)
        return live | {"image/png": still, "text/plain": repr(self)}

    def _ipython_display_(self):
        """Show the still and the live view as two outputs; the live view hides the still.

        With both in one output, JupyterLab shows nothing but "model not found" in a trusted
        notebook without its kernel.
        """
        from IPython.display import display

        live = self._repr_mimebundle_()
        if (still := live.pop("image/png", None)) is None:  # closed
            return display(live, raw=True)
        self.canvas.still = still[-60:]  # by which the canvas recognises it
        display({"image/png": still, "text/plain": repr(self)}, raw=True)
        display(live, raw=True)
