"""The parts of the masking lab that need no widget: its computations, HTML and still figures.

Functions of plain data; their results are HTML for the live view and a Figure for a still. Tokens
have the colours of plots.masked_captions. `mask` is True where a token is MASKED. The lab itself is
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
from ..plots.figures import KINDS, RED, new_figure, show_image

Token = tuple[str, str]  # a token as it is shown, and its kind


# -- what is computed ------------------------------------------------------------------------


def checked_patch(dataset: MultimodalDataset, model, patch_size: int | None) -> int:
    """Choose the side of a patch in pixels: the model's; else 8 up to 96 pixels, else 16.

    Args:
        dataset, model: the images, and their model or None.
        patch_size: the side asked for, or None.
    Returns:
        The side of a patch.
    Raises:
        ValueError: the patch does not divide the images, or is not the model's.
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
            f"patch_size={size} does not divide images of {sides[0]} x {sides[1]} pixels; try "
            f"patch_size={nearest}"
        )
    return size


def pool_rows(row: int, count: int, size: int) -> list[int]:
    """`size` rows spread evenly over `count`; `row` replaces the one nearest to it."""
    rows = [i * count // size for i in range(size)] if count > size else list(range(count))
    rows[min(range(len(rows)), key=lambda i: abs(rows[i] - row))] = row
    return rows


def rank_of(cosines: Tensor, right: Tensor) -> int:
    """The rank of the best correct candidate, 1 = first; ties count against it.

    cosines (R,); right (R,) bool, True = correct.
    """
    best = cosines[right].max()
    behind = (cosines < best) | (cosines.isnan() & ~best.isnan())
    return 1 + int((~behind & ~right).sum())


def caption_tokens(
    tokenizer, ids: list[int], special: list[int], masking: Masking | None, mode: str
) -> list[Token]:
    """The tokens of one caption (its ids without padding) under a `Masking` of one row."""
    tokens = []
    for position, number in enumerate(ids):
        kind = "end" if number in special else "visible"
        if masking is not None and masking.mask[0, position]:
            drawn = -1 if masking.substitute is None else int(masking.substitute[0, position])
            kind = "dropped" if mode == "drop" else "mask" if drawn < 0 else "other"
            number = drawn if kind == "other" else number
        token = "[mask]" if kind == "mask" else tokenizer.convert_ids_to_tokens(number)
        tokens.append((token, kind))
    return tokens


def count_tokens(tokens: Sequence[Token], masked: np.ndarray, image_mode: str) -> dict:
    """Count (visible, all) patches and tokens, and (encoded, all) patches and text tokens.

    masked (h, w) bool. Only dropped patches and tokens are not encoded.
    """
    kinds = [kind for _, kind in tokens]
    left_out = masked.sum() if image_mode == "drop" else 0
    return {
        "patches": (int((~masked).sum()), masked.size),
        "tokens": (kinds.count("visible"), len(kinds) - kinds.count("end")),
        "encoded patches": (int(masked.size - left_out), masked.size),
        "encoded text tokens": (len(kinds) - kinds.count("dropped"), len(kinds)),
    }


def relative_cost(counts: dict, model: MultimodalEncoder | None) -> tuple[float, str]:
    """The cost of encoding a pair, as a fraction of the cost with nothing masked and as text.

    counts: from `count_tokens`. The cost is in operations; without a model, in tokens.
    """
    now, whole = zip(counts["encoded patches"], counts["encoded text tokens"], strict=True)
    if model is None:
        fraction = sum(now) / sum(whole)
        return fraction, f"{100 * fraction:.0f} % ({sum(now)} of {sum(whole)} tokens)"
    flops, most = (sample_flops(model, *tokens) for tokens in (now, whole))
    fraction, text = flops / most, f"{flops / 1e9:.2f} of {most / 1e9:.2f} GFLOP"
    return fraction, f"{100 * fraction:.0f} % ({text})"


# -- what is shown ---------------------------------------------------------------------------


def png(image: Tensor) -> bytes:
    """An image (3, H, W) uint8 as PNG bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image).transpose(1, 2, 0)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def visible_in_words(counts: dict) -> tuple[str, str]:
    """Texts such as "16 of 64 patches" and "3 of 5 tokens"."""
    patches, tokens = (f"{counts[n][0]} of {counts[n][1]} {n}" for n in ("patches", "tokens"))
    return patches, tokens


def caption_html(text: str, tokens: Sequence[Token]) -> str:
    """A caption and its tokens: masked ones struck out or replaced."""
    boxes = "".join(
        f'<span class="token {kind}" style="background: {KINDS[kind]}">{escape(token)}</span>'
        for token, kind in tokens
    )
    other = any(kind == "other" for _, kind in tokens)
    note = "<small>green, of 80/10/10: a random token, or the token itself</small>" if other else ""
    return f"<p>“{escape(text)}”</p><p>{boxes}{note}</p>"


def counts_html(counts: dict, cost: str) -> str:
    """How much is visible, and what encoding it costs."""
    lines = []
    for text, name in zip(visible_in_words(counts), ("patches", "tokens"), strict=True):
        visible, total = counts[name]
        masked = 100 - 100 * visible / max(1, total)
        lines.append(f"<b>{text}</b> visible<br>{masked:.1f} % masked")
    lines.append(f"<b>Cost</b>, nothing masked = 100 %<br>{cost}")
    return "".join(f"<p>{line}</p>" for line in lines)


def ranking_html(texts: Sequence[str], cosines: Tensor, right: Tensor) -> str:
    """Captions as horizontal bars from the highest cosine to the lowest.

    cosines (R,); right (R,) bool: the correct ones are blue AND have a sign, for colour-blind
    readers.
    """
    lines = []
    for row in cosines.argsort(descending=True).tolist():
        value, marked = float(cosines[row]), bool(right[row])
        text, kind = escape(texts[row]), " right" if marked else ""
        left, width = 50 + 50 * min(0.0, value), 50 * abs(value)  # per cent; the scale is -1 to 1
        lines.append(
            f'<span class="sign{kind}">{"✓" if marked else ""}</span>'
            f'<span class="text{kind}" title="{text}">{text}</span><span class="track{kind}">'
            f'<i style="left: {left:.1f}%; width: {width:.1f}%"></i></span>'
            f'<span class="number">{value:.2f}</span>'
        )
    return f'<div class="mmkit-rank">{"".join(lines)}</div>'


def still_figure(
    image: Tensor, masked: Tensor, titles: tuple[str, str], tokens: Sequence[Token], words: str
):
    """The image, the masked image, and the caption with a text below it."""
    figure = new_figure(9, 2.6)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.9])
    show_image(left, image, titles[0])
    show_image(middle, masked, titles[1])
    caption_on(right, tokens, words)
    return figure


def caption_on(ax, tokens: Sequence[Token], words: str):
    """The tokens of a caption on an empty axis, with a text below them."""
    x, y, wide = 0.0, 0, 55  # characters of a line
    for token, kind in tokens:
        if x and x + len(token) > wide:
            x, y = 0, y + 1
        box = dict(boxstyle="round,pad=0.25", facecolor=KINDS[kind], edgecolor="none")
        ax.text(x, y, token, fontsize=9, family="monospace", va="center", bbox=box)
        if kind == "dropped":
            ax.plot([x, x + len(token)], [y, y], color=RED, linewidth=1.4, zorder=5)
        x += len(token) + 1.8
    ax.text(0, y + 0.9, words, fontsize=9, va="top", linespacing=1.5)
    ax.set(xlim=(-1, wide), ylim=(max(5, y + 4), -1))
    ax.axis("off")
