"""Every image masker masks the exact number of each image independently, in its own manner."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit.masking.image import IMAGE_MASKERS, Scene, random_mask
from mmkit.noise import mask_noise
from tests.masking.any_masking import RATIOS, consistent
from tests.masking.slow_loops import (
    slow_block,
    slow_cluster,
    slow_gaussian,
    slow_inverse_block,
    slow_layers,
)

BY_ATTENTION = ("attentive", "inattentive")
BY_RATIO = [name for name in IMAGE_MASKERS if name not in ("layers", "painted")]
SIDES = st.integers(1, 17)


def image_of(ids, grid, patch=3):
    """Made images and attention, each a function of its sample id."""
    height, width = grid[0] * patch, grid[1] * patch
    pixels = (mask_noise(0, 0, ids, 3 * height * width, "pixels") * 256).byte()
    return Scene(
        grid,
        pixels.unflatten(1, (3, height, width)),
        attend=lambda: mask_noise(0, 0, ids, grid[0] * grid[1], "attention"),
    )


def draw(name, ids, grid, ratio, epoch=0, scene=None):
    noise = mask_noise(0, epoch, ids, grid[0] * grid[1])
    return IMAGE_MASKERS[name](noise, ratio, scene or image_of(ids, grid))


def borders(masked, grid):
    """(B,) number of adjacent pairs of patches of which one is masked and one is not."""
    plane = masked.unflatten(1, grid)
    across, down = plane[:, :, 1:] != plane[:, :, :-1], plane[:, 1:] != plane[:, :-1]
    return across.sum((1, 2)) + down.sum((1, 2))


# -- properties of all maskers ---------------------------------------------------------------


@pytest.mark.parametrize("name", BY_RATIO)
@given(height=SIDES, width=SIDES, ratios=st.lists(RATIOS, min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_the_exact_number_is_masked_on_any_grid_at_any_ratio(name, height, width, ratios):
    """One ratio gives a rectangular batch; with one per sample, each row is as with its ratio."""
    grid, ids = (height, width), torch.arange(len(ratios)) + 7
    tokens = height * width
    expected = [max(1, round(tokens * (1 - ratio))) for ratio in ratios]
    each = draw(name, ids, grid, torch.tensor(ratios, dtype=torch.float64))
    consistent(each)
    assert (~each.mask).sum(1).tolist() == expected
    for row, ratio in enumerate(ratios):
        one = draw(name, ids, grid, ratio)
        consistent(one)
        assert one.mask.shape == (len(ids), tokens) and one.keep_valid is None
        assert one.ids_keep.shape == (len(ids), expected[row])
        assert torch.equal(one.mask[row], each.mask[row])
        assert torch.equal(one.ids_keep[row], each.ids_keep[row, : expected[row]])


@pytest.mark.parametrize("name", BY_RATIO)
@given(height=SIDES, width=SIDES, ratio=RATIOS)
@settings(max_examples=15, deadline=None)
def test_a_mask_does_not_depend_on_the_batch(name, height, width, ratio):
    """Alone, in another order and with others: the same patches, to the bit."""
    grid, ids = (height, width), torch.tensor([2, 3, 5, 2**40, 11])
    together = draw(name, ids, grid, ratio)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(draw(name, ids[order], grid, ratio).ids_keep, together.ids_keep[order])
    for row in range(5):
        assert torch.equal(
            draw(name, ids[row, None], grid, ratio).ids_keep[0], together[row].ids_keep
        )


@pytest.mark.parametrize("name", BY_RATIO)
def test_every_sample_and_epoch_has_a_mask_of_its_own(name):
    """Per sample, not per batch; masks by attention change only with the attention."""
    ids, grid = torch.arange(53), (13, 11)
    first, second = (draw(name, ids, grid, 0.6, epoch) for epoch in (0, 1))
    different = 20 if name == "grid" else 53  # grid: a few offsets of one pattern, and ties
    assert len(first.mask.unique(dim=0)) >= different
    if name in BY_ATTENTION:
        assert torch.equal(first.mask, second.mask)
    else:
        assert (first.mask != second.mask).any(1).sum() >= different


@pytest.mark.parametrize("name", ["random", "block", "inverse_block", "grid", "cluster"])
def test_over_time_every_patch_is_masked_and_visible(name):
    """Otherwise a part of every image would never be used, or never have to be predicted."""
    ids, grid = torch.arange(401), (7, 5)
    for ratio in (0.2, 0.8):
        masked = draw(name, ids, grid, ratio).mask.double().mean(0)
        assert ratio / 6 < masked.min() and masked.max() < 1 - (1 - ratio) / 6


@pytest.mark.parametrize("name", BY_RATIO)
@pytest.mark.parametrize("ratio", [-0.1, 1.0, 50])
def test_a_ratio_outside_its_range_is_refused(name, ratio):
    ids = torch.arange(2)
    for bad in (ratio, torch.tensor([0.5, ratio])):
        with pytest.raises(ValueError, match=rf"mask_ratio={ratio:g} must be in \[0, 1\)"):
            draw(name, ids, (3, 5), bad)


@pytest.mark.parametrize(
    "name, message",
    [
        ("block", "'block' needs grid: give Scene"),
        ("inverse_block", "'inverse_block' needs grid: give Scene"),
        ("grid", "'grid' needs grid: give Scene"),
        ("gaussian", "'gaussian' needs grid: give Scene"),
        ("cluster", "'cluster' needs pixel_values: give Scene.*batch.pixel_values"),
        ("attentive", "'attentive' needs attend: give Scene.*model.class_attention"),
        ("inattentive", "'inattentive' needs attend: give Scene.*model.class_attention"),
        ("layers", "'layers' needs regions: give the built-in images"),
        ("painted", "'painted' needs painted: give an array of rows x columns"),
    ],
)
def test_a_masker_says_what_it_lacks(name, message):
    scene = None if "needs grid" in message else Scene((3, 5))
    with pytest.raises(ValueError, match="image masker " + message):
        IMAGE_MASKERS[name](torch.rand(2, 15), 0.5, scene)


def test_random_masking_is_vit_maes():
    """The same noise gives transformers' ViTMAE the same kept tokens, mask and ids_restore."""
    from transformers import ViTMAEConfig
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

    tower = dict(hidden_size=12, num_attention_heads=1, num_hidden_layers=1, image_size=40)
    for ratio, kept in ((0.75, 16), (0.5, 32), (0.25, 48), (0.0, 64)):
        noise = mask_noise(0, 0, torch.arange(11), 64)
        theirs = ViTMAEEmbeddings(ViTMAEConfig(mask_ratio=ratio, patch_size=5, **tower))
        position = torch.arange(64.0)[None, :, None].expand(11, -1, 1)  # as the tokens' content
        tokens, mask, ids_restore = theirs.random_masking(position, noise)
        ours = random_mask(noise, ratio)
        assert ours.ids_keep.shape == (11, kept)
        assert torch.equal(ours.ids_keep, tokens[..., 0].long())
        assert torch.equal(ours.mask, mask.bool())
        assert torch.equal(ours.ids_restore, ids_restore)


