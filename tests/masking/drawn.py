"""Masks of a batch by name, with everything that a masker may use."""

import dataclasses

import torch

from mmkit.masking.plan import draw_maskings
from mmkit.noise import mask_noise

PAINTED = [[0, 1, 0], [0, 1, 1], [0, 0, 0]]


class Layers:
    """Stands for a data set's DrawingLayers: four made regions of each image."""

    def regions(self, sample_ids, grid):
        noise = mask_noise(0, 0, sample_ids, 4 * grid[0] * grid[1], "regions")
        return noise.unflatten(1, (4, -1)) < 0.4


def tokens_of(model, frequency=None, attend=None):
    """What maskers know of a model, with frequencies or another attention."""
    tokens = model.token_info
    return dataclasses.replace(tokens, frequency=frequency, attend=attend or tokens.attend)


def draw(
    batch, model, image="random", text="random", ratio=0.5, epoch=0, painted=PAINTED, **options
):
    """Both maskings of a batch by these maskers, with everything that they need."""
    frequency = mask_noise(0, 0, torch.arange(1), len(model.tokenizer), "frequency")[0]
    options = dict(seed=3, layers=Layers()) | options
    tokens = tokens_of(model, frequency, options.pop("attend", None))
    image_ratio = painted if image == "painted" else ratio
    return draw_maskings(
        batch,
        tokens,
        epoch=epoch,
        image=(image, image_ratio),
        text=(text, ratio),
        **options,
    )


def same(a, b):
    """Every part of two maskings is equal, to the bit."""
    for field in dataclasses.fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        assert one is other is None or torch.equal(one, other), field.name
