"""Reconstructions stand beside the originals, guesses beside the truth."""

import numpy as np
import pytest
import torch

from mmkit import plots
from tests.plots.drawn import masked, shown


@pytest.fixture(scope="module")
def reconstructed(emoji):
    """Five images, the same masked by half, and stand-ins for their reconstructions."""
    pixels = emoji.batch(range(5)).pixel_values
    left = plots.paint_mask(pixels, masked(emoji, 5)[1].mask, 8)
    return pixels, left, 255 - pixels


def test_reconstructions_stand_beside_the_originals(reconstructed):
    """Row by row: each version of the image, its title on top, its number below."""
    columns = dict(zip(["original", "masked", "reconstructed"], reconstructed, strict=True))
    errors = torch.tensor([0.5, 0.25, 0.125, 1.0, 2.0])
    texts = [f"caption {i}" for i in range(5)]
    figure = plots.reconstruction_grid(
        columns, texts, {"reconstructed": errors}, "error {:.3f}", "take-away"
    )
    axes = np.reshape(shown(figure, 5 * 3), (5, 3))
    for row in range(5):
        for ax, images in zip(axes[row], reconstructed, strict=True):
            assert np.array_equal(ax.images[0].get_array(), images[row].permute(1, 2, 0))
    assert [ax.get_title() for ax in axes[0]] == list(columns)
    assert [ax.get_title() for ax in axes[1:].ravel()] == [""] * 12
    assert [ax.get_ylabel() for ax in axes[:, 0]] == texts
    numbers = [[ax.get_xlabel() for ax in line] for line in axes]
    assert numbers[2] == ["", "", "error 0.125"] and numbers[4][2] == "error 2.000"
    shown(plots.reconstruction_grid({"only": reconstructed[0][:1]}), 1)


def test_a_strip_is_three_rows_with_gaps(reconstructed):
    """Every pixel is at its position, and the rest is gap."""
    pixels, gap = plots.strip(*reconstructed), 2
    assert pixels.shape == (3, 3 * 64 + 2 * gap, 5 * 64 + 4 * gap) and pixels.dtype == torch.uint8
    gaps = torch.ones(pixels.shape, dtype=torch.bool)
    for y, images in enumerate(reconstructed):
        for x, image in enumerate(images):
            down, right = y * (64 + gap), x * (64 + gap)
            inside = (slice(None), slice(down, down + 64), slice(right, right + 64))
            assert torch.equal(pixels[inside], image)
            gaps[inside] = False
    assert (pixels[gaps] == 128).all() and gaps[0, 64].all() and gaps[0, :, 64].all()


def test_images_that_cannot_be_compared_are_refused(reconstructed):
    pixels, left, back = reconstructed
    with pytest.raises(ValueError, match=r"'masked' are \(3, 3, 64, 64\), the first .*5, 3, 64"):
        plots.strip(pixels, left[:3], back)
    with pytest.raises(ValueError, match=r"'reconstructed' are torch.float32, not uint8"):
        plots.strip(pixels, left, back / 255)
    with pytest.raises(ValueError, match="name at least one"):
        plots.reconstruction_grid({})


def test_training_is_shown_from_top_to_bottom(reconstructed):
    """One named row for each moment, at the middle of its images."""
    names = ["original", "masked", "epoch 1", "epoch 2"]
    strips = dict(zip(names, [*reconstructed, reconstructed[0]], strict=True))
    (ax,) = shown(plots.over_training(strips, "take-away"), 1)
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    whole = ax.images[0].get_array()
    assert np.array_equal(whole[: 3 * 66 - 2], plots.strip(*reconstructed).permute(1, 2, 0))
    assert np.array_equal(whole[3 * 66 :], whole[:64])
    np.testing.assert_allclose(ax.get_yticks(), [31.5 + 66 * row for row in range(4)])


GUESSES = [("dog", 0.5), ("cat", 0.25), ("man", 0.1), ("sun", 0.05), ("hat", 0.001)]