# -- block, inverse block, grid --------------------------------------------------------------


@pytest.mark.parametrize("name, ratio", [("block", 0.5), ("block", 0.4), ("inverse_block", 0.75)])
def test_blocks_are_compact(name, ratio):
    """Masked and kept patches have less than half as many common borders as with `random`."""
    ids, grid = torch.arange(499), (14, 14)
    ours = borders(draw(name, ids, grid, ratio).mask, grid)
    by_chance = borders(draw("random", ids, grid, ratio).mask, grid).double().mean().item()
    assert by_chance == pytest.approx(364 * 2 * ratio * (1 - ratio), rel=0.02)
    assert ours.double().mean() < 0.5 * by_chance
    assert ours.max() < by_chance


@pytest.mark.parametrize("grid", [(14, 14), (7, 13), (17, 3)])
def test_block_equals_a_slow_loop(grid):
    """By BEiT's algorithm, whose rectangles have the areas and aspect ratios of the paper."""
    ids, tokens = torch.arange(31), grid[0] * grid[1]
    noise, smallest = mask_noise(0, 0, ids, tokens), 16 / 196 * tokens
    for ratio in (0.1, 0.4, 0.75, 0.95):
        masking = draw("block", ids, grid, ratio)
        number = tokens - max(1, round(tokens * (1 - ratio)))
        for row in range(31):
            masked, rectangles = slow_block(noise[row], number, grid)
            assert set(masking.mask[row].nonzero()[:, 0].tolist()) == masked
            for tall, wide, left_over in rectangles:
                most = max(smallest, left_over)
                assert (tall - 0.5) * (wide - 0.5) <= most  # half a patch of rounding
                if (tall, wide) < grid and tall < grid[0] and wide < grid[1]:
                    assert (tall + 0.5) * (wide + 0.5) >= smallest
                    assert (tall - 0.5) / (wide + 0.5) <= 1 / 0.3
                    assert (wide - 0.5) / (tall + 0.5) <= 1 / 0.3


