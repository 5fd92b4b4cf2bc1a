"""The decoder in the masking lab: the image and the masked tokens that it reconstructs.

All of it is what `mm.reconstruct` returns for the row shown; `mask` is True where a token is
MASKED. The lab itself is in mask_lab.py. Walk-through: notebooks/07_reconstruction.ipynb.
"""

from collections.abc import Callable, Sequence
from functools import partial
from html import escape

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.dataset import MultimodalDataset
from ..data.partners import correct_pairs
from ..evaluation.reconstruction import Reconstruction, guesses, reconstruct
from ..masking.core import Masking
from ..models.encoder import MultimodalEncoder
from ..plots.figures import BLUE, new_figure, show_image, wrap
from .parts import Token, caption_on, png

Masked = tuple[Batch, Masking | None, Masking | None]
MOST = 12  # masked tokens in a still figure

# -- what is computed ------------------------------------------------------------------------


def heads_of(model: MultimodalEncoder | None) -> set[str]:
    """The heads of a model's decoder, out of "pixels" and "words" (the tokens of captions)."""
    if model is None or model.decoder is None:
        return set()
    return {name for name in ("pixels", "words") if model.decoder.spec[name]}


def another_row(dataset: MultimodalDataset, row: int) -> int | None:
    """A row whose partner is wrong for this one, half a data set away: neighbours are similar.

    Returns None where every other row has a correct partner.
    """
    count = len(dataset)
    for i in range(count):
        pair = torch.tensor([row, (row + count // 2 + i) % count])
        captions, images = dataset.partners(pair, dataset.drawn_captions(pair))
        correct = correct_pairs(images, captions)
        if not (correct[0, 1] or correct[1, 0]):
            return int(pair[1])
    return None


def reconstruct_first(
    model: MultimodalEncoder, masked: Masked, image_mode: str, text_mode: str, context: str
) -> tuple[Reconstruction, dict[str, str]]:
    """Reconstruct the first row of a batch; also returns for each head why it cannot.

    A decoder without cross-attention is called for each modality alone, because one head may refuse
    a mode that the other accepts.

    Args:
        model: an encoder with a decoder.
        masked: the batch and its image and text maskings.
        image_mode, text_mode, context: as in `reconstruct`.
    Returns:
        The reconstruction, and "pixels" or "words" -> the message of the refusal.
    """
    batch, *maskings = masked
    ask = partial(reconstruct, model, batch, image_mode=image_mode, text_mode=text_mode)
    back, refused = Reconstruction(*[None] * 6), {}
    if model.decoder is not None and model.decoder.across:
        back = ask(*maskings, context=context)
    else:
        for name, masking in zip(("pixels", "words"), maskings, strict=True):
            alone = (masking, None) if name == "pixels" else (None, masking)
            try:
                found = ask(*alone)
            except ValueError as error:
                refused[name] = str(error)
                continue
            for part, value in vars(found).items():
                if value is not None:
                    setattr(back, part, value)
    return _first_row(back), refused


def _first_row(back: Reconstruction) -> Reconstruction:
    first = slice(0, 1)
    parts = {name: value[first] for name, value in vars(back).items()
             if value is not None and not name.startswith("token")}  # fmt: skip
    if back.token_positions is not None:
        rows = back.token_positions[:, 0] == 0
        parts |= {n: v[rows] for n, v in vars(back).items() if n.startswith("token")}
    return Reconstruction(**dict.fromkeys(vars(back)) | parts)


# -- what is shown ---------------------------------------------------------------------------


def told(name: str, across: bool, context: str, wrong: str | None) -> str:
    """Describe the context of the decoder.

    Args:
        name: the other modality, "caption" or "image".
        across: whether the decoder has cross-attention.
        context: "matched", "none" or "mismatched".
        wrong: whose caption or image a mismatched one is; None where there is no other.
    Returns:
        The end of a sentence that begins with "the decoder".
    """
    if not across:
        return f"sees no {name} (it has no cross-attention)"
    if context == "mismatched" and wrong is None:
        return f"sees no {name} (there is no mismatched one)"
    return {
        "matched": f"sees the matched {name} under its mask",
        "none": f"sees no {name}",
        "mismatched": f"sees a mismatched {name}, {wrong}",
    }[context]


def image_words(back: Reconstruction, num_masked: int, knows: str, norm_pix_loss: bool) -> str:
    """The text below a reconstructed image with `num_masked` masked patches."""
    if not num_masked or back.pixel_errors is None:
        return "No patch is masked: this is the image itself."
    patches = "patch" if num_masked == 1 else "patches"
    text = f"Reconstructed: mean squared error {float(back.pixel_errors[0]):.4f} of {num_masked}"
    text += f" masked {patches} (black 0, white 1). The decoder {knows}."
    if norm_pix_loss:
        text += (
            " Each masked patch has its true brightness and contrast:"
            " this decoder predicts patches without them (norm_pix_loss)."
        )
    return text


def masked_tokens(model: MultimodalEncoder, batch: Batch, back: Reconstruction) -> list[dict]:
    """The `guesses` of a batch of one row, with "rank" and "chance" of each true token."""
    if back.token_log_probs is None or back.token_labels is None:
        return []
    found = guesses(model, batch, back)[0]["guesses"]
    true = back.token_log_probs.gather(1, back.token_labels[:, None])
    ranks = 1 + (back.token_log_probs > true).sum(1)
    for entry, rank, chance in zip(found, ranks.tolist(), true.exp()[:, 0].tolist(), strict=True):
        entry |= {"rank": rank, "chance": chance}
    return found


def per_cent(fraction: float) -> str:
    """A text such as "37 %"; below 1 % such as "0.4 %"."""
    return f"{100 * fraction:.0f} %" if fraction >= 0.01 else f"{100 * fraction:.1f} %"


def guesses_html(found: Sequence[dict], knows: str) -> str:
    """A table of masked tokens (from `masked_tokens`) and the best guesses for each.

    The correct one has a sign and is bold, for colour-blind readers.
    """
    if not found:
        return "<p>No token is masked: there is none to guess.</p>"
    lines = []
    for entry in found:
        rank = f"<small>rank {entry['rank']}<br>{per_cent(entry['chance'])}</small>"
        rank = rank if entry["rank"] > len(entry["top"]) else ""  # else it is in the table
        line = f'<tr><th scope="row">{escape(entry["truth"])}{rank}</th>'
        for token, chance in entry["top"]:
            correct = token == entry["truth"]
            line += (
                f'<td{" class=right" if correct else ""} style="--fraction: {100 * chance:.1f}%">'
                f"{'✓ ' if correct else ''}{escape(token)}<br>{per_cent(chance)}</td>"
            )
        lines.append(line + "</tr>")
    head = "".join(f'<th scope="col">{n}</th>' for n in ("masked", *_ordinals(found)))
    return (
        f"<p><b>Masked tokens and the model's best guesses</b> (✓ the correct one). The decoder "
        f'{escape(knows)}.</p><div class="mmkit-guesses" tabindex="0"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _ordinals(found: Sequence[dict]) -> list[str]:
    return ["1st", "2nd", "3rd", "4th", "5th"][: max(len(entry["top"]) for entry in found)]


def back_figure(
    images: Sequence[Tensor],
    titles: Sequence[str],
    tokens: Sequence[Token],
    words: str,
    found: Sequence[dict],
    below: str,
):
    """`parts.still_figure` with the reconstructed image, and a table of guesses below."""
    lines = min(len(found), MOST)
    deep = 0.34 * (lines + 1) + 0.3 if lines else 0.3
    figure = new_figure(5.2 + 2 * len(images), 2.9 + deep)
    wide = [1.0] * len(images) + [1.9]
    grid = figure.add_gridspec(2, len(wide), width_ratios=wide, height_ratios=[2.9, deep])
    for column, (image, title) in enumerate(zip(images, titles, strict=True)):
        show_image(figure.add_subplot(grid[0, column]), image, title)
    caption_on(figure.add_subplot(grid[0, -1]), tokens, words)
    _table_on(figure.add_subplot(grid[1, :]), found, below)
    return figure


def _table_on(ax, found: Sequence[dict], below: str):
    """Masked tokens in the first column, their guesses in the others, each with a bar."""
    style = dict(fontsize=8, va="center", parse_math=False)
    for y, entry in enumerate(found[:MOST], 1):
        ax.text(0, y, f"{entry['truth']} (rank {entry['rank']})", weight="bold", **style)
        for x, (token, chance) in enumerate(entry["top"], 1):
            correct = token == entry["truth"]
            colour, weight = (BLUE, "bold") if correct else ("0.3", "normal")
            label = f"{'✓ ' if correct else ''}{token}  {per_cent(chance)}"
            ax.text(x, y, label, color=colour, weight=weight, **style)
            ax.plot([x, x + 0.9 * chance], [y + 0.4] * 2, color=colour, linewidth=2)
    if found:
        for x, name in enumerate(("masked token", *_ordinals(found))):
            ax.text(x, 0, name, color="0.4", **style)
    more = f"… and {len(found) - MOST} more. " if len(found) > MOST else ""
    end = min(len(found), MOST) + 1 if found else 0
    ax.text(0, end, more + wrap(below, 150), style="italic", color="0.3", **style)
    ax.set(xlim=(0, 6), ylim=(end + 0.5, -0.5))
    ax.axis("off")


# -- in the lab ------------------------------------------------------------------------------


class DecoderView:
    """The part of a `MaskLab` that shows the decoder of its model.

    `context` is the choice of what the decoder sees ("matched", "none" or "mismatched"), None
    without cross-attention; `canvas` the reconstructed image, None without that head; `guesses` the
    HTML of the guessed tokens, not displayed without that head; `back` the `Reconstruction` shown,
    of one row; `found` the result of `masked_tokens`.

    Args:
        model, dataset: an encoder with a decoder, and the pairs to show.
        grid: (rows, columns) of patches.
        style: keyword arguments of the ipywidgets control.
    """

    def __init__(
        self, model: MultimodalEncoder, dataset: MultimodalDataset, grid: tuple[int, int], style
    ):
        import ipywidgets as w

        from .canvas import ImageCanvas

        self.model, self.dataset, self.heads = model, dataset, heads_of(model)
        assert model.decoder is not None
        self.context = self.canvas = None
        self.found: list[dict] = []
        if model.decoder.across:
            both = len(self.heads) == 2  # pixels see a caption, tokens see an image
            what = "pair" if both else "caption" if "pixels" in self.heads else "image"
            options = [(f"its own {what} (matched)", "matched"), ("nothing (none)", "none"),
                       (f"another {what} (mismatched)", "mismatched")]  # fmt: skip
            text = "decoder sees"
            self.context = w.Dropdown(options=options, description=text, tooltip=text, **style)
        if "pixels" in self.heads:
            self.canvas = ImageCanvas(rows=grid[0], columns=grid[1])
        self.guesses = w.HTML(layout=w.Layout(display=None if "words" in self.heads else "none"))

    def update(
        self,
        row: int,
        masked: Callable[[list[int]], Masked],
        now: Masked,
        modes: tuple[str, str],
        images: tuple[Tensor, Tensor],
    ):
        """Reconstruct a row and show it.

        Args:
            row: of the data set.
            masked: a function from rows to their batch and maskings.
            now: its result for this row.
            modes: what is done with masked patches and with masked tokens.
            images: the whole image and the masked one, (3, H, W) uint8.
        """
        context, other, batch = self.context.value if self.context else "matched", None, now
        if context == "mismatched":
            other = another_row(self.dataset, row)
            batch = now if other is None else masked([row, other])
        self.back, self.refused = reconstruct_first(self.model, batch, *modes, context)
        self._say(context, other, now)
        self.image = self._shown(*images)
        if self.canvas is not None:
            with self.canvas.hold_sync():  # one message
                self.canvas.words = self.words
                self.canvas.image = png(self.image)
        if "words" in self.heads:
            self.found = masked_tokens(self.model, now[0], self.back)
            why = self.refused.get("words", "")
            self.guesses.value = (
                f'<p class="warning">No tokens are reconstructed: {escape(why)}</p>'
                if why
                else guesses_html(self.found, self.knows["words"])
            )

    def figure(self, images: list[Tensor], titles: Sequence[str], tokens, words: str):
        """The `back_figure` of what is shown; images, titles: of the whole and the masked image."""
        below = []
        if self.canvas is not None:
            images, titles = [*images, self.image], (*titles, "reconstructed")
            below.append(self.words)
        if "words" in self.heads:
            below.append(self.refused.get("words") or f"Tokens: the decoder {self.knows['words']}.")
        return back_figure(images, titles, tokens, words, self.found, " ".join(below))

    def _say(self, context: str, other: int | None, now: Masked):
        """Set `knows`, what each head sees of the other modality, and `words`, the image's text."""
        assert self.model.decoder is not None
        across = self.model.decoder.across
        whose: dict[str, str | None] = {"pixels": None, "words": None}
        if other is not None:
            text = self.dataset.texts[other][0]
            whose = {"pixels": f"“{text}” (row {other})", "words": f"that of row {other}, “{text}”"}
        self.knows = {
            head: told(name, across, context, whose[head])
            for head, name in (("pixels", "caption"), ("words", "image"))
        }
        num_masked = 0 if now[1] is None else int(now[1].mask.sum())
        why = self.refused.get("pixels")
        norm = self.model.decoder.norm_pix_loss
        self.words = (
            f"Nothing is reconstructed: {why}"
            if why
            else image_words(self.back, num_masked, self.knows["pixels"], norm)
        )

    def _shown(self, whole: Tensor, masked: Tensor) -> Tensor:
        """The reconstructed image; the masked one where the head refuses."""
        if "pixels" in self.refused:
            return masked
        return whole if self.back.images is None else self.back.images[0].cpu()