def test_the_right_guess_is_marked(reconstructed):
    """By a sign and by weight, not by colour alone; a truth that was not guessed is named."""
    tokens = [("[CLS]", "end"), ("[mask]", "mask"), ("and", "visible"), ("sky", "dropped")]
    guesses = [
        {"position": 1, "truth": "cat", "top": GUESSES},
        {"position": 3, "truth": "sky", "top": GUESSES},
    ]
    entries = [{"tokens": tokens, "guesses": guesses}, {"tokens": tokens[:1], "guesses": []}]
    figure = plots.token_guesses(entries, caption="take-away")
    shown(figure, 0)
    ax = figure.axes[0]
    words = [text.get_text() for text in ax.texts]
    assert words[:5] == [*(token for token, _ in tokens), "1"]  # and the position of the first
    first, second = words.index("1: “cat”"), words.index("3: “sky”, not among them")
    percent = ["50 %", "25 %", "10 %", "5 %", "<1 %"]
    plain = [w for (token, _), p in zip(GUESSES, percent, strict=True) for w in (token, p)]
    assert words[first + 1 : second] == [*plain[:2], "✓", *plain[2:], "3"]
    assert words[second + 1 :] == plain
    bold = [text.get_text() for text in ax.texts if text.get_weight() == "bold"]
    assert bold == ["✓", "cat", "25 %"]
    assert len(ax.lines) == 1  # the dropped token is struck out
    widths = np.array([bar.get_width() for bar in ax.patches]).reshape(2, 5, 2)  # track, bar
    np.testing.assert_allclose(widths[..., 1] / widths[..., 0], [[p for _, p in GUESSES]] * 2)
    colours = {bar.get_facecolor() for bar in ax.patches[1::2]}
    assert len(colours) == 2 and ax.patches[3].get_facecolor() != ax.patches[1].get_facecolor()
    beside = plots.token_guesses(entries, reconstructed[0][:2])
    images = [ax for ax in shown(beside, 2) if ax.images]
    assert np.array_equal(images[1].images[0].get_array(), reconstructed[0][1].permute(1, 2, 0))
    guesses[0]["position"] = 4
    with pytest.raises(ValueError, match="position 4, but the caption has tokens 0-3"):
        plots.token_guesses(entries)


def test_long_captions_and_many_guesses_stay_on_the_page():
    """All text lies inside its axes, and no two texts overlap."""
    tokens = [(word, "visible") for word in "a ##ridiculously longish caption of words".split() * 6]
    guesses = [{"position": i, "truth": "a", "top": GUESSES} for i in range(0, 36, 4)]
    figure = plots.token_guesses([{"tokens": tokens, "guesses": guesses}])
    shown(figure, 0)
    (ax,) = figure.axes
    page = ax.get_window_extent()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert all(page.x0 <= b.x0 and b.x1 <= page.x1 for b in boxes)
    assert all(page.y0 <= b.y0 and b.y1 <= page.y1 for b in boxes)
    assert [b for i, b in enumerate(boxes) if any(b.overlaps(o) for o in boxes[:i])] == []


def test_strips_that_a_run_kept_are_read_back(tmp_path):
    """Bit for bit: the first two rows once, the third at steps spread over the run."""
    from PIL import Image

    torch.manual_seed(0)
    kept = {step: torch.randint(0, 256, (3, 5, 3, 7, 7), dtype=torch.uint8) for step in range(9)}
    (tmp_path / "reconstructions").mkdir()
    for step, parts in kept.items():
        image = Image.fromarray(plots.strip(*parts).permute(1, 2, 0).numpy())
        image.save(tmp_path / "reconstructions" / f"{step:08d}.png")
    strips = plots.read_strips(tmp_path, 3)
    assert [*strips] == ["original", "masked", "step 0", "step 4", "step 8"]
    assert torch.equal(strips["step 4"], kept[4][2]) and torch.equal(strips["masked"], kept[8][1])
    with pytest.raises(FileNotFoundError, match="no strips in"):
        plots.read_strips(tmp_path / "nowhere")
