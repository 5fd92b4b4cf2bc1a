"""What the masking lab shows of a model's decoder: the picture and the hidden words it puts back.

All of it is what `reconstruct.put_back` returns for the row shown; `mask` is True where a token is
HIDDEN. The lab itself is in mask_lab.py. Walk-through: notebooks/07_reconstruction.ipynb.
"""

from collections.abc import Callable, Sequence
from functools import partial
from html import escape

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.dataset import MultimodalDataset
from ..data.partners import correct_pairs
from ..evaluation.reconstruction import PutBack, guesses, put_back
from ..masking.core import Masking
from ..models.encoder import MultimodalEncoder
from ..plots.figures import BLUE, new_figure, show_picture, wrap
from .parts import Piece, caption_on, png

Masked = tuple[Batch, Masking | None, Masking | None]
MOST = 12  # hidden words in a still figure

# -- what is computed ------------------------------------------------------------------------


def heads_of(model: MultimodalEncoder | None) -> set[str]:
    """Which of "pixels" and "words" a model puts back."""
    if model is None or model.decoder is None:
        return set()
    return {name for name in ("pixels", "words") if model.decoder.spec[name]}


def another_row(dataset: MultimodalDataset, row: int) -> int | None:
    """A row whose partner is wrong for this one, half a data set away: neighbours are alike."""
    count = len(dataset)
    for i in range(count):
        pair = torch.tensor([row, (row + count // 2 + i) % count])
        captions, images = dataset.partners(pair, dataset.drawn_captions(pair))
        correct = correct_pairs(images, captions)
        if not (correct[0, 1] or correct[1, 0]):
            return int(pair[1])
    return None


def put_back_first(
    model: MultimodalEncoder, masked: Masked, image_mode: str, text_mode: str, sees: str
) -> tuple[PutBack, dict[str, str]]:
    """The first row of a batch put back, and by "pixels" or "words" why it cannot be.

    A decoder that does not look across is asked for each modality alone: one head may refuse a mode
    that the other takes.
    """
    batch, *maskings = masked
    ask = partial(put_back, model, batch, image_mode=image_mode, text_mode=text_mode)
    back, refused = PutBack(*[None] * 6), {}
    if model.decoder is not None and model.decoder.across:
        back = ask(*maskings, sees=sees)
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


def _first_row(back: PutBack) -> PutBack:
    first = slice(0, 1)
    parts = {name: value[first] for name, value in vars(back).items()
             if value is not None and not name.startswith("word")}  # fmt: skip
    if back.word_places is not None:
        rows = back.word_places[:, 0] == 0
        parts |= {n: v[rows] for n, v in vars(back).items() if n.startswith("word")}
    return PutBack(**dict.fromkeys(vars(back)) | parts)


# -- what is shown ---------------------------------------------------------------------------


def told(name: str, across: bool, sees: str, wrong: str | None) -> str:
    """What the decoder knows of the other modality. name: what it is, "caption" or "picture".

    wrong: whose it is where it is another pair's; None where there is no other.
    """
    if not across:
        return f"sees no {name} (it does not look across)"
    if sees == "wrong" and wrong is None:
        return f"sees no {name} (there is no other one)"
    return {
        "right": f"sees the {name}, with its own mask",
        "none": f"sees no {name}",
        "wrong": f"sees a wrong {name}, {wrong}",
    }[sees]


def picture_words(back: PutBack, num_hidden: int, knows: str, norm_pix_loss: bool) -> str:
    """What is said of a picture put back, of `num_hidden` hidden patches."""
    if not num_hidden or back.pixel_errors is None:
        return "No patch is hidden: this is the picture itself."
    patches = "patch" if num_hidden == 1 else "patches"
    words = f"Put back: mean squared error {float(back.pixel_errors[0]):.4f} of {num_hidden} hidden"
    words += f" {patches} (black 0, white 1). The decoder {knows}."
    if norm_pix_loss:
        words += (
            " Brightness and contrast of each hidden patch are the true ones:"
            " this decoder predicts patches without them (norm_pix_loss)."
        )
    return words


def hidden_words(model: MultimodalEncoder, batch: Batch, back: PutBack) -> list[dict]:
    """`reconstruct.guesses` of a batch of one row, with "rank" and "chance" of the right word."""
    if back.word_log_probs is None or back.word_labels is None:
        return []
    found = guesses(model, batch, back)[0]["guesses"]
    right = back.word_log_probs.gather(1, back.word_labels[:, None])
    ranks = 1 + (back.word_log_probs > right).sum(1)
    for word, rank, chance in zip(found, ranks.tolist(), right.exp()[:, 0].tolist(), strict=True):
        word |= {"rank": rank, "chance": chance}
    return found


def per_cent(share: float) -> str:
    """As in "37 %"; "0.4 %" below one."""
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1f} %"


def guesses_html(found: Sequence[dict], knows: str) -> str:
    """A table of hidden words (of `hidden_words`) and the best guesses of each.

    The right one has a sign and is bold, for colour-blind readers.
    """
    if not found:
        return "<p>No word is hidden: there is none to guess.</p>"
    lines = []
    for word in found:
        behind = f"<small>rank {word['rank']}<br>{per_cent(word['chance'])}</small>"
        behind = behind if word["rank"] > len(word["top"]) else ""  # else it is in the table
        line = f'<tr><th scope="row">{escape(word["truth"])}{behind}</th>'
        for piece, chance in word["top"]:
            right = piece == word["truth"]
            line += (
                f'<td{" class=right" if right else ""} style="--share: {100 * chance:.1f}%">'
                f"{'✓ ' if right else ''}{escape(piece)}<br>{per_cent(chance)}</td>"
            )
        lines.append(line + "</tr>")
    head = "".join(f'<th scope="col">{n}</th>' for n in ("hidden", *_places(found)))
    return (
        f"<p><b>Hidden words, and the model's best guesses</b> (✓ the right one). The decoder "
        f'{escape(knows)}.</p><div class="mmkit-guesses" tabindex="0"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _places(found: Sequence[dict]) -> list[str]:
    return ["1st", "2nd", "3rd", "4th", "5th"][: max(len(word["top"]) for word in found)]


def back_figure(
    pictures: Sequence[Tensor],
    titles: Sequence[str],
    pieces: Sequence[Piece],
    words: str,
    found: Sequence[dict],
    below: str,
):
    """`lab_parts.still_figure` with the picture put back and a table of guesses below."""
    lines = min(len(found), MOST)
    deep = 0.34 * (lines + 1) + 0.3 if lines else 0.3
    figure = new_figure(5.2 + 2 * len(pictures), 2.9 + deep)
    wide = [1.0] * len(pictures) + [1.9]
    grid = figure.add_gridspec(2, len(wide), width_ratios=wide, height_ratios=[2.9, deep])
    for column, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        show_picture(figure.add_subplot(grid[0, column]), picture, title)
    caption_on(figure.add_subplot(grid[0, -1]), pieces, words)
    _table_on(figure.add_subplot(grid[1, :]), found, below)
    return figure


def _table_on(ax, found: Sequence[dict], below: str):
    """Hidden words in the first column, their guesses in the others, each with a bar."""
    style = dict(fontsize=8, va="center", parse_math=False)
    for y, word in enumerate(found[:MOST], 1):
        place = f" (rank {word['rank']})"
        ax.text(0, y, word["truth"] + place, weight="bold", **style)
        for x, (piece, chance) in enumerate(word["top"], 1):
            right = piece == word["truth"]
            colour, weight = (BLUE, "bold") if right else ("0.3", "normal")
            label = f"{'✓ ' if right else ''}{piece}  {per_cent(chance)}"
            ax.text(x, y, label, color=colour, weight=weight, **style)
            ax.plot([x, x + 0.9 * chance], [y + 0.4] * 2, color=colour, linewidth=2)
    if found:
        for x, name in enumerate(("hidden word", *_places(found))):
            ax.text(x, 0, name, color="0.4", **style)
    more = f"… and {len(found) - MOST} more. " if len(found) > MOST else ""
    end = min(len(found), MOST) + 1 if found else 0
    ax.text(0, end, more + wrap(below, 150), style="italic", color="0.3", **style)
    ax.set(xlim=(0, 6), ylim=(end + 0.5, -0.5))
    ax.axis("off")


# -- in the lab ------------------------------------------------------------------------------


class DecoderView:
    """What a `MaskLab` shows of a model that has a decoder.

    `sees`: the choice of what the decoder looks at ("right", "none", "wrong"), None where it does
    not look across. `canvas`: the picture put back, None without that head; `guesses`: HTML, hidden
    without a word head. `back`: the `PutBack` shown, of one row; `found`: of `hidden_words`.
    """

    def __init__(
        self, model: MultimodalEncoder, dataset: MultimodalDataset, grid: tuple[int, int], style
    ):
        import ipywidgets as w

        from .canvas import PictureCanvas

        self.model, self.dataset, self.heads = model, dataset, heads_of(model)
        assert model.decoder is not None
        self.sees = self.canvas = None
        self.found: list[dict] = []
        if model.decoder.across:
            both = len(self.heads) == 2  # pixels look at a caption, words at a picture
            what = "pair" if both else "caption" if "pixels" in self.heads else "picture"
            options = [(f"its own {what} (right)", "right"), ("nothing (none)", "none"),
                       (f"another {what} (wrong)", "wrong")]  # fmt: skip
            words = "decoder looks at"
            self.sees = w.Dropdown(options=options, description=words, tooltip=words, **style)
        if "pixels" in self.heads:
            self.canvas = PictureCanvas(rows=grid[0], columns=grid[1])
        self.guesses = w.HTML(layout=w.Layout(display=None if "words" in self.heads else "none"))

    def update(
        self,
        row: int,
        masked: Callable[[list[int]], Masked],
        now: Masked,
        modes: tuple[str, str],
        pictures: tuple[Tensor, Tensor],
    ):
        """Put back a row and show it.

        masked: rows to their batch and maskings; now: those of `row`. modes: of the picture, of the
        caption. pictures: the whole one and the masked one, (3, H, W) uint8.
        """
        sees, other, batch = self.sees.value if self.sees else "right", None, now
        if sees == "wrong":
            other = another_row(self.dataset, row)
            batch = now if other is None else masked([row, other])
        self.back, self.refused = put_back_first(self.model, batch, *modes, sees)
        self._say(sees, other, now)
        self.picture = self._shown(*pictures)
        if self.canvas is not None:
            with self.canvas.hold_sync():  # one message
                self.canvas.words = self.words
                self.canvas.picture = png(self.picture)
        if "words" in self.heads:
            self.found = hidden_words(self.model, now[0], self.back)
            why = self.refused.get("words", "")
            self.guesses.value = (
                f'<p class="warning">No words are put back: {escape(why)}</p>'
                if why
                else guesses_html(self.found, self.knows["words"])
            )

    def figure(self, pictures: list[Tensor], titles: Sequence[str], pieces, words: str):
        """`back_figure` of what is shown. pictures, titles: of the whole and of the masked one."""
        below = []
        if self.canvas is not None:
            pictures, titles = [*pictures, self.picture], (*titles, "put back")
            below.append(self.words)
        if "words" in self.heads:
            below.append(self.refused.get("words") or f"Words: the decoder {self.knows['words']}.")
        return back_figure(pictures, titles, pieces, words, self.found, " ".join(below))

    def _say(self, sees: str, other: int | None, now: Masked):
        """Fill `knows`, by head what it sees across, and `words`, what is said of the picture."""
        assert self.model.decoder is not None
        across = self.model.decoder.across
        whose: dict[str, str | None] = {"pixels": None, "words": None}
        if other is not None:
            text = self.dataset.texts[other][0]
            whose = {"pixels": f"“{text}” (row {other})", "words": f"that of row {other}, “{text}”"}
        self.knows = {
            head: told(name, across, sees, whose[head])
            for head, name in (("pixels", "caption"), ("words", "picture"))
        }
        num_hidden = 0 if now[1] is None else int(now[1].mask.sum())
        why = self.refused.get("pixels")
        norm = self.model.decoder.norm_pix_loss
        self.words = (
            f"Nothing is put back: {why}"
            if why
            else picture_words(self.back, num_hidden, self.knows["pixels"], norm)
        )

    def _shown(self, whole: Tensor, masked: Tensor) -> Tensor:
        """The picture put back; the masked one where that is refused."""
        if "pixels" in self.refused:
            return masked
        return whole if self.back.pictures is None else self.back.pictures[0].cpu()
