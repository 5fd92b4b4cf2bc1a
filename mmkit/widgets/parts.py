"""The parts of the masking lab that need no widget: what it computes, and what it shows of it.

Functions of plain data; their results are HTML for the live view and a Figure for a still. Words
have the colours of plots.masked_captions. `mask` is True where a token is HIDDEN. The lab itself is
in mask_lab.py. Walk-through: notebooks/02_masking.ipynb.
"""

import io
from collections.abc import Sequence
from html import escape

import numpy as np
from torch import Tensor

from ..data.dataset import MultimodalDataset
from ..masking.core import Masking
from ..models.encoder import MultimodalEncoder
from ..models.flops import sample_flops
from ..plots.figures import KINDS, RED, new_figure, show_picture

Piece = tuple[str, str]  # a word piece as it is shown, and its kind


# -- what is computed ------------------------------------------------------------------------


def checked_patch(dataset: MultimodalDataset, model, patch_size: int | None) -> int:
    """A patch's side in pixels: the model's; else 8 for pictures up to 96 pixels, else 16.

    Raises ValueError for a patch that does not divide the pictures or is not the model's.
    """
    sides = dataset[0]["image"].shape[1:]
    default = model.patch_size if model else 8 if max(sides) <= 96 else 16
    size = default if patch_size is None else patch_size
    if model and size != default:
        raise ValueError(f"patch_size={size}, but the model's is {default}; leave it out")
    if size < 1 or any(side % size for side in sides):
        fits = [n for n in range(1, min(sides) + 1) if not any(side % n for side in sides)]
        nearest = min(fits, key=lambda n: abs(n - size))
        raise ValueError(
            f"patch_size={size} does not divide pictures of {sides[0]} x {sides[1]} pixels; try "
            f"patch_size={nearest}"
        )
    return size