def test_block_hides_one_rectangle_where_the_smallest_is_enough():
    """16 of 196 patches: one rectangle (with its last row cut) or one and a few single patches."""
    masking = draw("block", torch.arange(199), (14, 14), 16 / 196)
    assert (masking.mask.sum(1) == 16).all()
    whole = 0
    for masked in masking.mask.unflatten(1, (14, 14)):
        rows, columns = masked.any(1).sum().item(), masked.any(0).sum().item()
        whole += (rows - 1) * columns < 16 <= rows * columns
    assert whole > 0.6 * 199


@pytest.mark.parametrize("grid", [(8, 8), (5, 11), (1, 7), (17, 2)])
def test_inverse_block_equals_a_slow_loop(grid):
    ids, tokens = torch.arange(17), grid[0] * grid[1]
    noise = mask_noise(0, 0, ids, tokens)
    for ratio in (0.2, 0.75, 0.9):
        masking = draw("inverse_block", ids, grid, ratio)
        for row in range(17):
            expected = slow_inverse_block(noise[row], masking.ids_keep.shape[1], grid)
            assert set(masking.ids_keep[row].tolist()) == expected


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (6, 10), (2, 16)])
def test_grid_keeps_one_of_each_two_by_two(grid):
    """At 75 %; over samples it is each of the four."""
    kept = ~draw("grid", torch.arange(61), grid, 0.75).mask.unflatten(1, grid)
    squares = kept.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 2, 4).flatten(3)
    assert (squares.sum(3) == 1).all()
    assert (squares == squares[:, :1, :1]).all()  # the same corner everywhere in an image
    assert squares[:, 0, 0].any(0).all()


@pytest.mark.parametrize("grid", [(14, 14), (5, 6), (16, 3)])
def test_grid_is_a_checkerboard_at_half(grid):
    """Both of its colours occur."""
    masks = draw("grid", torch.arange(61), grid, 0.5).mask.unflatten(1, grid)
    rows, columns = torch.arange(grid[0])[:, None], torch.arange(grid[1])
    board = (rows + columns) % 2 == 0
    black = (masks == board).all(2).all(1)
    white = (masks == ~board).all(2).all(1)
    assert (black ^ white).all() and black.any() and white.any()


