"""Pictures of what a decoder puts back: patches beside the true ones, words among their rivals.

`mask` is True where a token is HIDDEN. Pictures are uint8. Each is f(data) -> Figure, but `strip`,
which is a picture itself; `mm.plots` has them all. Shapes: B pictures of H x W pixels.
Used by notebooks/07_reconstruction.ipynb.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .figures import BLUE, KINDS, RED, new_figure, rectangle, show_picture, take_away, wrap

GAP, GAP_GREY = 2, 128  # of a strip: pixels, and their value (darker than HIDDEN)
TEXT_WIDE, GUESS_WIDE = 104, 26  # of word_guesses, in characters: a line, and one word's guesses
LETTER = 0.9  # the width of a piece's letter
PIECE_MOST = 11  # characters of a guess that are shown
TOP = 5  # guesses of a word that are shown


# -- pictures --------------------------------------------------------------------------------


def put_back_grid(
    columns: dict[str, Tensor],
    titles: Sequence[str] | None = None,
    numbers: dict[str, Sequence[float]] | None = None,
    number: str = "error {:.3f}",
    caption: str = "",
):
    """A row per picture, a column per treatment: original, masked, put back, put back otherwise.

    columns: {title: pictures (B, 3, H, W) uint8}, from left to right. titles: B texts for the left
    edge, the captions, say. numbers: {title: B numbers} to stand under the pictures of a column, in
    the format `number`, which says what they are.
    """
    count, _, height, width = _checked(columns)
    side = 0.83 * height / width + (0.2 if numbers else 0.04)
    figure = new_figure(0.86 * len(columns) + (1.4 if titles else 0.1), side * count + 1.0)
    axes = figure.subplots(count, len(columns), squeeze=False)
    for line, (title, pictures) in zip(axes.T, columns.items(), strict=True):
        for row, (ax, picture) in enumerate(zip(line, pictures, strict=True)):
            show_picture(ax, picture, "" if row else wrap(title, 12, 4))
            if numbers and title in numbers:
                ax.set_xlabel(number.format(float(numbers[title][row])), fontsize=8, labelpad=2)
    for ax, words in zip(axes[:, 0], titles or [""] * count, strict=True):
        ax.set_ylabel(wrap(words, 20, 6), rotation=0, ha="right", va="center", fontsize=8)
    take_away(figure, caption)
    return figure


def over_training(strips: dict[str, Tensor], caption: str = ""):
    """How putting back is learnt: a row of the same pictures for each moment, named at its left.

    strips: {label: pictures (B, 3, H, W) uint8}, from top to bottom: first the originals and what
    is left of them, then what is put back after each epoch.
    """
    count, _, height, width = _checked(strips)
    figure = new_figure(0.64 * count + 1.2, 0.66 * height / width * len(strips) + 0.5)
    ax = figure.subplots()
    show_picture(ax, _tile(list(strips.values())))
    ax.spines[:].set_visible(False)
    centres = [row * (height + GAP) + (height - 1) / 2 for row in range(len(strips))]
    ax.set_yticks(centres, [wrap(label, 16) for label in strips], fontsize=9)
    ax.tick_params(length=0)
    take_away(figure, caption)
    return figure


def strip(original: Tensor, masked: Tensor, put_back: Tensor) -> Tensor:
    """Three rows of pictures as one picture, for TensorBoard's add_image or a PNG file.

    Each (B, 3, H, W) uint8. Returns (3, 3 * H + 2 * GAP, B * W + (B - 1) * GAP) uint8, with grey
    gaps between the pictures and none around them.
    """
    rows = {"original": original, "masked": masked, "put back": put_back}
    _checked(rows)
    return _tile(list(rows.values()))


def read_strips(folder: str | Path, count: int = 5) -> dict[str, Tensor]:
    """The strips that a run kept in `put_back/`, cut into pictures again, for `over_training`.

    {"original", "masked", "step 44", …: (B, 3, H, W) uint8}: `count` steps spread evenly over the
    run, the last one among them. Raises FileNotFoundError where there are none.
    """
    from PIL import Image

    paths = sorted((Path(folder) / "put_back").glob("*.png"))
    if not paths:
        raise FileNotFoundError(
            f"no strips in {folder}/put_back; a run keeps them at each validation where "
            "pixels_weight is above 0 and there is a validation set"
        )
    places = np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)
    strips: dict[str, Tensor] = {}
    for path in [paths[place] for place in places]:
        pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)
        side = (pixels.shape[1] - 2 * GAP) // 3
        rows = []
        for top in range(0, pixels.shape[1], side + GAP):
            parts = pixels[:, top : top + side].split(side + GAP, dim=2)
            rows.append(torch.stack([part[..., :side] for part in parts]))
        strips |= {"original": rows[0], "masked": rows[1], f"step {int(path.stem)}": rows[2]}
    return strips


def _checked(named: dict[str, Tensor]) -> torch.Size:
    """The one shape of all pictures; ValueError where they differ or are not uint8."""
    if not named:
        raise ValueError("no pictures were given; name at least one set of them")
    shape = next(iter(named.values())).shape
    for name, pictures in named.items():
        if pictures.shape != shape or pictures.ndim != 4:
            raise ValueError(
                f"the pictures of {name!r} are {tuple(pictures.shape)}, the first ones "
                f"{tuple(shape)}; all must be of one shape (B, 3, H, W)"
            )
        if pictures.dtype != torch.uint8:
            raise ValueError(
                f"the pictures of {name!r} are {pictures.dtype}, not uint8; scale them to 0-255 "
                "and call .clamp(0, 255).to(torch.uint8)"
            )
    return shape


def _tile(rows: Sequence[Tensor]) -> Tensor:
    """R rows of pictures (B, 3, H, W) as one picture with gaps."""
    count, _, height, width = rows[0].shape
    down, right = height + GAP, width + GAP
    whole = torch.full((3, len(rows) * down - GAP, count * right - GAP), GAP_GREY).to(torch.uint8)
    for y, pictures in enumerate(rows):
        for x, picture in enumerate(pictures):
            whole[:, y * down : y * down + height, x * right : x * right + width] = picture
    return whole


# -- words -----------------------------------------------------------------------------------


def word_guesses(captions: Sequence[dict], pictures: Tensor | None = None, caption: str = ""):
    """Captions with hidden pieces, and under each the best guesses for every hidden piece.

    captions: dicts of "pieces", a list of (piece, kind) with the kinds of `figures.KINDS`, and
    "guesses", a list of {"position": place in pieces, "truth": the piece that was hidden, "top":
    [(piece, probability 0-1), ...] from the best down}. The right guess is blue, bold and has a
    sign. pictures (B, 3, H, W) uint8: one for the left of each caption.
    """
    tall = [_lines_of(entry) for entry in captions]
    size = dict(height_ratios=tall, squeeze=False)
    if pictures is not None:
        size |= dict(width_ratios=[1, 5.6])
    figure = new_figure(9 if pictures is None else 10.4, 0.168 * sum(tall) + 0.4)
    axes = figure.subplots(len(captions), 1 if pictures is None else 2, **size)
    for ax, entry, lines in zip(axes[:, -1], captions, tall, strict=True):
        ax.set(xlim=(-1, TEXT_WIDE), ylim=(lines, 0))
        ax.axis("off")
        _draw_entry(ax, entry)
    if pictures is not None:
        for ax, picture in zip(axes[:, 0], pictures, strict=True):
            show_picture(ax, picture)
            ax.set_anchor("N")
    take_away(figure, caption)
    return figure


def _lines_of(entry: dict) -> float:
    """The height of a caption and its guesses, in lines."""
    return max(7.5, _places(entry["pieces"])[-1][1] + 2.4 + 7.6 * _rows(len(entry["guesses"])))


def _rows(guesses: int) -> int:
    return -(-guesses // (TEXT_WIDE // GUESS_WIDE))


def _places(pieces: Sequence[tuple[str, str]]) -> list[tuple[float, float]]:
    """Where each piece begins, (character, line); a line has 2.4 times the height of a guess."""
    places, x, y = [], 0.0, 1.0
    for word, _ in pieces:
        if x and x + LETTER * len(word) > 0.95 * TEXT_WIDE:
            x, y = 0.0, y + 2.4
        places.append((x, y))
        x += LETTER * len(word) + 2.4
    return places


def _draw_entry(ax, entry: dict) -> None:
    """One caption's pieces, the places of the guessed ones under them, then the guesses."""
    places = _places(entry["pieces"])
    for (x, y), (word, kind) in zip(places, entry["pieces"], strict=True):
        box = dict(boxstyle="round,pad=0.25", facecolor=KINDS[kind], edgecolor="none")
        ax.text(x, y, word, fontsize=9, family="monospace", va="center", bbox=box)
        if kind == "dropped":
            ax.plot([x, x + LETTER * len(word)], [y, y], color=RED, linewidth=1.4, zorder=5)
    per_line = TEXT_WIDE // GUESS_WIDE
    for number, guess in enumerate(entry["guesses"]):
        place = guess["position"]
        if not 0 <= place < len(places):
            raise ValueError(
                f"a guess is for position {place}, but the caption has pieces 0-{len(places) - 1}; "
                "count the [CLS] piece as well if it is among the pieces"
            )
        x, y = places[place]
        middle = x + LETTER * len(entry["pieces"][place][0]) / 2
        ax.text(middle, y + 1.15, str(place), fontsize=8, ha="center", va="center", color="0.35")
        left, top = number % per_line * GUESS_WIDE, 7.6 * (number // per_line)
        _draw_guess(ax, guess, left, places[-1][1] + 2.6 + top)


def _draw_guess(ax, guess: dict, left: float, top: float) -> None:
    """The best guesses for one hidden piece as small bars, the right one marked."""
    shown = guess["top"][:TOP]
    found = any(piece == guess["truth"] for piece, _ in shown)
    head = f"{guess['position']}: “{_short(guess['truth'])}”"
    head += "" if found else ", not among them"
    ax.text(left, top, head, fontsize=8, va="center", color="0.25" if found else RED)
    for line, (piece, probability) in enumerate(shown, 1):
        right, y = piece == guess["truth"], top + 1.05 * line + 0.1
        style = dict(fontsize=8, va="center", color=BLUE if right else "0.2")
        style |= dict(weight="bold" if right else "normal")
        if right:
            ax.text(left - 0.1, y, "✓", **style)
        ax.text(left + 1.7, y, _short(piece), family="monospace", **style)
        begin, long = left + 1.9 + PIECE_MOST, 6.5  # the scale is 0 to 1
        ax.add_patch(rectangle(begin, y - 0.32, long, 0.64, facecolor="0.94"))
        colour = BLUE if right else "0.6"
        ax.add_patch(rectangle(begin, y - 0.32, long * probability, 0.64, facecolor=colour))
        percent = f"{100 * probability:.0f} %" if probability >= 0.005 else "<1 %"
        ax.text(begin + long + 0.5, y, percent, **style)


def _short(piece: str) -> str:
    return piece if len(piece) <= PIECE_MOST else piece[: PIECE_MOST - 1] + "…"