def pool_rows(row: int, count: int, size: int) -> list[int]:
    """`size` rows spread evenly over `count`; `row` is one of them, in its nearest one's place."""
    rows = [i * count // size for i in range(size)] if count > size else list(range(count))
    rows[min(range(len(rows)), key=lambda i: abs(rows[i] - row))] = row
    return rows


def rank_of(cosines: Tensor, right: Tensor) -> int:
    """The place of the best right one, 1 = on top; ties count against it. right (R,) bool."""
    best = cosines[right].max()
    behind = (cosines < best) | (cosines.isnan() & ~best.isnan())
    return 1 + int((~behind & ~right).sum())


def caption_pieces(
    tokenizer, ids: list[int], special: list[int], masking: Masking | None, mode: str
) -> list[Piece]:
    """The pieces of one caption (its ids without padding) under a `Masking` of one row."""
    pieces = []
    for place, number in enumerate(ids):
        kind = "end" if number in special else "seen"
        if masking is not None and masking.mask[0, place]:
            drawn = -1 if masking.substitute is None else int(masking.substitute[0, place])
            kind = "dropped" if mode == "drop" else "mask" if drawn < 0 else "other"
            number = drawn if kind == "other" else number
        word = "[mask]" if kind == "mask" else tokenizer.convert_ids_to_tokens(number)
        pieces.append((word, kind))
    return pieces


def count_tokens(pieces: Sequence[Piece], hidden: np.ndarray, image_mode: str) -> dict:
    """(visible, all) patches and word pieces; (encoded, all) patches and text tokens.

    hidden (h, w) bool. Only what is dropped is not encoded.
    """
    kinds = [kind for _, kind in pieces]
    left_out = hidden.sum() if image_mode == "drop" else 0
    return {
        "patches": (int((~hidden).sum()), hidden.size),
        "word pieces": (kinds.count("seen"), len(kinds) - kinds.count("end")),
        "encoded patches": (int(hidden.size - left_out), hidden.size),
        "encoded text tokens": (len(kinds) - kinds.count("dropped"), len(kinds)),
    }


def relative_cost(counts: dict, model: MultimodalEncoder | None) -> tuple[float, str]:
    """What encoding a pair costs: as a share of the cost with nothing hidden, and in words.

    counts: of `count_tokens`. The share is of operations, without a model of tokens.
    """
    now, whole = zip(counts["encoded patches"], counts["encoded text tokens"], strict=True)
    if model is None:
        share = sum(now) / sum(whole)
        return share, f"{100 * share:.0f} % ({sum(now)} of {sum(whole)} tokens)"
    flops, most = (sample_flops(model, *tokens) for tokens in (now, whole))
    share, words = flops / most, f"{flops / 1e9:.2f} of {most / 1e9:.2f} GFLOP"
    return share, f"{100 * share:.0f} % ({words})"


# -- what is shown ---------------------------------------------------------------------------


def png(picture: Tensor) -> bytes:
    """A picture (3, H, W) uint8 as PNG bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture).transpose(1, 2, 0)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def seen_in_words(counts: dict) -> tuple[str, str]:
    """As in "16 of 64 patches" and "3 of 5 word pieces"."""
    patches, words = (f"{counts[n][0]} of {counts[n][1]} {n}" for n in ("patches", "word pieces"))
    return patches, words


def caption_html(text: str, pieces: Sequence[Piece]) -> str:
    """A caption and its pieces: hidden ones struck out or replaced."""
    boxes = "".join(
        f'<span class="piece {kind}" style="background: {KINDS[kind]}">{escape(word)}</span>'
        for word, kind in pieces
    )
    other = any(kind == "other" for _, kind in pieces)
    note = "<small>green, of 80/10/10: another word, or the word itself</small>" if other else ""
    return f"<p>“{escape(text)}”</p><p>{boxes}{note}</p>"


def counts_html(counts: dict, cost: str) -> str:
    """How much is seen, and what that costs."""
    lines = []
    for words, name in zip(seen_in_words(counts), ("patches", "word pieces"), strict=True):
        seen, every = counts[name]
        hidden = 100 - 100 * seen / max(1, every)
        lines.append(f"<b>{words}</b> seen<br>{hidden:.1f} % hidden")
    lines.append(f"<b>Cost</b>, nothing hidden = 100 %<br>{cost}")
    return "".join(f"<p>{line}</p>" for line in lines)


def ranking_html(texts: Sequence[str], cosines: Tensor, right: Tensor) -> str:
    """Captions as horizontal bars from the highest cosine to the lowest.

    cosines (R,), right (R,) bool: these are blue AND have a sign, for colour-blind readers.
    """
    lines = []
    for place in cosines.argsort(descending=True).tolist():
        value, marked = float(cosines[place]), bool(right[place])
        text, kind = escape(texts[place]), " right" if marked else ""
        left, width = 50 + 50 * min(0.0, value), 50 * abs(value)  # per cent; the scale is -1 to 1
        lines.append(
            f'<span class="sign{kind}">{"✓" if marked else ""}</span>'
            f'<span class="text{kind}" title="{text}">{text}</span><span class="track{kind}">'
            f'<i style="left: {left:.1f}%; width: {width:.1f}%"></i></span>'
            f'<span class="number">{value:.2f}</span>'
        )
    return f'<div class="mmkit-rank">{"".join(lines)}</div>'


def still_figure(
    picture: Tensor, masked: Tensor, titles: tuple[str, str], pieces: Sequence[Piece], words: str
):
    """The picture, what is left of it, and the caption with some words below it."""
    figure = new_figure(9, 2.6)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.9])
    show_picture(left, picture, titles[0])
    show_picture(middle, masked, titles[1])
    caption_on(right, pieces, words)
    return figure


def caption_on(ax, pieces: Sequence[Piece], words: str):
    """A caption's pieces on an empty axis, with some words below them."""
    x, y, wide = 0.0, 0, 55  # characters of a line
    for word, kind in pieces:
        if x and x + len(word) > wide:
            x, y = 0, y + 1
        box = dict(boxstyle="round,pad=0.25", facecolor=KINDS[kind], edgecolor="none")
        ax.text(x, y, word, fontsize=9, family="monospace", va="center", bbox=box)
        if kind == "dropped":
            ax.plot([x, x + len(word)], [y, y], color=RED, linewidth=1.4, zorder=5)
        x += len(word) + 1.8
    ax.text(0, y + 0.9, words, fontsize=9, va="top", linespacing=1.5)
    ax.set(xlim=(-1, wide), ylim=(max(5, y + 4), -1))
    ax.axis("off")
