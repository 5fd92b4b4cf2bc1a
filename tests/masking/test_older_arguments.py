"""The older arguments of `draw_maskings` mean what the new ones do."""

import pytest
import torch

from mmkit.masking.plan import draw_maskings
from mmkit.noise import mask_noise
from tests.masking.drawn import same, tokens_of


def test_draw_maskings_takes_its_older_arguments_with_a_warning(model, data):
    """A model instead of its TokenInfo, attend without arguments, frequency."""
    batch = data.batch(range(7))
    frequency = mask_noise(0, 0, torch.arange(1), len(model.tokenizer), "frequency")[0]
    attention = mask_noise(1, 0, batch.sample_ids, 9, "attention")
    options = dict(seed=3, epoch=1, image=("attentive", 0.5), text=("frequency", 0.5))
    with pytest.warns(FutureWarning, match="model.token_info"):
        older = draw_maskings(
            batch, model, attend=lambda: attention, frequency=frequency, **options
        )
    tokens = tokens_of(model, frequency, lambda _: attention)
    for one, other in zip(older, draw_maskings(batch, tokens, **options), strict=True):
        same(one, other)
