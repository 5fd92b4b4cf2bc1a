"""Figures of masking: masked images and captions, what masking costs, what a model attends to.

`mask` is True where a token is MASKED. Each is a function of data that returns a Figure; `mm.plots`
has them all. The argument `caption` is a text below the figure, `patch_size` the side of a patch in
pixels. Used by notebooks/02_masking.ipynb.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch
from ..masking.core import Masking, patch_grid
from ..masking.image import IMAGE_MASKERS
from ..masking.plan import draw_maskings
from ..models.patches import paint_mask, patchify
from ..older_names import older_arguments
from .figures import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    SKY,
    new_figure,
    plain_axes,
    rectangle,
    show_image,
    take_away,
)


def _show_masked(axes, pixels: Tensor, masking: Masking | None, patch_size: int):
    """The visible part of images (B, 3, H, W) under a masking (None: all of it), one per axis."""
    painted = pixels if masking is None else paint_mask(pixels, masking.mask, patch_size)
    for ax, image in zip(axes, painted, strict=True):
        show_image(ax, image)


def masked_images(
    pixels: Tensor, maskings: dict[str, Masking | None], patch_size: int, caption: str = ""
):
    """Show images under several maskings: a row per masking, a column per image.

    Args:
        pixels, patch_size: (B, 3, H, W) uint8.
        maskings: name -> Masking, or None where nothing is masked.
        caption: text below the figure.
    Returns:
        A Figure.
    """
    count = len(pixels)
    figure = new_figure(1.35 * count + 0.6, 1.4 * len(maskings) + 0.4)
    axes = np.atleast_2d(figure.subplots(len(maskings), count, squeeze=False))
    for line, (name, masking) in zip(axes, maskings.items(), strict=True):
        _show_masked(line, pixels, masking, patch_size)
        line[0].set_ylabel(name, fontsize=9)
    take_away(figure, caption)
    return figure


def masking_gallery(
    batch: Batch, model, maskers: Sequence[str] = (), ratios: Sequence[float] = (0.5, 0.75),
    layers=None, seed: int = 0, epoch: int = 0, caption: str = "",
):  # fmt: skip
    """Show image maskers (rows) at several mask ratios (groups of columns) on the same images.

    Args:
        batch, model: the images, and the model that gives the grid and the attention.
        maskers, layers: names in IMAGE_MASKERS; () takes all but "painted", and "layers" only where
            the layers of the data set are given.
        ratios, seed, epoch: fractions of patches to mask, and what the masks are drawn from.
        caption: text below the figure.
    Returns:
        A Figure.
    """
    known = [n for n in IMAGE_MASKERS if n != "painted" and (n != "layers" or layers)]
    names, count = list(maskers) or known, len(batch)
    figure = new_figure(0.95 * count * len(ratios) + 0.9, 0.98 * len(names) + 0.6)
    parts = np.atleast_1d(figure.subfigures(1, len(ratios), wspace=0.03))
    for part, ratio in zip(parts, ratios, strict=True):
        part.suptitle(f"{100 * ratio:.0f} % masked", fontsize=10)
        axes = part.subplots(len(names), count, squeeze=False, gridspec_kw=dict(wspace=0, hspace=0))
        for line, name in zip(axes, names, strict=True):
            masking, _ = draw_maskings(
                batch, model.token_info, seed=seed, epoch=epoch, image=(name, ratio), layers=layers
            )
            _show_masked(line, batch.pixel_values, masking, model.patch_size)
            if part is parts[0]:
                label = name.replace("_", "\n") + ("\n(one region)" if name == "layers" else "")
                line[0].set_ylabel(label, fontsize=8)
    take_away(figure, caption)
    return figure


def what_the_model_sees(
    batch: Batch, model, image_masking: Masking | None = None, text_masking: Masking | None = None,
    row: int = 0, caption: str = "",
):  # fmt: skip
    """Show one pair as the encoder gets it under "drop": the image, its visible part, the sequence.

    Right: the kept patches in the order in which they are encoded, each with its position, and
    below them the kept tokens with theirs.

    Args:
        batch, model, row: the pairs, their model, and which pair to show.
        image_masking, text_masking: the maskings of the batch; None: nothing is masked.
        caption: text below the figure.
    Returns:
        A Figure.
    """
    pixels, patch = batch.pixel_values[row : row + 1], model.patch_size
    wide, num_patches = patch_grid(pixels, patch)[1], model.num_patches
    length = int(batch.valid[row].sum())
    ids = list(range(num_patches)) if image_masking is None else _kept(image_masking, row)
    kept = list(range(length)) if text_masking is None else _kept(text_masking, row)
    figure = new_figure(10.5, max(3.3, 0.6 * (-(-len(ids) // 8) + -(-len(kept) // 4))))
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 2.2])
    show_image(left, pixels[0], "the image")
    masked = torch.ones(1, num_patches, dtype=torch.bool)
    masked[0, ids] = False
    show_image(middle, paint_mask(pixels, masked, patch)[0], "its visible patches")
    squares = patchify(pixels, patch)[0, ids].unflatten(1, (3, patch, patch)).permute(0, 2, 3, 1)
    positions = [f"{number // wide},{number % wide}" for number in ids]
    tokens = model.tokenizer.convert_ids_to_tokens(batch.input_ids[row, kept])
    _draw_sequence(right, squares, positions, tokens, kept)
    title = f"class token + {len(ids)} of {num_patches} patches (row,column),\n"
    right.set_title(f"{title}{len(kept)} of {length} text tokens (position)", fontsize=9)
    take_away(figure, caption)
    return figure


def _draw_sequence(
    ax, squares: Tensor, positions: list[str], tokens: list[str], numbers: list[int]
):
    """Patches (K, P, P, 3) in rows of 8, each above its position, then tokens above theirs."""
    columns = 8
    small = dict(fontsize=8, va="center", color="0.35")
    for i, (square, position) in enumerate(zip(squares, positions, strict=True)):
        x, y = i % columns, i // columns
        ax.imshow(square.numpy(), extent=(x + 0.14, x + 0.86, y + 0.77, y + 0.05))
        frame = dict(facecolor="none", edgecolor="0.75", linewidth=0.6)
        ax.add_patch(rectangle(x + 0.14, y + 0.05, 0.72, 0.72, **frame))
        ax.text(x + 0.5, y + 0.88, position, ha="center", **small)
    right, down = 0.14, -(-len(squares) // columns) + 0.6
    for token, number in zip(tokens, numbers, strict=True):
        width = 0.15 * len(token) + 0.3
        if right + width > columns:
            right, down = 0.14, down + 0.8
        colour = "0.9" if token.startswith("[") else SKY
        box = dict(boxstyle="round,pad=0.2", facecolor=colour, edgecolor="none", alpha=0.8)
        ax.text(right, down, token, fontsize=9, family="monospace", va="center", bbox=box)
        ax.text(right, down + 0.45, str(number), **small)
        right += width + 0.12
    ax.set(xlim=(0, columns), ylim=(down + 0.7, 0), aspect="equal")
    ax.axis("off")


def _kept(masking: Masking, row: int) -> list[int]:
    """Positions that are encoded, without padding."""
    ids = masking.ids_keep[row]
    return (ids if masking.keep_valid is None else ids[masking.keep_valid[row]]).tolist()


def ratio_vs_cost(costs: Sequence[dict], caption: str = ""):
    """Draw tokens, operations and measured time of a step over the mask ratio.

    Args:
        costs, caption: what `mm.cost.measure_ratios` returns, and a text below the figure.
    Returns:
        A Figure.
    """
    percent = [100 * c["ratio"] for c in costs]
    figure = new_figure(9.5, 3.0)
    axes = figure.subplots(1, 3)
    shown = (("tokens", "tokens per pair"), ("gflop", "GFLOP per pair (predicted)"),
             ("milliseconds", "step (ms, median)"))  # fmt: skip
    for ax, (name, label), colour in zip(axes, shown, (BLUE, GREEN, ORANGE), strict=True):
        values = [c[name] for c in costs]
        ax.plot(percent, values, "-o", color=colour, markersize=4, linewidth=1.8)
        for x, value, cost in zip(percent, values, costs, strict=True):
            times = values[0] / value
            ax.annotate(f"÷{times:.1f}", (x, value), (0, 7), textcoords="offset points",
                        fontsize=8, ha="center", color="0.3")  # fmt: skip
            if name == "milliseconds":
                ax.plot([x, x], cost["quartiles"], color=colour, alpha=0.5, linewidth=5)
        ax.set(xlabel="masked patches (%)", ylabel=label, ylim=(0, 1.18 * max(values)))
        plain_axes(ax)
    take_away(figure, caption)
    return figure


def _heat(values: Tensor, patch_size: int, grid: tuple[int, int]) -> np.ndarray:
    """(N,) values enlarged to pixels (H, W)."""
    plane = values.reshape(grid).float().numpy()
    return plane.repeat(patch_size, 0).repeat(patch_size, 1)


def _show_heat(ax, image: Tensor, values: Tensor, patch_size: int, top: tuple[float, float]):
    """A grey image under a map of values, one per patch."""
    grid = patch_grid(image, patch_size)
    grey = image.float().mean(0, keepdim=True).expand(3, -1, -1)
    show_image(ax, (128 + grey / 2).to(torch.uint8))
    heat = _heat(values, patch_size, grid)
    return ax.imshow(heat, cmap="cividis", alpha=0.72, vmin=top[0], vmax=top[1])


def attention_maps(
    pixels: Tensor, attention: dict[str, Tensor], patch_size: int, caption: str = ""
):
    """Show what a class token attends to, as maps below the images.

    Args:
        pixels, patch_size: (B, 3, H, W) uint8.
        attention: name -> (B, N), from `model.class_attention(pixels)`: a row of maps each, on one
            scale from 0 to the largest value, in multiples of uniform attention (1/N).
        caption: text below the figure.
    Returns:
        A Figure.
    """
    count = len(pixels)
    figure = new_figure(1.35 * count + 1.5, 1.4 * (1 + len(attention)) + 0.3)
    axes = figure.subplots(1 + len(attention), count, squeeze=False)
    for ax, image in zip(axes[0], pixels, strict=True):
        show_image(ax, image)
    for line, (name, values) in zip(axes[1:], attention.items(), strict=True):
        values = values * values.shape[1]
        top = float(values.amax())
        for ax, image, row in zip(line, pixels, values, strict=True):
            drawn = _show_heat(ax, image, row, patch_size, (0, top))
        line[0].set_ylabel(name, fontsize=9)
        figure.colorbar(drawn, ax=list(line), label="attention\n(1 = uniform)", shrink=0.8)
    take_away(figure, caption)
    return figure


def patch_token_map(
    image: Tensor, tokens: Sequence[str], cosines: Tensor, patch_size: int, caption: str = ""
):
    """Show for each token how similar the patches of an image are to it, on one scale.

    Args:
        image, patch_size: (3, H, W) uint8.
        tokens, cosines: T tokens and (T, N), from `mm.retrieval.patch_token_similarity`.
        caption: text below the figure.
    Returns:
        A Figure.
    """
    columns = min(6, len(tokens) + 1)
    lines = -(-(len(tokens) + 1) // columns)
    figure = new_figure(1.5 * columns + 0.9, 1.75 * lines + 0.3)
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax in axes.ravel()[len(tokens) + 1 :]:
        ax.axis("off")
    show_image(axes.ravel()[0], image, "the image")
    top = (float(cosines.min()), float(cosines.max()))
    for ax, token, values in zip(axes.ravel()[1:], tokens, cosines, strict=False):
        drawn = _show_heat(ax, image, values, patch_size, top)
        ax.set_title(token, fontsize=9, family="monospace")
    figure.colorbar(drawn, ax=axes, label="cosine of patch and token", shrink=0.8)
    take_away(figure, caption)
    return figure


@older_arguments(pieces="tokens")
def masked_captions(
    tokens: Sequence[Sequence[str]], masks: Sequence[Sequence[bool]], mode: str = "replace",
    caption: str = "", names: Sequence[str] = (), instead: Sequence[Sequence[str]] | None = None,
):  # fmt: skip
    """Show captions as rows of tokens, the masked ones struck out or replaced.

    Args:
        tokens, masks: for each caption its tokens, and True where one is masked.
        mode, instead: "drop" strikes masked tokens out, "replace" shows those of `instead`, or
            "[mask]" (green: a token that 80/10/10 drew, or the token itself).
        caption, names: a text below the figure; one to the left of each row.
    Returns:
        A Figure.
    """
    figure = new_figure(8, 0.36 * len(tokens) + 0.5)
    ax = figure.subplots()
    ax.axis("off")
    margin = max((1.05 * len(name) + 2 for name in names), default=0.0)
    longest = 100.0
    for y, (row, masked) in enumerate(zip(tokens, masks, strict=True)):
        x = margin
        if names:
            ax.text(0, y + 0.5, names[y], fontsize=9, va="center", color="0.3")
        for position, (token, gone) in enumerate(zip(row, masked, strict=True)):
            shown = token
            if gone and mode != "drop":
                shown = instead[y][position] if instead else "[mask]"
            plain = "0.93" if token.startswith("[") else SKY
            drawn = GREEN if shown != "[mask]" else ORANGE
            colour = plain if not gone else ORANGE if mode == "drop" else drawn
            box = dict(boxstyle="round,pad=0.25", facecolor=colour, edgecolor="none", alpha=0.75)
            style = dict(fontsize=9, family="monospace", va="center", bbox=box)
            ax.text(x + 0.5, y + 0.5, shown, **style, alpha=0.35 if gone and mode == "drop" else 1)
            wide = 1.05 * len(shown)
            if gone and mode == "drop":
                ax.plot([x + 0.2, x + wide + 0.6], [y + 0.5, y + 0.5], color=RED, linewidth=1.4)
            x += wide + 2.0
        longest = max(longest, x)
    ax.set_xlim(0, longest)
    ax.set_ylim(len(tokens), 0)
    take_away(figure, caption)
    return figure


def masked_caption(
    tokenizer, input_ids: Tensor, maskings: dict[str, Masking | None], mode: str = "drop",
    caption: str = "",
):  # fmt: skip
    """Show one caption under several maskings, a row for each.

    Args:
        tokenizer, input_ids: of the caption, (L,) with [CLS] and [SEP]; padding is allowed.
        maskings: name -> a Masking of ONE row, or None where nothing is masked.
        mode, caption: as in `masked_captions`; "replace" shows the tokens that 80/10/10 drew.
    Returns:
        A Figure.
    """
    length = int((input_ids != tokenizer.pad_token_id).sum())
    tokens = tokenizer.convert_ids_to_tokens(input_ids[:length])
    masks, instead = [], []
    for masking in maskings.values():
        masked = torch.zeros(length, dtype=torch.bool) if masking is None else masking.mask[0]
        masks.append(masked[:length].tolist())
        drawn = None if masking is None else masking.substitute
        shown = ["[mask]"] * length
        if drawn is not None:
            new = tokenizer.convert_ids_to_tokens(drawn[0, :length].clamp(min=0))
            shown = [
                t if i >= 0 else "[mask]" for t, i in zip(new, drawn[0].tolist(), strict=False)
            ]
        instead.append(shown)
    rows = [tokens] * len(maskings)
    return masked_captions(rows, masks, mode, caption, list(maskings), instead)


@older_arguments(pieces="tokens")
def token_table(tokens: Sequence[Sequence[str]], valid: Tensor, caption: str = ""):
    """Show a batch of captions as a table: a row per caption, a column per position.

    Args:
        tokens, valid: the tokens of each row, with padding; (B, L) bool, False: padding.
        caption: text below the figure.
    Returns:
        A Figure. Blue: text; grey: [CLS] and [SEP]; white: padding; orange: unknown.
    """
    count, length = valid.shape
    figure = new_figure(0.75 * length + 1, 0.34 * count + 0.9)
    ax = figure.subplots()
    for y, (line, flags) in enumerate(zip(tokens, valid.tolist(), strict=True)):
        for x, (token, is_valid) in enumerate(zip(line, flags, strict=True)):
            special = ORANGE if token == "[UNK]" else "0.88"
            colour = (special if token.startswith("[") else SKY) if is_valid else "white"
            box = dict(facecolor=colour, edgecolor="0.75", linewidth=0.8, alpha=0.8)
            ax.add_patch(rectangle(x + 0.03, y + 0.08, 0.94, 0.84, **box))
            style = dict(ha="center", va="center", fontsize=8, color="0.1" if is_valid else "0.6")
            ax.text(x + 0.5, y + 0.5, token, **style)
    ax.set(
        xlim=(0, length),
        ylim=(count, 0),
        xlabel="position in the caption",
        ylabel="row of the batch",
    )
    ax.set_xticks(np.arange(length) + 0.5, range(length), fontsize=8)
    ax.set_yticks(np.arange(count) + 0.5, range(count), fontsize=8)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    take_away(figure, caption)
    return figure


def mask_statistics(noise: Tensor, mask: Tensor, caption: str = ""):
    """Show whether the noise is uniform (left) and every patch is masked equally often (right).

    Left: fraction of the draws in each of 20 bins, and the band that contains 19 of 20 bins of
    uniform noise. Right: how often each patch of the (square) image is masked.

    Args:
        noise, mask: (B, N) in [0, 1), and (B, N) bool, of many samples.
        caption: text below the figure.
    Returns:
        A Figure.
    """
    figure = new_figure(8.2, 3.2)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    bins, count = 20, noise.numel()
    fraction = 100 * np.histogram(noise.numpy(), bins, (0, 1))[0] / count
    band = 2 * 100 * math.sqrt((1 / bins) * (1 - 1 / bins) / count)
    left.bar(np.arange(bins) / bins, fraction, 0.9 / bins, align="edge", color=BLUE)
    left.axhspan(
        100 / bins - band, 100 / bins + band, color=ORANGE, alpha=0.6, label="expected, ± 2 s.d."
    )
    left.set(xlabel="noise", ylabel=f"fraction of {count:,} draws (%)", ylim=(0, 1.35 * 100 / bins))
    left.legend(fontsize=8, loc="upper right")
    plain_axes(left)
    side = math.isqrt(mask.shape[1])
    often = 100 * mask.float().mean(0).reshape(side, side).numpy()
    middle, spread = 100 * mask.float().mean().item(), 5.0
    drawn = right.imshow(often, cmap="cividis", vmin=middle - spread, vmax=middle + spread)
    right.set(xlabel="column of the patch", ylabel="row of the patch")
    figure.colorbar(drawn, ax=right, label="masked (% of samples)", shrink=0.9)
    take_away(figure, caption)
    return figure


def shuffle_diagram(noise: Sequence[float], masking: Masking, caption: str = ""):
    """Draw `ids_keep` and `ids_restore` of ONE sample as arrows: image → [kept | masked] → image.

    Args:
        noise, masking: its N numbers, and a Masking of one row.
        caption: text below the figure.
    Returns:
        A Figure.
    """
    masked, back = masking.mask[0].tolist(), masking.ids_restore[0].tolist()
    kept, count = masking.ids_keep.shape[1], len(masked)
    shuffled = masking.ids_restore[0].argsort().tolist()
    figure = new_figure(1.05 * count + 1.6, 3.5)
    ax = figure.subplots()
    lines = [
        [f"{i}\nnoise {noise[i]:.2f}" for i in range(count)],
        [f"patch {i}" for i in shuffled],
        [f"{i}\nids_restore {back[i]}" for i in range(count)],
    ]
    gone = [masked, [masked[i] for i in shuffled], masked]
    for y, (line, grey) in enumerate(zip(lines, gone, strict=True)):
        for x, (text, is_masked) in enumerate(zip(line, grey, strict=True)):
            box = dict(facecolor="0.82" if is_masked else SKY, edgecolor="white")
            ax.add_patch(rectangle(x + 0.06, 2 * y, 0.88, 0.9, **box))
            ax.text(x + 0.5, 2 * y + 0.45, text, ha="center", va="center", fontsize=8)
    style = dict(arrowstyle="-|>", linewidth=1.1)
    for i in range(count):
        colour = dict(color="0.6" if masked[i] else BLUE)
        for start, end in (((i, 0.9), (back[i], 2)), ((back[i], 2.9), (i, 4))):
            ends = ((start[0] + 0.5, start[1]), (end[0] + 0.5, end[1]))
            ax.annotate("", ends[1], ends[0], arrowprops=style | colour)
    ax.axvline(kept, 0.36, 0.64, color=RED, linewidth=1.6)
    ax.set(xlim=(-0.05, count + 0.05), ylim=(5, -0.1))
    ax.set_xticks([])
    ax.set_yticks([0.45, 2.45, 4.45], ["in the image", "kept | masked", "restored"], fontsize=9)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    take_away(figure, caption)
    return figure