@given(height=SIDES, width=SIDES, ratio=RATIOS, sample=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_grid_spreads_evenly(height, width, ratio, sample):
    """By Bayer's matrix, all squares of side 2, 4 or 8 keep equally many patches, up to one."""
    kept = ~draw("grid", torch.tensor([sample]), (height, width), ratio).mask
    plane = kept[0].reshape(height, width).long()
    for side in (2, 4, 8):
        if side <= min(height, width):
            counts = plane.unfold(0, side, 1).unfold(1, side, 1).sum((2, 3))
            assert counts.max() - counts.min() <= 1


# -- gaussian --------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(14, 14), (5, 11)])
def test_gaussian_equals_a_slow_loop(grid):
    ids, tokens = torch.arange(23), grid[0] * grid[1]
    noise = mask_noise(0, 0, ids, tokens)
    for ratio in (0.25, 0.75):
        masking = draw("gaussian", ids, grid, ratio)
        for row in range(23):
            rand = (1 - noise[row].double()).tolist()
            expected = slow_gaussian(rand, masking.ids_keep.shape[1], grid)
            assert set(masking.ids_keep[row].tolist()) == expected


def test_gaussian_keeps_the_centre_as_often_as_glip_does():
    """Against the rule with numpy's generator: the fraction of each patch within 5 deviations."""
    grid, samples = (7, 5), 4001
    ours = (~draw("gaussian", torch.arange(samples), grid, 0.75).mask).double().mean(0).numpy()
    generator, theirs = np.random.default_rng(0), np.zeros(35)
    for _ in range(samples):
        theirs[list(slow_gaussian(generator.random(35).tolist(), 9, grid))] += 1 / samples
    spread = np.sqrt((theirs * (1 - theirs) + 1e-3) * 2 / samples)
    assert (np.abs(ours - theirs) < 5 * spread).all()
    plane = ours.reshape(grid)
    assert plane[3, 2] == plane.max() and plane[3, 2] > 5 * plane[0, 0]
    corners = plane[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.max() < plane[:, 2].min() and corners.max() - corners.min() < 0.05


# -- cluster ---------------------------------------------------------------------------------


def test_cluster_hides_one_colour_first():
    """In an image of two flat colours, all masked patches, as far as possible, have one colour."""
    grid = (4, 6)
    left = torch.arange(24) % 6 < 2  # 8 patches of one colour, 16 of the other
    plane = left.reshape(grid).repeat_interleave(3, 0).repeat_interleave(3, 1)
    colours = torch.tensor([[230, 20, 31], [17, 190, 201]])[plane.long()].permute(2, 0, 1)
    pixels = colours.byte().expand(97, -1, -1, -1)
    ids = torch.arange(97)
    for ratio, number in ((0.25, 6), (1 / 3, 8), (0.5, 12)):
        masking = draw("cluster", ids, grid, ratio, scene=Scene(grid, pixels))
        of_left, of_right = masking.mask[:, left].sum(1), masking.mask[:, ~left].sum(1)
        assert (of_left + of_right == number).all()
        pure = (of_left == min(number, 8)) | (of_right == number)
        assert pure.all()
        assert (of_left == min(number, 8)).float().mean() == pytest.approx(1 / 3, abs=0.15)
    assert len(draw("cluster", ids, grid, 0.25, scene=Scene(grid, pixels)).mask.unique(dim=0)) > 50


@pytest.mark.parametrize("grid", [(4, 7), (12, 11)])
@pytest.mark.parametrize("darkest", [0, 240])
def test_cluster_equals_a_slow_loop(grid, darkest):
    """On smooth made images, with one anchor or four; on pale ones, too, with similar colours.

    There |a|^2 + |b|^2 - 2ab, the quick way to a distance, would be wrong by shades.
    """
    generator = torch.Generator().manual_seed(0)
    small = darkest + torch.rand((13, 3, 4, 4), generator=generator) * (255 - darkest)
    size = (grid[0] * 6, grid[1] * 6)
    pixels = torch.nn.functional.interpolate(small, size, mode="bilinear").byte()
    ids, tokens = torch.arange(13), grid[0] * grid[1]
    noise = mask_noise(0, 0, ids, tokens).numpy()
    for ratio in (0.3, 0.75):
        masking = draw("cluster", ids, grid, ratio, scene=Scene(grid, pixels))
        for row in range(13):
            expected = slow_cluster(
                noise[row], pixels[row].double().numpy(), int(masking.mask[row].sum()), grid, 6
            )
            assert set(masking.mask[row].nonzero()[:, 0].tolist()) == expected
    normalised = pixels.float() / 64 - 2  # the same distances, on the scale of uint8
    again = draw("cluster", ids, grid, 0.75, scene=Scene(grid, normalised))
    assert torch.equal(again.mask, masking.mask)


# -- by attention, layers, painted -----------------------------------------------------------


def test_attention_decides_and_its_opposite_is_the_rest():
    """Exactly the top k by attention stay; at 0.5 the opposite keeps the other half."""
    ids, grid = torch.arange(11), (7, 8)
    attention = mask_noise(0, 0, ids, 56, "attention")
    for ratio, kept in ((0.75, 14), (0.5, 28), (0.3, 39)):
        masking = draw("attentive", ids, grid, ratio)
        top = attention.topk(kept, dim=1).indices
        assert torch.equal(masking.ids_keep.sort(1).values, top.sort(1).values)
        bottom = attention.topk(kept, dim=1, largest=False).indices
        opposite = draw("inattentive", ids, grid, ratio)
        assert torch.equal(opposite.ids_keep.sort(1).values, bottom.sort(1).values)
        if ratio == 0.5:
            assert torch.equal(opposite.mask, ~masking.mask)


@pytest.mark.parametrize("name", BY_ATTENTION)
def test_equal_attention_is_decided_by_noise(name):
    """Of squares of 2 x 2 with equal values, one is divided, differently in every epoch."""
    ids, grid = torch.arange(11), (4, 6)
    values = mask_noise(0, 0, ids, 6, "attention").unflatten(1, (2, 3))
    attention = values.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    scene = Scene(grid, attend=lambda: attention)
    masks = [draw(name, ids, grid, 14 / 24, epoch, scene).mask for epoch in range(7)]
    masked = masks[0].unflatten(1, (2, 2, 3, 2)).sum((2, 4)).flatten(1)  # (B, squares)
    assert torch.equal(masked.sort(1).values, torch.tensor([0, 0, 2, 4, 4, 4]).expand(11, -1))
    assert all((mask != masks[0]).any() for mask in masks[1:])


def test_layers_mask_one_whole_region():
    """Each valid region equally often; one patch stays visible if it covers the image."""
    samples, grid = 3001, (5, 7)
    ids = torch.arange(samples)
    regions = mask_noise(0, 0, ids, 4 * 35, "regions").unflatten(1, (4, 35)) < 0.2
    regions[:, 1] = False  # padding, as if another image had more regions
    regions[::5, 3] = False
    regions[1::5, 2] = True  # covers everything
    regions[7] = False  # an image without a region
    noise = mask_noise(0, 0, ids, 35)
    masking = IMAGE_MASKERS["layers"](noise, 0.0, Scene(grid, regions=lambda: regions))
    consistent(masking)
    expected = torch.stack([slow_layers(noise[row], regions[row]) for row in range(samples)])
    assert torch.equal(masking.mask, expected)
    assert (~masking.mask).sum(1).min() == 1 and not masking.mask[7].any()
    three = torch.arange(samples) % 5 > 1  # regions 0, 2 and 3
    chosen = (masking.mask[:, None] == regions).all(2)[three]
    counts = chosen[:, [0, 2, 3]].sum(0)
    assert (counts - three.sum() / 3).abs().max() < 5 * (three.sum() * 2 / 9).sqrt()


def test_layers_change_with_the_epoch_and_not_with_the_batch():
    ids, grid = torch.arange(29), (5, 7)
    regions = mask_noise(0, 0, ids, 7 * 35, "regions").unflatten(1, (7, 35)) < 0.4

    def masks(rows, epoch=0):
        scene = Scene(grid, regions=lambda: regions[rows])
        return draw("layers", ids[rows], grid, 0.5, epoch, scene).mask

    whole = slice(None)
    assert (masks(whole) != masks(whole, epoch=1)).any(1).float().mean() > 0.7
    for rows in (slice(3, 4), torch.arange(28, -1, -1)):
        assert torch.equal(masks(rows), masks(whole)[rows])


PAINTED = [[0, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    "painted",
    [
        PAINTED,
        np.array(PAINTED, dtype=np.uint8),
        np.array(PAINTED) > 0,
        torch.tensor(PAINTED) * 0.5,
    ],
)
def test_painted_hides_what_was_painted(painted):
    """The same for all images: lists, arrays and tensors with any true values."""
    masking = IMAGE_MASKERS["painted"](torch.rand(2, 15), 0.0, Scene((3, 5), painted=painted))
    consistent(masking)
    assert torch.equal(masking.mask, (torch.tensor(PAINTED) > 0).flatten().expand(2, -1))
    assert masking.keep_valid is None and masking.ids_keep.shape == (2, 11)
    assert masking.ids_keep[0].tolist() == [0, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13]  # reading order


@given(data=st.data(), height=st.integers(1, 5), width=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_painted_takes_a_mask_for_each_image(data, height, width):
    """Any masks that leave a patch visible; if numbers differ, keep_valid marks the padding."""
    row = st.lists(st.booleans(), min_size=height * width, max_size=height * width)
    masks = data.draw(st.lists(row.filter(lambda masked: not all(masked)), min_size=3, max_size=3))
    painted = np.array(masks).reshape(3, height, width)
    scene = Scene((height, width), painted=painted)
    masking = IMAGE_MASKERS["painted"](torch.rand(3, height * width), 0.0, scene)
    consistent(masking)
    assert torch.equal(masking.mask, torch.tensor(masks))
    assert (masking.keep_valid is None) == (len({sum(masked) for masked in masks}) == 1)


def test_a_painted_mask_that_does_not_fit_is_refused():
    """Another grid, another number of images, or nothing visible: each has its message."""
    noise = torch.rand(2, 15)

    def mask(painted):
        return IMAGE_MASKERS["painted"](noise, 0.0, Scene((3, 5), painted=painted))

    for shape in ((5, 3), (3, 3, 5), (15,), ()):
        message = rf"is \({', '.join(map(str, shape))},?\), the images are 3 x 5.*\(2, 3, 5\)"
        with pytest.raises(ValueError, match=message):
            mask(np.zeros(shape))
    with pytest.raises(ValueError, match="masks all 15 patches of image 0; leave one"):
        mask(np.ones((3, 5)))
    with pytest.raises(ValueError, match="masks all 15 patches of image 1; leave one"):
        mask(np.stack([np.zeros((3, 5)), np.ones((3, 5))]))
