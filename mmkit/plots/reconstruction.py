"""Figures of reconstruction: predicted beside true images, and guesses of masked tokens.

`mask` is True where a token is MASKED. Images are uint8. Each is a function of data that returns a
Figure, except `strip`, which returns an image; `mm.plots` has them all. The argument `caption` is a
text below the figure. Shapes: B images of H x W pixels.
Used by notebooks/07_reconstruction.ipynb.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..older_names import older_arguments
from .figures import BLUE, KINDS, RED, new_figure, rectangle, show_image, take_away, wrap

GAP, GAP_GREY = 2, 128  # in a strip: its width in pixels, and their value (darker than MASKED)
TEXT_WIDE, GUESS_WIDE = 104, 26  # in characters: a line of token_guesses, the guesses of one token
LETTER = 0.9  # the width of a letter of a token, in characters
TOKEN_MOST = 11  # characters of a guess that are shown
TOP = 5  # guesses of a token that are shown


# -- images --------------------------------------------------------------------------------


def reconstruction_grid(
    columns: dict[str, Tensor],
    titles: Sequence[str] | None = None,
    numbers: dict[str, Sequence[float]] | None = None,
    number: str = "error {:.3f}",
    caption: str = "",
):
    """Show images in a grid: a row per image, a column per version (original, masked, …).

    Args:
        columns: title -> images (B, 3, H, W) uint8, from left to right.
        titles: B texts for the left edge, such as the captions, or None.
        numbers, number: title of a column -> B numbers to write below its images, or None, and
            their format, which names them.
        caption: text below the figure.
    Returns:
        A Figure.
    Raises:
        ValueError: there are no images, or they differ in shape, or they are not uint8.
    """
    count, _, height, width = _checked(columns)
    side = 0.91 * height / width + (0.2 if numbers else 0.04)
    figure = new_figure(0.94 * len(columns) + (1.4 if titles else 0.1), side * count + 1.0)
    axes = figure.subplots(count, len(columns), squeeze=False)
    for line, (title, images) in zip(axes.T, columns.items(), strict=True):
        for row, (ax, image) in enumerate(zip(line, images, strict=True)):
            show_image(ax, image, "" if row else wrap(title, 13, 4))
            if numbers and title in numbers:
                ax.set_xlabel(number.format(float(numbers[title][row])), fontsize=8, labelpad=2)
    for ax, text in zip(axes[:, 0], titles or [""] * count, strict=True):
        ax.set_ylabel(wrap(text, 20, 6), rotation=0, ha="right", va="center", fontsize=8)
    take_away(figure, caption)
    return figure


def over_training(strips: dict[str, Tensor], caption: str = ""):
    """Show how reconstruction is learned: a row of the same images for each moment of training.

    Args:
        strips: label -> images (B, 3, H, W) uint8, from top to bottom: the originals, the masked
            images, then the reconstructions after each epoch. `read_strips` returns them.
        caption: text below the figure.
    Returns:
        A Figure.
    Raises:
        ValueError: there are no images, or they differ in shape, or they are not uint8.
    """
    count, _, height, width = _checked(strips)
    figure = new_figure(0.64 * count + 1.2, 0.66 * height / width * len(strips) + 0.5)
    ax = figure.subplots()
    show_image(ax, _tile(list(strips.values())))
    ax.spines[:].set_visible(False)
    centres = [row * (height + GAP) + (height - 1) / 2 for row in range(len(strips))]
    ax.set_yticks(centres, [wrap(label, 16) for label in strips], fontsize=9)
    ax.tick_params(length=0)
    take_away(figure, caption)
    return figure


@older_arguments(put_back="reconstructed")
def strip(original: Tensor, masked: Tensor, reconstructed: Tensor) -> Tensor:
    """Join three rows of images into one image, for TensorBoard's add_image or a PNG file.

    Args:
        original, masked, reconstructed: (B, 3, H, W) uint8 each.
    Returns:
        (3, 3 * H + 2 * GAP, B * W + (B - 1) * GAP) uint8, with grey gaps between the images and
        none around them.
    Raises:
        ValueError: the images differ in shape, or they are not uint8.
    """
    rows = {"original": original, "masked": masked, "reconstructed": reconstructed}
    _checked(rows)
    return _tile(list(rows.values()))


def read_strips(folder: str | Path, count: int = 5) -> dict[str, Tensor]:
    """Read the strips that a run kept in `reconstructions/`, cut into images for `over_training`.

    Args:
        folder: of the run.
        count: number of steps, spread evenly over the run; the last one is among them.
    Returns:
        {"original", "masked", "step 44", …: (B, 3, H, W) uint8}.
    Raises:
        FileNotFoundError: the run kept no strips.
    """
    from PIL import Image

    kept = [Path(folder) / name for name in ("reconstructions", "put_back")]  # the older name
    paths = next(filter(None, (sorted(path.glob("*.png")) for path in kept)), [])
    if not paths:
        raise FileNotFoundError(
            f"no strips in {folder}/reconstructions; a run keeps them at each validation where "
            "mim_weight is above 0 and there is a validation set"
        )
    chosen = np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)
    strips: dict[str, Tensor] = {}
    for path in [paths[number] for number in chosen]:
        pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)
        side = (pixels.shape[1] - 2 * GAP) // 3
        rows = []
        for top in range(0, pixels.shape[1], side + GAP):
            parts = pixels[:, top : top + side].split(side + GAP, dim=2)
            rows.append(torch.stack([part[..., :side] for part in parts]))
        strips |= {"original": rows[0], "masked": rows[1], f"step {int(path.stem)}": rows[2]}
    return strips


def _checked(named: dict[str, Tensor]) -> torch.Size:
    """The common shape of all images; ValueError where they differ or are not uint8."""
    if not named:
        raise ValueError("no images were given; name at least one set of them")
    shape = next(iter(named.values())).shape
    for name, images in named.items():
        if images.shape != shape or images.ndim != 4:
            raise ValueError(
                f"the images of {name!r} are {tuple(images.shape)}, the first ones "
                f"{tuple(shape)}; all must have the same shape (B, 3, H, W)"
            )
        if images.dtype != torch.uint8:
            raise ValueError(
                f"the images of {name!r} are {images.dtype}, not uint8; scale them to 0-255 "
                "and call .clamp(0, 255).to(torch.uint8)"
            )
    return shape


def _tile(rows: Sequence[Tensor]) -> Tensor:
    """R rows of images (B, 3, H, W) as one image with gaps."""
    count, _, height, width = rows[0].shape
    down, right = height + GAP, width + GAP
    whole = torch.full((3, len(rows) * down - GAP, count * right - GAP), GAP_GREY).to(torch.uint8)
    for y, images in enumerate(rows):
        for x, image in enumerate(images):
            whole[:, y * down : y * down + height, x * right : x * right + width] = image
    return whole


# -- tokens ----------------------------------------------------------------------------------


def token_guesses(captions: Sequence[dict], images: Tensor | None = None, caption: str = ""):
    """Show captions with masked tokens and, below each, the best guesses for every masked token.

    Args:
        captions: dicts, as `evaluation.reconstruction.guesses` returns them, of "tokens", a list
            of (token, kind) with the kinds of `figures.KINDS`, and "guesses", a list of
            {"position": index in the tokens, "truth": the masked token, "top": [(token,
            probability in [0, 1]), …], best first}.
        images: (B, 3, H, W) uint8, one for the left of each caption, or None.
        caption: text below the figure.
    Returns:
        A Figure; the correct guess is blue, bold and has a sign.
    Raises:
        ValueError: the position of a guess is not among the tokens.
    """
    tall = [_lines_of(entry) for entry in captions]
    size = dict(height_ratios=tall, squeeze=False)
    if images is not None:
        size |= dict(width_ratios=[1, 5.6])
    figure = new_figure(9 if images is None else 10.4, 0.168 * sum(tall) + 0.4)
    axes = figure.subplots(len(captions), 1 if images is None else 2, **size)
    for ax, entry, lines in zip(axes[:, -1], captions, tall, strict=True):
        ax.set(xlim=(-1, TEXT_WIDE), ylim=(lines, 0))
        ax.axis("off")
        _draw_entry(ax, entry)
    if images is not None:
        for ax, image in zip(axes[:, 0], images, strict=True):
            show_image(ax, image)
            ax.set_anchor("N")
    take_away(figure, caption)
    return figure


def _lines_of(entry: dict) -> float:
    """The height of a caption and its guesses, in lines."""
    return max(7.5, _layout(entry["tokens"])[-1][1] + 2.4 + 7.6 * _rows(len(entry["guesses"])))


def _rows(guesses: int) -> int:
    return -(-guesses // (TEXT_WIDE // GUESS_WIDE))


def _layout(tokens: Sequence[tuple[str, str]]) -> list[tuple[float, float]]:
    """Where each token begins, (character, line); a line has 2.4 times the height of a guess."""
    starts, x, y = [], 0.0, 1.0
    for token, _ in tokens:
        if x and x + LETTER * len(token) > 0.95 * TEXT_WIDE:
            x, y = 0.0, y + 2.4
        starts.append((x, y))
        x += LETTER * len(token) + 2.4
    return starts


def _draw_entry(ax, entry: dict) -> None:
    """The tokens of a caption, the positions of the masked ones below them, then the guesses."""
    starts = _layout(entry["tokens"])
    for (x, y), (token, kind) in zip(starts, entry["tokens"], strict=True):
        box = dict(boxstyle="round,pad=0.25", facecolor=KINDS[kind], edgecolor="none")
        ax.text(x, y, token, fontsize=9, family="monospace", va="center", bbox=box)
        if kind == "dropped":
            ax.plot([x, x + LETTER * len(token)], [y, y], color=RED, linewidth=1.4, zorder=5)
    per_line = TEXT_WIDE // GUESS_WIDE
    for number, guess in enumerate(entry["guesses"]):
        position = guess["position"]
        if not 0 <= position < len(starts):
            raise ValueError(
                f"a guess is for position {position}, but the caption has tokens "
                f"0-{len(starts) - 1}; count the [CLS] token as well if it is among the tokens"
            )
        x, y = starts[position]
        middle = x + LETTER * len(entry["tokens"][position][0]) / 2
        ax.text(middle, y + 1.15, str(position), fontsize=8, ha="center", va="center", color="0.35")
        left, top = number % per_line * GUESS_WIDE, 7.6 * (number // per_line)
        _draw_guess(ax, guess, left, starts[-1][1] + 2.6 + top)


def _draw_guess(ax, guess: dict, left: float, top: float) -> None:
    """The best guesses for one masked token as small bars, the correct one marked."""
    shown = guess["top"][:TOP]
    found = any(token == guess["truth"] for token, _ in shown)
    head = f"{guess['position']}: “{_short(guess['truth'])}”"
    head += "" if found else ", not among them"
    ax.text(left, top, head, fontsize=8, va="center", color="0.25" if found else RED)
    for line, (token, probability) in enumerate(shown, 1):
        correct, y = token == guess["truth"], top + 1.05 * line + 0.1
        style = dict(fontsize=8, va="center", color=BLUE if correct else "0.2")
        style |= dict(weight="bold" if correct else "normal")
        if correct:
            ax.text(left - 0.1, y, "✓", **style)
        ax.text(left + 1.7, y, _short(token), family="monospace", **style)
        begin, long = left + 1.9 + TOKEN_MOST, 6.5  # the scale is 0 to 1
        ax.add_patch(rectangle(begin, y - 0.32, long, 0.64, facecolor="0.94"))
        colour = BLUE if correct else "0.6"
        ax.add_patch(rectangle(begin, y - 0.32, long * probability, 0.64, facecolor=colour))
        percent = f"{100 * probability:.0f} %" if probability >= 0.005 else "<1 %"
        ax.text(begin + long + 0.5, y, percent, **style)


def _short(token: str) -> str:
    return token if len(token) <= TOKEN_MOST else token[: TOKEN_MOST - 1] + "…"
