"""Masking labs, with a model and without."""

import pytest

from mmkit.widgets.mask_lab import MaskLab


@pytest.fixture
def lab(make_data, make_model):
    """A lab with a model on row 4, whose caption has six words; 3 x 3 patches."""
    lab = MaskLab(make_data(23), make_model())
    lab.row.value, lab.text_percent.value = 4, 50
    return lab


@pytest.fixture
def plain_lab(make_data):
    return MaskLab(make_data(23), patch_size=5)
