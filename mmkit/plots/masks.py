"""Pictures of masks: what is hidden, what is left, what it costs, what the model looks at.

`mask` is True where a token is HIDDEN. Each is f(data) -> Figure; `mm.plots` has them all.
Used by notebooks/02_masking.ipynb.
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
from .figures import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    SKY,
    new_figure,
    plain_axes,
    rectangle,
    show_picture,
    take_away,
)


def _show_masked(axes, pixels: Tensor, masking: Masking | None, patch_size: int):
    """What is left of pictures (B, 3, H, W) under a masking (None = everything), one per axis."""
    seen = pixels if masking is None else paint_mask(pixels, masking.mask, patch_size)
    for ax, picture in zip(axes, seen, strict=True):
        show_picture(ax, picture)


def masked_pictures(
    pixels: Tensor, maskings: dict[str, Masking | None], patch_size: int, caption: str = ""
):
    """Rows: what the encoder is given under each masking (None = everything); columns: pictures."""
    count = len(pixels)
    figure = new_figure(1.35 * count + 0.6, 1.4 * len(maskings) + 0.4)
    axes = np.atleast_2d(figure.subplots(len(maskings), count, squeeze=False))
    for line, (name, masking) in zip(axes, maskings.items(), strict=True):
        _show_masked(line, pixels, masking, patch_size)
        line[0].set_ylabel(name, fontsize=9)
    take_away(figure, caption)
    return figure


def masking_gallery(
    batch: Batch,
    model,
    maskers: Sequence[str] = (),
    ratios: Sequence[float] = (0.5, 0.75),
    layers=None,
    seed: int = 0,
    epoch: int = 0,
    caption: str = "",
):
    """Image maskers (rows) times hidden shares (groups of columns) on the same pictures.

    maskers: names in IMAGE_MASKERS; () takes all but "painted" ("layers" only where `layers`, the
    data set's, is given). model: whose grid it is, and whose attention "attentive" goes by.
    """
    known = [n for n in IMAGE_MASKERS if n != "painted" and (n != "layers" or layers)]
    names, count = list(maskers) or known, len(batch)
    figure = new_figure(0.95 * count * len(ratios) + 0.9, 0.98 * len(names) + 0.6)
    parts = np.atleast_1d(figure.subfigures(1, len(ratios), wspace=0.03))
    for part, ratio in zip(parts, ratios, strict=True):
        part.suptitle(f"{100 * ratio:.0f} % hidden", fontsize=10)
        axes = part.subplots(len(names), count, squeeze=False, gridspec_kw=dict(wspace=0, hspace=0))
        for line, name in zip(axes, names, strict=True):
            masking, _ = draw_maskings(
                batch,
                model.token_info,
                seed=seed,
                epoch=epoch,
                image=(name, ratio),
                layers=layers,
            )
            _show_masked(line, batch.pixel_values, masking, model.patch_size)
            if part is parts[0]:
                label = name.replace("_", "\n") + ("\n(one region)" if name == "layers" else "")
                line[0].set_ylabel(label, fontsize=8)
    take_away(figure, caption)
    return figure


def what_the_model_sees(
    batch: Batch,
    model,
    image_masking: Masking | None = None,
    text_masking: Masking | None = None,
    row: int = 0,
    caption: str = "",
):
    """One pair as the encoder gets it under "drop": the picture, what is left of it, the sequence.

    Right: the kept patches in the order in which they go in, each with its position, and below them
    the kept word pieces with theirs.
    """
    pixels, patch = batch.pixel_values[row : row + 1], model.patch_size
    wide, num_patches = patch_grid(pixels, patch)[1], model.num_patches
    length = int(batch.valid[row].sum())
    ids = list(range(num_patches)) if image_masking is None else _kept(image_masking, row)
    words = list(range(length)) if text_masking is None else _kept(text_masking, row)
    figure = new_figure(10.5, max(3.3, 0.6 * (-(-len(ids) // 8) + -(-len(words) // 4))))
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 2.2])
    show_picture(left, pixels[0], "the picture")
    hidden = torch.ones(1, num_patches, dtype=torch.bool)
    hidden[0, ids] = False
    show_picture(middle, paint_mask(pixels, hidden, patch)[0], "what is left of it")
    squares = patchify(pixels, patch)[0, ids].unflatten(1, (3, patch, patch)).permute(0, 2, 3, 1)
    places = [f"{number // wide},{number % wide}" for number in ids]
    pieces = model.tokenizer.convert_ids_to_tokens(batch.input_ids[row, words])
    _draw_sequence(right, squares, places, pieces, words)
    title = f"class token + {len(ids)} of {num_patches} patches (row,column),\n"
    right.set_title(f"{title}{len(words)} of {length} text tokens (position)", fontsize=9)
    take_away(figure, caption)
    return figure


def _draw_sequence(ax, squares: Tensor, places: list[str], pieces: list[str], numbers: list[int]):
    """Patches (K, P, P, 3) in rows of 8, each over its place, then word pieces over theirs."""
    columns = 8
    small = dict(fontsize=8, va="center", color="0.35")
    for i, (square, place) in enumerate(zip(squares, places, strict=True)):
        x, y = i % columns, i // columns
        ax.imshow(square.numpy(), extent=(x + 0.14, x + 0.86, y + 0.77, y + 0.05))
        frame = dict(facecolor="none", edgecolor="0.75", linewidth=0.6)
        ax.add_patch(rectangle(x + 0.14, y + 0.05, 0.72, 0.72, **frame))
        ax.text(x + 0.5, y + 0.88, place, ha="center", **small)
    right, down = 0.14, -(-len(squares) // columns) + 0.6
    for piece, number in zip(pieces, numbers, strict=True):
        width = 0.15 * len(piece) + 0.3
        if right + width > columns:
            right, down = 0.14, down + 0.8
        colour = "0.9" if piece.startswith("[") else SKY
        box = dict(boxstyle="round,pad=0.2", facecolor=colour, edgecolor="none", alpha=0.8)
        ax.text(right, down, piece, fontsize=9, family="monospace", va="center", bbox=box)
        ax.text(right, down + 0.45, str(number), **small)
        right += width + 0.12
    ax.set(xlim=(0, columns), ylim=(down + 0.7, 0), aspect="equal")
    ax.axis("off")


def _kept(masking: Masking, row: int) -> list[int]:
    """Positions that are encoded, filler left out."""
    ids = masking.ids_keep[row]
    return (ids if masking.keep_valid is None else ids[masking.keep_valid[row]]).tolist()


def ratio_vs_cost(costs: Sequence[dict], caption: str = ""):
    """What hiding saves: tokens, operations and measured time of a step over the hidden share.

    costs: what `mm.cost.measure_ratios` gives.
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
        ax.set(xlabel="hidden patches (%)", ylabel=label, ylim=(0, 1.18 * max(values)))
        plain_axes(ax)
    take_away(figure, caption)
    return figure


def _heat(values: Tensor, patch_size: int, grid: tuple[int, int]) -> np.ndarray:
    """(N,) values enlarged to pixels (H, W)."""
    plane = values.reshape(grid).float().numpy()
    return plane.repeat(patch_size, 0).repeat(patch_size, 1)


def _show_heat(ax, picture: Tensor, values: Tensor, patch_size: int, top: tuple[float, float]):
    """A grey picture under a map of values, one per patch."""
    grid = patch_grid(picture, patch_size)
    grey = picture.float().mean(0, keepdim=True).expand(3, -1, -1)
    show_picture(ax, (128 + grey / 2).to(torch.uint8))
    heat = _heat(values, patch_size, grid)
    return ax.imshow(heat, cmap="cividis", alpha=0.72, vmin=top[0], vmax=top[1])


def attention_maps(
    pixels: Tensor, attention: dict[str, Tensor], patch_size: int, caption: str = ""
):
    """What a class token attends to: pictures (B, 3, H, W) above maps {name: (B, N)}, a row each.

    attention: `model.class_attention(pixels)`. Each row of maps has one scale, from 0 to its
    largest value, in multiples of even attention (1/N).
    """
    count = len(pixels)
    figure = new_figure(1.35 * count + 1.5, 1.4 * (1 + len(attention)) + 0.3)
    axes = figure.subplots(1 + len(attention), count, squeeze=False)
    for ax, picture in zip(axes[0], pixels, strict=True):
        show_picture(ax, picture)
    for line, (name, values) in zip(axes[1:], attention.items(), strict=True):
        values = values * values.shape[1]
        top = float(values.amax())
        for ax, picture, row in zip(line, pixels, values, strict=True):
            drawn = _show_heat(ax, picture, row, patch_size, (0, top))
        line[0].set_ylabel(name, fontsize=9)
        figure.colorbar(drawn, ax=list(line), label="attention\n(1 = even)", shrink=0.8)
    take_away(figure, caption)
    return figure


def patch_word_map(
    picture: Tensor, pieces: Sequence[str], cosines: Tensor, patch_size: int, caption: str = ""
):
    """Where in a picture (3, H, W) each word finds itself: one map per word piece.

    pieces, cosines (W, N): what `mm.retrieval.patch_word_similarity` gives. One scale for all.
    """
    columns = min(6, len(pieces) + 1)
    lines = -(-(len(pieces) + 1) // columns)
    figure = new_figure(1.5 * columns + 0.9, 1.75 * lines + 0.3)
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax in axes.ravel()[len(pieces) + 1 :]:
        ax.axis("off")
    show_picture(axes.ravel()[0], picture, "the picture")
    top = (float(cosines.min()), float(cosines.max()))
    for ax, piece, values in zip(axes.ravel()[1:], pieces, cosines, strict=False):
        drawn = _show_heat(ax, picture, values, patch_size, top)
        ax.set_title(piece, fontsize=9, family="monospace")
    figure.colorbar(drawn, ax=axes, label="cosine of patch and word", shrink=0.8)
    take_away(figure, caption)
    return figure


def masked_captions(
    pieces: Sequence[Sequence[str]],
    masks: Sequence[Sequence[bool]],
    mode: str = "replace",
    caption: str = "",
    names: Sequence[str] = (),
    instead: Sequence[Sequence[str]] | None = None,
):
    """Captions as rows of word pieces; hidden ones struck out ("drop") or replaced ("replace").

    names: one for each row, written before it. instead: what stands in the place of a hidden piece
    ("[mask]" if not given).
    """
    figure = new_figure(8, 0.36 * len(pieces) + 0.5)
    ax = figure.subplots()
    ax.axis("off")
    margin = max((1.05 * len(name) + 2 for name in names), default=0.0)
    longest = 100.0
    for y, (words, hidden) in enumerate(zip(pieces, masks, strict=True)):
        x = margin
        if names:
            ax.text(0, y + 0.5, names[y], fontsize=9, va="center", color="0.3")
        for place, (word, gone) in enumerate(zip(words, hidden, strict=True)):
            shown = word
            if gone and mode != "drop":
                shown = instead[y][place] if instead else "[mask]"
            plain = "0.93" if word.startswith("[") else SKY
            drawn = (
                GREEN if shown != "[mask]" else ORANGE
            )  # green: another word, or the word itself
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
    ax.set_ylim(len(pieces), 0)
    take_away(figure, caption)
    return figure


def masked_caption(
    tokenizer,
    input_ids: Tensor,
    maskings: dict[str, Masking | None],
    mode: str = "drop",
    caption: str = "",
):
    """One caption (input_ids (L,) with its ends; padding allowed), a row for each masking.

    maskings: name -> a `Masking` of ONE row, or None (everything seen). mode "drop": hidden pieces
    are struck out; "replace": the mask token, or for 80/10/10 (green) the word that was drawn.
    """
    length = int((input_ids != tokenizer.pad_token_id).sum())
    pieces = tokenizer.convert_ids_to_tokens(input_ids[:length])
    masks, instead = [], []
    for masking in maskings.values():
        hidden = torch.zeros(length, dtype=torch.bool) if masking is None else masking.mask[0]
        masks.append(hidden[:length].tolist())
        drawn = None if masking is None else masking.substitute
        words = ["[mask]"] * length
        if drawn is not None:
            new = tokenizer.convert_ids_to_tokens(drawn[0, :length].clamp(min=0))
            words = [
                w if i >= 0 else "[mask]" for w, i in zip(new, drawn[0].tolist(), strict=False)
            ]
        instead.append(words)
    rows = [pieces] * len(maskings)
    return masked_captions(rows, masks, mode, caption, list(maskings), instead)


def token_table(pieces: Sequence[Sequence[str]], valid: Tensor, caption: str = ""):
    """A batch of captions as the table that it is: one row per caption, one column per position.

    pieces: the word pieces of each row, padding included; valid (B, L) True = a real token. Blue:
    words; grey: the two ends; empty: padding; orange: unknown.
    """
    count, length = valid.shape
    figure = new_figure(0.75 * length + 1, 0.34 * count + 0.9)
    ax = figure.subplots()
    for y, (line, real) in enumerate(zip(pieces, valid.tolist(), strict=True)):
        for x, (piece, is_real) in enumerate(zip(line, real, strict=True)):
            special = ORANGE if piece == "[UNK]" else "0.88"
            colour = (special if piece.startswith("[") else SKY) if is_real else "white"
            box = dict(facecolor=colour, edgecolor="0.75", linewidth=0.8, alpha=0.8)
            ax.add_patch(rectangle(x + 0.03, y + 0.08, 0.94, 0.84, **box))
            words = dict(ha="center", va="center", fontsize=8, color="0.1" if is_real else "0.6")
            ax.text(x + 0.5, y + 0.5, piece, **words)
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
    """Is the noise uniform, and is every patch hidden equally often?

    noise (B, N) in [0, 1), mask (B, N) True = hidden, of many samples. Left: share of the draws in
    20 bins, and the band that 19 of 20 bins of a perfect die stay in. Right: how often each patch
    is hidden, on the (square) picture.
    """
    figure = new_figure(8.2, 3.2)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    bins, count = 20, noise.numel()
    share = 100 * np.histogram(noise.numpy(), bins, (0, 1))[0] / count
    band = 2 * 100 * math.sqrt((1 / bins) * (1 - 1 / bins) / count)
    left.bar(np.arange(bins) / bins, share, 0.9 / bins, align="edge", color=BLUE)
    left.axhspan(
        100 / bins - band, 100 / bins + band, color=ORANGE, alpha=0.6, label="expected, ± 2 s.d."
    )
    left.set(xlabel="noise", ylabel=f"share of {count:,} draws (%)", ylim=(0, 1.35 * 100 / bins))
    left.legend(fontsize=8, loc="upper right")
    plain_axes(left)
    side = math.isqrt(mask.shape[1])
    often = 100 * mask.float().mean(0).reshape(side, side).numpy()
    middle, spread = 100 * mask.float().mean().item(), 5.0
    drawn = right.imshow(often, cmap="cividis", vmin=middle - spread, vmax=middle + spread)
    right.set(xlabel="column of the patch", ylabel="row of the patch")
    figure.colorbar(drawn, ax=right, label="hidden (% of samples)", shrink=0.9)
    take_away(figure, caption)
    return figure


def shuffle_diagram(noise: Sequence[float], masking: Masking, caption: str = ""):
    """`ids_keep` and `ids_restore` of ONE sample as arrows: in place → [kept | hidden] → in place.

    noise: its N numbers; masking: a `Masking` of one row.
    """
    hidden, back = masking.mask[0].tolist(), masking.ids_restore[0].tolist()
    kept, count = masking.ids_keep.shape[1], len(hidden)
    shuffled = masking.ids_restore[0].argsort().tolist()
    figure = new_figure(1.05 * count + 1.6, 3.5)
    ax = figure.subplots()
    lines = [
        [f"{i}\nnoise {noise[i]:.2f}" for i in range(count)],
        [f"patch {i}" for i in shuffled],
        [f"{i}\nids_restore {back[i]}" for i in range(count)],
    ]
    gone = [hidden, [hidden[i] for i in shuffled], hidden]
    for y, (line, grey) in enumerate(zip(lines, gone, strict=True)):
        for x, (words, is_hidden) in enumerate(zip(line, grey, strict=True)):
            box = dict(facecolor="0.82" if is_hidden else SKY, edgecolor="white")
            ax.add_patch(rectangle(x + 0.06, 2 * y, 0.88, 0.9, **box))
            ax.text(x + 0.5, 2 * y + 0.45, words, ha="center", va="center", fontsize=8)
    style = dict(arrowstyle="-|>", linewidth=1.1)
    for i in range(count):
        colour = dict(color="0.6" if hidden[i] else BLUE)
        for start, end in (((i, 0.9), (back[i], 2)), ((back[i], 2.9), (i, 4))):
            ends = ((start[0] + 0.5, start[1]), (end[0] + 0.5, end[1]))
            ax.annotate("", ends[1], ends[0], arrowprops=style | colour)
    ax.axvline(kept, 0.36, 0.64, color=RED, linewidth=1.6)
    ax.set(xlim=(-0.05, count + 0.05), ylim=(5, -0.1))
    ax.set_xticks([])
    ax.set_yticks([0.45, 2.45, 4.45], ["in the picture", "kept | hidden", "put back"], fontsize=9)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    take_away(figure, caption)
    return figure
