"""A moved slider changes the picture, and the mask shown is the one that training draws."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import mmkit as mm
from mmkit.widgets import MaskExplorer, png
from tests.train_small import DEFAULTS


@pytest.fixture
def explorer(make_data):
    return MaskExplorer(make_data(23), patch_size=5)


@pytest.mark.parametrize("name, value", [("row", 3), ("ratio", 70), ("seed", 1), ("epoch", 2)])
def test_every_slider_changes_the_picture(explorer, name, value):
    before = explorer.image.value
    slider = getattr(explorer, name)
    old = slider.value
    slider.value = value
    assert explorer.image.value != before
    slider.value = old
    assert explorer.image.value == before


def test_the_picture_and_the_words_are_those_of_the_sliders(explorer):
    explorer.row.value, explorer.ratio.value = 4, 78
    assert explorer.dataset.texts[4][0] in explorer.words.value
    assert "2 of 9 patches are seen; 77.8 % are hidden" in explorer.words.value
    shown = np.asarray(Image.open(io.BytesIO(explorer.image.value)))
    assert shown.shape == (330, 330, 3)  # 15 pixels, enlarged by a whole factor
    assert np.array_equal(shown[11::22, 11::22], explorer.still().permute(1, 2, 0))


def test_the_mask_is_the_one_that_training_draws(explorer, make_model, tmp_path):
    values = dict(seed=5, image_mask_ratio=0.6, num_epochs=9, output_dir=str(tmp_path))
    config = mm.TrainingConfig(**DEFAULTS | values)
    trainer = mm.MaskedMultimodalTrainer(config, explorer.dataset, model=make_model())
    explorer.seed.value, explorer.ratio.value = 5, 60
    for row, epoch in ((0, 0), (7, 3), (22, 8)):
        explorer.row.value, explorer.epoch.value = row, epoch
        batch = explorer.dataset.batch([11, row, 2])
        assert torch.equal(trainer.maskings(batch, epoch)[0].mask[1:2], explorer.masking.mask)


def test_pictures_are_enlarged_by_whole_factors():
    picture = torch.arange(3 * 4 * 4, dtype=torch.uint8).reshape(3, 4, 4)
    large = np.asarray(Image.open(io.BytesIO(png(picture, 10))))
    assert large.shape == (12, 12, 3)
    assert np.array_equal(large[::3, ::3], picture.permute(1, 2, 0))


def test_it_shows_itself_where_it_is_the_last_line_of_a_cell(explorer, monkeypatch):
    displayed = []
    monkeypatch.setattr("IPython.display.display", displayed.append)
    explorer._ipython_display_()
    assert displayed == [explorer.view]


def test_an_unknown_masker_is_refused(make_data):
    with pytest.raises(ValueError, match="did you mean 'random'"):
        MaskExplorer(make_data(5), patch_size=5, masker="randon")
